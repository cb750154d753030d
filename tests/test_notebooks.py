"Every chapter runs from top to bottom, with all its assertions."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOOK = sorted([*(ROOT / "nbs").glob("[0-9]*/*.ipynb"), *(ROOT / "nbs").glob("*.ipynb")], key=lambda p: p.name)
# as `nbdev_test` does; what a chapter has started must not hold the process
RUN = """
import _posixsubprocess, os, pathlib, subprocess, sys
from nbdev.test import test_nb

if pathlib.Path(sys.argv[1]).stem in {"52_execute", "58_launcher"}:
    subprocess._fork_exec = _posixsubprocess.fork_exec  # no kernel can be forked from one
good, _ = test_nb(pathlib.Path(sys.argv[1]))
sys.stdout.flush()
os._exit(not good)
"""


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_chapter(path, warm):
    done = subprocess.run(
        [sys.executable, "-c", RUN, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
