"The layers over grids of dtypes, shapes and options, against the dense formula and finite differences."

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_nb.layers.base import check_linear
from dora_nb.layers.decompose import row_norm
from dora_nb.layers.linear import DoRALinear, LoRALinear

SHAPES = [(12, 8), (8, 12), (9, 9), (1, 5)]


def make(cls, shape=(12, 8), bias=True, dtype=torch.float64, rank=3, **kwargs):
    torch.manual_seed(0)
    layer = cls(nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype), rank=rank, alpha=2.0 * rank, **kwargs)
    nn.init.normal_(layer.lora_B, std=0.4)
    if cls is DoRALinear:
        layer.magnitude.data *= 0.5 + torch.rand_like(layer.magnitude)
    return layer


def dense(layer):
    "The weight, written out, with the norm over dim=1."
    V = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    return V if type(layer) is LoRALinear else layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("cls,shape,bias", list(itertools.product((LoRALinear, DoRALinear), SHAPES, (True, False))))
def test_forward_and_merge_are_the_dense_formula(cls, shape, bias):
    layer, x = make(cls, shape, bias), torch.randn(2, 4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), layer.base_layer.bias))
    torch.testing.assert_close(layer.merged_weight(), dense(layer).detach())


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
def test_who_reads_the_weight_gets_what_the_layer_multiplies_by(cls):
    "In a model's own product the gradients are the layer's; and the frozen weight's dtype and shape are there to look at."
    layer, x = make(cls), torch.randn(4, 8, dtype=torch.float64)
    learned = [p for p in layer.parameters() if p.requires_grad]
    ways = [layer(x), F.linear(x, layer.weight, layer.bias)]
    torch.testing.assert_close(*ways)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), learned) for y in ways)):
        torch.testing.assert_close(a, b)
    half = make(cls, dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.weight.shape == (12, 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_gradients_pass_finite_differences(shape):
    layer, x = (
        make(DoRALinear, shape, detach_norm=False),
        torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True),
    )

    def f(x, m, A, B):
        return torch.func.functional_call(layer, {"magnitude": m, "lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.magnitude, layer.lora_A, layer.lora_B))


def test_detached_norm_differs_by_the_projection_only():
    x, dy = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    grads = {}
    for detach in (True, False):
        layer = make(DoRALinear, detach_norm=detach)
        grads[detach] = torch.autograd.grad((layer(x) * dy).sum(), (layer.magnitude, layer.lora_A, layer.lora_B))
    G, s = dy.T @ x, layer.scaling
    V = (layer.base_layer.weight + s * layer.lora_B @ layer.lora_A).detach()
    n = row_norm(V)
    removed = (layer.magnitude.detach() * (G * V).sum(1) / n**3)[:, None] * V
    torch.testing.assert_close(grads[True][0], grads[False][0])
    torch.testing.assert_close(grads[True][1] - grads[False][1], s * layer.lora_B.detach().T @ removed)
    torch.testing.assert_close(grads[True][2] - grads[False][2], s * removed @ layer.lora_A.detach().T)
    assert not torch.allclose(grads[True][1], grads[False][1])


def test_gauge():
    "B → BQ, A → Q⁻¹A changes nothing."
    layer, x = make(DoRALinear), torch.randn(4, 8, dtype=torch.float64)
    before, Q = layer(x), torch.randn(3, 3, dtype=torch.float64)
    layer.lora_B.data, layer.lora_A.data = layer.lora_B.data @ Q, torch.linalg.solve(Q, layer.lora_A.data)
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
def test_starts_as_the_layer_it_adapts(cls):
    base, x = nn.Linear(8, 12), torch.randn(4, 8)
    torch.testing.assert_close(cls(base, rank=2)(x), base(x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_adapter_stays_float32_and_learns_small_steps(dtype):
    layer = make(DoRALinear, dtype=torch.float32).to(dtype)
    assert layer.base_layer.weight.dtype == dtype
    assert {p.dtype for p in (layer.magnitude, layer.lora_A, layer.lora_B)} == {
        torch.float32
    } and layer.scale().dtype == torch.float32
    x = torch.randn(4, 8, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.magnitude.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    before = layer.magnitude.detach().clone()
    torch.optim.AdamW([layer.magnitude], lr=1e-5, weight_decay=0).step()  # far below bfloat16's resolution
    assert (layer.magnitude != before).all()


def test_casting_does_not_touch_the_adapters_values():
    layer = make(DoRALinear, dtype=torch.float32)
    before = [p.detach().clone() for p in (layer.magnitude, layer.lora_A, layer.lora_B)]
    layer.to(torch.bfloat16).float().half()
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.magnitude, layer.lora_A, layer.lora_B)))


def test_autocast_leaves_the_scale_in_float32():
    layer, x = make(DoRALinear, dtype=torch.float32), torch.randn(4, 8)
    exact = layer.scale()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.scale(), exact)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "detach,dropout,form", list(itertools.product((True, False), (0.0, 0.5), ("delta", "lowrank")))
)
def test_zero_rows_stay_finite(detach, dropout, form):
    base = nn.Linear(8, 12)
    base.weight.data[[0, 5]] = 0
    layer = DoRALinear(base, rank=2, detach_norm=detach, dropout=dropout, dropout_form=form)
    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(2):  # at B = 0, and after B has moved
        y = layer(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in (layer.magnitude, layer.lora_A, layer.lora_B))
        nn.init.normal_(layer.lora_B)
    assert layer.merged_weight().isfinite().all()


@pytest.mark.parametrize("form", ("delta", "lowrank"))
def test_dropout_readings(form):
    "Each reading, written out with the mask that was drawn; the bias is scaled by neither."
    layer, x = make(DoRALinear, dropout=0.5, dropout_form=form, plan="plain"), torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(3)
    y = layer.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    W0, g, BA = layer.base_layer.weight, layer.scale(), layer.scaling * layer.lora_B @ layer.lora_A
    if form == "delta":
        want = x @ W0.T + dropped @ (dense(layer) - W0).T
    else:
        want = g * (x @ W0.T + dropped @ BA.T)
    torch.testing.assert_close(y, want + layer.base_layer.bias)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), layer.base_layer.bias))


def test_first_steps_move_b_and_m_and_then_a():
    layer, x = DoRALinear(nn.Linear(8, 12), rank=2), torch.randn(4, 8)
    params = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "magnitude": layer.magnitude}
    optimizer, moved = torch.optim.SGD(params.values(), lr=0.1), []
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in params.items()}
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        moved.append({n for n, p in params.items() if not torch.equal(p, before[n])})
    assert moved == [{"lora_B", "magnitude"}, {"lora_A", "lora_B", "magnitude"}]


def test_a_zero_row_stays_zero_under_any_magnitude():
    layer = DoRALinear(nn.Linear(8, 12), rank=2)
    layer.base_layer.weight.data[3] = 0
    layer.magnitude.data[3] = 1e6
    assert (layer(torch.randn(4, 8)) - layer.bias)[:, 3].abs().max() == 0 and not layer.merged_weight()[3].any()


@pytest.mark.parametrize("share", (0.9, 0.999, 1.0))
def test_an_update_that_cancels_the_weight(share):
    "Where the row all but vanishes, float32 cannot tell its length: the scale is bounded, and merge says what forward says."
    layer, x = DoRALinear(nn.Linear(8, 8, bias=False), rank=8, alpha=8), torch.randn(5, 8)
    layer.lora_A.data, layer.lora_B.data = torch.eye(8), -share * layer.base_layer.weight.detach().clone()
    assert layer.scale().max() < 1000
    torch.testing.assert_close(F.linear(x, layer.merged_weight()), layer(x), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(init="zeros"), "init='zeros'.*kaiming"),
        (dict(dropout_form="both"), "dropout_form='both'.*delta"),
        (dict(init="orthogonal", rank=3), "needs an even rank, not 3"),
        (dict(rank=0), "rank=0 is not possible"),
        (dict(rank=-1), "rank=-1 is not possible"),
        (dict(dropout=1.0), "dropout=1.0"),
    ],
)
def test_a_refused_layer_stays_trainable(options, named):
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=named):
        DoRALinear(base, **options)
    assert base.weight.requires_grad and base.bias.requires_grad


class Detached(torch.nn.Linear):
    "A layer for inference: part of its output has no gradient."

    kept = 0.0

    def forward(self, x):
        return self.kept * super().forward(x) + (1 - self.kept) * super().forward(x.detach())


@pytest.mark.parametrize("sizes", ((8, 4), (64, 2048), (2048, 64)))
@pytest.mark.parametrize("kept", (0.0, 0.5, 1.0))
def test_a_gradient_that_is_missing_is_found_at_any_size(sizes, kept):
    layer = Detached(*sizes)
    layer.kept = kept
    if kept == 1:
        check_linear(layer)
    else:
        with pytest.raises(ValueError, match="gradient with respect to its input is wrong"):
            check_linear(layer)
