"The command as a user meets it: in a process of its own."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dora_nb import __version__
from dora_nb.assets import ASSETS, SOURCES, TASK_NAMES
from dora_nb.cli import comments, main, parser
from dora_nb.evaluate import PROTOCOLS
from dora_nb.rank import SCORES
from dora_nb.runs import RunConfig
from dora_nb.tasks import SPLITS
from dora_nb.train import PRECISIONS

COMMANDS = ("fetch", "train", "evaluate", "probe", "ranks", "run", "report")


def test_every_option_says_what_it_is():
    assert comments(RunConfig).keys() == RunConfig().__dict__.keys()
    for name in COMMANDS:
        (sub,) = [a for a in parser(name)._actions if hasattr(a, "choices") and a.choices and name in a.choices]
        assert all(a.help for a in sub.choices[name]._actions)


def test_names_that_the_parser_repeats_to_spare_an_import():
    def sub(name):
        return next(a for a in parser(name)._actions if a.choices).choices[name]

    choices = {a.dest: tuple(a.choices) for a in sub("evaluate")._actions if a.choices}
    assert {k: set(v) for k, v in choices.items()} == dict(
        **dict.fromkeys(("task", "calibrate"), set(TASK_NAMES)),
        split=set(SPLITS),
        protocol=set(PROTOCOLS),
        precision=set(PRECISIONS),
        source=set(SOURCES),
    )
    assert all(name in sub("fetch").format_help() for name in ASSETS)
    (score,) = [a.choices for a in sub("ranks")._actions if a.dest == "score"]
    assert tuple(score) == SCORES


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
    code = "import sys; from dora_nb.cli import parser; parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_grid_and_a_report_load_no_model_s_classes():
    "These take longer to import than all else together, and only what loads a model needs them."
    code = "import sys, dora_nb.grid, dora_nb.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and not {"transformers.modeling_utils", "torch.distributed.tensor", "peft"} & set(loaded)


def test_the_installed_command():
    done = subprocess.run([Path(sys.executable).parent / "dora-nb", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == __version__


def test_train_then_evaluate_the_adapter(tiny_model_dir, tmp_path, capsys):
    options = ["--task", "winogrande", "--model", str(tiny_model_dir)]
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
    assert len(lines) == 10 and all(
        len(r["loglikelihood"]) == 2 and {"doc_index", "gold", "pred", "pred_norm"} <= r.keys() for r in lines
    )


@pytest.mark.parametrize("scheme", ("", "rtn-4"))
def test_train_probe_cut_and_train_anew(tiny_model_dir, tmp_path, capsys, scheme):
    options = ["--task", "winogrande", "--model", str(tiny_model_dir)]
    options += ["--compress", scheme] if scheme else []
    small = ["--train-items", "8", "--batch-size", "4", "--eval-items", "4"]
    adapter = ["--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["train", *options, *small, "--rank", "4", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()

    out = tmp_path / "look" / "curvature.json"
    assert main(["probe", *options, *adapter, "--items", "3", "--products", "8", "--out", str(out)]) == 0
    blocks = [json.loads(line)["block"] for line in capsys.readouterr().out.splitlines()]
    assert blocks == list(json.loads(out.read_text())["blocks"]) and {"all", "A", "B", "m", "layer 0"} == set(blocks)

    cut = ["ranks", *options, *adapter, "--items", "4", "--out", str(tmp_path / "half")]
    assert main([*cut, "--budget", "7"]) == 1
    assert "budget=7 is not possible" in capsys.readouterr().err
    assert main([*cut, "--budget", "0.5"]) == 0
    *rows, files = map(json.loads, capsys.readouterr().out.splitlines())
    assert all(1 <= r["new_rank"] <= 4 == r["rank"] for r in rows) and sum(r["new_rank"] for r in rows) < 4 * len(rows)
    assert main(["evaluate", *options, "--adapter", files["adapter"], "--limit", "4"]) == 0
    capsys.readouterr()

    assert main(["train", *options, *small, "--ranks", files["pattern"], "--out", str(tmp_path / "anew")]) == 0
    anew = json.loads(capsys.readouterr().out)["training"]["trainable"]
    assert anew < json.loads((tmp_path / "run" / "result.json").read_text())["training"]["trainable"]


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
    assert [json.loads(line)["doc_index"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    "argv,status,said",
    [
        (["train", "--rank", "0"], 1, "rank=0"),
        (["train", "--task", "boolqq"], 1, "boolq, hellaswag"),
        (["run", "nowhere.toml"], 1, "no such grid file"),
        (["report", "nowhere"], 1, "no folder of runs"),
        (["report", "nowhere", "--scale", "full"], 1, "give --grid"),
        (["report", "reports", "--out", "elsewhere"], 1, "made in place"),
        (["evaluate", "--task", "boolq", "--limit", "0"], 1, "limit=0"),
        (["evaluate", "--task", "boolq", "--limit", "2", "--adapter", "nowhere"], 1, "holds no adapter_config.json"),
        (["evaluate", "--task", "boolq", "--limit", "2", "--model", "no/model"], 1, "none of ours"),
        (["fetch", "everything"], 1, "smollm2-135m-instruct, tasks"),
    ],
)
def test_mistakes_are_answered_in_a_line(argv, status, said, capsys):
    assert main(argv) == status
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and err.startswith(f"dora-nb {argv[0]}: ")
