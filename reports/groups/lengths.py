"How the choices of a task differ in length, what length alone tells of the answer, and what the base model makes of it on dev."

import argparse
import json

import numpy as np

from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.training.evaluate import rank_choices, wilson

TASKS = ("hellaswag", "piqa", "social_iqa", "arc_easy", "arc_challenge", "openbookqa")  # whose choices are texts


def guesses(items):
    "Return the lengths of the choices in characters, and how often the shortest and the longest one is right, ties shared."
    lengths = [[len(c.strip()) for c in item["continuations"]] for item in items]
    rate = lambda of: float(np.mean([(of(n) == n[i["gold"]]) / n.count(of(n)) for n, i in zip(lengths, items)]))
    return lengths, {"shortest is right": rate(min), "longest is right": rate(max)}


def base(items, lengths):
    "Return what the base model answers: accuracy by sums and per character, and how often it takes the shortest choice."
    model, tokenizer = load_model("smollm2-135m-instruct")
    _, records = rank_choices(model, tokenizer, items, progress=False)
    n, found = len(records), {}
    by_item = {item["doc_index"]: k for item, k in zip(items, lengths)}
    for metric, answer in (("acc", "pred"), ("acc_norm", "pred_norm")):
        right = sum(r[answer] == r["gold"] for r in records)
        chosen = [by_item[r["doc_index"]][r[answer]] for r in records]
        shortest = [c == min(by_item[r["doc_index"]]) for c, r in zip(chosen, records)]
        longest = [c == max(by_item[r["doc_index"]]) for c, r in zip(chosen, records)]
        found[metric] = {"accuracy": right / n, "interval": wilson(right, n)}
        found[metric] |= {"takes the shortest": float(np.mean(shortest)), "takes the longest": float(np.mean(longest))}
    return {"n": n} | found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--items", type=int, default=500, help="of dev, for the base model")
    options = parser.parse_args()
    for task in options.tasks.split(","):
        lengths, alone = guesses(load_task(task, "train").to_list())
        ratios = [max(n) / min(n) for n in lengths]
        row = {"task": task, "train": len(lengths), "longest/shortest": float(np.median(ratios))}
        row |= {"chance": float(np.mean([1 / len(n) for n in lengths]))} | alone
        items = load_task(task, "dev", limit=options.items).to_list()
        print(json.dumps(row | {"dev": base(items, guesses(items)[0])}), flush=True)


if __name__ == "__main__":
    main()
