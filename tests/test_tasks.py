"Prompts against lm-evaluation-harness' own functions; rows and masks against scoring each choice alone."

import random

import pytest
import torch
from datasets import Dataset
from lm_eval.tasks.hellaswag.utils import preprocess, process_docs

from dora_nb.assets import TASK_NAMES, _hellaswag, clean_hellaswag, load_items
from dora_nb.tasks import TASKS, collate, encode_item, encode_pair, format_item, load_task, pack
from dora_nb.train import choice_logprobs, shares_prompts


@pytest.mark.parametrize("name", TASK_NAMES)
def test_splits(name):
    train, dev, validation = (load_task(name, split) for split in ("train", "dev", "validation"))
    counts = TASKS[name].counts
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


def test_dev_is_cut_the_same_for_ever():
    assert load_task("winogrande", "dev")["doc_index"][:5] == DEV_WINOGRANDE


DEV_WINOGRANDE = [66, 137, 155, 181, 264]


@pytest.mark.parametrize(
    "wrong,named",
    [
        (dict(name="boolqq"), "boolq, hellaswag"),
        (dict(split="test"), "train, dev, validation"),
        (dict(format="chat"), "cloze, instruction"),
        (dict(limit=0), "limit=0"),
    ],
)
def test_names_that_do_not_exist(wrong, named):
    with pytest.raises(ValueError, match=named):
        load_task(**dict(name="boolq") | wrong)


def test_hellaswag_is_cleaned_as_lm_eval_does():
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
        assert len(set(item["contexts"])) == (2 if (name, format) == ("winogrande", "cloze") else 1)


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
    monkeypatch.setattr("dora_nb.tasks.load_items", lambda *_: changed)
    with pytest.raises(ValueError, match=named + ".*fetch --force tasks"):
        load_task("winogrande", "train", limit=4)


def test_items_with_fewer_and_more_choices():
    rows = [r for r in load_items("arc_easy", "train") if len(r["choices"]) != 4]
    assert {len(r["choices"]) for r in rows} == {3, 5}
    for row in rows:
        n, item = len(row["choices"]), format_item(TASKS["arc_easy"], row, "instruction")
        assert item["continuations"][-1] == f"the correct answer is answer{n}" and len(item["continuations"]) == n
        assert item["contexts"][0].endswith(f"answer{n}\n\n### Response:\n")
