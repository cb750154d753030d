"The rules of the house: what is exported is in sync, modules import downhill, notebooks are clean and small."

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOOK = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
APPENDIX = [ROOT / "nbs" / "files.ipynb"]  # every chapter may use it, and it uses none
NOTEBOOKS = [*BOOK, *sorted((ROOT / "nbs").glob("[a-z]*.ipynb")), *sorted((ROOT / "nbs" / "runs").glob("*.ipynb"))]
BIN = Path(sys.executable).parent


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of what nbdev reads and writes."
    copy = tmp_path_factory.mktemp("tree")
    for name in ("nbs", "dora_nb"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    return copy


def differences(a, b):
    names = {p.relative_to(d) for d in (a, b) for p in d.rglob("*") if p.suffix in (".py", ".ipynb")}
    return sorted(
        str(n)
        for n in names
        if not (a / n).exists() or not (b / n).exists() or not filecmp.cmp(a / n, b / n, shallow=False)
    )


def test_clean_leaves_no_difference(tree):
    subprocess.run([BIN / "nbdev_clean"], cwd=tree, check=True)
    assert not differences(ROOT / "nbs", tree / "nbs"), "run `make notebooks`"


def test_export_leaves_no_difference(tree):
    shutil.rmtree(tree / "dora_nb")
    (tree / "dora_nb").mkdir()
    subprocess.run([BIN / "nbdev_export"], cwd=tree, check=True, capture_output=True)
    assert not differences(ROOT / "dora_nb", tree / "dora_nb"), "run `make notebooks`"


def test_readme_is_the_index(tmp_path):
    subprocess.run(
        ["make", "-o", ".venv/.ready", "readme", f"README={tmp_path / 'README.md'}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make readme`"


@pytest.mark.parametrize("path", [*BOOK, *APPENDIX], ids=lambda p: p.stem)
def test_a_chapter_s_form(path):
    first = source(cells(path)[0])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first.strip()), (
        "title, then a one-sentence subtitle, in a cell of their own"
    )
    (name,) = re.findall(r"^#\| default_exp (\w+)$", "\n".join(map(source, cells(path, "code"))), re.M)
    assert path.stem in (f"{path.stem[:2]}_{name}", name) and (ROOT / "dora_nb" / f"{name}.py").exists()
    assert len(cells(path)) <= 60
    long = [
        source(c).count("\n") + 1
        for c in cells(path, "code")
        if "#| export" in source(c) and source(c).count("\n") >= 68
    ]
    assert not long, f"exported cells of {long} lines"


@pytest.mark.parametrize("path", [*BOOK, *APPENDIX], ids=lambda p: p.stem)
def test_modules_import_downhill(path):
    number = {p.stem[3:]: i for i, p in enumerate(BOOK)} | {p.stem: -1 for p in APPENDIX}
    own = BOOK.index(path) if path in BOOK else -1
    text = "\n".join(source(c) for c in cells(path, "code"))
    for module in re.findall(r"from dora_nb\.(\w+) import", text) + re.findall(
        r"from dora_nb import (\w+)$", text, re.M
    ):
        assert module.startswith("_") or number[module] < own, f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_small_and_clean(path):
    assert path.stat().st_size < 400_000
    for c in cells(path, "code"):
        assert c["execution_count"] is None
        text = json.dumps(c["outputs"])
        assert "jupyter.widget" not in text and "it/s]" not in text, "a progress bar was kept"
        assert '"output_type": "error"' not in text
        assert not re.search(r"/(root|home|work|Users|tmp)/", text), "a path of some machine was kept"


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_figures_are_there(path):
    "A cell that draws shows what it drew: a chapter that was run without inline figures is not committed."
    for c in cells(path, "code"):
        if "#| e" not in source(c) and re.search(r"^(fig, |(_ = )?plot_)", source(c), re.M):
            assert any("image/png" in o.get("data", {}) for o in c["outputs"]), source(c)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "runs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_run_notebooks_only_call(path):
    trees = [ast.parse(re.sub(r";$", "", source(c))) for c in cells(path, "code")]
    assert not [n for t in trees for n in ast.walk(t) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(path)) == 1


def test_public_things_say_what_they_are():
    for path in (ROOT / "dora_nb").glob("[a-z]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.stem}.{node.name} has no docstring"


def test_lint():
    done = subprocess.run(
        [BIN / "ruff", "check", "--no-cache", "nbs", "tests", "benchmarks", "setup.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout
    done = subprocess.run(
        [BIN / "ruff", "format", "--no-cache", "--check", "nbs", "tests", "benchmarks", "setup.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, "run `make notebooks`"
