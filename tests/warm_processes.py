"""Start Python processes from one that has imported everything: imports take longer than most of what tests run.

A process that is started so is a real one: its parent, number, session, streams, signals, exit status and command line
are those of a process started by `subprocess`. It differs in that its modules are there already. Whether a fresh
interpreter finds and imports them is what the tests without the fixture `warm` show.

    pytest ── starts ──> stock: has imported everything, and waits
    subprocess.Popen([python, ...]) in pytest ── asks ──> stock, which forks; the new process becomes pytest's child
    subprocess.Popen([python, ...]) in such a process forks that process itself
"""

import atexit
import contextlib
import contextvars
import ctypes
import gc
import importlib
import logging
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path

MODULES = """
torch torch.optim torch._dynamo torch.distributed.run torch.distributed.tensor datasets pandas pyarrow.parquet papermill
papermill.__main__ ipykernel.kernelapp ipykernel.ipkernel ipykernel_launcher IPython psutil accelerate scipy.stats
matplotlib.pyplot matplotlib_inline.backend_inline pandas.plotting._matplotlib transformers.models.llama.modeling_llama
transformers.models.auto.tokenization_auto transformers.generation.utils dora_nb.command.main dora_nb.command.commands
dora_nb.runs.grid dora_nb.runs.run dora_nb.runs.probe_run dora_nb.runs.launcher dora_nb.results.page
dora_nb.results.collect dora_nb.results.overview dora_nb.results.answer dora_nb.curvature.rank_search nbdev.test
""".split()
ROOM = 16_000  # bytes for a command line
TAKEN = {"-P": 0, "-u": 0, "-W": 1}  # options of Python, and how many values they have
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_fork_exec = subprocess._fork_exec


def understood(args, env, others):
    "What a command of this Python runs: how ('-c', '-m' or ''), what, its arguments; None for other commands."
    if args[0] != sys.executable or any(others) or env.get("PYTHONPATH") != os.environ.get("PYTHONPATH"):
        return None
    rest, safe = list(args[1:]), bool(env.get("PYTHONSAFEPATH"))
    while rest and rest[0] in TAKEN:
        safe |= rest[0] == "-P"
        rest = rest[1 + TAKEN[rest[0]] :]
    if not rest or rest[0].startswith("-") and (rest[0] not in ("-c", "-m") or len(rest) < 2):
        return None
    how = rest.pop(0) if rest[0] in ("-c", "-m") else ""
    return how, rest[0], rest[1:], safe


def rename(args):
    "Write a command line over one's own, where `ps` and psutil read it."
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    start, end = int(fields[45]), int(fields[46])
    line = b"".join(os.fsencode(a) + b"\0" for a in args)[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def take_streams(streams, keep):
    "Take the streams of a new process, and close what else is open, as `exec` would."
    nowhere = os.open(os.devnull, os.O_RDWR)
    streams = [os.dup(fd) for fd in streams]
    for i, fd in enumerate(streams):
        os.dup2(fd, i)
        os.close(fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:  # the number stays taken, as an object of the old process may close it
            with contextlib.suppress(OSError):
                os.dup2(nowhere, fd, inheritable=False)
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(fd, mode, encoding="utf-8", errors=errors, buffering=1 if fd == 2 else -1, closefd=False)
        setattr(sys, name, stream), setattr(sys, f"__{name}__", stream)


def forget():
    "Forget what belongs to the process that was forked: handlers, finalizers, loops, settings of logs."
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)  # as every Python does
    atexit._clear()
    weakref.finalize._registry.clear()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    import asyncio

    asyncio._set_running_loop(None)
    asyncio.set_event_loop_policy(None)


def execute(how, what, args, safe):
    "Run a program as Python would; its exit status."
    sys.argv = [{"-c": "-c"}.get(how, what), *args]
    if not safe:
        sys.path.insert(0, {"-c": "", "-m": os.getcwd()}.get(how, os.path.dirname(os.path.abspath(what))))
    try:
        if how == "-c":
            from dora_nb.files import start_code

            names = re.findall(r"run_module\('([\w.]+)'", what)
            if [what] == [start_code(name) for name in names]:  # the package is there already
                runpy.run_module(names[0], run_name="__main__", alter_sys=True)
            else:
                main = sys.modules["__main__"] = type(sys)("__main__")
                exec(compile(what, "<string>", "exec"), vars(main))
        elif how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = type(sys)("__main__")
            vars(main).update(__file__=what)
            exec(compile(Path(what).read_text(), what, "exec"), vars(main))
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def become(job, streams, ready=lambda: None):
    "Be the process that was asked for, from its first line to its end; `ready` says that it may be sent signals."
    status = 255
    try:
        if job["session"]:
            os.setsid()
        forget()
        rename(job["args"])
        ready()
        take_streams(streams, job["keep"])
        if job["cwd"] is not None:
            os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        os.sched_setaffinity(0, job["cores"])
        if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        subprocess._fork_exec = starter(None)
        status = contextvars.Context().run(execute, *job["program"])
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    finally:
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status & 255)


class Stock:
    "A process that has imported everything, and forks what it is asked for."

    def __init__(self):
        self.mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.mine, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.mine.settimeout(120)
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import warm_processes; sys.path.pop(0); warm_processes.serve({theirs.fileno()})"
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        command, env = [sys.executable, "-P", "-c", code, "x" * ROOM], os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], start_new_session=True, **quiet)
        theirs.close()
        assert self.mine.recv(10) == b"ready"

    def start(self, job, streams):
        "Have a process started, and become its parent: the nearest subreaper above gets the children of the dead."
        libc = ctypes.CDLL(None)
        libc.prctl(SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self.mine, [pickle.dumps(job)], streams)
            return int(self.mine.recv(20))
        finally:
            libc.prctl(SUBREAPER, 0, 0, 0, 0)

    def end(self):
        self.mine.close()
        self.process.wait()


def serve(number):
    "Wait for what is to be started; run by a process of its own."
    for name in MODULES:
        importlib.import_module(name)
    from dora_nb.data.assets import is_cached, load_model

    if is_cached("smollm2-135m-instruct"):  # verified once, and not by every process
        load_model("smollm2-135m-instruct")
    asked, parent = socket.socket(fileno=number), os.getppid()
    asked.send(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(asked, 1 << 20, 8)
        if not message:
            os._exit(0)
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            for fd in fds:
                os.close(fd)
        elif os.fork():
            os._exit(0)
        else:
            while os.getppid() != parent:
                time.sleep(0.001)
            become(pickle.loads(message), fds, lambda: asked.send(str(os.getpid()).encode()))


def starter(stock):
    "What takes the place of `subprocess._fork_exec`: Python processes come from a stock, or by forking this process."

    def fork_exec(args, executables, close_fds, keep, cwd, env, r0, w0, r1, w1, r2, w2, e0, e1, *rest):
        restore, session, group, gid, groups, uid, umask, prepare = rest[:8]
        text = [os.fsdecode(a) for a in args]
        variables = dict(os.environ) if env is None else dict(os.fsdecode(v).split("=", 1) for v in env)
        kept = [fd for fd in keep if fd != e1]
        others = (
            group != -1,
            gid is not None,
            groups is not None,
            uid is not None,
            umask != -1,
            prepare,
            stock and kept,
        )
        program = understood(text, variables, others)
        if program is None:
            return _fork_exec(args, executables, close_fds, keep, cwd, env, r0, w0, r1, w1, r2, w2, e0, e1, *rest)
        job = dict(args=text, env=variables, cwd=cwd or os.getcwd(), session=session, keep=kept, program=program)
        job["cores"] = os.sched_getaffinity(0)
        streams = [r0 if r0 != -1 else 0, w1 if w1 != -1 else 1, w2 if w2 != -1 else 2]
        if stock:
            return stock.start(job, streams)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        pid = os.fork()
        if not pid:
            become(job, streams)
        return pid

    return fork_exec


@contextlib.contextmanager
def warm_from(stock):
    "Start Python processes from a stock, inside; without one, as ever."
    before = subprocess._fork_exec if stock else None
    if stock:
        subprocess._fork_exec = starter(stock)
    try:
        yield
    finally:
        if stock:
            subprocess._fork_exec = before
