"The page on planted ranks: its numbers again from the stored cells, and the same text from them."

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from reports.planted import page as pages
from reports.planted.planted import candidates, choices

PLANTED = Path(__file__).parents[2] / "reports" / "planted"
PLAN = tomllib.loads((PLANTED / "plan.toml").read_text())


@pytest.fixture(scope="module")
def cells():
    found = {}
    for path in (PLANTED / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        found.setdefault(cell["seed"], {})[cell["cell"]] = cell
    return found


def test_the_page_is_made_from_the_cells(tmp_path):
    pages.write_page(PLAN, PLANTED / "cells", tmp_path, choices(PLANTED / "cells", PLAN["pilot"]["seed"]))
    assert (tmp_path / "report.md").read_text() == (PLANTED / "report.md").read_text()


def test_every_candidate_has_the_budget(cells):
    sizes = {cells[s][f"fit {what}"]["parameters"] for s in PLAN["seeds"] for what in candidates()}
    budget = {cells[s]["fit oracle"]["parameters"] for s in PLAN["seeds"]}
    assert budget == {max(sizes)} and min(sizes) > 0.98 * max(sizes)  # whole components only
    for s in PLAN["seeds"]:
        assert sorted(cells[s]["fit oracle"]["ranks"].values()) == sorted(PLAN["ranks"] * 4)
        assert (
            cells[s]["fit oracle"]["ranks"]
            == cells[s]["planting"]["ranks"]
            != cells[s]["fit oracle, shuffled"]["ranks"]
        )


def test_the_first_comparison_by_hand(cells):
    less = [100 * (cells[s]["fit oracle"]["loss"] / cells[s]["fit uniform"]["loss"] - 1) for s in PLAN["seeds"]]
    low, high = stats.t.interval(0.95, 2, np.mean(less), stats.sem(less))
    text = (PLANTED / "report.md").read_text()
    assert (
        f"(oracle) | {text.split('(oracle) | ')[1].split(' |')[0]} | {np.mean(less):+.1f} [{low:+.1f}, {high:+.1f}]"
        in text
    )


def test_a_rank_correlation_by_scipy(cells):
    found = []
    for s in PLAN["seeds"]:
        planted, estimated = cells[s]["planting"]["ranks"], cells[s]["scores"]["ranks"]["hessian"]
        found.append(stats.spearmanr([planted[n] for n in planted], [estimated[n] for n in planted]).statistic)
    assert f"Hessian of all gates (as in SubLoRA) | {np.mean(found):+.2f} [" in (PLANTED / "report.md").read_text()


def test_too_few_plantings(tmp_path):
    out = tmp_path / "cells"
    out.mkdir()
    for path in (PLANTED / "cells").glob("100-*.json"):
        shutil.copy(path, out)
    with pytest.raises(RuntimeError, match="two are needed"):
        pages.write_page(PLAN, out, tmp_path, choices(out, 100))


def test_order_by_chance():
    names = [f"{layer}.{kind}" for layer in range(4) for kind in ("v", "o", "up", "down")]
    rng = np.random.default_rng(0)
    planted = dict(zip(names, [0, 2, 6, 8, 2, 6, 8, 0, 6, 8, 0, 2, 8, 0, 2, 6]))
    noisy = {n: r + int(rng.integers(-4, 5)) for n, r in planted.items()}
    reversed_ = {n: 8 - r for n, r in planted.items()}
    assert pages.by_chance([(planted, planted)]) < 0.001 < 0.99 < pages.by_chance([(reversed_, planted)])
    rho = lambda e, p: stats.spearmanr([e[n] for n in names], [p[n] for n in names]).statistic
    hits = []
    for _ in range(1000):  # the same, one after the other
        dealt = dict(planted)
        for kind in ("v", "o", "up", "down"):
            of = [n for n in names if n.endswith(f".{kind}")]
            dealt |= dict(zip(of, rng.permutation([planted[n] for n in of])))
        hits.append(rho(noisy, dealt) >= rho(noisy, planted) - 1e-12)
    assert pages.by_chance([(noisy, planted)]) == pytest.approx(np.mean(hits), abs=0.03)
