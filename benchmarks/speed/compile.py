"Forward and backward under torch.compile: frozen, PEFT's LoRA and DoRA, our LoRA and DoRA, each compiled and not."

import itertools

import torch

from benchmarks.common import (
    DTYPES,
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


def models(shape, layers, dtype, rank, dropout):
    "What is compared, in training mode."
    new = lambda: blocks(shape, layers, dtype)
    return {
        "frozen": new(),
        "PEFT LoRA": peft(new(), "lora", rank, dropout),
        "PEFT DoRA": peft(new(), "dora", rank, dropout),
        "our LoRA": ours(new(), "lora", rank, dropout=dropout),
        "our DoRA": ours(new(), "dora", rank, dropout=dropout),
    }


def breaks():
    "How many graph breaks there were since the last reset."
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def main():
    options = arguments(
        __doc__,
        rounds=9,
        layers=2,
        ranks="16",
        dtypes="float32",
        dropouts="0.0,0.05",
        tokens=1024,
        length=128,
        shape="",
        backend="inductor",
    )
    shape, rows = shape_of(options.shape), []
    settings = options.dtypes.split(","), map(int, options.ranks.split(",")), map(float, options.dropouts.split(","))
    for dtype, rank, dropout in itertools.product(*settings):
        _, step = training_pass(shape, options.tokens, options.length, DTYPES[dtype])
        plain, compiled, facts = {}, {}, {}
        for name, model in models(shape, options.layers, DTYPES[dtype], rank, dropout).items():
            torch._dynamo.utils.counters.clear()
            plain[name] = lambda m=model, step=step: step(m)
            fast = torch.compile(model, backend=options.backend)
            compiled[f"{name}, compiled"] = lambda m=fast, step=step: step(m)
            compiled[f"{name}, compiled"]()
            facts[name] = {"one graph": "no" if breaks() else "yes"}
        times = interleave(plain | compiled, options.rounds)
        for name in plain:
            told = lambda which, base: "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, which, base))
            rows.append(
                {"dtype": dtype, "rank": rank, "dropout": dropout, "model": name}
                | {
                    "not compiled / frozen": told(name, "frozen"),
                    "compiled / frozen": told(f"{name}, compiled", "frozen"),
                    "compiled / frozen, compiled": told(f"{name}, compiled", "frozen, compiled"),
                    "compiled / not compiled": told(f"{name}, compiled", name),
                }
                | facts[name]
            )
            print(rows[-1], flush=True)
    finish("compile.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
