"The command's manners: exit statuses, verbosity, completion, locales and widths, progress, advice."

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import warnings

import pytest

from dora_nb.command.main import main
from dora_nb.command.parser import COMMANDS
from dora_nb.messages import advice, say

NEEDED = {
    "fetch": [],
    "train": ["--task", "boolq"],
    "evaluate": ["--task", "boolq"],
    "probe": ["--task", "boolq", "--adapter", "adapter"],
    "ranks": ["--task", "boolq", "--adapter", "adapter", "--budget", "0.5"],
    "run": ["grid.toml"],
    "report": ["runs"],
    "completion": ["bash"],
}  # command → what makes its arguments complete
MODEL = ("train", "evaluate", "probe", "ranks")
MISTAKES = {
    "an unknown option": {c: ["--nothing"] for c in NEEDED},
    "an option with a letter too much": {c: ["--quiett"] for c in NEEDED},
    "an abbreviated option": {c: ["--qui"] for c in NEEDED},
    "an option without its value": {c: ["--task"] for c in MODEL} | {c: ["--scale"] for c in ("run", "report")},
    "an unknown task": {c: ["--task", "boolqq"] for c in MODEL},
    "an unknown source": {c: ["--source", "hubb"] for c in (*MODEL, "fetch")},
    "an unknown choice": {
        "fetch": ["everything"],
        "train": ["--method", "dorra"],
        "evaluate": ["--protocol", "generates"],
        "probe": ["--split", "test"],
        "ranks": ["--score", "magic"],
        "run": ["--engine", "rai"],
        "completion": ["csh"],
    },
    "no number": {
        "train": ["--rank", "x"],
        "evaluate": ["--limit", "x"],
        "probe": ["--items", "x"],
        "ranks": ["--budget", "x"],
        "run": ["--workers", "x"],
    },
    "an impossible number": {
        "train": ["--rank", "0"],
        "evaluate": ["--limit", "0"],
        "probe": ["--items", "0"],
        "ranks": ["--budget", "-1"],
        "run": ["--workers", "0"],
    },
    "an impossible scheme": {c: ["--compress", "rtn-5"] for c in MODEL},
    "no such model": {c: ["--model", "/nowhere"] for c in MODEL},
    "a model that is a file": {c: ["--model", "notes.txt"] for c in MODEL},
    "no such adapter": {c: ["--adapter", "nowhere"] for c in MODEL[1:]},
    "a damaged adapter": {c: ["--adapter", "damaged"] for c in MODEL[1:]},
    "no such file": {
        "train": ["--ranks", "nowhere.json"],
        "run": ["nowhere.toml"],
        "report": ["--grid", "nowhere.toml"],
    },
    "no such folder": {"run": ["--known", "nowhere"], "report": ["nowhere"]},
    "a file of others in the way": {c: ["--out", "notes.txt"] for c in (*MODEL, "run", "report")},
    "a folder of others": {c: ["--out", "foreign"] for c in ("train", "evaluate", "probe")} | {"report": ["foreign"]},
    "a place that cannot be written to": {c: ["--out", "/proc/x/y"] for c in (*MODEL, "run")},
    "a mistake in a grid": {"run": ["wrong.toml"], "report": ["--grid", "wrong.toml"]},
    "no TOML": {"run": ["notes.txt"], "report": ["--grid", "notes.txt"]},
    "an unknown scale": {c: ["--scale", "giant"] for c in ("run",)}
    | {"report": ["--grid", "grid.toml", "--scale", "giant"]},
    "options that do not go together": {"run": ["--address", "here:1"], "report": ["--known", "runs"]},
}


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_dir):
    "A working directory with what the mistakes need, and a model that is quickly loaded."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine = ")
    for name in ("foreign", "damaged", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_text("x")
    fixed = f'name = "g"\n[fixed]\nmodel = "{tiny_model_dir}"\ntask = "boolq"\ntrain_items = 8\n[axes]\nseed = [0]\n'
    (tmp_path / "grid.toml").write_text(fixed)
    (tmp_path / "wrong.toml").write_text(fixed.replace("train_items", "train_itms"))
    return tmp_path


@pytest.mark.parametrize("mistake,command", [(m, c) for m, cases in MISTAKES.items() for c in cases])
def test_a_mistake_has_one_status_in_every_command(mistake, command, place, capsys, monkeypatch):
    for name in ("data.tasks.load_task", "runs.run.load_task", "runs.probe_run.load_task", "runs.launcher.work"):
        monkeypatch.setattr(f"dora_nb.{name}", lambda *_, **__: pytest.fail("work began"), raising=False)
    if "model" in mistake:  # which is looked for when the items are there
        monkeypatch.setattr("dora_nb.data.tasks.load_task", lambda *_, **__: [])
        monkeypatch.setattr("dora_nb.runs.probe_run.load_task", lambda *_, **__: [])
    if "adapter" not in mistake:
        monkeypatch.setattr("dora_nb.models.adapter_files.check_adapter", lambda path: None)
    given = MISTAKES[mistake][command]
    needed = [] if given[0][0] != "-" else NEEDED[command]
    assert main([command, *needed, *given]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"dora-nb {command}: ") and "Traceback" not in said.err and not said.out


@pytest.mark.parametrize("argv", ([], ["trian"], ["--versoin"], ["-q"], ["-x", "train"], ["--", "train"]))
def test_a_mistake_outside_of_a_command(argv, capsys):
    assert main(argv) == 2 and capsys.readouterr().err.startswith("dora-nb")


@pytest.mark.parametrize(
    "error,status",
    [
        (RuntimeError("no network"), 1),
        (OSError(28, "No space left on device"), 1),
        (OSError(5, "Input/output error"), 1),
        (FloatingPointError("nan"), 1),
        (MemoryError(), 1),
        (PermissionError(13, "Permission denied"), 2),
        (IsADirectoryError(21, "Is a directory"), 2),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
@pytest.mark.parametrize("command", NEEDED)
def test_an_error_has_one_status_in_every_command(command, error, status, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setitem(COMMANDS, command, (fail, COMMANDS[command][1]))
    assert main([command, *NEEDED[command]]) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_the_help_and_the_chapter_name_the_same_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    epilog = re.sub(r"\s+", " ", capsys.readouterr().out.split("Exit status:")[1])
    assert re.findall(r"\b(\d+) ", epilog) == ["0", "1", "2", "130", "141"]


def work(args):
    "Stand in for a command: a message, a detail, a warning, a result."
    say("a message")
    say("a detail", "verbose")
    warnings.warn("a warning", stacklevel=1)
    print("the result")


@pytest.mark.parametrize("command", NEEDED)
@pytest.mark.parametrize("flag", ("-q", "--quiet", "-v", "--verbose", ""))
@pytest.mark.parametrize("before", (True, False))
def test_quiet_and_verbose(command, flag, before, monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, command, (work, COMMANDS[command][1]))
    flags = [flag] if flag else []
    assert main([*(flags if before else []), command, *NEEDED[command], *([] if before else flags)]) == 0
    said = capsys.readouterr()
    quiet, verbose = flag in ("-q", "--quiet"), flag in ("-v", "--verbose")
    assert said.out == "the result\n" and ("a message" in said.err) == ("warning: a warning" in said.err) == (not quiet)
    assert ("a detail" in said.err) == ("UserWarning at " in said.err) == verbose
    assert not quiet or said.err == ""


@pytest.mark.parametrize("flag,lines", (("-q", 1), ("-v", 10)))
def test_an_error_when_quiet_or_verbose(flag, lines, capsys):
    assert main([flag, "train", "--rank", "0"]) == 2
    err = capsys.readouterr().err
    assert "rank=0 is not possible" in err.splitlines()[-1]
    assert err.count("\n") == 1 if flag == "-q" else "Traceback" in err and err.count("\n") > lines


@pytest.mark.long
def test_a_quiet_training_prints_its_result_only(tiny_model_dir, tmp_path):
    options = ["--task", "boolq", "--model", str(tiny_model_dir), "--train-items", "4", "--eval-items", "4"]
    command = [sys.executable, "-m", "dora_nb", "train", *options, "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "-q"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["metrics"]["n"] == 4


@pytest.mark.parametrize(
    "given,meant",
    [
        ("train --lerning-rate 1", "--learning-rate?"),
        ("train --lerning-rate=1", "--learning-rate?"),
        ("train --learning_rate 1", "--learning-rate?"),
        ("train --learning 1", "--learning-rate?"),
        ("train -rank 1", "--rank or --ranks?"),
        ("train --eval 1", "--eval-split or --eval-items or --eval-format?"),
        ("train --method dorra", "'dora'?"),
        ("train --method=dorra", "'dora'?"),
        ("train --precision bfloat", "'bfloat16'?"),
        ("train --objective choise", "'choices'?"),
        ("train --mixture boolq,winogrand", "'winogrande'?"),
        ("evaluate --tsk boolq", "--task?"),
        ("evaluate --task=winogrand", "'winogrande'?"),
        ("fetch taks", "'tasks'?"),
        ("run wrong.toml", "'train_items'?"),
        ("run grid.toml --scales x", "--scale?"),
        ("trian", "'train'?"),
        ("-q eval", "'evaluate'?"),
        ("complete bash", "'completion'?"),
    ],
)
def test_what_was_meant(given, meant, place, capsys):
    assert main(given.split()) == 2
    assert f"did you mean {meant}" in capsys.readouterr().err


def test_advice_without_a_similar_name_lists_all():
    assert advice("x", ["lora", "", "dora"]) == "choose one of lora, dora"


ASCII = dict(LANG="C", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")


@pytest.mark.parametrize("argv", (["--help"], ["evaluate", "--help"], ["fetch", "é"], ["run", "é.toml"], ["é"]))
def test_any_locale(argv):
    done = subprocess.run([sys.executable, "-m", "dora_nb", *argv], capture_output=True, env=os.environ | ASCII)
    said = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == (0 if "--help" in argv else 2) and said and "Traceback" not in said


@pytest.mark.parametrize("columns", (40, 80, 200))
@pytest.mark.parametrize("command", ("", *NEEDED))
def test_any_width(columns, command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as e:
        main([*filter(None, [command]), "--help"])
    lines = capsys.readouterr().out.splitlines()
    long = [line for line in lines if len(line) > columns and len(line.split()) > 2]  # a long word stands alone
    assert e.value.code == 0 and not long


BAR = """
import sys, time
from dora_nb.messages import progress_bar
with progress_bar(range(20), "train", "step") as bar:
    for i in bar:
        bar.set_postfix_str("loss 0.5", refresh=False)
        time.sleep(0.1)
"""


def test_progress_in_a_log(tmp_path):
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", BAR], stderr=log, check=True, env=os.environ | ASCII)
    lines = (tmp_path / "log").read_bytes().decode("ascii")
    assert "\r" not in lines and re.fullmatch(
        r"train: 0/20 steps in 00:00, \? left\ntrain: 20/20 steps in 00:0\d, 00:00 left, loss 0.5\n", lines
    )


@pytest.mark.parametrize("environment", ({}, ASCII))
def test_progress_in_a_terminal(environment):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", BAR], stderr=theirs, env=os.environ | environment)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the terminal is closed
        pass
    os.close(ours)
    states = said.decode().split("\r")
    assert process.wait() == 0 and re.search(r"train:  \d+%.*\d+/20 \[\d\d:\d\d<\d\d:\d\d,.*step", said.decode())
    assert 3 < len(states) < 15


@pytest.fixture(scope="session")
def scripts(tmp_path_factory):
    "The completion scripts, and a folder with a command of this name."
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        command = [sys.executable, "-m", "dora_nb", "completion", shell]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (folder / f"{shell}.script").write_text(done.stdout)
    (folder / "dora-nb").write_text("#!/bin/sh\n")
    (folder / "dora-nb").chmod(0o755)
    return folder


LINES = {
    "dora-nb ev": {"evaluate"},
    "dora-nb train --learn": {"--learning-rate"},
    "dora-nb train --method d": {"dora"},
    "dora-nb evaluate --task arc": {"arc_easy", "arc_challenge"},
    "dora-nb train --rslora f": {"false"},
    "dora-nb completion z": {"zsh"},
}


@pytest.mark.long
@pytest.mark.parametrize("line", LINES)
def test_completion_in_bash(line, scripts):
    words = line.split(" ")
    code = f"source {scripts}/bash.script; complete -p dora-nb; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}"
    code += '; _shtab_dora_nb; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True)
    registered, *found = done.stdout.split("\n")
    assert "_shtab_dora_nb" in registered and {f.strip() for f in found if f} == LINES[line], done.stderr


def wait_for(text, terminal):
    "Read from a terminal until a text has come; fail after a minute."
    said, end = "", time.monotonic() + 60
    while text not in said and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")
    assert text in said, said


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_completion_in_zsh(scripts):
    shutil.copy(scripts / "zsh.script", scripts / "_dora-nb")
    ours, theirs = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    environment = os.environ | dict(TERM="dumb", PATH=f"{scripts}:{os.environ['PATH']}")
    zsh = subprocess.Popen(["zsh", "-f", "-i"], **streams, env=environment, start_new_session=True)
    os.close(theirs)
    try:
        os.write(
            ours, f'PS1=; fpath=({scripts} $fpath); autoload -Uz compinit; compinit -u -D; echo re""ady\n'.encode()
        )
        wait_for("ready", ours)
        for line, found in LINES.items():
            os.write(ours, f"{line}\t".encode())
            wait_for(line.rpartition(" ")[0] + " " + os.path.commonprefix([*found]), ours)
            os.write(ours, b"\x15")  # Ctrl-U clears the line
    finally:
        zsh.kill()
        zsh.wait()
        os.close(ours)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
@pytest.mark.parametrize("line", LINES)
def test_completion_in_fish(line, scripts):
    code = f"source {scripts}/fish.script; complete --do-complete '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True)
    assert {found.split("\t")[0] for found in done.stdout.splitlines()} == LINES[line], done.stderr


def test_fetch_without_a_name_fetches_the_first_two(monkeypatch, capsys):
    monkeypatch.setattr("dora_nb.data.assets.fetch", lambda name, source, force: name)
    assert main(["fetch"]) == 0 and capsys.readouterr().out == "smollm2-135m-instruct\ntasks\n"


@pytest.mark.parametrize("quiet", (True, False))
def test_a_grid_s_failures_are_told_when_quiet(quiet, place, monkeypatch, capsys):
    def fail(jobs, *_):
        for job in jobs:
            job.state, job.why = "failed", "no luck"

    monkeypatch.setattr("dora_nb.runs.launcher.work", fail)
    assert main(["run", "grid.toml", *["-q"] * quiet]) == 1
    said = capsys.readouterr()
    assert not said.out and "no luck" in said.err and "1 of 1 runs failed" in said.err
    assert ("0 done, 1 failed" in said.err) == (not quiet)
