"The benchmarks run, and the page on speed is the one that their stored results make. No timing is judged here."

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ("--rounds", "1", "--layers", "1", "--dtypes", "float32", "--tokens", "128")
QUICK = {"step": (*SMALL, "--ranks", "4"), "memory": (*SMALL, "--ranks", "4"), "where": (*SMALL, "--rank", "4")}


@pytest.mark.parametrize("name", QUICK)
def test_it_runs_and_leaves_its_rows(name, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *QUICK[name], "--out", tmp_path / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["rows"] and result["machine"]["torch"] in done.stdout
    assert all(set(r) <= set(result["columns"]) for r in result["rows"])


def test_the_page_is_made_from_the_results(tmp_path):
    code = f"import report; from pathlib import Path; import shutil; shutil.copytree(report.HERE, r'{tmp_path}', dirs_exist_ok=True); report.HERE = Path(r'{tmp_path}'); report.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    same = (tmp_path / "report.md").read_text() == (ROOT / "reports" / "speed" / "report.md").read_text()
    assert same, "run `python benchmarks/report.py`"
