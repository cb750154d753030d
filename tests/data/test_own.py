"Files of one's own: every fault named by its line, the items that come of a file, its splits and identity, and whole runs."

import json
import math
import os
import re
import shutil

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dora_nb.command.main import main
from dora_nb.data.assets import load_model
from dora_nb.data.cache import FetchError
from dora_nb.data.own import is_own, own_digest, own_label, own_rows
from dora_nb.data.tasks import FORMATS, find_task, load_task, task_digest
from dora_nb.data.tokens import check_tokens
from dora_nb.results.collect import collect
from dora_nb.results.labels import parameters
from dora_nb.results.page import render
from dora_nb.results.questions import item_texts
from dora_nb.runs.config import RunConfig
from dora_nb.runs.grid import load_grid
from dora_nb.runs.identity import names_of, run_id, run_name, training_id
from dora_nb.runs.run import run
from dora_nb.training.evaluate import evaluate

CAPITALS = """prompt,choice1,choice2,choice3,answer
The capital of France is,Paris,Rome,Oslo,Paris
The capital of Norway is,Paris,Rome,Oslo,Oslo
The capital of Italy is,Paris,Rome,Oslo,Rome
"The capital, and the largest city, of Peru is",Lima,Quito,,Lima
"""
ITEM = {"prompt": "Is ice cold?", "choices": ["no", "yes"], "answer": 1}
PAIR = {"prompt": "Roses are", "completion": " red."}


@pytest.fixture
def write(tmp_path, monkeypatch):
    "Writes a file into the working directory, from text or from rows."
    monkeypatch.chdir(tmp_path)

    def make(name, content):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(content), name)
        else:
            lines = content if isinstance(content, str) else "\n".join(json.dumps(row) for row in content)
            open(name, "w", encoding="utf-8").write(lines)
        return name

    return make


# Faults

ROWS = [  # a row after a good one, and the reason
    (ITEM | {"answer": 2}, "its answer is 2, and choices are numbered from 0 to 1"),
    (ITEM | {"answer": -1}, "its answer is -1, and choices are numbered from 0 to 1"),
    (ITEM | {"answer": 5}, "its answer is 5, and choices are numbered from 0 to 1"),
    (ITEM | {"answer": "2"}, "its answer is 2, and choices are numbered from 0 to 1"),
    (ITEM | {"answer": "maybe"}, "its answer 'maybe' is none of its choices ('no', 'yes')"),
    (ITEM | {"answer": "Yes"}, "its answer 'Yes' is none of its choices ('no', 'yes')"),
    (ITEM | {"answer": None}, "its answer is missing"),
    (ITEM | {"answer": " "}, "its answer is missing"),
    (ITEM | {"answer": True}, "its answer is True, and must be a choice or its number"),
    (ITEM | {"answer": 1.0}, "its answer is 1.0, and must be a choice or its number"),
    (ITEM | {"answer": ["yes"]}, "its answer is ['yes'], and must be a choice or its number"),
    ({k: v for k, v in ITEM.items() if k != "answer"}, "its answer is missing"),
    (ITEM | {"choices": ["no", ""]}, "choice 1 is empty"),
    (ITEM | {"choices": [" \n", "yes"]}, "choice 0 is empty"),
    (ITEM | {"choices": ["no", None]}, "choice 1 is empty"),
    (ITEM | {"choices": ["yes"], "answer": 0}, "it has 1 choice, and at least 2 are needed"),
    (ITEM | {"choices": []}, "it has 0 choices, and at least 2 are needed"),
    (ITEM | {"choices": ["yes", "no", " yes"]}, "choices 0 and 2 are both 'yes'"),
    (
        ITEM | {"choices": "no, yes"},
        'its choices must be a JSON list, as in ["no", "yes"], or columns choice1, choice2, …',
    ),
    (ITEM | {"choices": [0, 1]}, "its choices must be a list of texts"),
    (ITEM | {"choices": {"a": "no"}}, "its choices must be a list of texts"),
    (ITEM | {"choices": None}, "its choices must be a list of texts"),
    (ITEM | {"prompt": ""}, "its prompt is missing or empty"),
    (ITEM | {"prompt": None}, "its prompt is missing or empty"),
    (ITEM | {"prompt": 7}, "its prompt is 7, and must be a text"),
    ({"choices": ["no", "yes"], "answer": 0}, "its prompt is missing or empty"),
]


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("row, reason", ROWS, ids=[reason[:40] for _, reason in ROWS])
def test_a_fault_is_named_by_its_line_and_reason(write, row, reason):
    reason = reason.replace('["no", "yes"]', '["yes", "no"]')
    with pytest.raises(ValueError) as error:
        load_task(write("data.jsonl", [ITEM, row]))
    assert str(error.value) == f"data.jsonl, line 2: {reason}"
    with pytest.raises(ValueError) as error:
        load_task(write("data.json", json.dumps([ITEM, ITEM, row])))
    assert str(error.value) == f"data.json, item 2: {reason}"


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("completion", (None, "", " \n", 3))
def test_a_completion_that_is_none(write, completion):
    "An empty one once ended in the advice to lower the learning rate."
    with pytest.raises(ValueError, match=r"^pairs.jsonl, line 2: its completion is (missing or empty|3, and must be)"):
        load_task(write("pairs.jsonl", [PAIR, PAIR | {"completion": completion}]))


def test_several_faults_are_told_at_once(write):
    bad = [ITEM | {"answer": 9}] * 5
    with pytest.raises(ValueError) as error:
        load_task(write("data.jsonl", [*bad, ITEM]))
    each = "its answer is 9, and choices are numbered from 0 to 1"
    assert str(error.value) == f"data.jsonl, line 1: {each}; line 2: {each}; line 3: {each}; and 2 more"


FILES = {  # name, content and the message
    "a comma without quotes": (
        "a.csv",
        "prompt,completion\none, two, three\n",
        "a.csv, line 2: 3 fields, and the header has 2; put a text that holds a comma or a line break in double quotes",
    ),
    "a line too short": (
        "a.csv",
        'prompt,completion\n"a\nb",c\nalone\n',
        "a.csv, line 4: 1 fields, and the header has 2",
    ),
    "a quote left open": ("a.csv", 'prompt,completion\n"a,b\n', "a.csv, line 2: not CSV: unexpected end of data"),
    "one column twice": ("a.csv", "prompt,prompt\na,b\n", "a.csv: two columns of the header are called 'prompt'"),
    "only a header": ("a.csv", "prompt,completion\n", "a.csv holds no items"),
    "nothing": ("a.csv", "", "a.csv holds no items"),
    "nothing in JSON": ("a.jsonl", "\n\n", "a.jsonl holds no items"),
    "half an object": ("a.jsonl", '{"prompt": "a"}\n{"prompt', "a.jsonl, line 2: not JSON: "),
    "a list in a line": ("a.jsonl", "[1]\n", "a.jsonl, line 1: a list, where an object is needed"),
    "an object alone": ("a.json", '{"prompt": "a"}', "a.json must hold a JSON list of objects; an object per line"),
    "lines in a .json": ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json: not JSON: Extra data"),
    "no parquet": ("a.parquet.csv", "", "a.parquet.csv holds no items"),
    "other columns": (
        "a.csv",
        "text,label\na,b\n",
        "a.csv, the columns are text, label, and must be prompt, choices (or choice1, choice2, …) and answer, or prompt and completion; `columns` names others",
    ),
    "both kinds": (
        "a.csv",
        "prompt,choices,answer,completion\na,b,c,d\n",
        "a.csv, the columns are prompt, choices, answer",
    ),
}


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("name, content, message", FILES.values(), ids=FILES.keys())
def test_a_file_that_cannot_be_read(write, name, content, message):
    with pytest.raises(ValueError) as error:
        load_task(write(name, content))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_files_that_are_not_there_or_of_another_kind(write):
    write("notes/readme.txt", "text")
    write("damaged.parquet", [PAIR])
    open("damaged.parquet", "w").write("PAR1 text")
    open("latin.csv", "wb").write("prompt,completion\na,\u00e9\n".encode("latin-1"))
    write("two/train.csv", CAPITALS), write("two/train.jsonl", [ITEM])
    for name, kind, message in (
        ("gone.csv", FileNotFoundError, "there is no file or folder gone.csv"),
        ("./gone", FileNotFoundError, "there is no file or folder ./gone"),
        ("a/b/c", FileNotFoundError, "there is no file or folder a/b/c"),
        ("notes/readme.txt", ValueError, "notes/readme.txt is of an unknown kind; give a file that ends in .jsonl"),
        ("./notes", ValueError, "./notes holds no file called train, validation or test that ends in .jsonl"),
        ("./two", ValueError, "./two holds several files of one split"),
        ("damaged.parquet", ValueError, "damaged.parquet is not a parquet file, or damaged: "),
        ("latin.csv", ValueError, "latin.csv is not UTF-8 text"),
        ("bolq", ValueError, "task 'bolq' does not exist; did you mean 'boolq'?"),
        ("notes", ValueError, "task 'notes' does not exist; choose one of boolq"),
    ):
        with pytest.raises(kind) as error:
            load_task(name)
        assert str(error.value).startswith(message)


TEMPLATES = [
    (dict(template="{qestion}?"), "template: there is no column 'qestion'; did you mean 'question'?"),
    (dict(template="Answer:"), "template='Answer:' names no column"),
    (dict(template="{}"), "template='{}': {} is not the name of a column"),
    (dict(template="{question.x}"), "template='{question.x}': {question.x} is not the name of a column"),
    (dict(template="{question!r}"), "template='{question!r}': {question} is not the name of a column"),
    (dict(template="{question"), "template='{question': expected '}'"),
    (dict(columns="answer"), "columns='answer': give each role one column"),
    (dict(columns="anser=label"), "columns='anser=label': there is no role 'anser'; did you mean 'answer'?"),
    (dict(columns="answer=label,answer=x"), "columns='answer=label,answer=x': give each role one column"),
    (
        dict(columns="answer=lable,prompt=question"),
        "columns: answer: there is no column 'lable'; did you mean 'label'?",
    ),
    (dict(columns="answer=label,prompt=question+id"), "columns: prompt is one column; a template joins several"),
]


@pytest.mark.parametrize("options, message", TEMPLATES, ids=str)
def test_impossible_templates_and_columns(write, options, message):
    name = write("data.csv", 'id,question,choices,label\n1,Is ice cold,"[""no"",""yes""]",1\n')
    with pytest.raises(ValueError) as error:
        load_task(name, **options)
    assert str(error.value).removeprefix("data.csv, ").startswith(message)


def test_a_template_is_for_files():
    with pytest.raises(ValueError, match="template and columns are for a file of your own, and boolq is a benchmark"):
        load_task("boolq", template="{passage}")
    with pytest.raises(ValueError, match="and boolq is a benchmark"):
        RunConfig(task="boolq", columns="answer=label")


# What comes of a file

FORMS = {
    "columns": ("a.csv", CAPITALS),
    "a JSON list": (
        "a.csv",
        "prompt,choices,answer\n"
        + "\n".join(
            f'"{p}","[{", ".join(f"""{chr(34) * 2}{c}{chr(34) * 2}""" for c in cs)}]",{k}'
            for p, cs, k in (
                ("The capital of France is", ("Paris", "Rome", "Oslo"), 0),
                ("The capital of Norway is", ("Paris", "Rome", "Oslo"), 2),
                ("The capital of Italy is", ("Paris", "Rome", "Oslo"), 1),
                ("The capital, and the largest city, of Peru is", ("Lima", "Quito"), 0),
            )
        ),
    ),
}


def test_a_choice_that_the_first_row_lacks(write):
    rows = [{"prompt": "a", "choice1": "x", "choice2": "y", "answer": 0}]
    rows += [{"prompt": "b", "choice1": "x", "choice2": "y", "choice3": "z", "answer": 2}]
    write("short.jsonl", rows)
    items = own_rows("short.jsonl")["train"]
    assert [item["choices"] for item in items] == [["x", "y"], ["x", "y", "z"]] and items[1]["label"] == 2


@pytest.mark.parametrize("form", (*FORMS, "jsonl", "json", "parquet", "mapped"))
def test_every_form_gives_the_same_items(write, form):
    name, content, options = (*FORMS.get(form, (f"a.{form}", None)), {})
    expected = [
        {
            "doc_index": i,
            "contexts": [prompt] * len(choices),
            "continuations": [f" {c}" for c in choices],
            "gold": gold,
        }
        for i, (prompt, choices, gold) in enumerate(
            [
                ("The capital of France is", ["Paris", "Rome", "Oslo"], 0),
                ("The capital of Norway is", ["Paris", "Rome", "Oslo"], 2),
                ("The capital of Italy is", ["Paris", "Rome", "Oslo"], 1),
                ("The capital, and the largest city, of Peru is", ["Lima", "Quito"], 0),
            ]
        )
    ]
    rows = [
        {"prompt": e["contexts"][0], "choices": [c[1:] for c in e["continuations"]], "answer": e["gold"]}
        for e in expected
    ]
    if form == "mapped":
        rows = [
            {
                "of": r["prompt"][15:-3],
                "first": r["choices"][0],
                "rest": r["choices"][1],
                "third": (r["choices"] + [None])[2],
                "y": r["choices"][r["answer"]],
            }
            for r in rows
        ]
        rows[3]["of"] = ", and the largest city, of Peru"[3:]
        options = dict(template="The capital of {of} is", columns="choices=first+rest+third, answer=y")
        name, content = "a.jsonl", rows
        expected[3]["contexts"] = ["The capital of " + rows[3]["of"] + " is"] * 2
    elif content is None:
        content = json.dumps(rows) if form == "json" else rows
    items = load_task(write(name, content), "all", **options)
    assert items.to_list() == expected


@pytest.mark.parametrize(
    "answers, gold",
    [
        (["1", "5"], [0, 1]),  # texts: 5 is not the number of a choice
        (["1", "0"], [1, 0]),  # numbers: 0 is not a choice
        ([0, 1], [0, 1]),
        ([1, 0], [1, 0]),
        (["5", 1], [1, 1]),
    ],
)
def test_texts_and_numbers(write, answers, gold):
    rows = [{"prompt": "a", "choices": ["1", "5"], "answer": a} for a in answers]
    assert load_task(write("a.jsonl", rows), "all")["gold"] == gold


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("answers", (["1", "1"], ["0", "2", "1"]))
def test_answers_that_could_be_either(write, answers):
    rows = [
        {"prompt": "a", "choices": ["0", "2", "1"] if len(answers) > 2 else ["1", "0"], "answer": a} for a in answers
    ]
    with pytest.raises(ValueError, match="a.jsonl, an answer is the text of a choice and the number of another one"):
        load_task(write("a.jsonl", rows), "all")


@pytest.mark.parametrize("prompt, completion", [("Roses are", " red."), ("Roses are\n", "red"), ("x =", "1\n")])
def test_completions_stand_as_written(write, prompt, completion):
    name = write("a.jsonl", [{"prompt": prompt, "completion": completion, "source": "a poem"}])
    for format in FORMATS:
        (item,) = load_task(name, "all", format)
        assert item == {"doc_index": 0, "contexts": [prompt], "continuations": [completion], "gold": 0}


def test_a_prompt_that_ends_in_a_line_break_gets_no_space(write):
    (item,) = load_task(write("a.jsonl", [ITEM]), "all", template="{prompt}\nAnswer:\n")
    assert item["contexts"] == ["Is ice cold?\nAnswer:\n"] * 2 and item["continuations"] == ["no", "yes"]


def test_the_instruction_format_numbers_the_choices(write):
    (item,) = load_task(write("a.jsonl", [ITEM]), "all", "instruction")
    assert "Answer1: no Answer2: yes\n\nAnswer format: answer1/answer2" in item["contexts"][0]
    assert item["continuations"] == ["the correct answer is answer1", "the correct answer is answer2"]


# Splits and identity


@pytest.mark.parametrize(
    "n, sizes",
    [
        (2, (1, 0, 1)),
        (5, (4, 0, 1)),
        (100, (64, 16, 20)),
        pytest.param(6000, (4000, 1000, 1000), marks=pytest.mark.long),
    ],
)
def test_a_file_is_cut_once_and_for_all(write, n, sizes):
    name, found = write("a.jsonl", [ITEM | {"prompt": f"{i}?"} for i in range(n)]), {}
    for split, size in zip(("train", "dev", "validation"), sizes):
        if size:
            found[split] = load_task(name, split)["doc_index"]
            assert len(found[split]) == size and found[split] == load_task(name, split)["doc_index"]
        else:
            with pytest.raises(ValueError, match=f"{name} has {n} items, too few to cut {split} from them"):
                load_task(name, split)
    parts = [i for each in found.values() for i in each]
    assert sorted(parts) == list(range(n)) == load_task(name, "all")["doc_index"]
    assert all(load_task(name, s)[0]["contexts"][0] == f"{i[0]}?" for s, i in found.items())


def test_the_only_item_of_a_file(write):
    name = write("a.jsonl", [ITEM])
    assert len(load_task(name, "train")) == len(load_task(name, "all")) == 1
    with pytest.raises(ValueError, match="has 1 items, too few to cut validation"):
        load_task(name)


@pytest.mark.parametrize(
    "files, splits",
    [
        (("train", "validation"), {"train": "train", "dev": "train", "validation": "validation"}),
        (("train", "test"), {"train": "train", "dev": "train", "validation": "test"}),
        (("train", "validation", "test"), {"train": "train", "dev": "validation", "validation": "test"}),
        (("test",), {"validation": "test"}),
    ],
)
def test_a_folder_has_a_file_for_each_split(write, files, splits):
    for file in files:
        write(f"data/{file}.jsonl", [ITEM | {"prompt": f"{file} {i}"} for i in range(10)])
    for split in ("train", "dev", "validation"):
        if split in splits:
            assert all(c[0].startswith(f"{splits[split]} ") for c in load_task("./data", split)["contexts"])
        else:
            with pytest.raises(ValueError, match=r"\./data has no train items, but only validation"):
                load_task("./data", split)
    if len(files) > 1:
        with pytest.raises(ValueError, match="./data has splits; choose one of train, dev, validation instead of all"):
            load_task("./data", "all")
    with pytest.raises(ValueError, match="boolq has splits"):
        load_task("boolq", "all")


def test_a_folder_of_two_kinds(write):
    write("data/train.jsonl", [ITEM]), write("data/test.jsonl", [PAIR])
    with pytest.raises(ValueError, match="./data holds choices in one file and completions in another"):
        load_task("./data")


def test_names():
    names = {
        "a.csv": "a",
        "x/b.v2.jsonl": "b.v2",
        "./data/": "data",
        "owner/name": "name",
        "owner/name:main": "name-main",
    }
    assert {name: own_label(name) for name in names} == names and all(map(is_own, names))
    assert not any(map(is_own, ("boolq", "notes.txt", "", "data")))


@pytest.mark.attack("silent error")
def test_identity_follows_content(write, tiny_model_dir):
    name, options = write("one/cap.csv", CAPITALS), dict(model=str(tiny_model_dir))
    config = RunConfig(task=name, **options)
    digest, first = own_digest(name), run_name(config)
    assert first.startswith("cap-dora-r16-s0-") and own_rows(name) is own_rows(name)
    shutil.copy(name, write("two/cap.csv", ""))
    moved = RunConfig(task="two/cap.csv", **options)
    assert run_id(moved) == run_id(config) and training_id(moved) == training_id(config)
    assert own_digest("two/cap.csv") == digest
    numbers = "".join(
        re.sub(
            r"(Paris|Rome|Oslo|Lima)$",
            lambda m: str("Paris Rome Oslo".split().index(m[1]) if m[1] != "Lima" else 0),
            line,
        )
        + "\n"
        for line in CAPITALS.splitlines()
    )
    assert numbers != CAPITALS
    assert run_id(RunConfig(task=write("three/cap.csv", numbers), **options)) == run_id(config)  # the same items
    write(name, CAPITALS.replace("Oslo,Oslo", "Oslo,Rome"))
    assert own_digest(name) != digest and run_id(config) != run_id(moved)
    assert training_id(config) != training_id(moved)
    assert run_id(RunConfig(task="two/cap.csv", template="Q: {prompt}", **options)) != run_id(moved)
    assert task_digest("boolq") == task_digest("boolq", template="", columns="")
    os.remove("two/cap.csv")
    assert names_of([moved], []) == ["cap-dora-r16-s0-unknown"]


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name=None):
        asked.append((path, name))
        if name == "other":
            raise ValueError("BuilderConfig 'other' not found")
        if path == "owner/away":
            raise ConnectionError("Couldn't reach the Hub")
        rows = [{"question": f"{i}?", "options": ["a", "b"], "label": i % 2} for i in range(10)]
        return datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    how = dict(template="{question}", columns="choices=options,answer=label")
    items = load_task("owner/name:main", **how)
    assert items["contexts"] == [["0?"] * 2, ["1?"] * 2] and items["gold"] == [0, 1]
    assert [len(load_task("owner/name:main", split, **how)) for split in ("train", "dev")] == [8, 2]
    assert asked == [("owner/name", "main")]  # once
    assert find_task("owner/name", **how).label == "name"
    with pytest.raises(ValueError, match="owner/name:other is not a file or folder here, and could not be loaded"):
        load_task("owner/name:other", **how)
    with pytest.raises(FetchError, match="owner/away is not a file.*ConnectionError: Couldn't reach"):
        load_task("owner/away")


def test_a_folder_is_what_load_dataset_makes_of_it(write):
    "The same splits and rows as `datasets` reads."
    for file in ("train", "test"):
        write(f"data/{file}.jsonl", [ITEM | {"prompt": f"{file} {i}", "answer": i % 2} for i in range(6)])
    theirs, ours = datasets.load_dataset("./data", cache_dir="cache"), own_rows("./data")
    for split, name in (("train", "train"), ("test", "validation")):
        expected = [{"question": r["prompt"], "choices": r["choices"], "label": r["answer"]} for r in theirs[split]]
        assert ours[name] == expected


# Tokens


def test_what_texts_become(toy_tokenizer):
    tokenizer = toy_tokenizer()
    item = {"doc_index": 4, "contexts": ["a b"] * 2, "continuations": [" yes", " no"], "gold": 0}
    with pytest.warns(UserWarning) as caught:
        check_tokens(tokenizer, [item, item | {"contexts": ["The Ans"] * 2, "continuations": ["wer", "x"]}])
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and all("1 of 2 items, the first being item 4, have" in text for text in texts)
    assert "no space between prompt and continuation" in texts[0] and "a token that spans" in texts[1]
    with pytest.raises(ValueError, match="item 4: a continuation of 4 tokens leaves no room.*max_tokens is 4$"):
        check_tokens(tokenizer, [item], max_tokens=4)
    with pytest.raises(
        ValueError, match="item 4: a continuation of 4 tokens leaves no room.*the model's context is 3$"
    ):
        check_tokens(tokenizer, [item], context=3)
    with pytest.raises(ValueError, match="item 4: the continuation '中' has no tokens"):
        check_tokens(tokenizer, [item | {"continuations": ["中", " no"]}])


@pytest.mark.filterwarnings("error")
def test_usual_texts_give_no_warning(toy_tokenizer):
    check_tokens(
        toy_tokenizer(),
        [{"contexts": [c], "continuations": [d]} for c, d in (("a", " b"), ("a\n", "b"), ("中", "b"), ('"', "b"))],
        context=9,
    )


# Runs


def command(capsys, *argv):
    status = main([*argv])
    out, err = capsys.readouterr()
    return status, out, err


MANY = "prompt,choice1,choice2,answer\n" + "".join(f"{i} is,even,odd,{('even', 'odd')[i % 2]}\n" for i in range(60))


@pytest.mark.long
def test_train_and_evaluate_a_csv(write, tiny_model_dir, capsys):
    write("data/parity.csv", MANY)
    model = ["--model", str(tiny_model_dir)]
    train = ["train", "--task", "data/parity.csv", *model, "--rank", "2", "--batch-size", "8", "--out", "run"]
    status, out, err = command(capsys, *train)
    assert status == 0 and "data/parity.csv: 12 of its 60 train items are read as validation" in err
    trained = json.loads(out)
    assert trained["metrics"]["n"] == 12 and trained["training"]["items"] == 39
    stored = json.load(open("run/result.json"))
    assert stored["run"].startswith("parity-dora-r2-s0-") and stored["params"]["task"] == "data/parity.csv"
    evaluation = ["evaluate", "--task", "data/parity.csv", *model, "--adapter", "run/adapter"]
    status, out, _ = command(capsys, *evaluation)
    assert status == 0 and json.loads(out)["acc"] == trained["metrics"]["acc"]
    status, out, _ = command(capsys, *evaluation, "--split", "all", "--template", r"Number {prompt}\n")
    assert status == 0 and json.loads(out)["n"] == 60 and json.loads(out)["template"] == "Number {prompt}\n"

    assert command(capsys, *train)[0] == 0  # nothing has changed, so nothing is done
    write("data/parity.csv", MANY.replace("59 is,even,odd,odd", "59 is,even,odd,even"))
    status, _, err = command(capsys, *train)
    assert status == 2 and "run" in err and "parity-dora-r2-s0-" in err
    write("data/parity.csv", MANY.replace("59 is,even,odd,odd", "59 is,even,odd,neither"))
    status, _, err = command(capsys, *train)
    assert (
        status == 2
        and err
        == "dora-nb train: data/parity.csv, line 61: its answer 'neither' is none of its choices ('even', 'odd')\n"
    )


def test_the_longest_choice_is_the_one_asked_for(write, tiny_model_dir, capsys, monkeypatch):
    write("poem.jsonl", [{"prompt": f"Line {i}:", "completion": f" roses {i}"} for i in range(20)])
    seen = []
    monkeypatch.setattr("dora_nb.data.tokens.check_tokens", lambda tokenizer, items, *limits: seen.append(limits))
    options = ("--task", "poem.jsonl", "--model", str(tiny_model_dir), "--max-tokens", "4096", "--limit", "1")
    assert command(capsys, "evaluate", *options)[0] == 0 and [most for most, _ in seen] == [4096]


@pytest.mark.long
def test_completions_from_a_file_to_a_page(write, tiny_model_dir, capsys):
    write("poem.jsonl", [{"prompt": f"Line {i}:", "completion": f" roses {i}"} for i in range(20)])
    options = dict(task="poem.jsonl", model=str(tiny_model_dir), rank=2, batch_size=4, format="instruction")
    status, _, err = command(capsys, "train", "--task", "poem.jsonl", "--model", str(tiny_model_dir))
    assert status == 2 and "poem.jsonl holds completions; use objective='answer'" in err
    found = {}
    for protocol in ("loglikelihood", "generate"):
        config = RunConfig(objective="answer", protocol=protocol, learning_rate=1e-2, **options)
        found[protocol] = run(config, f"runs/{run_name(config)}", progress=False)["metrics"]
    ranked = found["loglikelihood"]
    assert ranked["perplexity"] > 1 and ranked["loglikelihood"] < 0 and "acc_norm" not in ranked
    assert found["generate"]["exact_match"] == found["generate"]["acc"] and "unparsed" not in found["generate"]
    base = run(RunConfig(method="base", **options), "runs/base", progress=False)["metrics"]
    assert base["perplexity"] > ranked["perplexity"]  # it has learned something
    model, tokenizer = load_model(str(tiny_model_dir))
    mine, _ = evaluate(model, tokenizer, load_task("poem.jsonl"), progress=False)
    assert mine["perplexity"] == pytest.approx(base["perplexity"], rel=1e-4)
    assert math.log(mine["perplexity"]) > 0
    collect("runs", "report")
    page = render("report", "Poems").read_text()
    assert "poem (n = 4)" in page and "always the most frequent answer" in page and "100.0" not in page
    assert "nan" not in page


@pytest.mark.long
def test_a_report_tells_two_files_apart_and_names_them_by_their_stems(write, tiny_model_dir):
    for folder in ("a", "b"):
        write(f"{folder}/parity.csv", MANY if folder == "a" else MANY.replace(" is,", " was,"))
        for method in ("base", "lora"):
            config = RunConfig(task=f"{folder}/parity.csv", method=method, model=str(tiny_model_dir), rank=2)
            run(config, f"runs/{folder}-{method}", progress=False)
    shutil.copytree("runs", "other")
    collect("runs", "report")
    page = render("report", "Parity").read_text()
    assert "task 'a/parity.csv' (n = 12)" in page and "task 'b/parity.csv' (n = 12)" in page
    shutil.rmtree("other/b-base"), shutil.rmtree("other/b-lora")
    collect("other", "alone")
    assert "| parity (n = 12)" in re.sub(" +", " ", render("alone", "Parity").read_text())


def test_a_grid_over_files(write, tiny_model_dir):
    write("a.csv", MANY)
    write(
        "grid.toml",
        f'name = "own"\n[fixed]\nmodel = "{tiny_model_dir}"\ntemplate = "{{prompt}}\\n"\n[axes]\ntask = ["a.csv", "./b.jsonl"]\n',
    )
    assert [c.task for c in load_grid("grid.toml").configs] == ["a.csv", "./b.jsonl"]
    assert load_grid("grid.toml").configs[0].template == "{prompt}\n"


@pytest.mark.attack("crash")
@pytest.mark.parametrize("name", ("train", "evaluate", "probe", "ranks"))
@pytest.mark.parametrize(
    "task, message", [("bolq", "did you mean 'boolq'?"), ("gone.csv", "there is no file or folder gone.csv")]
)
def test_a_task_that_is_not_there(write, capsys, monkeypatch, name, task, message):
    "The same status and advice in every command, before a model is looked for."
    for where in (
        "runs.base.load_model",
        "data.assets.model_path",
        "runs.identity.model_digest",
        "runs.base.model_path",
    ):
        monkeypatch.setattr(f"dora_nb.{where}", lambda *_, **__: pytest.fail("a model was looked for"))
    monkeypatch.setattr("dora_nb.models.adapter_files.check_adapter", lambda path: None)
    more = {"probe": ["--adapter", "x"], "ranks": ["--adapter", "x", "--budget", "0.5"]}.get(name, [])
    status, out, err = command(capsys, name, "--task", task, *more)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.long
def test_a_report_shows_the_questions_of_a_file_as_long_as_it_is_unchanged(write, tiny_model_dir):
    config = RunConfig(task=write("a.csv", MANY), method="base", model=str(tiny_model_dir), template="Is {prompt}:")
    result = run(config, "run", progress=False)
    gold = pd.read_parquet("run/predictions.parquet").set_index("doc_index").gold
    texts, why = item_texts(parameters(result), gold, result["checksums"]["data"])
    assert not why and texts[0] == (f"Is {gold.index[0]} is:", ["even", "odd"]) and len(texts) == 12
    write("a.csv", MANY.replace("odd", "uneven"))
    assert item_texts(parameters(result), gold, result["checksums"]["data"])[1].startswith("the data here are not")
    os.remove("a.csv")
    assert "there is no file or folder a.csv" in item_texts(parameters(result), gold, None)[1]
