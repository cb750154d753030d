"Prompts against lm-evaluation-harness' own functions; rows and masks against scoring each choice alone."

import dataclasses
import itertools
import random
import re
from collections import defaultdict

import pytest
import torch
from datasets import Dataset

from dora_nb.data.assets import TASK_NAMES, load_items
from dora_nb.data.groups import hellaswag_sources, siqa_contexts
from dora_nb.data.items import check_items
from dora_nb.data.rows import collate, encode_item, encode_pair, encode_text, pack
from dora_nb.data.sources import _hellaswag, clean_hellaswag
from dora_nb.data.tasks import DEV_CUTS, DEV_ITEMS, TASKS, Task, cut_name, format_item, keeps_groups, load_task
from dora_nb.data.twins import winogrande_twins
from dora_nb.models.scoring import choice_logprobs, shares_prompts

DEV_TWINS = [46, 47, 48, 49, 150]


SHARED = {  # validation items that are also in train or dev: as seen, by letters and digits, by context and right answer
    "boolq": (0, 4, 4),
    "hellaswag": (0, 0, 12),
    "winogrande": (0, 0, 0),
    "piqa": (1, 2, 4),
    "social_iqa": (0, 0, 0),
    "arc_easy": (2, 2, 4),
    "arc_challenge": (0, 0, 1),
    "openbookqa": (0, 0, 15),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASK_NAMES)
def test_what_two_splits_share(name):
    bare = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())
    seen = lambda item: (*item["contexts"], *item["continuations"])
    loosely = lambda item: tuple(map(bare, seen(item)))
    answered = lambda item: (bare(item["contexts"][item["gold"]]), bare(item["continuations"][item["gold"]]))
    trained = [item for split in ("train", "dev") for item in load_task(name, split)]
    held = list(load_task(name, "validation"))
    shared = [
        sum(key(item) in known for item in held)
        for key in (seen, loosely, answered)
        for known in [set(map(key, trained))]
    ]
    assert tuple(shared) == SHARED[name]


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.long
def test_splits(name):
    train, dev, validation = (load_task(name, split) for split in ("train", "dev", "validation"))
    counts = TASKS[name].counts
    assert all(check_items(items) is items for items in (train, dev, validation))
    if "test" in counts:  # nothing is cut from train
        assert [len(train), len(dev), len(validation)] == [counts[k] for k in ("train", "validation", "test")]
        assert train[0] != dev[0] != validation[0]
    else:
        assert len(train) + len(dev) == counts["train"] and len(validation) == counts["validation"]
        assert not set(train["doc_index"]) & set(dev["doc_index"])
    assert validation["doc_index"] == list(range(len(validation)))
    few = load_task(name, "validation", limit=50)
    assert (
        few["doc_index"] == sorted(few["doc_index"])
        and few["doc_index"] == load_task(name, "validation", limit=50)["doc_index"]
    )
    assert load_task(name, "validation", limit=50, seed=None)["doc_index"] == list(range(50))
    assert few[7] == validation[few["doc_index"][7]]


GROUPED = {
    "boolq": [10, 14, 21, 36, 50],
    "hellaswag": [52, 53, 73, 74, 75],
    "piqa": [12, 33, 80, 118, 155],
    "social_iqa": [29, 72, 76, 89, 194],
}  # task → dev's first items


@pytest.mark.long
@pytest.mark.parametrize(
    "cut,first", [("items", [66, 137, 155, 181, 264]), ("twins", DEV_TWINS), ("groups", DEV_TWINS)]
)
def test_dev_is_cut_the_same_for_ever(cut, first):
    assert load_task("winogrande", "dev", dev_cut=cut)["doc_index"][:5] == first


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in TASK_NAMES if n != "winogrande"])
def test_twins_are_kept_together_in_winogrande_alone(name):
    cuts = {cut: load_task(name, "dev", dev_cut=cut)["doc_index"][:] for cut in DEV_CUTS}
    assert cuts["twins"] == cuts["items"] and (cuts["groups"] != cuts["items"]) == (name in GROUPED)
    assert cuts["groups"][:5] == GROUPED.get(name, cuts["items"][:5])
    assert load_task(name, "dev")["doc_index"][:] == cuts["groups"] and len(cuts["groups"]) == len(cuts["items"])


def sentences(row):
    "The title of a WikiHow article, or a video's sentences, completed by the right answer; with the activity."
    activity, text = row["query"].split(": ", 1)
    title = text.startswith("How to ")
    text = (text.split(". ")[0] if title else f"{text} {row['choices'][row['label']]}").lower()
    return {(activity, " ".join(re.findall("[a-z0-9]+", part))) for part in re.split("[.!?]", text)} - {(activity, "")}


def situation(row):
    "The first 60 % of a SIQA item's words."
    words = row["question"].split()
    return {tuple(words[: len(words) * 3 // 5])}


@pytest.mark.attack("silent error")
@pytest.mark.long
@pytest.mark.parametrize(
    "name,parts,by_items,by_groups",
    [
        ("boolq", lambda row: {row["passage"]}, 245, 0),
        ("boolq", lambda row: {row["passage"].split(" -- ")[0]}, 440, 277),  # other passages of an article tell nothing
        ("piqa", lambda row: {row["question"]}, 99, 0),
        ("social_iqa", situation, 18, 0),
        ("hellaswag", sentences, 259, 3),
    ],
)
def test_what_dev_shares_with_train_by_another_measure(name, parts, by_items, by_groups):
    rows = list(map(parts, load_items(name, "train").to_list()))
    for cut, expected in (("items", by_items), ("groups", by_groups)):
        train, dev = (load_task(name, split, dev_cut=cut)["doc_index"][:] for split in ("train", "dev"))
        assert len(dev) == DEV_ITEMS and sorted(train + dev) == list(range(len(rows)))
        known = set().union(*(rows[i] for i in train))
        assert sum(not known.isdisjoint(rows[i]) for i in dev) == expected


def test_a_video_is_a_run_of_items_with_one_activity():
    queries = [
        "Surfing: A man runs. He",
        "Surfing: He swims. Then he",
        "Baking: A cake rises. It",
        "Surfing: A woman waves. She",
        "Youth: How to swim. Go to a pool. Look",
        "Youth: How to swim. Dive in. You",
        "Youth: How to dive. Dive in. You",
    ]
    assert hellaswag_sources([{"query": q} for q in queries]) == [[0, 1], [2], [3], [4, 5], [6]]


def test_a_situation_is_all_but_the_last_sentence():
    questions = ["Jo ran. She fell. Why did Jo run?", "Jo ran. She fell! How does Jo feel?", "Jo ran. Why did Jo run?"]
    assert siqa_contexts([{"question": q} for q in questions]) == [[0, 1], [2]]
    assert siqa_contexts([{"question": q} for q in ("Jo ran. Why?", "JO RAN! Where to?")]) == [[0, 1]]


@pytest.mark.parametrize("names", [(), ("boolq",), ("winogrande",), ("winogrande", "piqa"), ("arc_easy", "hellaswag")])
def test_cuts_have_one_name_if_they_give_the_same_items(names):
    ways = {cut: [keeps_groups(TASKS[name], cut) for name in names] for cut in DEV_CUTS}
    for one, other in itertools.product(DEV_CUTS, DEV_CUTS):
        assert (cut_name(one, names) == cut_name(other, names)) == (ways[one] == ways[other])
        found = cut_name(one, names)
        assert ways[found] == ways[one] and cut_name(found, names) == found
    assert cut_name("groups", ["unknown.csv", "winogrande", "arc_easy"]) == "twins"


def test_dev_of_a_small_task_is_a_fifth_of_its_groups(monkeypatch):
    rows = [{"text": f"{i // 3}", "label": 0} for i in range(60)]
    by_text = lambda rows: [list(range(i, i + 3)) for i in range(0, len(rows), 3)]
    task = Task("small", "Small", {"train": 60, "validation": 1}, ("text",), ("no", "yes"), None, None, by_text)
    task = dataclasses.replace(task, cloze=lambda row: ([row["text"]] * 2, [" no", " yes"]), rows=lambda split: rows)
    monkeypatch.setitem(TASKS._entries, "small", task)
    dev = load_task("small", "dev")["doc_index"][:]
    assert len(dev) == 12 and all({i // 3 * 3, i // 3 * 3 + 1, i // 3 * 3 + 2} <= set(dev) for i in dev)


def edits(a, b):
    "Levenshtein's distance of two lists."
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def close_to_train(rows, dev, items):
    "How many of the dev items given have one in train with the same options and less than 40 % of the words edited."
    words = [re.findall(r"[a-z0-9']+|_", r["sentence"].lower()) for r in rows]
    options = [tuple(sorted((r["option1"].lower(), r["option2"].lower()))) for r in rows]
    train = defaultdict(list)
    for j in set(range(len(rows))) - dev:
        train[options[j]].append(j)
    near = lambda i, j: edits(words[i], words[j]) < 0.4 * max(len(words[i]), len(words[j]))
    return sum(any(near(i, j) for j in train[options[i]]) for i in items)


@pytest.mark.attack("silent error")
@pytest.mark.long
def test_no_dev_item_of_winogrande_has_a_twin_in_train():
    rows = load_items("winogrande", "train").to_list()
    train, dev = (load_task("winogrande", split)["doc_index"][:] for split in ("train", "dev"))
    assert len(dev) == DEV_ITEMS and sorted(train + dev) == list(range(len(rows)))
    groups = winogrande_twins(rows)
    assert sorted(i for g in groups for i in g) == sorted(train + dev)
    assert all(set(dev).issuperset(g) or set(dev).isdisjoint(g) for g in groups)
    assert close_to_train(rows, set(dev), dev[::3]) == 0  # by another measure
    cut_by_items = load_task("winogrande", "dev", dev_cut="items")["doc_index"][:]
    assert close_to_train(rows, set(cut_by_items), cut_by_items[:100]) > 90
    group = {i: g for g in groups for i in g}
    options = [{rows[i]["option1"].strip().lower(), rows[i]["option2"].strip().lower()} for i in range(len(rows))]
    neighbours = [i for i in range(len(rows) - 1) if options[i] == options[i + 1]]
    assert len(neighbours) > 20_000 and sum(group[i] is not group[i + 1] for i in neighbours) == 7


def test_twins_are_found_across_the_file_and_through_others():
    def row(sentence, options="ab"):
        return dict(sentence=sentence, option1=options[0], option2=options[1])

    rows = [
        row("one two three four five _ six ."),
        row("nothing like the others at all _ ."),
        row("one two three four seven _ six .", "BA"),
        row("one two three four five _ six .", "ac"),
        row("one two eight four seven _ six ."),
    ]
    assert winogrande_twins(rows) == [[0, 2, 4], [1], [3]]


@pytest.mark.parametrize(
    "wrong,named",
    [
        (dict(name="boolqq"), "did you mean 'boolq'"),
        (dict(split="test"), "train, dev, validation"),
        (dict(format="chat"), "cloze, instruction"),
        (dict(limit=0), "limit=0"),
        (dict(dev_cut="pairs"), "groups, twins, items"),
    ],
)
def test_names_that_do_not_exist(wrong, named):
    with pytest.raises(ValueError, match=named):
        load_task(**dict(name="boolq") | wrong)


@pytest.mark.long
def test_hellaswag_is_cleaned_as_lm_eval_does():
    from lm_eval.tasks.hellaswag.utils import preprocess, process_docs

    for text in (" [header] A [title] B  c [substeps] d ", "[step] Go.", "no markup", "a [b] [c] d"):
        assert clean_hellaswag(text) == preprocess(text)
    row = {
        "activity_label": "Roof",
        "ctx_a": "A man sits. [title] How",
        "ctx_b": "he STANDS",
        "endings": ["[step] up.", " b ", "c  d", "e"],
        "label": "2",
    }
    (theirs,), ours = process_docs(Dataset.from_list([row])).to_list(), _hellaswag(row)
    assert (ours["query"], ours["choices"], ours["label"]) == (theirs["query"], theirs["choices"], theirs["gold"])


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("format", ("cloze", "instruction"))
def test_formats(name, format):
    rows = load_items(name, "validation")
    for row in rows.select(range(0, len(rows), len(rows) // 20)):
        item, choices = format_item(TASKS[name], row, format), len(row.get("choices", TASKS[name].answers))
        assert len(item["contexts"]) == len(item["continuations"]) == choices > item["gold"] >= 0
        assert choices <= len(TASKS[name].answers)
        assert check_items([item])
        assert len(set(item["contexts"])) == (2 if (name, format) == ("winogrande", "cloze") else 1)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_task_says_whether_its_items_have_the_same_choices(name):
    rows = load_items(name, "validation").select(range(40))
    ends = {tuple(format_item(TASKS[name], row, "cloze")["continuations"]) for row in rows}
    assert TASKS[name].same_choices == (len(ends) == 1)


def test_boolq_yes_is_one():
    row = load_items("boolq", "validation")[0]  # "does ethanol take more energy make that produces": no
    item = format_item(TASKS["boolq"], row, "cloze")
    assert item["continuations"][item["gold"]] == " no" and TASKS["boolq"].answers[item["gold"]] == "false"


def test_pairs_split_as_lm_eval_does(smollm):
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=smollm[0], tokenizer=smollm[1], device="cpu")
    for context, continuation in [
        ("The cat", " sat down"),
        ("ends in spaces  ", "word"),
        ("a\n", " b"),
        ("Question: x?\nAnswer:", " yes"),
        ("2024 was", "  two spaces"),
    ]:
        assert encode_pair(smollm[1], context, continuation) == tuple(harness._encode_pair(context, continuation))


def test_a_beginning_of_sequence_token_is_put_where_lm_eval_puts_it(smollm, tiny_model_dir):
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    harness = HFLM(pretrained=smollm[0], tokenizer=tokenizer, device="cpu")
    for context in ("The cat", f"{bos}The cat"):
        ours = encode_pair(tokenizer, context, " sat")
        assert ours == tuple(harness._encode_pair(context, " sat")) and ours[0].count(tokenizer.bos_token_id) == 1


def random_items(n, rng, vocab=128):
    "Items of random tokens: choices that share everything, something or nothing."
    draw = lambda k: [rng.randrange(vocab) for _ in range(k)]
    for _ in range(n):
        context, own = draw(rng.randint(1, 12)), rng.random() < 0.5
        yield {
            k: (context + (draw(rng.randint(0, 3)) if own else []), draw(rng.randint(1, 6)))
            for k in range(rng.randint(1, 4))
        }


@torch.no_grad()
def alone(model, context, continuation):
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum()


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("share", (True, False))
def test_rows_score_each_choice_as_if_alone(llama, attention, share):
    model = llama(initializer_range=0.2)
    model.set_attn_implementation(attention)
    items = list(random_items(30, random.Random(0)))
    rows = [[pack(pairs)] if share else [pack({k: p}) for k, p in pairs.items()] for pairs in items]
    with torch.no_grad():
        scores = choice_logprobs(model, collate(rows))
    for i, pairs in enumerate(items):
        for k in range(scores.shape[1]):
            if k in pairs:
                torch.testing.assert_close(scores[i, k], alone(model, *pairs[k]), atol=1e-4, rtol=1e-4)
            else:
                assert scores[i, k] == -torch.inf


def test_models_that_ignore_the_mask_are_found_out(llama):
    class Deaf(type(llama())):
        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    model = llama(initializer_range=0.2)
    assert shares_prompts(model)
    model.__class__ = Deaf
    assert not shares_prompts(model)
    model = llama()
    model.config.sliding_window = 8
    assert not shares_prompts(model)


def test_long_contexts_lose_their_beginning(smollm):
    tokenizer = smollm[1]
    item = {"doc_index": 5, "contexts": ["word " * 100 + "end"] * 2, "continuations": [" yes", " no way"], "gold": 0}
    (row,), cut = encode_item(tokenizer, item, max_tokens=50)
    assert cut > 0 and max(row.positions) < 50
    (row,), cut = encode_item(tokenizer, item, [1], max_tokens=50)
    assert [tokenizer.decode(t) for t in row.target] == [" no", " way"] and row.ids[-1] == tokenizer(" no").input_ids[0]
    with pytest.raises(ValueError, match="item 5.*never cut"):
        encode_item(tokenizer, item, max_tokens=2)


@pytest.mark.long
@pytest.mark.parametrize(
    "change,named",
    [
        (lambda d: d.remove_columns("option1"), "winogrande train has no column 'option1'"),
        (lambda d: d.remove_columns("label"), "no column 'label'"),
        (lambda d: d.select([]), "has 0 items where the official split has 40,398"),
        (
            lambda d: d.map(lambda r, i: {"label": 2 if i == 7 else r["label"]}, with_indices=True),
            "label 2, and 2 choices",
        ),
    ],
)
def test_a_file_that_is_not_the_benchmark_s(monkeypatch, change, named):
    changed = change(load_items("winogrande", "train"))
    monkeypatch.setattr("dora_nb.data.tasks.load_items", lambda *_: changed)
    with pytest.raises(ValueError, match=named + ".*fetch --force tasks"):
        load_task("winogrande", "train", limit=4)


def test_items_with_fewer_and_more_choices():
    rows = [r for r in load_items("arc_easy", "train") if len(r["choices"]) != 4]
    assert {len(r["choices"]) for r in rows} == {3, 5}
    for row in rows:
        n, item = len(row["choices"]), format_item(TASKS["arc_easy"], row, "instruction")
        assert item["continuations"][-1] == f"the correct answer is answer{n}" and len(item["continuations"]) == n
        assert item["contexts"][0].endswith(f"answer{n}\n\n### Response:\n")


# Tokenizers that append an end, tokens that span the join, and tokenizers without special tokens

PAIRS = [
    ("The cat", " sat down"),
    ("ends in spaces  ", "word"),
    ("a\n", " b"),
    ("Question: x?\nAnswer:", " yes"),
    ("Ans", "we"),
    ("", "no context"),
]


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("context,continuation", PAIRS)
@pytest.mark.parametrize("before,plain", [("", None), ("<s> ", "<s> $A"), ("<s> <s> ", "<s> <s> $A")])
def test_an_end_that_the_tokenizer_appends_is_never_scored(toy_tokenizer, context, continuation, before, plain):
    ends, never = toy_tokenizer(f"{before}$A </s>"), toy_tokenizer(plain)
    assert ends("a").input_ids[-1] == ends.eos_token_id
    assert encode_text(ends, context) == encode_text(never, context)
    given, scored = encode_pair(ends, context, continuation)
    assert (given, scored) == encode_pair(never, context, continuation)
    assert never.decode(scored) == context[len(context.rstrip()) :] + continuation
    item = {"contexts": [context] * 2, "continuations": [continuation, " no"], "gold": 0}
    assert encode_item(ends, item) == encode_item(never, item)
    (row,), _ = encode_item(ends, item, end=True)  # an end that is asked for is there, once for each choice
    assert row.target.count(ends.eos_token_id) == 2


@pytest.mark.parametrize("template", ("<s> $A", None))
@pytest.mark.parametrize("context,continuation", PAIRS[:-1])
def test_a_beginning_and_the_join_are_lm_eval_s(smollm, toy_tokenizer, template, context, continuation):
    from lm_eval.models.huggingface import HFLM

    tokenizer = toy_tokenizer(template)
    harness = HFLM(pretrained=smollm[0], tokenizer=tokenizer, device="cpu")
    theirs = tuple(harness._encode_pair(context, continuation))
    assert encode_pair(tokenizer, context, continuation) == theirs


def test_an_end_that_is_written_out_stays(toy_tokenizer, smollm):
    for tokenizer in (toy_tokenizer(), toy_tokenizer("<s> $A </s>"), smollm[1]):
        text = f"one{tokenizer.eos_token}two{tokenizer.eos_token}"
        assert encode_text(tokenizer, text).count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("template", (None, "<s> $A"))
def test_tokens_are_those_of_the_tokenizer_where_it_appends_none(toy_tokenizer, smollm, template):
    for tokenizer in (toy_tokenizer(template), smollm[1]):
        for text in ("The cat", "two\n lines ", f"{tokenizer.eos_token}The cat", "x"):
            assert encode_text(tokenizer, text) == tokenizer(text).input_ids


@pytest.mark.attack("silent error")
def test_a_context_that_begins_with_its_token_has_it_once(toy_tokenizer):
    for template in ("<s> $A", "<s> $A </s>"):
        tokenizer = toy_tokenizer(template)
        assert encode_text(tokenizer, "<s>cat") == encode_text(tokenizer, "cat")


@pytest.mark.attack("crash")
@pytest.mark.parametrize("template", (None, "<s> $A", "$A </s>", "<s> $A </s>"))
def test_a_token_that_spans_the_join(toy_tokenizer, template):
    tokenizer = toy_tokenizer(template)
    assert len(encode_text(tokenizer, "Answer")) == len(encode_text(tokenizer, "Ans"))
    given, scored = encode_pair(tokenizer, "Ans", "wer")
    assert given == encode_text(tokenizer, "Ans") and tokenizer.convert_ids_to_tokens(scored) == ["wer"]
    item = {"contexts": ["Ans"] * 2, "continuations": ["wer", "ten"], "gold": 0}
    (row,), _ = encode_item(tokenizer, item)
    assert tokenizer.decode([t for t, c in zip(row.target, row.choice) if c == 0]) == "wer"


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("template", (None, "<s> $A", "$A </s>", "<s> $A </s>"))
def test_a_token_that_spans_the_join_and_more_behind_it(toy_tokenizer, template):
    tokenizer = toy_tokenizer(template)
    given, scored = encode_pair(tokenizer, "a Ans", "wer is b")
    assert given == encode_text(tokenizer, "a Ans") and tokenizer.decode(scored) == "wer is b"
    other = encode_pair(tokenizer, "a Ans", "x")  # which spans nothing
    assert other[0] == given and tokenizer.decode(other[1]) == "x"


@pytest.mark.attack("silent error")
def test_quotation_marks_that_meet_are_scored(smollm):
    given, scored = encode_pair(smollm[1], 'He said "', '"yes"')
    assert given == encode_text(smollm[1], 'He said "') and smollm[1].decode(scored) == '"yes"'


@pytest.mark.attack("crash")
@pytest.mark.parametrize("continuation", ("", "\u4e2d"))
def test_a_continuation_without_tokens(toy_tokenizer, continuation):
    with pytest.raises(ValueError, match="has no tokens"):
        encode_pair(toy_tokenizer(), "a context", continuation)


@pytest.mark.attack("silent error")
def test_a_context_without_tokens_begins_like_an_empty_one(toy_tokenizer):
    for template in (None, "$A </s>", "<s> $A"):  # the toy knows no Chinese
        tokenizer = toy_tokenizer(template)
        assert encode_pair(tokenizer, "\u4e2d", "cat") == encode_pair(tokenizer, "", "cat")


@pytest.mark.attack("crash")
def test_a_tokenizer_with_neither_beginning_nor_end(toy_tokenizer):
    tokenizer = toy_tokenizer(bos_token=None, eos_token=None)
    assert len(encode_pair(tokenizer, "a context", " goes on")[0]) == 9
    with pytest.raises(ValueError, match="neither a beginning-of-sequence nor an end-of-sequence.*bos_token"):
        encode_pair(tokenizer, " ", "cat")
    item = {"contexts": ["a"], "continuations": ["b"], "gold": 0}
    with pytest.raises(ValueError, match="no end-of-sequence token.*eos_token"):
        encode_item(tokenizer, item, end=True)


# Items

GOOD = {"doc_index": 7, "contexts": ["a", "a"], "continuations": [" b", " c"], "gold": 1}


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "change,named",
    [
        (dict(gold=None), "gold is None"),
        (dict(gold=-1), "gold is -1.*from 0 to 1"),
        (dict(gold=2), "gold is 2.*from 0 to 1"),
        (dict(gold=5), "gold is 5"),
        (dict(gold="yes"), "gold is 'yes'"),
        (dict(gold="1"), "gold is '1'"),
        (dict(gold=True), "gold is True"),
        (dict(gold=1.0), "gold is 1.0"),
        (dict(continuations=[" b", ""]), "continuation 1 is empty or blank"),
        (dict(continuations=[" \n", " c"]), "continuation 0 is empty or blank"),
        (dict(continuations=[" b"], contexts=["a"], gold=0), "has 1 choice, and at least 2"),
        (dict(continuations=[], contexts=[]), "has 0 choices"),
        (dict(contexts=["a"]), "1 contexts and 2 continuations"),
        (dict(contexts="ab"), "contexts must be a list of strings"),
        (dict(continuations=[" b", None]), "continuations must be a list of strings"),
        (dict(continuations=[1, 2]), "continuations must be a list of strings"),
        (dict(contexts=None), "contexts must be a list"),
        (dict(doc_index="7"), "doc_index must be an integer"),
    ],
)
def test_items_that_cannot_be_used_are_named(change, named):
    items = [GOOD | {"doc_index": 3}, GOOD | change]
    with pytest.raises(ValueError, match=f"item 7: .*{named}"):
        check_items(items)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("make", (list, Dataset.from_list))
def test_items_are_numbered_once(make):
    bare = {k: v for k, v in GOOD.items() if k != "doc_index"}
    numbered = check_items(make([bare, bare]))
    assert [i["doc_index"] for i in numbered] == [0, 1] and type(numbered) is type(make([bare]))
    assert [i["gold"] for i in numbered] == [1, 1]
    good = make([GOOD, GOOD | {"doc_index": 2}])
    assert check_items(good) is good
    twice = make([GOOD, GOOD])
    with pytest.raises(ValueError, match="1 items repeat the doc_index"):
        check_items(twice)
    assert check_items(twice, unique=False) is twice
    with pytest.raises(ValueError, match="some have none"):
        check_items(make([GOOD, bare]))
    with pytest.raises(ValueError, match="item 1: gold is 9"):
        check_items(make([bare, bare | {"gold": 9}]))
    with pytest.raises(ValueError, match="no items"):
        check_items(make([]))
    single = make([GOOD | {"contexts": ["a"], "continuations": [" b"], "gold": 0}])
    assert check_items(single, least=1) is single


def test_items_that_are_no_dictionaries():
    with pytest.raises(ValueError, match="item 0 is a str"):
        check_items(["a question"])
