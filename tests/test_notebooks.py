"Every chapter runs from top to bottom, with all its assertions."

import contextlib
import multiprocessing
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOOK = sorted([*(ROOT / "nbs").glob("[0-9]*/*.ipynb"), *(ROOT / "nbs").glob("*.ipynb")], key=lambda p: p.name)
SHARED = ("nbdev.test", "matplotlib.pyplot", "pandas", "datasets", "transformers.models.llama.modeling_llama")


@pytest.fixture(scope="module")
def context():
    "Starts processes that have imported what nearly every chapter needs: that takes longer than most chapters."
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(SHARED))
    return found


def run_chapter(path, log):
    "Run a chapter as `nbdev_test` does; what it prints, and a traceback, goes into a file."
    from nbdev.test import test_nb as run_notebook

    with open(log, "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        good, _ = run_notebook(path)
    os._exit(0 if good else 1)  # what a chapter has started must not hold the process


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_chapter(path, context, tmp_path):
    process = context.Process(target=run_chapter, args=(path, tmp_path / "log"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-4000:]
