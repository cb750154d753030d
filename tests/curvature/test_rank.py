"Ranks: a real adapter cut to a budget, PEFT's view of it, gates on a model, faults."

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dora_nb.curvature.components import SCORES, components, score_components
from dora_nb.curvature.kronecker import update_metrics
from dora_nb.curvature.probe import loss_parts, probing
from dora_nb.curvature.rank import allocate, component_costs, fit_budget, rank_pattern, truncate
from dora_nb.curvature.rank_search import close_gates, open_gates, shrink, shuffled, warm_ranks
from dora_nb.data.rows import Row, collate
from dora_nb.models.adapt import adapt, adapter_layers, trainable_parameters
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.merge import merge
from dora_nb.models.methods import AdapterConfig
from dora_nb.training.config import TrainConfig

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def moved(llama, shake):
    def make(method, **options):
        return shake(adapt(llama(), AdapterConfig(method, rank=4, alpha=8, target_modules=TARGETS, **options)))

    return make


def parts_of(model):
    "Three items of two choices each, of random tokens."
    rows = [
        [Row([5 + i, 6, 7 + k, 9 * k + i], [0, 1, 2, 3], [0] * 4, [2, 3], [11 + k, 12], [k, k]) for k in (0, 1)]
        for i in range(3)
    ]
    return loss_parts(model, [(collate([r]), torch.tensor([i % 2])) for i, r in enumerate(rows)], "choices")


def scored(model, score):
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    with probing(model):
        parts = parts_of(model)
        return score_components(model, parts, params, update_metrics(model, parts, params), score)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("score, rslora", [*((score, False) for score in SCORES), ("obd", True)])
def test_a_truncated_adapter_is_peft_s_too(moved, llama, ids, tmp_path, method, score, rslora):
    model = moved(method, rslora=rslora)
    whole = model(ids).logits
    found = scored(model, score)
    for c in found.values():
        assert (c.score.diff() <= 0).all() and (c.score >= 0).all()
    assert torch.allclose(truncate(model, found, dict.fromkeys(found, 4))(ids).logits, whole, atol=1e-4)

    costs = component_costs(model)
    budget = 2 * sum(costs.values())
    ranks = allocate({n: c.score for n, c in found.items()}, costs, budget)
    logits = truncate(model, found, ranks)(ids).logits
    assert sum(p.numel() for n, p in trainable_parameters(model).items() if "lora_" in n) <= budget
    assert not torch.allclose(logits, whole, atol=1e-4)

    folder = save_adapter(model, tmp_path / "small")
    assert torch.allclose(load_adapter(llama(), folder)(ids).logits, logits, atol=1e-5)
    peft = PeftModel.from_pretrained(llama(), folder)
    assert torch.allclose(peft(ids).logits, logits, atol=1e-4)
    assert torch.allclose(merge(model)(ids).logits, logits, atol=1e-4)


@pytest.mark.parametrize("init", ("orthogonal", "mica"))
def test_a_truncated_adapter_of_any_start_is_loaded(moved, llama, ids, tmp_path, init):
    model = moved("lora", init=init)
    found = {n: components(layer) for n, layer in adapter_layers(model).items()}
    logits = truncate(model, found, dict.fromkeys(found, 3))(ids).logits
    folder = save_adapter(model, tmp_path / "small")
    assert torch.allclose(load_adapter(llama(), folder)(ids).logits, logits, atol=1e-5)
    assert torch.allclose(PeftModel.from_pretrained(llama(), folder)(ids).logits, logits, atol=1e-4)


def test_a_way_that_does_not_exist(llama):
    with pytest.raises(ValueError, match="way='gate' is not possible; did you mean 'gates'"):
        warm_ranks(llama(), None, [], TrainConfig(learning_rate=1e-3), AdapterConfig(), "gate")


def test_the_pattern_trains_anew_here_and_in_peft(moved, llama):
    model = moved("dora")
    found = {n: components(layer) for n, layer in adapter_layers(model).items()}
    truncate(model, found, {n: 1 + i % 3 for i, n in enumerate(found)})
    pattern = json.loads(json.dumps(rank_pattern(model)))
    anew = adapt(llama(), AdapterConfig("dora", target_modules=TARGETS, **pattern))
    config = LoraConfig(target_modules=list(TARGETS), r=16, lora_alpha=32, use_dora=True, **pattern)
    theirs = get_peft_model(llama(), config)
    for i, (name, layer) in enumerate(adapter_layers(anew).items()):
        other = theirs.base_model.model.get_submodule(name)
        assert layer.lora_A.shape == other.lora_A["default"].weight.shape == (1 + i % 3, layer.in_features)
        assert layer.scaling == pytest.approx(other.scaling["default"]) == pytest.approx(2.0)


def test_peft_s_patterns_are_read(llama, ids, tmp_path):
    config = LoraConfig(
        target_modules=list(TARGETS),
        r=4,
        lora_alpha=8,
        rank_pattern={"layers.0.self_attn.q_proj": 2, r".*\.1\..*v_proj": 3},
        alpha_pattern={"down_proj": 5, "gone": 7},
    )
    peft = get_peft_model(llama(), config)
    for n, p in peft.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    peft.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="alpha_pattern: 'gone' matches no layer"):
        ours = load_adapter(llama(), tmp_path)
    assert torch.allclose(ours(ids).logits, peft(ids).logits, atol=1e-5)
    ranks = {n: layer.lora_A.shape[0] for n, layer in adapter_layers(ours).items()}
    assert [ranks[f"model.layers.{i}.self_attn.{k}_proj"] for i, k in ((0, "q"), (1, "q"), (0, "v"), (1, "v"))] == [
        2,
        4,
        4,
        3,
    ]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gates_train_and_close(moved, llama, ids, tmp_path, method):
    model = moved(method)
    before = model(ids).logits
    gates = open_gates(model, {n: components(layer) for n, layer in adapter_layers(model).items()})
    assert torch.allclose(model(ids).logits, before, atol=1e-4)
    with pytest.raises(RuntimeError, match="close_gates"):
        save_adapter(model, tmp_path / "gated")
    with pytest.raises(RuntimeError, match="gates already"):
        open_gates(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    first = None
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shrink(gates, 1e-2 * 5.0)
    assert model(input_ids=ids, labels=ids).loss.item() < first
    open_now = {n: max(1, int((g != 0).sum())) for n, g in gates.items()}
    assert 0 < sum(open_now.values()) < 4 * len(gates)  # some closed, exactly
    gated = model(ids).logits
    assert torch.allclose(close_gates(model)(ids).logits, gated, atol=1e-4)
    assert {n: layer.lora_A.shape[0] for n, layer in adapter_layers(model).items()} == open_now
    assert torch.allclose(load_adapter(llama(), save_adapter(model, tmp_path / "closed"))(ids).logits, gated, atol=1e-4)


def test_what_is_zero_can_still_learn(moved, ids):
    model = moved("lora")
    layers = adapter_layers(model)
    for layer in layers.values():
        layer.lora_B.data.zero_()
    truncate(model, {n: components(layer) for n, layer in layers.items()}, dict.fromkeys(layers, 2))
    model(ids).logits.square().mean().backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in layers.values())


def test_gates_are_closed_only_where_they_are(moved):
    model = moved("lora")
    with pytest.raises(RuntimeError, match="has no gates"):
        close_gates(model)
    gates = open_gates(model)
    with pytest.raises(ValueError, match="rank 9 of"):
        close_gates(model, dict.fromkeys(gates, 9))
    assert all(g is adapter_layers(model)[n].parametrizations.lora_B.original1 for n, g in gates.items())


def test_shuffled_ranks_stay_within_their_kind():
    ranks = {f"layers.{i}.{k}": 1 + i + 10 * (k == "v") for i in range(6) for k in "qv"}
    other = shuffled(ranks, seed=0)
    assert other != ranks and other == shuffled(ranks, seed=0) != shuffled(ranks, seed=1)
    for k in "qv":
        of = lambda r: sorted(v for n, v in r.items() if n.endswith(k))
        assert of(ranks) == of(other)


def test_bad_input(moved, llama):
    model = moved("lora")
    found = {n: components(layer) for n, layer in adapter_layers(model).items()}
    scores, costs = {n: c.score for n, c in found.items()}, component_costs(model)
    for budget in (sum(costs.values()) - 1, 4 * sum(costs.values()) + 1):
        with pytest.raises(ValueError, match=f"budget={budget} is not possible"):
            allocate(scores, costs, budget)
    with pytest.raises(ValueError, match="rank 5 of 'model.layers.0.self_attn.q_proj'"):
        truncate(model, found, dict.fromkeys(found, 5))
    with pytest.raises(ValueError, match="score='svd' does not exist"):
        scored(model, "svd")
    with pytest.raises(ValueError, match="rank_pattern: 'k_prj' matches none"):
        adapt(llama(), AdapterConfig("lora", target_modules=TARGETS, rank_pattern={"k_prj": 2}))
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\]=0"):
        AdapterConfig(rank_pattern={"q_proj": 0})
    assert copy.deepcopy(model) is not model


@pytest.mark.attack("crash")
@pytest.mark.parametrize("budget", (float("inf"), float("nan"), -1, 0, float("-inf")))
def test_budgets_that_are_none(moved, budget):
    "Refused before an item is looked at."
    with pytest.raises(ValueError, match=f"budget={budget} is not possible; give a number of parameters"):
        fit_budget(moved("lora"), None, None, None, budget)
