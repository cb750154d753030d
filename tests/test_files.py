"How files are written, owned, read and locked, and how child processes start."

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from filelock import SoftFileLock
from torch.distributed.run import get_args_parser

from dora_nb import files, locks
from dora_nb.files import (
    HERE,
    MARKER,
    check_file,
    check_replaceable,
    check_writable,
    child_environment,
    claim,
    owned,
    python_command,
    read_json,
    read_text,
    set_aside,
    sweep,
    write_json,
    write_whole,
)
from dora_nb.locks import Lock


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", [1])

    def fail(path):
        path.write_text("hal")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_whole(tmp_path / "a.json", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == [1]


@pytest.mark.attack("data loss")
@pytest.mark.parametrize(
    "name",
    [
        *(".2024-12-draft.md", ".1-x", ".dora-nb-x-y", ".dora-nb-", ".dora-nb.json", ".dora-nb-7", ".dora-nb-0-x"),
        *(".dora-nb-99999999999999999999-x", ".dora-nb-4294967297-x", ".dora-nb-٧-x"),
    ],
)
def test_sweeping_takes_only_our_own(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".dora-nb-4194305-x").touch()
    (tmp_path / ".dora-nb-4194305-folder").mkdir()
    sweep(tmp_path)
    assert (tmp_path / name).exists() and (tmp_path / "below" / ".dora-nb-4194305-x").exists()
    assert (tmp_path / ".dora-nb-4194305-folder").exists()


@pytest.mark.attack("data loss")
@pytest.mark.parametrize(
    "marker",
    [
        None,
        "",
        "[]",
        "null",
        '{"made_by": "dora_nb"}',
        '{"made_by": "me", "kind": "run"}',
        '{"made_by": "dora_nb", "kind": "report"}',
    ],
)
def test_a_folder_without_our_marker_is_refused(tmp_path, marker):
    (tmp_path / "thesis.tex").touch()
    if marker is not None:
        (tmp_path / MARKER).write_text(marker)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="thesis.tex.*nothing was changed"):
        claim(tmp_path, "run")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.attack("hang")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("elsewhere", p)])
def test_a_marker_that_is_no_plain_file(tmp_path, make):
    make(tmp_path / MARKER)
    assert not owned(tmp_path, "run")
    with pytest.raises(ValueError, match=r"dora-nb\.json is a (pipe or device|folder|link)"):
        claim(tmp_path, "run", "a")
    assert [p.name for p in tmp_path.iterdir()] == [MARKER]


def test_a_folder_with_nothing_but_locks_and_leavings_can_be_claimed(tmp_path):
    for name in (".lock", ".claim", ".dora-nb-4194305-params.json"):
        (tmp_path / name).touch()
    assert owned(claim(tmp_path, "run", "a"), "run")


@pytest.mark.attack("data loss")
def test_a_test_for_writing_touches_nothing(tmp_path):
    (tmp_path / ".writable").write_text("mine")
    check_writable(tmp_path)
    assert (tmp_path / ".writable").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.attack("data loss")
@pytest.mark.parametrize(
    "make", [lambda p: p.write_text("mine"), lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to("/x")]
)
def test_a_file_of_somebody_else_is_not_replaced(tmp_path, make):
    make(tmp_path / "out.json")
    with pytest.raises(ValueError, match="this command did not write it"):
        check_replaceable(tmp_path / "out.json", lambda p: read_json(p, ["schema"]))


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a.json"])
def test_any_name_that_a_system_allows_can_be_written(tmp_path, name):
    write_json(tmp_path / name, [1])
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.attack("data loss")
def test_a_link_is_not_replaced(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match="this command did not write it"):
        check_replaceable(tmp_path / "link", lambda p: True)


@pytest.mark.attack("crash")
@pytest.mark.parametrize("check", [check_writable, lambda p: claim(p, "run")])
def test_a_path_that_is_no_text(tmp_path, check):
    with pytest.raises(ValueError, match="not UTF-8 text"):
        check(tmp_path / os.fsdecode(b"runs-\xff"))
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_numbered(tmp_path):
    for _ in range(3):
        (tmp_path / "a").touch()
        set_aside(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-2-a", "damaged-3-a", "damaged-a"]


@pytest.mark.attack("hang")
@pytest.mark.parametrize("read", [check_file, read_text, read_json, files.sha256])
def test_a_pipe_or_a_folder_in_place_of_a_file(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe or device"):
        read(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="pipe or device"):
        read("/dev/zero")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, b"1" * 5_000, b'{"a": \x00}']
)
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json"):
        read_json(tmp_path / "a.json")


@pytest.fixture
def without_flock(monkeypatch):
    "A file system that cannot lock, as some network file systems are."
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOSYS, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.attack("hang")
def test_a_lock_of_a_dead_host_does_not_last(tmp_path, without_flock, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 0.3)
    (tmp_path / ".lock").write_text("4711\nanother-host\n1\n")
    os.utime(tmp_path / ".lock", (1, 1))  # days old
    lock, waited = Lock(tmp_path / ".lock"), []
    lock.acquire(lambda: waited.append(1), pause=0.05)
    assert waited and isinstance(lock.lock, SoftFileLock) and lock.lock.is_locked
    lock.release()


def test_a_lock_that_is_held_is_not_taken(tmp_path, without_flock, monkeypatch):
    "Its holder touches it, however long it works; a waiter counts from the last touch, by its own clock."
    now = [0.0]
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    one, two = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock")
    one.acquire()
    for passed, touched, free in (
        (0, False, False),
        (119, False, False),
        (2, True, False),
        (119, False, False),
        (2, False, True),
    ):
        now[0] += passed
        if touched:
            os.utime(tmp_path / ".lock", (1, now[0]))
        assert two.try_acquire() == free
    two.release()


def test_the_holder_of_a_lock_touches_it(tmp_path, without_flock, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with Lock(tmp_path / ".lock"):
        os.utime(tmp_path / ".lock", (1, 1))
        while (tmp_path / ".lock").stat().st_mtime == 1:
            time.sleep(0.01)


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("name", ["datasets", "json", "runpy", "pip"])
@pytest.mark.long
def test_a_child_imports_nothing_from_the_working_directory(tmp_path, name, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", os.environ.get("PYTHONPATH", "")]))
    (tmp_path / f"{name}.py").write_text("print('planted')")
    (tmp_path / "dora_nb").mkdir()
    (tmp_path / "dora_nb" / "__init__.py").write_text("print('planted')")
    (tmp_path / "startup.py").write_text("print('planted')")
    command = python_command("dora_nb.files")
    command[3] += f"import {name}, json, dora_nb; print(dora_nb.__file__)"
    env = child_environment()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(HERE / "__init__.py"), done.stderr


@pytest.mark.attack("hang")
def test_a_child_sees_no_variables_of_a_job_system(monkeypatch):
    names = "WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID PYTHONSTARTUP PYTHON_EXEC TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCH_WORKER_SERVER_SOCKET PET_STANDALONE"
    for name in names.split():
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MY_RANK", "kept")
    options = [f"PET_{action.dest.upper()}" for action in get_args_parser()._actions]  # torchrun takes them for its own
    for name in options:
        monkeypatch.setenv(name, "2")
    env = child_environment(OMP_NUM_THREADS="1")
    assert {"PET_NNODES", "PET_NODE_RANK", "PET_RDZV_ENDPOINT"} <= set(options) and not set(options) & set(env)
    assert not set(names.split()) & set(env) and env["MY_RANK"] == "kept"
    assert env["PYTHONSAFEPATH"] == "1" and env["OMP_NUM_THREADS"] == "1" and sys.executable in python_command("x")


@pytest.mark.attack("crash")
def test_a_folder_in_the_place_of_a_lock_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/.lock is a folder, and a lock file is needed there; remove it"):
        Lock(tmp_path / ".lock").acquire()
