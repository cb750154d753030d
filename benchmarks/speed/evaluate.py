"Log-likelihoods of real items' choices: lm-evaluation-harness at the better of two batch sizes, ours."

import itertools
import logging
import statistics

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.common import DEVICE, arguments, finish, ratio, seconds
from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.training.evaluate import rank_choices

SIZES = (8, 32)  # rows a batch of lm-eval's


def requests(items):
    "Items as lm-eval asks about them."
    return [
        Instance("loglikelihood", {}, pair, k)
        for item in items
        for k, pair in enumerate(zip(item["contexts"], item["continuations"]))
    ]


def per_item(answers, items):
    "What lm-eval answered, as a list of log-likelihoods for every item."
    answers = iter(answers)
    return [[next(answers)[0] for _ in item["continuations"]] for item in items]


def compare(model, tokenizer, task, precision, rounds, n):
    "Times, largest difference of log-likelihoods, and how many items get the same prediction from all, of how many."
    # An autocast around lm-eval's call would not reach the model: it opens its own, disabled, unless told a dtype
    mixed = "bfloat16" if precision == "bfloat16" else None
    harnesses = {
        size: HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size, mixed_precision_dtype=mixed
        )
        for size in SIZES
    }
    names, largest, same, asked = ["ours", *SIZES], 0.0, 0, 0
    times = {name: [] for name in names}
    best = lambda scores: scores.index(max(scores))
    for i in range(-1, rounds):  # round -1 warms up, with few items
        items = load_task(task, "validation", limit=n if i >= 0 else min(n, 8), seed=max(i, 0))
        asks, scores = requests(items), {}

        def run(name):
            if name == "ours":
                _, records = rank_choices(model, tokenizer, items, precision=precision, progress=False)
                scores[name] = [r["loglikelihood"] for r in records]
            else:
                scores[name] = per_item(harnesses[name].loglikelihood(asks, disable_tqdm=True), items)

        for name in names[i % 3 :] + names[: i % 3]:
            took = seconds(lambda: run(name))
            if i >= 0:
                times[name].append(took)
        if i >= 0:
            largest = max(
                [largest]
                + [
                    abs(a - b)
                    for size in SIZES
                    for ours, theirs in zip(scores["ours"], scores[size])
                    for a, b in zip(ours, theirs)
                ]
            )
            same += sum(len(set(map(best, answers))) == 1 for answers in zip(*scores.values()))
            asked += len(items)
    return times, largest, same, asked


def main():
    options = arguments(__doc__, rounds=3, items=32, dtypes="float32,bfloat16", tasks="boolq,hellaswag,winogrande")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_model("smollm2-135m-instruct", device=DEVICE)
    rows = []
    for dtype, task in itertools.product(options.dtypes.split(","), options.tasks.split(",")):
        times, largest, same, asked = compare(model, tokenizer, task, dtype, options.rounds, options.items)
        size = min(SIZES, key=lambda s: statistics.median(times[s]))
        row = {"task": task, "dtype": dtype, "lm-eval's batch size": size}
        row["lm-eval / ours"] = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, size, "ours"))
        row["largest difference"] = f"{largest:.1e}"
        row["same predictions"] = f"{same} of {asked}"
        rows.append(row)
        print(
            row, "items/s:", {k: round(options.items / statistics.median(v), 2) for k, v in times.items()}, flush=True
        )
    finish("evaluate.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})
    worst = max((float(r["largest difference"]) for r in rows if r["dtype"] == "float32"), default=0.0)
    assert worst < 2e-3, f"log-likelihoods differ by {worst}"


if __name__ == "__main__":
    main()
