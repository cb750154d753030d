"Unmerged inference: the base model, our LoRA and DoRA, and PEFT's, with its cache and without."

import contextlib

import torch
from peft.helpers import DoraCaching
from transformers import DynamicCache

from benchmarks.common import DEVICE, DTYPES, arguments, blocks, finish, interleave, ours, peft, ratio, shape_of
from dora_nb.layers.linear import cached_scales, constant_scale
from dora_nb.models.adapt import adapter_layers

WORK = {
    "scoring 16 × 128": (16, 128, 0),
    "a prompt of 128": (1, 128, 0),
    "a token after 128": (1, 1, 128),
    "16 tokens after 128": (16, 1, 128),
}


@torch.no_grad()
def call(model, x, past, caching=contextlib.nullcontext, times=1):
    "Some forward passes over `x`, behind a key-value cache."
    with caching():
        for _ in range(times):
            model(inputs_embeds=x, past_key_values=past, use_cache=past is not None)
            if past is not None:
                past.crop(-x.shape[1])  # what was just added


def filled(model, batch, length, width, dtype):
    "A key-value cache."
    cache = DynamicCache()
    with torch.no_grad():
        model(inputs_embeds=torch.randn(batch, length, width, device=DEVICE, dtype=dtype), past_key_values=cache)
    return cache


def extra_bytes(model, x):
    "Return what `cached_scales` keeps beside the adapters, as a fraction of the weights."
    layers = adapter_layers(model).values()
    with cached_scales(model):
        kept = [t for layer in layers for t in constant_scale(layer) if t is not None]
    weights = sum(m.base_layer.weight.numel() * m.base_layer.weight.element_size() for m in layers)
    return sum(t.numel() * t.element_size() for t in kept) / weights


def main():
    options = arguments(__doc__, rounds=7, layers=8, ranks="16,64", dtypes="float32,bfloat16", shape="")
    shape, rows = shape_of(options.shape), []
    for dtype in options.dtypes.split(","):
        for rank in map(int, options.ranks.split(",")):
            new = lambda: blocks(shape, options.layers, DTYPES[dtype]).eval()
            dora, own = peft(new(), "dora", rank).eval(), ours(new(), "dora", rank).eval()
            models = {
                "base": (new(), contextlib.nullcontext),
                "PEFT LoRA": (peft(new(), "lora", rank).eval(), contextlib.nullcontext),
                "PEFT DoRA": (dora, contextlib.nullcontext),
                "PEFT DoRA, cached": (dora, DoraCaching),
                "our LoRA": (ours(new(), "lora", rank).eval(), contextlib.nullcontext),
                "our DoRA": (own, contextlib.nullcontext),
                "our DoRA, cached": (own, lambda own=own: cached_scales(own)),
            }
            for work, (batch, length, past) in WORK.items():
                x = torch.randn(batch, length, shape["hidden_size"], device=DEVICE, dtype=DTYPES[dtype])
                caches = {
                    n: filled(m, batch, past, shape["hidden_size"], x.dtype) if past else None
                    for n, (m, _) in models.items()
                }
                repeat = 10 if past else 1
                times = interleave(
                    {n: lambda m=m, c=c, p=caches[n]: call(m, x, p, c, repeat) for n, (m, c) in models.items()},
                    options.rounds * (3 if past else 1),
                )
                row = {"dtype": dtype, "rank": rank, "work": work}
                for name in list(models)[1:]:
                    row[f"{name} / base"] = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, name, "base"))
                row["our DoRA, cached / our LoRA"] = "{:.3f}".format(ratio(times, "our DoRA, cached", "our LoRA")[0])
                row["cached by our DoRA"] = f"{extra_bytes(own, x):.1%} of the weights"
                rows.append(row)
                print(row, flush=True)
    finish("inference.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
