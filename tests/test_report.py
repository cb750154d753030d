"Tables against values counted by hand; the committed report against the code that makes it."

import json
import math
import shutil
import tomllib
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from dora_nb.compare import (
    accuracies,
    accuracy_table,
    agreement,
    change_verdict,
    changes,
    compare,
    factors,
    freedom,
    holm,
    majority,
    mean_interval,
    mean_squares,
    standard_error,
    verdict,
)
from dora_nb.decompose import delta_direction, delta_magnitude
from dora_nb.grid import load_grid
from dora_nb.report import (
    ALL_CURVATURE,
    NOTHING,
    RESULTS,
    Gathered,
    collect,
    correlation,
    cost_table,
    curvature_rows,
    experiment,
    geometry_differences,
    geometry_rows,
    interval,
    overview,
    partial_rank_correlation,
    plot_learning_curves,
    plot_sweep,
    read_report,
    render,
    reports_in,
    sharpness_table,
    stability_table,
    sweep,
    sweep_table,
)
from dora_nb.runs import RunConfig, run_name

QUICK = Path(__file__).parent.parent / "reports" / "quick"


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
    assert factors(runs) == ["protocol", "eval_split", "task", "method"]
    assert factors([*runs, result("dora", 2, learning_rate=5e-3, train_items=5)])[-1] == "learning_rate"
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
    results = [result("lora"), result("dora")]
    predictions = pd.concat([answers(r["run"], [1, 0, 1, 1]).assign(gold=[0, 1, 1, 1]) for r in results])
    assert majority(results, predictions) == {"boolq": 0.75}
    assert accuracy_table(accuracies(results, predictions), {"boolq": 0.75}).iloc[-1, 0] == "75.0"


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
    assert "the same answer to 75.0 % of the items, two seeds of one of them to 62.5 %." in verdict(row.to_dict())


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
    found = Gathered(runs, [], pd.concat(frames), history, NOTHING.geometry, {})
    assert stability_table(found, "learning_rate").to_numpy().tolist() == [["1.70, 1 of 2"]]
    dev = [r | dict(run=f"{r['run']}-dev", params=r["params"] | dict(eval_split="dev")) for r in runs]
    both = found.predictions.assign(run=found.predictions.run + "-dev")
    both = found._replace(results=[*runs, *dev], predictions=pd.concat([found.predictions, both]))
    assert stability_table(both, "learning_rate").to_numpy().tolist() == [["1.70, 1 of 2"]] * 2  # a row for each split
    lost = asdict(RunConfig("boolq", "lora", seed=2, learning_rate=1e-3))
    assert stability_table(found, "learning_rate", [lost]).to_numpy().tolist() == [["nan, 2 of 3"]]
    assert stability_table(found._replace(results=runs[1:]), "learning_rate").to_numpy().tolist() == [["1.70"]]


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
    with pytest.raises(ValueError, match="no folder of runs"):
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
    table = sharpness_table(rows, accuracies(runs, predictions)).set_index("kind")
    assert table["λmax, end"].to_dict() == {"LoRA, rank 4": "12", "LoRA, rank 8": "1e+03"}
    assert table.accuracy["LoRA, rank 4"].startswith("20.0 ") and table.accuracy["LoRA, rank 8"].startswith("90.0 ")


def test_what_an_earlier_report_fills_in_is_said(tmp_path, capsys):
    "Runs that are not in the folder, and that failed there."
    kept = shutil.copytree(QUICK, tmp_path / "quick")
    found = read_report(kept)
    failed = tmp_path / "runs" / found.results[0]["run"]
    failed.mkdir(parents=True)
    (failed / "error.json").write_text('{"error": "Diverged: step 2", "traceback": ""}')
    results = collect(tmp_path / "runs", kept, QUICK / "grid.toml")
    said = capsys.readouterr().err
    assert len(results) == len(found.results) and f"{len(results)} runs are not in {tmp_path / 'runs'}" in said
    assert f"of these {failed.name} failed in" in said


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
    assert "DoRA gains" in change_verdict(table.loc["rtn-3"].to_dict())
    assert not len(changes(results, predictions, {"compress": "hqq-4"}))
    same = changes(results, predictions, {"compress": ""}, {"method": "lora"}, {"method": "lora"})
    assert (same.change == 0).all() and (same.low < 0).all() and (same.p == 1).all()


@pytest.mark.parametrize("folder", reports_in(QUICK.parent), ids=lambda p: str(p.relative_to(QUICK.parent)))
def test_the_committed_report_is_what_the_code_makes(tmp_path, folder):
    "Page and figures, from the committed results."
    made = tmp_path / folder.relative_to(QUICK.parent)
    shutil.copytree(folder, made)
    for grid in folder.parent.glob("*.toml"):
        shutil.copy(grid, made.parent)
    for path in (*made.glob("*.md"), *made.glob("*.png")):
        path.unlink()
    render(made)
    again = f"run `dora-nb report {folder.relative_to(QUICK.parent.parent)}`"
    assert (made / "report.md").read_text() == (folder / "report.md").read_text(), again
    assert {p.name for p in made.glob("*.png")} == {p.name for p in folder.glob("*.png")}, again
    for path in made.glob("*.png"):
        new, old = (plt.imread(p).astype(float) for p in (path, folder / path.name))
        assert new.shape == old.shape and np.abs(new - old).mean() < 0.01, f"{path.name}: {again}"


def test_the_committed_overview_is_what_the_code_makes(tmp_path):
    shutil.copytree(QUICK.parent, tmp_path / "reports", ignore=shutil.ignore_patterns("*.parquet", "*.png"))
    assert overview(tmp_path / "reports").read_text() == (QUICK.parent / "README.md").read_text(), "run `make report`"


def test_the_committed_results_are_of_the_committed_grid():
    results = json.loads((QUICK / RESULTS).read_text())
    assert not results["problems"]
    asked = {json.dumps(asdict(c)) for c in load_grid(QUICK / "grid.toml").configs}
    assert {json.dumps(asdict(RunConfig(**r["params"]))) for r in results["results"]} == asked


GRIDS = sorted(QUICK.parent.glob("*/*.toml"))
SCALED = [(p, s) for p in GRIDS for s in tomllib.loads(p.read_text()).get("scale", {"": None})]


@pytest.mark.parametrize("path,scale", SCALED, ids=lambda p: f"{p.parent.name}/{p.stem}" if isinstance(p, Path) else p)
def test_every_grid_is_one(path, scale):
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


def test_answers_that_name_no_choice(tmp_path):
    page = shutil.copytree(QUICK, tmp_path / "page")
    (page / ALL_CURVATURE).unlink()
    stored = json.loads((page / RESULTS).read_text())
    stored["results"] = [r for r in stored["results"] if r["params"]["task"] == "boolq"]
    for r in stored["results"]:
        r["params"]["protocol"] = "generate"
        r["metrics"]["unparsed"] = 0.25 if r["params"]["method"] == "dora" else 0.0
    (page / RESULTS).write_text(json.dumps(stored))
    said = next(line for line in render(page).read_text().splitlines() if "name no choice" in line)
    assert "BoolQ, DoRA, rank 16 25.0" in said and "BoolQ, LoRA, rank 16 0.0" in said


def test_a_sweep():
    results, predictions = swept()
    rows = sweep(accuracies(results, predictions), "rank")
    assert list(rows.line) == ["base model", "LoRA", "LoRA", "DoRA", "DoRA"]
    assert list(rows.x)[1:] == [0, 1, 0, 1] and np.isnan(rows.x[0])
    text = sweep_table(rows)
    assert list(text.index) == ["BoolQ, rank 2", "BoolQ, rank 8"] and text["base model"].nunique() == 1
    assert len(plot_sweep(rows).axes) == 1
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
    assert high - low > 1.1 * (alone[2] - alone[1])  # checkpoints of one weight are no independent points


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
verdict = "Undecided."
"""


def test_a_page_s_words_come_from_the_grid_file(tmp_path):
    folder = tmp_path / "reports" / "words" / "small"
    folder.mkdir(parents=True)
    (folder.parent / "grid.toml").write_text(SPEC)
    spec, path, scale = experiment(folder)
    assert (spec["title"], path.name, scale) == ("A title", "grid.toml", "small")
    page = overview(tmp_path / "reports").read_text()
    assert "| A title | A \\| claim. | Not measured yet. | [the grid](words/grid.toml) |" in page
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
    (folder.parent / "grid.toml").write_text(SPEC.replace('verdict = "Undecided."', by_scale))
    spec = experiment(folder)[0]
    assert spec["doubts"] == ["One."] and "verdict" not in spec
    assert experiment(tmp_path) == ({}, None, None)
