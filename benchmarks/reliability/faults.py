"The real model's grid, killed again and again, against the same grid undisturbed: what was lost, what is wrong."

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from safetensors.torch import load_file

from benchmarks.common import arguments, finish
from dora_nb.runs.folder import HISTORY, PREDICTIONS, RESULT, load
from dora_nb.runs.grid import load_grid
from dora_nb.runs.identity import run_name

GRID = """
name = "faults"

[fixed]
rank = 8
batch_size = 4
alpha = 16.0
train_items = {train}
eval_items = {eval}
checkpoint_seconds = 5.0

[axes]
task = ["boolq", "hellaswag", "winogrande"]
method = ["lora", "dora"]
seed = [0, 1]
"""
FAULTS = ("SIGKILL, launcher", "SIGKILL, papermill", "SIGKILL, kernel", "Ctrl-C, launcher", "SIGTERM, launcher")


def launch(file, out, workers):
    "The command a user gives."
    code = "import sys; from dora_nb.command.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", file, "--out", out, "--workers", workers]
    return subprocess.Popen(list(map(str, command)), start_new_session=True)


def targets(launcher):
    "The launcher, the papermill processes that it started, and their kernels."
    papermill = [p for p in psutil.Process(launcher.pid).children() if "dora_nb.runs.execute" in " ".join(p.cmdline())]
    kernels = [k for p in papermill for k in p.children()]
    return {"launcher": [psutil.Process(launcher.pid)], "papermill": papermill, "kernel": kernels}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def what_it_found(folder):
    "Everything a finished grid says about the science, by run."
    results, problems = load(folder)
    assert not problems, problems
    found = {}
    for r in results:
        adapter = folder / r["run"] / "adapter" / "adapter_model.safetensors"
        steps = [json.loads(line) for line in (folder / r["run"] / HISTORY).read_text().splitlines()]
        found[r["run"]] = dict(
            metrics={k: v for k, v in r["metrics"].items() if k != "seconds"},
            answers=pq.read_table(folder / r["run"] / PREDICTIONS).to_pylist(),
            history=[{k: v for k, v in s.items() if k != "seconds"} for s in steps],
            adapter={k: t.tolist() for k, t in load_file(adapter).items()},
        )
    return found


def disturb(file, out, workers, faults, pause, rng):
    "Make a grid while it is attacked; a row for each fault, and what was finished when it came."
    launcher, rows = launch(file, out, workers), []
    folder = out / "faults"
    for k in range(faults):
        end = time.monotonic() + rng.uniform(0.5, 1.5) * pause
        while launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        if launcher.poll() is not None:
            break  # all is made
        fault = FAULTS[k % len(FAULTS)]
        done = {p.parent.name: digest(p) for p in folder.glob(f"*/{RESULT}")}
        steps = sum(len(p.read_text().splitlines()) for p in folder.glob(f"*/{HISTORY}"))
        word, victim = fault.split(", ")
        try:
            prey = rng.choice(targets(launcher)[victim])
            prey.send_signal({"SIGKILL": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}[word])
        except (IndexError, psutil.NoSuchProcess):
            continue  # between two runs
        rows.append(dict(fault=fault, done=done, steps=steps))
        print(f"fault {len(rows)}: {fault}, {len(done)} runs done, {steps} steps made", file=sys.stderr, flush=True)
        if victim == "launcher":
            launcher.wait()
            launcher = launch(file, out, workers)
    assert launcher.wait() == 0
    return rows


def main():
    options = arguments(__doc__, train=24, eval=24, workers=2, faults=15, pause=20.0, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "grid.toml").write_text(GRID.format(train=options.train, eval=options.eval))
        names = [run_name(config) for config in load_grid(folder / "grid.toml").configs]
        start = time.monotonic()
        assert launch(folder / "grid.toml", folder / "undisturbed", options.workers).wait() == 0
        calm = time.monotonic() - start
        rng, start = random.Random(options.seed), time.monotonic()
        faults = disturb(
            folder / "grid.toml", folder / "disturbed", options.workers, options.faults, options.pause, rng
        )
        stormy = time.monotonic() - start
        expected, found = (what_it_found(folder / n / "faults") for n in ("undisturbed", "disturbed"))
        now = {n: digest(folder / "disturbed" / "faults" / n / RESULT) for n in names}
        left = [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]
    assert set(expected) == set(found) == set(names)
    wrong = [n for n in names if expected[n] != found[n]]
    rows = []
    for fault in FAULTS:
        these = [f for f in faults if f["fault"] == fault]
        rows.append(
            {
                "fault": fault,
                "times": len(these),
                "runs done when it came": ", ".join(str(len(f["done"])) for f in these),
                "finished runs lost or made again": sum(now[n] != was for f in these for n, was in f["done"].items()),
                "runs under way that ended wrong": sum(n not in f["done"] for f in these for n in wrong),
            }
        )
    accuracy = [
        dict(run=n, undisturbed=expected[n]["metrics"]["acc"], disturbed=found[n]["metrics"]["acc"]) for n in names
    ]
    more = dict(accuracy=accuracy, wrong=wrong, processes_left=len(left), seconds=[calm, stormy])
    finish("faults.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None}, **more)


if __name__ == "__main__":
    main()
