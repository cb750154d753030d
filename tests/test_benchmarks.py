"The benchmarks run, and the page on speed is the one that their stored results make. No timing is judged here."

import argparse
import dataclasses
import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SMALL = ("--rounds", "1", "--layers", "1", "--dtypes", "float32", "--tokens", "128")
QUICK = {name: (*SMALL, "--ranks", "4") for name in ("step", "scales")} | {"where": (*SMALL, "--rank", "4")}
QUICK["roofline"] = QUICK["where"]
QUICK["peers"] = QUICK["step"]
QUICK["compile"] = (*QUICK["step"], "--dropouts", "0.05", "--backend", "eager")


@pytest.mark.parametrize("name", QUICK)
def test_it_runs_and_leaves_its_rows(name, tmp_path, monkeypatch, capsys):
    "In this process: imports take longer than it does."
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *QUICK[name], "--out", str(tmp_path / "rows.json")])
    runpy.run_module(f"benchmarks.speed.{name}", run_name="__main__")
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["rows"] and result["machine"]["torch"] in capsys.readouterr().out
    assert all(set(r) <= set(result["columns"]) for r in result["rows"])
    assert all(r.get("one graph") != "no" for r in result["rows"] if r.get("model", "").startswith("our"))


def test_the_gpu_s_script_for_kernels_runs(tmp_path, monkeypatch):
    "In Triton's interpreter where there is no GPU: tests/conftest.py turns it on."
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT)
    options = "--rounds 1 --layers 1 --ranks 4 --dtypes float32 --tokens 64 --shapes small".split()
    monkeypatch.setattr(sys, "argv", ["time_kernels", *options, "--out", str(tmp_path / "rows.json")])
    runpy.run_module("benchmarks.gpu.time_kernels", run_name="__main__")
    first, *_, last = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(float(v) < 2 for k, v in first.items() if k.startswith("error")) and "our DoRA, triton / frozen" in last


def test_memory_runs_and_leaves_its_rows(tmp_path):
    "In a process of its own, which starts others."
    command = [sys.executable, "-m", "benchmarks.speed.memory", *SMALL, "--ranks", "4", "--out", tmp_path / "rows.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["rows"] and result["machine"]["torch"] in done.stdout
    assert all(set(r) <= set(result["columns"]) for r in result["rows"])


def test_the_page_is_made_from_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.speed import report

    shutil.copytree(report.HERE, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(report, "HERE", tmp_path)
    report.main()
    stored, again = ROOT / "reports" / "speed", "run `python -m benchmarks.speed.report`"
    assert (tmp_path / "report.md").read_text() == (stored / "report.md").read_text(), again
    new, old = (plt.imread(folder / "growth.png").astype(float) for folder in (tmp_path, stored))
    assert new.shape == old.shape and np.abs(new - old).mean() < 0.01, again


def printed(monkeypatch, capsys, name, *options):
    "What a benchmark prints, run in this process: imports take longer than it does."
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    runpy.run_path(str(ROOT / "reports" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_answers_alone(monkeypatch, capsys):
    row = json.loads(printed(monkeypatch, capsys, "answers_alone", "--tasks", "openbookqa", "--items", "all"))
    assert row["validation"]["n"] == 500 and row["validation"]["interval"][0] > 0.3  # far above a quarter


def test_lengths_of_what_is_chosen(monkeypatch, capsys):
    "The shares are those that reports/LOG.md gives, and the right answers' are the same for every method."
    said = printed(monkeypatch, capsys, "main/by_length", "--report", ROOT / "reports" / "main" / "large")
    rows = [[word.strip() for word in line.split("|")[1:-1]] for line in said.splitlines()[2:]]
    shares = {(method, metric): (float(short), float(long)) for method, metric, short, long in rows}
    assert len({shares[method, "right"] for method in ("base", "lora", "dora", "full")}) == 1
    log = (ROOT / "reports" / "LOG.md").read_text()
    short, after, right = (round(shares[key][0]) for key in (("base", "sum"), ("dora", "sum"), ("base", "right")))
    assert f"shortest ending for {short} % of the items, after training {after}, where it is right for {right}" in log
    long, after, right = (
        round(shares[key][1]) for key in (("base", "normalised"), ("dora", "normalised"), ("base", "right"))
    )
    assert f"longest for {long} and then {after}, where it is right for {right}" in log


SLICE = """
name = "x"
[fixed]
model = "{model}"
task = "arc_easy"
rank = 2
train_items = 8
batch_size = 4
eval_items = 6
precision = "float32"
[axes]
method = ["base", "lora"]
eval_split = ["validation", "dev"]
"""


def test_a_slice_and_what_it_brings_back(tmp_path, tiny_model_dir, warm):
    from dora_nb.data.cache import cache_dir
    from dora_nb.runs.folder import load

    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "cache").symlink_to(cache_dir().resolve())
    (tmp_path / "grid.toml").write_text(SLICE.format(model=tiny_model_dir))
    (tmp_path / "same.toml").write_text(SLICE.format(model=tiny_model_dir).replace('"x"', '"y"'))  # not made twice
    broken = SLICE.format(model=tiny_model_dir).replace('"x"', '"z"').replace('["base", "lora"]', '["lora"]')
    (tmp_path / "broken.toml").write_text(broken.replace("rank = 2", "rank = 4\nlearning_rate = 1e30"))
    tool = [sys.executable, ROOT / "benchmarks" / "gpu" / "slices.py"]

    def go(out, seconds):
        command = [*tool, "run", tmp_path / "stage", tmp_path / out, tmp_path / "grid.toml"]
        command += [tmp_path / "same.toml", tmp_path / "broken.toml", "--workers", "2"]
        done = subprocess.run([*command, "--seconds", seconds], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    assert go("none", "0")[-1] == "6 runs are left to do"
    said = go("first", "300")
    assert said[-1] == "2 runs are left to do, of which 2 failed", said
    assert sum("FAILED: Diverged" in line for line in said) == 2
    assert go("again", "0")[-1] == "2 runs are left to do" and list((tmp_path / "again").glob("*.zip"))
    done = subprocess.run([*tool, "fetch", tmp_path / "first", tmp_path / "runs"], capture_output=True, text=True)
    assert done.stdout.startswith("6 runs in"), done.stderr
    assert [("Diverged" in p) for p in load(tmp_path / "runs" / "z")[1]] == [True, True]
    results, problems = load(tmp_path / "runs" / "x")
    assert len(results) == 4 and not problems
    assert sum("trained_by" in (r["training"] or {}) for r in results) == 1
    assert not list((tmp_path / "runs").rglob("adapter"))  # too large to bring back


def test_trips_have_room_for_what_they_carry(tmp_path, monkeypatch):
    "Every file is in one trip, under its own path; a file that fits none is named."
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import slices

    sizes = {"data/a": 5, "data/b": 3, "model/m/part-1": 6, "wheels/c": 1}
    for name, size in sizes.items():
        (path := tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    assert slices.divide(tmp_path / "all", tmp_path, 8) == 2 and not (tmp_path / "all").exists()
    trips = [{p for p in (tmp_path / f"trip-{i}").rglob("*") if p.is_file()} for i in (1, 2)]
    assert all(sum(p.stat().st_size for p in trip) <= 8 for trip in trips)
    names = [str(p.relative_to(tmp_path).relative_to(f"trip-{i}")) for i in (1, 2) for p in trips[i - 1]]
    assert sorted(names) == sorted(sizes)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "large").write_bytes(bytes(9))
    with pytest.raises(SystemExit, match="large has 9 bytes, and a trip has room for 8"):
        slices.divide(tmp_path / "all", tmp_path, 8)


@pytest.mark.attack("data loss")
def test_packing_removes_only_what_it_packed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import slices

    slices._clear(tmp_path / "new")
    (tmp_path / "trip-1" / "data").mkdir(parents=True)
    slices._clear(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "trip-1").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files .* give a new folder"):
        slices._clear(tmp_path)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "trip-1").exists()


def test_what_a_gpu_would_run_first(monkeypatch):
    "Each grid of the order has a scale for a GPU, and the first ones come first."
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import slices

    jobs = slices.jobs_of(argparse.Namespace(grids=[], scale=None, known=[], stage=Path("stage")))
    grids = list(dict.fromkeys(job.folder.parent.name for job in jobs))
    assert grids == [f"{name}-large" for name in slices.ORDER]


@pytest.mark.parametrize("size", (1, 5, 10, 11))
def test_a_model_travels_in_parts_that_fit_a_trip(tmp_path, monkeypatch, size):
    "It is made when the last part has arrived, in any order, and only from the expected file."
    from dora_nb.data import assets, weights
    from dora_nb.data.cache import manifest
    from dora_nb.data.parts import MODELS

    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import slices

    content, name = bytes(range(size)), "qwen2.5-coder-0.5b-instruct"
    (tmp_path / "model.gguf").write_bytes(content)
    whole = dataclasses.replace(MODELS[name], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(MODELS, name, whole)
    monkeypatch.setattr(weights, "convert_model", lambda gguf, folder: shutil.copy(gguf, folder))
    slices.cut(tmp_path / "model.gguf", tmp_path / "all", 5)
    parts = sorted((tmp_path / "all").iterdir())
    assert [p.stat().st_size for p in parts] == [min(5, size - i) for i in range(0, size, 5)]

    made = tmp_path / "stage" / "cache" / "package" / name
    options = argparse.Namespace(stage=tmp_path / "stage", folder=tmp_path / "trip")
    for part in reversed(parts):
        assert not made.exists()
        shutil.rmtree(tmp_path / "trip", ignore_errors=True)
        (tmp_path / "trip" / "model" / name).mkdir(parents=True)
        shutil.copy(part, tmp_path / "trip" / "model" / name)
        slices.unpack(options)
    assert (made / "model.gguf").read_bytes() == content and manifest(made)["origin"] == assets.origin_of(name)

    monkeypatch.setitem(MODELS, name, dataclasses.replace(whole, sha256="0" * 64))
    with pytest.raises(SystemExit, match=f"do not make {name}; remove them"):
        slices.unpack(argparse.Namespace(stage=tmp_path / "stage", folder=tmp_path / "trip"))
