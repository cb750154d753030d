"Where the time of a step goes: operators of the frozen model, of our LoRA and DoRA, and of PEFT's."

import statistics
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import DTYPES, SMALL, arguments, blocks, finish, ours, peft

KINDS = {
    "products with W₀": lambda op, narrow: op in ("mm", "addmm_", "addmm") and not narrow,
    "products with A and B": lambda op, narrow: op in ("mm", "addmm_", "addmm") and narrow,
    "attention": lambda op, narrow: "attention" in op,
    "passes over memory": lambda op, narrow: (
        op
        in (
            "mul",
            "mul_",
            "add",
            "add_",
            "addcmul",
            "sub",
            "sum",
            "copy_",
            "cat",
            "div",
            "pow",
            "silu",
            "silu_backward",
        )
    ),
    "the rest": lambda op, narrow: True,
}

NAMES = (("lora", "LoRA"), ("dora", "DoRA"))


def kinds(model, x, dy, rank):
    "Milliseconds of a step by kind of operator."

    def step():
        inputs = x.clone().requires_grad_()
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(dy)
        model.zero_grad()

    for _ in range(2):  # memory that is given out for the first time is slow
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p:
        step()
    total = defaultdict(float)
    for e in p.key_averages(group_by_input_shape=True):
        op = e.key.removeprefix("aten::")
        sides = [side for shape in e.input_shapes if len(shape) == 2 for side in shape]
        # the factored norm and the dense build have a side of the rank too, and count as products with A and B
        narrow = bool(sides) and min(sides) <= 3 * rank
        total[next(k for k, belongs in KINDS.items() if belongs(op, narrow))] += e.self_cpu_time_total / 1e3
    return total


def main():
    options = arguments(__doc__, rounds=5, layers=4, rank=16, dtypes="float32,bfloat16", tokens=2048)
    rows = []
    for dtype in options.dtypes.split(","):
        new = lambda: blocks(SMALL, options.layers, DTYPES[dtype])
        models = {"frozen": new()}
        models |= {f"PEFT {n}": peft(new(), m, options.rank) for m, n in NAMES}
        models |= {f"our {n}": ours(new(), m, options.rank) for m, n in NAMES}
        x = torch.randn(options.tokens // 128, 128, SMALL["hidden_size"], dtype=DTYPES[dtype])
        dy = torch.randn_like(x)
        rounds = [{n: kinds(m, x, dy, options.rank) for n, m in models.items()} for _ in range(options.rounds)]
        each = {n: {k: statistics.median(r[n][k] for r in rounds) for k in KINDS} for n in models}
        whole = sum(each["frozen"].values())
        for name, by_kind in each.items():
            row = {"dtype": dtype, "model": name} | {k: f"{by_kind[k] / whole:.3f}" for k in KINDS}
            rows.append(row | {"all": f"{sum(by_kind.values()) / whole:.3f}"})
            print(rows[-1], flush=True)
    finish("where.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
