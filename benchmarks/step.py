"Forward and backward of a Llama-shaped model: frozen, PEFT's LoRA and DoRA, ours."

import itertools
import statistics

import torch
from common import DEVICE, DTYPES, LARGE, SMALL, arguments, blocks, finish, interleave, ours, peft, ratio


def candidates(shape, layers, dtype, rank, dropout, checkpointing, tokens, length):
    "What is compared, each a call that does one forward and backward pass."
    new = lambda: blocks(shape, layers, dtype)
    models = {
        "frozen": new(),
        "PEFT LoRA": peft(new(), "lora", rank, dropout),
        "PEFT DoRA": peft(new(), "dora", rank, dropout),
        "our LoRA": ours(new(), "lora", rank, dropout=dropout),
        "our DoRA": ours(new(), "dora", rank, dropout=dropout),
    }
    if dropout:
        models["our DoRA, delta"] = ours(new(), "dora", rank, dropout=dropout, dropout_form="delta")
    x = torch.randn(max(1, tokens // length), length, shape["hidden_size"], device=DEVICE, dtype=dtype)
    dy = torch.randn_like(x)

    def step(model):
        inputs = x.clone().requires_grad_()  # so that the frozen model has a backward pass, to its inputs
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(dy)
        model.zero_grad()

    for model in models.values():
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
    return {name: lambda m=model: step(m) for name, model in models.items()}


def memory(step):
    "Peak bytes on the GPU during a call, beyond what was there before."
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def main():
    options = arguments(__doc__, rounds=11, layers=4, ranks="16,64", dtypes="float32,bfloat16", tokens=2048, length=128)
    large = DEVICE.type == "cuda"
    shape, ranks = LARGE if large else SMALL, [int(r) for r in options.ranks.split(",")]
    rows = []
    for dtype, rank, dropout, checkpointing in itertools.product(
        options.dtypes.split(","), ranks, (0.0, 0.05), (False, True)
    ):
        steps = candidates(
            shape, options.layers, DTYPES[dtype], rank, dropout, checkpointing, options.tokens, options.length
        )
        times = interleave(steps, options.rounds)
        row = {"dtype": dtype, "rank": rank, "dropout": dropout, "checkpointing": "yes" if checkpointing else "no"}
        for name in list(steps)[1:]:
            row[f"{name} / frozen"] = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, name, "frozen"))
        row["our DoRA / PEFT LoRA"] = f"{ratio(times, 'our DoRA', 'PEFT LoRA')[0]:.2f}"
        row["PEFT DoRA / ours"] = f"{ratio(times, 'PEFT DoRA', 'our DoRA')[0]:.2f}"
        if large:
            row["our DoRA's peak / PEFT LoRA's"] = f"{memory(steps['our DoRA']) / memory(steps['PEFT LoRA']):.3f}"
        rows.append(row)
        print(row, statistics.median(times["frozen"]), flush=True)
    finish(
        "step.py",
        rows,
        list(dict.fromkeys(k for r in rows for k in r)),
        options.out,
        options=vars(options) | {"out": None},
    )


if __name__ == "__main__":
    main()
