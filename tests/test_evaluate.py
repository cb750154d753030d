"Intervals against published values, matching, batches that change nothing."

import pytest
import torch
import transformers

from dora_nb.assets import load_model
from dora_nb.evaluate import evaluate, format_of, generate_answers, match_answer, rank_choices, standard_error, wilson
from dora_nb.tasks import encode_text, load_task


@pytest.mark.parametrize(
    "right,n,low,high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_prints_it(right, n, low, high):
    "Newcombe (1998), Statistics in Medicine 17, table I, method 3."
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


def test_standard_error():
    assert standard_error(0.5, 101) == pytest.approx(0.05) and standard_error(1.0, 1) is None


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


def test_generation_does_not_depend_on_padding(smollm):
    model, tokenizer = smollm
    items = load_task("boolq", "validation", "instruction", limit=5)
    _, one_by_one = generate_answers(model, tokenizer, items, batch_tokens=1, progress=False, max_new_tokens=6)
    _, together = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)
    assert [r["output"] for r in one_by_one] == [r["output"] for r in together]


def test_beams_share_the_reading_of_their_prompt(smollm):
    "The answers are those of `generate` alone, item by item; a prompt is read once and not four times."
    model, tokenizer = smollm
    items, read = load_task("winogrande", "validation", "instruction", limit=3), []
    prompts = [torch.tensor([encode_text(tokenizer, item["contexts"][0])]) for item in items]
    options = dict(max_new_tokens=6, num_beams=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    alone = [tokenizer.decode(model.generate(p, **options)[0, p.shape[1] :], skip_special_tokens=True) for p in prompts]
    hook = model.get_input_embeddings().register_forward_hook(lambda m, x, y: read.append(x[0].numel()))
    _, records = generate_answers(model, tokenizer, items, progress=False, max_new_tokens=6)
    hook.remove()
    assert [r["output"] for r in records] == alone
    assert sum(read) <= 3 * max(p.shape[1] for p in prompts) + 3 * 4 * 6


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
