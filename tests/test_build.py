"What pip gets: a wheel and an sdist that hold what they should, and work outside the source tree."

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True)
    return out


def test_wheel(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "dora_nb").rglob("*.py")} | {"dora_nb/py.typed"} <= names
    assert {"dora_nb/notebooks/finetune.ipynb", "dora_nb/notebooks/report.ipynb"} <= names
    assert {f"dora_nb/results/report.{kind}" for kind in ("html", "css", "js")} <= names
    assert not [n for n in names if n.startswith(("tests", "nbs", "reports"))]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needed and not [
        line for line in needed if any(dev in line for dev in ("nbdev", "jupyter", "pytest", "peft", "papermill"))
    ]

    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel], check=True)
    code = "import dora_nb; from dora_nb import adapt; from dora_nb.runs.jobs import notebook; print(dora_nb.__file__, notebook('finetune'))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said.count(str(tmp_path)) == 2, "the package outside the source tree, and its own notebooks"


def test_sdist(dist):
    "Of which `build` has made the wheel."
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        names = {n.split("/", 1)[-1] for n in t.getnames()}
    assert {
        "settings.ini",
        "setup.py",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "nbs/1_layers/00_decompose.ipynb",
    } <= names
