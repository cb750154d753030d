"Trainings that failed: counts by hand, scipy's exact tests, and where the section stands."

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dora_nb.results.failed import (
    end_errors,
    end_losses,
    failure_difference,
    failure_table,
    failures_section,
    symptom_table,
)
from dora_nb.results.findings import findings_section
from dora_nb.results.page import SECTIONS
from dora_nb.results.sections import Page
from dora_nb.results.stored import NO_RESULTS
from dora_nb.runs.config import RunConfig


def result(method, seed, **params):
    params = RunConfig("winogrande", method, seed=seed, **params).__dict__
    return dict(run=f"{method}-{seed}", params=params, metrics=dict(acc=0.5, n=4, seconds=1.0), training={"steps": 20})


def made(ends):
    "Runs with a loss of 1 at first, and of `ends` in the last fifth of 20 steps; a gradient of 50 at step 7 of those that fail."
    results, histories, answers = [], [], []
    for (method, seed), end in ends.items():
        r, step = result(method, seed), np.arange(1, 21)
        loss = np.where(step > 16, end, 1.0)
        norm = np.where(step == 7, 50.0 if end > 0.67 else 3.0, 1.0)
        results.append(r)
        histories.append(pd.DataFrame(dict(run=r["run"], step=step, steps=20, loss=loss, grad_norm=norm)))
        scores = [[-1.0, -1.0 - (0.1 if end > 0.67 else 2.0)]] * 4
        answers.append(pd.DataFrame(dict(run=r["run"], doc_index=range(4), gold=0, pred=0, loglikelihood=scores)))
    return results, pd.concat(histories), pd.concat(answers)


ENDS = {("lora", s): 0.69 if s < 2 else 0.5 for s in range(10)} | {
    ("dora", s): 0.7 if s < 7 else 0.5 for s in range(10)
}


def test_the_last_fifth_of_the_steps_counts():
    _, history, _ = made({("lora", 0): 0.4})
    assert end_losses(history)["lora-0"] == pytest.approx(0.4)
    assert end_losses(history.assign(loss=history.step))["lora-0"] == np.mean([17, 18, 19, 20])
    errors = end_errors(history.assign(loss=history.step))
    assert errors["lora-0"] == pytest.approx(stats.sem([17, 18, 19, 20]))
    assert np.isnan(end_errors(history.assign(steps=4).iloc[:4])["lora-0"])  # a single step


def test_a_training_that_was_evaluated_twice_counts_once():
    results, history, _ = made(ENDS)
    again = [
        r | dict(run=f"{r['run']}-dev", params=r["params"] | dict(eval_split="dev"), training_id=r["run"])
        for r in results
    ]
    again = [r | dict(training=r["training"] | dict(trained_by=r["training_id"])) for r in again]
    results = [r | dict(training_id=r["run"]) for r in results]
    both = pd.concat([history, history.assign(run=history.run + "-dev")])
    pd.testing.assert_frame_equal(
        failure_table([*results, *again], both, 0.673), failure_table(results, history, 0.673)
    )


def test_counts_and_intervals():
    results, history, answers = made(ENDS)
    table = failure_table(results, history, 0.673)
    assert table.trainings.tolist() == [10, 10] and table.failed.tolist() == [2, 7]
    low, high = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert table["%"][1] == f"70 [{100 * low:.0f}, {100 * high:.0f}]"
    symptoms = symptom_table(results, history, answers, 0.673)
    assert symptoms.trainings.tolist() == [2, 8, 7, 3]
    assert symptoms["largest gradient norm"].tolist() == ["50", "3", "50", "3"] and set(symptoms["at step"]) == {"7"}
    assert symptoms["margin, nats"].tolist() == ["0.10", "2.00"] * 2
    assert symptoms["loss at the end"][0] == "0.690"


def test_seeds_are_paired():
    results, history, _ = made(ENDS)
    runs = {s: (f"lora-{s}", f"dora-{s}") for s in range(10)}
    apart = failure_difference(runs, end_losses(history), 0.673)
    assert (apart["n"], apart["only_a"], apart["only_b"], apart["difference"]) == (10, 0, 5, 0.5)
    assert apart["p"] == pytest.approx(stats.binomtest(5, 5).pvalue) and apart["low"] > 0
    nobody = failure_difference(runs, end_losses(history), 2.0)
    assert nobody["difference"] == 0 and nobody["p"] == 1 and nobody["low"] < 0 < nobody["high"]


def test_the_section(tmp_path):
    results, history, answers = made(ENDS)
    found = NO_RESULTS._replace(results=results, history=history, predictions=answers)
    page = Page(tmp_path, found, {"failed_above": 0.673})
    text = "\n".join(failures_section(page))
    assert "## Failed trainings" in text and "above 0.673 nats" in text
    assert "\n- All trainings: in the share that failed, DoRA − LoRA is +50 points [" in text
    assert "DoRA alone failed with 5 of them, LoRA alone with 0, p = 0.062 (McNemar)" in text
    assert failures_section(Page(tmp_path, found)) == []
    assert failures_section(Page(tmp_path, NO_RESULTS, {"failed_above": 0.673})) == []
    assert SECTIONS.index(failures_section) == SECTIONS.index(findings_section) + 1  # above the details


def test_the_noise_of_the_bound_is_named(tmp_path):
    results, history, answers = made(ENDS)
    text = lambda h: "\n".join(
        failures_section(
            Page(
                tmp_path, NO_RESULTS._replace(results=results, history=h, predictions=answers), {"failed_above": 0.673}
            )
        )
    )
    noisy = history.assign(loss=history.loss + np.where(history.step % 2, 0.1, -0.1))
    assert "Its standard error is 0.058 nats (median)" in text(noisy)  # 0.2 / √3 / √4
    assert "standard error" not in text(history[history.step.isin([1, 20])])  # a single step at the end


def test_rows_that_differ_in_a_factor_are_named(tmp_path):
    results, history, answers = made(ENDS)
    other = [r | {"run": f"{r['run']}-b", "params": r["params"] | {"learning_rate": 0.01}} for r in results]
    again = history.assign(run=history.run + "-b"), answers.assign(run=answers.run + "-b")
    both = [pd.concat(pair) for pair in zip((history, answers), again)]
    found = NO_RESULTS._replace(results=results + other, history=both[0], predictions=both[1])
    lines = [line for line in failures_section(Page(tmp_path, found, {"failed_above": 0.673})) if "McNemar" in line]
    assert len(lines) == 2 and "rate 0.001: in the share" in lines[0] and "rate 0.01: in the share" in lines[1]
    assert not any(math.isnan(x) for x in failure_table(results + other, both[0], 0.673).failed)


def test_answers_that_were_not_ranked_have_no_margin():
    results, history, answers = made(ENDS)
    for odd in (answers.drop(columns="loglikelihood"), answers.assign(loglikelihood=[[-1.0]] * len(answers))):
        table = symptom_table(results, history, odd, 0.673)
        assert set(table["margin, nats"]) == {"–"} and table.trainings.tolist() == [2, 8, 7, 3]
