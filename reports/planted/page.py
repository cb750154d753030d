"The page on planted ranks, from the cells that `planted.py` left."

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

from benchmarks.common import table, write_text
from dora_nb.curvature.recovery import recovery
from dora_nb.curvature.spectra import effective_rank
from dora_nb.results.compare import holm

WORDS = {
    "oracle": "the planted ranks (oracle)",
    "uniform": "the same rank everywhere",
    "singular": "plain singular values",
    "curvature": "curvature (Gauss-Newton, Kronecker factors)",
    "hessian": "Hessian of all gates (as in SubLoRA)",
    "gate": "gate times its slope (as in AdaLoRA)",
    "gates": "gates trained under a penalty",
    "gradient": "gradient before training",
    "inputs": "inputs' variance (as in EVA)",
}


WHOLE = {"planting", "wide", "scores", "gates"} | {f"fit {w}{end}" for w in WORDS for end in ("", ", shuffled")}
WHOLE -= {"fit uniform, shuffled"}  # cells of a planting


def read(out: Path, seeds: list[int], needed: set[str]) -> dict[int, dict[str, dict]]:
    "Return the cells of every planting that has the needed ones: seed → cell → result."
    found = {}
    for path in sorted(out.glob("*.json")):
        cell = json.loads(path.read_text())
        found.setdefault(cell["seed"], {})[cell["cell"]] = cell
    return {s: found[s] for s in seeds if needed <= found.get(s, {}).keys()}


def interval(values: list[float]) -> tuple[float, float, float]:
    "Return a mean over plantings and its 95 % interval (Student's t)."
    x = np.asarray(values)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return x.mean(), x.mean() - half, x.mean() + half


def detectable(values: list[float]) -> float:
    "Return the true difference that so many plantings would show with 80 % power."
    df = len(values) - 1
    return (stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * np.std(values, ddof=1) / len(values) ** 0.5


def spelled(values: list[float], digits: int = 1) -> str:
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*interval(values), d=digits)


class Results:
    "Hold what is left of the divergence, in per cent of the untrained model's, and the ranks, for all plantings."

    def __init__(self, cells: dict[int, dict[str, dict]], plan: dict, chosen: dict):
        self.cells, self.chosen = cells, chosen  # what the pilot chose
        self.uniform = sum(plan["ranks"]) // len(plan["ranks"])  # the rank of every layer, at the same budget

    def left(self, cell: str) -> np.ndarray:
        "Return the divergence that a student leaves, in per cent of the untrained model's, a number per planting."
        return np.array([100 * c[cell]["loss"] / c["planting"]["loss"] for c in self.cells.values()])

    def less(self, a: str, b: str) -> list[float]:
        "Return how much less or more the first of two candidates leaves, in per cent of the other, a number per planting."
        return (100 * (self.left(f"fit {a}") / self.left(f"fit {b}") - 1)).tolist()

    def ranks(self, score: str, cell: str = "scores") -> list[tuple[dict, dict]]:
        "Return estimated and planted ranks, a pair per planting."
        place = (lambda c: c["gates"]["ranks"]) if score == "gates" else (lambda c: c[cell]["ranks"][score])
        return [(place(c), c["planting"]["ranks"]) for c in self.cells.values()]

    def counts(self, score: str, cell: str = "scores") -> list[dict[str, int]]:
        "Return ranks that use no budget: 99 % of the score, or gates that stay open; a dictionary per planting."
        if score == "gates":
            return [{n: sum(v > 0 for v in s) for n, s in c["gates"]["scores"].items()} for c in self.cells.values()]
        scores = (c[cell]["scores"][score] for c in self.cells.values())
        needed = lambda s: effective_rank(torch.tensor(s).clamp_min(0))  # closing a gate may seem to help
        return [{n: needed(s) for n, s in layers.items()} for layers in scores]


SCORES = [w for w in WORDS if w not in ("oracle", "uniform")]


def training_rows(r: Results) -> str:
    "Return the table of students at the budget."
    rows = []
    for what, words in WORDS.items():
        row = {"ranks from": words, "left, %": f"{r.left(f'fit {what}').mean():.1f}"}
        if what != "uniform":
            row["against uniform, %"] = spelled(r.less(what, "uniform"))
            row["against own shuffle, %"] = spelled(r.less(what, f"{what}, shuffled"))
        rows.append(row)
    rows.append({"ranks from": "the wide student, rank 16 everywhere", "left, %": f"{r.left('wide').mean():.1f}"})
    slow = dict(wide="the wide student", uniform="the same rank everywhere", oracle="the planted ranks")
    for what, words in slow.items():
        if all(f"slow {what}" in c for c in r.cells.values()):
            rows.append({"ranks from": f"{words}, at half the rate", "left, %": f"{r.left(f'slow {what}').mean():.1f}"})
    return table(rows, ["ranks from", "left, %", "against uniform, %", "against own shuffle, %"])


def recovery_rows(r: Results, scores=SCORES, cell: str = "scores") -> str:
    "Return the table of how well each score finds the planted ranks."
    rows = []
    for score in scores:
        pairs = r.ranks(score, cell)
        found = [recovery(*pair) for pair in pairs]
        mean = {k: np.mean([f[k] for f in found]) for k in found[0]}
        free = [recovery(e, p)["error"] for e, (_, p) in zip(r.counts(score, cell), pairs)]
        row = {"score": WORDS[score], "Spearman": spelled([f["spearman"] for f in found], 2)}
        row |= {"AUC": f"{mean['auc']:.2f}", "error of the rank": f"{mean['error']:.2f}"}
        rows.append(row | {"error without the budget": f"{np.mean(free):.2f}"})
    even = np.mean([recovery(dict.fromkeys(p, r.uniform), p)["error"] for _, p in r.ranks("singular", cell)])
    rows.append({"score": "the same rank everywhere", "error of the rank": f"{even:.2f}"})
    return table(rows, ["score", "Spearman", "AUC", "error of the rank", "error without the budget"])


def by_chance(pairs: list[tuple[dict, dict]], draws: int = 5000) -> float:
    "Return how often ranks that are dealt anew within each kind of layer are at least as well in order: a p-value."
    rng, kinds, names = np.random.default_rng(0), {}, list(pairs[0][1])
    for i, name in enumerate(names):
        kinds.setdefault(name.rpartition(".")[2], []).append(i)
    order = lambda ranks: stats.zscore(stats.rankdata([ranks[n] for n in names]))  # Spearman's is a product of these
    sides = [(order(estimated), order(planted)) for estimated, planted in pairs]
    found, dealt = sum(e @ p for e, p in sides), np.zeros(draws)
    for e, p in sides:
        for places in kinds.values():
            dealt += rng.permuted(np.tile(p[places], (draws, 1)), axis=1) @ e[places]
    return (1 + (dealt >= found - 1e-9).sum()) / (1 + draws)


def found_by(r: Results, scores, cell: str = "scores") -> str:
    "Return which scores put the layers into the order of the planted ranks, with p corrected for all scores (Holm)."
    pairs = {s: r.ranks(s, cell) for s in scores}
    p = dict(zip(scores, holm(np.array([by_chance(pairs[s]) for s in scores]))))
    mean = {s: np.mean([recovery(*pair)["spearman"] for pair in pairs[s]]) for s in scores}
    good = sorted((s for s in scores if p[s] < 0.05), key=lambda s: -mean[s])
    return ", ".join(f"{WORDS[s]} ({mean[s]:+.2f}, p = {p[s]:.2g})" for s in good) or "no score"


def answer(r: Results, smallest: float) -> list[str]:
    "Return the sentences that answer first: does the oracle win, who comes near, and who finds the ranks?"
    gap, even = interval(oracle := r.less("oracle", "uniform")), f"rank {r.uniform} everywhere"
    if gap[2] < 0:
        lines = [
            f"**By the plan, knowing the ranks pays.** At equal parameters the planted ranks leave {-gap[0]:.0f} % less divergence than {even}."
        ]
    elif gap[1] > -smallest:
        lines = [
            f"**By the plan, not even the true ranks pay**: a gain of {smallest:g} % or more over {even} lies outside the interval."
        ]
    else:
        lines = [
            f"**By the plan, undecided**: the planted ranks are not shown to beat {even}, and a gain that matters is not excluded."
        ]
    p = dict(zip(SCORES, holm(np.array([stats.ttest_1samp(r.less(s, "uniform"), 0).pvalue for s in SCORES]))))
    beats = [WORDS[s] for s in SCORES if p[s] < 0.05 and np.mean(r.less(s, "uniform")) < 0]
    lines.append(
        f"Corrected for {len(SCORES)} scores (Holm), {', '.join(beats) or 'no score'} beats {even}. In the order of the planted ranks (Spearman's correlation; p by dealing the ranks anew within each kind of layer, corrected too): {found_by(r, SCORES)}."
    )
    lines.append(
        f"With {len(r.cells)} plantings, the difference between oracle and uniform would be shown with 80 % power from {detectable(oracle):.1f} % on; {smallest:g} % were named beforehand as the smallest that matters."
    )
    return lines


LATER = ("oracle", "slow hessian", "slow curvature", "slow singular")  # trained on all plantings, beside uniform ranks
FROM_SLOW = ("singular", "curvature", "hessian", "gate")  # scores of the wide student


def later_rows(r: Results) -> str:
    "Return the table of students at the budget whose ranks come from a wide student at half the rate."
    rows = []
    for what in LATER:
        row = {"ranks from": WORDS[what.removeprefix("slow ")], "left, %": f"{r.left(f'fit {what}').mean():.1f}"}
        row["against uniform, %"] = spelled(found := r.less(what, "uniform"))
        row["would be shown from, %"] = f"{detectable(found):.1f}"
        if what == "oracle":
            row["against own shuffle, %"] = spelled(r.less(what, f"{what}, shuffled"))
        rows.append(row)
    rows.append({"ranks from": "the same rank everywhere", "left, %": f"{r.left('fit uniform').mean():.1f}"})
    rows.append({"ranks from": "the wide student, at half the rate", "left, %": f"{r.left('slow wide').mean():.1f}"})
    return table(rows, list(rows[0]))


def later_answer(r: Results, plan: dict) -> list[str]:
    "Return what the later plantings say, in sentences."
    total, smallest = len(plan["seeds"]) + len(plan["more"]["seeds"]), plan["smallest_difference"]
    mean, low, high = interval(r.less("oracle", "uniform"))
    new = [x for seed, x in zip(r.cells, r.less("oracle", "uniform")) if seed not in plan["seeds"]]
    if len(r.cells) < total:
        verdict = f"Under way: {len(r.cells)} of {total} plantings, and no verdict before the last."
    elif high < 0 and low > -smallest:
        verdict = (
            f"The true ranks help at this rate, by less than the {smallest:g} % that were named as worth a search."
        )
    elif high < 0:
        verdict = f"The true ranks help at this rate; whether by the {smallest:g} % that were named as worth a search is open."
    elif low > -smallest:
        verdict = f"A gain of {smallest:g} % or more is excluded."
    else:
        verdict = "The question stays open."
    alone = f" (on the {len(new)} new ones alone by {spelled(new)})" if len(new) > 1 else ""
    return [
        f"**After the plan, on {len(r.cells)} plantings**: against rank {r.uniform} everywhere, the true ranks change the divergence that is left by {mean:+.1f} % [{low:+.1f}, {high:+.1f}]{alone}. {verdict} Scores of a wide student at half the rate, in the order of the planted ranks: {found_by(r, FROM_SLOW, 'slow scores')}."
    ]


def paired_rows(r: Results) -> str:
    "Return the table of rank correlations of both wide students, on the plan's plantings."
    mean = lambda s, cell: np.mean([recovery(*pair)["spearman"] for pair in r.ranks(s, cell)])
    rows = [
        {
            "score": WORDS[s],
            "at the plan's rate": f"{mean(s, 'scores'):+.2f}",
            "at half of it": f"{mean(s, 'slow scores'):+.2f}",
        }
        for s in FROM_SLOW
    ]
    return table(rows, list(rows[0]))


def later_part(r: Results, plan: dict) -> list[str]:
    "Return the section on what was done after the plan."
    first = Results({s: c for s, c in r.cells.items() if s in plan["seeds"]}, plan, r.chosen)
    return [
        "## After the plan: a better wide student, and more plantings",
        f"The wide student of the plan was trained at {r.chosen['rate']:g}, which is too high for its rank. Here it has {plan['more']['slow']:g}, and its scores are those of that student. Students at the budget have the plan's rate. n: {len(r.cells)} plantings, of which the first {len(plan['seeds'])} are the plan's. None of this was planned, plantings were added after the first had been looked at, and intervals are not corrected.",
        later_rows(r),
        recovery_rows(r, FROM_SLOW, "slow scores"),
        f"A better student does not give better scores. Spearman's correlation on the plan's {len(first.cells)} plantings, for both wide students:",
        paired_rows(first),
    ]


def trained_figure(r: Results, path: Path):
    "Draw what every candidate leaves, a point per planting, and its shuffle."
    fig, ax = plt.subplots(figsize=(6.4, 3.4), dpi=110, layout="constrained")
    for y, what in enumerate(reversed(WORDS)):
        for cell, color, shift, label in (("", "C0", 0.12, "ranks"), (", shuffled", "0.6", -0.12, "their shuffle")):
            if f"fit {what}{cell}" in next(iter(r.cells.values())):
                x = r.left(f"fit {what}{cell}")
                ax.plot(x, [y + shift] * len(x), "o", ms=4, color=color, label=label if what == "oracle" else None)
    ax.axvline(r.left("fit uniform").mean(), color="0.8", zorder=0)
    ax.set_yticks(range(len(WORDS)), [WORDS[w] for w in reversed(WORDS)], fontsize=8)
    ax.set(xlabel="divergence left, % of the untrained model's", xlim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def ranks_figure(r: Results, path: Path):
    "Draw estimated against planted ranks, a panel a score."
    fig, axes = plt.subplots(2, 4, figsize=(8, 4.2), dpi=110, sharex=True, sharey=True, layout="constrained")
    rng = np.random.default_rng(0)
    for ax, score in zip(axes.flat, SCORES):
        pairs = [(p[n], e[n]) for e, p in r.ranks(score) for n in p]
        x, y = np.array(pairs).T
        ax.plot([0, 8], [0, 8], color="0.8", zorder=0)
        ax.plot(x + rng.uniform(-0.3, 0.3, len(x)), y + rng.uniform(-0.2, 0.2, len(y)), ".", ms=4, alpha=0.6)
        ax.set_title(score, fontsize=9)
        ax.set_xticks(sorted(set(x.tolist())))
    axes.flat[-1].axis("off")
    fig.supxlabel("planted rank", fontsize=9)
    fig.supylabel("estimated rank", fontsize=9)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def write_page(plan: dict, out: Path, here: Path, chosen: dict):
    "Write report.md and its figures; RuntimeError without two complete plantings."
    cells = read(out, plan["seeds"], WHOLE)
    needed = {"planting", "slow wide", "slow scores"} | {f"fit {what}" for what in plan["more"]["candidates"]}
    more = Results(read(out, [*plan["seeds"], *plan["more"]["seeds"]], needed), plan, chosen)
    if len(cells) < 2:
        raise RuntimeError(
            f"{out} holds {len(cells)} complete plantings; two are needed at least. Run planted.py run first"
        )
    r = Results(cells, plan, chosen)
    added = len(more.cells) > 1
    trained_figure(r, here / "trained.png")
    ranks_figure(r, here / "ranks.png")
    base = np.mean([c["planting"]["loss"] for c in cells.values()])
    worth = [w for c in cells.values() for w in c["planting"]["worth"].values()]
    hours = sum(cell["cpu_seconds"] for c in (cells | more.cells).values() for cell in c.values()) / 3600
    layers = len(next(iter(cells.values()))["planting"]["ranks"])
    parameters = next(iter(cells.values()))["fit oracle"]["parameters"]
    fits = [cell for c in (more.cells | cells).values() for name, cell in c.items() if name.startswith("fit ")]
    least = min(cell["parameters"] for cell in fits)
    tied = f" (the smallest of {chosen['equal']} that did equally well)" if chosen["equal"] > 1 else ""
    n = f"{len(cells)} plantings × {plan['held_out_items']} held-out texts"
    complete = (
        "" if len(cells) == len(plan["seeds"]) else f" **{len(cells)} of {len(plan['seeds'])} plantings are complete.**"
    )
    parts = [
        "# Planted ranks: is a known rank found, and does it help?",
        *answer(r, plan["smallest_difference"]),
        *(later_answer(more, plan) if added else []),
        "![Divergence left by each candidate and by its shuffle, a point per planting](trained.png)",
        f"*n: {n}.{complete} Left: a student's divergence from the teacher, in per cent of the untrained model's. Shuffle: the same ranks, dealt anew among the layers of a kind. Lines are means over plantings; intervals are 95 %, Student's t over plantings, which differ in directions, starts and nearly all texts.*",
        training_rows(r),
        "## Are the planted ranks found?",
        "Ranks from each score at the true budget, against the planted ones. AUC is the probability that a layer with an update gets more rank than one without (0.5 is chance; ties count half). Without the budget, the rank is the number of components that make up 99 % of the score, or of gates that stay open.",
        recovery_rows(r),
        "![Estimated against planted ranks, a panel a score](ranks.png)",
        *(later_part(more, plan) if added else []),
        "## What was done",
        f"{plan['method']} {layers} weights are adapted; the budget is {parameters:,} parameters, of which whole components fill {100 * least / parameters:.1f} % or more. The untrained model is {base:.3f} nats a token from the teacher; leaving one planted update out costs it {min(worth):.4f} to {max(worth):.4f} nats (median {np.median(worth):.4f}). At the pilot's planting, the learning rate {chosen['rate']:g} and the price {chosen['price']:g} of a gate were chosen{tied}. All cells took {hours:.1f} hours of one core.",
        "## Doubts",
        "\n".join(f"- {d}" for d in plan["doubts"]),
        "---\n\nThe plan, with its question, primary metric and sizes, is [plan.toml](plan.toml). It was committed before the first run (09ee7e4) up to `doubts`; `[more]` and the doubts were written later. Measured by `python -m reports.planted.planted run reports/planted/cells`; `python -m reports.planted.planted report reports/planted/cells` makes this page again.",
    ]
    write_text(here / "report.md", "\n\n".join(parts) + "\n")
