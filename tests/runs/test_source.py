"The source that a run was made from: changes as a patch that git applies, and what a run and a report keep of it."

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from dora_nb.runs.config import RunConfig
from dora_nb.runs.folder import DIFF, RESULT, check_result, read_result
from dora_nb.runs.identity import run_name
from dora_nb.runs.run import run
from dora_nb.runs.source import MAX_PATCH_BYTES, changes_in, keep_source, source_state


def git(root, *arguments):
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    return subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True).stdout


@pytest.fixture
def source(tmp_path, monkeypatch):
    "A repository with a package, papermill notebooks and other files, and its clone."
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "source"
    for name in (
        "dora_nb/a.py",
        "dora_nb/part/b.py",
        "nbs/runs/finetune.ipynb",
        "nbs/chapter.ipynb",
        "reports/page.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the first version of {name}\n" * 20)
    (root / ".gitignore").write_text("__pycache__/\n")
    (root / "dora_nb/data.bin").write_bytes(bytes(range(256)) * 8)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "A commit")
    git(tmp_path, "clone", "-q", str(root), str(tmp_path / "clone"))
    return root


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in (folder / "dora_nb").rglob("*") if p.is_file()}


def change(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


CHANGES = {
    "edited": lambda r: change(r, "dora_nb/a.py", b"another version\n"),
    "no newline at the end": lambda r: change(r, "dora_nb/a.py", b"another version"),
    "staged": lambda r: (change(r, "dora_nb/a.py", b"staged\n"), git(r, "add", ".")),
    "removed": lambda r: (r / "dora_nb/part/b.py").unlink(),
    "moved": lambda r: (r / "dora_nb/a.py").rename(r / "dora_nb/c.py"),
    "new": lambda r: change(r, "dora_nb/new/module.py", b"def f(): pass\n"),
    "new, a strange name": lambda r: change(r, 'dora_nb/é \t"b" \'.py', b"x = 1\n"),
    "new and empty": lambda r: change(r, "dora_nb/__init__.py", b""),
    "binary": lambda r: change(r, "dora_nb/data.bin", b"\0\xff" * 500),
    "new and binary": lambda r: change(r, "dora_nb/more.bin", b"\0\xff\r\n" * 500),
    "not utf-8": lambda r: change(r, "dora_nb/a.py", "ä\n".encode("latin-1")),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("settings", [{}, {"diff.noprefix": "true", "color.ui": "always", "diff.external": "false"}])
def test_a_patch_gives_the_changed_source_again(source, what, settings):
    for name, value in settings.items():
        git(source, "config", name, value)
    CHANGES[what](source)
    index = (source / ".git" / "index").read_bytes()
    revision, patch = source_state(source)
    assert revision.endswith("-dirty") and (source / ".git" / "index").read_bytes() == index
    clone = source.parent / "clone"
    assert files(clone) != files(source)
    (clone / "patch").write_bytes(patch)
    git(clone, "apply", "patch")
    assert files(clone) == files(source)
    assert changes_in(source) == patch  # the same changes give the same bytes


def test_only_what_a_run_executes_counts(source):
    clean = git(source, "describe", "--always").decode().strip()
    for name in ("reports/page.md", "nbs/chapter.ipynb", "new.txt", "dora_nb/__pycache__/a.pyc"):
        change(source, name, b"changed")
    assert source_state(source) == (clean, b"")
    change(source, "nbs/runs/finetune.ipynb", b"changed")
    assert source_state(source)[0] == f"{clean}-dirty"


def test_a_source_of_which_git_knows_nothing(source, tmp_path, monkeypatch):
    assert source_state(source / "dora_nb") == (None, b"")  # not the root of a repository
    git(tmp_path, "init", "-q", str(tmp_path / "new"))
    assert source_state(tmp_path / "new") == (None, b"")  # no commit
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_state(source) == (None, b"")  # no git


@pytest.mark.parametrize("size", (1, MAX_PATCH_BYTES, MAX_PATCH_BYTES + 1))
def test_what_is_kept(tmp_path, size, capsys):
    (tmp_path / DIFF).write_bytes(b"of an earlier try")
    patch = b"x" * size
    assert keep_source(tmp_path, patch) == hashlib.sha256(patch).hexdigest()
    assert (
        (tmp_path / DIFF).exists()
        == (size <= MAX_PATCH_BYTES)
        == ("only their checksum" not in capsys.readouterr().err)
    )
    assert size > MAX_PATCH_BYTES or (tmp_path / DIFF).read_bytes() == patch
    assert keep_source(tmp_path, b"") is None and not (tmp_path / DIFF).exists()


@pytest.mark.long
def test_a_run_keeps_the_changes_of_its_source(tiny_model_dir, tmp_path, monkeypatch):
    shared = dict(model=str(tiny_model_dir), rank=2, train_items=8, batch_size=4, dropout=0.0, eval_items=4)
    shared |= dict(precision="float32")
    monkeypatch.setattr("dora_nb.runs.run.source_state", lambda: ("abc-dirty", b"a patch"))
    config = RunConfig("arc_easy", "lora", **shared)
    folder, digest = tmp_path / run_name(config), hashlib.sha256(b"a patch").hexdigest()
    result = run(config, folder, progress=False)
    assert (folder / DIFF).read_bytes() == b"a patch"
    assert result["source_diff"] == result["files"][DIFF] == digest and read_result(folder) == result

    monkeypatch.setattr("dora_nb.runs.run.source_state", lambda: ("def", b""))
    beside = RunConfig("arc_easy", "lora", **shared | {"eval_items": 3})
    taken = run(beside, tmp_path / run_name(beside), progress=False)
    assert taken["revision"] == "def" and taken["source_diff"] is None and DIFF not in taken["files"]
    first = taken["training"]
    assert (first["trained_by"], first["revision"], first["source_diff"]) == (folder.name, "abc-dirty", digest)

    (folder / DIFF).write_bytes(b"another patch")
    with pytest.raises(ValueError, match=f"{DIFF} is not the file that this run wrote"):
        read_result(folder)


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("where", ("result", "training"))
@pytest.mark.parametrize("wrong", (3, ["x"], {"x": 1}))
def test_a_checksum_of_another_type(tmp_path, where, wrong):
    quick = Path(__file__).parents[2] / "reports" / "quick" / "results.json"
    result = next(r for r in json.loads(quick.read_text())["results"] if r["training"])
    check_result(result, RESULT)  # without one, as older results are
    (result if where == "result" else result["training"])["source_diff"] = wrong
    with pytest.raises(ValueError, match="source_diff is not a checksum"):
        check_result(result, RESULT)
