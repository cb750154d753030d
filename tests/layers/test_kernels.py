"The Triton kernels give what PyTorch gives: on a GPU where there is one, and in Triton's interpreter elsewhere."

import copy
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_nb.layers.decompose import row_norm
from dora_nb.layers.linear import DoRALinear, LoRALinear, cached_scales, constant_scale
from dora_nb.layers.plans import resolve_plan
from dora_nb.models.adapt import adapt, trainable_parameters
from dora_nb.models.methods import AdapterConfig

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") else "cuda")  # tests/conftest.py decides
pytest.importorskip("triton")
import dora_nb.layers.kernels
from dora_nb.layers.kernels import Tiles, adapted_norms, output_gradient, runs_on, scaled_output

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # tokens, in, out, rank
    (64, 64, 64, 16),
    (70, 80, 200, 3),
    (129, 33, 65, 1),
    (1030, 24, 40, 8),  # two parts of the gradient's sums
    (65, 48, 130, 64),
    (66, 40, 70, 65),  # more than the registers hold
    (64, 32, 48, 512),
]


def tensors(tokens, ins, outs, rank, dtype):
    torch.manual_seed(0)
    shapes = (tokens, ins), (outs, ins), (tokens, rank), (outs, rank), (tokens, outs)
    x, W, h, B, dz = (torch.randn(s, device=DEVICE).to(dtype) for s in shapes)
    return x, W / ins**0.5, h, B / rank**0.5, 0.5 + torch.rand(outs, device=DEVICE), dz


def rounding(dtype):
    "The largest relative error of one rounding; the interpreter cuts bfloat16 off instead."
    cut = dtype == torch.bfloat16 and DEVICE.type == "cpu"
    return torch.finfo(dtype).eps * (1 if cut else 0.5) * 1.001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_rounded_once(shape, dtype):
    x, W, h, B, g, _ = tensors(*shape, dtype)
    x64, W64, h64, B64 = (t.double() for t in (x, W, h, B))
    exact, size = x64 @ W64.T + h64 @ B64.T, x64.abs() @ W64.abs().T + h64.abs() @ B64.abs().T
    for scale in (None, g):
        z, factor = scaled_output(x, W, h, B, scale), 1 if scale is None else scale.double()
        assert z.dtype == dtype and z.shape == exact.shape
        assert ((z - factor * exact).abs() <= factor * (rounding(dtype) * exact.abs() + 1e-6 * size)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_output(shape, dtype):
    *_, h, _, g, dz = tensors(*shape, dtype)
    z = torch.randn_like(dz)
    dv, sums, products = output_gradient(dz, z, g, h)
    wanted = dz.double() * g
    torch.testing.assert_close(dv.double(), wanted, atol=1e-7, rtol=rounding(dtype))
    torch.testing.assert_close(sums.double(), (dz.double() * z.double()).sum(0), atol=1e-3, rtol=1e-4)
    rough = dict(atol=1e-3, rtol=1e-4) if shape[3] <= 64 else dict(atol=0.1, rtol=0.02)
    torch.testing.assert_close(products.double(), dv.double().T @ h.double(), **rough)


def test_tensors_need_not_be_contiguous():
    x, W, h, B, g, dz = tensors(70, 24, 40, 5, torch.float32)
    z = scaled_output(x, W, h, B, g)
    turned = [t.T.contiguous().T for t in (x, W, h, B, dz)]
    torch.testing.assert_close(scaled_output(*turned[:4], g), z)
    for want, got in zip(output_gradient(dz, z, g, h), output_gradient(turned[4], z, g, turned[2])):
        torch.testing.assert_close(got, want)
    wide = torch.randn(70, 60, device=DEVICE)
    part = wide[:, 10:34]
    torch.testing.assert_close(scaled_output(part, W, h, B), part @ W.T + h @ B.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiles", [Tiles(16, 16, 16), Tiles(64, 32, 128), Tiles(32, 256, 32)])
def test_the_size_of_tiles_changes_nothing(tiles):
    x, W, h, B, g, dz = tensors(70, 80, 200, 3, torch.float32)
    z = scaled_output(x, W, h, B, g, tiles)
    torch.testing.assert_close(z, scaled_output(x, W, h, B, g), atol=1e-5, rtol=1e-5)
    for want, got in zip(output_gradient(dz, z, g, h), output_gradient(dz, z, g, h, tiles)):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_many_layers(dtype):
    torch.manual_seed(0)
    shapes = [(40, 24, 2), (100, 130, 20), (7, 300, 1), (64, 128, 512), (33, 31, 16)]
    new = lambda *shape: torch.randn(shape, device=DEVICE)
    weights = [new(o, i).to(dtype) for o, i, _ in shapes]
    weights[1] = weights[1].T.contiguous().T  # as transformers' Conv1D gives it
    As, Bs = [new(r, i) / i for _, i, r in shapes], [new(o, r) for o, _, r in shapes]
    factors = [2.0, 0.5, 1.0, 0.25, 3.0]
    for norm, W, A, B, s in zip(adapted_norms(weights, As, Bs, factors), weights, As, Bs, factors):
        torch.testing.assert_close(norm.double(), row_norm(W.double() + s * B.double() @ A.double()), rtol=1e-5, atol=0)


def layer_and_input(cls, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = cls(nn.Linear(72, 96, dtype=dtype), rank=5, alpha=10, **options).to(DEVICE)
    nn.init.normal_(layer.lora_B, std=0.1)
    if cls is DoRALinear:
        layer.magnitude.data *= 0.5 + torch.rand_like(layer.magnitude)
    x, dy = torch.randn(2, 40, 72, device=DEVICE), torch.randn(2, 40, 96, device=DEVICE)
    return layer, x.to(dtype), dy.to(dtype)


def results(layer, plan, x, dy):
    "Output and all gradients."
    layer.plan, x = plan, x.clone().requires_grad_()
    params = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *params.values()), dy)]


@pytest.mark.parametrize("detach", (True, False))
@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
def test_a_layer_agrees_with_the_formula(cls, detach):
    layer, x, dy = layer_and_input(cls, **({} if cls is LoRALinear else dict(detach_norm=detach)))
    want = results(layer, "plain", x, dy)
    for a, b in zip(results(layer, "triton", x, dy), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.plain(x), atol=1e-5, rtol=1e-4)


def test_a_magnitude_of_zero_still_gets_its_gradient():
    layer, x, dy = layer_and_input(DoRALinear)
    layer.magnitude.data[4] = 0
    for a, b in zip(results(layer, "triton", x, dy), results(layer, "plain", x, dy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
def test_below_float32_it_is_near_the_exact_result(cls, dtype):
    layer, x, dy = layer_and_input(cls, dtype)
    want = results(copy.deepcopy(layer).double(), "plain", x.double(), dy.double())
    far = lambda plan: [((a - b).norm() / b.norm()).item() for a, b in zip(results(layer, plan, x, dy), want)]
    kernel, factored = far("triton"), far("factored")
    assert max(kernel) < 2 * torch.finfo(dtype).eps
    if dtype == torch.float16 and cls is DoRALinear:  # rounded once instead of three times
        assert kernel[0] < 0.9 * factored[0]


def test_a_row_of_zeros_stays_finite():
    "As the plain norm does, the kernel's has a floor: 0/0 would spread to every gradient."
    layer, x, dy = layer_and_input(DoRALinear)
    layer.base_layer.weight.data[3] = 0
    layer.lora_B.data[3] = 0
    layer.magnitude.data[3] = 0
    want = results(layer, "plain", x, dy)
    layer.plan = "triton"
    with cached_scales(layer):
        for a, b in zip(results(layer, "triton", x, dy), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["bfloat16", "float64", "empty"])
def test_what_the_kernel_cannot_read_is_left_to_pytorch(change):
    layer, *_ = layer_and_input(DoRALinear, plan="triton")
    if change == "empty":  # as a sharded weight is between two passes
        layer.base_layer.weight.data = torch.empty(0, device=DEVICE)
        with cached_scales(layer):
            pass
        return
    for p in (layer.lora_A, layer.lora_B):
        p.data = p.data.to(getattr(torch, change))
    want = row_norm(layer.base_layer.weight + layer.scaling * layer.lora_B.float() @ layer.lora_A.float())
    with cached_scales(layer):
        torch.testing.assert_close(constant_scale(layer)[0].float(), want, atol=0.01, rtol=0.01)


def test_shapes_that_do_not_fit_are_refused():
    x, W, h, B, g, dz = tensors(70, 24, 40, 5, torch.float32)
    with pytest.raises(ValueError, match="shapes do not fit"):
        scaled_output(x[:, :20], W, h, B, g)
    with pytest.raises(ValueError, match="contiguous"):
        output_gradient(dz, dz.T.contiguous().T, g, h)


def test_pytorch_s_settings_of_tf32_are_followed():
    from dora_nb.layers.kernels import _products

    one, matmul = torch.ones(1), torch.backends.cuda.matmul
    assert _products(one)[0] == "ieee"
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert _products(one)[0] == "tf32" and _products(one.half())[0] == "ieee"
    finally:
        matmul.fp32_precision = before


def test_without_triton_at_run_time_the_plan_is_auto(monkeypatch):
    layer, x, dy = layer_and_input(DoRALinear)
    monkeypatch.setitem(sys.modules, "dora_nb.layers.kernels", None)  # its import fails
    with cached_scales(layer):
        for a, b in zip(results(layer, "triton", x, dy), results(layer, "auto", x, dy), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_dropout_draws_what_the_factored_plan_draws():
    layer, x, dy = layer_and_input(DoRALinear, dropout=0.3)
    got = []
    for plan in ("triton", "factored"):
        torch.manual_seed(3)
        got.append(results(layer.train(), plan, x, dy))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_where_the_kernels_do_not_run_the_plan_is_auto():
    layer, x, _ = layer_and_input(DoRALinear)
    plan = lambda t: resolve_plan("triton", t, [layer.operands(t)], True)
    assert plan(x.view(80, 72)) == "triton" and plan(x[0]) != "triton"  # 40 rows
    assert plan(x.view(80, 72).double()) != "triton" and not runs_on(torch.empty(99, 4, device="meta"))
    double, x, dy = layer_and_input(DoRALinear, torch.float64)
    for a, b in zip(results(double, "triton", x, dy), results(double, "plain", x, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_without_triton_the_plan_is_refused(monkeypatch):
    monkeypatch.setattr("dora_nb.layers.linear.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="plan='triton' needs the package triton.*pip install triton"):
        layer_and_input(DoRALinear, plan="triton")


def test_a_model_is_trained_by_kernels(llama, monkeypatch):
    "Layers that share an input, norms in one launch, and a loss over the whole model; each kernel is seen to run."
    losses, ran = {}, []
    for name in ("scaled_output", "output_gradient", "adapted_norms"):
        call = getattr(dora_nb.layers.kernels, name)
        monkeypatch.setattr(dora_nb.layers.kernels, name, lambda *a, c=call, n=name: ran.append(n) or c(*a))
    for plan in ("triton", "plain"):
        model = adapt(llama(), AdapterConfig("dora", rank=4, plan=plan, target_modules="all-linear")).to(DEVICE)
        torch.manual_seed(1)
        for p in trainable_parameters(model).values():
            p.data += 0.02 * torch.randn_like(p)
        ids = torch.randint(0, 128, (3, 32), device=DEVICE)
        with cached_scales(model):
            layer = next(m for m in model.modules() if isinstance(m, DoRALinear))
            norm = constant_scale(layer)[0]
            torch.testing.assert_close(
                norm, row_norm(layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A)
            )
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        assert set(ran) == {"scaled_output", "output_gradient", "adapted_norms"} and ran.count("adapted_norms") == 1
        losses[plan] = [loss.detach(), *[p.grad for p in trainable_parameters(model).values()]]
    for a, b in zip(losses["triton"], losses["plain"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton brings its assembler there"
)
def test_the_kernels_compile_for_gpus(tmp_path):
    "Triton's interpreter takes more than its compiler does. No GPU is needed to compile."
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "compiled_kernels.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert {k["kernel"] for k in made} == {"_output_kernel", "_gradient_kernel", "_norm_kernel"}
    for kernel in made:
        assert kernel["shared"] <= 99_000 and kernel["STACK"] <= 128, kernel  # small GPUs have so much
        if kernel["dtype"] in ("bf16", "fp16"):
            assert not kernel["STACK"], kernel
            small = kernel["kernel"] == "_norm_kernel"  # its rows are too few for a Hopper's instruction
            assert kernel["products"] == ("mma.sync" if small or kernel["capability"] < 90 else "wgmma"), kernel
            assert kernel["ahead"] or small, kernel
