"What the loop promises: sizes of micro-batches do not matter, seeds fix everything, numbers that are none stop it."

import contextlib
import functools
import json
import math
import os
import random
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import dora_nb.training.checkpoints
import dora_nb.training.config
import dora_nb.training.step
import dora_nb.training.train
from dora_nb.data.rows import collate
from dora_nb.data.tasks import load_task
from dora_nb.models.adapt import adapt, adapter_layers, trainable_parameters
from dora_nb.models.disable import disable_adapter
from dora_nb.models.merge import merge
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.scoring import _sees_masked_tokens, context_length, original_length, shares_prompts, token_logprobs
from dora_nb.training.batches import epoch_batches, micro_batches
from dora_nb.training.checkpoints import Checkpoints, Stopped, _sum_of_bits
from dora_nb.training.config import TrainConfig, autocast, fast_bfloat16, resolve_precision, tf32
from dora_nb.training.evaluate import generate_answers, rank_choices
from dora_nb.training.objectives import count_terms, encode_for, summed_loss
from dora_nb.training.step import memory_plan, train_step
from dora_nb.training.train import Diverged, IdleAdapter, train, warmup_and_decay


@functools.cache
def items(name="arc_easy", n=24, **kwargs):
    return load_task(name, "train", limit=n, **kwargs)


@pytest.fixture(scope="session")
def tiny(tiny_model):
    def make(method="dora", **kwargs):
        model, tokenizer = tiny_model()
        torch.manual_seed(0)
        return adapt(model, AdapterConfig(method, rank=4, **kwargs)), tokenizer

    return make


def params(model):
    return {n: p.detach().clone() for n, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("objective", ("answer", "prompt", "choices", "choices_mean"))
@pytest.mark.long
def test_micro_batches_do_not_change_the_gradient(tiny, objective):
    model, tokenizer = tiny()
    data = items("hellaswag", 8)
    rows, gold = [encode_for(objective, tokenizer, i)[0] for i in data], data["gold"]
    config, grads = TrainConfig(objective=objective, precision="float32"), []
    for batch_tokens in (1, 600, 10**6):
        groups = [
            (collate([rows[i] for i in g]), torch.tensor([gold[i] for i in g]))
            for g in micro_batches(range(8), rows, batch_tokens)
        ]
        loss = train_step(model, groups, sum(count_terms(batch, objective) for batch, _ in groups), config)
        grads.append((loss, {n: p.grad.clone() for n, p in trainable_parameters(model).items()}))
        model.zero_grad()
    assert len({len(list(micro_batches(range(8), rows, t))) for t in (1, 600, 10**6)}) == 3
    for loss, grad in grads[1:]:
        assert loss == pytest.approx(grads[0][0], rel=1e-5)
        for name in grad:
            torch.testing.assert_close(grad[name], grads[0][1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", ("answer", "prompt"))
def test_language_modelling_losses_are_transformers(tiny, objective):
    "Against the loss that the model itself computes from labels."
    model, tokenizer = tiny()
    item = items("winogrande", 1)[0]
    (row,), _ = encode_for(objective, tokenizer, item)
    batch = collate([[row]])
    loss = summed_loss(model, batch, torch.tensor([item["gold"]]), objective) / count_terms(batch, objective)
    ids = tokenizer(item["contexts"][item["gold"]] + item["continuations"][item["gold"]], return_tensors="pt").input_ids
    labels = ids.clone()
    if objective == "answer":
        labels[:, : len(tokenizer(item["contexts"][item["gold"]]).input_ids)] = -100
    torch.testing.assert_close(loss, model(ids, labels=labels).loss)


def test_only_checkpoints_need_the_identity(tiny, tmp_path, monkeypatch):
    "It reads every weight of the model."
    asked = []
    monkeypatch.setattr(dora_nb.training.train, "_identity", lambda training: asked.append(training) or "a b")
    for folder, times in ((None, 0), (tmp_path, 1)):
        model, tokenizer = tiny()
        train(model, tokenizer, items(), TrainConfig(batch_size=8), checkpoints=folder, progress=False)
        assert len(asked) == times


@pytest.mark.parametrize(
    "has_instructions, high, low, found",
    [
        (True, 2.2, 1.0, "bfloat16"),
        (True, 1.0, 2.0, "float32"),
        (True, 1.1, 1.0, "float32"),
        (False, 2.2, 1.0, "float32"),
    ],
)
def test_a_cpu_uses_bfloat16_only_where_its_products_are_clearly_faster(
    monkeypatch, has_instructions, high, low, found
):
    "Of two CPUs with vector instructions for bfloat16, one was 2.2 times as fast in it and one half as fast."
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    seconds = {torch.float32: high, torch.bfloat16: low}
    monkeypatch.setattr(dora_nb.training.config, "_product_seconds", seconds.__getitem__)
    fast_bfloat16.cache_clear()
    try:
        assert resolve_precision("auto", torch.device("cpu")) == found
    finally:
        fast_bfloat16.cache_clear()


def test_timing_products_leaves_the_random_numbers_alone():
    fast_bfloat16.cache_clear()
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert dora_nb.training.config._product_seconds(torch.float32) > 0
    fast_bfloat16(torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("objective", ("choices", "choices_mean"))
def test_ranking_losses_by_hand(tiny, objective):
    model, tokenizer = tiny()
    item = items("hellaswag", 1)[0]
    (row,), _ = encode_for(objective, tokenizer, item)
    loss = summed_loss(model, collate([[row]]), torch.tensor([item["gold"]]), objective)
    scores = []
    for context, continuation in zip(item["contexts"], item["continuations"]):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        n = len(tokenizer(context).input_ids)
        logp = model(ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None])
        scores.append(logp.sum() if objective == "choices" else logp.mean())
    torch.testing.assert_close(loss, -torch.stack(scores).log_softmax(0)[item["gold"]], atol=1e-4, rtol=1e-4)


def test_tf32_is_asked_for_only_where_there_is_one_and_given_back(monkeypatch):
    gpu, now = torch.device("cuda"), torch.get_float32_matmul_precision
    assert resolve_precision("tf32", torch.device("cpu")) == "float32" and now() == "highest"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(RuntimeError, match="broken"), tf32("tf32", gpu):
        assert resolve_precision("tf32", gpu) == "tf32" and now() == "high"
        raise RuntimeError("broken")
    assert now() == "highest"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with tf32("tf32", gpu):
        assert resolve_precision("tf32", gpu) == "float32" and now() == "highest"


def test_bfloat16_does_not_round_the_logits(smollm):
    "Logits in bfloat16 come in steps of an eighth at this size, and so would the margins between two choices."
    model, tokenizer = smollm
    data = items("boolq", 2)
    batch = collate([encode_for("choices", tokenizer, i)[0] for i in data])
    with torch.no_grad(), autocast("bfloat16", model.device):
        no, yes = token_logprobs(model, batch).view(-1, 2).T
    assert ((8 * (no - yes)) % 1 != 0).all() and "forward" not in vars(model.get_output_embeddings())


def test_the_end_is_trained_where_answers_are_generated(tiny):
    model, tokenizer = tiny()
    item = items(format="instruction")[0]
    (row,), _ = encode_for("answer", tokenizer, item, end=True)
    assert row.target[-1] == tokenizer.eos_token_id
    # By lm-eval's rule the line break at the end of the prompt counts as part of what follows it.
    assert tokenizer.decode(row.target[:-1]) == "\n" + item["continuations"][item["gold"]]


@pytest.mark.long
def test_a_seed_fixes_a_run_to_the_bit(tiny, tmp_path):
    runs = []
    for seed in (0, 0, 1):
        model, tokenizer = tiny(dropout=0.1)
        records = train(
            model,
            tokenizer,
            items(),
            TrainConfig(batch_size=4, epochs=2, seed=seed),
            tmp_path / "h.jsonl",
            progress=False,
        )
        runs.append((params(model), [r["loss"] for r in records]))
        assert [json.loads(line)["loss"] for line in (tmp_path / "h.jsonl").read_text().splitlines()] == runs[-1][
            1
        ] and len(records) == 12
    assert runs[0][1] == runs[1][1] and all(torch.equal(runs[0][0][n], runs[1][0][n]) for n in runs[0][0])
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("method", ("lora", "dora", "full"))
@pytest.mark.long
def test_it_learns(tiny, method):
    "Sixteen items, seen many times, are learnt by heart."
    model, tokenizer = tiny(method)
    records = train(
        model,
        tokenizer,
        items("winogrande", n=16),
        TrainConfig(learning_rate=2e-2 if method != "full" else 5e-3, batch_size=16, epochs=60, precision="float32"),
        progress=False,
    )
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]


@pytest.mark.parametrize("context", (lambda model: merge(model) and contextlib.nullcontext(), disable_adapter))
def test_nothing_to_train_is_said(tiny, context):
    model, tokenizer = tiny()
    with context(model), pytest.raises(ValueError, match="nothing to train.*merged or disabled"):
        train(model, tokenizer, items(), TrainConfig(batch_size=8), progress=False)


def test_frozen_weights_stay(tiny):
    model, tokenizer = tiny()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = params(model)
    train(model, tokenizer, items(), TrainConfig(batch_size=8), progress=False)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(not torch.equal(p, before[n]) for n, p in params(model).items())


def test_nan_names_step_and_items(tiny):
    model, tokenizer = tiny()
    data = items(n=8)

    def poison(record):
        if record["step"] == 1:
            next(iter(trainable_parameters(model).values())).data[0] = float("nan")

    with pytest.raises(Diverged, match="step 2 of 2.*items") as e:
        train(model, tokenizer, data, TrainConfig(batch_size=4), after_step=poison, progress=False)
    assert sum(str(d) in str(e.value) for d in data["doc_index"]) == 4


def test_more_can_be_recorded(tiny):
    model, tokenizer = tiny()
    records = train(
        model,
        tokenizer,
        items(n=8),
        TrainConfig(batch_size=4),
        after_step=lambda r: {"twice": 2 * r["step"]},
        progress=False,
    )
    assert [r["twice"] for r in records] == [2, 4]


def test_every_item_once_an_epoch_and_neighbours_of_like_length():
    rng = random.Random(0)
    lengths = [rng.randint(10, 300) for _ in range(1003)]
    batches = epoch_batches(lengths, 16, random.Random(1))
    assert sorted(i for b in batches for i in b) == list(range(1003)) and max(map(len, batches)) == 16
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert 1 - sum(lengths) / padded < 0.05
    assert batches != epoch_batches(lengths, 16, random.Random(2))


def test_schedule():
    rate = warmup_and_decay(100, 0.1)
    assert (
        rate(0) == pytest.approx(0.1)
        and rate(9) == 1
        and rate(55) == pytest.approx(0.5)
        and rate(99) == pytest.approx(1 / 90)
        and rate(100) == 0
    )
    assert all(math.isfinite(warmup_and_decay(n, w)(s)) for n in (1, 2, 3) for w in (0, 0.5, 0.9) for s in range(n + 1))


@pytest.mark.parametrize(
    "wrong",
    (
        dict(objective="x"),
        dict(learning_rate=0),
        dict(learning_rate=math.inf),
        dict(weight_decay=-1),
        dict(magnitude_lr=-1),
        dict(magnitude_lr=math.nan),
        dict(magnitude_lr=1e300),
        dict(magnitude_lr=1e20, learning_rate=1e20),
        dict(magnitude_lr=True),
        dict(seed=-1),
        dict(batch_size=0),
        dict(warmup_ratio=1),
    ),
)
def test_impossible_values(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_out_of_memory_halves_the_micro_batches_and_changes_nothing(tiny, monkeypatch, tmp_path):
    "Injected where a GPU would raise it: in the forward pass of a large micro-batch, after a small one went through."
    config = TrainConfig(batch_size=8, batch_tokens=2000, precision="float32")
    model, tokenizer = tiny()
    plenty = train(model, tokenizer, items(), config, progress=False)
    want, forward, refused = params(model), dora_nb.training.step.summed_loss, []

    def small_gpu(model, batch, gold, objective):
        if batch.input_ids.numel() > 130:
            refused.append(batch.input_ids.numel())
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch, gold, objective)

    monkeypatch.setattr(dora_nb.training.step, "summed_loss", small_gpu)
    model, _ = tiny()
    with pytest.warns(UserWarning, match="batch_tokens="):
        records = train(model, tokenizer, items(), config, progress=False)
    assert refused and records[-1]["batch_tokens"] <= 130 < plenty[-1]["batch_tokens"] == 2000
    assert [r["items"] for r in records] == [r["items"] for r in plenty]
    torch.testing.assert_close(params(model), want, atol=1e-5, rtol=1e-3)

    monkeypatch.setattr(
        dora_nb.training.step, "summed_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with (
        pytest.warns(UserWarning),
        pytest.raises(torch.OutOfMemoryError, match="single items.*gradient_checkpointing=true"),
    ):
        train(tiny()[0], tokenizer, items(), config, progress=False)


@pytest.mark.parametrize("method", ("lora", "dora", "full"))
@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_gradient_checkpointing_changes_memory_only(tiny, method, precision):
    config, results = TrainConfig(batch_size=8, precision=precision), []
    for checkpointing in (False, True):
        model, tokenizer = tiny(method)
        train(model, tokenizer, items(), replace(config, gradient_checkpointing=checkpointing), progress=False)
        assert not model.is_activation_checkpointing and not model.training
        results.append(params(model))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_the_memory_plan_counts_what_there_is(tiny, capsys):
    model, tokenizer = tiny()
    train(model, tokenizer, items(n=4), TrainConfig(batch_size=4))
    assert "memory: weights" in capsys.readouterr().err
    data = items(n=4)
    rows = [encode_for("choices", tokenizer, i)[0] for i in data]
    before, state = params(model), torch.get_rng_state()
    plan = memory_plan(model.train(), rows, data["gold"], TrainConfig())
    assert torch.equal(torch.get_rng_state(), state) and all(
        torch.equal(v, params(model)[n]) for n, v in before.items()
    )
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    assert plan["gradients"] == 4 * trained and plan["optimiser"] == 8 * trained
    assert plan["weights"] >= 4 * sum(p.numel() for p in model.parameters()) and plan["activations"] > 0


SHORT = TrainConfig(batch_size=4, learning_rate=2e-3, precision="float32")


def attempts(tiny, folder, most=100, method="dora", **options):
    "Train again and again from the last checkpoint, until it is done; the records, the parameters, and how often."
    for n in range(1, most):
        model, tokenizer = tiny(method, **({} if method == "full" else {"dropout": 0.1}))
        try:
            records = train(model, tokenizer, items(), SHORT, progress=False, checkpoints=folder, **options)
            return [{k: v for k, v in r.items() if k != "seconds"} for r in records], params(model), n
        except Stopped:
            pass
    raise AssertionError("never done")


def same(a, b):
    assert a[0] == b[0] and all(torch.equal(a[1][n], b[1][n]) for n in b[1])


@pytest.fixture(scope="module")
def wholes(tiny):
    "What trainings give that nobody disturbs, by method; and how long it takes."
    made = {}

    def make(method="dora"):
        if method not in made:
            began = time.monotonic()
            made[method] = (*attempts(tiny, None, method=method), time.monotonic() - began)
        return made[method]

    return make


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_of_steps(tiny, wholes, tmp_path, monkeypatch, method, number):
    "A signal in a forward pass: that step is given up, and made again with the same dropout."
    plain, calls, history = dora_nb.training.step.summed_loss, [], tmp_path / "history.jsonl"

    def signalled(*args):
        out = plain(*args)
        calls.append(1)
        if len(calls) in (2, 5, 6):
            os.kill(os.getpid(), number)
        return out

    whole = wholes(method)
    monkeypatch.setattr(dora_nb.training.step, "summed_loss", signalled)
    before = signal.getsignal(number)
    parts = attempts(tiny, tmp_path / "c", method=method, history=history)
    assert len(calls) == 9 and parts[2] == 4 and signal.getsignal(number) is before
    same(parts, whole)
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()] == list(range(1, 7))


@pytest.mark.long
def test_stopped_at_any_moment(tiny, wholes, tmp_path):
    "Signals from a clock, wherever they fall, loading and saving included; and what is seen after a step is seen once."
    whole, rng, seen = wholes(), random.Random(0), []
    for round in range(8):
        timers = [
            threading.Timer(rng.uniform(0, 3 * whole[-1]), os.kill, (os.getpid(), signal.SIGTERM)) for _ in range(3)
        ]
        outside = signal.signal(signal.SIGTERM, lambda *_: None)  # before and after the training
        try:
            for timer in timers:
                timer.start()
            look = lambda record: seen.append(record["step"]) or {"looked": record["step"]}
            parts = attempts(tiny, tmp_path / str(round), after_step=look, checkpoint_seconds=0.0)
        finally:
            for timer in timers:
                timer.join()
            signal.signal(signal.SIGTERM, outside)
        assert [r.pop("looked") for r in parts[0]] == list(range(1, 7))
        same(parts, whole)
        assert len(list((tmp_path / str(round)).iterdir())) == 2  # the last two, and nothing half-written
    assert 8 * 6 <= len(seen) <= 8 * (6 + 3)  # a signal may cut off a look, and only that one is made again


@pytest.fixture(scope="module")
def stopped_once(tiny, tmp_path_factory):
    stop, folder = (
        lambda r: os.kill(os.getpid(), signal.SIGTERM) if r["step"] == 4 else None,
        tmp_path_factory.mktemp("s"),
    )
    model, tokenizer = tiny(dropout=0.1)
    options = dict(after_step=stop, progress=False, checkpoints=folder, checkpoint_seconds=0.0)
    with pytest.raises(Stopped):
        train(model, tokenizer, items(), SHORT, **options)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    "A folder with two checkpoints of a training that was stopped after its fourth step."
    return sorted(Path(shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)).iterdir())


def flipped(part):
    "Changes a digit in the history, or a bit of the last tensor."
    return lambda b: b.replace(b'step\\": 2', b'step\\": 7', 1) if part == "facts" else b[:-1] + bytes([b[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", flipped("facts"), flipped("tensor")])
def test_a_damaged_checkpoint(tiny, wholes, stopped, damage):
    "Falls back to the one before it, and to the start if there is none."
    whole = wholes()
    assert [p.name for p in stopped] == ["step-00000003.safetensors", "step-00000004.safetensors"]
    stopped[1].write_bytes(damage(stopped[1].read_bytes()))
    with pytest.warns(UserWarning, match="00000004.safetensors is damaged.*the one before it"):
        same(attempts(tiny, stopped[0].parent), whole)
    for path in stopped[0].parent.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        same(attempts(tiny, stopped[0].parent), whole)


def test_a_checkpoint_of_another_training(tiny, stopped):
    model, tokenizer = tiny()
    with pytest.raises(
        ValueError, match="is of another training: of other items, another model or adapter, or other settings"
    ):
        train(model, tokenizer, items(n=20), SHORT, progress=False, checkpoints=stopped[0].parent)


def test_a_checkpoint_of_another_model_or_adapter(tiny, tmp_path):
    "Of the same shapes, items and settings: what is frozen and how the adapter is set up tell them apart."
    (model, tokenizer), refused = (
        tiny("dora"),
        "is of another training: of other items, another model or adapter, or other settings",
    )
    go = lambda model: train(model, tokenizer, items(), SHORT, progress=False, checkpoints=tmp_path)
    go(model)
    for change in (dict(alpha=3.0), dict(dropout=0.5), dict(detach_norm=False), dict(rslora=True)):
        with pytest.raises(ValueError, match=refused):
            go(tiny("dora", **change)[0])
    other = tiny("dora")[0]
    other.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match=refused):
        go(other)
    assert len(go(tiny("dora")[0])) == 6


def test_a_checkpoint_holds_no_code(stopped):
    "safetensors and JSON only: nothing is unpickled."
    from safetensors import safe_open

    for path in stopped:
        with safe_open(path, "pt") as f:
            assert set(f.metadata()) == {"what", "facts", "sha256"} and json.loads(f.metadata()["facts"])["records"]


def test_checkpoints_are_made_when_they_are_due(tiny, tmp_path):
    model, tokenizer = tiny()
    train(model, tokenizer, items(), SHORT, progress=False, checkpoints=tmp_path, checkpoint_seconds=1000.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006.safetensors"]  # the end
    kept = Checkpoints(None, "", trainable_parameters(model), torch.optim.AdamW(model.parameters()))
    kept.write()
    assert kept.restore() == {"records": []}


def test_the_same_model_goes_on_after_it_was_stopped(tiny, wholes, tmp_path, monkeypatch):
    "Half a gradient that the stopped step left is not added to the next."
    whole, plain, stops = wholes(), torch.Tensor.backward, [1]

    def backward(self):
        plain(self)
        if stops and stops.pop():
            raise Stopped("now")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    model, tokenizer = tiny(dropout=0.1)
    with pytest.raises(Stopped):
        train(model, tokenizer, items(), SHORT, progress=False, checkpoints=tmp_path)
    records = train(model, tokenizer, items(), SHORT, progress=False, checkpoints=tmp_path)
    same(([{k: v for k, v in r.items() if k != "seconds"} for r in records], params(model)), whole)


def by_hand(model, tokenizer, magnitude_lr):
    "Train with PyTorch's optimiser and scheduler alone; the magnitudes in a group of their own, or frozen."
    magnitude = {n: p for n, p in trainable_parameters(model).items() if n.endswith("magnitude")}
    for p in magnitude.values():
        p.requires_grad_(magnitude_lr > 0)
    others = [p for n, p in trainable_parameters(model).items() if n not in magnitude]
    groups = [dict(params=others), dict(params=list(magnitude.values()), lr=SHORT.learning_rate * magnitude_lr)]
    optimizer = torch.optim.AdamW(groups[: 2 if magnitude_lr else 1], lr=SHORT.learning_rate, weight_decay=0)
    rows = [encode_for("choices", tokenizer, item)[0] for item in items()]
    batches = epoch_batches([max(len(r.ids) for r in item) for item in rows], SHORT.batch_size, random.Random(0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay(len(batches), SHORT.warmup_ratio))
    for batch in batches:
        gold = torch.tensor([items()[i]["gold"] for i in batch])
        (summed_loss(model, collate([rows[i] for i in batch]), gold, "choices") / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable_parameters(model).values()), SHORT.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for p in magnitude.values():
        p.requires_grad_(True)


@pytest.mark.parametrize("magnitude_lr", [0, 0.5, 1, 30])
def test_the_magnitude_at_its_own_rate(tiny, magnitude_lr):
    model, tokenizer = tiny()
    start = params(model)
    train(model, tokenizer, items(), replace(SHORT, magnitude_lr=magnitude_lr), progress=False)
    other, _ = tiny()
    by_hand(other, tokenizer, magnitude_lr)
    assert params(model).keys() == params(other).keys() == start.keys()
    for name, p in params(other).items():
        moved = (p - start[name]).abs().max()
        assert name.endswith("lora_A") or bool(moved > 0) == (magnitude_lr > 0 or not name.endswith("magnitude"))
        # Adam divides by the gradient's size, so that rounding can turn a step where the gradient is nearly zero
        assert (params(model)[name] - p).abs().max() <= 0.05 * moved + 1e-7, name


def test_one_rate_for_all_gives_what_one_group_gave(tiny, monkeypatch):
    "The group of the magnitudes changes no bit at the common rate; and LoRA has no such group."
    for method in ("lora", "dora"):
        own = attempts(tiny, None, method=method)
        one = lambda model, rate, _: [dict(params=list(trainable_parameters(model).values()), lr=rate)]
        with monkeypatch.context() as m:
            m.setattr(dora_nb.training.train, "parameter_groups", one)
            same(attempts(tiny, None, method=method), own)


@pytest.mark.parametrize("magnitude_lr", [0, 30])
def test_a_stopped_training_with_an_own_rate_goes_on(tiny, tmp_path, monkeypatch, magnitude_lr):
    config, ended = replace(SHORT, magnitude_lr=magnitude_lr), []
    for folder in (None, tmp_path):
        model, tokenizer = tiny(dropout=0.1)
        stop = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 3 else None
        if folder:
            with pytest.raises(Stopped):
                train(model, tokenizer, items(), config, progress=False, checkpoints=folder, after_step=stop)
            assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith("magnitude"))
            model, tokenizer = tiny(dropout=0.1)
        train(model, tokenizer, items(), config, progress=False, checkpoints=folder)
        ended.append(params(model))
    assert all(torch.equal(p, ended[1][n]) for n, p in ended[0].items())


FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
KIN = {
    "bloom": lambda v: transformers.BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4),
    "falcon, alibi": lambda v: transformers.FalconConfig(vocab_size=v, alibi=True, **FALCON),
    "falcon, rope": lambda v: transformers.FalconConfig(
        vocab_size=v, new_decoder_architecture=True, num_kv_heads=2, **FALCON
    ),
    "mpt": lambda v: transformers.MptConfig(vocab_size=v, d_model=32, n_layers=2, n_heads=4),
    "mamba": lambda v: transformers.MambaConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=4),
    "gpt_neo": lambda v: transformers.GPTNeoConfig(
        vocab_size=v, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
}
LAYERS = {
    "bloom": "query_key_value",
    "falcon": "query_key_value",
    "mpt": "Wqkv",
    "mamba": "in_proj",
    "gpt_neo": "v_proj",
}


@pytest.mark.attack("crash")
@pytest.mark.parametrize("name", KIN)
def test_models_of_other_kinds(name, tiny_model_dir):
    "No mask with branches where it is not understood; positions without an end; a step is made, and scores are the model's."
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KIN[name](len(tokenizer)))
    assert shares_prompts(model) == (name == "falcon, rope")
    assert context_length(model) == (2048 if name in ("falcon, rope", "gpt_neo") else None)
    if name.startswith("falcon"):  # its linear layers are of a type of its own
        adapt(model, AdapterConfig("full"))
    else:
        adapt(model, AdapterConfig("dora", rank=2, target_modules=[LAYERS[name]]))
    before = params(model)
    records = train(model, tokenizer, items(n=4), TrainConfig(batch_size=4, precision="float32"), progress=False)
    assert math.isfinite(records[0]["loss"]) and any(not torch.equal(p, before[n]) for n, p in params(model).items())
    data = items("hellaswag", 2)
    _, found = rank_choices(model, tokenizer, data, progress=False)
    for item, record in zip(data, found):
        for context, continuation, ours in zip(item["contexts"], item["continuations"], record["loglikelihood"]):
            (start,), (ids,) = (tokenizer(t, return_tensors="pt").input_ids for t in (context, context + continuation))
            with torch.no_grad():
                logp = model(ids[None]).logits[0, len(start) - 1 : -1].log_softmax(1).gather(1, ids[len(start) :, None])
            assert ours == pytest.approx(logp.sum().item(), abs=2e-3)


@pytest.mark.attack("silent error")
def test_masks_of_a_model_s_own_are_not_replaced():
    "A window, chunks or a convolution: a mask with branches would take their place, or not be seen."
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    jamba = dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4)
    for config in (
        transformers.JambaConfig(**sizes | jamba, num_key_value_heads=4),
        transformers.Qwen2Config(
            **sizes, num_key_value_heads=4, sliding_window=None, layer_types=["full_attention", "chunked_attention"]
        ),
    ):
        assert _sees_masked_tokens(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("objective", ("answer", "prompt", "choices"))
def test_training_beyond_the_context(tiny_model, objective):
    "What is longer loses its beginning, with a warning that names the context; nothing is trained past it."
    model, tokenizer = tiny_model()
    model.config.max_position_embeddings = 48
    adapt(model, AdapterConfig("lora", rank=2))
    seen = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    with pytest.warns(
        UserWarning, match="4 of 4 items.* were longer than max_tokens=2048 or the model's context of 48"
    ):
        train(model, tokenizer, items("boolq", 4), TrainConfig(objective, batch_size=4), progress=False)
    assert max(seen) == 47


@pytest.mark.attack("silent error")
def test_full_tuning_in_bfloat16_warns_and_in_float16_is_refused(tiny):
    model, tokenizer = tiny("full")
    with pytest.warns(UserWarning, match="that learn are bfloat16.*Load the model in float32.*precision='bfloat16'"):
        train(model.to(torch.bfloat16), tokenizer, items(n=4), TrainConfig(batch_size=4), progress=False)
    before = params(model.half())
    with pytest.raises(ValueError, match="is float16: .*no loss scaling.*Load the model in float32"):
        train(model, tokenizer, items(n=4), TrainConfig(batch_size=4), progress=False)
    assert all(torch.equal(p, before[n]) for n, p in params(model).items())


def test_an_adapter_on_a_bfloat16_model_is_float32_and_learns_without_a_warning(tiny_model, recwarn):
    model, tokenizer = tiny_model()
    adapt(model.to(torch.bfloat16), AdapterConfig("dora", rank=2))
    train(model, tokenizer, items(n=4), TrainConfig(batch_size=4), progress=False)
    assert all(p.dtype == torch.float32 for p in params(model).values())
    assert not [w for w in recwarn if "bfloat16" in str(w.message)]


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "wrong",
    [
        dict(epochs=1.5),
        dict(epochs=True),
        dict(batch_size=0.5),
        dict(batch_size="16"),
        dict(batch_tokens=True),
        dict(batch_tokens=64.0),
        dict(seed=2**32),
        dict(seed=1.0),
        dict(seed=None),
        dict(learning_rate=math.nan),
        dict(learning_rate=1e300),
        dict(max_grad_norm=1e300),
        dict(weight_decay=1e300),
        dict(weight_decay=1e20, learning_rate=1e20),
        dict(epochs=10**400),
        dict(learning_rate=True),
        dict(weight_decay=math.nan),
        dict(warmup_ratio=math.nan),
        dict(max_grad_norm=math.nan),
        dict(max_tokens=2e3),
        dict(precision="half"),
        dict(precision=16),
        dict(objective=["choices"]),
        dict(gradient_checkpointing=1),
        dict(end="no"),
    ],
    ids=str,
)
def test_types_of_a_configuration(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_the_largest_seed(tiny):
    model, tokenizer = tiny()
    config = TrainConfig(batch_size=4, seed=2**32 - 1, learning_rate=1)  # a whole number is a rate, too
    assert len(train(model, tokenizer, items(n=4), config, progress=False)) == 1
    assert TrainConfig(learning_rate=np.float64(1e-3), batch_tokens=None) == TrainConfig()


@pytest.mark.parametrize(
    "config, n",
    [
        (transformers.GPT2Config(n_positions=77), 77),
        (transformers.OPTConfig(max_position_embeddings=78), 78),  # its table has two rows more
        (transformers.MptConfig(max_seq_len=79, attn_config=dict(alibi=False)), 79),
        (transformers.MptConfig(max_seq_len=79, attn_config=dict(alibi=True)), None),
        (transformers.Gemma3Config(text_config=dict(max_position_embeddings=80)), 80),
        (transformers.BloomConfig(seq_length=81), None),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.FalconConfig(alibi=False, max_position_embeddings=82), 82),
        (transformers.MambaConfig(), None),
    ],
    ids=lambda c: getattr(c, "model_type", str(c)),
)
def test_where_a_context_ends(config, n):
    assert context_length(SimpleNamespace(config=config)) == n


def rewritten(path, change):
    "A checkpoint with other facts, and a checksum that fits."
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    facts = json.loads(meta["facts"])
    change(facts)
    meta["facts"] = json.dumps(facts)
    meta["sha256"] = dora_nb.training.checkpoints._checksum(tensors, meta["what"], meta["facts"])
    save_file(tensors, path, meta)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ["torch", "transformers"])
@pytest.mark.parametrize("before", ["1.2.3", None])
def test_a_checkpoint_of_other_versions_goes_on_with_a_warning(tiny, wholes, stopped, name, before):
    change = lambda facts: facts.update({name: before}) if before else facts.pop(name)
    rewritten(stopped[1], change)
    then = before or "an earlier version"
    with pytest.warns(UserWarning, match=f"{name}: begun with {then}, continued with .*; the result may differ"):
        same(attempts(tiny, stopped[0].parent), wholes())


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("before", ["0.1.0", None])
def test_a_checkpoint_of_another_version_of_this_package_is_refused(tiny, stopped, before):
    "The first edition's, which name none, among them."
    rewritten(stopped[1], lambda facts: facts.update(dora_nb=before) if before else facts.pop("dora_nb"))
    with pytest.raises(ValueError, match=f"was begun by dora_nb {before or 'an earlier version'}.*to start anew") as e:
        attempts(tiny, stopped[0].parent)
    assert str(stopped[0].parent) in str(e.value) and all(p.exists() for p in stopped)


@pytest.mark.attack("data loss")
def test_a_damaged_checkpoint_is_renamed_and_not_lost(tiny, stopped):
    data = stopped[1].read_bytes()[:-7]
    for round in ("damaged-", "damaged-2-"):
        stopped[1].write_bytes(data)
        with pytest.warns(UserWarning, match=f"is damaged .* and is called {round}{stopped[1].name} now"):
            assert dora_nb.training.checkpoints._newest(stopped[0].parent, _what(stopped[0])) == stopped[0]
        assert (stopped[0].parent / f"{round}{stopped[1].name}").read_bytes() == data


def _what(path):
    return dora_nb.training.checkpoints._read(path)[0]


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("step", [1, 6, 99])
@pytest.mark.filterwarnings("ignore:.*left alone")
def test_files_of_others_named_like_checkpoints_stay(tiny, tmp_path, step):
    "Where they would be pruned, where ours would be written, and where they would be read first."
    from safetensors.torch import save_file

    theirs = tmp_path / f"step-{step:08}.safetensors"
    save_file({"a": torch.ones(3)}, theirs, {"what": "somebody's"})
    (tmp_path / "step-best.safetensors").write_bytes(b"notes")
    before = theirs.read_bytes()
    with pytest.warns(UserWarning, match=f"{theirs.name} is not a checkpoint of dora_nb, .*left alone"):
        whole = attempts(tiny, tmp_path, checkpoint_seconds=0.0)
    assert theirs.read_bytes() == before and (tmp_path / "step-best.safetensors").read_bytes() == b"notes"
    assert sum(map(dora_nb.training.checkpoints._ours, tmp_path.iterdir())) == 2
    same(attempts(tiny, tmp_path), whole)  # and what was written beside them is gone on from


@pytest.mark.attack("hang")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_no_file_in_the_place_of_a_checkpoint(tiny, tmp_path, make):
    make(tmp_path / "step-00000001.safetensors")
    with pytest.warns(UserWarning, match="step-00000001.safetensors is a (folder|pipe).*left alone"):
        attempts(tiny, tmp_path, checkpoint_seconds=0.0)
    assert (tmp_path / "step-00000001.safetensors").exists()


@pytest.mark.attack("data loss")
def test_a_file_in_the_place_of_the_folder(tiny, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file; checkpoints need a folder"):
        attempts(tiny, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("text", ["my notes\n", '{"loss": 3}\n', "[1]"])
def test_a_history_does_not_replace_somebody_s_file(tiny, tmp_path, text):
    (tmp_path / "h.jsonl").write_text(text)
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match="h.jsonl exists, and this command did not write it"):
        train(model, tokenizer, items(n=4), SHORT, tmp_path / "h.jsonl", progress=False)
    assert (tmp_path / "h.jsonl").read_text() == text


@pytest.mark.attack("silent error")
def test_items_are_checked_before_work(tiny, monkeypatch):
    "A single choice has a loss of 0, whatever the model says; language modelling needs no other."
    model, tokenizer = tiny()
    one = items(n=4).map(lambda i: {k: i[k][:1] for k in ("contexts", "continuations")} | {"gold": 0})
    with monkeypatch.context() as m:
        m.setattr(dora_nb.training.train, "encode_items", lambda *_: pytest.fail("work has begun"))
        for wrong in (one, one.select([])):
            with pytest.raises(ValueError, match="item"):
                train(model, tokenizer, wrong, TrainConfig(batch_size=4), progress=False)
    assert train(model, tokenizer, one, TrainConfig("answer", batch_size=4), progress=False)[0]["loss"] > 0


@pytest.mark.attack("silent error")
def test_broken_weights_are_named_as_a_cause_at_the_first_step(tiny):
    model, tokenizer = tiny()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(Diverged, match="step 1 of .*the weights themselves may be broken"):
        train(model, tokenizer, items(n=4), TrainConfig(batch_size=4), progress=False)


def _other_eps(model, _):
    model.config.rms_norm_eps = 0.5
    for layer in model.modules():
        if hasattr(layer, "variance_epsilon"):
            layer.variance_epsilon = 0.5


def _other_rows(model, _):
    weight = model.get_input_embeddings().weight
    weight.data.copy_(weight.data.flip(0))


def _other_values(model, params):
    next(iter(params.values())).data.mul_(1.5)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("change", [_other_eps, _other_rows, _other_values])
def test_a_checkpoint_of_the_same_shapes_and_another_start(tiny, tmp_path, method, change):
    "Another configuration, rows in another order, and another start of what learns; what is the same goes on."
    go = lambda model: train(model, tiny()[1], items(n=4), SHORT, progress=False, checkpoints=tmp_path)
    records = go(tiny(method)[0])
    other, _ = tiny(method)
    change(other, trainable_parameters(other))
    with pytest.raises(ValueError, match="is of another training"):
        go(other)
    assert go(tiny(method)[0]) == records


@pytest.mark.attack("silent error")
def test_a_model_that_was_stopped_goes_on_where_it_is(tiny, tmp_path):
    "Not loaded anew: its values are those of the checkpoint, and not of the start. Moved on by others, it is refused."
    whole, (model, tokenizer) = attempts(tiny, None), tiny(dropout=0.1)
    stop = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] in (2, 4) else None
    go = lambda **how: train(model, tokenizer, items(), SHORT, progress=False, checkpoints=tmp_path, **how)
    for _ in range(2):
        with pytest.raises(Stopped):
            go(after_step=stop)
    same(([{k: v for k, v in r.items() if k != "seconds"} for r in go()], params(model)), whole)
    assert attempts(tiny, tmp_path)[2] == 1  # a new process finds it, too
    next(iter(trainable_parameters(model).values())).data.add_(1)
    with pytest.raises(ValueError, match="is of another training"):
        go()


@pytest.mark.attack("data loss")
@pytest.mark.long
def test_modules_that_are_trained_whole_are_in_the_checkpoints(tiny, tmp_path):
    "Stopped twice and begun anew with a fresh model each time, the training ends at the same values."

    def attempt(folder, after_step):
        model, tokenizer = tiny(dropout=0.1, modules_to_save=["norm", "embed_tokens"], bias="all")
        start = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
        with contextlib.suppress(Stopped):
            train(model, tokenizer, items(), SHORT, progress=False, checkpoints=folder, after_step=after_step)
        return start, {n: p.detach() for n, p in trainable_parameters(model).items()}

    start, whole = attempt(None, None)
    assert all(not torch.equal(start[n], whole[n]) for n in whole) and any("embed_tokens" in n for n in whole)
    for number in (2, 4, 0):
        stop = lambda record, n=number: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == n else None
        _, parts = attempt(tmp_path, stop)
    assert all(torch.equal(parts[n], whole[n]) for n in whole)


def test_sums_of_bits_of_parts_add_up_and_know_their_places():
    whole = torch.randn(10, 6)
    parts = [_sum_of_bits(whole[a:b], 6 * a) for a, b in ((0, 4), (4, 8), (8, 10), (10, 10))]
    assert sum(parts) % 2**64 == _sum_of_bits(whole) != _sum_of_bits(whole.flip(0))
    for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.uint8):
        assert _sum_of_bits(whole.to(dtype)) == _sum_of_bits(whole.to(dtype).clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_sum_of_bits_is_the_same_in_integers_of_python(dtype):
    "Also where a tensor is summed in pieces; checkpoints of earlier versions hold these sums."
    values, known = torch.zeros(2**20 + 3, dtype=dtype), {0: 3, 7: -5, 2**20 - 1: 2, 2**20: 11, 2**20 + 2: -1}
    total, kind = 0, {4: torch.int32, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
    for place, value in known.items():
        values[place] = value
        factor = (-7046029254386353131 * (place + 1) + 2**63) % 2**64 - 2**63
        total += values[place].view(kind).item() * (factor ^ (factor >> 32))
    assert _sum_of_bits(values) == total % 2**64


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_float32_is_not_tf32_whatever_was_set_before(precision):
    now = torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision("high")
    try:
        with tf32(precision, torch.device("cpu")):
            assert now() == "highest"
        assert now() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3)
ENCODERS = {
    "bert": lambda v: transformers.BertConfig(vocab_size=v, **ENCODER),
    "roberta": lambda v: transformers.RobertaConfig(
        vocab_size=v, pad_token_id=1, max_position_embeddings=600, **ENCODER
    ),
    "electra": lambda v: transformers.ElectraConfig(vocab_size=v, embedding_size=32, **ENCODER),
    "xlnet": lambda v: transformers.XLNetConfig(vocab_size=v, d_model=32, n_layer=2, n_head=4, d_inner=48),
}


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ENCODERS)
def test_models_that_are_not_causal_are_refused(name, toy_tokenizer):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ENCODERS[name](128)).eval()
    item = dict(doc_index=0, contexts=["one", "one"], continuations=[" two", " six"], gold=0)
    refused = pytest.raises(ValueError, match=f"this {name} model is not a causal language model")
    with refused:
        train(model, toy_tokenizer(), [item], TrainConfig(), progress=False)
    for ask in (rank_choices, generate_answers):
        with refused:
            ask(model, toy_tokenizer(), [item], progress=False)


def _longrope(toy=128, n=16):
    torch.manual_seed(0)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    config = transformers.Phi3Config(
        vocab_size=toy,
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=128,
        original_max_position_embeddings=n,
        initializer_range=0.3,
        rope_scaling=dict(type="longrope", **factors),
        **heads,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.attack("silent error")
def test_one_choice_does_not_decide_how_another_is_read(toy_tokenizer):
    "Longrope turns a whole batch by its longest position; scores are those of each choice alone, and so is the gradient."
    model, tokenizer = _longrope(), toy_tokenizer()
    texts = [["abcdefgh"] * 2, ["abcdefghijklmnopqrstuvwxyz"] * 2]
    ends = [[" yes", " certainly not"], [" no", " perhaps"]]
    data = [dict(doc_index=i, contexts=texts[i], continuations=ends[i], gold=0) for i in (0, 1)]
    _, found = rank_choices(model, tokenizer, data, progress=False)
    assert original_length(model) == 16 and not shares_prompts(model)
    for item, record in zip(data, found):
        for context, end, score in zip(item["contexts"], item["continuations"], record["loglikelihood"]):
            n, ids = len(tokenizer(context).input_ids), tokenizer(context + end, return_tensors="pt").input_ids
            with torch.no_grad():
                logp = model(ids[:, :-1]).logits[0, n - 1 :].log_softmax(1).gather(1, ids[0, n:, None])
            assert score == pytest.approx(logp.sum().item(), abs=1e-3)
    grads = []
    for groups in ([[0], [1]], [[0, 1]]):
        rows = [encode_for("choices", tokenizer, item, share=False)[0] for item in data]
        batches = [(collate([rows[i] for i in g]), torch.zeros(len(g), dtype=torch.int64)) for g in groups]
        train_step(model, batches, 2, TrainConfig(precision="float32"))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    team = SimpleNamespace(sharded=True)
    with pytest.raises(ValueError, match="longer than 16 tokens .*longrope"):
        dora_nb.training.train.check_lengths(model, rows, team)


@pytest.mark.attack("crash")
def test_a_tokenizer_with_more_tokens_than_the_model(llama, toy_tokenizer):
    item = dict(doc_index=0, contexts=["one", "one"], continuations=[" two", " six"], gold=0)
    model = llama(vocab_size=64)
    for ask in (rank_choices, generate_answers, lambda *a, **how: train(*a, TrainConfig(), **how)):
        with pytest.raises(ValueError, match=r"gives token id \d+, and the model has 64 embeddings"):
            ask(model, toy_tokenizer(), [item], progress=False)


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "how", [lambda d: d.to_list(), lambda d: d.with_format("torch"), lambda d: d.with_format("numpy")]
)
def test_items_as_a_list_or_in_another_format(tiny, how):
    made = []
    for data in (items(n=4), how(items(n=4))):
        model, tokenizer = tiny()
        (record,) = train(model, tokenizer, data, SHORT, progress=False)
        made.append((record["loss"], rank_choices(model, tokenizer, data, progress=False)[1]))
    assert made[0] == made[1] and type(made[1][1][0]["gold"]) is int


def newer(part):
    "PyTorch's newer setting of a backend's products."
    return getattr(getattr(torch.backends, part), "matmul", None)


@pytest.mark.attack("crash")
@pytest.mark.skipif(not hasattr(newer("mkldnn"), "fp32_precision"), reason="this PyTorch has the older setting only")
@pytest.mark.parametrize("setting", ["bf16", "tf32", "ieee", "none"])
@pytest.mark.parametrize("older", ["highest", "medium"])
def test_float32_is_float32_by_whichever_setting_it_was_changed(setting, older):
    "Of two settings that disagree PyTorch tells none; both are what they were, afterwards."
    now = torch.get_float32_matmul_precision
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    exact = x @ y
    try:
        torch.set_float32_matmul_precision(older)
        newer("mkldnn").fp32_precision = setting
        before = [newer(part).fp32_precision for part in ("mkldnn", "cuda")]
        with tf32("float32", torch.device("cpu")):
            assert now() == "highest" and torch.equal(x @ y, exact)
        assert [newer(part).fp32_precision for part in ("mkldnn", "cuda")] == before
        for part in ("mkldnn", "cuda"):
            newer(part).fp32_precision = "ieee"
        assert now() == older
    finally:
        torch.set_float32_matmul_precision("highest")
        for part in ("mkldnn", "cuda"):
            newer(part).fp32_precision = "none"


@pytest.mark.attack("crash")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pytorch_s_default_dtype_changes_nothing(tiny, dtype):
    data, config = items(n=8), TrainConfig(precision="float32", batch_size=4)

    def ask(default):
        model, tokenizer = tiny(dropout=0.1)
        torch.set_default_dtype(default)
        try:
            history = train(model, tokenizer, data, config, progress=False)
            return [r["loss"] for r in history], rank_choices(model, tokenizer, data, progress=False)[1]
        finally:
            torch.set_default_dtype(torch.float32)

    assert ask(dtype) == ask(torch.float32)


@pytest.mark.attack("crash")
def test_training_inside_inference_mode(tiny):
    data, config = items(n=8), TrainConfig(precision="float32", batch_size=4)
    histories = []
    for inside in (False, True):
        model, tokenizer = tiny()
        with torch.inference_mode(inside):
            histories.append([r["loss"] for r in train(model, tokenizer, data, config, progress=False)])
    assert histories[0] == histories[1]
    with torch.inference_mode():
        model, tokenizer = tiny()
    with pytest.raises(ValueError, match=r"was made inside torch\.inference_mode\(\)"):
        train(model, tokenizer, data, config, progress=False)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_weight_that_the_model_reads_is_adapted(toy_tokenizer, shake, method):
    "Mamba multiplies by the weight of dt_proj itself, and never calls the layer."
    config = transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    data = [
        dict(doc_index=i, contexts=[f"Item {i} is"] * 2, continuations=[" yes", " no"], gold=i % 2) for i in range(8)
    ]
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    for p in model.parameters():
        p.data.mul_(4) if p.dim() == 2 else None
    adapt(model, AdapterConfig(method, 4, 8, target_modules=["dt_proj"]))
    ask = lambda: [r["loglikelihood"] for r in rank_choices(model, toy_tokenizer(), data, progress=False)[1]]
    before = ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every layer learns
        train(model, toy_tokenizer(), data, TrainConfig(precision="float32", learning_rate=0.05), progress=False)
    assert all(layer.lora_B.abs().max() > 1e-3 for layer in adapter_layers(model).values())
    for layer in shake(model) and adapter_layers(model).values():
        layer.lora_B.data *= 10
    after = ask()
    merge(model)
    assert ask() == [pytest.approx(sums, abs=1e-4) for sums in after] != before
    assert max(abs(x - y) for a, b in zip(before, after) for x, y in zip(a, b)) > 1e-3


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_that_the_model_does_not_use_are_named(toy_tokenizer, method):
    "A decoder of BART's, on its own, has no encoder to look at."
    sizes = dict(d_model=32, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    config = transformers.BartConfig(vocab_size=128, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    data = [
        dict(doc_index=i, contexts=[f"Item {i} is"] * 2, continuations=[" yes", " no"], gold=i % 2) for i in range(8)
    ]

    def go(targets):
        model = adapt(transformers.BartForCausalLM(config), AdapterConfig(method, 2, 4, target_modules=targets))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, toy_tokenizer(), data, TrainConfig(precision="float32"), progress=False)
        return [str(w.message) for w in caught if issubclass(w.category, IdleAdapter)]

    (said,) = go("all-linear")
    assert "encoder_attn.k_proj' got no gradient, nor did 7 more adapted layers: the model does not use it" in said
    assert go(["self_attn.k_proj", "fc1"]) == []
    with pytest.raises(ValueError, match="the model uses none of the layers that are adapted"):
        go(["encoder_attn.k_proj"])


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "kind, config",
    [
        (transformers.LlamaForSequenceClassification, transformers.LlamaConfig(vocab_size=64, **SIZES)),
        (transformers.ViTForImageClassification, transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)),
        (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2),
        ),
    ],
)
def test_a_model_that_predicts_no_tokens_is_named(tiny, kind, config):
    _, tokenizer = tiny()
    model = adapt(kind(config), AdapterConfig(rank=2, target_modules="all-linear"))
    for use in (
        lambda: train(model, tokenizer, items(), TrainConfig(), progress=False),
        lambda: rank_choices(model, tokenizer, items()),
    ):
        with pytest.raises(ValueError, match=f"{kind.__name__} is not a causal language model.*Trainer"):
            use()
