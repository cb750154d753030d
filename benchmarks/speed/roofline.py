"Which share of the machine's rate of products the useful arithmetic of a step, and of scoring, reaches."

import statistics

import torch

from benchmarks.common import (
    DEVICE,
    DTYPES,
    TARGETS,
    arguments,
    blocks,
    finish,
    interleave,
    ours,
    peft,
    quartiles,
    shape_of,
    training_pass,
)

SIDE = 2048  # of the square product that stands for the machine's rate


def arithmetic(shape, layers, rank, tokens, length, train):
    "The multiply-adds of a pass times two: frozen products, causal attention, and an adapter's products."
    width, wide = shape["hidden_size"], shape["intermediate_size"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sizes = dict(q_proj=(width, width), k_proj=(narrow, width), v_proj=(narrow, width), o_proj=(width, width))
    sizes |= dict(gate_proj=(wide, width), up_proj=(wide, width), down_proj=(width, wide))
    frozen = sum(o * i for o, i in sizes.values()) * (2 if train else 1)  # again for the gradient of the input
    attention = length * width * (3 if train else 1)  # two products of half a square; four for their gradients
    low = rank * sum(sum(sizes[name]) for name in TARGETS) * (3 if train else 1)
    return 2 * layers * tokens * (frozen + attention + low)


def main():
    options = arguments(
        __doc__, rounds=9, layers=4, rank=16, dtypes="float32,bfloat16", tokens=1024, length=128, shape=""
    )
    shape, rows = shape_of(options.shape), []
    for dtype in options.dtypes.split(","):
        new = lambda: blocks(shape, options.layers, DTYPES[dtype])
        models = {"frozen": new()}
        for method in ("lora", "dora"):
            name = {"lora": "LoRA", "dora": "DoRA"}[method]
            models[f"PEFT {name}"] = peft(new(), method, options.rank)
            models[f"our {name}"] = ours(new(), method, options.rank)
        x, step = training_pass(shape, options.tokens, options.length, DTYPES[dtype])
        a = torch.randn(SIDE, SIDE, device=DEVICE).to(DTYPES[dtype])

        @torch.inference_mode()
        def score(model):
            model(inputs_embeds=x, use_cache=False)

        work = {"a product": lambda: a @ a}
        work |= {(name, "step"): lambda m=m: step(m) for name, m in models.items()}
        work |= {(name, "scoring"): lambda m=m: score(m) for name, m in models.items()}
        times = interleave(work, options.rounds, warm_up=2)
        for name, kind in list(work)[1:]:
            rank = 0 if name == "frozen" else options.rank
            needed = arithmetic(shape, options.layers, rank, x.shape[0] * x.shape[1], x.shape[1], kind == "step")
            pairs = zip(times[name, kind], times["a product"])
            shares = [needed / t / (2 * SIDE**3 / product) for t, product in pairs]
            rate = 2 * SIDE**3 / statistics.median(times["a product"])
            rows.append(
                {"dtype": dtype, "work": kind, "model": name}
                | {"share of the machine's rate": "{:.2f} [{:.2f}, {:.2f}]".format(*quartiles(shares))}
                | {"the machine's rate, GFLOP/s": f"{rate / 1e9:.0f}"}
            )
            print(rows[-1], flush=True)
    finish("roofline.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
