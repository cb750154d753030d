"Every chapter runs from top to bottom, with all its assertions."

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOOK = sorted([*(ROOT / "nbs").glob("[0-9]*/*.ipynb"), *(ROOT / "nbs").glob("*.ipynb")])


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_chapter(path):
    command = [Path(sys.executable).parent / "nbdev_test", "--path", path, "--n_workers", "0", "--do_print"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr[-4000:]
