"""Forward and backward of a Llama-shaped model with DoRA layers of several libraries, ours last.

torchtune is not a requirement of this project, and PEFT refuses the torchao that it needs. So `make speed` keeps both aside, in build/peers, and calls

    python -m benchmarks.speed.peers --torchtune build/peers --out reports/speed/peers.json

Unsloth has no row: where DoRA is active it leaves its own kernels and runs PEFT's layers (unsloth 2026.10.9, fast_lora.py).
"""

import itertools
import statistics
import sys

from torch import nn

from benchmarks.common import (
    DTYPES,
    TARGETS,
    arguments,
    blocks,
    finish,
    interleave,
    ours,
    peft,
    ratio,
    shape_of,
    training_pass,
)


def torchtune(model, rank, folder):
    "torchtune's DoRA layers in the places of `model`'s linear layers, with their weights, away from their start."
    if folder not in sys.path:
        sys.path.append(folder)  # after PEFT has looked for torchao
    from torchtune.modules.peft import DoRALinear

    for parent in list(model.modules()):
        for name, base in parent.named_children():
            if name in TARGETS and type(base) is nn.Linear:
                outs, ins = base.weight.shape
                layer = DoRALinear(ins, outs, rank=rank, alpha=2 * rank).to(base.weight)
                layer.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
                nn.init.normal_(layer.lora_b.weight, std=1e-3)
                layer.initialize_dora_magnitude()
                setattr(parent, name, layer)
    return model.train()


def candidates(shape, layers, dtype, rank, folder):
    "The models by name."
    from dora_nb import accelerate

    new = lambda: blocks(shape, layers, dtype)
    models = {"frozen": new(), "PEFT": peft(new(), "dora", rank)}
    models["PEFT, accelerated"] = accelerate(peft(new(), "dora", rank))
    if folder:
        models["torchtune"] = torchtune(new(), rank, folder)
    return models | {"ours": ours(new(), "dora", rank)}


def main():
    options = arguments(
        __doc__,
        rounds=7,
        layers=2,
        ranks="16,64,256",
        dtypes="float32,bfloat16",
        tokens="256,2048",
        shape="",
        torchtune="",
    )
    numbers, rows = (lambda text: map(int, text.split(","))), []
    for dtype, rank, tokens in itertools.product(
        options.dtypes.split(","), numbers(options.ranks), numbers(options.tokens)
    ):
        shape = shape_of(options.shape)
        models = candidates(shape, options.layers, DTYPES[dtype], rank, options.torchtune)
        _, step = training_pass(shape, tokens, min(128, tokens), DTYPES[dtype])
        times = interleave({name: lambda m=m: step(m) for name, m in models.items()}, options.rounds, warm_up=2)
        row = dict(dtype=dtype, rank=rank, tokens=tokens)
        for name in list(models)[1:]:
            row[f"{name} / frozen"] = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, name, "frozen"))
        rows.append(row)
        print(row, statistics.median(times["frozen"]), flush=True)
    finish("peers.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
