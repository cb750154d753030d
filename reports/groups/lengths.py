"How the choices of a task differ in length, what length alone tells of the answer, and what the base model makes of it on dev."

import argparse
import json
from pathlib import Path

import numpy as np

from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.results.stored import read_report
from dora_nb.training.evaluate import rank_choices, wilson

TASKS = ("hellaswag", "piqa", "social_iqa", "arc_easy", "arc_challenge", "openbookqa")  # whose choices are texts
STORED = {"hellaswag": "main/objective", "social_iqa": "geometry/medium"}


def guesses(items):
    "Return the lengths of the choices in characters, and how often the shortest and the longest one is right, ties shared."
    lengths = [[len(c.strip()) for c in item["continuations"]] for item in items]
    rate = lambda of: float(np.mean([(of(n) == n[i["gold"]]) / n.count(of(n)) for n, i in zip(lengths, items)]))
    return lengths, {"shortest is right": rate(min), "longest is right": rate(max)}


def stored(task):
    "Return the items of a stored report, with the base model's answers to them."
    found = read_report(Path(__file__).parents[1] / STORED[task])
    run = next(r for r in found.results if r["params"]["method"] == "base" and not r["params"].get("compress"))
    answers = found.predictions[found.predictions.run == run["run"]].to_dict("records")
    items = load_task(task, run["params"]["eval_split"], dev_cut="items").to_list()
    places = {item["doc_index"]: item for item in items}
    return run["params"]["eval_split"], [places[a["doc_index"]] for a in answers], answers


def answered(task, limit):
    "Return a split, some of its items, and the base model's answers: those of a stored report if there is one."
    if task in STORED:
        return stored(task)
    items = load_task(task, "dev", limit=limit).to_list()
    return "dev", items, rank_choices(*load_model("smollm2-135m-instruct"), items, progress=False)[1]


def base(items, answers):
    "Return what the base model answers: accuracy by sums and per character, and how often it takes the shortest choice."
    n, found, lengths = len(items), {}, guesses(items)[0]
    for metric, answer in (("acc", "pred"), ("acc_norm", "pred_norm")):
        right = sum(a[answer] == item["gold"] for a, item in zip(answers, items))
        chosen = [each[int(a[answer])] for a, each in zip(answers, lengths)]
        takes = lambda of: float(np.mean([c == of(each) for c, each in zip(chosen, lengths)]))
        found[metric] = {"accuracy": right / n, "interval": wilson(right, n)}
        found[metric] |= {"takes the shortest": takes(min), "takes the longest": takes(max)}
    return {"n": n} | found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--items", type=int, default=150, help="of dev, for the base model")
    options = parser.parse_args()
    for task in options.tasks.split(","):
        lengths, alone = guesses(load_task(task, "train").to_list())
        ratios = [max(n) / min(n) for n in lengths]
        row = {"task": task, "train": len(lengths), "longest/shortest": float(np.median(ratios))}
        row |= {"chance": float(np.mean([1 / len(n) for n in lengths]))} | alone
        split, items, answers = answered(task, options.items)
        print(json.dumps(row | {split: base(items, answers)}), flush=True)


if __name__ == "__main__":
    main()
