"Tables against values counted by hand; the committed report against the code that makes it."

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from markdown_it import MarkdownIt
from scipy import stats

from dora_nb import __version__
from dora_nb.data.tasks import TASKS
from dora_nb.files import claim, sha256
from dora_nb.layers.decompose import delta_direction, delta_magnitude
from dora_nb.results import stored
from dora_nb.results.about import check_page, experiment
from dora_nb.results.accuracy import accuracies, accuracy_table, loss_table, majority, mixed_note
from dora_nb.results.collect import collect, read_run_files
from dora_nb.results.compare import agreement, change_verdict, changes, clear, compare, holm, verdict
from dora_nb.results.figures import plot_accuracy, plot_learning_curves, plot_sweep, sweep, sweep_table
from dora_nb.results.findings import conclusion, load_page
from dora_nb.results.geometry import (
    correlation,
    geometry_differences,
    geometry_rows,
    interval,
    partial_rank_correlation,
)
from dora_nb.results.intervals import freedom, mean_interval, mean_squares, share_interval, standard_error
from dora_nb.results.items import rights
from dora_nb.results.labels import factors, in_order, parameters, run_labels, value_label
from dora_nb.results.measured import stability_section
from dora_nb.results.overview import check_overview, overview, reports_in
from dora_nb.results.page import SECTIONS, _by_sums, _measured, render
from dora_nb.results.sections import Page, accuracy_section, comparison_section, judged
from dora_nb.results.sharpness import _last_block, curvature_rows, sharpness_table, stability_table
from dora_nb.results.stored import (
    ALL_CURVATURE,
    ALL_GEOMETRY,
    ALL_HISTORY,
    ALL_PREDICTIONS,
    MADE,
    NO_RESULTS,
    Results,
    diff_name,
    read_all,
    read_report,
)
from dora_nb.results.tables import _dev_cuts, cost_table, describe_source
from dora_nb.results.text import figure_text, markdown_code, markdown_text
from dora_nb.runs import identity
from dora_nb.runs.config import RunConfig
from dora_nb.runs.folder import CURVATURE, DIFF, GEOMETRY, HISTORY, PREDICTIONS, RESULT
from dora_nb.runs.grid import RESULTS, load_grid
from dora_nb.runs.identity import effective, run_name

QUICK = Path(__file__).parents[2] / "reports" / "quick"


def result(method, seed=0, acc=0.5, n=10, task="boolq", **params):
    return dict(
        run=f"{task}-{method}-{seed}",
        params=RunConfig(task, method, seed=seed, **params).__dict__,
        metrics=dict(acc=acc, n=n, seconds=1.0),
        training=None,
        peak_memory_bytes=2**30,
    )


def answers(run, right):
    return pd.DataFrame(dict(run=run, doc_index=range(len(right)), gold=1, pred=[int(r) for r in right]))


def test_accuracies():
    results = [result("lora", 0, 0.5), result("lora", 1, 0.7), result("base", 0, 0.4)]
    right = {"boolq-lora-0": [1] * 5 + [0] * 5, "boolq-lora-1": [1] * 7 + [0] * 3, "boolq-base-0": [1] * 4 + [0] * 6}
    predictions = pd.concat([answers(run, r) for run, r in right.items()])
    table = accuracies(results, predictions)
    lora, base = (table[table.method == m].iloc[0] for m in ("lora", "base"))
    assert lora.share == pytest.approx(0.6) and lora.seeds == 2 and lora.spread == pytest.approx(0.1414, abs=1e-4)
    assert (base.low, base.high) == pytest.approx((0.1682, 0.6873), abs=1e-4)  # Wilson for 4 of 10
    assert lora.low < 0.35 and lora.high > 0.85  # ten items are ten items
    text = accuracy_table(table)
    assert list(text.index) == ["base model", "LoRA, rank 16"] and list(text.columns) == ["BoolQ (n = 10)"]


def test_what_tells_runs_apart_is_never_averaged_over():
    results = [result("lora", learning_rate=1e-3), result("lora", seed=1, learning_rate=1e-4)]
    predictions = pd.concat([answers(r["run"], [1, 0]) for r in results])
    table = accuracies(results, predictions)
    assert list(table.seeds) == [1, 1] and "LoRA, rank 16, rate 0.0001" in list(table.label)
    twice = [result("lora", 2) | {"run": "a"}, result("lora", 1), result("lora", 2) | {"run": "b"}]
    with pytest.raises(ValueError, match="^a and b differ in nothing that could tell them apart"):
        accuracies(twice, predictions)


def test_what_follows_from_something_else_is_no_factor():
    rates = {"lora": 1e-3, "dora": 2e-3}
    runs = [
        result(m, s, task=t, learning_rate=rates[m], train_items=len(t))
        for m in rates
        for s in (0, 1)
        for t in ("boolq", "winogrande")
    ]
    assert list(factors(runs)) == ["protocol", "eval_split", "task", "method"]
    assert factors(runs)["method"] == ["lora", "dora"]
    assert list(factors([*runs, result("dora", 2, learning_rate=5e-3, train_items=5)]))[-1] == "learning_rate"
    assert "probe" not in factors([*runs, result("dora", 3, learning_rate=2e-3, train_items=5, probe=True)])


def test_a_standard_error_is_as_wide_as_theory_says():
    "Variance of a mean: seeds' part over S, items' part over n, the rest over both."
    rng = np.random.default_rng(0)
    seeds, items = rng.normal(0, 0.2, (12, 1)), rng.normal(0, 1, (1, 300))
    expected = (seeds.var(ddof=1) / 12 + items.var(ddof=1) / 300) ** 0.5
    assert standard_error(seeds + items) == pytest.approx(expected, rel=1e-9)
    errors = [standard_error(rng.normal(0, 1, (6, 300))) for _ in range(200)]  # each value for itself
    assert 0.95 < np.mean(errors) * 1800**0.5 < 1.2  # not √3, as of a bootstrap that is left as it is


def test_a_standard_error_is_that_of_a_crossed_bootstrap_less_what_it_counts_too_often():
    rng = np.random.default_rng(1)
    table = rng.integers(0, 2, (3, 400)) * rng.integers(0, 2, 400) + 0.1 * rng.normal(size=(3, 1))
    draws = [table[rng.integers(0, 3, 2)][:, rng.integers(0, 400, 400)].mean() for _ in range(20_000)]
    rest = mean_squares(table)[2]
    assert np.var(draws) - 2 * rest / table.size == pytest.approx(standard_error(table) ** 2, rel=0.05)


def test_degrees_of_freedom():
    rng = np.random.default_rng(0)
    seeds, items = rng.normal(0, 1, (3, 1)), rng.normal(0, 1, (1, 500))
    assert freedom(seeds + 0.01 * items) == pytest.approx(2, rel=0.01)  # seeds make the difference
    assert freedom(0.001 * seeds + items) == pytest.approx(499, rel=0.01)  # items do


def test_three_seeds_that_agree_are_no_proof():
    "Seeds far apart, all on one side: the interval of three of them holds zero all the same."
    d = np.zeros((3, 1000))
    for row, share in zip(d, (0.01, 0.04, 0.09)):
        row[: int(1000 * share)] = 1
    rng = np.random.default_rng(0)
    for row in d:
        rng.shuffle(row)
    low, high, p = mean_interval(d)
    assert low < 0 < high and p > 0.05


def test_holm():
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.9])) == pytest.approx([0.9])


def test_the_most_frequent_answer():
    results = [result("lora", n=4), result("dora", n=4)]
    predictions = pd.concat([answers(r["run"], [1, 0, 1, 1]).assign(gold=[0, 1, 1, 1]) for r in results])
    found = majority(results, predictions)
    assert found == {("boolq", "validation", 4): [0.75]}
    assert accuracy_table(accuracies(results, predictions), found).iloc[-1, 0] == "75.0"


def test_items_count_not_seeds():
    "The same answers under five seeds say no more than under one."
    rng = np.random.default_rng(0)
    lora, dora = rng.random(200) < 0.5, rng.random(200) < 0.6

    def row(seeds):
        results = [result(m, s) for m in ("lora", "dora") for s in range(seeds)]
        return compare(
            results,
            pd.concat(
                [
                    answers(f"boolq-{m}-{s}", right)
                    for m, right in (("lora", lora), ("dora", dora))
                    for s in range(seeds)
                ]
            ),
        ).iloc[0]

    one, five = row(1), row(5)
    assert one.n == five.n == 200 and five.difference == pytest.approx(one.difference)
    assert five.p == pytest.approx(one.p, abs=0.02) and five.high - five.low == pytest.approx(
        one.high - one.low, rel=0.05
    )
    assert five.mcnemar < one.mcnemar  # which is why it does not decide


def test_no_difference_is_not_certainty():
    row = compare(
        [result("lora"), result("dora")],
        pd.concat([answers("boolq-lora-0", [1] * 50), answers("boolq-dora-0", [1] * 50)]),
    ).iloc[0]
    assert row.difference == 0 and row.p == 1 and row.low < -0.02 and row.high > 0.02


def test_seeds_that_agree_everywhere_are_no_proof_of_equality():
    runs = [(m, s) for m in ("lora", "dora") for s in range(3)]
    right = pd.concat([answers(f"boolq-{m}-{s}", [1] * 50) for m, s in runs])
    row = compare([result(m, s) for m, s in runs], right).iloc[0]
    assert row.difference == 0 and row.p == 1 and row.low < -0.02 and row.high > 0.02


def test_comparison_counts_pairs():
    results = [result("lora"), result("dora")]
    lora, dora = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1, 0]
    row = compare(results, pd.concat([answers("boolq-lora-0", lora), answers("boolq-dora-0", dora)])).iloc[0]
    assert (row.n, row.only_a, row.only_b) == (10, 1, 6) and row.difference == pytest.approx(0.5)
    assert row.p == pytest.approx(2 * (1 + 7) / 2**7)  # both tails of Binomial(7, ½) at one or fewer
    assert row.low == pytest.approx(5 / 12 - 1.96 * ((9 / 12 - (5 / 12) ** 2) / 12) ** 0.5)  # Bonett and Price, by hand
    assert "cannot tell" in verdict(row.to_dict())
    dora = [1] * 10
    row = compare(results, pd.concat([answers("boolq-lora-0", [0] * 10), answers("boolq-dora-0", dora)])).iloc[0]
    assert "DoRA is ahead here" in verdict(row.to_dict())


def test_how_often_two_give_the_same_answer():
    "Right or wrong; the yardstick is two seeds of one method, of either."
    given = {"lora-0": [0, 1, 2, 3], "lora-1": [0, 1, 2, 0], "dora-0": [0, 1, 2, 2], "dora-1": [0, 1, 3, 0]}
    predictions = pd.concat([answers(f"boolq-{run}", [0] * 4).assign(pred=pred) for run, pred in given.items()])
    same, seeds = agreement({s: (f"boolq-lora-{s}", f"boolq-dora-{s}") for s in (0, 1)}, predictions)
    assert same == (3 + 3) / 8 and seeds == (3 + 2) / 8
    assert math.isnan(agreement({0: ("boolq-lora-0", "boolq-dora-0")}, predictions)[1])
    unread = predictions.assign(pred=predictions.pred.where(predictions.pred < 3))  # generated, and no choice named
    assert agreement({0: ("boolq-lora-0", "boolq-lora-0")}, unread)[0] == 1
    row = compare([result(m, s) for m in ("lora", "dora") for s in (0, 1)], predictions).iloc[0]
    assert "the same answer to 75.0 % of the items, two seeds of the same side to 62.5 %." in verdict(row.to_dict())


def test_the_base_model_stands_against_every_seed():
    "It has one, and no rank or rate, and its answers are compared with those of all others."
    runs = [result("base"), *(result("lora", s, rank=4, learning_rate=1e-3) for s in (0, 1, 2))]
    right = {"boolq-base-0": [0, 0, 1, 1], **{f"boolq-lora-{s}": [1, 0, 1, 1] for s in (0, 1, 2)}}
    predictions = pd.concat([answers(run, r) for run, r in right.items()])
    row = compare(runs, predictions, {"method": "base"}, {"method": "lora"}).iloc[0]
    assert (row.seeds, row.only_a, row.only_b) == (3, 0, 3) and row.difference == pytest.approx(0.25)
    back = compare(runs, predictions, {"method": "lora"}, {"method": "base"}).iloc[0]
    assert (back.only_a, back.only_b) == (3, 0)


def test_who_diverged():
    "Above the base model, or no number; without a base model nobody can say."
    runs = [result("base"), *(result("lora", s, learning_rate=1e-3) | {"training": {"items": 1}} for s in (0, 1))]
    losses = {"boolq-base-0": 0.5, "boolq-lora-0": 0.4, "boolq-lora-1": 3.0}  # of the right one of two choices
    likelihoods = [[[np.log1p(-np.exp(-x)), -x]] for x in losses.values()]
    frames = [answers(run, [1]).assign(loglikelihood=x) for run, x in zip(losses, likelihoods)]
    history = pd.DataFrame({"run": [], "step": [], "loss": []})
    found = Results(runs, [], pd.concat(frames), history, NO_RESULTS.geometry, {})
    assert stability_table(found, "learning_rate").to_numpy().tolist() == [["1.70, 1 of 2"]]
    dev = [r | dict(run=f"{r['run']}-dev", params=r["params"] | dict(eval_split="dev")) for r in runs]
    both = found.predictions.assign(run=found.predictions.run + "-dev")
    both = found._replace(results=[*runs, *dev], predictions=pd.concat([found.predictions, both]))
    assert stability_table(both, "learning_rate").to_numpy().tolist() == [["1.70, 1 of 2"]] * 2  # a row for each split
    lost = asdict(RunConfig("boolq", "lora", seed=2, learning_rate=1e-3))
    assert stability_table(found, "learning_rate", [lost]).to_numpy().tolist() == [["nan, 2 of 3"]]
    assert stability_table(found._replace(results=runs[1:]), "learning_rate").to_numpy().tolist() == [["1.70"]]


@pytest.mark.parametrize("names, last", [(["all", "layer 3", "layer 29"], ["layer 29"]), (["m", "A"], ["A"]), ([], [])])
def test_the_block_that_was_probed_last_is_drawn(names, last):
    "Not the last by the alphabet; and one that every probe has."
    probe = {"blocks": {name: {"hessian": {}} for name in names}}
    other = {"blocks": probe["blocks"] | {"only here": {"hessian": {}}, "layer 0": {"ggn": {}}}}
    assert _last_block(pd.Series([probe, other])) == last == _last_block(pd.Series([other, probe]))


def test_losses_of_sums_do_not_judge_a_training_on_means(tmp_path):
    "Mean log-likelihoods may rise while sums part; the page said that its best objective had diverged."
    page = replace(load_page(QUICK.parent / "objective" / "medium"), out=tmp_path)
    text = "\n".join([*accuracy_section(page), *stability_section(page)])
    assert "acc_norm" in text and "Cross-entropy" not in text and "diverged" not in text
    of_one = lambda found, kept: found._replace(results=[r for r in found.results if r["params"]["objective"] in kept])
    page = replace(page, found=of_one(page.found, ("choices", "answer")))
    assert "19.58, 0 of 2" in "\n".join(stability_section(page))
    plt.close("all")


def test_learning_curves_of_objectives_have_their_own_panels():
    found = read_report(QUICK.parent / "objective" / "medium")
    fig = plot_learning_curves(found.results, found.history)
    axes = {ax.get_title(): ax for ax in fig.axes}
    assert list(axes) == ["HellaSwag, answer", "HellaSwag, choices", "HellaSwag, choices_mean"]
    assert [ax.get_ylim()[1] > 10 for ax in axes.values()] == [False, True, False]
    assert [t.get_text() for t in fig.axes[-1].get_legend().get_texts()] == [
        f"LoRA, rate {rate}" for rate in ("0.0005", "0.001", "0.002")
    ]
    plt.close(fig)


def test_learning_curves_of_mixtures_have_their_own_panel():
    "And not that of the task that was asked; a kind of run looks the same in every panel."
    found = read_report(QUICK.parent / "mixture" / "large")
    fig = plot_learning_curves(found.results, found.history)
    axes = {ax.get_title(): ax.get_lines() for ax in fig.axes}
    assert list(axes) == ["BoolQ", "HellaSwag", "WinoGrande", "3 tasks together", "8 tasks together"]
    assert [len(lines) for lines in axes.values()] == [4, 4, 4, 2, 2]
    assert [max(line.get_xdata()) for line in axes["8 tasks together"]] == [654, 654]
    looks = {(line.get_label(), line.get_alpha(), line.get_linewidth()) for lines in axes.values() for line in lines}
    assert len(looks) == 4
    assert [t.get_text() for t in fig.axes[-1].get_legend().get_texts()] == [
        f"{method}, {n} items" for method in ("LoRA", "DoRA") for n in ("1,333", "4,000")
    ]
    plt.close(fig)


def test_costs_of_a_base_model_are_dashes():
    assert cost_table([result("base")]).iloc[0]["trained parameters"] == "–"


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="not a folder of runs"):
        collect(tmp_path / "none", tmp_path)
    (tmp_path / "runs" / "half").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no finished run(.|\n)*half: not finished"):
        collect(tmp_path / "runs", tmp_path)
    with pytest.raises(ValueError, match="holds no results.json"):
        read_report(tmp_path)


def test_sharpness_of_kinds_that_differ_in_more_than_the_rate():
    "A row for each, with its own accuracy."
    runs = [result("lora", rank=r, learning_rate=1e-3, acc=acc) for r, acc in ((4, 0.2), (8, 0.9))]
    runs = [r | {"run": f"rank-{r['params']['rank']}", "training": {"items": 1}} for r in runs]
    predictions = pd.concat([answers(r["run"], [1, 0]) for r in runs])
    probe = lambda at, top: dict(at=at, step=1, blocks={"all": {"ggn": {"eigenvalues": [top]}}})
    probes = {f"rank-{r}": [probe(at, top) for at in ("warm-up", "middle", "end")] for r, top in ((4, 12.0), (8, 1e3))}
    rows = curvature_rows(runs, probes)
    table = sharpness_table(rows, accuracies(runs, predictions), majority(runs, predictions)).set_index("kind")
    assert table["λmax, end"].to_dict() == {"LoRA, rank 4": "12", "LoRA, rank 8": "1e+03"}
    assert table.accuracy["LoRA, rank 4"].startswith("20.0 ") and table.accuracy["LoRA, rank 8"].startswith("90.0 ")


def test_a_difference_that_changes():
    "DoRA gets 1 of 100 items more than LoRA from an intact base, and 21 more from a broken one; one scheme has one seed."
    right, results = {}, []
    for compress, more in (("", 1), ("rtn-3", 21), ("rtn-2", 11)):
        for seed in range(1 if compress == "rtn-2" else 3):
            for method, n in (("lora", 40), ("dora", 40 + more)):
                run = f"{method}{compress}{seed}"
                results.append(result(method, seed, n=100, compress=compress) | {"run": run})
                right[run] = np.roll([1] * n + [0] * (100 - n), seed)
    predictions = pd.concat([answers(run, r) for run, r in right.items()])
    table = changes(results, predictions, {"compress": ""}).set_index("compress")
    assert list(table.index) == ["rtn-3", "rtn-2"] and list(table.seeds) == [3, 1] and list(table.n) == [100, 100]
    assert table.change.tolist() == pytest.approx([0.2, 0.1])
    assert (table.low > 0).all() and (table.p < 0.01).all() and (table.low < table.change).all()
    text = change_verdict(table.loc["rtn-2"].to_dict() | {"p_holm": 0.2}, start="as it comes", head="rtn-2")
    assert text.startswith("rtn-2 against as it comes: DoRA − LoRA changes by +10.0 points") and "no change" in text
    assert change_verdict(table.loc["rtn-3"].to_dict()).endswith("The difference is larger here.")
    turned = table.loc["rtn-3"].to_dict() | {"change": -0.2, "low": -0.3, "high": -0.1}
    assert change_verdict(turned).endswith("The difference is smaller here.")
    assert change_verdict(turned | {"p_holm": math.nan}).endswith("not tested. No claim is made.")
    assert not len(changes(results, predictions, {"compress": "hqq-4"}))
    same = changes(results, predictions, {"compress": ""}, {"method": "lora"}, {"method": "lora"})
    assert (same.change == 0).all() and (same.low < 0).all() and (same.p == 1).all()


def test_the_committed_results_are_of_the_committed_grid():
    results = json.loads((QUICK / RESULTS).read_text())
    assert not results["problems"]
    asked = {json.dumps(asdict(c)) for c in load_grid(QUICK / "grid.toml").configs}
    assert {json.dumps(asdict(effective(RunConfig(**r["params"])))) for r in results["results"]} == asked


GRIDS = sorted(p for p in QUICK.parent.glob("*/*.toml") if p.stem != "plan")  # a plan is of a program of its own
SCALED = [(p, s) for p in GRIDS for s in tomllib.loads(p.read_text()).get("scale", {"": None})]


@pytest.mark.parametrize("path,scale", SCALED, ids=lambda p: f"{p.parent.name}/{p.stem}" if isinstance(p, Path) else p)
def test_every_grid_is_one(path, scale, monkeypatch):
    if path.stem == "llama-7b":  # a model of the Hub, which is identified by its content
        monkeypatch.setattr("dora_nb.runs.identity.model_digest", lambda name, source: name)
    grid = load_grid(path, scale or None)
    assert len({run_name(c) for c in grid.configs}) == len(grid.configs)


def swept(methods=("lora", "dora"), ranks=(2, 8), seeds=(0, 1)):
    "Runs along a rank, with answers."
    rng = np.random.default_rng(0)
    results, frames = [result("base", acc=0.5)], [answers("boolq-base-0", [0, 1] * 5)]
    for m in methods:
        for r in ranks:
            for s in seeds:
                right = (rng.random(10) < 0.3 + 0.05 * r).astype(int)
                results.append(result(m, s, right.mean(), rank=r) | {"run": f"{m}-{r}-{s}"})
                frames.append(answers(f"{m}-{r}-{s}", right))
    return results, pd.concat(frames)


def test_an_objective_that_learns_length_is_named():
    trained = lambda task, **params: {"params": {"task": task} | params}
    line, *_ = _by_sums([trained("social_iqa", objective="choices"), trained("hellaswag")])
    assert "summed log-likelihoods on HellaSwag, SIQA." in line
    for other in ("winogrande", "boolq", "of my own"):  # choices of one word; unknown ones
        assert not _by_sums([trained(other, objective="choices")])
    assert not _by_sums([trained("hellaswag", objective="choices_mean")]) and not _by_sums([])
    objectives = [trained("hellaswag", objective=o) for o in ("choices", "answer")]
    assert not _by_sums(objectives)  # the page compares them


def test_a_sweep():
    results, predictions = swept()
    rows = sweep(accuracies(results, predictions), "rank")
    assert list(rows.line) == ["base model", "LoRA", "LoRA", "DoRA", "DoRA"]
    assert list(rows.x)[1:] == [0, 1, 0, 1] and np.isnan(rows.x[0])
    text = sweep_table(rows)
    assert list(text.index) == ["BoolQ, rank 2", "BoolQ, rank 8"] and text["base model"].nunique() == 1
    assert len(plot_sweep(rows, majority(results, predictions)).axes) == 1
    differences = compare(results, predictions)
    assert list(differences["rank"]) == [2, 8] and set(differences.seeds) == {2}
    by_hand = predictions.assign(right=predictions.pred).groupby("run").right.mean()
    lora, dora = (np.mean([by_hand[f"{m}-8-{s}"] for s in (0, 1)]) for m in ("lora", "dora"))
    assert differences.difference[1] == pytest.approx(dora - lora)


def test_a_sweep_over_schemes_of_compression():
    names = ("", "rtn-4", "rtn-2", "hqq-4", "magnitude-0.25", "magnitude-0.7")
    results = [result("lora", compress=c) | {"run": f"lora-{c}"} for c in names]
    rows = sweep(accuracies(results, pd.concat([answers(r["run"], [1] * 10) for r in results])), "compress")
    assert list(dict.fromkeys(rows.panel)) == ["hqq", "magnitude", "rtn"]
    at = lambda f: list(rows[rows.panel == f].sort_values("x")["at"])
    assert at("rtn") == ["as it comes", "4 bits", "2 bits"]
    assert at("magnitude") == ["as it comes", "25\u00a0% zeros", "70\u00a0% zeros"]
    assert list(rows[rows.panel == "magnitude"].sort_values("x").x) == [0, 1, 2]  # no room for the schemes of others


def test_a_correlation_and_its_interval():
    rng = np.random.default_rng(0)
    weight = np.repeat(np.arange(200), 4)
    own = rng.normal(size=200)[weight]  # what the checkpoints of a weight share
    x = own + rng.normal(size=800)
    points = pd.DataFrame(dict(weight=weight, x=x, y=own + rng.normal(size=800)))
    r, low, high = interval(correlation(points))
    assert r == pytest.approx(np.corrcoef(points.x, points.y)[0, 1]) and low < r < high
    alone = interval(correlation(points.assign(weight=range(800))))
    assert high - low > 1.1 * (alone[2] - alone[1])  # checkpoints of one weight are not independent points


def test_a_partial_rank_correlation():
    "A common third makes a correlation, and holding it takes that away; the rest is as regression on ranks has it."
    rng = np.random.default_rng(0)
    z = rng.normal(size=300)
    x, y = z + 0.5 * rng.normal(size=300), z + 0.5 * rng.normal(size=300)
    points = pd.DataFrame(dict(kind="q", x=x, y=y, z=z))
    r, low, high = interval(partial_rank_correlation(points))
    ranks = points[["x", "y", "z"]].rank()
    left = [ranks[k] - np.polyval(np.polyfit(ranks.z, ranks[k], 1), ranks.z) for k in "xy"]
    assert r == pytest.approx(np.corrcoef(*left)[0, 1]) and low < 0 < high
    assert points.x.corr(points.y, method="spearman") > 0.6
    two = pd.concat([points, points.assign(kind="k", y=x)])
    assert partial_rank_correlation(two)[0] == pytest.approx((r + 1) / 2)
    assert np.isnan(partial_rank_correlation(points[:3])).all()


def test_two_correlations_are_compared_on_the_same_weights():
    rng = np.random.default_rng(0)
    weights = [f"layers.{i}.q_proj" for i in range(60)]
    m0, delta_d = rng.uniform(1, 3, 60), rng.uniform(0.1, 1, 60)
    noise = rng.normal(size=60)
    own = dict(weight=weights, task="boolq", part=1.0, m0=m0, delta_d=delta_d)
    make = lambda method, share: pd.DataFrame(own | dict(method=method, label=method, delta_m=delta_d + share * noise))
    both = lambda *frames: pd.concat([f.assign(relative=f.delta_m / f.m0) for f in frames])
    (same,) = geometry_differences(both(make("lora", 0.5), make("dora", 0.5)))
    assert same.startswith("BoolQ: lora − dora: correlation +0.00 [+0.00, +0.00], ")
    (apart,) = geometry_differences(both(make("lora", 0.1), make("dora", 0.5)))
    low = float(apart.partition("[")[2].partition(",")[0])
    assert low > 0.1  # though the two intervals by themselves are wide
    assert not geometry_differences(both(make("lora", 0.1), make("lora", 0.5).assign(label="another rate")))


def test_lengths_that_nobody_steers():
    "Random steps of random rows, and coins that fall: both yardsticks read one."
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        W0 = torch.tensor(rng.normal(size=(400, 64)))
        W = W0 + 0.01 * W0.norm(dim=1, keepdim=True) / 8 * torch.tensor(rng.normal(size=W0.shape))
        found = dict(delta_m=delta_magnitude(W0, W).item(), delta_d=delta_direction(W0, W).item())
        rows.append(dict(weight=f"w{i}", run="a", step=2, steps=2, m0=W0.norm(dim=1).mean().item(), inputs=64) | found)
    history = pd.DataFrame(dict(run="a", step=[1, 2], learning_rate=[3e-3, 4e-3]))
    made = geometry_rows([result("dora") | {"run": "a"}], pd.DataFrame(rows), history)
    assert made.of_step.median() == pytest.approx(1, abs=0.05)
    walk = np.abs(rng.choice([-1, 1], (100_000, 400)) @ np.full(400, 5e-3 / 20)).mean()  # of the same Σ η²
    assert (made.delta_m / made.of_walk).to_numpy() == pytest.approx(walk, rel=0.01)


SPEC = """
name = "x"
[fixed]
rank = 2
[axes]
method = ["lora", "dora"]
[scale.small]
fixed = { eval_items = 10 }
[report]
number = 2
title = "A title"
claim = "A | claim."
answer = "Undecided."
verdict = "Undecided, as nothing was run."
"""


def test_a_page_s_words_come_from_the_grid_file(tmp_path):
    folder = tmp_path / "reports" / "words" / "small"
    folder.mkdir(parents=True)
    (folder.parent / "grid.toml").write_text(SPEC)
    spec, path, scale = experiment(folder)
    assert (spec["title"], path.name, scale) == ("A title", "grid.toml", "small")
    page = overview(tmp_path / "reports").read_text()
    assert "| A \\| claim. | Not measured yet. | – | [the grid](words/grid.toml) |" in page
    assert page.startswith("# Experiments\n\n## The questions\n") and "poster" not in page and "LOG.md" not in page
    words = tmp_path / "reports" / "overview.toml"
    words.write_text('title = "Our models"\nend = "Ask us."')
    page = overview(tmp_path / "reports").read_text()
    assert page.startswith("# Our models\n") and "\nAsk us.\n" in page
    for wrong, said in (
        ("titel = 'x'", "unknown key 'titel'; did you mean 'title'"),
        ("title = 3", "must be of type str"),
    ):
        words.write_text(wrong)
        with pytest.raises(ValueError, match=f"overview.toml: {said}" if "unknown" in said else said):
            check_overview(tmp_path / "reports")
    words.unlink()
    (folder.parent / "grid.toml").write_text(SPEC.replace("claim =", "klaim ="))
    with pytest.raises(ValueError, match="report.klaim is unknown"):
        experiment(folder)
    for start in ("{ ranc = 4 }", "{ rank = 4 }"):  # no parameter, and no run's value
        (folder.parent / "grid.toml").write_text(SPEC + f"changes_from = {start}")
        with pytest.raises(ValueError, match="changes_from is a table with a run's parameter"):
            experiment(folder)
    (folder.parent / "grid.toml").write_text(SPEC + "changes_from = { rank = 2 }")
    assert experiment(folder)[0]["changes_from"] == {"rank": 2}
    by_scale = '[report.doubts]\nsmall = ["One."]\nlarge = ["Two."]\n[report.verdict]\nlarge = "Yes."'
    (folder.parent / "grid.toml").write_text(SPEC.replace('verdict = "Undecided, as nothing was run."', by_scale))
    spec = experiment(folder)[0]
    assert spec["doubts"] == ["One."] and "verdict" not in spec
    assert experiment(tmp_path) == ({}, None, None)


def run_dir(folder, config, right, **changes):
    "What a finished run leaves: right answers of an item in `right`, others wrong."
    run = run_name(config)
    (folder / run).mkdir(parents=True)
    training = dict(items=32, steps=2, trainable=10, total=100, tokens_per_second=9.0, seconds=1.0)
    made = dict(
        schema=1,
        run=run,
        params=asdict(config),
        metrics=dict(acc=float(np.mean(right)), n=len(right), seconds=1.0),
        training=None if config.method == "base" else training,
        machine=dict(cpu="c", gpu=None, threads=1),
        versions=dict(dora_nb="0.1.0"),
        precision=dict(precision="float32", eval_precision="float32"),
        timings=dict(loading=1.0, training=1.0, probing=0.0, evaluation=1.0),
        revision="abc",
        seconds=2.0,
        peak_memory_bytes=2**30,
    )
    (folder / run / RESULT).write_text(json.dumps(made | changes))
    gold = np.arange(len(right)) % 2
    pred = np.where(np.array(right, bool), gold, 1 - gold)
    scores = [[-1.0, -2.0] if p == 0 else [-2.0, -1.0] for p in pred]
    table = pd.DataFrame(dict(doc_index=range(len(right)), loglikelihood=scores, gold=gold, pred=pred))
    table.to_parquet(folder / run / PREDICTIONS)
    if config.method != "base":
        steps = [dict(step=i, steps=2, loss=1.0 / i, learning_rate=1e-3) for i in (1, 2)]
        (folder / run / HISTORY).write_text("".join(json.dumps(s) + "\n" for s in steps))
    return folder / run


SEEDS = """
name = "x"
[fixed]
task = "boolq"
[axes]
method = ["lora", "dora"]
seed = [0, 1, 2]
"""


@pytest.fixture
def six(tmp_path):
    "The finished runs of a grid, and its file."
    grid = tmp_path / "grid.toml"
    grid.write_text(SEEDS)
    rng = np.random.default_rng(0)
    for config in load_grid(grid).configs:
        run_dir(tmp_path / "runs", config, rng.random(40) < 0.7)
    return tmp_path / "runs", grid


def dirs(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir())


# --- nothing is lost


FOREIGN = "# My own page\n"


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("name", ("report.md", ALL_PREDICTIONS, "learning-curves.png", "accuracy-x-y.png", RESULTS))
def test_a_report_writes_over_nothing_of_somebody_else_s(six, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(FOREIGN)
    with pytest.raises(ValueError, match=name.replace(".", "\\.")):
        collect(six[0], out)
    assert {p.name: p.read_text() for p in out.iterdir()} == {name: FOREIGN}


@pytest.mark.attack("data loss")
def test_a_page_of_somebody_else_s_is_not_rendered_over(six, tmp_path):
    collect(six[0], tmp_path / "out")
    (tmp_path / "out" / "report.md").write_text(FOREIGN)
    with pytest.raises(ValueError, match="report.md exists, and this command did not write it"):
        render(tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == FOREIGN
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_section_is_one_function_and_one_entry(six, tmp_path):
    runs, grid = six
    collect(runs, tmp_path / "report", grid)
    own = lambda page: ["## Count\n", f"{len(page.found.results)} runs\n"]
    SECTIONS.insert(1, own)
    try:
        page = render(tmp_path / "report").read_text(encoding="utf-8")
    finally:
        SECTIONS.remove(own)
    assert page.index("\n## Count\n\n6 runs\n") < page.index("## Accuracy")


@pytest.mark.attack("data loss")
def test_an_overview_is_not_written_over_a_readme(six, tmp_path):
    "As `dora-nb report .` would in the root of a clone; nor is one made where there are no reports."
    root = tmp_path / "clone"
    collect(six[0], root / "reports" / "x")
    (root / "README.md").write_text(FOREIGN)
    for check in (check_overview, overview):
        with pytest.raises(ValueError, match="README.md exists, and this command did not write it"):
            check(root)
        with pytest.raises(ValueError, match="holds no reports"):
            check(root / "reports" / "x")
    assert (root / "README.md").read_text() == FOREIGN
    assert not (root / "reports" / "x" / "README.md").exists()
    assert MADE.search(overview(root / "reports").read_text(encoding="utf-8"))
    overview(root / "reports")  # over its own


def test_pages_with_a_plain_marker_are_written_over(six, tmp_path, capsys):
    "They have no checksum, and count as unedited."
    collect(six[0], tmp_path / "out")
    page = render(tmp_path / "out")
    first = page.read_text(encoding="utf-8")
    page.write_text("old " + re.sub(", sha256 .*(?= -->)", "", first), encoding="utf-8")
    assert render(tmp_path / "out").read_text(encoding="utf-8") == first
    (tmp_path / "out" / "grid.toml").write_text(SEEDS)  # a user's file beside it disturbs nobody
    render(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.edited*")) and "edited" not in capsys.readouterr().err


@pytest.mark.attack("data loss")
@pytest.mark.parametrize(
    "words",
    (
        'Our fork. The upstream README says: "This page is made by `make report`."\n',
        "Made from the JSON and parquet files in this folder; and by me.\n",
        "<!-- made by dora-nb report -->\n\nThe line above is quoted.\n",
        "<!-- made by dora-nb report, sha256 0123 -->\n",
    ),
)
def test_a_page_that_quotes_ours_is_not_written_over(six, tmp_path, words):
    out, root = tmp_path / "reports" / "x", tmp_path / "reports"
    collect(six[0], out)
    for path, make in ((out / "report.md", lambda: render(out)), (root / "README.md", lambda: overview(root))):
        path.write_text(words)
        with pytest.raises(ValueError, match=f"{path.name} exists, and this command did not write it"):
            make()
        assert path.read_text() == words


@pytest.mark.attack("data loss")
def test_an_edited_page_is_kept(six, tmp_path, capsys):
    "Every time; an untouched one, whatever its line ends, is not."
    out = tmp_path / "reports" / "x"
    collect(six[0], out)
    page = render(out)
    text = page.read_text(encoding="utf-8")
    page.write_bytes(text.replace("\n", "\r\n").encode())
    render(out)
    assert [p.name for p in out.glob("*.md")] == ["report.md"]
    for name in ("report.edited.md", "report.edited-2.md"):
        page.write_text(edited := text.replace("## Cost", f"My note {name}.\n\n## Cost"), encoding="utf-8")
        assert render(out).read_text(encoding="utf-8") == text
        assert (out / name).read_text(encoding="utf-8") == edited
        assert f"report.md was edited by hand; the edited page is kept as {name}" in capsys.readouterr().err
    readme = overview(out.parent)
    readme.write_text(edited := "My note.\n" + readme.read_text(encoding="utf-8"), encoding="utf-8")
    assert "My note" not in overview(out.parent).read_text(encoding="utf-8")
    assert (out.parent / "README.edited.md").read_text(encoding="utf-8") == edited


@pytest.mark.attack("data loss")
def test_runs_that_the_grid_no_longer_has_are_kept(six, tmp_path):
    "Seeds cut from three to one, and back."
    (runs, grid), out = six, tmp_path / "out"
    collect(runs, out, grid)
    before = read_report(out)
    grid.write_text(SEEDS.replace("[0, 1, 2]", "[0]"))
    assert len(collect(runs, out, grid)) == 2
    shutil.rmtree(runs)  # the report is the only copy
    runs.mkdir()
    assert len(collect(runs, out, grid)) == 2
    found = read_report(out)
    assert (
        len(found.results) == 2
        and len(found.others) == 4
        and set(found.predictions.run) == {r["run"] for r in found.results}
    )
    for name in (ALL_PREDICTIONS, ALL_HISTORY):
        assert pd.read_parquet(out / name).run.nunique() == 6
    page = render(out).read_text(encoding="utf-8")
    table, apart = page.split("## Stored here, not of this grid")
    for r in found.others:
        assert f"| {r['run']} | seed {r['params']['seed']} " in re.sub(" +", " ", apart) and r["run"] not in table
    assert "2 of" not in table and "LoRA, rank 16" in table
    grid.write_text(SEEDS)
    assert len(collect(runs, out, grid)) == 6
    after = read_report(out)
    assert not after.others and len(after.predictions) == len(before.predictions)
    assert "Stored here" not in render(out).read_text(encoding="utf-8")


@pytest.mark.attack("data loss")
def test_results_of_another_version_are_kept(six, tmp_path):
    "Their runs had other names; one new run is made."
    (runs, grid), out = six, tmp_path / "out"
    for folder in dirs(runs):
        result = json.loads((folder / RESULT).read_text())
        (folder / RESULT).write_text(json.dumps(result | {"run": f"old-{folder.name}"}))
        folder.rename(runs / f"old-{folder.name}")
    collect(runs, out)
    run_dir(tmp_path / "new", load_grid(grid).configs[0], [1] * 20 + [0] * 20)
    assert len(collect(tmp_path / "new", out, grid)) == 1
    found = read_report(out)
    assert len(found.others) == 6 and pd.read_parquet(out / ALL_PREDICTIONS).run.nunique() == 7
    assert "| old-" in render(out).read_text(encoding="utf-8")


@pytest.mark.attack("data loss")
def test_a_report_without_runs_of_the_grid_stays_as_it_is(tmp_path, capsys):
    "As after an update of the package, when nothing was run yet."
    kept = shutil.copytree(QUICK, tmp_path / "quick")
    (tmp_path / "grid.toml").write_text(SEEDS)
    (tmp_path / "runs").mkdir()
    before = {p.name: p.read_bytes() for p in kept.iterdir() if p.name != ".lock"}
    assert len(collect(tmp_path / "runs", kept, tmp_path / "grid.toml")) == 9
    assert "no finished run of this grid" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in kept.iterdir() if p.name != ".lock"} == before


def test_what_an_earlier_report_fills_in_is_said(six, tmp_path, capsys):
    "Runs that are not in the folder, and that failed there."
    (runs, grid), out = six, tmp_path / "out"
    collect(runs, out, grid)
    failed = dirs(runs)[0]
    (failed / RESULT).unlink()
    (failed / "error.json").write_text('{"error": "Diverged: step 2", "traceback": ""}')
    assert len(collect(runs, out, grid)) == 6 and not read_report(out).problems
    said = capsys.readouterr().err
    assert f"1 runs are not in {runs}" in said and f"of these {failed.name} failed in" in said


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("moves", range(5))
def test_a_writer_that_is_killed_loses_nothing(six, tmp_path, monkeypatch, moves):
    "Between any two of its files: a reader has the old ones or the new ones, whole."
    (runs, grid), out, replace = six, tmp_path / "out", os.replace
    collect(runs, out, grid)
    old = read_report(out)
    left = [moves]

    def die(source, target):
        if ".dora-nb-next" in str(source) and ".dora-nb-next" not in str(target):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return replace(source, target)

    folder = dirs(runs)[0]
    table = pd.read_parquet(folder / PREDICTIONS)
    table.assign(loglikelihood=[[0.0, 0.0]] * len(table)).to_parquet(folder / PREDICTIONS)
    monkeypatch.setattr(stored.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        collect(runs, out, grid)
    monkeypatch.setattr(stored.os, "replace", replace)
    monkeypatch.setattr(stored, "PATIENCE", 0.1)
    found = read_report(out)
    assert len(found.results) == 6 and len(found.predictions) == len(old.predictions)
    assert sha256(out / ALL_PREDICTIONS) == json.loads((out / RESULTS).read_text())["files"][ALL_PREDICTIONS]
    assert len(collect(runs, out, grid)) == 6 and not (out / ".dora-nb-next").exists()


# --- files that are not what they were


def damage(folder, other, how):
    "Change a finished run's files."
    table, own = pd.read_parquet(folder / PREDICTIONS), folder / PREDICTIONS
    result = json.loads((folder / RESULT).read_text())
    write = lambda **changes: (folder / RESULT).write_text(json.dumps(result | changes))
    if how == "another run's":
        shutil.copy(other / PREDICTIONS, own)
    elif how == "an item less":
        table[1:].to_parquet(own)
    elif how == "an item twice":
        pd.concat([table[1:], table[1:2]]).to_parquet(own)
    elif how == "another item":
        table.assign(doc_index=[99, *range(1, len(table))]).to_parquet(own)
    elif how == "another right answer":
        table.assign(gold=1 - table.gold, pred=1 - table.pred).to_parquet(own)
    elif how == "a column less":
        table.drop(columns="gold").to_parquet(own)
    elif how == "an item without a right answer":
        table.assign(gold=table.gold.where(table.doc_index > 0)).to_parquet(own)
    elif how == "no parquet":
        own.write_bytes(own.read_bytes()[:100])
    elif how == "another checksum":
        write(files={PREDICTIONS: "0" * 64})
    elif how == "a missing file":
        write(files={GEOMETRY: "0" * 64})
    elif how in ("timings", "machine", "training", "precision", "peak_memory_bytes", "versions"):
        (folder / RESULT).write_text(json.dumps({k: v for k, v in result.items() if k != how}))
    elif how == "machine []":
        write(machine=[])
    elif how == "rank 'x'":
        write(params=result["params"] | {"rank": "x"})
    elif how == "no Unicode":
        write(versions={"x": "\ud800"})
    elif how == "history":
        lines = (folder / HISTORY).read_text()
        (folder / HISTORY).write_text(lines[10:])
    elif how == "a list":
        (folder / HISTORY).write_text("[1]\n")
    elif how == "not text":
        (folder / HISTORY).write_bytes(b"\xff\xfe\n")
    elif how in (GEOMETRY, CURVATURE):
        write(params=result["params"] | {"geometry": 2, "probe": True})
        (folder / how).write_text('{"points": [{"step": 1')
    elif how in (f"{GEOMETRY} 2", f"{CURVATURE} 2"):
        write(params=result["params"] | {"geometry": 2, "probe": True})
        (folder / how[:-2]).write_text('{"points": [{"step": 1, "steps": 2, "weights": [{"weight": "w"}]}]}')
    elif how == "a folder":
        own.unlink()
        own.mkdir()


SILENT = ("another run's", "an item less", "an item twice", "another item", "another right answer")
SILENT += ("an item without a right answer", "another checksum", "a missing file")
HOSTILE = (
    "a column less",
    "no parquet",
    "machine",
    "training",
    "precision",
    "peak_memory_bytes",
    "versions",
    "machine []",
)
HOSTILE += (
    "rank 'x'",
    "history",
    "a list",
    "not text",
    "no Unicode",
    GEOMETRY,
    CURVATURE,
    f"{GEOMETRY} 2",
    f"{CURVATURE} 2",
    "a folder",
)


@pytest.mark.parametrize(
    "how",
    [pytest.param(h, marks=pytest.mark.attack("silent error")) for h in SILENT]
    + [pytest.param(h, marks=pytest.mark.attack("hostile input")) for h in HOSTILE],
)
def test_a_run_whose_files_do_not_belong_together_is_named(six, tmp_path, how):
    "And left out; the rest is reported. A report that has the run already keeps its own copy."
    (runs, grid), out = six, tmp_path / "out"
    collect(runs, tmp_path / "good", grid)
    folder, other, *_ = dirs(runs)
    damage(folder, other, how)
    assert len(collect(runs, out, grid)) == 5
    (problem,) = read_report(out).problems
    assert problem.startswith(f"{folder.name}: ") and str(tmp_path) not in problem, problem
    beside = how in ("history", "a list", "not text") or how.startswith((GEOMETRY, CURVATURE))
    advice = "; bring the right file back, or move this one away" if beside else "to (make the run|run) again"
    assert re.search(advice, problem) and beside != ("delete" in problem)
    page = render(out).read_text(encoding="utf-8")
    assert f"**1 runs of this grid are missing:** {folder.name}" in page and "(2 of 3 seeds)" in page
    assert len(collect(runs, tmp_path / "good", grid)) == 6 and not read_report(tmp_path / "good").problems


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("schema", (1, 2))
@pytest.mark.parametrize("name", (CURVATURE, GEOMETRY))
def test_a_file_that_a_run_did_not_write_does_not_cost_the_run(six, tmp_path, capsys, name, schema):
    "Nor is it read: a probe's file once came into a run's folder, and the advice was to delete the run's result."
    (runs, grid), out = six, tmp_path / "out"
    folder = dirs(runs)[0]
    if schema == 2:
        result = json.loads((folder / RESULT).read_text())
        files = {p: sha256(folder / p) for p in (PREDICTIONS, HISTORY)}
        (folder / RESULT).write_text(json.dumps(result | dict(schema=2, files=files)))
    (folder / name).write_text('{"schema": 2, "params": {}, "blocks": {}}')
    assert len(collect(runs, out, grid)) == 6
    said = capsys.readouterr().err
    assert f"{folder.name}: this run did not write the {name} in its folder; the file is left out" in said
    found = read_report(out)
    assert not found.problems and not any(found.probes.values()) and not len(found.geometry)
    assert folder.name in set(found.history.run)


@pytest.mark.attack("crash")
def test_a_history_whose_last_line_is_cut_off(six, tmp_path, capsys):
    (runs, grid), out = six, tmp_path / "out"
    path = dirs(runs)[0] / HISTORY
    path.write_text(path.read_text()[:-20])
    assert len(collect(runs, out, grid)) == 6 and len(read_report(out).history) == 11
    assert f"{path.parent.name}: the last line of {HISTORY} is incomplete" in capsys.readouterr().err


@pytest.mark.attack("silent error")
def test_two_folders_that_hold_one_run(six, tmp_path):
    runs, _ = six
    shutil.copytree(dirs(runs)[0], runs / "copy")
    assert len(collect(runs, tmp_path / "out")) == 6
    (problem,) = read_report(tmp_path / "out").problems
    assert "another folder holds too" in problem


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", (ALL_PREDICTIONS, ALL_HISTORY, ALL_GEOMETRY, ALL_CURVATURE))
def test_a_stored_file_of_another_report_is_named(tmp_path, monkeypatch, name):
    page = shutil.copytree(QUICK, tmp_path / "page")
    monkeypatch.setattr(stored, "PATIENCE", 0.1)
    if name == ALL_CURVATURE:
        (page / name).write_text("{}")
    else:
        shutil.copy(QUICK.parent / "geometry" / "medium" / name, page / name)
    for read in (read_report, render):
        with pytest.raises(ValueError, match=f"{name} does not belong to the results.json beside it"):
            read(page)


@pytest.mark.attack("silent error")
def test_answers_of_another_run_in_a_report_of_the_first_edition(tmp_path, monkeypatch):
    "It has no checksums; that the answers give another accuracy is seen all the same."
    page = shutil.copytree(QUICK, tmp_path / "page")
    monkeypatch.setattr(stored, "PATIENCE", 0.1)
    about = json.loads((page / RESULTS).read_text())
    (page / RESULTS).write_text(json.dumps({k: v for k, v in about.items() if k != "files"}))
    read_report(page)
    table = pd.read_parquet(page / ALL_PREDICTIONS)
    one, two = (table.run[table.run.str.startswith(f"boolq-{m}")].iloc[0] for m in ("lora", "dora"))
    other = table[table.run == one].assign(run=two, pred=1 - table.pred)
    pd.concat([table[table.run != two], other]).to_parquet(page / ALL_PREDICTIONS)
    with pytest.raises(ValueError, match=f"{two}: acc recomputed from the answers differs"):
        read_report(page)


@pytest.mark.attack("silent error")
def test_a_report_that_is_being_written_is_read_whole(tmp_path, monkeypatch):
    "The reader finds new answers beside old results, looks again, and has one writing."
    page, new = (shutil.copytree(QUICK, tmp_path / name) for name in ("page", "new"))
    table = pd.read_parquet(new / ALL_PREDICTIONS)
    table.assign(loglikelihood=[[0.0, 0.0]] * len(table)).to_parquet(new / ALL_PREDICTIONS)
    about = json.loads((new / RESULTS).read_text())
    about["files"][ALL_PREDICTIONS] = sha256(new / ALL_PREDICTIONS)
    shutil.copy(new / ALL_PREDICTIONS, page)  # and the writer is about to replace the results
    monkeypatch.setattr(stored.time, "sleep", lambda _: (page / RESULTS).write_text(json.dumps(about)))
    assert read_report(page).predictions.loglikelihood.map(max).eq(0).all()


@pytest.mark.attack("silent error")
def test_a_comparison_of_different_items_says_so():
    runs = [result("lora", n=6), result("dora", n=8)]
    right = [answers("boolq-lora-0", [1] * 6), answers("boolq-dora-0", [1] * 8)]
    row = compare(runs, pd.concat(right)).iloc[0].to_dict()
    assert (row["n"], row["others"]) == (6, 2)
    assert "on 6 items (those evaluated on both sides; 2 were evaluated on one side only)" in verdict(row)
    right[1] = right[1].assign(doc_index=right[1].doc_index + 6)
    with pytest.raises(ValueError, match="have no item in common"):
        compare(runs, pd.concat(right))
    seeds = [result("lora", 0), result("lora", 1)]
    frames = [answers("boolq-lora-0", [1] * 10), answers("boolq-lora-1", [1] * 10).assign(doc_index=range(1, 11))]
    with pytest.raises(ValueError, match="was not evaluated on the same items"):
        accuracies(seeds, pd.concat(frames))


# --- intervals at the edge


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("n,wrong", [(1, 0), (2, 0), (2, 2), (10, 1), (50, 0), (50, 50), (100, 1), (100, 99)])
def test_an_interval_at_the_edge_is_not_narrower_than_its_items_allow(n, wrong):
    "The same items wrong under three seeds say as much as under one: Clopper and Pearson's interval."
    right = np.ones((3, n))
    right[:, :wrong] = 0
    results = [result("lora", s, acc=1 - wrong / n, n=n) for s in range(3)]
    row = accuracies(results, pd.concat(answers(r["run"], right[0]) for r in results)).iloc[0]
    exact = stats.binomtest(n - wrong, n).proportion_ci(0.95, "exact")
    assert row.low <= exact.low + 1e-9 and row.high >= exact.high - 1e-9
    assert 0 <= row.low <= row.share <= row.high <= 1
    if wrong in (0, n):
        assert (row.low, row.high) == pytest.approx((exact.low, exact.high))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("seeds", (2, 3, 5))
@pytest.mark.parametrize("level,spread", [(4.0, 2.0), (6.0, 2.0), (80.0, 50.0)])
def test_intervals_near_the_edge_hold_what_they_say(seeds, level, spread):
    "Items of different difficulty, some of which every seed gets wrong (all of them in the last case); seen from both ends."
    rng, n, hits = np.random.default_rng(seeds), 60, []
    right_in = lambda *size: 1 / (1 + np.exp(-level - spread * rng.normal(size=size)))
    truth = right_in(200_000).mean()
    for _ in range(400):
        right = (rng.random((seeds, n)) < right_in(n)).astype(float)
        low, high = share_interval(right)
        hits.append(low <= truth <= high)
        assert share_interval(1 - right) == pytest.approx((1 - high, 1 - low))
    assert np.mean(hits) >= 0.93


def test_intervals_elsewhere_are_as_they_were():
    rng = np.random.default_rng(0)
    right = (rng.random((3, 400)) < 0.6).astype(float)
    assert share_interval(right) == mean_interval(right)[:2]


# --- rows of runs that were not made alike


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "change,said",
    [
        (dict(precision=dict(precision="tf32", eval_precision="float32")), "training in float32 and tf32"),
        (dict(precision=dict(precision="float32", eval_precision="tf32")), "evaluation in float32 and tf32"),
        (dict(machine=dict(cpu="c", gpu="g", threads=1)), "on a CPU and a GPU"),
        (dict(versions=dict(dora_nb="0.2.0")), "dora_nb 0.1.0 and 0.2.0"),
        (dict(revision="abc-dirty"), "revision abc and abc-dirty"),
        (dict(revision=None), "revision abc and unknown"),
    ],
)
def test_a_cell_of_seeds_that_were_not_made_alike_is_marked(six, tmp_path, change, said):
    (runs, grid), out = six, tmp_path / "out"
    folder = next(p for p in dirs(runs) if "-lora-" in p.name)
    path = folder / RESULT
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    collect(runs, out, grid)
    lines = render(out).read_text(encoding="utf-8").splitlines()
    lora, dora = (next(x for x in lines if x.startswith(f"| {m}, rank 16")) for m in ("LoRA", "DoRA"))
    assert lora.count("†") == 2 and "†" not in dora  # accuracy and AUC
    assert f"† The seeds of such a cell ran under different conditions: {said}." in lines
    found = read_report(out)
    assert not mixed_note(accuracies(found.results[:1], found.predictions))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "changes,cut",
    [
        (dict(task="winogrande"), "items"),
        (dict(task="boolq", mixture="boolq, winogrande"), "items"),
        (dict(task="winogrande", method="base", eval_split="dev"), "items"),
        (dict(task="winogrande", method="base"), "twins"),
        (dict(task="winogrande", mixture="arc_easy,openbookqa"), "twins"),
        (dict(task="winogrande", mixture="boolq,piqa"), "items"),
        (dict(task="boolq"), "items"),
        (dict(task="social_iqa", method="base", eval_split="dev"), "items"),
        (dict(task="arc_easy", eval_split="dev"), "twins"),
    ],
)
def test_how_dev_was_cut_in_results_that_do_not_say(changes, cut):
    params = {k: v for k, v in asdict(RunConfig(**dict(method="lora") | changes)).items() if k != "dev_cut"}
    assert parameters({"params": params})["dev_cut"] == cut
    assert parameters({"params": params | {"dev_cut": "items"}})["dev_cut"] == cut


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "task,given,cut",
    [
        ("winogrande", "twins", "twins"),
        ("winogrande", "groups", "twins"),  # the same items
        ("social_iqa", "twins", "items"),  # which other tasks' runs were cut by
        ("social_iqa", "groups", "groups"),
    ],
)
def test_runs_say_how_dev_was_cut_and_not_what_they_were_given(task, given, cut):
    r = result("lora", 0, task=task)
    r = r | {"params": r["params"] | {"dev_cut": given, "eval_split": "dev"}}
    assert parameters(r)["dev_cut"] == cut
    words = "items" if cut == "items" else "groups"
    assert _dev_cuts([parameters(r)]) == f"; {TASKS[task].label}: dev cut by {words}"


def normed(task, seed=0, method="lora", right=(3, 7), **params):
    "A result and ten answers, of which so many are right by sums and per character."
    r = result(method, seed, right[0] / 10, task=task, **params)
    r["metrics"] |= {"acc_norm": right[1] / 10}
    rights = [[int(i < n) for i in range(10)] for n in right]
    return r, answers(r["run"], rights[0]).assign(pred_norm=rights[1])


@pytest.mark.parametrize("metric,expected", [("", (0.7, 0.3)), ("acc", (0.3, 0.3)), ("acc_norm", (0.7, 0.7))])
def test_a_page_judges_each_task_by_its_headline_metric(metric, expected):
    each = [normed(task, seed) for task in ("hellaswag", "boolq") for seed in (0, 1)]
    found = NO_RESULTS._replace(results=[r for r, _ in each], predictions=pd.concat([a for _, a in each]))
    by = judged(found, metric)
    table = accuracies(by.results, by.predictions).set_index("task")
    assert (table.share["hellaswag"], table.share["boolq"]) == pytest.approx(expected)
    for task, share in zip(("hellaswag", "boolq"), expected):  # intervals read the answers
        assert table.low[task] < share < table.high[task]
        right = rights([r["run"] for r, _ in each if r["params"]["task"] == task], by.predictions)
        assert right.to_numpy(float).mean() == pytest.approx(share)
    assert (
        found.results[0]["metrics"]["acc"] == 0.3 and found.predictions.pred.sum() == 12
    )  # nothing is changed in place
    assert (by is found) == (metric == "acc")


def test_generated_answers_are_judged_by_acc():
    r, a = normed("hellaswag")
    del r["metrics"]["acc_norm"]
    found = NO_RESULTS._replace(results=[r], predictions=a.drop(columns="pred_norm"))
    assert judged(found) is found and judged(found, "acc_norm") is found


def test_comparisons_and_tables_are_of_the_headline_metric(tmp_path):
    each = [
        normed("hellaswag", 0, "lora", (5, 4)),
        normed("hellaswag", 0, "dora", (3, 8)),
        normed("boolq", 0),
        normed("boolq", 0, "dora"),
    ]
    found = NO_RESULTS._replace(results=[r for r, _ in each], predictions=pd.concat([a for _, a in each]))
    rows = {r["task"]: r for r in Page(tmp_path, found).compared[0]}
    assert (rows["hellaswag"]["acc_a"], rows["hellaswag"]["acc_b"]) == (0.4, 0.8) and rows["boolq"]["acc_a"] == 0.3
    assert rows["hellaswag"]["place"] == "HellaSwag by acc_norm" and rows["boolq"]["place"] == "BoolQ"
    protocols = {"contrasts": [{"a": {"protocol": "loglikelihood"}, "b": {"protocol": "generate"}}]}
    assert Page(tmp_path, found, protocols).compared == ([], [])
    plain = {r["task"]: r for r in Page(tmp_path, found, {"metric": "acc"}).compared[0]}
    assert (plain["hellaswag"]["acc_a"], plain["hellaswag"]["acc_b"]) == (0.5, 0.3)
    assert plain["hellaswag"]["place"] == "HellaSwag"
    for spec, first, words, second in (
        ({}, "80.0", "The same by summed log-likelihood (acc):", "30.0"),
        ({"metric": "acc"}, "30.0", "The same by length-normalised log-likelihood (acc_norm)", "80.0"),
    ):
        text = "\n".join(accuracy_section(Page(tmp_path, found, spec)))
        head, rest = text.split(words)
        dora = lambda part: next(line for line in part.splitlines() if line.startswith("| DoRA"))
        assert first in dora(head) and second in dora(rest)
        assert ("HellaSwag by length-normalised" in head) == (not spec)


def test_a_contrast_without_a_claim_is_shown_and_not_tested(tmp_path):
    each = [(result(m, 0, rank=r), f"{m}-{r}") for m in ("lora", "dora") for r in (4, 16)]
    each = [(made | {"run": name}, answers(name, [0] * 30 if name == "lora-4" else [1] * 30)) for made, name in each]
    found = NO_RESULTS._replace(results=[r for r, _ in each], predictions=pd.concat([a for _, a in each]))
    methods = {"a": {"method": "lora"}, "b": {"method": "dora"}}
    ranks = {"a": {"rank": 4}, "b": {"rank": 16}}
    page = lambda *contrasts: Page(tmp_path, found, {"contrasts": contrasts})
    both, one = page(methods, ranks), page(methods, ranks | {"claim": False})
    at_4 = lambda page: next(r for r in page.compared[0] if r["contrast"] == 0 and r["rank"] == 4)
    assert at_4(both)["p"] == at_4(one)["p"] < 1e-6
    assert at_4(both)["p_holm"] == pytest.approx(4 * at_4(both)["p"])
    assert at_4(one)["p_holm"] == pytest.approx(2 * at_4(one)["p"])  # two comparisons claim
    shown = next(r for r in one.compared[0] if r["contrast"] == 1 and r["method"] == "lora")
    assert shown["difference"] == 1 and not clear(shown) and conclusion(shown) == "not tested"
    text = "\n".join(comparison_section(one))
    assert text.count("not tested. Both give") == 2 and text.count("No claim is made.") == 2
    assert "**Not tested**" in text and "**Not tested**" not in "\n".join(comparison_section(both))
    assert "Not tested: 2 comparisons, about which no claim is made." in "\n".join(_measured(one))
    assert "Tested: 2 comparisons;" in "\n".join(_measured(one))


def test_runs_with_dev_cut_in_two_ways_are_not_averaged():
    old, new = result("lora", 0, task="winogrande"), result("lora", 1, task="winogrande")
    params = {k: v for k, v in old["params"].items() if k != "dev_cut"}
    runs = [old | {"params": params}, new | {"params": new["params"] | {"dev_cut": "twins"}}]
    table = accuracies(runs, pd.concat([answers(r["run"], [1, 0]) for r in runs]))
    assert list(table.seeds) == [1, 1] and table.label.str.contains("dev cut by items").sum() == 1


# --- strings of somebody else's


EVIL = "a|b\n\n# c <script>alert(1)</script> `d` $\\frac$ $x$ [e](javascript:f) ![g](h) &lt; _i_ **j** \\| \u2028k"


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "text", [EVIL, "\ud800", *"|<>&`$\\*_~[]!#", "a\\|b", "``", "<!-- x", "x](y)", "_a_b_", "&amp;", "a\rb"]
)
def test_any_string_is_shown_as_it_is(text):
    md = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = re.sub(r"[^\x20-\x7e]", " ", text)  # line breaks and what cannot be seen
    plain = lambda html: (
        re.sub("<[^>]*>", "", html)
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", '"')
        .replace("&amp;", "&")
    )
    page = md.render(f"| x {markdown_text(text)} y | z |\n|---|---|\n| x {markdown_text(text)} y | w |\n")
    assert (
        page.count("<th>") == page.count("<td>") == 2
        and "<script" not in page
        and "<a" not in page
        and "<img" not in page
    )
    for row in re.findall(r"<t[hd]>(x.*?)</t[hd]>", page):
        assert " ".join(plain(row).split()) == " ".join(f"x {shown} y".split())
    assert "<script" not in md.render(markdown_code(text))
    fig, ax = plt.subplots()
    ax.plot([0, 1], label=figure_text(text))
    ax.set_title(figure_text(text.replace("\ud800", "")))
    ax.legend()
    fig.tight_layout()
    fig.canvas.draw()
    plt.close(fig)


@pytest.mark.attack("hostile input")
def test_a_page_of_hostile_strings(six, tmp_path):
    "In the model, the task, the method, the protocol, the split, problems, probes, the grid's words and its name."
    (runs, _), out = six, tmp_path / "evil `<b>`" / "report <i>"
    for i, folder in enumerate(dirs(runs)):
        made = json.loads((folder / RESULT).read_text())
        made["params"] |= dict(
            model=EVIL + "-1.2.3", task=EVIL, protocol="../../" + EVIL[:4], seed=0, compress=f"{i}|x"
        )
        made["params"]["method"] = "_" + EVIL if i == 0 else made["params"]["method"]
        made["params"]["objective"] = f"{EVIL}{i}"
        made["machine"]["cpu"], made["versions"][EVIL] = EVIL, EVIL
        (folder / RESULT).write_text(json.dumps(made))
        (folder / CURVATURE).write_text(json.dumps({"points": [{"step": 1, "error": EVIL}]}))
    collect(runs, out)
    about = json.loads((out / RESULTS).read_text())
    (out / RESULTS).write_text(json.dumps(about | {"problems": [f"{EVIL}: {EVIL}"]}))
    spec = json.dumps(f"A {EVIL[:36]}")
    (out / "grid.toml").write_text(
        f'{SEEDS}[report]\ntitle = {spec}\nquestion = {spec}\nclaim = {spec}\nanswer = {spec}\nverdict = {spec}\ndoubts = [{spec}]\nagainst = "model"\n'
    )
    page = render(out).read_text(encoding="utf-8")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(MADE.sub("", page))
    assert "<script" not in html and not re.search(r"<(b|i|a)>|javascript:f\"", html)
    assert re.sub("`[^`\n]*`", "", page).count("<") == len(MADE.findall(page)) == 1
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        columns = table.count("<th>") + table.count("<th ")
        assert all(r.count("<td") == columns for r in re.findall(r"<tr>(?:(?!<th).)*?</tr>", table, re.S))
    assert {p.parent for p in tmp_path.rglob("*.png")} == {out} and all(
        p.stat().st_size > 1000 for p in out.glob("*.png")
    )
    text = overview(out.parent).read_text(encoding="utf-8")
    assert "<" not in MADE.sub("", text) and "report%20%3Ci%3E/report.md" in text


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("name", ("model-1.2.3", "model-", "-", "model-8", "a-1.", "²-²", None, ["x"], True, 3))
def test_any_value_has_a_place_and_a_label(name):
    assert sorted([in_order(name), in_order("rtn-4"), in_order(None), in_order(2.0)])
    assert isinstance(value_label("model", name), str)


@pytest.mark.attack("crash")
def test_methods_and_tasks_of_another_version_have_plain_labels(six, tmp_path):
    runs, _ = six
    for folder in dirs(runs):
        made = json.loads((folder / RESULT).read_text())
        made["params"] |= dict(task="mmlu", method={"lora": "vera", "dora": "dora"}[made["params"]["method"]], twist=2)
        (folder / RESULT).write_text(json.dumps(made))
    collect(runs, tmp_path / "out")
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    assert "mmlu (n = 40)" in page and "| vera " in page and "| DoRA, rank 16 " in page


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "words,named",
    [
        ('klaim = "x"', "report.klaim is unknown"),
        ("title = 3", "report.title is of the wrong type"),
        ("contrasts = [3]", "a contrast is a table with a and b"),
        ("contrasts = [{ a = {}, b = {} }]", "a contrast is a table with a and b"),
        (
            "contrasts = [{ a = { rank = 4 }, b = { rank = 8 }, claim = 0 }]",
            "claim of a contrast is true or false, not 0",
        ),
        ("contrasts = [{ a = { ranc = 4 }, b = { rank = 8 } }]", "did you mean 'rank'"),
        ('contrasts = [{ a = { rank = "4" }, b = { rank = 8 } }]', "rank='4' is of type str"),
        ('contrasts = [{ a = { method = "lorra" }, b = { method = "dora" } }]', "method='lorra' does not exist"),
        ('against = "learning_rat"', "report.against is 'learning_rat'"),
        ('metric = "accuracy"', "report.metric is 'accuracy'"),
        ("changes_from = { rank = 4 }", "changes_from is a table"),
        ("changes_from = { ranc = 4 }", "changes_from is a table"),
        ("verdict = { medium = 3 }", "report.verdict is a text"),
        ('claim = "DoRA wins"', "report.answer is missing"),
        ("answer = { medium = 3 }", "report.answer is a text"),
        (f'answer = "{"word " * 26}"', "report.answer has 26 words, and may have 25"),
        (f'answer = {{ medium = "yes", large = "{"word " * 26}" }}', "report.answer has 26 words"),
        ("equal_rates_from = [3]", "report.equal_rates_from is a list of reports"),
        ('doubts = ["x", 3]', "report.doubts is a list of texts"),
        ('doubts = { medium = "x" }', "report.doubts is a list of texts"),
        ('plan = { metric = "x" }', "report.plan.comparison is missing"),
        ('plan = { metrics = "x" }', "report.plan.metrics is unknown; did you mean 'metric'"),
        ('metric = "accuracy"', "report.metric is 'accuracy'"),
    ],
)
def test_a_wrong_page_is_refused_before_anything_is_made(six, tmp_path, words, named):
    (runs, grid), out = six, tmp_path / "out"
    grid.write_text(f"{SEEDS}[report]\n{words}\n")
    with pytest.raises(ValueError, match=named) as e:
        check_page(load_grid(grid), grid)
    assert "grid.toml" in str(e.value)
    with pytest.raises(ValueError, match=named):
        collect(runs, out, grid)
    assert not out.exists()


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "name,words,said",
    [
        ("grid.toml", "scale = 1.5", "scale must be of type dict, not float"),
        ("grid.toml", "scale = ", "not TOML"),
        ("grid.toml", f"a = {'[' * 5000}", "not TOML"),
        ("grid.toml", f"a = {'9' * 5000}", "not TOML"),
        ("grid.toml", "[scale.out]\nfixed = 3", "scale.out: fixed must be of type dict, not int"),
        ("out.toml", "rows = 3", "unknown key 'rows'"),
        ("out/grid.toml", "rows = 3", "unknown key 'rows'"),
        ("out/grid.toml", "report = 5", "report must be of type dict, not int"),
        ("out/grid.toml", SEEDS + "[report]\ntitle = 5", "report.title is of the wrong type"),
    ],
)
def test_a_grid_file_that_no_page_can_be_made_of_is_named_before_anything_is_stored(six, tmp_path, name, words, said):
    file = tmp_path / "reports" / name
    file.parent.mkdir(parents=True)
    file.write_text(words if "name" in words else f'name = "x"\n{words}\n')
    before = sorted((tmp_path / "reports").rglob("*"))
    with pytest.raises(ValueError) as e:
        collect(six[0], tmp_path / "reports" / "out", six[1])
    assert str(e.value).startswith(f"{file}: ") and said in str(e.value) and "\n" not in str(e.value)
    assert sorted((tmp_path / "reports").rglob("*")) == before


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "words,said",
    [
        ("report = 5", "report must be of type dict"),
        ('report = "a claim"', "report must be of type dict"),
        ('report = { claim = "c", answer = "x", number = "7" }', "report.number is of the wrong type"),
        ("report = { claim = 5 }", "report.claim is of the wrong type"),
        ('report = { claim = "c", title = 5 }', "report.title is of the wrong type"),
        ("rows = 3", "unknown key 'rows'"),
    ],
)
def test_an_overview_names_a_wrong_grid_before_anything_is_made(tmp_path, words, said):
    grid = 'name = "x"\n{}\nfixed = {{ task = "boolq" }}\n'
    for name, own in (("a", 'report = { claim = "b", answer = "x", number = 7 }'), ("b", words)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grid.toml").write_text(grid.format(own))
    for check in (check_overview, overview):
        with pytest.raises(ValueError) as e:
            check(tmp_path)
        assert str(e.value).startswith(f"{tmp_path / 'b' / 'grid.toml'}: {said}") and "\n" not in str(e.value)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "b" / "grid.toml").write_text(grid.format('report = { claim = "first", answer = "x", number = 6.5 }'))
    page = overview(tmp_path).read_text(encoding="utf-8")
    assert page.index("| first |") < page.index("| b |")


@pytest.mark.attack("crash")
def test_a_report_in_a_locale_that_is_not_utf_8(six, tmp_path):
    runs, grid = six
    code = "import sys; from dora_nb.results.collect import collect; from dora_nb.results.page import render; from dora_nb.results.overview import overview; collect(*sys.argv[1:]); render(sys.argv[2]); overview('.')"
    env = {k: v for k, v in os.environ.items() if not k.startswith("LC_") and k not in ("LANG", "PYTHONIOENCODING")}
    env |= dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONPATH=str(QUICK.parent.parent))
    command = [sys.executable, "-c", code, str(runs), str(tmp_path / "out"), str(grid)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert "α 32" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


# --- runs whose inputs were named alike and were not the same


def asked(method, seed=0, **params):
    "A run with parameters that are not checked, as its files are not here."
    made = result(method, seed)
    return made | dict(run=f"{made['run']}-{params}", params=made["params"] | params)


def of_content(result, version="0.2.0", **checksums):
    "A run that says what its inputs held."
    name = "-".join([result["run"], version, *checksums.values()])
    return result | dict(run=name, versions=dict(dora_nb=version), checksums=checksums)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("kind", ("model", "data", "mixture", "ranks"))
def test_seeds_of_different_inputs_are_not_averaged(kind):
    "The same path, and another model at it: a row for each."
    named = dict(mixture=dict(mixture="boolq,piqa"), ranks=dict(ranks="r.json")).get(kind, {})
    run = lambda s, digit: of_content(asked("lora", s, **named), **{kind: digit * 64})
    runs = [run(s, digit) for s, digit in enumerate("aab")]
    table = accuracies(runs, pd.concat(answers(r["run"], [1, 0]) for r in runs))
    assert sorted(table.seeds) == [1, 2]
    assert [f"{kind} content {digit * 6}" in label for digit, label in zip("ab", sorted(table.label))] == [True] * 2
    same = [run(s, "a") for s in range(3)]
    assert list(accuracies(same, pd.concat(answers(r["run"], [1, 0]) for r in same)).seeds) == [3]


@pytest.mark.attack("silent error")
def test_only_runs_of_one_model_are_compared():
    runs = [of_content(result(m, 0), model=digit * 64) for m, digit in (("lora", "a"), ("dora", "b"))]
    predictions = lambda runs: pd.concat(answers(r["run"], [1, 0]) for r in runs)
    assert not len(compare(runs, predictions(runs)))
    both = [of_content(result(m, 0), model=digit * 64) for m in ("base", "lora", "dora") for digit in "ab"]
    table = compare(both, predictions(both))
    assert sorted(table["model content"]) == ["a" * 64, "b" * 64] and list(table.seeds) == [1, 1]
    table = compare(both, predictions(both), {"method": "base"}, {"method": "lora"})
    assert sorted(table["model content"]) == ["a" * 64, "b" * 64]


def test_another_version_s_checksums_are_no_other_model():
    "It may compute them in another way; that versions are mixed is said already."
    runs = [of_content(result("lora", s), v, model=v[2] * 64) for s, v in enumerate(("0.1.0", "0.2.0"))]
    table = accuracies(runs, pd.concat(answers(r["run"], [1, 0]) for r in runs))
    assert list(table.seeds) == [2] and table.mixed[0] == "dora_nb 0.1.0 and 0.2.0"
    runs = [
        of_content(result("lora", task=t, source=s), data=t + s) for t in ("boolq", "piqa") for s in ("hub", "package")
    ]
    assert "data content" not in factors(runs)


@pytest.mark.attack("silent error")
def test_a_report_of_two_models_under_one_path(six, tmp_path):
    "Its page has a row for each, and compares each with its own."
    runs, _ = six
    for folder in dirs(runs):
        made = json.loads((folder / RESULT).read_text())
        made["checksums"] = dict(model=("b" if made["params"]["seed"] == 2 else "a") * 64)
        (folder / RESULT).write_text(json.dumps(made))
    collect(runs, tmp_path / "out")
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    assert all(f"| {m}, rank 16, model content {c * 6}" in page for m in ("LoRA", "DoRA") for c in "ab")
    assert (
        len(
            re.findall(
                "^- BoolQ, model content a{6}: DoRA − LoRA .* 2 seed|^- BoolQ, model content b{6}.* 1 seed", page, re.M
            )
        )
        == 2
    )


@pytest.mark.attack("silent error")
def test_data_that_differ_are_a_row_and_no_damage(six, tmp_path):
    "Other items of the same task: as many runs have them as not."
    runs, _ = six
    for folder in dirs(runs):
        made, other = json.loads((folder / RESULT).read_text()), "-dora-" in folder.name
        made["checksums"] = dict(data=("b" if other else "a") * 64)
        (folder / RESULT).write_text(json.dumps(made))
        table = pd.read_parquet(folder / PREDICTIONS)
        table.assign(doc_index=table.doc_index + 5 * other).to_parquet(folder / PREDICTIONS)
    assert len(collect(runs, tmp_path / "out")) == 6 and not read_report(tmp_path / "out").problems
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    assert "| LoRA, rank 16, data content aaaaaa" in page and "item by item" not in page


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("checksums", ([], {"model": 3}, {"model": None}))
def test_checksums_that_no_run_wrote_are_named(six, tmp_path, checksums):
    (runs, grid), folder = six, dirs(six[0])[0]
    made = json.loads((folder / RESULT).read_text())
    (folder / RESULT).write_text(json.dumps(made | dict(checksums=checksums)))
    collect(runs, tmp_path / "out", grid)
    (problem,) = read_report(tmp_path / "out").problems
    assert problem.startswith(f"{folder.name}: ") and "checksums" in problem


@pytest.mark.attack("silent error")
def test_a_file_of_ranks_is_named_instead_of_rank_and_alpha(six, tmp_path):
    runs, _ = six
    for folder in dirs(runs):
        made = json.loads((folder / RESULT).read_text())
        if made["params"]["method"] == "lora":
            made["params"] |= dict(ranks="a.json", rank=64, alpha=4.0)
        (folder / RESULT).write_text(json.dumps(made))
    collect(runs, tmp_path / "out")
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    assert "| LoRA, ranks from a file " in page and "| DoRA, rank 16 " in page
    assert "Training: ranks from a file, " in page and "α 32, from a file," in page
    assert "rank 64" not in page and "α 4" not in page


@pytest.mark.attack("silent error")
def test_files_of_ranks_are_told_apart():
    "By their names; and by what holds for the other weights, if that differs alone."
    label = lambda runs: list(accuracies(runs, pd.concat(answers(r["run"], [1, 0]) for r in runs)).label)
    each = lambda **by: [asked("lora", **{"ranks": "a.json"} | dict(zip(by, values))) for values in zip(*by.values())]
    assert label(each(ranks=["a.json", "b.json"])) == [f"LoRA, ranks from a file, {n}.json" for n in "ab"]
    assert label(each(rank=[4, 64])) == [f"LoRA, ranks from a file, rank elsewhere {n}" for n in (4, 64)]
    assert label(each(rank=[4, 64], ranks=["", "a.json"])) == ["LoRA, rank 4", "LoRA, ranks from a file"]


# --- reports and runs in one place


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("place", (".", "report", "a/b", "../runs/report"))
def test_a_report_does_not_go_into_its_runs(six, tmp_path, place):
    "The next one would take it for a run, or the runs for a report."
    runs = six[0]
    before = sorted(runs.rglob("*"))
    with pytest.raises(ValueError, match="the folder of runs; choose a place outside it"):
        collect(runs, runs / place)
    assert sorted(runs.rglob("*")) == before


@pytest.mark.attack("data loss")
def test_a_report_does_not_go_into_a_run_s_folder(six, tmp_path):
    claim(tmp_path / "my-run", "run", "x")
    with pytest.raises(ValueError, match="my-run is the folder of a run; choose another place"):
        collect(six[0], tmp_path / "my-run")
    assert [p.name for p in (tmp_path / "my-run").iterdir()] == [".dora-nb.json"]


@pytest.mark.attack("silent error")
def test_a_folder_of_runs_that_holds_a_report_is_one_of_runs(six, tmp_path):
    runs = six[0]
    shutil.copytree(QUICK, runs / "report", ignore=shutil.ignore_patterns("*.toml"))
    assert not reports_in(runs)
    with pytest.raises(ValueError, match="holds no reports"):
        check_overview(runs)
    assert len(collect(runs, tmp_path / "out")) == 6
    assert reports_in(tmp_path) == [tmp_path / "out", runs / "report"]


@pytest.mark.attack("data loss")
def test_a_refused_report_leaves_no_lock(six, tmp_path, monkeypatch):
    "In a folder of another program, and in a report of other runs."
    other, kept = tmp_path / "other", shutil.copytree(QUICK, tmp_path / "kept", ignore=shutil.ignore_patterns(".*"))
    other.mkdir()
    (other / RESULTS).write_text('{"results": [3]}')
    monkeypatch.setattr(stored, "PATIENCE", 0.1)
    before = {p: p.read_bytes() for folder in (other, kept) for p in folder.iterdir()}
    for make, words in (
        (lambda: collect(six[0], other), "is damaged"),
        (lambda: render(other), "is damaged"),
        (lambda: collect(six[0], kept), "holds 9 runs that are not in"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    assert {p: p.read_bytes() for folder in (other, kept) for p in folder.iterdir()} == before


# --- parameters that a run was not made with


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "change",
    (
        dict(method="dora"),
        dict(learning_rate=0.1),
        dict(seed=7),
        dict(rank=8.5),
        dict(twist=2),
        dict(objective="x"),
        "checksums",
        "id",
    ),
    ids=str,
)
def test_edited_parameters_are_named(tmp_path, monkeypatch, change):
    "They are part of the run's name; what is not part of it may differ, and so may a file of ranks that is gone."
    sums = dict(model="a" * 64, data="b" * 64)
    monkeypatch.setattr(identity, "checksums", lambda _: sums)
    made = dict(checksums=sums, versions=dict(dora_nb=__version__))
    for seed in (0, 1):
        config = RunConfig("boolq", "lora", seed=seed, alpha=32, checkpoint_seconds=5.0)
        folder = run_dir(tmp_path / "runs", config, [1, 0], **made | dict(id=identity.run_id(config)))
    assert len(collect(tmp_path / "runs", tmp_path / "out")) == 2 and not read_report(tmp_path / "out").problems
    found = json.loads((folder / RESULT).read_text())
    moved = found["params"] | dict(model="elsewhere", processes=2)
    (folder / RESULT).write_text(json.dumps(found | dict(params=moved)))
    assert len(collect(tmp_path / "runs", tmp_path / "out")) == 2
    if isinstance(change, dict):
        found["params"] |= change
    else:
        found |= {"checksums": dict(checksums=sums | dict(model="c" * 64)), "id": dict(id="0123456789")}[change]
    (folder / RESULT).write_text(json.dumps(found))
    assert len(collect(tmp_path / "runs", tmp_path / "new")) == 1
    (problem,) = read_report(tmp_path / "new").problems
    assert problem.startswith(f"{folder.name}: ") and "again" in problem


# --- what tells runs apart, and what they were made with

MIXTURES = {"boolq,hellaswag": 0.2, "boolq,winogrande": 0.9}  # as many tasks in both


def gathered(shares, n=10, seeds=(0, 1)):
    "Runs that trained, parameters → accuracy; as a report reads them, with answers by ranking."
    training = dict(items=32, steps=2, trainable=10, total=100, tokens_per_second=9.0, seconds=1.0)
    runs, frames = [], []
    for params, acc in shares:
        for seed in seeds if params["method"] != "base" else (0,):
            own = result(**params, seed=seed, acc=acc, n=n) | {"run": f"run-{len(runs)}"}
            runs.append(own | ({"training": training} if params["method"] != "base" else {}))
            right = np.arange(n) < round(acc * n)
            scores = [[-2.0, -1.0] if r else [-1.0, -2.0] for r in right]
            frames.append(answers(runs[-1]["run"], right).assign(loglikelihood=scores))
    steps = [dict(run=r["run"], step=i, loss=1.0, learning_rate=1e-3) for r in runs if r["training"] for i in (1, 2)]
    return NO_RESULTS._replace(results=runs, predictions=pd.concat(frames), history=pd.DataFrame(steps))


@pytest.mark.attack("data loss")
def test_mixtures_of_as_many_tasks_keep_their_own_rows():
    found = gathered([(dict(method=m, mixture=mix), acc) for m in ("lora", "dora") for mix, acc in MIXTURES.items()])
    words = ["BoolQ + HellaSwag together", "BoolQ + WinoGrande together"]
    names = [f"{m}, rank 16, {w}" for m in ("LoRA", "DoRA") for w in words]
    table = accuracy_table(accuracies(found.results, found.predictions))
    assert list(table.index) == names
    assert [cell.split()[0] for cell in table.iloc[:, 0]] == ["20.0", "90.0", "20.0", "90.0"]
    losses = loss_table(found.results, found.predictions)
    low, high = (np.log1p(np.exp(-1)) + (1 - acc) for acc in (0.9, 0.2))
    assert losses.iloc[:4, 0].tolist() == [f"{high:.3f}", f"**{low:.3f}**"] * 2
    assert list(cost_table(found.results).method) == names
    rows = sweep(accuracies(found.results, found.predictions), "mixture")
    wide = sweep_table(rows)
    assert [x.partition(", ")[2] for x in wide.index] == words and wide.iloc[:, 0].str.split().str[0].tolist() == [
        "20.0",
        "90.0",
    ]
    fig = plot_learning_curves(found.results, found.history)
    assert [ax.get_title() for ax in fig.axes] == words
    plt.close(fig)


@pytest.mark.attack("silent error")
def test_a_verdict_says_which_mixture(tmp_path):
    for mix, acc in MIXTURES.items():
        for method in ("lora", "dora"):
            run_dir(tmp_path / "runs", RunConfig("boolq", method, mixture=mix), np.arange(200) < 200 * acc)
    collect(tmp_path / "runs", tmp_path / "out")
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    for words in ("BoolQ + HellaSwag together", "BoolQ + WinoGrande together"):
        assert f"- BoolQ, {words}: DoRA − LoRA is" in page


@pytest.mark.attack("data loss")
def test_rates_that_agree_in_six_digits_keep_their_own_rows():
    found = gathered([(dict(method="lora", learning_rate=x), a) for x, a in ((0.0012345671, 0.2), (0.0012345672, 0.9))])
    table = accuracy_table(accuracies(found.results, found.predictions))
    assert list(table.index) == [f"LoRA, rank 16, rate {x}" for x in (0.0012345671, 0.0012345672)]
    assert [cell.split()[0] for cell in table.iloc[:, 0]] == ["20.0", "90.0"]
    base = gathered([(dict(method="base"), 0.5)])
    both = found._replace(results=[*found.results, *(r | {"run": "base"} for r in base.results)])
    answered = pd.concat([found.predictions, base.predictions.assign(run="base")])
    table = stability_table(both._replace(predictions=answered), "learning_rate")
    assert list(table.columns) == ["rate 0.0012345671", "rate 0.0012345672"]
    assert table.iloc[0].str.partition(", ")[2].tolist() == ["2 of 2", "0 of 2"]


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "name,values",
    [
        ("mixture", ["boolq,piqa", "boolq, piqa", "boolq,winogrande", ""]),
        ("learning_rate", [0.0012345671, 0.0012345672]),
        ("model content", ["abcdef0", "abcdef1"]),
        ("model", ["a\nb", "a b"]),
        ("task", ["boolq", "BoolQ"]),
        ("rank", [1, 1.0, True]),
    ],
)
def test_two_values_never_have_one_label(name, values):
    assert len({markdown_text(value_label(name, v, values)) for v in values}) == len(values)


@pytest.mark.attack("silent error")
def test_a_label_that_would_stand_for_two_kinds_of_runs_is_refused():
    "Two parameters may have the same words; nothing is averaged over."
    found = gathered([(dict(method="lora", model=name), 0.5) for name in "abcd"], seeds=(0,))
    for r, pair in zip(found.results, (("x", ""), ("", "x"), ("x", "z"), ("", "z"))):
        r["params"] |= dict(zip(("model", "source"), pair))
    with pytest.raises(ValueError, match="both called 'LoRA, rank 16, x', one with model 'x', source '' and one with"):
        accuracies(found.results, found.predictions)
    with pytest.raises(ValueError, match="report them in two folders"):
        run_labels([parameters(r) for r in found.results], factors(found.results))
    table = accuracies(found.results[:1], found.predictions)
    with pytest.raises(ValueError, match="both called 'LoRA, rank 16'"):
        accuracy_table(pd.concat([table, table]))
    ranks = gathered([(dict(method="lora", rank=r), 0.5) for r in (4, 8)])
    table = accuracies(ranks.results, ranks.predictions)
    with pytest.raises(ValueError, match="both called 'LoRA' at 'rank 4'"):
        sweep_table(sweep(pd.concat([table, table]), "rank"))


PRUNED = {"boolq,hellaswag": 0.2, "hellaswag,boolq,piqa": 0.9}


def pruned(mixtures):
    return gathered(
        [
            (dict(method=m, mixture=mix, compress="wanda-0.5"), acc)
            for mix, acc in mixtures.items()
            for m in ("base", "lora")
        ]
    )


@pytest.mark.attack("data loss")
def test_bases_pruned_on_other_items_are_two_bases():
    found = pruned(PRUNED)
    table = accuracy_table(accuracies(found.results, found.predictions))
    assert list(table.index)[:2] == ["base model, pruned on BoolQ", "base model, pruned on HellaSwag"]
    assert [cell.split()[0] for cell in table.iloc[:, 0]] == ["20.0", "90.0", "20.0", "90.0"]
    pairs = compare(found.results, found.predictions, {"method": "base"}, {"method": "lora"})
    assert pairs.mixture.tolist() == list(PRUNED) and pairs.difference.tolist() == [0, 0]  # none is crossed


@pytest.mark.attack("silent error")
def test_what_counts_of_a_pruned_base_s_mixture_is_its_first_task():
    found = pruned({"boolq,hellaswag": 0.2, "boolq,winogrande": 0.2})
    table = accuracies(found.results, found.predictions)
    assert table[table.method == "base"].label.tolist() == ["base model"]
    pairs = compare(found.results, found.predictions, {"method": "base"}, {"method": "lora"})
    assert pairs.mixture.tolist() == ["boolq,hellaswag", "boolq,winogrande"] and pairs.seeds.tolist() == [2, 2]
    odd = pruned({"boolq,hellaswag": 0.2, "boolq,winogrande": 0.9})
    with pytest.raises(ValueError, match="differ in nothing that could tell them apart"):
        accuracies(odd.results, odd.predictions)
    base, lora = (
        gathered([(dict(method=m, compress="wanda-0.5", mixture=x), 0.5)])
        for m, x in (("base", ""), ("lora", "hellaswag,boolq"))
    )
    runs = [base.results[0] | {"run": "base"}, *lora.results]
    both = pd.concat([base.predictions.assign(run="base"), lora.predictions])
    assert not len(compare(runs, both, {"method": "base"}, {"method": "lora"}))  # it was pruned on HellaSwag


@pytest.mark.attack("silent error")
def test_a_change_from_the_unpruned_model_finds_it_for_every_calibration():
    unpruned = [(dict(method=m, mixture=mix), acc) for mix, acc in PRUNED.items() for m in ("base", "lora")]
    squeezed = [(params | {"compress": "wanda-0.5"}, 1 - acc) for params, acc in unpruned]
    found = gathered([unpruned[0], unpruned[1], unpruned[3], *squeezed])
    found.results[0]["params"]["mixture"] = ""
    rows = changes(found.results, found.predictions, {"compress": ""}, {"method": "base"}, {"method": "lora"})
    assert rows.mixture.tolist() == list(PRUNED)
    assert rows.change.tolist() == pytest.approx([0, -0.7])


GPU = dict(machine=dict(cpu="c", gpu="g", threads=1))
BFLOAT = dict(precision=dict(precision="bfloat16", eval_precision="float32"))
ASKED_BFLOAT = dict(precision=dict(precision="float32", eval_precision="bfloat16"))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "change,said",
    [
        (GPU, "on a CPU and a GPU"),
        (BFLOAT, "training in bfloat16 and float32"),
        (ASKED_BFLOAT, "evaluation in bfloat16 and float32"),
        (dict(versions=dict(dora_nb="9")), "dora_nb 0.1.0 and 9"),
        (dict(revision="other"), ""),  # says nothing of what a run came to
    ],
)
def test_sides_that_were_measured_unlike_are_named_beside_the_verdict(tmp_path, change, said):
    for seed in (0, 1):
        run_dir(tmp_path / "runs", RunConfig("boolq", "lora", seed=seed), np.arange(200) < 80)
        run_dir(tmp_path / "runs", RunConfig("boolq", "dora", seed=seed), np.arange(200) < 160, **change)
    results = collect(tmp_path / "runs", tmp_path / "out")
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    sentence = f"DoRA is ahead here, on these items and settings. LoRA and DoRA were measured under different conditions: {said}.\n"
    assert (sentence in page) == bool(said) and ("different conditions" in page) == bool(said)
    predictions = read_report(tmp_path / "out").predictions
    assert compare(results, predictions).unlike.tolist() == [said]


@pytest.mark.attack("silent error")
def test_only_what_differs_within_a_pair_counts():
    "Seeds on two machines, and both methods of a seed on one; and a precision that is what is compared."
    found = gathered([(dict(method=m), 0.5) for m in ("lora", "dora")])
    seeds = [
        r | (GPU if r["params"]["seed"] else dict(machine=dict(cpu="c", gpu=None, threads=1))) for r in found.results
    ]
    assert compare(seeds, found.predictions).unlike.tolist() == [""]
    found = gathered([(dict(method="lora", precision=p), 0.5) for p in ("float32", "bfloat16")])
    made = [
        r | dict(precision=dict(precision=r["params"]["precision"], eval_precision="float32")) for r in found.results
    ]
    sides = [{"precision": p} for p in ("float32", "bfloat16")]
    assert compare(made, found.predictions, *sides).unlike.tolist() == [""]


@pytest.mark.attack("silent error")
def test_a_change_between_runs_that_were_made_unlike_says_so():
    found = gathered([(dict(method=m, compress=c), 0.5) for m in ("lora", "dora") for c in ("", "rtn-4")])
    machine = lambda r: GPU if r["params"]["compress"] else dict(machine=dict(cpu="c", gpu=None, threads=1))
    rows = changes([r | machine(r) for r in found.results], found.predictions, {"compress": ""})
    assert rows.unlike.tolist() == ["on a CPU and a GPU"]
    text = change_verdict(rows.iloc[0].to_dict(), head="rtn-4")
    assert text.endswith(" The runs behind it were measured under different conditions: on a CPU and a GPU.")


@pytest.mark.attack("silent error")
def test_costs_and_losses_of_runs_that_were_made_unlike_are_marked(tmp_path):
    for seed in (0, 1):
        for method in ("lora", "dora"):
            odd = seed and method == "lora"
            config = RunConfig("boolq", method, seed=seed, eval_split="dev")
            folder = run_dir(tmp_path / "runs", config, np.arange(200) < 80, **(GPU if odd else {}))
            about = json.loads((folder / RESULT).read_text())
            about["training"]["trainable"] = 1000 if seed and method == "dora" else 10
            (folder / RESULT).write_text(json.dumps(about))
    results = collect(tmp_path / "runs", tmp_path / "out")
    costs = cost_table(results)
    assert list(costs.method) == ["LoRA, rank 16 †", "DoRA, rank 16 †"]
    page = render(tmp_path / "out").read_text(encoding="utf-8")
    words = "on a CPU and a GPU (BoolQ, LoRA, rank 16); trained parameters 1,000 and 10 (BoolQ, DoRA, rank 16)"
    assert f"† The runs of such a row ran under different conditions: {words}." in page
    losses = loss_table(results, read_report(tmp_path / "out").predictions)
    assert [x.endswith(" †") for x in losses.iloc[:2, 0]] == [True, False]
    assert losses.attrs["note"] == "† The seeds of such a cell ran under different conditions: on a CPU and a GPU."


@pytest.mark.attack("silent error")
def test_the_most_frequent_answer_is_of_the_column_s_own_items():
    small, large = (result("base", acc=0.9, n=n, eval_items=i) | {"run": f"of-{n}"} for n, i in ((20, 20), (200, None)))
    gold = np.where(np.arange(200) < 18, 1, np.arange(200) % 2)  # of the first 20 one answer is right 19 times
    frames = [answers(f"of-{n}", np.ones(n)).assign(gold=gold[:n], pred=gold[:n]) for n in (20, 200)]
    few, all_of_them = (np.bincount(gold[:n]).max() / n for n in (20, 200))
    assert few == 0.95 and round(all_of_them, 3) == 0.545
    predictions = pd.concat(frames)
    found = majority([small, large], predictions)
    assert found == {("boolq", "validation", 20): [few], ("boolq", "validation", 200): [all_of_them]}
    table = accuracies([small, large], predictions)
    last = accuracy_table(table, found).loc["always the most frequent answer"]
    assert last.to_dict() == {"BoolQ (n = 20)": "95.0", "BoolQ (n = 200)": "54.5"}
    fig = plot_accuracy(table, found)
    lines = {
        ax.get_title(): [y for line in ax.get_lines() if line.get_ls() == ":" for y in set(line.get_ydata())]
        for ax in fig.axes
    }
    assert lines == {"BoolQ (n = 20)": pytest.approx([95]), "BoolQ (n = 200)": pytest.approx([54.5])}
    plt.close(fig)


@pytest.mark.attack("silent error")
def test_the_most_frequent_answer_of_two_sets_of_items_is_a_range():
    runs = [result("lora", n=4), result("dora", n=4)]
    asked = [answers(r["run"], [1] * 4).assign(gold=gold) for r, gold in zip(runs, ([0, 1, 1, 1], [0, 0, 1, 1]))]
    found = majority(runs, pd.concat([asked[0], asked[1].assign(doc_index=range(4, 8))]))
    assert found == {("boolq", "validation", 4): [0.5, 0.75]}
    table = accuracies(runs, pd.concat(asked))
    assert accuracy_table(table, found).iloc[-1, 0] == "50.0 to 75.0"


# --- changes of the source in a report


PATCHES = {hashlib.sha256(p).hexdigest(): p for p in (b"one patch\n", b"another \xff\0 patch\n")}


def changed(folder, config, right, patch, kept=True):
    "A finished run that was made from a changed source."
    digest = hashlib.sha256(patch).hexdigest()
    made = run_dir(folder, config, right, revision="abc-dirty", source_diff=digest)
    named = json.loads((made / RESULT).read_text())
    named["files"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in made.iterdir() if p.name != RESULT}
    if kept:
        (made / DIFF).write_bytes(patch)
        named["files"][DIFF] = digest
    (made / RESULT).write_text(json.dumps(named))
    return made


@pytest.fixture
def runs(tmp_path):
    "Two runs with one patch, one with another, one whose patch was too large, an old one without, and one without changes."
    right = [1, 0, 1, 1] * 5
    one, two = PATCHES.values()
    for seed, patch in enumerate((one, one, two)):
        changed(tmp_path / "runs", RunConfig("boolq", "lora", seed=seed), right, patch)
    changed(tmp_path / "runs", RunConfig("boolq", "lora", seed=3), right, b"large", kept=False)
    run_dir(tmp_path / "runs", RunConfig("boolq", "lora", seed=4), right, revision="abc-dirty")
    run_dir(tmp_path / "runs", RunConfig("boolq", "lora", seed=5), right)
    return tmp_path / "runs"


def test_a_report_keeps_each_patch_once_and_the_page_names_it(runs, tmp_path):
    out = tmp_path / "out"
    collect(runs, out)
    assert {p.name: p.read_bytes() for p in out.glob("*.diff")} == {diff_name(d): p for d, p in PATCHES.items()}
    assert read_all(out).diffs == PATCHES
    line = next(x for x in render(out).read_text().splitlines() if x.startswith("- Source:"))
    assert line.startswith("- Source: revision abc, abc-dirty. 5 of 6 runs were made from a source with uncommitted")
    one, two = (diff_name(d) for d in PATCHES)
    assert f"2 of them: [{one}]({one}); 1 of them: [{two}]({two})" in line
    large = hashlib.sha256(b"large").hexdigest()[:12]
    assert (
        f"1 of them: only the checksum {large} of the diff was kept" in line and "1 of them: no diff was kept" in line
    )


def test_patches_go_where_their_runs_go(runs, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    collect(runs, out)
    grid = tmp_path / "grid.toml"
    grid.write_text('name = "x"\n[fixed]\ntask = "boolq"\nmethod = "lora"\n[axes]\nseed = [2, 4]\n')
    collect(tmp_path / "nowhere", other, grid, known=[out])
    kept = list(PATCHES)[1]
    assert read_all(other).diffs == {kept: PATCHES[kept]} and [p.name for p in other.glob("*.diff")] == [
        diff_name(kept)
    ]


def test_a_patch_that_no_run_has_any_more_is_removed(runs, tmp_path):
    out = tmp_path / "out"
    collect(runs, out)
    (out / "source-0123456789ab.diff").write_text("of somebody else")
    folder = next(p for p in runs.iterdir() if "-s2-" in p.name)
    shutil.rmtree(folder)
    run_dir(runs, RunConfig("boolq", "lora", seed=2), [1, 0, 1, 1] * 5)
    collect(runs, out)
    first = next(iter(PATCHES))
    assert sorted(p.name for p in out.glob("*.diff")) == sorted(["source-0123456789ab.diff", diff_name(first)])


@pytest.mark.attack("silent error")
def test_another_patch_is_refused(runs, tmp_path):
    out = tmp_path / "out"
    collect(runs, out)
    name = diff_name(next(iter(PATCHES)))
    (out / name).write_bytes(b"another patch")
    with pytest.raises(ValueError, match=f"{name} does not belong to the {RESULTS} beside it"):
        read_all(out)
    folder = next(p for p in runs.iterdir() if "-s0-" in p.name)
    (folder / DIFF).write_bytes(b"another patch")
    with pytest.raises(ValueError, match=f"{DIFF} is not the file that this run wrote"):
        read_run_files(folder, json.loads((folder / RESULT).read_text()))


@pytest.mark.attack("hostile input")
def test_a_checksum_that_is_a_path(runs, tmp_path):
    folder = next(p for p in runs.iterdir() if "-s0-" in p.name)
    named = json.loads((folder / RESULT).read_text()) | {"source_diff": "../../../x](http://y) <b>"}
    (folder / RESULT).write_text(json.dumps(named))
    collect(runs, tmp_path / "out")
    assert set(tmp_path.rglob("*.diff")) - set(runs.rglob("*.diff")) == set((tmp_path / "out").glob("*.diff"))
    text = render(tmp_path / "out").read_text()
    assert "](http" not in text and "<b>" not in text


def test_old_results_say_that_nothing_was_kept():
    results = json.loads((QUICK.parent / "main" / "large" / RESULTS).read_text())["results"]
    line = describe_source(results)
    changed = sum(r["revision"].endswith("-dirty") for r in results)
    assert f"{changed} of {len(results)} runs" in line and "no diff was kept" in line
