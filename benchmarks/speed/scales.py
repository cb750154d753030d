"What DoRA's scale costs, and what `cached_scales` saves: training, scoring and decoding."

import torch
from transformers import DynamicCache

from benchmarks.common import DEVICE, DTYPES, arguments, blocks, finish, interleave, ours, ratio, shape_of
from dora_nb.layers.linear import cached_scales


def train(model, x, dy):
    "A forward and a backward pass, to the adapters only."
    model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(dy)
    model.zero_grad()


@torch.no_grad()
def score(model, x):
    "A forward pass."
    model(inputs_embeds=x, use_cache=False)


@torch.no_grad()
def decode(model, x, past):
    "Ten tokens, one after another, behind a key-value cache."
    for _ in range(10):
        model(inputs_embeds=x, past_key_values=past, use_cache=True)
        past.crop(-x.shape[1])


def calls(model, width, dtype, tokens):
    "What is timed, by name."
    new = lambda *shape: torch.randn(*shape, width, device=DEVICE, dtype=dtype)
    found = {}
    for n in tokens:
        x = new(max(1, n // 128), min(n, 128))
        dy = torch.randn_like(x)
        found[f"training, {n:,} tokens"] = lambda x=x, dy=dy: train(model, x, dy)
        found[f"scoring, {n:,} tokens"] = lambda x=x: score(model, x)
    past = DynamicCache()
    with torch.no_grad():
        model(inputs_embeds=new(1, 128), past_key_values=past)
    found["decoding, 1 token behind 128"] = lambda: decode(model, new(1, 1), past)
    return found


def main():
    options = arguments(
        __doc__, rounds=7, layers=4, ranks="16,64", dtypes="float32", tokens="256,1024,2048,8192", shape=""
    )
    shape, rows = shape_of(options.shape), []
    for dtype in options.dtypes.split(","):
        for rank in map(int, options.ranks.split(",")):
            new = lambda: blocks(shape, options.layers, DTYPES[dtype])
            each, kept = ours(new(), "dora", rank), ours(new(), "dora", rank)
            sizes = shape["hidden_size"], DTYPES[dtype], [int(n) for n in options.tokens.split(",")]
            computed = calls(each, *sizes)
            with cached_scales(kept):  # filled by the first call
                for work, call in calls(kept, *sizes).items():
                    times = interleave({"computed": computed[work], "cached": call}, options.rounds)
                    change = "{:.3f} [{:.3f}, {:.3f}]".format(*ratio(times, "computed", "cached"))
                    rows.append({"dtype": dtype, "rank": rank, "work": work, "computed / cached": change})
                    print(rows[-1], flush=True)
    finish("scales.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
