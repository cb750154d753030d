"Forward and backward of a Llama-shaped model: frozen, PEFT's LoRA and DoRA, the same with our product, ours."

import itertools
import statistics

from benchmarks.common import (
    DEVICE,
    DTYPES,
    arguments,
    blocks,
    finish,
    interleave,
    ours,
    peak_bytes,
    peft,
    ratio,
    shape_of,
    training_pass,
)


def candidates(shape, layers, dtype, rank, dropout, checkpointing, tokens, length):
    "What is compared, each a call that does one forward and backward pass."
    from dora_nb import accelerate

    new = lambda: blocks(shape, layers, dtype)
    models = {
        "frozen": new(),
        "PEFT LoRA": peft(new(), "lora", rank, dropout),
        "PEFT DoRA": peft(new(), "dora", rank, dropout),
        "PEFT LoRA, accelerated": accelerate(peft(new(), "lora", rank, dropout)),
        "PEFT DoRA, accelerated": accelerate(peft(new(), "dora", rank, dropout)),
        "our LoRA": ours(new(), "lora", rank, dropout=dropout),
        "our DoRA": ours(new(), "dora", rank, dropout=dropout),
    }
    if dropout:
        models["our DoRA, delta"] = ours(new(), "dora", rank, dropout=dropout, dropout_form="delta")
    _, step = training_pass(shape, tokens, length, dtype)
    for model in models.values():
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    return {name: lambda m=model: step(m) for name, model in models.items()}


def main():
    options = arguments(
        __doc__, rounds=7, layers=4, ranks="16,64", dtypes="float32,bfloat16", tokens=2048, length=128, shape=""
    )
    shape, ranks, rows = shape_of(options.shape), [int(r) for r in options.ranks.split(",")], []
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
        row["PEFT DoRA / accelerated"] = f"{ratio(times, 'PEFT DoRA', 'PEFT DoRA, accelerated')[0]:.2f}"
        row["accelerated / our DoRA"] = f"{ratio(times, 'PEFT DoRA, accelerated', 'our DoRA')[0]:.2f}"
        if DEVICE.type == "cuda":  # on a CPU this takes a process for each: memory.py
            row["our DoRA's peak / PEFT LoRA's"] = "{:.3f}".format(
                peak_bytes(steps["our DoRA"]) / peak_bytes(steps["PEFT LoRA"])
            )
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
