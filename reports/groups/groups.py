"What dev items share with train under each cut of dev, and whether that tells their answers: no model is trained."

import argparse
import json
import random
import re

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from dora_nb.data.assets import load_items
from dora_nb.data.tasks import TASKS, load_task

NEAR, GRAM, NEIGHBOURS = 0.8, 8, 3  # cosine of tf-idf; words in a row; train items that answer an item
HELD = 4_000  # validation items at most


def words(text):
    "Return a text's words, without case and punctuation."
    return re.findall(r"\w+", text.lower())


def shown(task, row):
    "Return what an item shows before its choices, and its choices."
    if task == "boolq":
        return f"{row['passage']} {row['question']}", ["no", "yes"]
    if task == "winogrande":
        return row["sentence"], [row["sentence"].replace("_", row[o]) for o in ("option1", "option2")]
    return row["query" if task == "hellaswag" else "question"], row["choices"]


class Split:
    "Hold the items of an official split: their texts, groups and grams."

    def __init__(self, task, split):
        self.rows = load_items(task, split).to_list()
        self.texts, self.choices = zip(*(shown(task, row) for row in self.rows))
        self.gold = [row["label"] for row in self.rows]
        self.choice_sets = [frozenset(" ".join(words(c)) for c in choices) for choices in self.choices]
        self.answers = [" ".join(words(c[g])) for c, g in zip(self.choices, self.gold)]
        self.grams = [{tuple(w[k : k + GRAM]) for k in range(len(w) - GRAM + 1)} for w in map(words, self.texts)]


def groups_of(task, *splits):
    "Return the group of every item of several splits: those of the task, or of equal questions if it has none."
    rows = [row for split in splits for row in split.rows]
    if not TASKS[task].groups:
        keys = {}
        return [keys.setdefault(" ".join(words(shown(task, row)[0])), len(keys)) for row in rows]
    return [g for _, g in sorted((i, g) for g, group in enumerate(TASKS[task].groups(rows)) for i in group)]


def shares(items, places, pool, train, group, pool_group, near):
    "Return how many items have a group, a near copy, words in a row, the same choices, or the same right answer in a pool."
    known = {
        "group": {pool_group[j] for j in pool},
        "grams": {g for j in pool for g in train.grams[j]},
        "choices": {train.choice_sets[j] for j in pool},
        "answer": {train.answers[j] for j in pool},
    }
    return {
        "n": len(places),
        "group": sum(group[i] in known["group"] for i in places),
        "near copy": int(sum(near)),
        f"{GRAM} words": sum(not known["grams"].isdisjoint(items.grams[i]) for i in places),
        "choices": sum(items.choice_sets[i] in known["choices"] for i in places),
        "right answer": sum(items.answers[i] in known["answer"] for i in places),
    }


class Neighbours:
    "Answer items from the train items that are most like them: by their right answers and their wrong ones."

    def __init__(self, task, train):
        self.task, self.train = task, train
        self.of_texts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
        self.texts = self.of_texts.fit_transform(train.texts)
        self.of_words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+").fit(
            [f"{t} {' '.join(c)}" for t, c in zip(train.texts, train.choices)]
        )

    def likeness(self, texts):
        "Return the cosines of some texts with all of train."
        return np.asarray((self.of_texts.transform(texts) @ self.texts.T).todense())

    def answer(self, choices, near):
        "Return the choice most like the right answers, and least like the wrong ones, of some train items."
        if self.task == "boolq":
            return int(2 * sum(self.train.gold[j] for j in near) >= len(near))
        right = [f"{self.train.texts[j]} {self.train.choices[j][self.train.gold[j]]}" for j in near]
        wrong = [c for j in near for k, c in enumerate(self.train.choices[j]) if k != self.train.gold[j]]
        of = self.of_words.transform
        likes = [np.asarray((of(choices) @ of(texts).T).todense()).max(1) for texts in (right, wrong)]
        return int(np.argmax(likes[0] - likes[1]))

    def right(self, items, places, pool, without=None):
        "Return whether each item is answered rightly from a pool, and its likeness to the pool; `without` leaves out train items of an item."
        out, found, near = np.setdiff1d(np.arange(len(self.train.rows)), pool), [], []
        for start in range(0, len(places), 200):
            some = places[start : start + 200]
            likeness = self.likeness([items.texts[i] for i in some])
            likeness[:, out] = -1
            for i, row in zip(some, likeness):
                if without:
                    row[without(i)] = -1
                near.append(row.max() >= NEAR)
                best = []
                for _ in range(NEIGHBOURS):
                    best.append(int(row.argmax()))
                    row[best[-1]] = -1
                found.append(self.answer(items.choices[i], best) == items.gold[i])
        return np.array(found), np.array(near)


def percent(right):
    "Return an accuracy and its number of items."
    return {"n": len(right), "accuracy": round(float(np.mean(right)), 4) if len(right) else None}


def measure(task):
    "Return what is shared, and what neighbours answer, for one task."
    train, held = Split(task, "train"), Split(task, "test" if "test" in TASKS[task].counts else "validation")
    cut = "test" not in TASKS[task].counts
    dev_items = train if cut else Split(task, "validation")
    groups = groups_of(task, train, held, *([] if cut else [dev_items]))
    of_train, of_held = groups[: len(train.rows)], groups[len(train.rows) :][: len(held.rows)]
    of_dev = of_train if cut else groups[-len(dev_items.rows) :]
    members = {}
    for i, g in enumerate(of_train):
        members.setdefault(g, []).append(i)
    neighbours = Neighbours(task, train)
    found = {"task": task, "train": len(train.rows)}
    for name in ("items", "groups") if cut else ("official",):
        load = lambda split: load_task(task, split, dev_cut="groups" if name == "official" else name)["doc_index"][:]
        pool, dev = np.array(load("train")), load("dev")
        known = {of_train[j] for j in pool}
        right, near = neighbours.right(dev_items, dev, pool)
        mates = np.array([of_dev[i] in known for i in dev])
        found[name] = shares(dev_items, dev, pool, train, of_dev, of_train, near)
        found[name]["answered"] = percent(right) | {"with": percent(right[mates]), "without": percent(right[~mates])}
        if mates.any():
            without = lambda i: members.get(of_dev[i], [])
            again, _ = neighbours.right(dev_items, [i for i, m in zip(dev, mates) if m], pool, without)
            found[name]["answered"]["with, if these are left out"] = percent(again)
    places, known = range(len(held.rows)), {of_train[j] for j in pool}
    places = sorted(random.Random(0).sample(places, min(HELD, len(places))))
    right, near = neighbours.right(held, places, pool)
    mates = np.array([of_held[i] in known for i in places])
    found["validation"] = shares(held, places, pool, train, of_held, of_train, near)
    found["validation"]["answered"] = percent(right) | {
        "with": percent(right[mates]),
        "without": percent(right[~mates]),
    }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tasks", default="boolq,hellaswag,winogrande,piqa,social_iqa,arc_easy,arc_challenge,openbookqa"
    )
    for task in parser.parse_args().tasks.split(","):
        print(json.dumps(measure(task)), flush=True)


if __name__ == "__main__":
    main()
