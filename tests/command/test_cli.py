"The command as a user meets it: in a process of its own."

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dora_nb import __version__
from dora_nb.command.main import main
from dora_nb.command.options import comments
from dora_nb.command.parser import parser
from dora_nb.command.places import check_output, check_ranks, is_answers
from dora_nb.curvature.components import SCORES
from dora_nb.data.assets import ASSETS, SOURCES
from dora_nb.data.tasks import DEV_CUTS, FORMATS, SPLITS, TASKS, WHOLE
from dora_nb.files import claim
from dora_nb.runs.config import RunConfig
from dora_nb.runs.probe_run import is_probe
from dora_nb.training.config import OBJECTIVES, PRECISIONS
from dora_nb.training.evaluate import PROTOCOLS

ROOT = Path(__file__).parents[2]

COMMANDS = ("fetch", "train", "evaluate", "probe", "ranks", "run", "report")


@dataclasses.dataclass
class Bare:
    good: int = 1  # a number
    bad: int = 2


def test_a_field_without_a_comment_is_named():
    with pytest.raises(ValueError, match="Bare.bad needs a comment on its own line"):
        comments(Bare)


def test_every_option_says_what_it_is():
    assert comments(RunConfig).keys() == RunConfig().__dict__.keys()
    for name in (*COMMANDS, "completion"):
        assert all(a.help for a in parser(name).commands[name].actions)


def test_names_that_the_parser_repeats_to_spare_an_import():
    def choices_of(name):
        return {a.dest: a.values for a in parser(name).commands[name].actions if a.values}

    choices = choices_of("evaluate")
    assert {k: set(v) for k, v in choices.items()} == dict(
        **dict.fromkeys(("task", "calibrate"), set(TASKS)),
        split={*SPLITS, WHOLE},
        protocol=set(PROTOCOLS),
        precision=set(PRECISIONS),
        source=set(SOURCES),
        dev_cut=set(DEV_CUTS),
        format=set(FORMATS),
    )
    assert choices_of("fetch")["names"] == ASSETS and choices_of("ranks")["score"] == SCORES
    assert set(choices_of("ranks")["objective"]) == set(OBJECTIVES)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    assert e.value.code == 0 and "default" in capsys.readouterr().out


def test_a_scheme_that_is_none_is_refused_before_anything_is_made(tmp_path, capsys):
    out = tmp_path / "made" / "answers.jsonl"
    assert main(["evaluate", "--task", "boolq", "--compress", "rtn-5", "--out", str(out)]) != 0
    assert "compress='rtn-5' does not exist" in capsys.readouterr().err and not out.parent.exists()


@pytest.mark.parametrize("command", ("evaluate", "probe", "ranks"))
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, capsys, command):
    more = {"probe": ["--adapter", "nowhere"], "ranks": ["--adapter", "nowhere", "--budget", "0.5"]}.get(command, [])
    wrong = {tmp_path: f"{tmp_path} is a folder; name a file in it", "/proc/x/y": "cannot be written to"}
    for out in list(wrong)[command == "ranks" :]:  # ranks writes a folder
        assert main([command, "--task", "boolq", "--out", str(out), *more]) != 0
        assert wrong[out] in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys; from dora_nb.command.parser import parser; parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.long
def test_a_grid_and_a_report_load_no_model_s_classes():
    "These take longer to import than all else together, and only what loads a model needs them."
    code = "import sys, dora_nb.runs.launcher, dora_nb.results.page; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and not {"transformers.modeling_utils", "torch.distributed.tensor", "peft"} & set(loaded)


def test_the_installed_command():
    done = subprocess.run([Path(sys.executable).parent / "dora-nb", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == __version__


@pytest.mark.long
def test_train_then_evaluate_the_adapter(tiny_model_dir, tmp_path, capsys):
    options = ["--task", "arc_easy", "--model", str(tiny_model_dir)]
    assert (
        main(
            [
                "train",
                *options,
                "--rank",
                "2",
                "--train-items",
                "8",
                "--batch-size",
                "4",
                "--eval-items",
                "10",
                "--learning-rate",
                "0.05",
                "--detach-norm",
                "false",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    trained = json.loads(capsys.readouterr().out)
    assert trained["training"]["steps"] == 2
    assert (
        main(
            [
                "evaluate",
                *options,
                "--adapter",
                str(tmp_path / "run" / "adapter"),
                "--limit",
                "10",
                "--out",
                str(tmp_path / "new" / "items.jsonl"),
            ]
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert {"acc", "acc_norm", "stderr", "n", "seconds"} <= summary.keys() and summary["acc"] == trained["metrics"][
        "acc"
    ]
    lines = [json.loads(line) for line in (tmp_path / "new" / "items.jsonl").read_text().splitlines()]
    check_output(str(tmp_path / "new" / "items.jsonl"), is_answers)  # it would be written again
    assert len(lines) == 10 and all(
        len(r["loglikelihood"]) == 4 and {"doc_index", "gold", "pred", "pred_norm"} <= r.keys() for r in lines
    )


@pytest.mark.parametrize("scheme", ("", "rtn-4"))
@pytest.mark.long
def test_train_probe_cut_and_train_anew(tiny_model_dir, tmp_path, capsys, scheme):
    options = ["--task", "arc_easy", "--model", str(tiny_model_dir)]
    options += ["--compress", scheme] if scheme else []
    small = ["--train-items", "8", "--batch-size", "4", "--eval-items", "4"]
    adapter = ["--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["train", *options, *small, "--rank", "4", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()

    out = tmp_path / "look" / "curvature.json"
    assert main(["probe", *options, *adapter, "--items", "3", "--products", "8", "--out", str(out)]) == 0
    check_output(str(out), is_probe)
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    blocks = [row["block"] for row in rows]
    assert last == {"curvature": str(out)}
    assert blocks == list(json.loads(out.read_text())["blocks"]) and {"all", "A", "B", "m", "layer 0"} == set(blocks)

    cut = ["ranks", *options, *adapter, "--items", "4", "--out", str(tmp_path / "half")]
    assert main([*cut, "--budget", "7"]) == 2
    assert "budget=7 is not possible" in capsys.readouterr().err
    assert main([*cut, "--budget", "0.5"]) == 0
    check_ranks(tmp_path / "half")
    *rows, files = map(json.loads, capsys.readouterr().out.splitlines())
    assert all(1 <= r["new_rank"] <= 4 == r["rank"] for r in rows) and sum(r["new_rank"] for r in rows) < 4 * len(rows)
    assert main(["evaluate", *options, "--adapter", files["adapter"], "--limit", "4"]) == 0
    capsys.readouterr()

    assert main(["train", *options, *small, "--ranks", files["pattern"], "--out", str(tmp_path / "anew")]) == 0
    anew = json.loads(capsys.readouterr().out)["training"]["trainable"]
    assert anew < json.loads((tmp_path / "run" / "result.json").read_text())["training"]["trainable"]


@pytest.mark.long
def test_an_adapter_of_another_recipe_is_evaluated_and_cut_as_it_was_trained(tiny_model_dir, tmp_path, capsys):
    "In its format and with its loss; completions of one's own have no choices to compare."
    rows = [dict(prompt=f"The number after {i} is", completion=f" {i + 1}") for i in range(12)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["--task", str(tmp_path / "numbers.jsonl"), "--model", str(tiny_model_dir)]
    small = ["--batch-size", "4", "--objective", "answer", "--rank", "4", "--eval-items", "2"]
    assert main(["train", *own, *small, "--out", str(tmp_path / "run")]) == 0
    cut = ["ranks", *own, "--adapter", str(tmp_path / "run" / "adapter"), "--items", "4", "--budget", "0.5"]
    cut += ["--split", "train", "--out", str(tmp_path / "half")]
    capsys.readouterr()
    assert main([*cut, "--objective", "choices"]) == 2 and "answer" in capsys.readouterr().err
    assert main([*cut, "--objective", "answer", "--max-tokens", "64"]) == 0
    boolq = ["evaluate", "--task", "boolq", "--model", str(tiny_model_dir), "--limit", "3", "--first"]
    scores = {}
    for how in ("cloze", "instruction", None):
        out = tmp_path / f"{how}.jsonl"
        assert main([*boolq, *(["--format", how] if how else []), "--out", str(out)]) == 0
        scores[how] = out.read_text()
    assert scores["cloze"] == scores[None] != scores["instruction"]


@pytest.mark.long
def test_generate(tiny_model_dir, tmp_path, capsys):
    assert (
        main(
            [
                "evaluate",
                "--task",
                "boolq",
                "--model",
                str(tiny_model_dir),
                "--limit",
                "3",
                "--first",
                "--protocol",
                "generate",
                "--out",
                str(tmp_path / "o.jsonl"),
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["unparsed"] == 1
    check_output(str(tmp_path / "o.jsonl"), is_answers)
    assert [json.loads(line)["doc_index"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    "argv,status,said",
    [
        (["train", "--rank", "0"], 2, "rank=0"),
        (["train", "--alpha", "1e29"], 2, "alpha=1e+29 is not possible; it must be a number above 0, and below 1e+15"),
        (["train", "--learning-rate", "1e300"], 2, "learning_rate=1e+300 must be above 0, and below 1e+37"),
        (["train", "--seed", "-1"], 2, "seed=-1 must be at least 0 and below 2**32"),
        (["probe", "--adapter", "x", "--seed", "-1"], 2, "seed=-1 must be at least 0 and below 2**32"),
        (["probe", "--adapter", "x", "--seed", "9" * 20], 2, "99 must be at least 0 and below 2**32"),
        (["train", "--model", ""], 2, "the name of the model is empty"),
        (["evaluate", "--task", "boolq", "--limit", "2", "--model", ""], 2, "the name of the model is empty"),
        (["train", "--task", "boolqq"], 2, "did you mean 'boolq'?"),
        (["train", "--task", "x"], 2, "boolq, hellaswag"),
        (["probe", "--adapter", "x", "--items", "0"], 2, "items=0"),
        (["run", "nowhere.toml"], 2, "no such grid file"),
        (["report", "nowhere"], 2, "not a folder of runs"),
        (["report", "nowhere", "--scale", "full"], 2, "give --grid"),
        (["report", "reports", "--out", "elsewhere"], 2, "made in place"),
        (["evaluate", "--task", "boolq", "--limit", "0"], 2, "--limit 0 is not possible"),
        (["evaluate", "--task", "boolq", "--batch-tokens", "-1"], 2, "--batch-tokens -1 is not possible"),
        (["evaluate", "--task", "boolq", "--max-tokens", "0"], 2, "--max-tokens 0 is not possible"),
        (
            ["evaluate", "--task", "boolq", "--protocol", "generate", "--format", "cloze"],
            2,
            "needs --format instruction",
        ),
        (["evaluate", "--task", "boolq", "--compress", "rtn-5"], 2, "compress='rtn-5' does not exist"),
        (["run", "nowhere.toml", "--workers", "0"], 2, "--workers 0 is not possible"),
        (["ranks", "--task", "boolq", "--adapter", "x", "--budget", "1", "--items", "0"], 2, "--items 0"),
        *(
            (["ranks", "--task", "boolq", "--adapter", "x", f"--budget={b}"], 2, "is not possible; give a number")
            for b in ("inf", "nan", "-1", "0")
        ),
        (["evaluate", "--task", "boolq", "--limit", "2", "--adapter", "nowhere"], 2, "holds no adapter_config.json"),
        (["evaluate", "--task", "boolq", "--limit", "2", "--model", "no/model"], 1, "not a model of this package"),
        (["fetch", "everything"], 2, "qwen2.5-coder-1.5b-instruct, tasks"),
    ],
)
def test_mistakes_are_answered_in_a_line(argv, status, said, capsys):
    assert main(argv) == status
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and err.startswith(f"dora-nb {argv[0]}: ")


# What a command finds where it is to write, that it did not write itself; and the options that make it write there.
FOREIGN = {
    "answers": ("evaluate", "notes.jsonl", "mine"),
    "answers of others": ("evaluate", "samples.jsonl", '{"doc_id": 0, "target": "1"}\n'),
    "answers, a list": ("evaluate", "notes.jsonl", "[1]"),
    "answers, in another encoding": ("evaluate", "notes.jsonl", b"\xff\xfe"),
    "curvature": ("probe", "curvature.json", '{"mine": 1}'),
    "the result of a run": ("probe", "result.json", '{"schema": 1, "params": {}}'),
    "ranks": ("ranks", "ranks.json", '{"rank_pattern": {}}'),
    "ranks of a run": ("ranks", "result.json", "{}"),
    "an adapter": ("ranks", "adapter/adapter_config.json", "{}"),
    "a file called adapter": ("ranks", "adapter", "mine"),
    "more than an adapter": ("ranks", "adapter/notes.md", "mine"),
}


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("command,name,content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_of_somebody_else_s_is_not_written_over(tmp_path, capsys, monkeypatch, command, name, content):
    monkeypatch.setattr("dora_nb.data.tasks.load_task", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr("dora_nb.runs.run.load_task", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr("dora_nb.models.adapter_files.check_adapter", lambda path: None)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    patterns = '{"rank_pattern": {}, "alpha_pattern": {}}'
    if name in ("result.json", "adapter/notes.md") and command == "ranks":
        (tmp_path / "ranks.json").write_text(patterns)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    more = {"evaluate": [], "probe": ["--adapter", "x"], "ranks": ["--adapter", "x", "--budget", "0.5"]}[command]
    out = tmp_path if command == "ranks" else file
    assert main([command, "--task", "boolq", "--out", str(out), *more]) == 2
    err = capsys.readouterr().err
    assert "did not write" in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_file_and_an_empty_folder_are_nobody_s(tmp_path):
    (tmp_path / "answers.jsonl").touch()
    (tmp_path / "ranks").mkdir()
    check_output(str(tmp_path / "answers.jsonl"), is_answers)
    check_ranks(tmp_path / "ranks")
    (tmp_path / "ranks" / "notes.md").touch()  # beside what will be written
    check_ranks(tmp_path / "ranks")


@pytest.mark.attack("crash")
@pytest.mark.parametrize("command", ("evaluate", "probe", "ranks"))
def test_an_adapter_that_is_none_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for name in ("data.tasks.load_task", "runs.run.load_task", "runs.fit.load_task", "runs.base.load_base"):
        monkeypatch.setattr(f"dora_nb.{name}", lambda *_, **__: pytest.fail("work began"))
    more = ["--budget", "0.5"] if command == "ranks" else []
    assert main([command, "--task", "boolq", "--adapter", "nowhere", *more]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err


def shell(code, *argv, **environment):
    "Run the command in a process of its own, with something done before; return the process."
    code = f"import sys; from dora_nb.command.main import main, COMMANDS\n{code}\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")


@pytest.mark.attack("crash")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_where_the_locale_is_not_utf_8(name, monkeypatch):
    import io

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    text = out.buffer.getvalue().decode("ascii")
    assert e.value.code == 0 and "default" in text and ("alpha/sqrt r" in text) == (name == "train")


@pytest.mark.attack("crash")
def test_results_where_the_locale_is_not_utf_8():
    code = "COMMANDS['run'] = (lambda args: print(chr(945), args.grid), *COMMANDS['run'][1:])"
    done = shell(code, "run", "é", **ASCII)
    out, err = done.communicate()
    assert (done.returncode, err) == (0, b"") and out.startswith(b"alpha")


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("stream,status", (("stdout", 141), ("stderr", 0)))
def test_the_work_is_done_though_nobody_reads_on(tmp_path, stream, status):
    code = f"""
def work(args):
    for _ in range(100):
        print("x" * 5000, file=sys.{stream}, flush=True)
    open({str(tmp_path / "result")!r}, "w").close()
COMMANDS["fetch"] = (work, *COMMANDS["fetch"][1:])
"""
    done = shell(code, "fetch")
    closed, other = (done.stdout, done.stderr) if stream == "stdout" else (done.stderr, done.stdout)
    closed.read(1)
    closed.close()
    assert other.read() == b"" and done.wait() == status and (tmp_path / "result").exists()
    other.close()


@pytest.mark.attack("data loss")
def test_results_are_written_before_they_are_printed(tiny_model_dir, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyError("printing")

    monkeypatch.setattr("dora_nb.command.commands.print", stop, raising=False)
    with pytest.raises(KeyError, match="printing"):
        main(
            ["evaluate", "--task", "boolq", "--limit", "2", "--model", str(tiny_model_dir)]
            + ["--out", str(tmp_path / "answers.jsonl")]
        )
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def _safetensors():
    from safetensors import SafetensorError

    return SafetensorError("Error while deserializing header: incomplete metadata")


def _arrow():
    import pyarrow

    return pyarrow.ArrowInvalid("Parquet magic bytes not found in footer")


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "error,status,said",
    [
        (_safetensors, 2, "a file of model nowhere is damaged, or of another kind (SafetensorError: Error while"),
        (_arrow, 2, "a file of model nowhere is damaged, or of another kind (ArrowInvalid: Parquet magic"),
        (lambda: pickle.UnpicklingError("weights_only=False"), 2, "is damaged, or of another kind (UnpicklingError)\n"),
        (MemoryError, 1, "there is not enough memory"),
        (lambda: ValueError(), 2, "dora-nb evaluate: ValueError\n"),
    ],
)
def test_errors_of_libraries_are_answered_in_a_line(error, status, said, monkeypatch, capsys):
    def fail(*_, **__):
        raise error()

    monkeypatch.setattr("dora_nb.data.tasks.load_task", fail)
    assert main(["evaluate", "--task", "boolq", "--model", "nowhere"]) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "weights_only" not in err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr("dora_nb.data.tasks.load_task", fail)
    with pytest.raises(KeyError, match="bug"):
        main(["evaluate", "--task", "boolq"])


def test_interrupted(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dora_nb.data.tasks.load_task", stop)
    assert main(["evaluate", "--task", "boolq"]) == 130
    assert capsys.readouterr().err == "dora-nb evaluate: interrupted\n"


def test_the_module_is_a_program():
    done = subprocess.run([sys.executable, "-m", "dora_nb", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == __version__


@pytest.mark.attack("data loss")
def test_a_report_of_a_project_s_root_changes_nothing(tmp_path, monkeypatch, capsys):
    "`dora-nb report .` in a clone: its README is not an overview of ours, and no page is made either."
    shutil.copytree(ROOT / "reports" / "quick", tmp_path / "reports" / "quick")
    (tmp_path / "README.md").write_text("# My project\n")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    assert main(["report", "."]) == 2 and "README.md exists" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.attack("hostile input")
def test_a_dry_run_refuses_a_page_that_could_not_be_made(tmp_path, capsys):
    grid = (ROOT / "reports" / "quick" / "grid.toml").read_text()
    (tmp_path / "grid.toml").write_text(grid.replace("[report]", '[report]\nagainst = "nothing"'))
    assert main(["run", str(tmp_path / "grid.toml"), "--dry-run"]) == 2
    assert "report.against is 'nothing'" in capsys.readouterr().err


@pytest.mark.attack("data loss")
def test_a_file_that_comes_while_a_command_works(tiny_model_dir, tmp_path, monkeypatch, capsys):
    "It stays, and the work is printed all the same."
    from dora_nb.training import evaluate as chapter

    out, evaluate = tmp_path / "answers.jsonl", chapter.evaluate

    def slow(*given, **options):
        out.write_text("mine")
        return evaluate(*given, **options)

    monkeypatch.setattr(chapter, "evaluate", slow)
    command = ["evaluate", "--task", "boolq", "--model", str(tiny_model_dir), "--limit", "4", "--out", str(out)]
    assert main(command) == 2 and out.read_text() == "mine"
    said = capsys.readouterr()
    assert json.loads(said.out)["n"] == 4 and "this command did not write it" in said.err


@pytest.mark.attack("data loss")
def test_ranks_are_not_written_into_a_run_s_folder(tmp_path):
    claim(tmp_path / "run", "run", "boolq-lora")
    with pytest.raises(ValueError, match="is the folder of a run"):
        check_ranks(tmp_path / "run")


@pytest.mark.attack("silent error")
@pytest.mark.long
def test_the_first_edition_s_dev_can_be_asked(tiny_model_dir, tmp_path):
    "An adapter that was trained beside it must not be measured on what it was trained on."
    found = {}
    for cut in ("twins", "items"):
        command = ["evaluate", "--task", "winogrande", "--split", "dev", "--limit", "5", "--first", "--dev-cut", cut]
        assert main([*command, "--model", str(tiny_model_dir), "--out", str(tmp_path / cut)]) == 0
        found[cut] = [json.loads(line)["doc_index"] for line in (tmp_path / cut).read_text().splitlines()]
    assert found["twins"] != found["items"] and len(found["items"]) == 5


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("more", ["my notes", '{"doc_index": 1}', "[1]", "3"])
def test_notes_below_our_answers_are_somebody_s(tmp_path, more):
    ours = '{"doc_index": 0, "gold": 1, "pred": 1}\n'
    (tmp_path / "a.jsonl").write_text(ours * 2)
    check_output(str(tmp_path / "a.jsonl"), is_answers)
    (tmp_path / "a.jsonl").write_text(ours + more)
    with pytest.raises(ValueError, match="this command did not write it"):
        check_output(str(tmp_path / "a.jsonl"), is_answers)


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("command", ("evaluate", "probe", "ranks"))
@pytest.mark.parametrize("place", (".", "adapter", "new/deeper", "a link"))
def test_nothing_is_written_into_a_run_s_folder(tmp_path, capsys, monkeypatch, command, place):
    "A probe wrote curvature.json, its default, into the working directory; the run's own report then refused the run."
    run = tmp_path / "run"
    claim(run, "run", "boolq-lora")
    (run / "adapter").mkdir()
    (tmp_path / "link").symlink_to(run)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(run)
    folder = Path("../link" if place == "a link" else place)
    out = folder if command == "ranks" else folder / "curvature.json"
    more = {"evaluate": [], "probe": ["--adapter", "x"], "ranks": ["--adapter", "x", "--budget", "0.5"]}[command]
    assert main([command, "--task", "boolq", "--out", str(out), *more]) == 2
    err = capsys.readouterr().err
    assert f"leads into {run}, which is the folder of a run" in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("how", ("itself", "a link to its folder", "links to its files", "the model"))
def test_ranks_are_not_written_over_the_adapter_that_is_cut(tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr("dora_nb.data.tasks.load_task", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr("dora_nb.models.adapter_files.check_adapter", lambda path: None)
    own = tmp_path / "half" / "adapter"
    own.mkdir(parents=True)
    (tmp_path / "half" / "ranks.json").write_text('{"rank_pattern": {}, "alpha_pattern": {}}')
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (own / name).write_text(name)
    other = tmp_path / "other"
    if how == "a link to its folder":
        other.symlink_to(own)
    else:
        other.mkdir()
    if how == "links to its files":
        for path in own.iterdir():
            (other / path.name).symlink_to(path)
    given = {"itself": ["--adapter", str(own)], "the model": ["--adapter", str(other), "--model", str(own)]}
    check_ranks(tmp_path / "half")  # it is ours
    cut = ["ranks", "--task", "boolq", "--budget", "0.5", "--out", str(tmp_path / "half")]
    assert main([*cut, *given.get(how, ["--adapter", str(other)])]) == 2
    assert "where this command writes; nothing was changed" in capsys.readouterr().err
    assert (own / "adapter_model.safetensors").read_text() == "adapter_model.safetensors"


AT_IMPORT = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have none

class Finder:
    def find_spec(self, name, *_):
        if name != "{module}" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            if {interrupt}:
                os.kill(os.getpid(), signal.SIGINT)
            raise {error}
        except KeyboardInterrupt:
            if "{error}" != "KeyboardInterrupt":
                raise {error} from None
            raise
        except InterruptedError:
            return None

sys.meta_path.insert(0, Finder())
sys.argv = ["dora-nb", "train", "--task", "boolq", "--model", "nowhere/x"]
{run}
"""
RUN = {
    "module": "runpy.run_module('dora_nb', run_name='__main__')",
    "function": "from dora_nb.command.main import main; sys.exit(main())",
}


def at_import(run, module, error, interrupt=True):
    "Run the command; while a module is imported, let SIGINT come, an error be raised, or both."
    code = AT_IMPORT.format(run=RUN[run], module=module, error=error, interrupt=interrupt)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "error",
    ("KeyboardInterrupt", "ImportError('cannot import name')", "RecursionError", "SystemError", "InterruptedError"),
)
@pytest.mark.long
def test_an_interrupt_while_torch_is_imported(error):
    "Whatever a half-done import makes of it; the last one swallows it."
    assert at_import("function", "torch", error) == (130, "dora-nb train: interrupted\n")


@pytest.mark.attack("crash")
@pytest.mark.long
def test_an_interrupt_while_the_command_itself_is_imported():
    for module, name in (("torch", "dora-nb train"), ("dora_nb.command.options", "dora-nb")):
        assert at_import("module", module, "KeyboardInterrupt") == (130, f"{name}: interrupted\n")


@pytest.mark.attack("crash")
@pytest.mark.parametrize("error", ("OSError('libx.so is damaged')", "ImportError('libx.so is damaged')"))
@pytest.mark.long
def test_an_error_while_torch_is_imported_is_answered_in_a_line(error):
    status, said = at_import("function", "torch", error, interrupt=False)
    assert status == 1 and said.startswith("dora-nb train: libx.so is damaged") and said.count("\n") == 1
