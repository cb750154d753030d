"Tables against values counted by hand; the committed report against the code that makes it."

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dora_nb.grid import load_grid
from dora_nb.report import (
    RESULTS,
    accuracies,
    accuracy_table,
    collect,
    compare,
    cost_table,
    majority,
    read_report,
    render,
    verdict,
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
    table = accuracies([result("lora", 0, 0.5), result("lora", 1, 0.7), result("base", 0, 0.4)])
    lora = table[table.method == "lora"].iloc[0]
    assert lora.share == pytest.approx(0.6) and lora.seeds == 2 and lora.spread == pytest.approx(0.1414, abs=1e-4)
    assert (lora.low, lora.high) == pytest.approx(
        (0.3127, 0.8318), abs=1e-4
    )  # Wilson for 6 of 10: items, not seeds, count
    text = accuracy_table(table)
    assert list(text.index) == ["base model", "LoRA, rank 16"] and list(text.columns) == ["BoolQ (n = 10)"]


def test_what_may_not_be_averaged_is_refused():
    with pytest.raises(ValueError, match="average over it"):
        accuracies([result("lora", learning_rate=1e-3), result("lora", learning_rate=1e-4)])


def test_seeds_are_not_averaged_over_different_settings():
    with pytest.raises(ValueError, match="average over it"):
        accuracies([result("lora", seed=0, learning_rate=1e-3), result("lora", seed=1, learning_rate=1e-1)])


def test_the_most_frequent_answer():
    results = [result("lora"), result("dora")]
    predictions = pd.concat([answers(r["run"], [1, 0, 1, 1]).assign(gold=[0, 1, 1, 1]) for r in results])
    assert majority(results, predictions) == {"boolq": 0.75}
    assert accuracy_table(accuracies(results), {"boolq": 0.75}).iloc[-1, 0] == "75.0"


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
        one.high - one.low, rel=0.03
    )


def test_no_difference_is_not_certainty():
    row = compare(
        [result("lora"), result("dora")],
        pd.concat([answers("boolq-lora-0", [1] * 50), answers("boolq-dora-0", [1] * 50)]),
    ).iloc[0]
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


def test_the_committed_report_is_what_the_code_makes(tmp_path):
    shutil.copytree(QUICK, tmp_path / "quick")
    (tmp_path / "quick" / "report.md").unlink()
    render(tmp_path / "quick")
    assert (tmp_path / "quick" / "report.md").read_text() == (QUICK / "report.md").read_text(), (
        "run `dora-nb report reports/quick`"
    )


def test_the_committed_results_are_of_the_committed_grid():
    results = json.loads((QUICK / RESULTS).read_text())
    assert not results["problems"]
    asked = {json.dumps(asdict(c)) for c in load_grid(QUICK / "grid.toml").configs}
    assert {json.dumps(asdict(RunConfig(**r["params"]))) for r in results["results"]} == asked


@pytest.mark.parametrize("path", sorted(QUICK.parent.glob("*/*.toml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_grid_is_one(path):
    grid = load_grid(path)
    assert len({run_name(c) for c in grid.configs}) == len(grid.configs)
