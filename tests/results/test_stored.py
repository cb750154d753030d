"What was measured stays what it was: every stored report, from its files as the first edition left them."

import base64
import dataclasses
import json
import shutil
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from dora_nb.results import findings, measured, sections
from dora_nb.results import overview as front
from dora_nb.results.overview import check_overview, overview, reports_in
from dora_nb.results.page import render
from dora_nb.results.stored import ALL_GEOMETRY, FILES, MADE, read_report
from dora_nb.runs.grid import RESULTS

REPORTS = Path(__file__).parents[2] / "reports"
STORED = reports_in(REPORTS)


def first_edition(folder, to):
    "Copy a report's data without the pages, and without what the first edition did not write."
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.md", "*.png", ".*"))
    for grid in folder.parent.glob("*.toml"):
        shutil.copy(grid, to.parent)
        named = tomllib.loads(grid.read_text()).get("report", {}).get("equal_rates_from", {})
        for other in named.get(folder.name, ()):
            shutil.copytree(
                REPORTS / other, to.parents[1] / other, ignore=shutil.ignore_patterns("*.md", "*.png", ".*")
            )
            shutil.copy((REPORTS / other).parent / "grid.toml", (to.parents[1] / other).parent)
    about = json.loads((to / RESULTS).read_text(encoding="utf-8"))
    kept = {k: v for k, v in about.items() if k in ("results", "problems")}
    (to / RESULTS).write_text(json.dumps(kept, indent=2), encoding="utf-8")
    return to


@pytest.mark.parametrize("folder", STORED, ids=lambda p: str(p.relative_to(REPORTS)))
def test_a_stored_report_keeps_its_numbers(tmp_path, folder, monkeypatch):
    "The committed page, word for word, from the data alone; figures are compared elsewhere."
    drawn = set()
    for chapter in (findings, sections, measured):
        for name in [n for n in vars(chapter) if n.startswith("plot_")]:
            monkeypatch.setattr(chapter, name, lambda *_, **__: None)
    monkeypatch.setattr(sections, "_savefig", lambda _, path: drawn.add(path.name))
    made = first_edition(folder, tmp_path / folder.relative_to(REPORTS))
    page = render(made).read_text(encoding="utf-8")
    assert page == (folder / "report.md").read_text(encoding="utf-8"), (
        f"run `dora-nb report {folder.relative_to(REPORTS.parent)}`"
    )
    assert MADE.fullmatch(page.splitlines()[-1])[1] and drawn == {p.name for p in folder.glob("*.png")}


SMALL = ("quick", "sizes/medium", "geometry/medium")  # every kind of figure is among theirs
NAMES = [str(p.relative_to(REPORTS)) for p in STORED]


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_stored_report_keeps_its_figures(tmp_path, name):
    "As they are committed, from the data alone."
    made = first_edition(REPORTS / name, tmp_path / name)
    render(made)
    for path in made.glob("*.png"):
        new, old = (plt.imread(p).astype(float) for p in (path, REPORTS / name / path.name))
        assert new.shape == old.shape and abs(new - old).mean() < 0.01, (
            f"{path.name}: run `dora-nb report reports/{name}`"
        )


@pytest.mark.parametrize("folder", STORED, ids=lambda p: str(p.relative_to(REPORTS)))
def test_a_stored_report_s_files_belong_together(folder):
    files = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["files"]
    assert set(files) == {name for name in FILES if (folder / name).exists()}
    found = read_report(folder)
    assert set(found.predictions.run) == {r["run"] for r in found.results} and not found.others


def test_the_committed_overview_is_what_the_code_makes(tmp_path):
    shutil.copytree(REPORTS, tmp_path / "reports", ignore=shutil.ignore_patterns("*.png"))
    check_overview(tmp_path / "reports")
    made = overview(tmp_path / "reports")
    assert made.read_text(encoding="utf-8") == (REPORTS / "README.md").read_text(encoding="utf-8"), "run `make report`"
    new, old = (plt.imread(p / "forest.png").astype(float) for p in (made.parent, REPORTS))
    assert new.shape == old.shape and abs(new - old).mean() < 0.01, "run `make report`"


def test_the_overview_judges_by_the_metric_of_a_page():
    "SIQA in the magnitude's experiment is judged by acc_norm, -6.7 points at 100 times the rate; by sums it would be -5.7."
    page = findings.load_page(REPORTS / "magnitude" / "medium")
    (row,) = [r for r in front.equal_rows(page) if r["task"] == "social_iqa" and r["magnitude_lr"] == 100]
    assert round(100 * row["difference"], 1) == -6.7


def test_the_answer_s_chapter_shows_the_figure_of_the_overview():
    "The one that is stored now."
    chapter = json.loads((REPORTS.parent / "nbs/7_results/75_answer.ipynb").read_text(encoding="utf-8"))
    images = [
        o["data"]["image/png"]
        for c in chapter["cells"]
        for o in c.get("outputs", ())
        if "image/png" in o.get("data", {})
    ]
    assert base64.b64decode("".join(images[0])) == (REPORTS / "forest.png").read_bytes(), "run 75_answer again"


@pytest.mark.attack("crash")
def test_the_report_notebook_shows_a_stored_report(tmp_path, warm):
    "One with ΔM and ΔD, and with probes."
    import papermill

    from dora_nb.runs.jobs import notebook

    made = first_edition(REPORTS / "quick", tmp_path / "quick")
    moved = [
        dict(run=r["run"], step=r["training"]["steps"], steps=r["training"]["steps"], inputs=576, weight=f"{i}.q_proj")
        | dict(delta_m=0.01 + 0.001 * i, delta_d=1e-4 * (1 + i % 3), m0=4.0)
        for r in read_report(made).results
        if r["training"]
        for i in range(6)
    ]
    pd.DataFrame(moved).to_parquet(made / ALL_GEOMETRY)
    given = dict(runs_dir=None, out=str(made))
    nb = papermill.execute_notebook(notebook("report"), None, given, progress_bar=False, log_output=False)
    text = json.dumps(nb.cells, ensure_ascii=False)
    assert "ΔM / row length" in text and "GGN: λmax" in text and (made / "geometry.png").exists()


def test_the_overview_counts_what_has_ended():
    "And shows magnitudes with a learning rate of their own apart."
    page = findings.load_page(REPORTS / "magnitude" / "medium")
    ended = lambda answer: dataclasses.replace(page, spec=page.spec | {"answer": answer})
    grouped = lambda answer: front._grouped([(1, page.grid, page.spec)], [ended(answer)])
    assert grouped(front.UNDER_WAY) == {}
    common, own = grouped("It has ended.").values()
    assert common and all(map(front.one_rate, common))
    assert {r["magnitude_lr"] for r in own} == {0.0, 3.0, 10.0, 30.0, 100.0}
