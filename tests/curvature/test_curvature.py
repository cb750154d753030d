"Curvature: cases that the chapter leaves out, an independent implementation, the real model, faults."

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from dora_nb.curvature import kronecker
from dora_nb.curvature import probe as probing_chapter
from dora_nb.curvature.kronecker import gram_and_metrics, kfac, update_metrics
from dora_nb.curvature.lanczos import spectral_density, top_eigenpairs, trace
from dora_nb.curvature.operators import Operator, Part, efvp, ggnvp, gradients, hvp
from dora_nb.curvature.probe import item_parts, loss_parts, probe, probe_blocks, probing
from dora_nb.curvature.spectra import gram, gram_eigenvalues
from dora_nb.data.rows import encode_item, pack
from dora_nb.data.tasks import load_task
from dora_nb.layers.linear import DoRALinear, LoRALinear
from dora_nb.models.adapt import adapt, trainable_parameters
from dora_nb.models.merge import merge, remove_adapter
from dora_nb.models.methods import AdapterConfig
from dora_nb.training.batches import make_batch
from dora_nb.training.config import TrainConfig
from dora_nb.training.objectives import choice_scores
from dora_nb.training.train import train

SMALLER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1)  # for `llama`
KINDS = {"lora": (LoRALinear, {}), "dora": (DoRALinear, {"detach_norm": False})}


def network(kind, rank=2, alpha=4.0, moved=True, splits=((0, 12),)):
    "Two adapted layers with a SiLU between, float64: model, parts of the mean loss, parameters."
    torch.manual_seed(3)
    layer, options = KINDS[kind]
    wrap = lambda i, o: layer(nn.Linear(i, o, dtype=torch.float64), rank, alpha, plan="plain", **options)
    net = nn.Sequential(wrap(5, 4), nn.SiLU(), wrap(4, 3))
    for m in (net[0], net[2]):
        noise = torch.randn_like(m.lora_B)
        m.lora_B.data += 0.4 * noise * moved
        if hasattr(m, "magnitude"):
            m.magnitude.data *= 1 + 0.3 * moved * torch.rand_like(m.magnitude)
    x, y = torch.randn(12, 5).double(), torch.randint(3, (12,))
    part = lambda a, b: Part(
        lambda p: torch.func.functional_call(net, p, (x[a:b],)),
        lambda z: F.cross_entropy(z, y[a:b], reduction="none"),
        1 / 12,
    )
    params = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    return net, [part(a, b) for a, b in splits], params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [hvp, ggnvp, efvp])
def test_grouping_and_kept_graphs_change_nothing(kind, times):
    _, whole, params = network(kind)
    _, split, _ = network(kind, splits=((0, 3), (3, 4), (4, 12)))
    V = torch.randn(sum(p.numel() for p in params.values()), 3, generator=torch.Generator().manual_seed(0)).double()
    expected = Operator(times, whole, params) @ V
    for keep in (False, True):
        operator = Operator(times, split, params, keep)
        for _ in range(2):
            assert torch.allclose(operator @ V, expected, atol=1e-12)
    assert torch.allclose(operator @ V[:, 0], expected[:, 0], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_agree(kind):
    _, (loss,), params = network(kind)
    v = {n: torch.randn_like(p) for n, p in params.items()}
    other = torch.func.jvp(torch.func.grad(loss), (params,), (v,))[1]
    for name, ours in hvp(loss, params)(v).items():
        assert torch.allclose(ours, other[name], atol=1e-12)


def test_the_ggn_of_the_magnitudes_and_of_a_weight():
    net, parts, params = network("dora")
    for block in (
        {n: p for n, p in params.items() if "magnitude" in n},
        {"0.base_layer.weight": net[0].base_layer.weight.detach()},
    ):
        J = torch.func.jacrev(parts[0].predict)(block)
        p = parts[0].predict(block).softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        J = torch.cat([j.flatten(2) for j in J.values()], 2)
        assert torch.allclose(
            Operator(ggnvp, parts, block).dense(), torch.einsum("nca,ncd,ndb->ab", J, H, J) / 12, atol=1e-12
        )


def test_the_factor_scales_the_hessian_once_and_the_ggn_twice():
    blocks = []
    for alpha in (4.0, 12.0):
        _, parts, params = network("lora", alpha=alpha, moved=False)
        n = params["0.lora_A"].numel()
        first = {k: p for k, p in params.items() if k.startswith("0.")}
        blocks.append((Operator(hvp, parts, first).dense()[:n, n:], Operator(ggnvp, parts, first).dense()))
    assert torch.allclose(3 * blocks[0][0], blocks[1][0], atol=1e-12)
    assert torch.allclose(9 * blocks[0][1], blocks[1][1], atol=1e-12)


def test_gates_feel_nothing_where_b_is_zero():
    net, (part,), params = network("lora", moved=False)
    names = [n for n in params if "lora_B" in n]
    gated = lambda g: part(params | {n: params[n] * g[n] for n in names})
    at = {n: torch.ones(2).double().requires_grad_() for n in names}
    slopes = torch.autograd.grad(gated(at), at.values(), create_graph=True)
    assert not any(s.any() for s in slopes)
    assert not Operator(hvp, gated, at).dense().any()


@pytest.mark.parametrize("block", [1, 3])
def test_every_eigenvalue_once_when_the_space_is_exhausted(block):
    _, parts, params = network("dora")
    H = Operator(hvp, parts, params)
    n = H.shape[0]
    true = torch.linalg.eigvalsh(H.dense())
    found = top_eigenpairs(H, n, "both", tol=1e-10, block=block, max_products=10 * n)
    assert torch.allclose(found["bottom"].values, true, atol=1e-10)
    assert torch.allclose(found["top"].values, true.flip(0), atol=1e-10)
    V = found["bottom"].vectors
    assert torch.allclose(V @ V.T, torch.eye(n).double(), atol=1e-8)


def test_residuals_are_true_and_what_has_not_converged_is_not_reported():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(300, 300).double())[0]
    M = Q * torch.linspace(0, 1, 300).double() @ Q.T  # no gaps: nothing converges soon
    found = top_eigenpairs(M, 5, tol=1e-6, max_products=30)["top"]
    assert len(found.values) < 5
    found = top_eigenpairs(M, 2, tol=1e-2, max_products=200)["top"]
    real = (found.vectors @ M - found.values[:, None] * found.vectors).norm(dim=1)
    assert torch.allclose(real, found.residuals, atol=1e-10)
    true = torch.linalg.eigvalsh(M)
    assert all((true - v).abs().min() <= r + 1e-12 for v, r in zip(found.values, found.residuals))


def test_a_matrix_of_few_directions():
    d = torch.zeros(50).double()
    d[:3] = torch.tensor([3.0, 2.0, -1.0])
    found = top_eigenpairs(torch.diag(d), 4, "both")
    assert torch.allclose(found["top"].values, torch.tensor([3.0, 2.0, 0.0, 0.0]).double(), atol=1e-9)
    assert not top_eigenpairs(torch.zeros(5, 5), 2)["top"].values.any()


def test_density_and_trace():
    _, parts, params = network("dora")
    G = Operator(ggnvp, parts, params, keep=True)
    true = torch.linalg.eigvalsh(G.dense())
    density = spectral_density(G, probes=10, steps=G.shape[0])
    total, error = density.total()
    assert abs(total - true.sum()) < 3 * error
    dimension, error = density.effective_dimension(0.01)
    assert abs(dimension - (true / (true + 0.01)).sum()) < 3 * error
    grid = torch.linspace(-1, 2, 400).double()
    assert torch.trapezoid(density.smoothed(grid, 0.05), grid).item() == pytest.approx(1, abs=1e-2)
    total, error = trace(G, 50)
    assert abs(total - true.sum()) < 3 * error


def test_labels_that_are_drawn_have_the_same_mean():
    net, parts, params = network("lora")
    drawn = kfac(net, parts, params, draws=1000)
    for name, exact in kfac(net, parts, params).items():
        assert torch.allclose(drawn[name].C, exact.C, atol=1e-10)
        assert (drawn[name].S - exact.S).norm() < 0.1 * exact.S.norm()


def ones(operator):
    return operator @ torch.ones(operator.shape[0], dtype=operator.dtype)


FAULTS = {
    "a parameter that is not used": (
        lambda p, parts: ones(Operator(hvp, parts, p | {"other": torch.ones(2).double()})),
        "does not depend on 'other'",
    ),
    "the outputs do not depend": (
        lambda p, parts: ones(Operator(ggnvp, parts, p | {"other": torch.ones(2).double()})),
        "do not depend on 'other'",
    ),
    "not a number": (
        lambda p, parts: ones(Operator(hvp, lambda q: (q["0.lora_A"] - q["0.lora_A"]).sum().sqrt() * parts[0](q), p)),
        "not finite in '0.lora_A'",
    ),
    "more eigenvalues than parameters": (
        lambda p, parts: top_eigenpairs(Operator(hvp, parts, p), 1000),
        "between 1 and",
    ),
    "an end that is none": (lambda p, parts: top_eigenpairs(Operator(hvp, parts, p), 1, "middle"), "top, bottom, both"),
    "one sample": (lambda p, parts: trace(Operator(hvp, parts, p), 1), "at least 2"),
    "no parts": (lambda p, parts: Operator(hvp, [], p), "at least one part"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input(name):
    _, parts, params = network("lora")
    call, message = FAULTS[name]
    with pytest.raises((ValueError, FloatingPointError), match=message):
        call(params, parts)


@pytest.fixture
def items():
    return load_task("winogrande", "train", limit=2, seed=0)


def batches(tokenizer, items, alone=True):
    rows = [encode_item(tokenizer, item)[0] for item in items]
    groups = [[i] for i in range(len(rows))] if alone else [range(len(rows))]
    return [make_batch(rows, items["gold"], g) for g in groups]


@pytest.fixture
def adapted(smollm):
    "The real model, with adapters that have moved on two layers; taken off again afterwards."
    model, tokenizer = smollm
    made = []

    def make(method):
        torch.manual_seed(0)
        targets = r"model\.layers\.(28|29)\.self_attn\.[qv]_proj"
        adapt(model, AdapterConfig(method, rank=4, alpha=8, target_modules=targets))
        made.append(model)
        for n, p in trainable_parameters(model).items():
            if "lora_B" in n:
                p.data.normal_(std=0.02)
        return model, tokenizer

    yield make
    if made:
        remove_adapter(model)


def test_attention_without_second_derivatives(adapted, items):
    model, tokenizer = adapted("lora")
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    parts = loss_parts(model, batches(tokenizer, items, False), "choices")
    v = {n: torch.ones_like(p) for n, p in params.items()}
    for layer in ("28", "29"):
        for k in "qv":
            model.model.layers[int(layer)].self_attn.get_submodule(f"{k}_proj").plan = "plain"
    with pytest.raises(RuntimeError, match="probing"):
        hvp(parts[0], params)(v)
    with probing(model):
        ours = hvp(parts[0], params)(v)
    model.set_attn_implementation("eager")
    eager = hvp(parts[0], params)(v)
    model.set_attn_implementation("sdpa")
    for name in params:
        assert (ours[name] - eager[name]).norm() < 1e-4 * eager[name].norm()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_real_model_against_curvlinops(adapted, items, method):
    GGNLinearOperator = pytest.importorskip("curvlinops").GGNLinearOperator
    model, tokenizer = adapted(method)
    (batch, gold), *_ = batches(tokenizer, items, False)

    with probing(model):
        (part,) = loss_parts(model, [(batch, gold)], "choices")
        params = {n: p.detach() for n, p in trainable_parameters(model).items()}

        class Scores(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, _):
                return choice_scores(self.model, batch, "choices")

        wrapped = Scores()
        theirs = GGNLinearOperator(
            wrapped,
            nn.CrossEntropyLoss(),
            list(trainable_parameters(model).values()),
            [(torch.zeros(len(gold), 1), gold)],
            check_deterministic=False,
        )
        ours = Operator(ggnvp, [part], params, keep=True)
        v = torch.randn(ours.shape[0], generator=torch.Generator().manual_seed(0))
        a, b = ours @ v, theirs @ v
        assert (a - b).norm() < 5e-5 * b.norm()  # float32; how sums are split over threads shows at 1e-5
        values = gram_eigenvalues(gram(loss_parts(model, batches(tokenizer, items), "choices"), params))
        top = top_eigenpairs(ours, 1, tol=1e-4)["top"].values[0]
        assert values[0].item() == pytest.approx(top.item(), rel=1e-3)


def test_a_probe_leaves_everything_as_it_was(llama, toy_tokenizer):
    states, tokenizer = [], toy_tokenizer()
    for probed in (False, True):
        model = llama(**SMALLER)
        adapt(model, AdapterConfig("dora", rank=2, alpha=4, dropout=0.1))
        items = load_task("winogrande", "train", limit=8, seed=0)
        seen = []

        def look(record):
            seen.append(probe(model, tokenizer, items.select(range(2)), TrainConfig(), ["all", "m", "layer 0"], 1, 4))

        train(model, tokenizer, items, TrainConfig(batch_size=4), after_step=look if probed else None, progress=False)
        states.append({n: p.detach().clone() for n, p in trainable_parameters(model).items()})
        assert not probed or len(seen) == 2
        assert all(
            layer.plan == "auto" and layer.detach_norm for layer in model.modules() if isinstance(layer, DoRALinear)
        )
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    found = seen[-1]
    parts = found["blocks"]
    assert parts["A"]["parameters"] + parts["B"]["parameters"] + parts["m"]["parameters"] == parts["all"]["parameters"]
    split = sum(parts[b]["ggn"]["trace"] for b in "ABm")
    assert split == pytest.approx(parts["all"]["ggn"]["trace"], rel=1e-5)
    assert set(found["updates"]) == {n for n, m in model.named_modules() if isinstance(m, DoRALinear)}
    assert all(u["effective_rank"] <= u["rank"] == 2 for u in found["updates"].values())


def test_what_cannot_be_probed_is_refused(llama, tiny_model_dir):
    from dora_nb.data.assets import load_model

    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("winogrande", "train", limit=2, seed=0)
    with pytest.raises(ValueError, match="nothing to probe"):
        probe(model.requires_grad_(False), tokenizer, items, TrainConfig())
    adapt(model, AdapterConfig("lora", rank=2))
    with pytest.raises(ValueError, match="objective='prompt'"):
        probe(model, tokenizer, items, TrainConfig("prompt"))
    with pytest.raises(ValueError, match="no block 'layer 7'"):
        probe(model, tokenizer, items, TrainConfig(), ["layer 7"])
    with pytest.raises(RuntimeError, match="unmerge"):
        with probing(merge(model)):
            pass
    half = adapt(copy.deepcopy(llama()).to(torch.bfloat16), AdapterConfig("lora", rank=2))
    with pytest.raises(ValueError, match="float32"):
        with probing(half):
            pass


def test_blocks():
    names = [f"model.layers.{i}.self_attn.q_proj.{p}" for i in (0, 1) for p in ("lora_A", "lora_B", "magnitude")]
    blocks = probe_blocks(names)
    assert list(blocks) == ["all", "A", "layer 0", "B", "m", "layer 1"]
    assert blocks["layer 1"] == names[3:] and blocks["m"] == [names[2], names[5]]


def test_gradients_are_those_of_the_mean():
    _, parts, params = network("dora", splits=((0, 5), (5, 12)))
    _, (whole,), _ = network("dora")
    loss, slope = gradients(parts, params)
    at = {n: p.requires_grad_() for n, p in params.items()}
    for (name, ours), g in zip(slope.items(), torch.autograd.grad(whole(at), at.values())):
        assert torch.allclose(ours, g, atol=1e-12), name
    assert loss == pytest.approx(whole(params).item(), abs=1e-12)


SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1)
WITHOUT_SHARING = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=5)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            dropout=0.0,
        )
    ),
}


def unshared(name, method="lora", rank=4, share=False, alone=True):
    "Two layers of a tiny model with adapters that have moved, and the parts of three items, each choice in a row."
    torch.manual_seed(0)
    model = WITHOUT_SHARING[name]().eval()
    for p in model.parameters():
        p.data.normal_(std=0.3) if p.dim() > 1 else None
    targets = ["fc1", "v_proj"] if name == "opt" else ["down_proj", "v_proj"]
    adapt(model, AdapterConfig(method, rank=rank, alpha=rank, target_modules=targets))
    for n, p in trainable_parameters(model).items():
        p.data.normal_(std=0.3) if "lora_B" in n else None
    text = lambda i, n: [(7 * i + 5 * j + 3 * j * j + 1) % 61 + 2 for j in range(n)]
    rows = []
    for i in range(3):
        pairs = {k: (text(i, 6 + i), text(10 * i + k, 2 + (i + k) % 3)) for k in range(2 + i % 2)}
        rows.append([pack(pairs)] if share else [pack({k: pair}) for k, pair in pairs.items()])
    groups = [[0], [1], [2]] if alone else [[0, 1, 2]]
    return model, loss_parts(model, [make_batch(rows, [0, 1, 0], g) for g in groups], "choices")


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", WITHOUT_SHARING)
def test_the_trace_where_every_choice_has_a_row(name, alone):
    "That of the exact Gauss-Newton matrix of a layer's weight, also where several items lie in a part."
    model, parts = unshared(name, alone=alone)
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    weights = {n: p.detach() for n, p in model.named_parameters() if "base_layer.weight" in n}
    with probing(model):
        metrics, factors, exact = update_metrics(model, parts, params), kfac(model, parts, params), gram(parts, weights)
    assert len(metrics) == 4
    for layer, metric in metrics.items():
        true = exact[f"{layer}.base_layer.weight"].trace().item()
        assert metric.trace == pytest.approx(true, rel=1e-5)
        assert (factors[layer].S.trace() * factors[layer].C.trace()).item() == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_one_pass_gives_what_two_give(alone, share):
    "The Gram matrices and the metrics, also where several items with other lengths lie in a part."
    model, parts = unshared("mistral", share=share, alone=alone)
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    with probing(model):
        grams, metrics = gram_and_metrics(model, parts, params)
        torch.testing.assert_close(grams, gram(parts, params))
        alone_metrics = update_metrics(model, parts, params)
    assert metrics.keys() == alone_metrics.keys() and len(metrics) == 4
    for name, want in alone_metrics.items():
        got = metrics[name]
        torch.testing.assert_close((got.A, got.B), (want.A, want.B), rtol=1e-5, atol=1e-12)
        assert (got.trace, got.scale) == pytest.approx((want.trace, want.scale), rel=1e-5) and got.felt == want.felt


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_the_trace_is_that_of_a_and_b(name):
    "Where A is orthogonal and square, B sees the weight's gradient and nothing else."
    model, parts = unshared(name, rank=16)
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    for n, p in params.items():
        if "v_proj.lora_A" in n:
            torch.nn.init.orthogonal_(p)
    with probing(model):
        metrics, grams = update_metrics(model, parts, params), gram(parts, params)
    for layer in (n for n in metrics if "v_proj" in n):
        assert metrics[layer].trace == pytest.approx(grams[f"{layer}.lora_B"].trace().item(), rel=1e-5)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("method, alone, draws", [("lora", True, None), ("dora", False, None), ("lora", False, 2)])
def test_sharing_prompts_does_not_change_a_spectrum(method, alone, draws):
    "σ, effective rank, and both factors: what two rows repeat is one input."
    found = []
    for share in (True, False):
        model, parts = unshared("llama", method, share=share, alone=alone)
        params = {n: p.detach() for n, p in trainable_parameters(model).items()}
        with probing(model):
            metrics = update_metrics(model, parts, params, draws)
            found.append((probing_chapter._update_spectra(model, metrics), kfac(model, parts, params, draws)))
    (shared, factors), (apart, others) = found
    for name, update in shared.items():
        assert apart[name].pop("sigma") == pytest.approx(update.pop("sigma"), rel=1e-5, abs=1e-9)
        assert apart[name].pop("weight_trace") == pytest.approx(update.pop("weight_trace"), rel=1e-5)
        assert apart[name] == update
        for mine, theirs in zip(factors[name], others[name]):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6 * mine.abs().max())


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_dense_gauss_newton_matrix_of_one_weight(name):
    "By torch.func, without any of the chapter's own code."
    model, parts = unshared(name)
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    weight = "model.layers.1.self_attn.v_proj.base_layer.weight"
    total = 0
    with probing(model):
        metric = update_metrics(model, parts, params)["model.layers.1.self_attn.v_proj"]
        for part in parts:
            at = {weight: model.get_parameter(weight).detach()}
            (p,) = part.predict(at).softmax(1)
            (J,) = torch.func.jacrev(part.predict)(at)[weight].flatten(2)
            total += part.weight * J.T @ (torch.diag(p) - p[:, None] * p) @ J
    assert metric.trace == pytest.approx(total.trace().item(), rel=1e-5)


@pytest.mark.attack("silent error")
def test_a_layer_that_sees_its_tokens_in_another_order():
    "An expert gets some tokens of a batch: one item a part is exact, several are refused."
    inputs = torch.stack([torch.tensor([[0, 0], [1, 1]]), torch.arange(4).view(2, 2)])
    x, g = torch.ones(3, 5), torch.ones(3, 2)
    with pytest.raises(ValueError, match="'experts.0' does not see all tokens"):
        kronecker._tokens(x, g, inputs, "experts.0")
    assert not kronecker._tokens(x, g, inputs[:, :1], "experts.0")[2].any()


@pytest.fixture(scope="module")
def free(toy_tokenizer):
    "A tiny model whose adapter learns and has moved, what probes it, and its probe."
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | dict(vocab_size=128))).eval()
    adapt(model, AdapterConfig("dora", rank=2, alpha=4))
    for n, p in trainable_parameters(model).items():
        p.data.normal_(std=0.1) if "lora_B" in n else None
    data, tokenizer = load_task("winogrande", "train", limit=3), toy_tokenizer()
    look = lambda: probe(model, tokenizer, data, TrainConfig(), ["all"], 1, 2)
    return model, look, look()


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "frozen",
    [lambda n: "lora_A" in n, lambda n: "lora_B" in n, lambda n: "magnitude" not in n, lambda n: "layers.0" in n],
    ids=["A", "B", "all but m", "a layer"],
)
def test_an_adapter_of_which_a_part_is_frozen(frozen, free):
    "What does not learn is constant: the rest has the curvature that it has in the whole."
    model, look, before = free
    for n, p in model.named_parameters():
        p.requires_grad_(n.rpartition(".")[2] in probing_chapter.PARTS_OF_A_LAYER and not frozen(n))
    after, learning = look(), trainable_parameters(model)
    assert after["blocks"]["all"]["parameters"] == sum(p.numel() for p in learning.values())
    whole = lambda found, b: found["blocks"][b]["parameters"]
    same = [b for b in after["blocks"] if whole(after, b) == whole(before, b)]
    for block in same:
        assert after["blocks"][block]["ggn"]["trace"] == pytest.approx(before["blocks"][block]["ggn"]["trace"])
    assert same
    assert after["updates"].keys() == {n.rpartition(".")[0] for n in learning}
    for name, update in after["updates"].items():
        assert update["weight_trace"] == pytest.approx(before["updates"][name]["weight_trace"], rel=1e-5)
        assert update["sigma"] == pytest.approx(before["updates"][name]["sigma"], rel=1e-4)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("broken", ["the model", "the adapter"])
def test_broken_weights_are_no_curvature(tiny_model_dir, broken):
    from dora_nb.data.assets import load_model

    model, tokenizer = load_model(str(tiny_model_dir))
    adapt(model, AdapterConfig("lora", rank=2))
    weight = model.model.norm.weight if broken == "the model" else next(iter(trainable_parameters(model).values()))
    torch.nn.init.constant_(weight, float("nan"))
    data = load_task("winogrande", "train", limit=2, seed=0)
    with pytest.raises(FloatingPointError, match="not a number; the model's weights or its adapter are broken"):
        probe(model, tokenizer, data, TrainConfig())
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    with probing(model):
        parts = item_parts(model, tokenizer, data, TrainConfig())
        for call in (gram, lambda parts, params: update_metrics(model, parts, params)):
            with pytest.raises(FloatingPointError, match="not a number"):
                call(parts, params)


@pytest.mark.attack("silent error")
def test_a_probe_set_is_checked_before_work(tiny_model_dir, monkeypatch):
    "A single choice bends nothing; no items have no curvature."
    from dora_nb.data.assets import load_model

    model, tokenizer = load_model(str(tiny_model_dir))
    adapt(model, AdapterConfig("lora", rank=2))
    monkeypatch.setattr(probing_chapter, "encode_items", lambda *_: pytest.fail("work has begun"))
    data = load_task("winogrande", "train", limit=2)
    one = data.map(lambda i: {k: i[k][:1] for k in ("contexts", "continuations")} | {"gold": 0})
    for wrong in (one, data.select([])):
        with pytest.raises(ValueError, match="item"):
            probe(model, tokenizer, wrong, TrainConfig())


def test_a_probe_beyond_the_context_sees_what_training_sees(tiny_model_dir):
    from dora_nb.data.assets import load_model

    model, tokenizer = load_model(str(tiny_model_dir))
    adapt(model, AdapterConfig("lora", rank=2))
    data = load_task("boolq", "train", limit=2)
    model.config.max_position_embeddings = 40
    with pytest.warns(UserWarning, match="context of 40"):
        found = probe(model, tokenizer, data, TrainConfig(), [])
    with pytest.warns(UserWarning, match="max_tokens=41"):
        expected = probe(model, tokenizer, data, TrainConfig(max_tokens=41), [])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.attack("crash")
def test_a_probe_is_the_same_wherever_it_is_called(llama, shake, toy_tokenizer):
    "In inference mode, with another default dtype, and where float32 products are made in less."
    tokenizer, items = toy_tokenizer(), load_task("winogrande", limit=2)
    model = shake(adapt(llama(**SMALLER), AdapterConfig("dora", 2, 4)))
    ask = lambda: probe(model, tokenizer, items, TrainConfig(), k=1, products=6)
    expected = ask()
    with torch.inference_mode():
        assert ask() == expected
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert ask() == expected
        finally:
            torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert ask() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.inference_mode():
        other = adapt(llama(), AdapterConfig("dora", 2, 4))
    with pytest.raises(ValueError, match=r"was made inside torch\.inference_mode\(\)"):
        probe(other, tokenizer, items, TrainConfig())
