"Power against an independent computation and an audit's figures; the overview overwrites nothing of others."

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dora_nb.results.compare import compare, verdict
from dora_nb.results.failed import failures_section
from dora_nb.results.findings import conclusion, finding_rows, finding_table, lead_table, load_page
from dora_nb.results.forest import plot_forest
from dora_nb.results.overview import FOREST, check_overview, overview
from dora_nb.results.power import _errors_needed, detectable_difference
from dora_nb.results.stored import read_report

REPORTS = Path(__file__).parents[2] / "reports"


@pytest.mark.parametrize("df", (5, 11, 100))
@pytest.mark.parametrize("power", (0.5, 0.8, 0.9))
def test_the_power_is_that_of_the_noncentral_t(df, power):
    critical, mean = stats.t.ppf(0.975, df), _errors_needed(df, power)
    found = stats.nct.sf(critical, df, mean) + stats.nct.cdf(-critical, df, mean)
    assert math.isclose(found, power, abs_tol=2e-3)


def test_detectable_differences_are_those_of_an_audit():
    "Recomputed outside this project from the same answers, in points, with three seeds."
    found = read_report(REPORTS / "main" / "large")
    rows = compare(found.results, found.predictions).set_index("task").detectable
    assert {task: round(100 * rows[task], 1) for task in ("boolq", "hellaswag")} == {"boolq": 4.1, "hellaswag": 1.1}


@pytest.mark.parametrize(
    "given,said", [(dict(seeds=1), "seeds=1"), (dict(power=0.05), "power=0.05"), (dict(power=1), "power=1")]
)
def test_an_impossible_experiment_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        detectable_difference(np.eye(4), **given)


@pytest.mark.attack("data loss")
def test_the_overview_s_figure_replaces_no_other(tmp_path):
    shutil.copytree(REPORTS / "longer", tmp_path / "longer", ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / FOREST).write_bytes(b"a photograph")
    for make in (check_overview, overview):
        with pytest.raises(ValueError, match="move it away"):
            make(tmp_path)
    assert (tmp_path / FOREST).read_bytes() == b"a photograph" and not (tmp_path / "README.md").exists()
    (tmp_path / FOREST).unlink()
    overview(tmp_path), overview(tmp_path)
    assert (tmp_path / FOREST).stat().st_size > 1000


@pytest.mark.attack("crash")
def test_a_forest_of_hostile_names():
    name = r"$\frac{ _^ & <b>"
    figure = plot_forest({name: [dict(label=name, difference=1.0, low=0.5, high=9.0)]}, xlabel=name)
    figure.canvas.draw()
    figure = plot_forest({name: [dict(label=name, difference=-12.0)]}, named=False, xlabel=name)
    figure.canvas.draw()
    assert "−12.0" in [text.get_text() for text in figure.axes[0].texts]


def test_an_interval_is_held_against_the_posters_lead():
    row = dict(labels=("LoRA", "DoRA"), place="x", p=0.001, p_holm=0.001, seeds=3)
    of = lambda task, difference, low, high, **more: (
        row | dict(task=task, difference=difference, low=low, high=high) | more
    )
    rows = [
        of("boolq", 0.0, -0.02, 0.02),  # the poster has 2.3 points
        of("boolq", 0.0, -0.03, 0.03, p_holm=1.0),
        of("hellaswag", 0.09, 0.07, 0.11),
        of("hellaswag", 0.09, 0.07, 0.11, p_holm=0.2),  # not claimed
        of("winogrande", 0.09, 0.07, 0.11),  # ahead by more than 4.8
        of("piqa", 0.0, -0.01, 0.01),
    ]
    found = lead_table(rows)
    assert list(found["it is"]) == [
        "excluded",
        "neither excluded nor shown",
        "shown",
        *["neither excluded nor shown"] * 2,
    ]
    assert list(found["the poster's lead"]) == ["+2.3", "+2.3", "+10.0", "+10.0", "+4.8"]
    assert not len(lead_table(rows[-1:]))
    one = lead_table([r | {"seeds": 1} for r in rows])
    assert list(one["it is"])[:3] == ["excluded by this seed", "neither excluded nor shown", "shown by this seed"]


def test_a_difference_that_cannot_be_is_not_said_to_be_found():
    page = load_page(REPORTS / "edge" / "pilot")
    row = page.compared[0][-1]
    assert row["seeds"] == 2 and row["detectable"] > 1 and conclusion(row) == "cannot tell; would find none"
    assert verdict(row).endswith("is outside the interval, and no possible one would be found with 80 % power.")
    assert "No possible difference would be found with 80 % power." in "\n".join(failures_section(page))


def test_one_side_is_held_against_several():
    page = load_page(REPORTS / "allocation" / "large")
    rows, chosen, missing = finding_rows(page)
    assert {r["contrast"] for r in rows} == {0, 2} and not chosen and not missing  # 1 and 3 begin with another side
    assert {r["labels"][1] for r in rows} == {"ranks by curvature", "ranks by gates"}
    assert all(r["place"].endswith(r["labels"][1]) for r in rows)
    table = finding_table(rows)
    assert "the other side, %" in table and len(table) == len(rows)
    main = finding_rows(load_page(REPORTS / "main" / "large"))[0]  # LoRA against DoRA
    assert {r["labels"] for r in main} == {("LoRA", "DoRA")} and "DoRA, %" in finding_table(main)
