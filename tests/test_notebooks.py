"Every chapter runs from top to bottom, with all its assertions."

import os
import subprocess
import sys
from pathlib import Path

import pytest

BOOK = sorted((Path(__file__).parent.parent / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_chapter(path):
    command = [Path(sys.executable).parent / "nbdev_test", "--path", path, "--n_workers", "0", "--do_print"]
    done = subprocess.run(
        command, cwd=path.parent.parent, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
