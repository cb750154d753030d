"Intervals against published values, matching, batches that change nothing."

import math
import random
import re
import warnings

import pytest
import torch
import transformers

from dora_nb.data.assets import load_model
from dora_nb.data.rows import encode_pair, encode_text
from dora_nb.data.tasks import load_task
from dora_nb.models.adapt import adapt
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.scoring import context_length
from dora_nb.training.config import TrainConfig
from dora_nb.training.evaluate import (
    accuracy_stderr,
    evaluate,
    format_of,
    generate_answers,
    rank_choices,
    score_completions,
    wilson,
)
from dora_nb.training.matching import answers_of, match_answer, matches_exactly, named_choice
from dora_nb.training.train import train


@pytest.mark.parametrize(
    "right,n,low,high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_prints_it(right, n, low, high):
    "Newcombe (1998), Statistics in Medicine 17, table I, method 3."
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


def test_standard_error():
    assert accuracy_stderr(0.5, 101) == pytest.approx(0.05) and accuracy_stderr(1.0, 1) is None


@pytest.mark.parametrize(
    "text,pred",
    [("the correct answer is ending2", 1), ("Ending1? No: ending4, ending1", 3), ("", None), ("ending", None)],
)
def test_matching(text, pred):
    assert match_answer(text, ["ending1", "ending2", "ending3", "ending4"]) == pred


@pytest.mark.parametrize("batch_tokens", (1, 10**5))
def test_batches_do_not_change_scores(tiny_model_dir, batch_tokens):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("hellaswag", limit=10)
    summary, records = rank_choices(model, tokenizer, items, batch_tokens=batch_tokens, progress=False)
    _, reference = rank_choices(model, tokenizer, items, batch_tokens=700, progress=False)
    for a, b in zip(records, reference):
        assert a["doc_index"] == b["doc_index"] and a["loglikelihood"] == pytest.approx(b["loglikelihood"], abs=1e-3)
    assert summary["n"] == 10 and summary["acc_low"] <= summary["acc"] <= summary["acc_high"]


# Rounding noise of a choice's log-likelihood: on five sets of CPU kernels its root mean square is 0.03 to 0.06 on BoolQ and
# WinoGrande, and 0.10 to 0.17 on HellaSwag, whose endings sum over some thirty tokens. The largest of 24 draws is not a measure
# of it: another CPU's kernels move it by half.
@pytest.mark.parametrize(("task", "noise"), (("boolq", 0.1), ("hellaswag", 0.3), ("winogrande", 0.1)))
def test_bfloat16_ranks_as_float32_does(smollm, task, noise):
    "`eval_precision='auto'` stands on this: choices that float32 parts clearly are ranked alike."
    items = load_task(task, limit=12)
    exact, rounded = (rank_choices(*smollm, items, precision=p, progress=False)[1] for p in ("float32", "bfloat16"))
    shifts = [y - x for a, b in zip(exact, rounded) for x, y in zip(a["loglikelihood"], b["loglikelihood"])]
    assert 0 < math.sqrt(sum(shift**2 for shift in shifts) / len(shifts)) < noise  # 0: not another precision
    for a, b in zip(exact, rounded):
        first, second = sorted(a["loglikelihood"])[:-3:-1]
        assert a["pred"] == b["pred"] or first - second < 3 * noise


def test_generation_does_not_depend_on_padding(smollm):
    model, tokenizer = smollm
    items = load_task("boolq", "validation", "instruction", limit=3)
    _, one_by_one = generate_answers(model, tokenizer, items, batch_tokens=1, progress=False, max_new_tokens=6)
    _, together = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)
    assert [r["output"] for r in one_by_one] == [r["output"] for r in together]


def test_beams_share_the_reading_of_their_prompt(smollm):
    "The answers are those of `generate` alone, item by item; a prompt is read once and not four times."
    model, tokenizer = smollm
    items, read = load_task("winogrande", "validation", "instruction", limit=2), []
    prompts = [torch.tensor([encode_text(tokenizer, item["contexts"][0])]) for item in items]
    options = dict(max_new_tokens=6, num_beams=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    alone = [tokenizer.decode(model.generate(p, **options)[0, p.shape[1] :], skip_special_tokens=True) for p in prompts]
    hook = model.get_input_embeddings().register_forward_hook(lambda m, x, y: read.append(x[0].numel()))
    _, records = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)
    hook.remove()
    assert [r["output"] for r in records] == alone
    checked = 2 * 9  # whether later tokens change what is said at earlier ones
    checked += 2 * (4 + 4 + 2 * 4) + 2 + 5 + 2 * 2  # whether it writes what it would say: two prompts of up to 5 tokens
    assert sum(read) <= checked + 2 * max(p.shape[1] for p in prompts) + 2 * 4 * 6


def test_a_model_s_own_ways_of_writing_are_set_aside(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", "instruction", limit=3)
    ask = lambda: generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)[1]
    expected = ask()
    own = dict(repetition_penalty=1.3, num_beams=2, num_return_sequences=2, no_repeat_ngram_size=2, length_penalty=3.0)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert ask() == expected


@pytest.mark.parametrize("own, more", [(None, []), (7, [7]), ([7, 8], [7, 8])])
def test_an_answer_ends_with_the_token_that_training_teaches(tiny_model_dir, monkeypatch, own, more):
    "Also where the model's generation_config names others, or none; and with those."
    model, tokenizer = load_model(str(tiny_model_dir))
    items, asked, generate = load_task("boolq", "validation", "instruction", limit=1), [], model.generate
    model.generation_config.eos_token_id = own
    monkeypatch.setattr(model, "generate", lambda **how: asked.append(how["eos_token_id"]) or generate(**how))
    bias = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor(tokenizer.eos_token_id), 1e4)
    model.lm_head.register_forward_hook(lambda module, x, y: y + bias)
    _, records = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)
    assert records[0]["output"] == ""
    assert asked and all(stops == sorted({tokenizer.eos_token_id, *more}) for stops in asked)


def test_generation_where_the_cache_cannot_be_shared(tiny_model_dir):
    "A model without a cache, and one whose cache slides over the prompt."
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", "instruction", limit=3)
    ask = lambda m: [r["output"] for r in generate_answers(m, tokenizer, items, progress=False, max_new_tokens=4)[1]]
    expected = ask(model)
    model.generation_config.use_cache = False
    assert ask(model) == expected
    config = transformers.MistralConfig(**model.config.to_dict() | dict(sliding_window=16))
    sliding = transformers.MistralForCausalLM(config).eval()
    sliding.load_state_dict(model.state_dict())
    options = dict(max_new_tokens=4, num_beams=4, do_sample=False, pad_token_id=2)
    prompts = [torch.tensor([encode_text(tokenizer, item["contexts"][0])]) for item in items]
    alone = [sliding.generate(p, **options)[0, p.shape[1] :] for p in prompts]
    assert ask(sliding) == tokenizer.batch_decode(alone, skip_special_tokens=True) != expected


def test_a_tokenizer_without_a_padding_token(tiny_model_dir):
    "As many models come; nothing attends to padding, so the answers are the same."
    model, tokenizer = load_model(str(tiny_model_dir))
    ranked, written = load_task("boolq", limit=4), load_task("boolq", "validation", "instruction", limit=4)
    ask = lambda: (
        rank_choices(model, tokenizer, ranked, progress=False)[1],
        generate_answers(model, tokenizer, written, progress=False, max_new_tokens=4)[1],
    )
    expected = ask()
    tokenizer.pad_token = None
    assert ask() == expected


def test_unparsed_answers_are_wrong_and_counted(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))  # speaks gibberish
    summary, records = evaluate(
        model,
        tokenizer,
        load_task("boolq", "validation", format_of("generate"), limit=4),
        "generate",
        progress=False,
        max_new_tokens=4,
    )
    assert summary["unparsed"] == 1 and summary["acc"] == 0 and all(r["pred"] is None for r in records)


def test_broken_weights_are_noticed(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="item"):
        rank_choices(model, tokenizer, load_task("boolq", limit=2), progress=False)


def test_unknown_protocol():
    with pytest.raises(ValueError, match="loglikelihood, generate"):
        format_of("guess")


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": lambda n, v: transformers.LlamaConfig(
        vocab_size=v, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=n, **SIZES
    ),
    "gpt2": lambda n, v: transformers.GPT2Config(vocab_size=v, n_positions=n, n_embd=32, n_layer=2, n_head=4),
    "gpt_neo": lambda n, v: transformers.GPTNeoConfig(
        vocab_size=v,
        max_position_embeddings=n,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "global"], 1]],
    ),
    "opt": lambda n, v: transformers.OPTConfig(
        vocab_size=v, max_position_embeddings=n, ffn_dim=48, word_embed_proj_dim=32, **SIZES
    ),
}


def tiny(name, tokenizer, n):
    "A model with n positions, and weights that make a difference."
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](n, len(tokenizer))).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2) if p.dim() > 1 else None
    return model


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", MODELS)
def test_beyond_the_context(name, tiny_model_dir):
    "The same as with max_tokens: the beginning is cut off, and counted. OPT's table has two more rows than positions."
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    model, items = tiny(name, tokenizer, 64), load_task("boolq", limit=4)
    summary, records = rank_choices(model, tokenizer, items, progress=False)
    long = [max(len(tokenizer(c + e).input_ids) for c, e in zip(i["contexts"], i["continuations"])) for i in items]
    assert context_length(model) == 64 and summary["truncated"] == sum(n > 65 for n in long) > 0
    expected = rank_choices(model, tokenizer, items, max_tokens=65, progress=False)[1]
    for mine, theirs in zip(records, expected):
        assert mine["loglikelihood"] == pytest.approx(theirs["loglikelihood"], abs=1e-3)
    ids = tokenizer(items[0]["contexts"][0] + items[0]["continuations"][0], return_tensors="pt").input_ids[:, -65:]
    with torch.no_grad():
        logp = model(ids[:, :-1]).logits[0, -1].log_softmax(0)[ids[0, -1]]
    assert records[0]["loglikelihood"][0] == pytest.approx(logp.item(), abs=1e-3)


@pytest.mark.attack("silent error")
def test_what_just_fits_is_not_cut(tiny_model_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    (item,) = items = load_task("boolq", limit=1)
    n = max(len(tokenizer(c + e).input_ids) for c, e in zip(item["contexts"], item["continuations"]))
    for positions, cut in ((n - 1, 0), (n - 2, 1)):  # the last token is not an input
        summary, _ = rank_choices(tiny("gpt2", tokenizer, positions), tokenizer, items, progress=False)
        assert summary["truncated"] == cut


@pytest.mark.attack("crash")
@pytest.mark.parametrize("name", MODELS)
def test_writing_beyond_the_context(name, tiny_model_dir):
    "Prompt and answer must fit together."
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    model, items = tiny(name, tokenizer, 64), load_task("boolq", "validation", "instruction", limit=3)
    ask = lambda **how: generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6, **how)
    summary, records = ask()
    assert summary["truncated"] == sum(len(tokenizer(i["contexts"][0]).input_ids) > 58 for i in items) > 0
    assert records == ask(max_tokens=58)[1]
    with pytest.raises(ValueError, match="max_new_tokens=64 leaves nothing of the model's context of 64"):
        generate_answers(model, tokenizer, items, max_new_tokens=64)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("protocol", ["loglikelihood", "generate"])
@pytest.mark.parametrize("beams", [1, 4])
def test_weights_that_break_on_some_items(tiny_model_dir, protocol, beams):
    "One token has an embedding that is not a number: the item that holds it is named."
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", format_of(protocol), limit=4)
    used = [set(tokenizer(i["contexts"][0]).input_ids) for i in items]
    (broken, *_) = used[2] - used[0] - used[1] - used[3]
    model.get_input_embeddings().weight.data[broken] = float("nan")
    options = dict(num_beams=beams, max_new_tokens=4) if protocol == "generate" else {}
    with pytest.raises(FloatingPointError, match=f"item {items[2]['doc_index']}: .* not a number"):
        evaluate(model, tokenizer, items, protocol, progress=False, **options)
    healthy = items.select([0, 1, 3])
    assert evaluate(model, tokenizer, healthy, protocol, progress=False, **options)[0]["n"] == 3


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "continuations, text, pred",
    [
        ([" happy", " sad"], "I am unhappy", None),
        ([" happy", " sad"], "unhappy, or rather sad", 1),
        ([" not happy", " happy"], "she is not happy", 0),
        ([" not happy", " happy"], "she is happy", 1),
        ([" not happy", " very sad"], "she is happy", None),  # a last word is not an answer
        ([" not happy", " happy", " unhappy"], "UNHAPPY, not happy", 2),
        ([" Paris, France", " Rome, Italy"], "It lies in France", None),
        ([" Paris, France", " Rome, Italy"], "paris,\n France", 0),
        ([" a cat", " the cat", " the dog"], "I saw the cat.", 1),
        ([" C++", " C"], "written in C++", 0),
        ([" yes ", " no "], "No", 1),
        ([" US", " us"], "between us", 1),  # case counts where it tells choices apart
        ([" 3", " 35", " -3"], "3.5", None),
        ([" 3", " 35", " -3"], "-3, or 3", 2),
        ([" 3", " 35", " -3"], "35.", 1),
        ([" caf\u00e9", " bar"], "the cafe\u0301", 0),  # one character, or two
        (["the correct answer is option1", "the correct answer is option2"], "option2", 1),
        (["the correct answer is option1", "the correct answer is option2"], "Option2", None),
    ],
)
def test_whole_answers_are_compared(continuations, text, pred):
    assert named_choice(dict(doc_index=0, continuations=continuations), text) == pred


@pytest.mark.parametrize("name", ("boolq", "winogrande", "hellaswag", "piqa", "social_iqa", "arc_easy", "openbookqa"))
def test_the_paper_s_answers_are_found_as_its_authors_find_them(name):
    "commonsense_evaluate.py of DoRA and LLM-Adapters: the first of `re.findall`, over words that are not part of a word."
    items = load_task(name, "validation", "instruction", limit=4)
    rng = random.Random(0)
    words = "true false True option1 Option2 ending1 ending44 ending4 answer2 answer3. solution1, untrue not is the correct answer".split()
    for item in items:
        names = [c.rsplit(" ", 1)[-1] for c in item["continuations"]]
        for _ in range(200):
            text = " ".join(rng.choices(words + names, k=rng.randint(1, 8)))
            found = re.findall(rf"\b(?:{'|'.join(names)})\b", text)
            assert named_choice(item, text) == (names.index(found[0]) if found else None), text


@pytest.mark.parametrize(
    "text, completion, same",
    [(" Paris\n", "paris", True), ("Paris, France", "Paris", False), ("", "Paris", False), ("a  b", " a\nb", True)],
)
def test_exact_match(text, completion, same):
    assert matches_exactly(text, completion) == same


def completions(n):
    "Items with the text of the right choice alone."
    items = load_task("hellaswag", limit=n).to_list()
    return [i | {k: [i[k][i["gold"]]] for k in ("contexts", "continuations")} | {"gold": 0} for i in items]


@pytest.mark.parametrize("batch_tokens", (1, 10**5))
def test_a_completion_s_perplexity_is_that_of_transformers_loss(tiny_model_dir, batch_tokens):
    "And whether it is greedy is what the model writes."
    model, tokenizer = load_model(str(tiny_model_dir))
    items = completions(5)
    prompt = tokenizer(items[0]["contexts"][0], return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
    greedy = tokenizer.decode(written)
    if tokenizer(items[0]["contexts"][0] + greedy).input_ids == [*prompt[0].tolist(), *written.tolist()]:
        items[0]["continuations"] = [greedy]
    summary, records = score_completions(model, tokenizer, items, batch_tokens=batch_tokens, progress=False)
    total, tokens = 0.0, 0
    for item, record in zip(items, records):
        given, scored = encode_pair(tokenizer, item["contexts"][0], item["continuations"][0])
        ids, labels = torch.tensor([given + scored]), torch.tensor([[-100] * len(given) + scored])
        with torch.no_grad():
            out = model(ids, labels=labels)
        total, tokens = total - out.loss.item() * len(scored), tokens + len(scored)
        assert record["loglikelihood"] == pytest.approx([-out.loss.item() * len(scored)], abs=1e-3)
        best = out.logits[0, len(given) - 1 : -1].argmax(1).tolist() == scored
        assert record["pred"] == (0 if best else None) and record["gold"] == 0
    assert summary["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert summary["loglikelihood"] == pytest.approx(total / 5, abs=1e-3)
    assert summary["acc"] == sum(r["pred"] == 0 for r in records) / 5
    assert "acc_norm" not in summary and evaluate(model, tokenizer, items, progress=False)[1] == records


def test_completions_that_are_written_are_matched_exactly(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = completions(3)
    prompt = encode_text(tokenizer, items[1]["contexts"][0])
    _, records = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=4, num_beams=1)
    items[1]["continuations"] = [records[1]["output"]]
    summary, records = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=4, num_beams=1)
    assert [r["pred"] for r in records] == [None, 0, None] and len(prompt) > 0
    assert summary["acc"] == summary["exact_match"] == pytest.approx(1 / 3) and "unparsed" not in summary


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("protocol", ["loglikelihood", "generate"])
def test_one_choice_among_items_with_several(tiny_model_dir, protocol):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", format_of(protocol), limit=2).to_list() + completions(1)
    with pytest.raises(ValueError, match="it has 1 choice, and at least 2 are needed"):
        evaluate(model, tokenizer, items, protocol, progress=False)


@pytest.mark.parametrize("protocol", ("loglikelihood", "generate"))
def test_a_training_may_evaluate_now_and_then(tiny_model_dir, protocol):
    "Dropout, and whatever else asks for the mode, goes on afterwards."
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "train", format_of(protocol), 6)
    adapt(model, AdapterConfig(rank=2, dropout=0.5))
    modes = []

    def after_step(record):
        modes.append(model.training)
        evaluate(model, tokenizer, items.select(range(2)), protocol, progress=False)

    config = TrainConfig("answer", batch_size=2, end=protocol == "generate")
    train(model, tokenizer, items, config, after_step=after_step, progress=False)
    assert modes == [True] * 3
    evaluate(model.eval(), tokenizer, items.select(range(2)), protocol, progress=False)
    assert not model.training


def test_a_perplexity_that_no_float_holds(tiny_model_dir):
    "The evaluation of a model that has diverged is not lost."
    model, tokenizer = load_model(str(tiny_model_dir))
    model.lm_head.weight.data *= 1e6
    summary, _ = score_completions(model, tokenizer, completions(3), progress=False)
    assert summary["perplexity"] is None and summary["loglikelihood"] < -700


def test_a_metric_of_your_own(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("hellaswag", limit=6)

    def reciprocal_rank(items, records):
        assert [i["doc_index"] for i in items] == [r["doc_index"] for r in records]
        ranks = [sum(s >= r["loglikelihood"][r["gold"]] for s in r["loglikelihood"]) for r in records]
        return {"mrr": sum(1 / rank for rank in ranks) / len(ranks)}

    summary, records = evaluate(model, tokenizer, items, metric=reciprocal_rank, progress=False)
    assert summary["mrr"] == reciprocal_rank(items, records)["mrr"] >= summary["acc"]
    for wrong, named in (
        (lambda i, r: {"acc": 1.0}, "gives 'acc', which the summary has already"),
        (lambda i, r: 0.5, "must return a dictionary of finite numbers, and gave 0.5"),
        (lambda i, r: {"f1": math.nan}, "must return a dictionary of finite numbers"),
    ):
        with pytest.raises(ValueError, match=named):
            evaluate(model, tokenizer, items, metric=wrong, progress=False)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("continuations", [[" yes", " yes"], [" big cat", "big  cat"]])
def test_answers_that_cannot_be_told_apart(tiny_model_dir, continuations):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", "instruction", limit=2).to_list()
    items[1]["continuations"] = continuations
    with pytest.raises(ValueError, match=rf"item {items[1]['doc_index']}: its choices cannot be told apart"):
        generate_answers(model, tokenizer, items, progress=False)


def test_our_own_answers_are_matched_as_before():
    "By its last word, whatever stands around it."
    for name in ("boolq", "winogrande", "hellaswag", "arc_easy"):
        (item,) = load_task(name, "validation", "instruction", limit=1)
        names = [c.rsplit(" ", 1)[-1] for c in item["continuations"]]
        assert answers_of(item) == names
        for i, word in enumerate(names):
            for text in (
                f"the correct answer is {word}",
                f"\n{word}.",
                f"({word}) {names[0]}",
                f"{word}, not {names[-1]}",
            ):
                assert match_answer(text, names) == i


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("protocol", ["loglikelihood", "generate"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(batch_tokens=0), "batch_tokens=0"),
        (dict(batch_tokens=-5), "batch_tokens=-5"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(precision="float8"), "precision='float8' does not exist"),
        (dict(items=[]), "no items"),
    ],
    ids=str,
)
def test_impossible_options(tiny_model_dir, protocol, wrong, message, monkeypatch):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", format_of(protocol), limit=2)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, protocol=protocol, progress=False, **dict(items=items) | wrong)


@pytest.mark.attack("silent error")
def test_a_model_that_writes_is_given_one_prompt(tiny_model_dir, monkeypatch):
    model, tokenizer = load_model(str(tiny_model_dir))
    same = dict(doc_index=7, contexts=["Cats are"] * 2, continuations=[" one", " two"], gold=1)
    items = [same, same | dict(doc_index=9, contexts=["Cats are", "Dogs are"])]
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=r"item 9 \(at place 1\) has a context for each choice"):
        generate_answers(model, tokenizer, items, progress=False)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "name, value",
    [
        ("suppress_tokens", None),
        ("begin_suppress_tokens", None),
        ("bad_words_ids", None),
        ("sequence_bias", None),
        ("forced_eos_token_id", 7),
        ("encoder_repetition_penalty", 5.0),
        ("exponential_decay_length_penalty", (1, 2.0)),
        ("guidance_scale", 3.0),
        ("max_time", 1e-6),
        ("min_new_tokens", 6),
        ("stop_strings", ["a"]),
        ("watermarking_config", dict(bias=5.0)),
    ],
)
def test_nothing_of_a_generation_config_changes_the_protocol(tiny_model_dir, name, value):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("winogrande", "validation", "instruction", limit=2)
    ask = lambda: generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)[1]
    expected = ask()
    first = tokenizer(expected[0]["output"]).input_ids[:1]
    values = dict(bad_words_ids=[first], sequence_bias=[[first, -99.0]])
    setattr(model.generation_config, name, values.get(name, first) if value is None else value)
    own = model.generation_config
    assert ask() == expected and model.generation_config is own


def decoders(tokenizer):
    "Models that go wrong on batches of prompts, or with their caches, beside one that does not."
    n, sizes = len(tokenizer), dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return {
        "rwkv": transformers.RwkvConfig(vocab_size=n, hidden_size=32, num_hidden_layers=2, intermediate_size=48),
        "trocr": transformers.TrOCRConfig(vocab_size=n, max_position_embeddings=256, **ends, **sizes),
        "whisper": transformers.WhisperConfig(vocab_size=n, max_target_positions=256, **ends, **sizes),
        "bart": transformers.BartConfig(vocab_size=n, encoder_layers=1, **ends, **sizes),
        "opt": transformers.OPTConfig(vocab_size=n, ffn_dim=48, word_embed_proj_dim=32, **ends, **SIZES),
    }


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", ["rwkv", "trocr", "whisper", "bart", "opt"])
def test_a_model_writes_what_it_says_of_the_whole_text(toy_tokenizer, name, beams):
    "Whatever else is in its batch. RWKV and BART go wrong with more beams than one, too, and raise an error there."
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(decoders(tokenizer)[name]).eval()
    for p in model.parameters():
        p.data.normal_(std=p.shape[-1] ** -0.5) if p.dim() > 1 else None
    text = lambda i: f"Question {i} is {'long ' * i}?"
    items = [dict(doc_index=i, contexts=[text(i)] * 2, continuations=[" a", " b"], gold=0) for i in range(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask = dict(num_beams=beams, max_new_tokens=5, progress=False)
        records = generate_answers(model, tokenizer, items, **ask)[1]
    said = [str(w.message) for w in caught if "gives other scores" in str(w.message)]
    assert len(said) == (name != "opt") and (not said or f"this {model.config.model_type} model" in said[0])
    model.generation_config = transformers.GenerationConfig()
    for item, record in zip(items, records):
        ids = torch.tensor([tokenizer(item["contexts"][0]).input_ids])
        mask = torch.ones_like(ids)
        how = dict(num_beams=beams, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=1, eos_token_id=1)
        whole = model.generate(input_ids=ids, attention_mask=mask, **how)[0, ids.shape[1] :]
        assert record["output"] == tokenizer.decode(whole, skip_special_tokens=True)


@pytest.mark.attack("crash")
def test_a_model_that_cannot_write_says_so(tiny_model_dir, monkeypatch):
    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("boolq", "validation", "instruction", limit=1)
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: [][0])
    with pytest.raises(ValueError, match=r"this llama model cannot write here \(list index .*protocol loglikelihood"):
        generate_answers(model, tokenizer, items, progress=False)
