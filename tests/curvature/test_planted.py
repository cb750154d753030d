"Planted ranks against plain torch, dense matrices, brute force and scipy."

import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from dora_nb.curvature.components import components
from dora_nb.curvature.kronecker import Factors
from dora_nb.curvature.planted import (
    adapt_with_ranks,
    deal_ranks,
    distil,
    distil_parts,
    divergence,
    log_probs,
    plant,
    planted_factors,
    whitening,
)
from dora_nb.curvature.probe import probing
from dora_nb.curvature.recovery import (
    gate_hessian,
    gradient_scores,
    hessian_ranks,
    input_scores,
    layer_inputs,
    ranks_within,
    recovery,
)
from dora_nb.models.adapt import adapter_layers, trainable_parameters
from dora_nb.models.merge import merge

NAMES = [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")]
PLANTED = dict(zip(NAMES, (3, 0, 1, 0, 5, 2)))


@pytest.fixture
def teacher(llama, ids):
    "A planted model, and the weights that it had before."
    model = llama()
    before = {n: model.get_submodule(n).weight.detach().clone() for n in NAMES}
    return plant(model, PLANTED, ids, cost=1e-3, seed=0), before


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("out, inn", [(5, 40), (40, 12), (16, 16)])
def test_factors_have_exactly_the_rank_and_equal_components(rank, out, inn):
    x, g = (torch.randn(300, n, dtype=torch.float64) * torch.linspace(0.1, 5, n) + 1 for n in (inn, out))
    S, C, rank = g.T @ g, x.T @ x, min(rank, out, inn)
    B, A = planted_factors(Factors(S, C), rank, torch.Generator().manual_seed(0))
    assert B.shape == (out, rank) and A.shape == (rank, inn)
    assert torch.linalg.matrix_rank(B @ A) == rank
    effects = torch.linalg.svdvals(g @ B @ A @ x.T)  # in the metric of S and C: all equal, and no more than rank
    expected = torch.zeros_like(effects)
    expected[:rank] = 1
    assert torch.allclose(effects, expected, atol=1e-6)
    W, top = whitening(C, 5), torch.linalg.svd(x)[2][:5]  # the largest principal components
    assert torch.allclose(W @ C @ W.T, torch.eye(5, dtype=C.dtype), atol=1e-8)
    assert torch.allclose(W @ top.T @ top, W, atol=1e-8)


def test_a_teacher_is_the_base_plus_updates_of_the_planted_ranks(teacher):
    model, before = teacher
    merge(model)
    for name, rank in PLANTED.items():
        change = model.get_submodule(name).weight.double() - before[name].double()
        values = torch.linalg.svdvals(change)
        assert int((values > 1e-4 * values.max().clamp_min(1e-9)).sum()) == rank, name


def test_every_update_alone_costs_the_same(teacher, llama, ids):
    model, _ = teacher
    base = log_probs(llama(), ids)
    kept = {n: layer.lora_B.data for n, layer in adapter_layers(model).items()}
    for name in kept:
        for n, layer in adapter_layers(model).items():
            layer.lora_B.data = kept[n] * (n == name)
        assert divergence(base, log_probs(model, ids)).mean().item() == pytest.approx(1e-3, rel=0.1)


def test_distillation_is_plain_kl_and_adamw(teacher, ids):
    model, _ = teacher
    targets, ranks = log_probs(model, ids), dict.fromkeys(NAMES, 2)
    history = distil(adapt_with_ranks(model, ranks, 3), ids, targets, 4, 1e-2, seed=5, batch_size=3)
    ours = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    params = list(trainable_parameters(adapt_with_ranks(model, ranks, 3)).values())
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0)
    for step, factor in enumerate((1, 1, 2 / 3, 1 / 3)):  # one step of warm-up, then a linear decay
        z = model(input_ids=ids).logits.flatten(0, 1).log_softmax(1)
        loss = F.kl_div(z, targets.flatten(0, 1), reduction="batchmean", log_target=True)
        assert history[step] == pytest.approx(loss.item(), abs=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.allclose(p, ours[n], atol=1e-5) for n, p in trainable_parameters(model).items())


def test_ids_and_hidden_states_give_the_same(llama, ids):
    model = llama()
    assert torch.equal(log_probs(model, ids), log_probs(model, model.get_input_embeddings()(ids)))


def test_gate_hessian_is_the_dense_one(teacher, shake, ids):
    model, _ = teacher
    targets = log_probs(model, ids)
    shake(adapt_with_ranks(model, dict.fromkeys(NAMES[:3], 2), 0))
    layers = adapter_layers(model)
    with probing(model):
        found = {n: components(layer) for n, layer in layers.items()}
        slopes, H = gate_hessian(model, distil_parts(model, ids, targets, 2), found)

        def loss(gates):
            at = dict(zip(found, gates.split(2)))
            weights = {
                f"{n}.base_layer.weight": layers[n].base_layer.weight + ((c.B * at[n]) @ c.A).float()
                for n, c in found.items()
            } | {f"{n}.lora_B": torch.zeros_like(layers[n].lora_B) for n in found}
            z = torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits.log_softmax(-1)
            return F.kl_div(z.flatten(0, 1), targets.flatten(0, 1), reduction="batchmean", log_target=True)

        ones = torch.ones(6)
        dense = torch.autograd.functional.hessian(loss, ones)
        slope = torch.autograd.functional.jacobian(loss, ones)
    assert torch.allclose(slopes, slope, atol=1e-5) and torch.allclose(H, dense, atol=1e-4 * dense.abs().max())


def test_hessian_ranks_close_what_the_quadratic_model_finds_cheapest():
    torch.manual_seed(0)
    M = torch.randn(6, 6, dtype=torch.float64)
    H, slopes = M @ M.T, torch.randn(6, dtype=torch.float64)
    sizes, costs = {"a": 2, "b": 3, "c": 1}, {"a": 1, "b": 2, "c": 3}
    price = [1, 1, 2, 2, 2, 3]
    loss = lambda shut: (-slopes[shut].sum() + H[shut][:, shut].sum() / 2).item()
    shut = []
    while sum(price) - sum(price[i] for i in shut) > 5:
        left = [i for i in range(6) if i not in shut]
        shut.append(min(left, key=lambda i: (loss([*shut, i]) - loss(shut)) / price[i]))
    owner = "aabbbc"
    expected = {n: sum(owner[i] == n for i in range(6) if i not in shut) for n in sizes}
    assert hessian_ranks(slopes, H, sizes, costs, 5) == expected


def test_ranks_within_a_budget_keep_the_best_of_all_components():
    torch.manual_seed(0)
    scores = {n: torch.rand(4).sort(descending=True).values for n in "abc"}
    for budget in range(13):
        ranks = ranks_within(scores, dict.fromkeys("abc", 1), budget)
        worth = lambda r: sum(scores[n][: r[n]].sum().item() for n in "abc")
        every = (dict(zip("abc", r)) for r in itertools.product(range(5), repeat=3) if sum(r) == budget)
        assert sum(ranks.values()) == budget and worth(ranks) == pytest.approx(max(map(worth, every)))


def test_recovery_is_what_scipy_computes():
    torch.manual_seed(0)
    for _ in range(20):
        planted = dict(enumerate(torch.randint(0, 4, (30,)).tolist()))
        ranks = dict(enumerate(torch.randint(0, 4, (30,)).tolist()))
        found = recovery(ranks, planted)
        x, y = list(ranks.values()), list(planted.values())
        some, none = [a for a, b in zip(x, y) if b], [a for a, b in zip(x, y) if not b]
        assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert found["auc"] == pytest.approx(stats.mannwhitneyu(some, none).statistic / len(some) / len(none))
        assert found["error"] == pytest.approx(sum(abs(a - b) for a, b in zip(x, y)) / 30)


def test_scores_before_training_are_dense_singular_values(teacher, llama, ids):
    targets, model = log_probs(teacher[0], ids), llama()
    with probing(model):
        weights = {f"{n}.weight": model.get_submodule(n).weight.detach() for n in NAMES}
        scores = gradient_scores(distil_parts(model, ids, targets, 2), weights, most=4)
    F.kl_div(
        model(input_ids=ids).logits.log_softmax(-1).flatten(0, 1),
        targets.flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    ).backward()
    for n in NAMES:
        dense = torch.linalg.svdvals(model.get_submodule(n).weight.grad)[:4].square()
        assert torch.allclose(scores[n], dense, rtol=1e-3)
        x = layer_inputs(model, [n], ids)[n]
        values = torch.linalg.eigvalsh(x.T @ x).flip(0)
        assert torch.allclose(input_scores(model, [n], ids, 4)[n], (values / values.sum())[:4], rtol=1e-3)


@pytest.mark.parametrize("names, ranks", [(NAMES, (0, 1, 2)), (NAMES[:3], (0, 1))])
def test_a_deal_needs_a_rank_for_each_layer_of_a_kind(names, ranks):
    with pytest.raises(ValueError, match="for . layers of the kind"):
        deal_ranks(names, ranks, 0)


def test_all_ranks_zero_is_refused(llama):
    with pytest.raises(ValueError, match="all ranks are 0"):
        adapt_with_ranks(llama(), dict.fromkeys(NAMES, 0), 0)
