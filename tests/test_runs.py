"Parameters, identities and grids; papermill end to end on a model that runs in no time."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_nb.grid import Incomplete, load_grid, notebook, run_grid
from dora_nb.runs import (
    CURVATURE,
    HISTORY,
    PREDICTIONS,
    RESULT,
    ProbeConfig,
    RunConfig,
    config_from,
    load,
    read_result,
    run,
    run_id,
    run_name,
    run_probe,
)


@pytest.mark.parametrize(
    "params,named",
    [
        ({"lerning_rate": 1e-3}, "did you mean 'learning_rate'"),
        ({"zzz": 1}, "there are task, method"),
        ({"rank": "16"}, "rank='16' is of type str; it must be int"),
        ({"rank": 16.0}, "of type float"),
        ({"rslora": 1}, "must be bool"),
        ({"seed": True}, "of type bool"),
        ({"train_items": "all"}, "train_items"),
        ({"learning_rate": "1e-3"}, "must be float"),
        ({"task": "boolqq"}, "boolq, hellaswag"),
        ({"method": "ia3"}, "base, lora, dora, full"),
        ({"rank": 0}, "rank=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"train_items": 0}, "train_items=0"),
        ({"objective": "x"}, "answer, prompt, choices"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"eval_split": "train"}, "validation"),
        ({"probe": True, "objective": "answer"}, "probe=true needs an objective over choices"),
        ({"probe_items": 0}, "probe_items=0"),
        ({"ranks": "nowhere.json"}, "nowhere.json.* cannot be read"),
    ],
)
def test_wrong_parameters(params, named):
    with pytest.raises(ValueError, match=named) as e:
        config_from(params, "grid.toml")
    assert str(e.value).startswith("grid.toml: ")


def test_whole_numbers_pass_for_floats():
    assert config_from({"alpha": 16}).alpha == 16.0 and isinstance(config_from({"alpha": 16}).alpha, float)


def test_identity():
    same = RunConfig(method="base", rank=4, objective="answer")
    assert (
        run_id(same)
        == run_id(RunConfig(method="base", learning_rate=5.0))
        != run_id(RunConfig(method="base", eval_items=5))
    )
    assert run_id(RunConfig(seed=1)) != run_id(RunConfig(seed=2))
    assert run_id(RunConfig(method="full", rank=4)) == run_id(RunConfig(method="full", rank=8))
    assert run_id(RunConfig(method="lora", detach_norm=False)) == run_id(RunConfig(method="lora"))
    assert run_id(RunConfig(detach_norm=False)) != run_id(RunConfig())
    assert run_id(RunConfig(probe_items=4)) == run_id(RunConfig()) != run_id(RunConfig(probe=True))
    assert run_id(RunConfig(method="base", probe=True)) == run_id(RunConfig(method="base"))
    assert run_name(RunConfig("boolq", "lora", seed=3)).startswith("boolq-lora-r16-s3-")


def test_the_notebook_has_a_run_s_parameters_and_no_others():
    cells = json.loads(notebook("finetune").read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    scope = {}
    exec("".join(cell["source"]), scope)
    assert scope.pop("run_dir") and scope.pop("__builtins__")
    assert RunConfig(**scope) == RunConfig()


def test_the_probe_s_notebook_has_its_parameters_and_no_others():
    cells = json.loads(notebook("probe").read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    scope = {}
    exec("".join(cell["source"]), scope)
    assert scope.pop("out") and scope.pop("__builtins__") and scope.pop("adapter") == ""
    assert ProbeConfig("somewhere", **scope) == ProbeConfig("somewhere")


def test_a_run_with_a_probe_and_a_probe_of_its_adapter(tiny_model_dir, tmp_path):
    config = RunConfig(
        model=str(tiny_model_dir),
        rank=2,
        dropout=0.0,
        train_items=20,
        batch_size=4,
        eval_items=4,
        precision="float32",
        probe=True,
        probe_items=3,
        probe_blocks="all, m",
        probe_products=8,
    )
    run(config, tmp_path / "run", progress=False)
    found = json.loads((tmp_path / "run" / CURVATURE).read_text())
    assert [(p["at"], p["step"]) for p in found["points"]] == [("warm-up", 1), ("middle", 3), ("end", 5)]
    end = found["points"][-1]
    assert end["items"] == 3 and end["seconds"] > 0 and "hessian" in end["blocks"]["m"]
    again = run_probe(
        ProbeConfig(str(tmp_path / "run" / "adapter"), model=str(tiny_model_dir), items=3, blocks="m", products=8),
        tmp_path / "probes" / "curvature.json",
    )
    assert again["loss"] == pytest.approx(end["loss"], rel=1e-5)
    for block in ("all", "layer 0"):
        a, b = (p["blocks"][block]["ggn"]["eigenvalues"] for p in (again, end))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-9)
    with pytest.raises(ValueError, match="adapter is missing"):
        ProbeConfig()


@pytest.mark.parametrize("error", [ValueError("the loss does not bend"), FloatingPointError("not finite")])
def test_a_probe_that_fails_does_not_cost_the_training(tiny_model_dir, tmp_path, monkeypatch, error):
    def probe(*args, **kwargs):
        raise error

    monkeypatch.setattr("dora_nb.runs.probe", probe)
    config = RunConfig(model=str(tiny_model_dir), rank=2, train_items=8, batch_size=4, eval_items=4, probe=True)
    assert run(config, tmp_path, progress=False)["training"]["steps"] == 2
    points = json.loads((tmp_path / CURVATURE).read_text())["points"]
    assert points and all(str(error) in p["error"] for p in points)


def test_ranks_from_a_file(tmp_path):
    file = tmp_path / "ranks.json"
    file.write_text('{"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 6}}')
    config = RunConfig(ranks=str(file))
    assert config.adapter().at("model.layers.0.self_attn.q_proj") == (3, 6)
    before = run_id(config)
    file.write_text('{"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 6}}')
    assert run_id(config) != before  # what the file holds counts, not its name
    file.write_text("{}")
    with pytest.raises(ValueError, match="must hold rank_pattern"):
        RunConfig(ranks=str(file))


GRID = """
name = "tiny"
[fixed]
model = "{model}"
rank = 2
train_items = 8
batch_size = 4
eval_items = 6
precision = "float32"
[axes]
task = ["boolq", "winogrande"]
method = ["base", "dora"]
[[exclude]]
task = "winogrande"
method = "base"
[[override]]
when = {{ method = "dora" }}
set = {{ learning_rate = 2e-3 }}
"""


@pytest.fixture
def grid(tmp_path, tiny_model_dir):
    file = tmp_path / "grid.toml"
    file.write_text(GRID.format(model=tiny_model_dir))
    return file


def test_grid(grid):
    runs = [(c.task, c.method, c.learning_rate) for c in load_grid(grid).configs]
    assert runs == [("boolq", "base", 1e-3), ("boolq", "dora", 2e-3), ("winogrande", "dora", 2e-3)]


@pytest.mark.parametrize(
    "old,new,named",
    [
        ("[axes]", "[axis]", "unknown key 'axis'; did you mean 'axes'"),
        ('name = "tiny"', "", "name is missing"),
        ("rank = 2", "rnk = 2", "did you mean 'rank'"),
        ("rank = 2", "rank = -2", "rank=-2"),
        ('["boolq", "winogrande"]', '"boolq"', "axes.task must be a list"),
        ("learning_rate = 2e-3", "learning_rat = 2e-3", "did you mean 'learning_rate'"),
        ('when = { method = "dora" }', 'when = { methd = "dora" }', "did you mean 'method'"),
        ("when = ", "wenn = ", "exactly the keys"),
        ("[fixed]", "[fixed", "not TOML"),
        ('method = "base"\n[[over', 'method = "none"\n[[over', "method='none'"),
        ('name = "tiny"', 'name = "../tiny"', "name is missing or has other"),
        ('{ method = "dora" }', '"dora"', "both tables"),
        ("eval_items = 6", "weight_decay = -1.0", "at least 0"),
    ],
)
def test_wrong_grids(grid, old, new, named):
    text = grid.read_text()
    assert old in text
    grid.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=named) as e:
        load_grid(grid)
    assert "grid.toml" in str(e.value)


def test_a_grid_from_start_to_report(grid, tmp_path, capsys, monkeypatch):
    "Runs what is missing, skips what is done, reports what fails, mends what is damaged."
    from dora_nb.report import collect, render

    folder = run_grid(grid, tmp_path / "runs", workers=2)
    results, problems = load(folder)
    assert len(results) == 3 and not problems
    for r in results:
        files = {p.name for p in (folder / r["run"]).iterdir()}
        assert {RESULT, PREDICTIONS, "finetune.ipynb", "run.log", "params.json"} <= files
        assert (r["params"]["method"] == "base") == (HISTORY not in files)
        assert r["metrics"]["n"] == 6 and r["id"] in r["run"] and len(r["checksums"]["data"]) == 64
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

    run_grid(grid, tmp_path / "runs")  # nothing to do
    assert written == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()

    damaged, foreign = folder / results[0]["run"], folder / results[1]["run"]
    (damaged / RESULT).write_text((damaged / RESULT).read_text()[:50])
    (foreign / RESULT).write_text((folder / results[2]["run"] / RESULT).read_text())
    _, problems = load(folder)
    assert len(problems) == 1 and "damaged" in problems[0]
    assert sum("belongs to" in p for p in load(folder, load_grid(grid).configs)[1]) == 1
    run_grid(grid, tmp_path / "runs", dry_run=True)
    assert capsys.readouterr().err.count(": to do") == 2
    run_grid(grid, tmp_path / "runs", workers=2)
    again, problems = load(folder)
    assert [r["metrics"]["acc"] for r in again] == [r["metrics"]["acc"] for r in results] and not problems

    (folder / "left-from-another-grid").mkdir()
    assert len(load(folder)[1]) == 1 and not load(folder, load_grid(grid).configs)[1]
    collect(folder, tmp_path / "report", grid)
    page = render(tmp_path / "report", "Tiny").read_text()
    assert (
        "BoolQ (n = 6)" in page
        and "small experiment" in page
        and (tmp_path / "report" / "learning-curves.png").exists()
    )

    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook("report")),
        str(tmp_path / "report.ipynb"),
        "-p",
        "runs_dir",
        str(folder),
        "-p",
        "out",
        str(tmp_path / "again"),
        "-p",
        "grid",
        str(grid),
    ]
    subprocess.run([*command, "--no-progress-bar"], check=True, capture_output=True)
    assert (tmp_path / "again" / "report.md").read_text().splitlines()[2:] == page.splitlines()[2:]


def test_what_a_grid_leaves_out(grid):
    "A combination that cannot be is left out before it is checked; a grid of which nothing is left is none."
    whole = grid.read_text()
    with_codes = whole.replace('"base", "dora"]', '"base", "dora", "full"]').replace(
        "[[override]]", '[[exclude]]\nmethod = "full"\ncompress = "rtn-4"\n[[override]]'
    )
    grid.write_text(with_codes.replace("[axes]", '[axes]\ncompress = ["", "rtn-4"]'))
    assert {(c.method, c.compress) for c in load_grid(grid).configs} == {
        ("base", ""),
        ("base", "rtn-4"),
        ("dora", ""),
        ("dora", "rtn-4"),
        ("full", ""),
    }
    grid.write_text(whole + '\n[[exclude]]\ntask = "boolqq"\n')
    with pytest.raises(ValueError, match="condition: task='boolqq' does not exist"):
        load_grid(grid)
    grid.write_text(whole + "\n[[exclude]]\nrank = 2\n")
    with pytest.raises(ValueError, match="no run is left"):
        load_grid(grid)


def test_what_a_report_holds_is_not_made_again(grid, tmp_path, capsys):
    "A grid made in two places, or on two days: the report keeps what it has and takes what is new."
    from dora_nb.report import collect, read_report

    whole = grid.read_text()
    grid.write_text(whole + '\n[[exclude]]\ntask = "winogrande"\n')
    collect(run_grid(grid, tmp_path / "monday", workers=2), tmp_path / "report", grid)
    assert len(read_report(tmp_path / "report")[0]) == 2
    grid.write_text(whole)
    capsys.readouterr()
    folder = run_grid(grid, tmp_path / "tuesday", known=[tmp_path / "report"])
    assert len(list(folder.iterdir())) == 1 and capsys.readouterr().err.count(": running") == 1
    collect(folder, tmp_path / "report", grid)
    results, problems, predictions, history, *_ = read_report(tmp_path / "report")
    names = {run_name(c) for c in load_grid(grid).configs}
    assert {r["run"] for r in results} == set(predictions.run) == names and len(results) == 3 and not problems
    assert set(history.run) == {n for n in names if "base" not in n} and len(predictions) == 18
    with pytest.raises(ValueError, match="holds 2 runs that are not in .*say with --grid"):
        collect(folder, tmp_path / "report")
    with pytest.raises(ValueError, match="there is no folder .*reprot"):
        run_grid(grid, tmp_path / "tuesday", known=[tmp_path / "reprot"])
    (tmp_path / "report" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="results.json is damaged"):
        run_grid(grid, tmp_path / "tuesday", known=[tmp_path / "report"])


def test_a_failing_run_does_not_stop_the_others(grid, tmp_path, capsys):
    text = grid.read_text().replace("set = { learning_rate = 2e-3 }", 'set = { target_modules = "no_such_layer" }')
    grid.write_text(text + '\n[[exclude]]\ntask = "winogrande"\n')
    with pytest.raises(Incomplete, match="1 of 2 runs failed.*boolq-dora"):
        run_grid(grid, tmp_path / "runs", workers=2)
    said = capsys.readouterr().err
    assert said.count("FAILED") == 1 and "no_such_layer" in said
    results, problems = load(tmp_path / "runs" / "tiny")
    assert [r["params"]["method"] for r in results] == ["base"] and len(problems) == 1 and "not finished" in problems[0]


def test_papermill_by_hand_refuses_what_it_does_not_know(tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook("finetune")),
        str(tmp_path / "out.ipynb"),
        "-p",
        "run_dir",
        str(tmp_path / "run"),
        "-p",
        "lerning_rate",
        "1",
        "--no-progress-bar",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode != 0 and "did you mean 'learning_rate'" in done.stderr and not (tmp_path / "run").exists()


def test_unfinished_is_not_done(tmp_path):
    (tmp_path / "some-run").mkdir()
    with pytest.raises(ValueError, match="some-run: not finished"):
        read_result(tmp_path / "some-run")
    (tmp_path / "some-run" / RESULT).write_text("[]")
    with pytest.raises(ValueError, match="not a run's"):
        read_result(tmp_path / "some-run")
    assert load(tmp_path)[0] == []


def test_notebooks_are_found():
    assert notebook("report").exists()
    with pytest.raises(FileNotFoundError, match="install dora_nb again"):
        notebook("nothing")
    assert Path(notebook("finetune")).name == "finetune.ipynb"
