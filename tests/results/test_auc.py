"AUC against scikit-learn and scipy, its interval against DeLong's formula and draws; who has one, and where it is shown; baselines in figures and tables."

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from dora_nb.results.accuracy import BASELINE, accuracies, accuracy_table, majority
from dora_nb.results.auc import auc_interval, auc_values
from dora_nb.results.compare import compare
from dora_nb.results.figures import plot_accuracy, plot_sweep, sweep, sweep_table
from dora_nb.results.findings import finding_table
from dora_nb.results.items import has_auc, margins
from dora_nb.results.stored import read_report, select_runs
from dora_nb.runs.config import RunConfig

MAIN = Path(__file__).parents[2] / "reports" / "main" / "large"


def result(method, seed, acc, n, task, **params):
    params = RunConfig("boolq", method, seed=seed, **params).__dict__ | {"task": task}
    return dict(params=params, metrics=dict(acc=acc, n=n, seconds=1.0), training=None, peak_memory_bytes=2**30)


def draw(seeds, items, yes, ties, lead=1.0, seed=0):
    rng = np.random.default_rng(seed)
    gold = np.arange(items) < yes
    scores = lead * gold + rng.normal(size=items) + rng.normal(size=(seeds, items))
    return scores.round(0 if ties else 9), rng.permutation(gold) if lead == 0 else gold


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("seeds,items,yes", [(1, 2, 1), (1, 30, 3), (3, 30, 29), (2, 200, 120), (5, 501, 250)])
@pytest.mark.parametrize("lead", (-2.0, 0.0, 1.0, 50.0))
def test_an_area_is_that_of_scikit_learn_and_scipy(seeds, items, yes, ties, lead):
    scores, gold = draw(seeds, items, yes, ties, lead)
    areas = auc_values(scores, gold).mean(1)
    for area, row in zip(areas, scores, strict=True):
        assert area == pytest.approx(roc_auc_score(gold, row))
        assert area == pytest.approx(stats.mannwhitneyu(row[gold], row[~gold]).statistic / yes / (items - yes))
    assert auc_values(scores + 100, gold).mean() == pytest.approx(areas.mean())  # whatever the preference
    assert auc_values(0 * scores, gold).mean() == 0.5


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("items,yes", [(50, 20), (300, 30), (1000, 620)])
def test_a_variance_is_delong_s(items, yes, ties):
    scores, gold = draw(1, items, yes, ties)
    won = scores[0][gold][:, None] - scores[0][~gold]
    won = (won > 0) + 0.5 * (won == 0)
    delong = won.mean(1).var(ddof=1) / yes + won.mean(0).var(ddof=1) / (items - yes)
    assert stats.sem(auc_values(scores, gold)[0]) ** 2 == pytest.approx(delong, rel=2 / min(yes, items - yes))


@pytest.mark.parametrize("seeds", (1, 4))
def test_an_interval_is_that_of_items_drawn_again(seeds):
    scores, gold = draw(seeds, 400, 240, False)
    rng, low_high = np.random.default_rng(1), auc_interval(scores, gold)
    rows = lambda: rng.choice(seeds, max(1, seeds - 1)) if seeds > 1 else [0]
    area = lambda row, right: (row[right][:, None] > row[~right]).mean()
    drawn = []
    for _ in range(1000):
        i = rng.integers(400, size=400)
        drawn.append(np.mean([area(scores[s][i], gold[i]) for s in rows()]))
    ends = np.quantile(drawn, (0.025, 0.975))
    width = (low_high[1] - low_high[0]) / (ends[1] - ends[0])
    assert 0.85 < width < 1.15 and np.allclose(low_high, ends, atol=0.01)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("yes", (1, 2, 5, 50))
def test_an_area_without_a_wrong_pair_is_not_certain(yes):
    gold = np.arange(100) < yes
    for scores, edge in ((gold, 1), (~gold, 0)):
        low, high = auc_interval(scores[None].astype(float), gold)
        pairs = stats.beta.ppf(0.025, yes, 1)  # Clopper and Pearson's for so many pairs
        assert (low, high) == pytest.approx((pairs, 1) if edge else (0, 1 - pairs))


def ranked(run, task, lead, n=60, seed=0, preference=0.0, **params):
    "A result and its answers: log-likelihoods of two choices."
    rng = np.random.default_rng(seed)
    gold = (np.arange(n) % 3 > 0).astype(int)
    margin = lead * (gold - 0.5) + rng.normal(size=n) + preference
    pred = (margin > 0).astype(int)
    frame = dict(run=run, doc_index=range(n), loglikelihood=[[-1.0, m - 1.0] for m in margin], gold=gold, pred=pred)
    made = result("lora", seed, float((pred == gold).mean()), n, task, **params) | {"run": run}
    return made, pd.DataFrame(frame)


@pytest.mark.parametrize(
    "task,params,has",
    [
        ("boolq", {}, True),
        ("boolq", dict(eval_format="instruction"), True),
        ("winogrande", {}, False),  # the contexts differ
        ("winogrande", dict(eval_format="instruction"), True),  # option1 or option2
        ("piqa", {}, False),
        ("arc_easy", dict(eval_format="instruction"), False),  # more than two
        ("boolq", dict(protocol="generate", eval_format="instruction"), False),
        ("of another version", {}, False),
    ],
)
def test_who_has_an_area(task, params, has):
    made, frame = ranked("x", task, 1.0, **params)
    assert has_auc(made, frame) == has
    assert not has_auc(made, frame.drop(columns="loglikelihood"))
    assert not has_auc(made, frame.assign(gold=1))  # nothing to tell apart
    assert not has_auc(made, frame.assign(loglikelihood=[[-1.0]] * len(frame)))
    assert list(accuracies([made], frame, ("acc", "auc")).metric) == ["acc", "auc"][: 1 + has]


def test_a_preference_moves_accuracy_alone():
    made, frames = zip(*(ranked(f"boolq-{p}", "boolq", 1.5, preference=p, rank=int(8 + p)) for p in (-6.0, 0.0, 6.0)))
    table = accuracies(list(made), pd.concat(frames), ("acc", "auc")).set_index(["rank", "metric"]).share
    assert table[2, "auc"] == table[8, "auc"] == table[14, "auc"]
    assert (table[2, "acc"], table[14, "acc"]) == pytest.approx((1 / 3, 2 / 3)) and table[8, "acc"] > 2 / 3


def test_areas_of_the_stored_experiment():
    found = select_runs(read_report(MAIN), {r["run"] for r in read_report(MAIN).results if "boolq" in r["run"]})
    scores, gold = margins([r["run"] for r in found.results], found.predictions)
    areas = {run: roc_auc_score(gold, row) for run, row in scores.iterrows()}
    of = lambda method: [areas[r["run"]] for r in found.results if r["params"]["method"] == method]
    assert [round(x, 3) for x in (*of("base"), min(of("lora")), max(of("lora")))] == [0.507, 0.717, 0.733]
    table = accuracies(found.results, found.predictions, ("acc", "auc"))
    table = table[table.metric == "auc"].set_index("method")
    for method in ("base", "lora", "dora", "full"):
        assert table.share[method] == pytest.approx(np.mean(of(method)))
    differences = compare(found.results, found.predictions).iloc[0]
    assert differences.auc_difference == pytest.approx(np.mean(of("dora")) - np.mean(of("lora")))
    assert differences.auc_low < differences.auc_difference < differences.auc_high
    assert differences.majority == pytest.approx(0.6217, abs=1e-4)


def test_seeds_on_other_items_have_no_common_area():
    frame, other = (ranked(run, "boolq", 1.0)[1] for run in ("one", "two"))
    with pytest.raises(ValueError, match="not evaluated on the same items"):
        margins(["one", "two"], pd.concat([frame, other.assign(doc_index=other.doc_index + 1)]))


@pytest.fixture
def several():
    "Two ranks and two tasks."
    made = [
        ranked(f"{task}-{rank}-{s}", task, 1.0, seed=s, rank=rank)
        for task in ("boolq", "winogrande")
        for rank in (2, 4)
        for s in (0, 1)
    ]
    return [r for r, _ in made], pd.concat([frame for _, frame in made])


def test_every_accuracy_stands_beside_its_baseline(several):
    results, predictions = several
    constant, table = majority(*several), accuracies(results, predictions, ("acc", "auc"))
    wide = accuracy_table(table, constant)
    columns = ["BoolQ (n = 60)", "BoolQ, AUC (n = 60)", "WinoGrande (n = 60)"]
    assert list(wide.columns) == columns and list(wide.loc[BASELINE]) == ["66.7", "50.0", "66.7"]
    rows = sweep(table, "rank")
    text = sweep_table(rows, constant)
    assert list(text[BASELINE]) == ["66.7", "66.7", "50.0", "50.0", "66.7", "66.7"]
    assert list(text.index)[::2] == ["BoolQ, rank 2", "BoolQ, AUC, rank 2", "WinoGrande, rank 2"]
    for figure in (plot_accuracy(table, constant), plot_sweep(rows, constant)):
        dotted = [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in figure.axes]
        assert dotted == [[pytest.approx(66.67, abs=0.01)], [50], [pytest.approx(66.67, abs=0.01)]]
        assert BASELINE in [t.get_text() for t in figure.legends[0].get_texts()]
        assert "AUC" in figure.axes[0].get_ylabel()
        plt.close(figure)
    differences = compare(results, predictions, {"rank": 2}, {"rank": 4}).to_dict("records")
    shown = finding_table([r | {"labels": ("rank 2", "rank 4"), "place": r["task"]} for r in differences])
    assert list(shown[f"{BASELINE}, %"]) == ["66.7", "66.7"]
    assert [cell == "–" for cell in shown["rank 4 − rank 2, points of AUC"]] == [False, True]


def test_a_table_without_areas_names_none(several):
    results, predictions = several
    rows = [r for r in compare(results, predictions, {"rank": 2}, {"rank": 4}).to_dict("records")]
    rows = [r | {"labels": ("rank 2", "rank 4"), "place": ""} for r in rows if r["task"] == "winogrande"]
    assert math.isnan(rows[0]["auc_difference"]) and not any("AUC" in c for c in finding_table(rows).columns)
