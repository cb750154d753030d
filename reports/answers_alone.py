"What of a task is in the answers' style: a classifier that reads every answer by itself and never the question."

import argparse
import json

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from dora_nb.data.tasks import load_task
from dora_nb.training.evaluate import wilson

TASKS = ("social_iqa", "hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa")  # whose choices are texts


def accuracy(model, words, items):
    "How many answers that look most like right ones are right, of how many."
    scores = iter(model.decision_function(words.transform([a for item in items for a in item["continuations"]])))
    found = [int(np.argmax([next(scores) for _ in item["continuations"]])) == item["gold"] for item in items]
    return sum(found), len(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--items", default="1000,all", help="of the train split")
    options = parser.parse_args()
    for task in options.tasks.split(","):
        for limit in options.items.split(","):
            train = load_task(task, "train", limit=None if limit == "all" else int(limit))
            words = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
            x = words.fit_transform([a for item in train for a in item["continuations"]])
            y = [i == item["gold"] for item in train for i in range(len(item["continuations"]))]
            model, row = LogisticRegression(max_iter=1000).fit(x, y), {"task": task, "items": len(train)}
            for split in ("dev", "validation"):
                right, n = accuracy(model, words, load_task(task, split))
                row[split] = {"n": n, "accuracy": right / n, "interval": wilson(right, n)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
