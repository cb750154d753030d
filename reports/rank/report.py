"Writes reports/rank/report.md and its figures from what rank.py left there."

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from benchmarks.common import table, write_text
from dora_nb.results.intervals import mean_interval
from dora_nb.results.labels import task_label
from reports.rank.factors import off
from reports.rank.rank import CUTS, NARROW, WIDE

HERE = Path(__file__).parent
WORDS = {
    "wide": f"rank {WIDE} everywhere ({WIDE // NARROW}× the parameters)",
    "uniform": f"rank {NARROW} everywhere",
    "curvature": "ranks from curvature (σ̃², after a warm-up)",
    "curvature, shuffled": "the same ranks, shuffled within q and within v",
    "singular": "ranks from plain singular values (after a warm-up)",
    "gradient": "ranks from the gradient's singular values (before training)",
    "activation": "ranks from the inputs' explained variance (EVA-like, before training)",
}


def read(path):
    return {json.dumps(r["key"]): r for r in map(json.loads, path.read_text().splitlines())}


def paired(a, b):
    "Mean difference a − b over items (rows are seeds) and its 95 % interval, over seeds and items."
    d = np.asarray(a) - np.asarray(b)
    return d.mean(), *mean_interval(d)[:2]


def interval(value, low, high, spec="+.4f", factor=1.0):
    return f"{factor * value:{spec}} [{factor * low:{spec}}, {factor * high:{spec}}]"


def collected(data):
    "Losses and right answers by candidate: (seeds, items) each."
    found = {}
    for r in data.values():
        if r["key"][0] == "anew":
            found.setdefault(r["key"][1], []).append(r)
        elif r["key"][0] == "at the rate of curvature":
            found.setdefault(f"same rate: {r['key'][1]}", []).append(r)
        elif r["key"][0] == "cuts":
            for name in CUTS:
                found.setdefault(f"cut: {name}", []).append(r[name])
        elif r["key"][0] == "gates":
            found.setdefault(f"gates, price {r['key'][1]:g}", []).append(r)
    return {k: (np.array([r["losses"] for r in v]), np.array([r["right"] for r in v])) for k, v in found.items()}


def rows_of(found, names, base, rates=None):
    "A row per candidate, with its paired differences from `base`."
    rows = []
    for name, words in names.items():
        if name not in found:
            continue
        losses, right = found[name]
        row = {
            "candidate": words,
            "seeds": len(losses),
            "loss, nats a token": f"{losses.mean():.4f}",
            "accuracy": f"{100 * right.mean():.1f} %",
        }
        if rates:
            row["rate"] = f"{rates[name]:g}"
        if name != base:
            row |= {"loss − uniform": interval(*paired(losses, found[base][0]))}
            row |= {"accuracy − uniform, points": interval(*paired(right, found[base][1]), "+.1f", 100)}
        rows.append(row)
    columns = list(dict.fromkeys(k for r in rows for k in r))
    return table(rows, columns)


PAIRS = [
    ("curvature", "curvature, shuffled"),
    ("curvature", "same rate: curvature, shuffled"),
    ("curvature", "same rate: uniform"),
    ("curvature", "singular"),
    ("curvature", "gradient"),
    ("gradient", "same rate: uniform"),
]
CUT_PAIRS = [
    ("cut: curvature", "wide"),
    ("cut: curvature", "uniform"),
    ("cut: curvature", "same rate: uniform"),
    ("cut: curvature", "cut: singular"),
    ("cut: curvature", "cut: singular, uniform"),
    ("cut: curvature", "cut: fisher"),
    ("cut: curvature", "cut: gate"),
]


def differences(found, pairs):
    "A row per pair of candidates: the paired difference of their losses."
    rows = [
        {"A": a, "B": b, "loss of A − loss of B": interval(*paired(found[a][0], found[b][0]))}
        for a, b in pairs
        if a in found and b in found
    ]
    return table(rows, list(rows[0]))


def by_rate(tries):
    "What dev said, a row per candidate."
    rates = sorted({r for v in tries.values() for r in v})
    rows = [{"candidate": WORDS[k]} | {f"{r:g}": f"{v[r]:.4f}" for r in rates if r in v} for k, v in tries.items()]
    return table(rows, ["candidate", *(f"{r:g}" for r in rates)])


def spearman(x, y, draws=2000):
    "Rank correlation and a bootstrap interval over layers."
    x, y, rng = np.asarray(x), np.asarray(y), np.random.default_rng(0)
    picks = [rng.integers(len(x), size=len(x)) for _ in range(draws)]
    values = [stats.spearmanr(x[i], y[i]).statistic for i in picks]
    return stats.spearmanr(x, y).statistic, *np.nanquantile(values, [0.025, 0.975])


def usefulness(data, base):
    "How well each score tells what a layer's adapter brings alone."
    layers = data['["layers"]']
    names = [r["key"][1] for r in data.values() if r["key"][0] == "alone"]
    gain = [base - data[json.dumps(["alone", n])]["loss"] for n in names]
    rows = []
    scores = {s: layers[f"{s}, text 7"] for s in ("curvature", "singular", "gate", "fisher")}
    for score, values in (scores | {s: layers[s] for s in ("gradient", "activation")}).items():
        row = {"score": score, "all layers": interval(*spearman([values[n] for n in names], gain), "+.2f")}
        for kind in ("q_proj", "v_proj"):
            here = [i for i, n in enumerate(names) if n.endswith(kind)]
            row[kind] = interval(*spearman([values[names[i]] for i in here], [gain[i] for i in here]), "+.2f")
        rows.append(row)
    return table(rows, list(rows[0])), names, gain


def stability(layers):
    "Agreement of ranks and scores between two disjoint texts."
    rows = []
    for score in ("curvature", "singular", "gate", "fisher"):
        a, b = layers[f"{score} ranks, text 7"], layers[f"{score} ranks, text 8"]
        same = np.mean([a[n] == b[n] for n in a])
        rows.append(
            {
                "score": score,
                "Spearman of ranks": interval(*spearman([a[n] for n in a], [b[n] for n in a]), "+.2f"),
                "layers with the same rank": f"{same:.0%}",
            }
        )
    return table(rows, list(rows[0]))


def figure(layers, path):
    "Predicted and actual change of the loss when a layer is cut."
    names = list(layers["predicted"])
    x, y = ([layers[k][n] for n in names] for k in ("predicted", "actual"))
    fig, ax = plt.subplots(figsize=(4.6, 3), dpi=110)
    for kind, color in (("q_proj", "C0"), ("v_proj", "C1")):
        here = [i for i, n in enumerate(names) if n.endswith(kind)]
        ax.plot([x[i] for i in here], [1e3 * y[i] for i in here], "o", ms=4, color=color, label=kind)
    ends = sorted(x)[:: len(x) - 1]
    ax.plot(ends, [1e3 * e for e in ends], ":", color="0.6", label="as predicted")
    ax.set(xscale="log", xlabel="predicted: Σ σ̃²/2 of what is dropped, nats", ylabel="actual change, 10⁻³ nats")
    ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, metadata={"Software": None})


def page(method, data):
    "The report on one method."
    found, o = collected(data), data['["options"]']["options"]
    base = data['["base"]']
    tries = {}
    for r in data.values():
        if r["key"][0] == "dev":
            tries.setdefault(r["key"][1], {})[r["key"][2]] = r["loss"]
    rates = {k: min(v, key=v.get) for k, v in tries.items()}
    layers = data['["layers"]']
    figure(layers, HERE / f"predicted-{method}.png")
    gates = {n: f"train with gates, then keep the widest ({n.split(', ')[1]})" for n in found if n.startswith("gates")}
    cuts = {f"cut: {n}": f"train at rank {WIDE}, then cut: {n}" for n in CUTS}
    useful, names, gain = usefulness(data, base["loss_dev"])
    where = data['["options"]']["machine"]
    return [
        f"# Ranks for {'LoRA' if method == 'lora' else 'DoRA'}: does curvature know?",
        f"**Scale: small.** {where['count']} {where['unit']} of {where['device']}. SmolLM2-135M-Instruct, BoolQ passages and questions cut to {o['tokens']} tokens, cross-entropy of every token (objective `prompt`); adapters on q and v of all 30 layers, α = 2r; {o['steps']} steps of {o['batch']} items; {o['seeds']} seeds; {o['validation']} validation items. Every candidate's learning rate was chosen among {o['rates']} on {o['dev']} dev items with the first seed. Scores are from {o['probe']} training items that were not trained on. Intervals are 95 %, with seeds and items as random (chapter intervals); those of Spearman's correlations are bootstrapped over layers.",
        f"Untrained: loss {base['loss']:.4f} nats a token, accuracy {100 * base['accuracy']:.1f} % (choices, on the same cut text).",
        "## Ranks for training anew, at equal parameters",
        rows_of(found, WORDS, "uniform", rates),
        f"The warm-up that curvature and singular values need ({o['warmup']} steps at rank {WIDE}) comes on top of the {o['steps']} steps; it is not counted against them.",
        "Is it the ranks, or the rate that dev chose? Paired differences; *same rate* is training anew at the rate that dev chose for curvature's ranks:",
        differences(found, PAIRS),
        "The loss on dev by learning rate, first seed:",
        by_rate(tries),
        f"## Train wide, then cut to the same size (rank {NARROW} on average)",
        rows_of(found, {"uniform": f"train at rank {NARROW} (as above)"} | cuts | gates, "uniform"),
        differences(found, CUT_PAIRS),
        "## What a layer is worth by itself, and who knows it",
        f"{len(names)} of the {len(layers['predicted'])} adapted layers, drawn at random, were adapted alone ({o['alone']} steps, rank {NARROW}); each brought between {min(gain):+.3f} and {max(gain):+.3f} nats on dev. Spearman's correlation of that with each score, with a bootstrap interval over layers:",
        useful,
        "## Is a score the same on other text?",
        stability(layers),
        "## Predicted and actual cost of a cut",
        f"One layer at a time of a warmed-up adapter, cut from {WIDE} to {NARROW} components. Spearman {interval(*spearman([layers['predicted'][n] for n in layers['predicted']], [layers['actual'][n] for n in layers['predicted']]), '+.2f')}; the sum of all predictions is {sum(layers['predicted'].values()):.4f}, of all actual changes {sum(layers['actual'].values()):.4f} nats.",
        f"![Predicted and actual change of the loss](predicted-{method}.png)",
    ]


def factors(path):
    "How far Kronecker factors are off."
    found = json.loads(path.read_text())
    rows, o, where = found["rows"], found["options"], found["machine"]
    shown = [{k: v if k == "layer" else f"{v:.1e}" for k, v in r.items()} for r in rows]
    said = "{:.2f} of the exact sum, a layer off by a factor of {:.1f} in the median, Spearman {:.2f}"
    by = {kind: said.format(*off(rows, kind)) for kind in ("factors", "unscaled")}
    return [
        "## How far off are Kronecker factors?",
        f"What a layer's update is worth in the local model of the loss, ½ ΔW·G·ΔW with its own Gauss-Newton matrix G, in nats: exactly, by Kronecker factors that were given G's trace (`update_metrics`), and by the factors as they come. LoRA of rank {o['rank']} after {o['train_items']} items of {task_label(o['task'])} in batches of 8, {o['items']} dev items, {len(rows)} layers; {where['count']} {where['unit']} of {where['device']}.",
        table(shown, found["columns"]),
        f"With the trace: {by['factors']}. Without: {by['unscaled']}. At layer 11's down projection the first token's input is 550 times as long as any other, and its gradient is not. What is above was measured on q and v, without the trace.",
    ]


def main():
    parts = []
    for path in sorted(HERE.glob("*.jsonl"), reverse=True):
        parts += page(path.stem, read(path))
    if (HERE / "factors.json").exists():
        parts += factors(HERE / "factors.json")
    if (HERE / "notes.md").exists():
        parts.insert(1, (HERE / "notes.md").read_text().strip())
    parts.append(
        "---\n\nMeasured by `python -m reports.rank.rank`, a line of JSON for each measurement beside this page, and `python -m reports.rank.factors --out reports/rank/factors.json`; `python -m reports.rank.report` makes the page again."
    )
    write_text(HERE / "report.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
