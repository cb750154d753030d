"Parameters, identities and grids; papermill end to end on a model that runs in no time."

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import papermill
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dora_nb.files import MARKER, claim, owned, sha256
from dora_nb.layers.linear import DoRALinear
from dora_nb.messages import say
from dora_nb.models.adapt import adapt
from dora_nb.runs import jobs, launcher
from dora_nb.runs.base import load_base
from dora_nb.runs.cluster import start_patiently
from dora_nb.runs.config import RunConfig, config_from
from dora_nb.runs.folder import (
    CHECKPOINTS,
    CURVATURE,
    GEOMETRY,
    HISTORY,
    PREDICTIONS,
    RANKS,
    RESULT,
    check_files,
    load,
    read_result,
)
from dora_nb.runs.grid import RESULTS, gathered, load_grid
from dora_nb.runs.identity import cut_of, effective, run_id, run_name, training_id
from dora_nb.runs.jobs import Job, gpus, notebook
from dora_nb.runs.launcher import Incomplete, run_grid
from dora_nb.runs.observers import _is_due, peak_memory
from dora_nb.runs.probe_run import ProbeConfig, run_probe
from dora_nb.runs.processes import cores
from dora_nb.runs.progress import progress_of
from dora_nb.runs.run import run


@pytest.mark.parametrize(
    "params,named",
    [
        ({"lerning_rate": 1e-3}, "did you mean 'learning_rate'"),
        ({"zzz": 1}, "choose one of task, method"),
        ({"rank": "16"}, "rank='16' is of type str; it must be int"),
        ({"rank": 16.0}, "of type float"),
        ({"rslora": 1}, "must be bool"),
        ({"seed": True}, "of type bool"),
        ({"train_items": "all"}, "train_items"),
        ({"learning_rate": "1e-3"}, "must be float"),
        ({"task": "boolqq"}, "did you mean 'boolq'"),
        ({"method": "ia3"}, "base, lora, dora, full"),
        ({"rank": 0}, "rank=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"train_items": 0}, "train_items=0"),
        ({"objective": "x"}, "answer, prompt, choices"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"eval_split": "train"}, "validation"),
        ({"probe": True, "objective": "answer"}, "probe=true needs an objective over choices"),
        ({"probe_steps": "start, end"}, "must be some of warm-up, middle, end"),
        ({"probe_steps": ""}, "must be some of warm-up, middle, end"),
        ({"probe_items": 0}, "probe_items=0"),
        ({"ranks": "nowhere.json"}, "nowhere.json.* cannot be read"),
        pytest.param({"mixture": "boolq,boolq"}, "'boolq' is named twice", marks=pytest.mark.attack("crash")),
        pytest.param({"learning_rate": 10**400}, "learning_rate=1000", marks=pytest.mark.attack("crash")),
        pytest.param({"dev_cut": "pairs"}, "twins, items", marks=pytest.mark.attack("silent error")),
    ],
)
def test_wrong_parameters(params, named):
    with pytest.raises(ValueError, match=named) as e:
        config_from(params, "grid.toml")
    assert str(e.value).startswith("grid.toml: ")


def test_whole_numbers_pass_for_floats():
    assert config_from({"alpha": 16}).alpha == 16.0 and isinstance(config_from({"alpha": 16}).alpha, float)


def test_stored_results_can_be_made_again():
    "Every result in reports/ has parameters that still configure a run, and mean what they meant."
    found = 0
    for file in (Path(__file__).parents[2] / "reports").rglob(RESULTS):
        for result in json.loads(file.read_text())["results"]:
            if not result["params"].get("ranks"):
                made = vars(effective(config_from(result["params"])))
                assert {k: made[k] for k in result["params"]} == result["params"]
                found += 1
    assert found > 500


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


def test_spaces_between_names_are_no_other_run():
    one = RunConfig(target_modules="q_proj,v_proj", mixture="boolq,piqa", probe=True, probe_steps="warm-up, end")
    two = RunConfig(target_modules="q_proj, v_proj", mixture=" boolq , piqa", probe=True, probe_steps="warm-up,end")
    assert run_id(one) == run_id(two) and effective(one) == effective(two)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(target_modules=["q_proj"]),
        dict(processes="2"),
        dict(eval_items=2.5),
        dict(probe="yes"),
        dict(geometry=1.5),
        dict(rank=True),
    ],
)
def test_a_value_of_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be of type"):
        RunConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [dict(objective="answer"), dict(objective="foo"), dict(max_tokens=0), dict(items="3")]
)
def test_a_probe_that_cannot_be_made_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ProbeConfig("somewhere", **wrong)


@pytest.mark.parametrize("methods", (["lora", "dora", "base"], ["lora", "full"], ["base", "lora"]))
def test_the_runs_without_adapters_hide_none_with(tmp_path, methods):
    "Of one model, those with an adapter are checked whatever comes last."
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    text = f'name = "x"\n[fixed]\nmodel = "{(tmp_path / "gpt2").as_posix()}"\n[axes]\nmethod = {json.dumps(methods)}\n'
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(ValueError, match="'q_proj' matches no module"):
        run_grid(tmp_path / "grid.toml", tmp_path / "runs", dry_run=True)


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize(
    "init, rank, named", [("orthogonal", 3, "even rank"), ("pissa", 17, "at most 16"), ("olora", 40, "")]
)
def test_a_rank_that_a_start_does_not_allow_is_refused_before_the_runs(
    tiny_model_dir, tmp_path, method, init, rank, named
):
    text = f'name = "x"\n[fixed]\nmodel = "{tiny_model_dir.as_posix()}"\nmethod = "{method}"\nrank = {rank}\ninit = "{init}"\n'
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"model.layers.0.*_proj: init='{init}' needs .*{named}"):
        run_grid(tmp_path / "grid.toml", tmp_path / "runs", dry_run=True)


def test_a_scheme_that_reads_no_items_needs_none(tiny_model_dir, tmp_path):
    "Data of one's own may have a validation split alone."
    (tmp_path / "validation.jsonl").write_text(
        json.dumps(dict(prompt="Two and two are", choices=["four", "five"], answer=0))
    )
    load_base(str(tiny_model_dir), "rtn-4", str(tmp_path), "cpu")
    with pytest.raises(ValueError, match="no train items"):
        load_base(str(tiny_model_dir), "wanda-0.5", str(tmp_path), "cpu")


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


@pytest.mark.long
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
        probe_steps="end, warm-up",
    )
    run(config, tmp_path / "run", progress=False)
    found = json.loads((tmp_path / "run" / CURVATURE).read_text())
    assert [(p["at"], p["step"]) for p in found["points"]] == [("warm-up", 1), ("end", 5)]  # not the middle, at 3
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
@pytest.mark.long
def test_a_probe_that_fails_does_not_cost_the_training(tiny_model_dir, tmp_path, monkeypatch, error):
    def probe(*args, **kwargs):
        raise error

    monkeypatch.setattr("dora_nb.runs.observers.probe", probe)
    config = RunConfig(model=str(tiny_model_dir), rank=2, train_items=8, batch_size=4, eval_items=4, probe=True)
    assert run(config, tmp_path, progress=False)["training"]["steps"] == 2
    points = json.loads((tmp_path / CURVATURE).read_text())["points"]
    assert points and all(str(error) in p["error"] for p in points)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ["spare", "experts"])
@pytest.mark.long
def test_an_adapter_without_effect_ends_a_run_and_an_idle_expert_does_not(tiny_model_dir, tmp_path, monkeypatch, name):
    "A layer that the model never calls is named after the first step; an expert after the last one, as it may be called late."

    def with_idle_layer(model, config):
        adapt(model, config)
        model.add_module(name, DoRALinear(torch.nn.Linear(4, 4), rank=2))

    monkeypatch.setattr("dora_nb.runs.fit.adapt", with_idle_layer)
    config = RunConfig(model=str(tiny_model_dir), rank=2, train_items=8, batch_size=4, eval_items=4)
    if name == "spare":
        with pytest.raises(ValueError, match="target_modules: 'spare' got no gradient.*Leave it out of target_modules"):
            run(config, tmp_path, progress=False)
        return
    with pytest.warns(UserWarning, match="'experts' got no gradient: it was sent no token"):
        assert run(config, tmp_path, progress=False)["training"]["steps"] == 2
    assert (tmp_path / "adapter").exists()


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
task = ["boolq", "arc_easy"]
method = ["base", "dora"]
[[exclude]]
task = "arc_easy"
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
    assert runs == [("boolq", "base", 1e-3), ("boolq", "dora", 2e-3), ("arc_easy", "dora", 2e-3)]


@pytest.mark.parametrize(
    "old,new,named",
    [
        ("[axes]", "[axis]", "unknown key 'axis'; did you mean 'axes'"),
        ('name = "tiny"', "", "name is missing"),
        ("rank = 2", "rnk = 2", "did you mean 'rank'"),
        ("rank = 2", "rank = -2", "rank=-2"),
        ('["boolq", "arc_easy"]', '"boolq"', "axes.task must be a list"),
        ("learning_rate = 2e-3", "learning_rat = 2e-3", "did you mean 'learning_rate'"),
        ('when = { method = "dora" }', 'when = { methd = "dora" }', "did you mean 'method'"),
        ("when = ", "wenn = ", "exactly the keys"),
        ("[fixed]", "[fixed", "not TOML"),
        ('method = "base"\n[[over', 'method = "none"\n[[over', "method='none'"),
        ('name = "tiny"', 'name = "../tiny"', "name is missing or not possible"),
        ('{ method = "dora" }', '"dora"', "both tables"),
        ("eval_items = 6", "weight_decay = -1.0", "at least 0"),
        pytest.param(
            "[[exclude]]",
            "\n".join(
                f"{name} = {[*range(1, 41)]}"
                for name in ("seed", "epochs", "max_tokens", "probe_items", "probe_products")
            )
            + "\n[[exclude]]",
            "the axes have 409,600,000 combinations, and a grid may have 100,000",
            marks=pytest.mark.attack("hang"),
        ),
    ],
)
def test_wrong_grids(grid, old, new, named):
    text = grid.read_text()
    assert old in text
    grid.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=named) as e:
        load_grid(grid)
    assert "grid.toml" in str(e.value)


def test_a_grid_from_start_to_report(grid, tmp_path, capsys, monkeypatch, warm):
    "Runs what is missing, skips what is done, reports what fails, mends what is damaged."
    from dora_nb.results.collect import collect
    from dora_nb.results.page import render

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
    assert len(problems) == 2 and "damaged" in problems[0]
    assert "predictions.parquet is not the file that this run wrote" in problems[1]
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
    again = (tmp_path / "again" / "report.md").read_text()
    assert again.splitlines()[2:-1] == page.splitlines()[2:-1]  # the title, and the checksum in the last line, differ


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


def test_what_a_report_holds_is_not_made_again(grid, tmp_path, capsys, warm):
    "A grid made in two places, or on two days: the report keeps what it has and takes what is new."
    from dora_nb.results.collect import collect
    from dora_nb.results.stored import read_report

    whole = grid.read_text()
    grid.write_text(whole + '\n[[exclude]]\ntask = "arc_easy"\n')
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
    with pytest.raises(ValueError, match="results.json lacks 'results'"):
        run_grid(grid, tmp_path / "tuesday", known=[tmp_path / "report"])


@pytest.mark.long
def test_a_failing_run_does_not_stop_the_others(grid, tmp_path, capsys):
    text = grid.read_text().replace("set = { learning_rate = 2e-3 }", "set = { max_tokens = 1 }")
    grid.write_text(text + '\n[[exclude]]\ntask = "arc_easy"\n')
    with pytest.raises(Incomplete, match="1 of 2 runs failed.*boolq-dora"):
        run_grid(grid, tmp_path / "runs", workers=2)
    said = capsys.readouterr().err
    assert said.count("FAILED") == 1 and "does not fit in max_tokens=1" in said
    results, problems = load(tmp_path / "runs" / "tiny")
    assert [r["params"]["method"] for r in results] == ["base"] and len(problems) == 1 and "not finished" in problems[0]


def test_papermill_by_hand_refuses_what_it_does_not_know(tmp_path, warm):
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
    with pytest.raises(ValueError, match="must hold a JSON object, and holds a list"):
        read_result(tmp_path / "some-run")
    (tmp_path / "some-run" / RESULT).write_text("{}")
    with pytest.raises(ValueError, match="not a run's"):
        read_result(tmp_path / "some-run")
    assert load(tmp_path)[0] == []


def test_notebooks_are_found():
    assert notebook("report").exists()
    with pytest.raises(FileNotFoundError, match="install dora_nb again"):
        notebook("nothing")
    assert Path(notebook("finetune")).name == "finetune.ipynb"


def tree(folder):
    "Every file of a folder, with its content and its times."
    return {p: (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in sorted(folder.rglob("*"))}


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


@pytest.fixture
def tiny(tiny_model_dir):
    "Configures a run that takes no time."

    def make(**changes):
        given = dict(task="arc_easy", method="lora", model=str(tiny_model_dir), rank=2, train_items=8)
        given |= dict(batch_size=4, eval_items=4, dropout=0.0, precision="float32")
        return RunConfig(**given | changes)

    return make


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    "A finished run in a folder of its own name."
    given = dict(task="arc_easy", method="lora", model=str(tiny_model_dir), rank=2, train_items=8)
    config = RunConfig(**given, batch_size=4, eval_items=4, dropout=0.0, precision="float32", geometry=1)
    folder = tmp_path_factory.mktemp("made") / run_name(config)
    run(config, folder, progress=False)
    return config, folder


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("method", ["base", "lora", "full"])
def test_a_folder_with_files_of_somebody_else(tiny, tmp_path, method):
    "A run never cleans a folder that it did not make, at any depth."
    for name in ("checkpoints/mine.pt", "adapter/mine.txt", "history.jsonl", "notes/.2024-12-draft.md", ".12-draft.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="holds files that no run of dora_nb made.*nothing was changed"):
        run(tiny(method=method), tmp_path, progress=False)
    assert tree(tmp_path) == before


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("method", ["base", "lora"])
@pytest.mark.long
def test_a_folder_with_an_unfinished_run_of_another_kind(tiny, tmp_path, method):
    "A run that trains nothing, or something else, leaves another run's checkpoints alone."
    config, folder = tiny(seed=1), tmp_path / "run"
    with pytest.MonkeyPatch.context() as m, pytest.raises(RuntimeError, match="stopped here"):
        m.setattr("dora_nb.runs.run.evaluate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("stopped here")))
        run(config, folder, progress=False)
    assert list((folder / CHECKPOINTS).iterdir())
    before = tree(folder)
    with pytest.raises(ValueError, match=f"belongs to another run, {run_name(config)}"):
        run(tiny(method=method, seed=0), folder, progress=False)
    assert {p: v for p, v in tree(folder).items() if p.name != ".lock"} == {
        p: v for p, v in before.items() if p.name != ".lock"
    }
    run(config, folder, progress=False)
    assert not (folder / CHECKPOINTS).exists() and owned(folder, "run")


@pytest.mark.attack("data loss")
def test_files_that_a_user_puts_into_a_run_stay(tiny, made, tmp_path):
    config, folder = made
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    for name in (
        "adapter/notes.md",
        "checkpoints/notes.md",
        ".2024-12-draft.md",
    ):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    (copy / RESULT).unlink()  # as every message says: delete it to run again
    run(config, copy, progress=False)
    for name in (
        "adapter/notes.md",
        "checkpoints/notes.md",
        ".2024-12-draft.md",
    ):
        assert (copy / name).read_text() == "mine"
    assert run(config, copy, progress=False)["run"] == folder.name


@pytest.mark.attack("data loss")
@pytest.mark.parametrize(
    "name", [".dora-nb-x-adapter", ".dora-nb-99999999999999999999-adapter", ".dora-nb-1-x-adapter"]
)
def test_names_that_are_not_quite_ours_are_left_alone(made, tmp_path, name):
    config, folder = made
    copy = copied(folder, tmp_path / folder.name)
    (copy / name).mkdir()
    (copy / name / "mine").touch()
    assert run(config, copy, progress=False)["run"] == folder.name and (copy / name / "mine").exists()


@pytest.mark.attack("crash")
def test_a_folder_inside_an_adapter_stays(made, tmp_path):
    config, folder = made
    copy = copied(folder, tmp_path / folder.name)
    (copy / "adapter" / "plots").mkdir()
    (copy / "adapter" / "plots" / "mine.txt").write_text("mine")
    os.mkfifo(copy / "adapter" / "pipe")
    (copy / RESULT).unlink()
    again = run(config, copy, progress=False)
    assert again["files"].keys() == read_result(folder)["files"].keys() and read_result(copy)["run"] == folder.name
    assert (copy / "adapter" / "plots" / "mine.txt").read_text() == "mine" and (copy / "adapter" / "pipe").is_fifo()
    beside = RunConfig(**vars(config) | dict(eval_items=3))
    taken = run(beside, tmp_path / run_name(beside), progress=False)
    assert taken["training"]["trained_by"] == folder.name
    assert {n: v for n, v in taken["files"].items() if n.startswith("adapter/")} == {
        n: v for n, v in again["files"].items() if n.startswith("adapter/")
    }


@pytest.mark.attack("data loss")
@pytest.mark.long
def test_two_runs_share_no_file(made, tmp_path):
    "Writing into the adapter of one, whose training another has taken over, changes that one only; links of an earlier version are replaced."
    config, folder = made
    one, beside = copied(folder, tmp_path / folder.name), RunConfig(**vars(config) | dict(eval_items=3))
    two = tmp_path / run_name(beside)
    for _ in range(2):
        run(beside, two, progress=False)
        assert all(p.stat().st_nlink == 1 for p in [*one.rglob("*"), *two.rglob("*")] if p.is_file())
        weights = two / "adapter" / "adapter_model.safetensors"
        weights.unlink()
        os.link(one / "adapter" / weights.name, weights)
        (two / RESULT).unlink()
    (one / RESULT).unlink()  # trained again in this folder, into files of its own
    run(config, one, progress=False)
    run(beside, two, progress=False)
    flip(weights)
    assert check_files(one, read_result(one), adapter=True) is None
    with pytest.raises(ValueError, match="is not the file that this run wrote"):
        check_files(two, read_result(two), adapter=True)


@pytest.mark.attack("hang")
@pytest.mark.parametrize("name", ["run.log", "finetune.ipynb", MARKER])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink(p.parent.parent.parent / "mine", p)])
def test_what_is_no_plain_file_fails_a_run_by_name(grid, tmp_path, capsys, monkeypatch, name, make):
    monkeypatch.setattr("dora_nb.runs.launcher.TRIES", 1)
    (tmp_path / "runs" / "mine").parent.mkdir()
    (tmp_path / "runs" / "mine").write_text("mine")
    one = grid.read_text().replace('["boolq", "arc_easy"]', '["boolq"]').replace('["base", "dora"]', '["dora"]')
    grid.write_text(one)
    folder = tmp_path / "runs" / "tiny" / run_name(load_grid(grid).configs[0])
    claim(folder, "run", folder.name)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(Incomplete):
        run_grid(grid, tmp_path / "runs")
    assert f"{folder / name} is a " in capsys.readouterr().err and (tmp_path / "runs" / "mine").read_text() == "mine"


@pytest.mark.attack("hang")
@pytest.mark.parametrize("processes", [cores() + 1, 10**30])
def test_more_processes_than_cores(grid, tiny, tmp_path, monkeypatch, processes):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("dora_nb.runs.processes.subprocess.Popen", None)  # nothing may be started
    said = f"processes={processes} needs as many cores, and this process may use {cores()}"
    with pytest.raises(ValueError, match=said):
        run(tiny(processes=processes), tmp_path / "run", progress=False)
    grid.write_text(grid.read_text().replace("rank = 2", f"rank = 2\nprocesses = {min(processes, 2**60)}"))
    with pytest.raises(ValueError, match=f"grid.toml: processes={min(processes, 2**60)} needs as many cores"):
        run_grid(grid, tmp_path / "runs", dry_run=True)
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


@pytest.mark.attack("hang")
def test_geometry_at_more_steps_than_there_are(tiny, tmp_path):
    for steps in range(1, 40):
        for times in range(1, 60):
            due = {math.ceil(k * steps / times) for k in range(1, times + 1)}
            assert {step for step in range(1, steps + 1) if _is_due(step, steps, times)} == due
    run(tiny(geometry=int("9" * 30)), tmp_path / "run", progress=False)
    assert [p["step"] for p in json.loads((tmp_path / "run" / GEOMETRY).read_text())["points"]] == [1, 2]


@pytest.mark.attack("hang")
def test_a_history_that_is_a_pipe_shows_no_progress(tmp_path):
    os.mkfifo(tmp_path / HISTORY)
    assert progress_of(Job(RunConfig(), tmp_path)) == "starting"


@pytest.mark.attack("data loss")
def test_a_dry_run_writes_nothing(grid, tmp_path):
    configs = load_grid(grid).configs
    folder, report = tmp_path / "runs" / "tiny" / run_name(configs[0]), tmp_path / "report"
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / CHECKPOINTS / "step-00000001.safetensors").write_text("hours of work")
    (folder / MARKER).write_text(json.dumps({"made_by": "dora_nb", "kind": "run", "name": folder.name}))
    report.mkdir()
    done = dict(run=folder.name, params=vars(configs[0]), metrics=dict(acc=1.0, n=1, seconds=1.0), training=None)
    done |= dict(machine=dict(cpu="", gpu=None, threads=1), versions={}, timings=dict(loading=1.0, evaluation=1.0))
    done |= dict(precision=dict(precision="float32", eval_precision="float32"), peak_memory_bytes=1, seconds=1.0)
    (report / RESULTS).write_text(json.dumps({"results": [done]}))
    before = tree(tmp_path)
    run_grid(grid, tmp_path / "runs", dry_run=True, known=[report])
    assert tree(tmp_path) == before


@pytest.mark.attack("data loss")
def test_a_dry_run_fetches_nothing(grid, tmp_path, monkeypatch, capsys):
    "Our own model and data are known by the packages that they are pinned to."
    monkeypatch.setenv("DORA_NB_CACHE", str(tmp_path / "cache"))
    lines = [line for line in grid.read_text().splitlines() if not line.startswith("model =")]
    grid.write_text("\n".join(lines))
    run_grid(grid, tmp_path / "runs", dry_run=True)
    assert capsys.readouterr().err.count("to do") == 4 and sorted(tmp_path.iterdir()) == [grid]


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("name", ["adapter", CHECKPOINTS])
def test_a_link_in_a_run_s_folder_is_not_followed(tiny, made, tmp_path, name):
    config, folder = made
    folder, shared = copied(folder, tmp_path / folder.name), tmp_path / "shared"
    shared.mkdir()
    (shared / "tokenizer.json").write_text("mine")
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to(shared)
    (folder / RESULT).unlink()
    with pytest.raises(ValueError, match="is a link.*nothing was changed"):
        run(config, folder, progress=False)
    assert [p.read_text() for p in shared.iterdir()] == ["mine"]


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("name", [RESULT, PREDICTIONS])
@pytest.mark.parametrize("how", ["folder", "link"])
def test_what_cannot_be_read_is_not_taken_for_damaged(made, tmp_path, name, how):
    "A disk that is away, or no permission: the run is not made again, and its result stays."
    config, folder = made
    folder = copied(folder, tmp_path / folder.name)
    (folder / name).rename(tmp_path / "kept")
    (folder / name).mkdir() if how == "folder" else (folder / name).symlink_to(tmp_path / "away")
    before = tree(folder)
    with pytest.raises(ValueError, match=f"{name} (cannot be read|is missing)|not finished"):
        run(config, folder, progress=False)
    assert {p for p in tree(folder)} == set(before)
    (folder / name).rmdir() if how == "folder" else (folder / name).unlink()
    (tmp_path / "kept").rename(folder / name)
    assert read_result(folder)


@pytest.mark.attack("data loss")
def test_a_second_damage_does_not_replace_the_first(made, tmp_path):
    config, folder = made
    folder = copied(folder, tmp_path / folder.name)
    kept = []
    for _ in range(2):
        kept.append((folder / RESULT).read_text())
        (folder / HISTORY).write_text((folder / HISTORY).read_text() + "\n")
        run(config, folder, progress=False)
    assert sorted(p.read_text() for p in folder.glob(f"damaged-*{RESULT}")) == sorted(kept)


@pytest.mark.attack("data loss")
def test_a_damaged_result_stays_until_a_new_one_takes_its_place(made, tmp_path, monkeypatch):
    config, folder = made
    folder = copied(folder, tmp_path / folder.name)
    flip(folder / HISTORY)
    before = (folder / RESULT).read_text()
    monkeypatch.setattr("dora_nb.runs.run.load_base", lambda *_, **__: (_ for _ in ()).throw(OSError("no such disk")))
    with pytest.raises(OSError, match="no such disk"):
        run(config, folder, progress=False)
    assert (folder / RESULT).read_text() == before and not list(folder.glob("damaged-*"))


@pytest.mark.attack("data loss")
def test_a_run_s_folder_is_moved_while_it_trains(tiny, tmp_path, monkeypatch):
    "The run stops and says so; moved back, the same call goes on."
    import dora_nb.runs.fit as fits

    config, folder, moved = tiny(train_items=16), tmp_path / "run", tmp_path / "moved"
    check, calls = fits.check_there, []

    def move(run_dir):
        calls.append(1)
        if len(calls) == 3:
            folder.rename(moved)
        check(run_dir)

    monkeypatch.setattr("dora_nb.runs.fit.check_there", move)
    with pytest.raises(RuntimeError, match="was moved or removed while its run was at work; move it back"):
        run(config, folder, progress=False)
    assert not folder.exists() or not list(folder.glob("*"))
    if folder.exists():
        folder.rmdir()
    moved.rename(folder)
    assert run(config, folder, progress=False)["training"]["steps"] == 4


@pytest.mark.attack("silent error")
def test_wanda_sees_the_same_items_with_and_without_an_adapter():
    given = dict(task="hellaswag", mixture="boolq,hellaswag", compress="wanda-0.5")
    assert effective(RunConfig(method="base", **given)).mixture == "boolq,hellaswag"
    assert effective(RunConfig(method="base", **given | dict(compress=""))).mixture == ""
    cut = dict(task="boolq", mixture="winogrande,boolq", compress="wanda-0.5", dev_cut="items")
    assert effective(RunConfig(method="base", **cut)).dev_cut == "items"


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "changes,name",
    [
        (dict(task="winogrande"), "twins"),  # the same items as before groups of other tasks
        (dict(task="winogrande", dev_cut="items"), "items"),
        (dict(task="boolq"), "groups"),
        (dict(task="boolq", dev_cut="twins"), "items"),
        (dict(task="boolq", method="base"), "twins"),  # validation alone, which is not cut
        (dict(task="boolq", method="base", eval_split="dev"), "groups"),
        (dict(task="boolq", mixture="winogrande, arc_easy"), "twins"),
        (dict(task="arc_easy", mixture="winogrande,boolq"), "groups"),
        (dict(task="arc_easy"), "twins"),
        (dict(task="arc_easy", mixture="piqa,arc_easy", method="base", compress="wanda-0.5"), "groups"),
        (dict(task="arc_easy", mixture="arc_easy,piqa", method="base", compress="wanda-0.5"), "twins"),
    ],
)
def test_the_cut_of_dev_counts_where_items_depend_on_it(changes, name):
    config = RunConfig(**dict(method="lora") | changes)
    assert effective(config).dev_cut == name == effective(effective(config)).dev_cut
    assert cut_of(vars(config)) == name and run_id(config) == run_id(effective(config))


SAME = {
    "touched": lambda d, t: os.utime(d / "config.json", (1, 1)) or d,
    "copied": lambda d, t: copied(d, t / "copy"),
    "moved": lambda d, t: d.rename(t / "moved"),
    "linked": lambda d, t: (t / "link").symlink_to(d) or t / "link",
    "slash": lambda d, t: f"{d}/",
    "relative": lambda d, t: os.path.relpath(d),
    "readme": lambda d, t: (d / "README.md").write_text("a model") and d,
}


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("how", SAME)
def test_a_model_s_place_and_times_change_no_identity(tiny, tiny_model_dir, tmp_path, how):
    folder = copied(tiny_model_dir, tmp_path / "model")
    before = run_name(tiny(model=str(folder))), training_id(tiny(model=str(folder)))
    place = str(SAME[how](folder, tmp_path))
    assert (run_name(tiny(model=place)), training_id(tiny(model=place))) == before


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_another_content_is_another_run(tiny, tiny_model_dir, tmp_path, name):
    "Even of the same size, and with the same times."
    folder = copied(tiny_model_dir, tmp_path / "model")
    config, file = tiny(model=str(folder)), folder / name
    before, times = run_id(config), file.stat()
    content = bytearray(file.read_bytes())
    content[-3:] = bytes(b ^ 1 for b in content[-3:]) if name.startswith("model") else b" } "[:3]
    if not name.startswith("model"):
        content = content.rstrip(b" }\n") + b"}" + b" " * (times.st_size - len(content.rstrip(b" }\n")) - 1)
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size and run_id(config) != before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", [PREDICTIONS, HISTORY, GEOMETRY])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "folder", "pipe"])
def test_a_changed_file_of_a_finished_run(made, tmp_path, name, damage):
    "It is named when the run is read, and the run is made again to the same result."
    config, folder = made
    folder = copied(folder, tmp_path / folder.name)
    before = read_result(folder)
    if damage == "flipped":
        flip(folder / name)
    elif damage == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    else:
        (folder / name).unlink()
        {"gone": lambda p: None, "folder": Path.mkdir, "pipe": os.mkfifo}[damage](folder / name)
    with pytest.raises(ValueError, match=f"{folder.name}: {name} .*delete result.json to run again"):
        read_result(folder)
    if damage in ("flipped", "cut", "gone"):
        assert run(config, folder, progress=False)["metrics"]["acc"] == before["metrics"]["acc"]
        assert (folder / f"damaged-{RESULT}").exists() and read_result(folder)["files"]


@pytest.mark.attack("silent error")
def test_a_result_of_another_run_in_the_right_folder(made, tiny, tmp_path):
    "Predictions of another run are not taken for this one's."
    _, folder = made
    other = tmp_path / "other"
    run(tiny(seed=3), other, progress=False)
    shutil.copy(other / PREDICTIONS, copied(folder, tmp_path / folder.name) / PREDICTIONS)
    results, problems = load(tmp_path)
    assert [r["run"] for r in results] == [run_name(tiny(seed=3))] and PREDICTIONS in problems[0]


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_damaged_adapter_is_not_taken_over(made, tmp_path, capsys, damage):
    "The run beside it trains for itself; the finished run's own figures stay readable."
    config, folder = made
    folder = copied(folder, tmp_path / folder.name)
    damage(folder / "adapter" / "adapter_model.safetensors")
    beside = RunConfig(**vars(config) | dict(eval_items=3))
    result = run(beside, tmp_path / run_name(beside), progress=False)
    assert "trained_by" not in result["training"] and read_result(folder)
    assert "its training is not reused" in capsys.readouterr().err


@pytest.mark.attack("crash")
@pytest.mark.parametrize("content", ["", "[1]", '{"rank_pattern": 3}'])
@pytest.mark.parametrize("name", [GEOMETRY, RANKS])
@pytest.mark.long
def test_what_an_earlier_try_left_is_damaged(tiny, tmp_path, name, content):
    config = tiny(geometry=1, train_items=64, allocate="random" if name == RANKS else "")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / MARKER).write_text(json.dumps({"made_by": "dora_nb", "kind": "run", "name": run_name(config)}))
    (folder / name).write_text(content)
    assert run(config, folder, progress=False)["files"][name] == sha256(folder / name)


LACKING = {
    "timings": (lambda r: r.pop("timings"), "has no 'timings'"),
    "machine": (lambda r: r.pop("machine"), "has no 'machine'"),
    "all but metrics": (
        lambda r: [r.pop(k) for k in list(r) if k not in ("schema", "run", "metrics")],
        "has no 'params'",
    ),
    "all but its name": (lambda r: [r.pop(k) for k in list(r) if k not in ("schema", "run")], "has no 'params'"),
    "a number": (lambda r: r["metrics"].update(acc="0.5"), "metrics.acc is missing, or no number"),
    "a finite number": (lambda r: r["metrics"].update(acc=float("nan")), "metrics.acc is missing, or no number"),
    "a float": (lambda r: r["metrics"].update(n=10**400), "metrics.n is missing, or no number"),
    "seconds": (lambda r: r.update(seconds="1"), "has no 'seconds'"),
    "loading": (lambda r: r["timings"].pop("loading"), "timings.loading is missing"),
    "gpu": (lambda r: r["machine"].pop("gpu"), "machine.gpu is missing"),
    "a parameter": (lambda r: r["params"].pop("task"), "lacks the parameter 'task'"),
    "a parameter's type": (lambda r: r["params"].update(rank="x"), "the parameter rank='x' is of the wrong type"),
}


@pytest.mark.attack("crash")
@pytest.mark.parametrize("change,said", LACKING.values(), ids=LACKING)
@pytest.mark.parametrize("key", ("results", "others"))
def test_a_result_that_a_report_holds_is_checked_as_a_run_s_own(made, tmp_path, key, change, said):
    config, folder = made
    (tmp_path / "known").mkdir()
    result = json.loads((folder / RESULT).read_text())
    about = {"results": [result]} | {key: [result]}
    stored = tmp_path / "known" / "results.json"
    stored.write_text(json.dumps(about))
    assert gathered(tmp_path / "known") == {result["run"]: result}
    change(result)
    stored.write_text(json.dumps({"results": []} | {key: [result]}))
    with pytest.raises(ValueError) as e:
        gathered(tmp_path / "known")
    assert str(e.value).startswith(f"{stored}: ") and said in str(e.value) and "result 1 is damaged" in str(e.value)
    own = copied(folder, tmp_path / "runs" / folder.name)
    (own / RESULT).write_text(json.dumps(result))
    assert said in load(tmp_path / "runs")[1][0]


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "text,said",
    [
        ('{"results": 3}', "results must be a list"),
        ('{"results": [3]}', "result 1 is damaged: it has no 'run'"),
        ('{"results": [], "others": {}}', "others must be a list"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_results_that_are_none(tmp_path, text, said):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        gathered(tmp_path)


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("timings"),
        lambda r: r.pop("machine"),
        lambda r: r.pop("training"),
        lambda r: r.update(training=[]),
        lambda r: r.update(metrics={"acc": "high", "n": 4}),
        lambda r: r.update(metrics={"acc": float("nan"), "n": 4}),
        lambda r: r.update(params=[]),
        lambda r: r.update(files={"predictions.parquet": 3}),
        lambda r: r.update(schema=99),
        lambda r: r.update(result=dict(r)) or [r.pop(k) for k in list(r) if k != "result"],
    ],
)
def test_a_result_that_lacks_a_part(made, tmp_path, change):
    _, folder = made
    folder = copied(folder, tmp_path / folder.name)
    result = json.loads((folder / RESULT).read_text())
    change(result)
    (folder / RESULT).write_text(json.dumps(result))
    results, problems = load(tmp_path)
    assert not results and folder.name in problems[0] and "delete it to run again" in problems[0]


@pytest.mark.attack("silent error")
def test_a_start_up_file_of_the_user_s_sets_no_parameter(tiny, tmp_path, monkeypatch, warm):
    "papermill by hand, in a shell whose IPython profile sets seed and rank: what was asked for is what is made."
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("seed = 42\nrank = 7\nlearning_rate = 1.0\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    params = {k: v for k, v in vars(tiny(seed=1)).items() if v is not None and k != "rank"}
    path = tmp_path / "finetune.ipynb"
    papermill.execute_notebook(
        str(notebook("finetune")), str(path), params | dict(run_dir=str(tmp_path / "run")), progress_bar=False
    )
    found = read_result(tmp_path / "run")["params"]
    assert (found["seed"], found["rank"], found["learning_rate"]) == (1, 16, 1e-3)


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("name", ["x/../../../outside", "..", "", "a/b", "a b", "x" * 300, "-", "/tmp/x"])
@pytest.mark.parametrize("where", ["name", "scale"])
def test_a_name_that_leads_out_of_the_folder(grid, name, where):
    text = grid.read_text()
    text = (
        text.replace('"tiny"', json.dumps(name)) if where == "name" else f"{text}\n[scale.{json.dumps(name)}.fixed]\n"
    )
    grid.write_text(text)
    with pytest.raises(ValueError, match="is part of a folder's name"):
        load_grid(grid, name if where == "scale" else None)


@pytest.mark.attack("crash")
def test_a_grid_file_with_a_byte_order_mark(grid):
    grid.write_bytes(b"\xef\xbb\xbf" + grid.read_bytes())
    assert len(load_grid(grid).configs) == 3


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "line,named",
    [
        ("rank = 1_000_000_000", "rank=1000000000 is not possible"),
        ("rank = 60_000", "rank 60000 of .* is larger than any layer"),
        ('target_modules = "nowhere_proj"', "'nowhere_proj' matches no module"),
        ('model = "no/such/folder"', "no/such/folder"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be_run(grid, tmp_path, line, named):
    key = line.partition(" ")[0]
    lines = [line if old.startswith(f"{key} =") else old for old in grid.read_text().splitlines()]
    if line not in lines:
        lines[lines.index("[fixed]")] = f"[fixed]\n{line}"
    grid.write_text("\n".join(lines))
    with pytest.raises((ValueError, RuntimeError), match=named):
        run_grid(grid, tmp_path / "runs", dry_run=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "named,there,found",
    [
        (None, 2, ["0", "1"]),
        ("0,1", 2, ["0", "1"]),
        ("1", 1, ["1"]),
        ("0,-1,1", 1, ["0"]),
        ("0,,1", 1, ["0"]),
        ("", 0, []),
        (" 2 , 3 ", 2, ["2", "3"]),
        ("0,1,7", 2, ["0", "1"]),
        ("GPU-8932f937,GPU-1", 2, ["GPU-8932f937", "GPU-1"]),
    ],
)
def test_devices_that_do_not_exist_get_no_worker(monkeypatch, named, there, found):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus() == found


@pytest.mark.parametrize(
    "there,room,processes,devices,workers",
    [
        (2, 24, 1, 0, 2),
        (2, 8, 1, 0, 1),
        (8, 24, 1, 0, 3),
        (8, 3, 1, 0, 1),  # a run that does not fit is tried nevertheless
        (8, 64, 2, 0, 4),
        (8, 24, 2, 0, 1),  # each process holds the weights
        (1, 64, 1, 0, 1),
        (16, 8, 1, 4, 4),  # GPUs decide, whatever the cores and their memory
        (16, 8, 2, 4, 2),
    ],
)
def test_as_many_runs_at_a_time_as_fit(monkeypatch, there, room, processes, devices, workers):
    monkeypatch.setattr(jobs, "gpus", lambda: ["0"] * devices)
    monkeypatch.setattr(jobs, "cores", lambda: there)
    monkeypatch.setattr(jobs, "free_memory", lambda: room * 2**30)
    assert jobs.default_workers(processes, 7 * 2**30) == workers


def test_a_single_run_gets_all_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "default_workers", lambda processes, memory: 4)
    waiting = [jobs.Job(RunConfig(method="base", seed=seed), tmp_path / str(seed)) for seed in range(6)]
    assert [launcher._default_workers(waiting[:n], 1) for n in (0, 1, 3, 6)] == [1, 1, 3, 4]


def test_larger_models_need_more_memory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    small, large = (
        jobs.run_memory(RunConfig(model=name)) for name in ("smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct")
    )
    assert small < large
    assert jobs.run_memory(RunConfig(model=str(tmp_path))) == 5 * 2**30 + 8 * 2**20


def test_a_container_limits_the_free_memory(monkeypatch):
    group = {"/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "1000"}
    group["/sys/fs/cgroup/memory.stat"] = "anon 700\nfile 300\nshmem 50\ninactive_file 200\nactive_file 50\n"
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: group[str(path)])
    assert jobs.free_memory() == 2250  # cached files give way; shared memory does not
    group["/sys/fs/cgroup/memory.max"] = "max\n"
    assert jobs.free_memory() > 2**20


@pytest.mark.attack("crash")
def test_a_reader_that_has_gone_away(monkeypatch):
    "`2>&1 | head` closes the pipe: a message that nobody reads is not a failure."
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr("sys.stderr", gone)
        say("anybody there?")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            gone.close()


@pytest.mark.attack("crash")
def test_nowhere_to_say_it(monkeypatch):
    "A full disk behind stderr stops nothing."
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        say("anybody there?")
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()


@pytest.mark.attack("hang")
def test_a_time_limit_that_is_none(grid, tmp_path):
    with pytest.raises(ValueError, match="timeout=nan"):
        run_grid(grid, tmp_path, timeout=float("nan"))


@pytest.mark.attack("crash")
def test_memory_is_measured_where_there_is_no_resource_module(monkeypatch):
    "Windows has none; psutil knows the peak there."
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: SimpleNamespace(peak_wset=4711))
    assert peak_memory(torch.device("cpu")) == 4711


@pytest.mark.attack("hostile input")
def test_a_name_moves_no_cursor(capsys):
    say("a\x1b[2Jb\rc")
    assert capsys.readouterr().err == "a?[2Jb?c\n"


@pytest.mark.attack("hang")
def test_a_large_dry_run_compares_no_jobs(grid, tmp_path, monkeypatch, capsys):
    "The work for a run must not grow with the number of runs: none looks for itself among all."

    def compared(self, other):
        raise AssertionError("a job was compared with others")

    monkeypatch.setattr(Job, "__eq__", compared)
    grid.write_text(grid.read_text().replace("[axes]", "[axes]\nseed = [0, 1, 2, 3, 4]"))
    run_grid(grid, tmp_path, dry_run=True)
    assert "[11/11]" in capsys.readouterr().err


@pytest.mark.attack("crash")
def test_ray_is_given_another_chance(capsys):
    "Ray's own limit of half a minute is too short for a busy machine."
    slow, tidied = iter([Exception("The current node timed out during startup."), None]), []

    def start():
        if (e := next(slow)) is not None:
            raise e
        return "started"

    assert start_patiently(start, lambda: tidied.append(1)) == "started" and tidied == [1]
    assert "it is tried again" in capsys.readouterr().err
    never = iter([Exception("timed out")] * 9)
    with pytest.raises(RuntimeError, match="in 3 tries"):
        start_patiently(lambda: (_ for _ in ()).throw(next(never)))
    with pytest.raises(OSError, match="another reason"):
        start_patiently(lambda: (_ for _ in ()).throw(OSError("another reason")))


@pytest.mark.attack("crash")
def test_runs_are_found_where_their_model_is_not(made, tmp_path, monkeypatch):
    "Runs that were made elsewhere are told by their parameters; those that were not made are missing by name."
    from dora_nb.data.cache import FetchError

    config, folder = made
    copied(folder, tmp_path / folder.name)

    def away(name, source):
        raise FetchError(f"{name} is not here")

    monkeypatch.setattr("dora_nb.runs.identity.model_digest", away)
    results, problems = load(tmp_path, [config, RunConfig(**vars(config) | dict(seed=5))])
    assert [r["run"] for r in results] == [folder.name] and "arc_easy-lora-r2-s5-unknown: not finished" in problems[0]
