"Writes reports/speed/report.md and its figure from what the benchmarks left beside it (--out reports/speed/NAME.json)."

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import PACKAGES, table, write_text

HERE = Path(__file__).parents[2] / "reports" / "speed"
TITLES = {
    "step": "Forward and backward of a Llama-shaped model",
    "peers": "DoRA layers of several libraries",
    "where": "Where the time of a step goes",
    "roofline": "The useful arithmetic, as a share of what the machine can do",
    "compile": "Under torch.compile",
    "memory": "What is kept for the backward pass, and the peak",
    "train": "Training on real items",
    "evaluate": "Evaluation on real items",
    "inference": "Unmerged inference",
    "scales": "What computing DoRA's scale in every pass costs",
    "growth": "How the cost of one layer grows",
    "curvature": "Products with second derivatives",
}

SHAPES = {"small": "of SmolLM2-135M's width", "large": "of LLaMA-7B's width"}


def first(cell):
    "The number that a cell starts with."
    return float(str(cell).split()[0])


def worst(rows, column, most=max, **where):
    "The worst value of a column among the rows that match, or None."
    values = [first(r[column]) for r in rows if column in r and all(r[k] == v for k, v in where.items())]
    return most(values) if values else None


def curvature_targets(data):
    "The same for products with second derivatives."
    rows, aims = data["rows"], []
    for method, most in (("lora", 2.6), ("dora", 3.0)):
        time = worst(rows, "time / gradient", method=method, what="Hessian product")
        aims.append((f"curvature: Hessian product / gradient, time, {method}", "≤", most, time))
    kept = worst(rows, "time / gradient", method="lora", what="Hessian product, graph kept")
    aims.append(("curvature: Hessian product / gradient, time, graph kept, lora", "≤", 1.9, kept))
    memory = worst(rows, "peak memory / gradient", method="lora", what="Hessian product")
    aims.append(("curvature: Hessian product / gradient, memory, lora", "≤", 1.8, memory))
    ggn = worst(rows, "time / curvlinops", what="GGN product")
    aims.append(("curvature: GGN product / curvlinops's, time, worst row", "≤", 1.0, ggn))
    by = {(r["method"], r["by"]): sum(r["products, by start"]) for r in next(iter(data["tables"].values()), [])}
    got = max((by[m, "ours"] / n for (m, who), n in by.items() if who == "scipy's eigsh"), default=None)
    aims.append(("curvature: products for the top ten at 1e-3, ours / scipy's, worst row", "≤", 1.0, got))
    return aims


def targets(data):
    "What was aimed for, what was measured, and whether that is enough."
    rows = {name: data[name]["rows"] if name in data else [] for name in TITLES}
    step, train, evaluate, inference = (rows[name] for name in ("step", "train", "evaluate", "inference"))
    still = dict(dropout=0.0, checkpointing="no")
    aims = []
    for dtype, most in (("float32", 1.10), ("bfloat16", 1.15)):
        for rank in sorted({r["rank"] for r in step}):
            where = still | dict(dtype=dtype, rank=rank)
            aims.append(
                (
                    f"step: our DoRA / frozen, {dtype}, rank {rank}, no dropout",
                    "≤",
                    most,
                    worst(step, "our DoRA / frozen", **where),
                )
            )
    aims += [
        ("step: our DoRA / frozen, all rows (dropout, checkpointing)", "≤", 1.15, worst(step, "our DoRA / frozen")),
        ("step: our DoRA / PEFT LoRA, worst row", "≤", 1.00, worst(step, "our DoRA / PEFT LoRA")),
        ("step: PEFT DoRA / our DoRA, worst row", "≥", 1.20, worst(step, "PEFT DoRA / ours", min)),
        (
            "memory: our DoRA keeps more than our LoRA by, MiB a layer",
            "≤",
            0.1,
            worst(rows["memory"], "our DoRA − our LoRA, kept"),
        ),
    ]
    for objective in ("answer", "choices"):
        aims.append(
            (
                f"train: Trainer + PEFT DoRA / ours, objective {objective}, worst row",
                "≥",
                1.8,
                worst(train, "Trainer+PEFT DoRA / ours", min, objective=objective),
            )
        )
    for task, least in (("hellaswag", 1.9), ("winogrande", 2.0), ("boolq", 1.25)):
        aims.append(
            (
                f"evaluate: lm-eval / ours, {task}, float32",
                "≥",
                least,
                worst(evaluate, "lm-eval / ours", min, task=task, dtype="float32"),
            )
        )
    for work in dict.fromkeys(r["work"] for r in inference):
        aims.append(
            (
                f"inference: our DoRA, cached / base, {work}, worst row",
                "≤",
                1.10,
                worst(inference, "our DoRA, cached / base", work=work),
            )
        )
        aims.append(
            (
                f"inference: our DoRA, cached / our LoRA, {work}, worst row",
                "≤",
                1.03,
                worst(inference, "our DoRA, cached / our LoRA", work=work),
            )
        )
    aims += curvature_targets(data["curvature"] if "curvature" in data else {"rows": [], "tables": {}})
    met = lambda sign, aim, got: (
        "not measured" if got is None else "yes" if (got <= aim if sign == "≤" else got >= aim) else "**no**"
    )
    return [
        {
            "what": what,
            "target": f"{sign} {aim:.2f}",
            "measured": "" if got is None else f"{got:.2f}",
            "met": met(sign, aim, got),
        }
        for what, sign, aim, got in aims
    ]


def figure(rows, path):
    "Cost over the frozen layer's against tokens, rank and width."
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), dpi=110, sharey=True)
    names = ["PEFT LoRA", "PEFT DoRA", "our DoRA"]
    for ax, varies in zip(axes, ("tokens", "rank", "width")):
        for dtype, style in (("float32", "-"), ("bfloat16", ":")):
            points = [r for r in rows if r["varies"] == varies and r["dtype"] == dtype]
            for name, color in zip(names, ("C7", "C3", "C0")):
                ax.plot(
                    [r[varies] for r in points],
                    [float(r[f"{name} / frozen"]) for r in points],
                    style,
                    color=color,
                    label=f"{name}, {dtype}",
                )
        fixed = {k: points[0][k] for k in ("tokens", "rank", "width") if k != varies}
        ax.set(xscale="log", yscale="log", xlabel=f"{varies}  ({', '.join(f'{k} {v:,}' for k, v in fixed.items())})")
        ax.set_xticks([r[varies] for r in points], [f"{r[varies]:,}" for r in points], fontsize=7)
        ax.set_yticks([1, 1.5, 2, 3, 4, 6], ["1", "1.5", "2", "3", "4", "6"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("time over the frozen layer's")
    axes[-1].legend(frameon=False, fontsize=7)
    fig.tight_layout()
    fig.subplots_adjust(top=0.95)  # away from half a pixel, which machines round differently
    fig.savefig(path, metadata={"Software": None})


def section(data, where):
    "How a benchmark was called, on what and at which revision if not as the page names them, and its tables."
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in data["options"].items() if v not in (None, ""))
    parts = [f"`python -m benchmarks.speed.{data['name'].removesuffix('.py')} {options}`"]
    own = data["machine"]
    if (own["count"], own["device"]) != (where["count"], where["device"]):
        parts[0] += f", on {own['count']} {own['unit'][: -1 if own['count'] == 1 else None]} of {own['device']}"
    if own.get("revision") != where.get("revision"):
        parts[0] += f", at revision {own['revision']}" if own.get("revision") else ", at an earlier revision"
    parts.append(table(data["rows"], data["columns"]))
    for heading, rows in data.get("tables", {}).items():
        parts += [f"### {heading}", table(rows, list(dict.fromkeys(k for r in rows for k in r)))]
    return parts


def on_a_gpu():
    "What was measured on a GPU (--out reports/speed/NAME-gpu-SHAPE.json)."
    found = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*-gpu-*.json"), reverse=True)}
    if not found:
        return []
    parts = ["## On a GPU", (HERE / "notes-gpu.md").read_text().strip()]
    for name, data in found.items():
        (kind, _, shape), where = name.split("-"), data["machine"]
        packages = ", ".join(f"{p} {where[p]}" for p in PACKAGES if p in where)
        parts += [f"### {TITLES[kind]}, {SHAPES[shape]}", f"{where['device']}, {packages}.", *section(data, where)]
    return parts


def main():
    data = {
        name: json.loads((HERE / f"{name}.json").read_text()) for name in TITLES if (HERE / f"{name}.json").exists()
    }
    where = data["step"]["machine"]
    packages = ", ".join(f"{p} {where[p]}" for p in PACKAGES)
    at = f" at revision {where['revision']}" if where.get("revision") else ""
    figure(data["growth"]["rows"], HERE / "growth.png")
    parts = [
        "# Speed",
        f"Measured{at} on {where['count']} {where['unit']} of {where['device']} with {packages}. What was measured on a GPU stands at the end; the rest, and the table of targets, are of this CPU.",
        "Every table compares candidates that took turns, round by round, in one process, and gives the median over the rounds of their ratio in time (in brackets its quartiles). Timings here are noisy: two runs of one table differ by some 3 %.",
        "## Targets",
        table(targets(data), ["what", "target", "measured", "met"]),
        (HERE / "notes.md").read_text().strip(),
    ]
    for name, title in TITLES.items():
        if name not in data:
            continue
        parts += [f"## {title}", *section(data[name], where)]
        if name == "growth":
            parts.append("![Cost of one layer against tokens, rank and width](growth.png)")
    parts += on_a_gpu()
    write_text(HERE / "report.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
