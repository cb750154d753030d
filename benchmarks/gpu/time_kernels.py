"""The Triton kernels on a GPU: are they right, which tiles are fast, and what a step takes. Sized for three minutes.

    python -m benchmarks.gpu.time_kernels --out kernels.json

Without a GPU, Triton's interpreter shows that the script runs: TRITON_INTERPRET=1, few tokens, `--shapes small`.
"""

import itertools
import statistics

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.common import (
    DEVICE,
    DTYPES,
    LARGE,
    SMALL,
    arguments,
    blocks,
    finish,
    interleave,
    ours,
    peft,
    ratio,
    training_pass,
)
from dora_nb.layers.dora import factored_norm
from dora_nb.layers.fused import Operands, _dot_columns, _gradients, _products, _scaled, _times
from dora_nb.layers.kernels import (
    GRADIENT_TILES,
    INTERPRETED,
    OUTPUT_TILES,
    Tiles,
    adapted_norms,
    output_gradient,
    scaled_output,
)
from dora_nb.layers.linear import cached_scales

OUTPUTS = [OUTPUT_TILES, *(Tiles(*t) for t in ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 256, 64, 4, 4)))]
OUTPUTS += [Tiles(128, 128, 64, 4, 4), Tiles(128, 128, 32, 4, 4), Tiles(256, 128, 64, 8, 3)]
GRADIENTS = [GRADIENT_TILES, *(Tiles(r, c, 64, w, 3) for r, c, w in ((32, 64, 4), (64, 128, 4), (128, 64, 8)))]

if INTERPRETED:  # its times say nothing
    OUTPUTS, GRADIENTS = OUTPUTS[:1], GRADIENTS[:1]


def layer(shape, rank, tokens, dtype):
    "An input of the widest layer, h = Ax, the gradient of its output, and its operands."
    torch.manual_seed(0)
    ins, outs = shape["hidden_size"], shape["intermediate_size"]
    new = lambda *size: torch.randn(size, device=DEVICE) / size[-1] ** 0.5
    W, A, B, x = new(outs, ins).to(dtype), new(rank, ins), new(outs, rank) / 9, ins**0.5 * new(tokens, ins).to(dtype)
    n, m = factored_norm(W, A, B, 2.0), 1 + 0.1 * torch.rand(outs, device=DEVICE)
    return x, x @ A.T.to(dtype), new(tokens, outs).to(dtype), Operands(W, A, B, 2.0, m, n, m / n)


def errors(x, h, dz, t):
    "The kernels' relative distances from float64, as multiples of PyTorch's; about 1 or below."
    W, B, g = t.W0.double(), t.s * t.B.double(), t.scale.double()
    exact = (x.double() @ W.T + h.double() @ B.T) * g
    far = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    kernel, z = (_products(x, x, [t], plan)[0][0] for plan in ("triton", "factored"))
    rows = {"z": far(kernel, exact) / far(z, exact)}
    dv, dm = g * dz.double(), (dz.double() * z.double()).sum(0) / (g * t.norm.double())
    wanted = dv, None, t.s * dv.T @ h.double(), dm
    both = [_gradients(h, t, z, dz, plan) for plan in ("triton", "factored")]
    for i, name in ((0, "∂v"), (2, "∂B"), (3, "∂m")):
        rows[name] = far(both[0][i], wanted[i]) / max(far(both[1][i], wanted[i]), 1e-9)
    return {f"error in {name} / PyTorch's": f"{value:.2f}" for name, value in rows.items()}


def best(calls, rounds):
    "The fastest of some calls, and the median ratios of all to the first."
    times = interleave(calls, rounds, warm_up=2)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return min(list(calls)[1:], key=medians.get), {name: ratio(times, name, next(iter(calls)))[0] for name in calls}


def fits(call):
    "Whether a kernel's tiles fit into the GPU's shared memory."
    try:
        call()
    except OutOfResources:
        return False
    return True


def operations(x, h, dz, t):
    "What the kernels replace, as PyTorch's operations; no more, and no less."
    sB, z = (t.s * t.B).to(x.dtype), _products(x, x, [t], "factored")[0][0]

    def output():
        y = torch.mm(h, sB.T).addmm_(x, t.W0.T)
        return _scaled(y, t, out=y)

    def gradient():
        dv = _scaled(dz, t)
        return dv, _dot_columns(dz, z, torch.float32), _times(t.s, dv.T, h)

    kernels = {
        "output": {c: lambda c=c: scaled_output(x, t.W0, h, sB, t.scale, c) for c in OUTPUTS},
        "gradient": {c: lambda c=c: output_gradient(dz, z, t.scale, h, c) for c in GRADIENTS},
        "norms of eight layers": {None: lambda: adapted_norms([t.W0] * 8, [t.A] * 8, [t.B] * 8, [t.s] * 8)},
    }
    norms = lambda: [factored_norm(t.W0, t.A, t.B, t.s) for _ in range(8)]
    return {"output": output, "gradient": gradient, "norms of eight layers": norms}, kernels


def tiles(x, h, dz, t, rounds):
    "Rows of each kernel against PyTorch's operations, for each choice of tiles."
    plain, kernels = operations(x, h, dz, t)
    for name, choices in kernels.items():
        choices = {c: call for c, call in choices.items() if fits(call)}
        if not choices:
            continue
        fastest, ratios = best({"PyTorch": plain[name], **choices}, rounds)
        for c in choices:
            yield dict(kernel=name, tiles=str(tuple(c or ())), fastest="yes" if c is fastest else "") | {
                "time / PyTorch": f"{ratios[c]:.2f}"
            }


def step(shape, layers, rank, tokens, dtype, rounds):
    "A forward and backward pass of some blocks: frozen, PEFT's, ours by PyTorch and by the kernels."
    new = lambda: blocks(shape, layers, dtype)
    models = {"frozen": new(), "PEFT LoRA": peft(new(), "lora", rank), "PEFT DoRA": peft(new(), "dora", rank)}
    models |= {f"our DoRA, {plan}": ours(new(), "dora", rank, plan=plan) for plan in ("auto", "triton")}
    _, run = training_pass(shape, tokens, min(128, tokens), dtype)

    def call(model):
        with cached_scales(model):  # as a training step does
            run(model)

    times = interleave({name: lambda m=m: call(m) for name, m in models.items()}, rounds, warm_up=2)
    words = lambda name: "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, name, "frozen"))
    return {f"{name} / frozen": words(name) for name in list(models)[1:]}


def main():
    options = arguments(
        __doc__, rounds=15, layers=2, ranks="16,64", dtypes="bfloat16", tokens=8192, shapes="large,small"
    )
    if DEVICE.type != "cuda" and not INTERPRETED:
        raise SystemExit("the kernels need a GPU; TRITON_INTERPRET=1 runs them on a CPU, slowly")
    rows, shapes = [], {"large": LARGE, "small": SMALL}
    for name, dtype, rank in itertools.product(
        options.shapes.split(","), options.dtypes.split(","), map(int, options.ranks.split(","))
    ):
        where = dict(shape=name, dtype=dtype, rank=rank)
        given = layer(shapes[name], rank, options.tokens, DTYPES[dtype])
        rows.append(where | errors(*given))
        rows += [where | row for row in tiles(*given, options.rounds)]
        rows.append(where | step(shapes[name], options.layers, rank, options.tokens, DTYPES[dtype], options.rounds))
        print(rows[-1], flush=True)
    columns = list(dict.fromkeys(k for r in rows for k in r))
    finish("time_kernels.py", rows, columns, options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
