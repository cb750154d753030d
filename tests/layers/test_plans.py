"Every way of making the product gives the same numbers, keeps little, and notices what changes."

import copy
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dora_nb.layers.linear
import dora_nb.layers.plans
from dora_nb.layers.fused import fused_product
from dora_nb.layers.linear import DoRALinear, LoRALinear, cached_scales, constant_scale
from dora_nb.layers.plans import choose_plan, draw_dropped, gap_dropout, resolve_plan
from dora_nb.models.adapt import adapt, adapter_layers, trainable_parameters
from dora_nb.models.merge import merge, remove_adapter
from dora_nb.models.methods import AdapterConfig

PLANS = ("factored", "dense")


def make(cls=DoRALinear, dtype=torch.float64, bias=True, base_dtype=None, **kwargs):
    torch.manual_seed(0)
    layer = cls(nn.Linear(8, 12, bias=bias, dtype=base_dtype or dtype), rank=3, alpha=6, **kwargs)
    nn.init.normal_(layer.lora_B, std=0.4)
    if cls is DoRALinear:
        layer.magnitude.data *= 0.5 + torch.rand_like(layer.magnitude)
    return layer


def results(layer, plan, x, dy, context=None):
    "Output and all gradients."
    layer.plan = plan
    x = x.clone().requires_grad_()
    params = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    with context or torch.enable_grad():
        y = layer(x)
    return dict(y=y, x=None, **params) | dict(zip(("x", *params), torch.autograd.grad(y, (x, *params.values()), dy)))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("cls,detach", [(LoRALinear, True), (DoRALinear, True), (DoRALinear, False)])
def test_plans_agree_with_the_formula(cls, detach, bias, plan):
    layer = make(cls, bias=bias, **({} if cls is LoRALinear else dict(detach_norm=detach)))
    x, dy = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(results(layer, plan, x, dy), results(layer, "plain", x, dy))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.plain(x))


@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
def test_dropout_is_the_formula_with_the_mask_that_was_drawn(cls, monkeypatch):
    layer, x, dy = make(cls, dropout=0.4).train(), torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 12).double()
    dropped = draw_dropped(x.shape, 0.4, x.device)
    keep = torch.ones(48, dtype=torch.float64).index_fill(0, dropped, 0).view(6, 8) / 0.6
    monkeypatch.setattr(dora_nb.layers.plans, "draw_dropped", lambda shape, p, device: dropped)
    got = results(layer, "auto", x, dy)
    layer.dropout.forward = lambda x: x * keep
    torch.testing.assert_close(got, results(layer, "plain", x, dy))
    monkeypatch.setattr(dora_nb.layers.plans, "draw_dropped", lambda *_: keep == 0)  # as on a GPU
    torch.testing.assert_close(results(layer, "auto", x, dy), got)
    assert layer.eval().drops() == 0


def test_positions_are_drawn_with_the_right_frequency():
    torch.manual_seed(0)
    counts, rounds = torch.zeros(50), 4000
    for _ in range(rounds):
        counts[draw_dropped((5, 10), 0.3, counts.device)] += 1
    assert ((counts / rounds - 0.3).abs() < 5 * (0.3 * 0.7 / rounds) ** 0.5).all()
    assert len(draw_dropped((3, 4), 1e-9, counts.device)) == 0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("base_dtype", (torch.float32, torch.bfloat16))
def test_low_precision_keeps_float32_gradients(plan, base_dtype):
    "A bfloat16 model, and autocast over a float32 one: near the float32 results, gradients in float32."
    layer, x, dy = make(dtype=torch.float32, base_dtype=base_dtype), torch.randn(64, 8), torch.randn(64, 12)
    reference = make(dtype=torch.float32)
    reference.load_state_dict(layer.state_dict())
    exact = results(reference, "plain", x, dy)
    if base_dtype == torch.bfloat16:
        got = results(layer, plan, x.bfloat16(), dy.bfloat16())
    else:
        got = results(layer, plan, x, dy.bfloat16(), torch.autocast("cpu", torch.bfloat16))
    assert got["y"].dtype == torch.bfloat16
    for name, g in got.items():
        assert g.dtype == torch.float32 or name in "xy"
        assert (g.float() - exact[name]).norm() < 0.02 * exact[name].norm(), name


@pytest.mark.parametrize("base_dtype", (torch.float32, torch.bfloat16))
def test_the_dense_way_is_not_taken_below_float32(base_dtype):
    "Added to weights that sit on bfloat16's grid, a small update would be rounded away."
    layer = make(dtype=base_dtype)
    assert (
        resolve_plan(layer.plan, torch.empty(10**6, 8, dtype=torch.bfloat16), [layer.operands(torch.empty(1, 8))], True)
        == "factored"
    )
    assert resolve_plan(layer.plan, torch.empty(10**6, 8), [layer.operands(torch.empty(1, 8))], True) == "dense"


def test_the_count_of_costs():
    q, up = (576, 576, 16), (1536, 576, 16)
    assert [choose_plan(t, [q], True) for t in (1, 256, 2048, 10**5)] == ["factored"] * 2 + ["dense"] * 2
    crossing = [next(t for t in range(1, 9999) if choose_plan(t, [s], True) == "dense") for s in (q, up)]
    assert all(500 < t < 1500 for t in crossing)
    layer = make(plan="dense")
    assert resolve_plan(layer.plan, torch.randn(1, 8), [layer.operands(torch.empty(1, 8))], True) == "dense"
    with pytest.raises(ValueError, match="plan='fast'.*factored"):
        make(plan="fast")


def test_a_magnitude_of_zero_still_gets_its_gradient():
    layer, x, dy = make(), torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    layer.magnitude.data[4] = 0
    want = results(layer, "plain", x, dy)
    assert want["magnitude"][4].abs() > 1e-3
    for plan in PLANS:
        torch.testing.assert_close(results(layer, plan, x, dy), want)


# A scale that is never out of date


def optimizer_step(layer, **kwargs):
    layer(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, **kwargs).step()


class Silent(torch.optim.Optimizer):
    "Writes behind autograd's back, as optimisers with kernels of their own do."

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.detach().numpy()[...] *= 1.5


def exchange(layer):
    layer.lora_A = nn.Parameter(layer.lora_A.detach() * 2)


def transplant(layer):
    layer.lora_B.data = layer.lora_B.data * 2


CHANGES = dict(
    fused=lambda layer: optimizer_step(layer, fused=True),
    foreach=lambda layer: optimizer_step(layer, foreach=True),
    forloop=lambda layer: optimizer_step(layer, foreach=False),
    silent=lambda layer: Silent(p for p in layer.parameters() if p.requires_grad).step(),
    data_a=lambda layer: layer.lora_A.data.mul_(2),
    data_b=lambda layer: layer.lora_B.data.neg_(),
    data_one=lambda layer: layer.lora_B.data[3, 1].add_(0.1),
    data_m=lambda layer: layer.magnitude.data.mul_(2),
    data_w0=lambda layer: layer.base_layer.weight.data.mul_(1.1),
    data_w0_row=lambda layer: layer.base_layer.weight.data[7].zero_(),
    data_set=transplant,
    in_place=lambda layer: torch.no_grad()(layer.lora_A.add_)(0.1),
    w0_in_place=lambda layer: torch.no_grad()(layer.base_layer.weight.mul_)(2),
    numpy=lambda layer: np.multiply(layer.lora_B.detach().numpy(), 3, out=layer.lora_B.detach().numpy()),
    detach=lambda layer: layer.lora_A.detach().mul_(2),
    new_parameter=exchange,
    state_dict=lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    assign=lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}, assign=True),
    dtype=lambda layer: layer.float(),
    swap=lambda layer: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in layer.parameters()), dtype=torch.float64), layer.parameters()
    ),
)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, plan):
    layer, x = make(plan=plan), torch.randn(4, 8, dtype=torch.float64)
    before = layer(x)
    CHANGES[change](layer)
    x = x.to(layer.base_layer.weight.dtype)
    torch.testing.assert_close(layer(x), layer.plain(x))
    V = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.scale(), layer.magnitude / V.norm(dim=1))
    if change != "dtype":
        assert not torch.allclose(layer(x), before)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("tokens", (1, 5))
@pytest.mark.parametrize("grad", (False, True))
def test_a_moving_average_is_swapped_in(tokens, grad):
    "Through `.data`, as training loops do; while the model decodes, too."
    layer, x = make(), torch.randn(1, tokens, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        own = layer(x)
        backup = {n: p.data.clone() for n, p in layer.named_parameters()}
        for p in layer.parameters():
            p.data.copy_(0.9 * p.data + 0.1)
        averaged = layer(x)
        torch.testing.assert_close(averaged, layer.plain(x))
        for n, p in layer.named_parameters():
            p.data = backup[n]
        assert torch.equal(layer(x), own) and not torch.allclose(averaged, own)


@pytest.fixture
def norms(monkeypatch):
    "Counts how often a norm is computed."
    calls, norm = dict(norm=0), dora_nb.layers.linear.adapted_norm
    monkeypatch.setattr(
        dora_nb.layers.linear, "adapted_norm", lambda *a: calls.update(norm=calls["norm"] + 1) or norm(*a)
    )
    return calls


def adapted(model, method="dora", **kwargs):
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    return adapt(model, AdapterConfig(method, rank=4, alpha=8, target_modules=targets, **kwargs))


def test_cached_scales(llama, ids, norms):
    "Computed once inside, for every micro-batch and for the recomputation of checkpointing; in every pass outside."
    model = adapted(llama()).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    norms.update(norm=0)

    def step():
        for micro_batch in ids:
            model(micro_batch[None]).logits.square().mean().backward()

    with cached_scales(model):
        with torch.inference_mode(), cached_scales(model):
            model.eval()(ids)
        model.train()
        step()  # a scale made in inference mode serves training
        assert norms["norm"] == 10  # ten layers
    step()
    assert norms["norm"] == 10 + 2 * 10 * len(ids)


def test_nothing_is_cached_outside(llama, ids):
    "Not after an error either, and not in a copy that was made inside."
    model = adapted(llama())
    with pytest.raises(KeyError), cached_scales(model):
        model(ids)
        other = copy.deepcopy(model)
        raise KeyError
    for each in (model, other):
        before = each(ids).logits
        for layer in adapter_layers(each).values():
            layer.magnitude.data.mul_(2)
        assert not torch.allclose(each(ids).logits, before)


def test_a_cached_scale_has_no_graph():
    layer, x = make(), torch.randn(4, 8, dtype=torch.float64)
    with cached_scales(layer):
        for _ in range(2):
            layer(x).sum().backward()
        assert not any(t.requires_grad for t in constant_scale(layer) if t is not None)


# SharedInput


@pytest.fixture
def products(monkeypatch):
    "For how many layers each product was made."
    sizes, product = [], dora_nb.layers.linear.product
    monkeypatch.setattr(
        dora_nb.layers.linear, "product", lambda x, layers: sizes.append(len(layers)) or product(x, layers)
    )
    return sizes


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids).logits.square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("method,dropout", itertools.product(("lora", "dora"), (0.0, 0.1)))
@pytest.mark.parametrize("reentrant", (None, False, True))
def test_siblings_and_checkpointing_change_nothing(llama, shake, ids, products, method, dropout, reentrant):
    model = shake(adapted(llama(), method, dropout=dropout)).train()
    torch.manual_seed(5)
    want = gradients(model, ids)
    assert products == [3, 1, 1] * 2  # q, k and v together
    if dropout == 0:
        for layer in adapter_layers(model).values():
            layer.plan = "plain"
        torch.testing.assert_close(gradients(model, ids), want, atol=1e-6, rtol=1e-3)
        for layer in adapter_layers(model).values():
            layer.plan = "auto"
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # reentrant checkpointing needs it
        torch.manual_seed(5)
        torch.testing.assert_close(gradients(model, ids), want)
        assert sum(n == 3 for n in products) >= 4


def test_siblings_outside_their_parents_pass_work_alone(llama, shake, ids, products):
    model = shake(adapted(llama()))
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, 64)
    q, k = attention.q_proj(x), attention.k_proj(x)
    k.sum().backward()
    q.sum().backward()  # each has a graph of its own
    assert products == [1, 1]
    torch.testing.assert_close(q, attention.q_proj.plain(x))


def test_an_exception_leaves_nothing_behind(llama, ids):
    model = adapted(llama())
    attention = model.model.layers[0].self_attn
    attention.v_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    assert not vars(attention.q_proj.shared_input.here)


def test_a_sibling_given_another_input_is_right(llama):
    model = adapted(llama()).train()
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    x, shared_input = torch.randn(1, 5, 64), attention.q_proj.shared_input
    shared_input.before_parent(attention, ())
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(x), attention.k_proj.plain(2 * x))
    torch.testing.assert_close(attention.v_proj(x), attention.v_proj.plain(x))


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_stand_alone(llama, shake, ids, copied):
    model = shake(adapted(llama())).train()
    before = gradients(model, ids)
    twin = copied(model)
    q, theirs = twin.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    assert (
        q.shared_input is not theirs.shared_input
        and q.shared_input is twin.model.layers[0].self_attn.k_proj.shared_input
    )
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.mul_(2)
    torch.testing.assert_close(gradients(twin, ids), before)


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


@pytest.mark.parametrize("undo", (remove_adapter, lambda m: merge(m, keep_base=False)))
def test_hooks_leave_with_the_adapter(llama, undo):
    model = adapted(llama())
    assert len(hooks(model)) == 4
    assert not hooks(undo(model)) and not any(m._forward_hooks_always_called for m in model.modules())


def test_models_that_attend_elsewhere_have_no_siblings(llama):
    model = llama()
    model.config.add_cross_attention = True
    assert not hooks(adapted(model))


# What sees through the layers


@pytest.mark.parametrize("cls, more", [(LoRALinear, {}), (DoRALinear, {}), (DoRALinear, dict(dropout_form="delta"))])
def test_compiled_dropout_is_the_formula_with_the_mask_that_was_drawn(cls, more, monkeypatch):
    layer = make(cls, dropout=0.4, **more).train()
    x, dy = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 12).double()
    dropped = draw_dropped(x.shape, 0.4, x.device)
    keep = torch.ones(48, dtype=torch.float64).index_fill(0, dropped, 0).view(6, 8) / 0.6
    monkeypatch.setattr(dora_nb.layers.plans, "draw_dropped", lambda shape, p, device: dropped)
    torch._dynamo.reset()
    params = [p for p in layer.parameters() if p.requires_grad]
    inputs = x.clone().requires_grad_()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(inputs)
    got = dict(y=y, x=None) | dict(zip(("x", *range(3)), torch.autograd.grad(y, (inputs, *params), dy)))
    layer.dropout.forward = lambda x: x * keep
    want = results(layer, "plain", x, dy)
    for a, b in zip(got.values(), [want[n] for n in ("y", "x", *(n for n in want if n not in "yx"))], strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_checkpointing_recomputes_the_same_dropout():
    torch._dynamo.reset()
    x, zero = (
        torch.randn(64, 64, dtype=torch.float64, requires_grad=True),
        torch.cos(torch.ones((), dtype=torch.float64)),
    )
    block = lambda x: gap_dropout(x.sin(), 0.25).exp().cos()
    run = lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    keep = ((y - zero).abs() > 1e-12).double() / 0.75  # seen in the output of the forward pass
    z = (x.sin() * keep).exp()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], -z.sin() * z * x.cos() * keep)


def test_the_operator_for_dropout_keeps_the_rules_of_operators():
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    for x in (torch.randn(5, 7, requires_grad=True), torch.randn(2, 3, 4).bfloat16(), torch.randn(6, 4).T):
        torch.library.opcheck(dora_nb.layers.plans._gap_dropout, (x, 0.25), test_utils=rules)
    x = torch.randn(2000, 50, requires_grad=True)
    first, second = gap_dropout(x, 0.1), gap_dropout(x, 0.1)
    assert ((first == 0) != (second == 0)).any() and abs((first == 0).float().mean() - 0.1) < 0.01
    first.sum().backward()
    torch.testing.assert_close(x.grad * x, first)
    y = torch.randn(6, 4).T.requires_grad_()  # not contiguous
    torch.testing.assert_close(torch.autograd.grad(gap_dropout(y, 0.5).sum(), y)[0].unique().max().item(), 2.0)


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.long
def test_compile(llama, shake, ids, method):
    model = shake(adapted(llama(num_hidden_layers=1), method)).train()
    want = gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, ids)[0], want[0])
    got = {n: p.grad for n, p in trainable_parameters(model).items()}
    torch.testing.assert_close(got, want[1], atol=1e-6, rtol=1e-3)


def test_transforms_and_second_derivatives():
    layer, x = make(detach_norm=False), torch.randn(4, 8, dtype=torch.float64)
    params = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    loss = lambda params, x: torch.func.functional_call(layer, params, (x,)).square().sum()
    want = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A])[0]
    torch.testing.assert_close(torch.func.grad(loss)(params, x)["lora_A"], want)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
    torch.testing.assert_close(each["lora_A"].sum(0), want)

    with pytest.raises(RuntimeError, match="second order.*plan='plain'"):
        torch.autograd.grad(layer(x).square().sum(), layer.magnitude, create_graph=True)
    layer.plan = "plain"
    first = torch.autograd.grad(layer(x).square().sum(), layer.magnitude, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), layer.magnitude)[0].abs().sum() > 0


def test_a_base_that_learns_and_a_base_with_hooks_take_the_plain_way():
    layer, x = make(LoRALinear), torch.randn(4, 8, dtype=torch.float64)
    assert layer.fast()
    layer.base_layer.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0
    layer = make(LoRALinear)
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda *_: seen.append(1))
    layer(x)
    assert seen
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        layer, seen = make(LoRALinear), []
        getattr(layer.base_layer, register)(lambda *_: seen.append(1))
        layer(x.requires_grad_()).sum().backward()
        assert seen, register


def test_dropped_inputs_have_no_dense_plan():
    operands = make(LoRALinear).operands(torch.randn(4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="choose plan='factored'"):
        fused_product(torch.randn(4, 8, dtype=torch.float64), [operands], "dense", dropped=torch.tensor([0]))


@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
def test_changing_the_output_in_place(cls):
    "Allowed where the output is not needed, and else an error that says what to do."
    layer, x = make(cls, bias=False), torch.randn(4, 8, dtype=torch.float64)
    y = F.relu(layer(x), inplace=True)
    if cls is LoRALinear:
        return y.sum().backward()
    with pytest.raises(RuntimeError, match="ReLU\\(inplace=False\\).*plan='plain'"):
        y.sum().backward()
    layer.plan = "plain"
    F.relu(layer(x), inplace=True).sum().backward()


def test_what_is_kept_for_the_backward_pass():
    "DoRA: what LoRA keeps, the output, and vectors."
    x, bytes_kept = torch.randn(512, 8, dtype=torch.float64, requires_grad=True), {}
    for cls, plan in itertools.product((LoRALinear, DoRALinear), PLANS):
        layer, kept = make(cls, plan=plan, bias=False), {}
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def note(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = layer(x)
        bytes_kept[cls, plan] = sum(n for p, n in kept.items() if p not in own | {x.untyped_storage().data_ptr()})
        out = y.untyped_storage().nbytes()
    for plan in PLANS:
        low = 512 * 3 * 8 if plan == "factored" else 0
        assert bytes_kept[LoRALinear, plan] == low
        assert bytes_kept[DoRALinear, plan] <= low + out + 4 * 12 * 8


def _worker(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"  # a port that was free may be taken by now
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    model = torch.load(folder / "model.pt", weights_only=False)
    wrapped = DistributedDataParallel(model)
    for half in torch.load(folder / "ids.pt").chunk(2)[rank].split(2):
        with wrapped.no_sync():
            wrapped(half).logits.square().mean().backward()
    wrapped(torch.load(folder / "ids.pt")[:2]).logits.square().mean().backward()
    torch.save({n: p.grad for n, p in trainable_parameters(model).items()}, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # DistributedDataParallel's end may wait for a thread of gloo that waits for Python's lock


def main():
    rank, folder = sys.argv[1:]
    _worker(int(rank), Path(folder))


def test_data_parallel(llama, shake, tmp_path, warm):
    "Two processes, each with its half, hold the mean of the gradients."
    model, ids = shake(adapted(llama())).train(), torch.arange(80).view(8, 10)
    torch.save(model, tmp_path / "model.pt")
    torch.save(ids, tmp_path / "ids.pt")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_plans; test_plans.main()"
    both = [subprocess.Popen([sys.executable, "-c", code, str(r), str(tmp_path)]) for r in (0, 1)]
    assert [p.wait(120) for p in both] == [0, 0]
    a, b = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    model.zero_grad()
    losses = [model(part).logits.square().mean() / 2 for part in ids.split(2)]
    (sum(losses) + model(ids[:2]).logits.square().mean()).backward()
    torch.testing.assert_close(a, {n: p.grad for n, p in trainable_parameters(model).items()}, atol=1e-6, rtol=1e-4)


# What a review found


class Attention(nn.Module):
    "Three projections of one input, called by whatever `call` says."

    def __init__(self, call):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in "qkv")
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def no_grad_first(m, x):
    with torch.no_grad():
        q = m.q_proj(x)
    return q + m.k_proj(x) + m.v_proj(x)


def autocast_first(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        q = m.q_proj(x)
    return q.float() + m.k_proj(x) + m.v_proj(x)


def changed_between(m, x):
    x = x * 1
    v = m.v_proj(x)
    with torch.no_grad():
        x.add_(1.0)
    return v.detach() + m.q_proj(x) + m.k_proj(x)


def reentrant_first(m, x):
    q = torch.utils.checkpoint.checkpoint(m.q_proj, x, use_reentrant=True)
    return q + m.k_proj(x) + m.v_proj(x)


@pytest.mark.parametrize("call", (no_grad_first, autocast_first, changed_between, reentrant_first))
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_siblings_called_under_different_circumstances(call, method, shake):
    torch.manual_seed(0)
    config = AdapterConfig(method, rank=2, target_modules=("q_proj", "k_proj", "v_proj"))
    model = shake(adapt(nn.Sequential(Attention(call)), config)).train()
    x, got = torch.randn(3, 8), {}
    for plan in ("auto", "plain"):
        for layer in adapter_layers(model).values():
            layer.plan = plan
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = model(leaf)
        y.sum().backward()
        got[plan] = y.detach(), leaf.grad, {n: p.grad for n, p in trainable_parameters(model).items()}
    rough = dict(atol=0.05, rtol=0.05) if call is autocast_first else {}
    torch.testing.assert_close(got["auto"], got["plain"], **rough)


def test_an_unused_sibling_has_no_gradient(shake):
    config = AdapterConfig("dora", rank=2, target_modules=("q_proj", "k_proj", "v_proj"))
    model = shake(adapt(nn.Sequential(Attention(lambda m, x: m.q_proj(x))), config)).train()
    model(torch.randn(3, 8)).sum().backward()
    assert {n.split(".")[1] for n, p in trainable_parameters(model).items() if p.grad is not None} == {"q_proj"}


def test_a_magnitude_that_learns_alone():
    layer = make()
    layer.lora_A.requires_grad_(False), layer.lora_B.requires_grad_(False)
    layer(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    assert layer.magnitude.grad.abs().sum() > 0


def test_dropout_follows_its_own_mode():
    layer, x = make(dropout=0.5), torch.randn(4, 8, dtype=torch.float64)
    layer.eval().dropout.train()  # as for Monte Carlo dropout
    assert not torch.equal(layer(x), layer(x))
    layer.train().dropout.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train().dropout = nn.Identity()
    torch.testing.assert_close(layer(x), layer.plain(x))
    with pytest.raises(ValueError, match="dropout=1.0"):
        make(dropout=1.0)
    assert make(dropout=0.3).train()(torch.randn(8, 6, dtype=torch.float64).T).shape == (6, 12)


def test_every_row_of_a_tall_or_transposed_weight_is_watched():
    for row, transposed in itertools.product(range(12), (False, True)):
        layer, x = make(), torch.randn(4, 8, dtype=torch.float64)
        if transposed:
            layer.base_layer.weight.data = layer.base_layer.weight.data.T.contiguous().T
        layer(x)
        layer.base_layer.weight.data[row].mul_(2)
        torch.testing.assert_close(layer(x), layer.plain(x))


@pytest.mark.parametrize("size", (1.0, 0.1, 1e-3, 0.0))
def test_small_magnitudes_in_bfloat16(size):
    layer = make(dtype=torch.bfloat16, base_dtype=torch.bfloat16)
    layer.magnitude.data *= size
    exact = make(base_dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x, dy = torch.randn(256, 8).bfloat16(), torch.randn(256, 12).bfloat16()
    want, got = results(exact, "plain", x.double(), dy.double()), results(layer, "auto", x, dy)
    for name in ("y", "magnitude"):
        assert (got[name] - want[name]).norm() < 0.02 * want[name].norm(), name


def test_what_is_handed_out_is_a_copy_and_autocast_costs_no_precision():
    layer, x = make(dtype=torch.float32), torch.randn(4, 8)
    before, merged = layer.scale().detach(), layer.merged_weight()
    layer.norm().mul_(2)
    assert torch.equal(layer.scale(), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.merged_weight(), merged) and torch.equal(layer.scale(), before)
    with torch.inference_mode():
        born = make(dtype=torch.float32)
        exact = born.norm()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(born.norm(), exact, atol=0, rtol=1e-6)
            born(x)


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match="meta"):
        adapt(model, AdapterConfig(target_modules="all-linear"))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="linear1.*TransformerEncoderLayer"):
        adapt(encoder, AdapterConfig(target_modules=("linear1",)))
