"The two factors of the accuracy of generated answers, against counts by hand and the jackknife."

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dora_nb.results.accuracy import accuracies
from dora_nb.results.compare import compare, verdict
from dora_nb.results.findings import finding_table
from dora_nb.results.form import form_shares, form_values, split_difference
from dora_nb.results.items import names_choices, naming
from dora_nb.results.stored import read_report
from dora_nb.runs.config import RunConfig

PROTOCOL = Path(__file__).parents[2] / "reports" / "protocol" / "medium"


def result(method, seed=0, acc=0.5, n=10, **params):
    params = RunConfig("winogrande", method, seed=seed, **params).__dict__
    return dict(params=params, metrics=dict(acc=acc, n=n, seconds=1.0), training=None, peak_memory_bytes=2**30)


def drawn(seeds=1, items=200, form=0.7, right=0.6, seed=0):
    "Answers of which some name no choice."
    rng = np.random.default_rng(seed)
    named = rng.random((seeds, items)) < form
    return named, named & (rng.random((seeds, items)) < right)


@pytest.mark.parametrize("form,right", [(0.7, 0.6), (0.2, 0.9), (0.95, 0.5)])
def test_the_error_of_a_ratio_is_the_jackknifes(form, right):
    named, among = drawn(form=form, right=right)
    n = named.size
    left_out = (among.sum() - among[0]) / (named.sum() - named[0])
    jackknife = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    values = form_values(named, among)[1]
    assert values.mean() == pytest.approx(among.sum() / named.sum())
    assert stats.sem(values[0]) == pytest.approx(jackknife, rel=0.03)


def test_the_factors_multiply_to_the_accuracy():
    for seeds in (1, 3):
        named, right = drawn(seeds)
        shares = form_shares(named, right)
        assert shares["form"][0] * shares["right"][0] == pytest.approx(right.mean())
        for share, low, high in shares.values():
            assert low < share < high


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_answer_and_every_answer_in_the_form(seeds):
    nothing, everything = np.zeros((seeds, 50), bool), np.ones((seeds, 50), bool)
    none, all_ = form_shares(nothing, nothing), form_shares(everything, everything)
    assert none["form"][:2] == (0, 0) and 0 < none["form"][2] < 0.1 and np.isnan(none["right"]).all()
    assert all_["form"][0] == all_["right"][0] == 1 and 0.9 < all_["right"][1] < 1
    wrong = form_shares(everything, nothing)["right"]
    assert wrong[0] == 0 and 0 < wrong[2] < 0.1
    assert np.isnan(split_difference((nothing, nothing), (everything, everything))["right"]).all()


def test_a_difference_is_split_without_a_rest():
    one, two = (drawn(items=600, seed=s, form=f, right=r) for s, f, r in ((1, 0.4, 0.6), (2, 0.9, 0.4)))
    split = split_difference(one, two)
    assert split["form"][0] + split["right"][0] == pytest.approx(two[1].mean() - one[1].mean())
    (f1, c1), (f2, c2) = ((n.mean(), r.sum() / n.sum()) for n, r in (one, two))
    assert split["form"][0] == pytest.approx((f2 - f1) * (c1 + c2) / 2)
    assert split["form"][1] > 0 > split["right"][2]  # more in the form, fewer right ones among them


def test_the_interval_of_a_part_is_that_of_drawn_items():
    (n1, r1), (n2, r2) = drawn(seed=3, items=400, form=0.5), drawn(seed=4, items=400, form=0.8)
    split, rng = split_difference((n1, r1), (n2, r2)), np.random.default_rng(0)
    found = {"form": [], "right": []}
    for _ in range(2000):
        i = rng.integers(400, size=400)
        (f1, c1), (f2, c2) = ((n[0][i].mean(), r[0][i].sum() / n[0][i].sum()) for n, r in ((n1, r1), (n2, r2)))
        found["form"].append((f2 - f1) * (c1 + c2) / 2)
        found["right"].append((c2 - c1) * (f1 + f2) / 2)
    for part, values in found.items():
        assert split[part][2] - split[part][1] == pytest.approx(2 * 1.96 * np.std(values), rel=0.06)


def written(run, named, right, seed=0, **params):
    "A result of generated answers, and the answers."
    gold = np.arange(len(named)) % 2
    pred = np.where(named, np.where(right, gold, 1 - gold), np.nan)
    frame = pd.DataFrame(dict(run=run, doc_index=range(len(gold)), gold=gold, pred=pred))
    made = result(params.pop("method", "lora"), seed, float(right.mean()), len(gold), protocol="generate", **params)
    return made | {"run": run}, frame


def test_tables_and_comparisons_of_generated_answers():
    made, frames = [], []
    for method, form in (("lora", 0.5), ("dora", 0.9)):
        for s, (named, right) in enumerate(zip(*drawn(2, form=form, seed=int(10 * form)))):
            r, frame = written(f"{method}-{s}", named, right, s, method=method)
            made.append(r), frames.append(frame)
    predictions = pd.concat(frames)
    table = accuracies(made, predictions, ("acc", "form", "right")).set_index(["method", "metric"])
    for method in ("lora", "dora"):
        runs = [f"{method}-{s}" for s in (0, 1)]
        named, right = (t.to_numpy() for t in naming(runs, predictions))
        assert table.share[method, "form"] == named.mean()
        assert table.share[method, "right"] == pytest.approx(right.sum() / named.sum())
        assert table.spread[method, "form"] == pytest.approx(np.std(named.mean(1), ddof=1))
    row = compare(made, predictions).iloc[0].to_dict()
    assert row["by_form"] + row["by_right"] == pytest.approx(row["difference"])
    said = verdict(row)
    assert f"Answers in the form make {100 * row['by_form']:+.1f} points" in said
    shown = finding_table([row | {"labels": ("LoRA", "DoRA"), "place": "WinoGrande", "p_holm": row["p"]}])
    assert shown["DoRA − LoRA, points by answers in the form"][0].startswith(f"{100 * row['by_form']:+.1f} [")


def test_rankings_and_completions_have_no_form():
    assert not names_choices(result("lora"))
    generated = result("lora", protocol="generate")
    assert names_choices(generated)
    assert not names_choices(generated | {"metrics": generated["metrics"] | {"exact_match": 0.5}})


def test_the_stored_protocol():
    found = read_report(PROTOCOL)
    runs = [r for r in found.results if names_choices(r)]
    table = accuracies(runs, found.predictions, ("form", "right")).set_index(["method", "metric"]).share
    assert table["base", "form"] == pytest.approx(0.224) and table["base", "right"] == pytest.approx(0.121 / 0.224)
    for r in runs:  # what was counted when it was generated
        assert table[r["params"]["method"], "form"] == pytest.approx(1 - r["metrics"]["unparsed"], abs=0.001)
