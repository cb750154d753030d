"What may happen to a grid, and that nothing finished is lost and nothing half-done counts."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import nbformat
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from warm_processes import warm_from

from dora_nb.data.cache import FetchError
from dora_nb.files import claim
from dora_nb.runs.cluster import make_elsewhere, start_patiently
from dora_nb.runs.config import RunConfig
from dora_nb.runs.engines import Local
from dora_nb.runs.execute import DONE, execute
from dora_nb.runs.folder import CHECKPOINTS, ERROR, HISTORY, PREDICTIONS, RESULT, SCHEMA, load
from dora_nb.runs.grid import load_grid
from dora_nb.runs.identity import run_name
from dora_nb.runs.jobs import put_files
from dora_nb.runs.launcher import Incomplete, run_grid

pytestmark = pytest.mark.usefixtures("warm")

GRID = """
name = "tiny"
[fixed]
model = "{model}"
task = "arc_easy"
rank = 2
dropout = 0.1
train_items = {items}
batch_size = 4
eval_items = 6
precision = "float32"
checkpoint_seconds = 0.0
[axes]
method = ["lora", "dora"]
seed = [0]
"""
COMMAND = [sys.executable, "-c", "import sys; from dora_nb.command.main import main; sys.exit(main())", "run"]


@pytest.fixture
def grid(tmp_path, tiny_model_dir):
    "Writes a grid of two runs, or of as many as it is told."

    def make(items=200, **axes):
        text = GRID.format(model=tiny_model_dir, items=items)
        for name, values in axes.items():
            text = "\n".join(
                f"{name} = {values}" if line.startswith(f"{name} =") else line for line in text.splitlines()
            )
        (tmp_path / "grid.toml").write_text(text)
        return tmp_path / "grid.toml"

    return make


def outcome(folder):
    "Everything that a finished grid says about the science, by run."
    results, problems = load(folder)
    assert not problems
    found = {}
    for r in results:
        run_dir = folder / r["run"]
        steps = [json.loads(line) for line in (run_dir / HISTORY).read_text().splitlines()]
        assert [s.pop("step") for s in steps] == list(range(1, r["training"]["steps"] + 1))  # no gap and no repeat
        history = [{k: v for k, v in s.items() if k != "seconds"} for s in steps]
        adapter = {k: t.tolist() for k, t in load_file(run_dir / "adapter" / "adapter_model.safetensors").items()}
        metrics = {k: v for k, v in r["metrics"].items() if k != "seconds"}
        found[r["run"]] = (metrics, pq.read_table(run_dir / PREDICTIONS).to_pylist(), history, adapter)
        assert not (run_dir / CHECKPOINTS).exists() and not list(run_dir.rglob(".dora-nb-*"))
    return found


def start(grid, out, *options):
    "A launcher in a process of its own."
    command = [*COMMAND, str(grid), "--out", str(out), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def holds(p, folder):
    "Whether a process has a file of a folder open: a kernel holds its run's lock, and its command line names no run."
    try:
        return any(str(folder) in f"{link.readlink()}" for link in Path(f"/proc/{p.pid}/fd").iterdir())
    except OSError:
        return False


def processes(folder):
    "Processes that work on runs of a folder: papermill's, and the kernels'."
    papermill, kernels = [], []
    for p in psutil.process_iter(["cmdline"]):
        line = " ".join(p.info["cmdline"] or [])
        if "dora_nb.runs.execute" in line and str(folder) in line:
            papermill.append(p)
        elif "ipykernel_launcher" in line and holds(p, folder):
            kernels.append(p)
    return {"papermill": papermill, "kernel": kernels}


def working(folder):
    return sum(processes(folder).values(), [])


def wait_for(condition, seconds=900):  # a limit for what hangs, far above what a busy machine needs
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)  # to look at every process takes as long
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model_dir, stock):
    "What the grid gives when nobody disturbs it, and how long it takes."
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "grid.toml").write_text(GRID.format(model=tiny_model_dir, items=200))
    with warm_from(stock):
        began = time.monotonic()
        made = run_grid(folder / "grid.toml", folder, workers=2)
    return outcome(made), time.monotonic() - began


def kill_once(grid, out, victim, rng, seconds):
    "Start a grid, kill something at a random moment with SIGKILL, and let the same command finish the rest."
    launcher = start(grid, out, "--workers", "2")
    time.sleep(rng.uniform(0, seconds))
    targets = (
        [launcher] if victim == "launcher" else wait_for(lambda: processes(out)[victim] or launcher.poll() is not None)
    )
    if targets is not True:  # it had not ended before
        os.kill(rng.choice(targets).pid, signal.SIGKILL)
    launcher.communicate(timeout=900)
    again = start(grid, out, "--workers", "2")
    _, said = again.communicate(timeout=900)
    assert again.returncode == 0, said
    wait_for(lambda: not working(out))
    return targets is not True


SLOW = pytest.mark.slow  # those that repeat what a faster one shows


@pytest.mark.parametrize("victim", ["launcher", pytest.param("papermill", marks=SLOW), "kernel"])
def test_killed_once(grid, tmp_path, undisturbed, victim):
    assert kill_once(grid(), tmp_path / "runs", victim, random.Random(victim), undisturbed[1] / 2)
    assert outcome(tmp_path / "runs" / "tiny") == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_killed_at_twenty_moments(grid, tmp_path, undisturbed, moment):
    victim = ("launcher", "papermill", "kernel")[moment % 3]
    kill_once(grid(), tmp_path / "runs", victim, random.Random(moment), undisturbed[1])
    assert outcome(tmp_path / "runs" / "tiny") == undisturbed[0]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_told_to_stop(grid, tmp_path, undisturbed, number):
    "Ctrl-C stops a grid cleanly, with checkpoints; nothing is left running, and it goes on from there."
    folder = tmp_path / "runs" / "tiny"
    launcher = start(grid(), tmp_path / "runs", "--workers", "2")
    wait_for(lambda: [p for p in folder.glob(f"*/{HISTORY}") if len(p.read_text().splitlines()) > 5])
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=900)
    assert launcher.returncode == 130 and "the same command goes on with the rest" in said
    assert not working(tmp_path / "runs") and (kept := list(folder.glob(f"*/{CHECKPOINTS}/*")))
    stopped = {p.parent.parent.name for p in kept}
    assert "not finished" in load(folder)[1][0]
    for name in stopped:  # what was made before is not made again: its times stay as they are
        (folder / name / "before").write_text((folder / name / HISTORY).read_text())
    run_grid(grid(), tmp_path / "runs", workers=2)
    assert outcome(folder) == undisturbed[0]
    longest = 0
    for name in stopped:
        before, after = ((folder / name / n).read_text().splitlines() for n in ("before", HISTORY))
        assert after[: len(before) - 1] == before[:-1]  # the last one may have been cut off in its after_step
        longest = max(longest, len(before))
    assert longest > 5


def test_two_launchers_share_the_work(grid, tmp_path, undisturbed):
    cores = sorted(os.sched_getaffinity(0))
    # as many threads as when one launcher has two workers: sums depend on their number
    halves = [cores[::2], cores[1::2] or cores]
    both = []
    for half in halves:  # a new process gets the cores of the one that starts it
        os.sched_setaffinity(0, half)
        both.append(start(grid(), tmp_path / "runs", "--workers", "1"))
    os.sched_setaffinity(0, cores)
    said = [p.communicate(timeout=900)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert outcome(tmp_path / "runs" / "tiny") == undisturbed[0]
    for name in undisturbed[0]:
        assert "".join(said).count(f"{name}: running") == 1  # each run was made once


REAL = """
from dora_nb.runs.config import config_from; from dora_nb.runs.run import run
names = set(config_from({}).__dataclass_fields__)
run(config_from({k: v for k, v in globals().items() if k in names}), run_dir)
"""
QUICK = f"""
import json
names = ("task", "method", "seed", "protocol", "eval_split", "rank")
result = dict(schema={SCHEMA}, run=Path(run_dir).name, params={{name: globals()[name] for name in names}}, seconds=1.0)
result |= dict(metrics=dict(acc=1.0, n=1, seconds=0.2), training=dict(items=1, steps=1, trainable=1, total=2))
result |= dict(machine=dict(cpu="", gpu=None, threads=1), versions={{}}, peak_memory_bytes=1)
result |= dict(precision=dict(precision="float32", eval_precision="float32"), timings=dict(loading=0.1, evaluation=0.2))
(Path(run_dir) / "{PREDICTIONS}").touch()
(Path(run_dir) / "{RESULT}").write_text(json.dumps(result))
"""


def fake(folder, body="", ending=REAL):
    "A notebook in the place of finetune.ipynb; `tries` counts how often a run was started. The quick ending trains nothing, for what is the launcher's alone."
    count = "from pathlib import Path\nfile = Path(run_dir) / 'tries'\ntries = len(file.read_text()) if file.exists() else 0\nfile.write_text('x' * (tries + 1))"
    cells = [nbformat.v4.new_code_cell("run_dir = ''", metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(text) for text in (count, body, ending)]
    meta = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    path = folder / "fake.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), path)
    return path


def test_deaths_are_tried_again_and_errors_are_not(grid, tmp_path, monkeypatch, capsys):
    "By method and seed: dies twice, raises, dies always, is well."
    body = """
import os, signal
if method == "lora" and seed == 0 and tries < 2 or method == "dora" and seed == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if method == "lora" and seed == 1:
    raise KeyError("an error of its own")
"""
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, body, QUICK))
    with pytest.raises(Incomplete, match="2 of 4 runs failed"):
        run_grid(grid(items=8, seed="[0, 1]"), tmp_path / "runs", workers=2)
    said = capsys.readouterr().err
    assert "KeyError: 'an error of its own'" in said and "in try 3 of 3" in said
    runs = {
        (c.method, c.seed): tmp_path / "runs" / "tiny" / run_name(c)
        for c in load_grid(grid(items=8, seed="[0, 1]")).configs
    }
    assert {k: len((d / "tries").read_text()) for k, d in runs.items()} == {
        ("lora", 0): 3,
        ("lora", 1): 1,
        ("dora", 0): 3,
        ("dora", 1): 1,
    }
    assert {k for k, d in runs.items() if (d / RESULT).exists()} == {("lora", 0), ("dora", 1)}
    problems = load(tmp_path / "runs" / "tiny")[1]
    assert len(problems) == 2 and "KeyError" in "".join(problems) and "kernel died" in "".join(problems)


@pytest.mark.attack("hang")
def test_a_run_that_hangs_is_ended_and_tried_again(grid, tmp_path, monkeypatch, capsys):
    "It also ignores that it is told to stop. The clock is moved once the run hangs, so that a slow machine has its time."
    body = """
import signal, time
if tries == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(run_dir) / "hangs").touch()
    time.sleep(10_000)
"""
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, body, QUICK))
    monkeypatch.setattr("dora_nb.runs.engines.GRACE", 1)
    poll = Local.poll

    def later(self, job):
        if job.tries == 1 and (job.folder / "hangs").exists():
            job.since -= 10_000
        return poll(self, job)

    monkeypatch.setattr(Local, "poll", later)
    folder = run_grid(grid(items=8, method='["lora"]'), tmp_path / "runs", timeout=9_000)
    assert "took longer than 9000 s; it will be tried again" in capsys.readouterr().err
    assert len(load(folder)[0]) == 1 and not working(tmp_path / "runs")


def test_a_loss_that_is_no_number(grid, tmp_path, capsys):
    text = grid(items=40, method='["lora"]').read_text().replace("[axes]", "learning_rate = 1e30\n[axes]")
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(Incomplete):
        run_grid(tmp_path / "grid.toml", tmp_path / "runs")
    said = capsys.readouterr().err
    assert "Diverged: step" in said and "Lower the learning rate" in said


def test_a_result_that_is_none(grid, tmp_path):
    "It is not a result, it is put aside, and the run is made."
    file = grid(items=8, method='["lora"]')
    run_dir = tmp_path / "runs" / "tiny" / run_name(load_grid(file).configs[0])
    claim(run_dir, "run", run_dir.name)
    for content in ("", '{"schema": 1', "[]", '{"schema": 99}'):
        (run_dir / RESULT).write_text(content)
        results, problems = load(run_dir.parent)
        assert not results and len(problems) == 1
    run_grid(file, tmp_path / "runs")
    assert not load(run_dir.parent)[1] and (run_dir / f"damaged-{RESULT}").read_text() == content


@pytest.mark.cold  # Ray starts its own
def test_a_lost_machine(grid, tmp_path, undisturbed, capsys):
    "Two nodes of a Ray cluster, one of them lost in mid-run: every run finishes, once."
    import ray
    from ray.cluster_utils import Cluster

    head = dict(num_cpus=0, include_dashboard=False)
    nodes = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        lost, _ = (start_patiently(lambda: nodes.add_node(num_cpus=1)) for _ in range(2))
        start_patiently(lambda: ray.init(address=nodes.address, log_to_driver=False), ray.shutdown)

        def busy():
            "Whether both nodes have a kernel, which holds locks in a temporary folder; other grids may run on this machine."
            own = {p.pid for p in psutil.Process().children(recursive=True)}
            return sum(p.pid in own for p in processes("/dora-nb-")["kernel"]) == 2

        def lose():
            wait_for(busy)
            nodes.remove_node(lost, allow_graceful=False)

        loser = threading.Thread(target=lose)
        loser.start()
        folder = run_grid(grid(), tmp_path / "runs", engine="ray")
        loser.join()
        said, found = capsys.readouterr().err, outcome(folder)
        assert found == undisturbed[0]
        assert said.count("its node was lost") == 1 and said.count("running, try 2 of 3") == 1
        assert said.count(": done in") == 2
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_another_model_where_a_run_was_sent(tiny_model_dir, tmp_path):
    "A folder of the same name that holds other files makes another run: nothing is trained."
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = RunConfig(task="boolq", method="lora", model=str(tmp_path / "model"))
    planned = run_name(config)
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=f"is not the same here as where {planned} was planned"):
        make_elsewhere(config, planned, None)


def test_names_that_lead_elsewhere(tmp_path):
    (tmp_path / "link").symlink_to("/")
    names = ("../x", "/x", "a/../../x", "./x", ".", "", ".lock", "a/.claim", "link/x", "a//x")
    for name in names:
        with pytest.raises(ValueError, match="nothing was written"):
            put_files(tmp_path, {"good": b"", name: b"bad"})
    assert {p.name for p in tmp_path.iterdir()} == {"link"}


def test_nowhere_to_write(grid):
    with pytest.raises(ValueError, match="cannot be written to.*choose another place with --out"):
        run_grid(grid(items=8), "/proc/here")


def test_a_full_disk(grid, tmp_path, capsys):
    "Runs fail with the reason, what was finished stays, and with room again the same command does the rest."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        file = grid(items=8, method='["lora"]')
        run_grid(file, disk)
        finished = outcome(disk / "tiny")
        with open(disk / "filler", "wb") as f, pytest.raises(OSError, match="No space left"):
            while True:
                f.write(b"0" * 65536)
                f.flush()
        file = grid(items=8, method='["lora"]', seed="[0, 1]")
        with pytest.raises(Incomplete, match="1 of 2"):
            run_grid(file, disk, workers=1)
        assert "No space left" in capsys.readouterr().err
        assert len(load(disk / "tiny")[0]) == 1
        (disk / "filler").unlink()
        run_grid(file, disk)
        after = outcome(disk / "tiny")
        assert len(after) == 2 and finished.items() <= after.items()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_in_mid_run(grid, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        body = "with open(Path(run_dir) / 'filler', 'wb') as f:\n    while True:\n        f.write(b'0' * 65536)\n        f.flush()"
        with pytest.MonkeyPatch.context() as m, pytest.raises(Incomplete):
            m.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, body))
            run_grid(grid(items=8, method='["lora"]'), disk)
        assert "No space left on device" in capsys.readouterr().err
        next(disk.rglob("filler")).unlink()
        assert len(outcome(run_grid(grid(items=8, method='["lora"]'), disk))) == 1
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_parameters_are_data(grid, tmp_path, monkeypatch):
    "A hostile string in a grid file stays a string all the way to the kernel."
    hostile = "x'); open('pwned', 'w') #\"\"\" {0} $(touch pwned) `touch pwned`"
    text = grid(items=8, method='["base"]').read_text().splitlines()
    (line,) = [line for line in text if line.startswith("model")]
    model = shutil.copytree(tomllib.loads(line)["model"], tmp_path / "models" / hostile)
    text = [f"model = {json.dumps(str(model))}" if each == line else each for each in text]
    (tmp_path / "grid.toml").write_text("\n".join(text))
    body = "(Path(run_dir) / 'model').write_text(model)\nraise SystemExit"
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, body))
    with pytest.raises(Incomplete):
        run_grid(tmp_path / "grid.toml", tmp_path / "runs")
    assert next((tmp_path / "runs").rglob("model")).read_text() == str(model)
    assert not list(Path.cwd().glob("pwned")) and not list(tmp_path.rglob("pwned"))


def test_an_estimate_and_a_dry_run(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, ending=QUICK))
    run_grid(grid(items=8), tmp_path / "runs", dry_run=True)
    said = capsys.readouterr().err
    assert said.count("to do") == 3 and "left" not in said and not (tmp_path / "runs").exists()
    run_grid(grid(items=8), tmp_path / "runs", workers=2)
    run_grid(grid(items=8, seed="[0, 1]"), tmp_path / "runs", dry_run=True)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("2 done, 2 to do; about ") and said[-1].endswith(" left")


@pytest.mark.parametrize(
    "wrong, said", [(dict(workers=0), "must be at least 1"), (dict(timeout=-1.0), "must be above 0")]
)
def test_impossible_options(grid, tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        run_grid(grid(items=8), tmp_path, **wrong)


def test_the_error_of_a_try_is_forgotten_when_it_is_done(grid, tmp_path, monkeypatch):
    file = grid(items=8, method='["lora"]')
    with monkeypatch.context() as m, pytest.raises(Incomplete):
        m.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, "1 / 0"))
        run_grid(file, tmp_path / "runs")
    folder = tmp_path / "runs" / "tiny"
    assert "ZeroDivisionError" in load(folder)[1][0]
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, ending=QUICK))
    run_grid(file, tmp_path / "runs")
    assert not load(folder)[1] and not list(folder.glob(f"*/{ERROR}"))


@pytest.mark.cold
@pytest.mark.attack("hostile input")
def test_a_kernel_runs_the_code_of_its_launcher(grid, tmp_path, monkeypatch):
    "Whatever the working directory, the user's profile and the job system hold."
    import datasets

    import dora_nb

    trap = tmp_path / "trap"
    startup, spec = trap / "ipython" / "profile_default" / "startup", trap / "jupyter" / "kernels" / "python3"
    for folder in (trap / "dora_nb", startup, spec):
        folder.mkdir(parents=True)
    (trap / "dora_nb" / "__init__.py").write_text("__version__ = 'planted'")
    for name in ("datasets", "papermill", "ipykernel_launcher", "json", "torch", "pip"):
        (trap / f"{name}.py").write_text("raise SystemExit('planted')")
    (startup / "00.py").write_text("seed = 42")
    (spec / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    file = grid(items=8, method='["lora"]')
    monkeypatch.chdir(trap)
    monkeypatch.setenv("IPYTHONDIR", str(trap / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(trap / "jupyter"))
    for name, value in dict(WORLD_SIZE=2, RANK=1, MASTER_ADDR="10.255.255.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    body = """
import os
import datasets, dora_nb, torch
seen = [dora_nb.__file__, datasets.__file__, __import__("sys").executable, "WORLD_SIZE" in os.environ, seed]
(Path(run_dir) / "seen.json").write_text(__import__("json").dumps(seen))
"""
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, body, QUICK))
    folder = run_grid(file, tmp_path / "runs")
    seen = json.loads(next(folder.rglob("seen.json")).read_text())
    assert seen == [dora_nb.__file__, datasets.__file__, sys.executable, False, 0]


@pytest.mark.attack("silent error")
def test_a_finished_run_that_is_damaged_is_made_again(grid, tmp_path):
    file = grid(items=8, method='["lora"]')
    folder = run_grid(file, tmp_path / "runs")
    expected = outcome(folder)
    path = next(folder.rglob(PREDICTIONS))
    path.write_bytes(path.read_bytes()[:-10])
    assert PREDICTIONS in load(folder)[1][0]
    run_grid(file, tmp_path / "runs")
    assert outcome(folder) == expected


@pytest.mark.attack("silent error")
def test_a_run_s_folder_is_deleted_while_it_runs(grid, tmp_path, monkeypatch):
    "A folder that lost a file of its run is not done: the run fails, and the same command makes it."
    file = grid(items=8, method='["lora"]')
    with monkeypatch.context() as m, pytest.raises(Incomplete, match="1 of 1 runs failed"):
        ending = QUICK + f"(Path(run_dir) / '{PREDICTIONS}').unlink()"
        m.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, ending=ending))
        run_grid(file, tmp_path / "runs")
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, ending=QUICK))
    assert len(load(run_grid(file, tmp_path / "runs"))[0]) == 1


@pytest.mark.attack("crash")
def test_braces_in_a_path(grid, tmp_path, monkeypatch):
    "papermill formats paths; ours are taken as they are."
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, ending=QUICK))
    folder = run_grid(grid(items=8, method='["lora"]'), tmp_path / "{runs} {0} {}")
    assert len(load(folder)[0]) == 1 and folder.parent.name == "{runs} {0} {}"


@pytest.mark.attack("crash")
def test_a_kernel_of_a_user_without_a_home_directory(tmp_path, monkeypatch):
    body = "import os; (Path(run_dir) / 'home').write_text(os.environ['HOME'])"
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict().__getitem__)  # as for a user who is not in the system's list
    params, out = {"run_dir": str(tmp_path)}, (tmp_path / "out.ipynb", tmp_path / "error.json")
    assert execute(fake(tmp_path, body, ""), params, *out) == DONE
    assert "dora-nb-" in (tmp_path / "home").read_text() and "HOME" not in os.environ


@pytest.mark.attack("crash")
def test_a_grid_without_a_place_for_a_cache(grid, tmp_path, monkeypatch):
    for name in ("HOME", "DORA_NB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict().__getitem__)
    with pytest.raises(FetchError, match="set DORA_NB_CACHE"):
        run_grid(grid(items=8), tmp_path / "runs")


@pytest.mark.attack("crash")
def test_a_limit_of_the_system_is_named(grid, tmp_path, monkeypatch, capsys):
    "A kernel that cannot have more files, threads or memory dies; its log says why, and so does the reason."
    body = "import os\nos.write(2, b'OSError: [Errno 24] Too many open files\\n')\nos.kill(os.getpid(), 9)"
    monkeypatch.setattr("dora_nb.runs.jobs.notebook", lambda name: fake(tmp_path, f"import time\n{body}"))
    monkeypatch.setattr("dora_nb.runs.launcher.TRIES", 1)
    with pytest.raises(Incomplete):
        run_grid(grid(items=8, method='["lora"]'), tmp_path / "runs")
    assert "its kernel died (Too many open files; see `ulimit -a`)" in capsys.readouterr().err
