"What adapted layers keep for the backward pass, and the peak of a whole step."

import itertools

import torch

from benchmarks.common import (
    DEVICE,
    DTYPES,
    TARGETS,
    alone,
    arguments,
    blocks,
    finish,
    ours,
    peak_bytes,
    peft,
    shape_of,
)

MODELS = {
    "frozen": lambda model, rank: model,
    "PEFT LoRA": lambda model, rank: peft(model, "lora", rank),
    "PEFT DoRA": lambda model, rank: peft(model, "dora", rank),
    "our LoRA": lambda model, rank: ours(model, "lora", rank),
    "our DoRA": lambda model, rank: ours(model, "dora", rank),
}


def inputs(shape, tokens, dtype):
    "Something for a model to read, with a backward pass all the way."
    return torch.randn(tokens // 128, 128, shape["hidden_size"], device=DEVICE, dtype=dtype).requires_grad_()


def kept(model, x):
    "Bytes of distinct storages that autograd keeps over a forward pass, parameters and the input aside."
    seen = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}

    def note(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(inputs_embeds=x, use_cache=False).last_hidden_state
    return sum(seen.values()) + 0 * len(y)


def peak(name, dtype, rank, tokens, layers):
    "Bytes at the peak of three steps, beyond what was there before."
    shape = shape_of()
    model = MODELS[name](blocks(shape, layers, DTYPES[dtype]), rank)
    x = inputs(shape, tokens, DTYPES[dtype])

    def steps():
        for _ in range(3):
            model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
            model.zero_grad()
            x.grad = None

    return peak_bytes(steps)


def main():
    options = arguments(__doc__, rounds=1, layers=4, ranks="16,64", dtypes="float32,bfloat16", tokens=2048)
    shape, rows = shape_of(), []
    for dtype, rank in itertools.product(options.dtypes.split(","), map(int, options.ranks.split(","))):
        row = {"dtype": dtype, "rank": rank, "tokens": options.tokens}
        for name in MODELS:
            model = MODELS[name](blocks(shape, options.layers, DTYPES[dtype]), rank)
            each = kept(model, inputs(shape, options.tokens, DTYPES[dtype])) / (options.layers * len(TARGETS))
            row[f"{name}, kept"] = each
        peaks = {
            n: min(alone(peak, n, dtype, rank, options.tokens, options.layers) for _ in range(options.rounds))
            for n in MODELS
        }
        base, lora = row.pop("frozen, kept"), row["our LoRA, kept"]
        for name in list(MODELS)[1:]:
            row[f"{name}, kept"] = f"{(row[f'{name}, kept'] - base) / 2**20:.2f} MiB"
            row[f"{name}, peak / PEFT LoRA's"] = f"{peaks[name] / peaks['PEFT LoRA']:.3f}"
        row["our DoRA − our LoRA, kept"] = (
            f"{(float(row['our DoRA, kept'].split()[0]) - (lora - base) / 2**20):.2f} MiB"
        )
        rows.append(row)
        print(row, flush=True)
    columns = [c for c in rows[0] if "kept" not in c and "peak" not in c]
    columns += [c for c in rows[0] if "kept" in c] + [c for c in rows[0] if "peak" in c]
    finish("memory.py", rows, columns, options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
