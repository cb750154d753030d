"How the cost of one adapted layer grows with tokens, rank and width: forward and backward over the frozen layer's."

import functools

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.common import DEVICE, DTYPES, arguments, finish, interleave, ratio, shaken
from dora_nb.layers.linear import DoRALinear

# one thing varies at a time; (tokens, rank, width)
SERIES = {
    "tokens": [(t, 16, 1024) for t in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "rank": [(2048, r, 1024) for r in (4, 8, 16, 32, 64, 128, 256, 512)],
    "width": [(1024, 16, w) for w in (576, 1024, 2048, 4096)],
}


class Holder(nn.Module):
    "A model of one layer, for PEFT."

    def __init__(self, width, dtype):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, device=DEVICE, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def candidates(width, rank, dtype):
    "A frozen layer, and adapted ones."
    new = lambda: Holder(width, dtype).requires_grad_(False)
    theirs = lambda dora: get_peft_model(
        new(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], use_dora=dora)
    )
    mine = lambda plan: DoRALinear(new().layer, rank, 2 * rank, plan=plan)
    return {
        "frozen": new(),
        "PEFT LoRA": shaken(theirs(False)),
        "PEFT DoRA": shaken(theirs(True)),
        "our DoRA, factored": shaken(mine("factored")),
        "our DoRA, dense": shaken(mine("dense")),
        "our DoRA": shaken(mine("auto")),
    }


def step(model, x, dy):
    "Forward and backward, gradients to the input included."
    inputs = x.detach().requires_grad_()
    model(inputs).backward(dy)
    model.zero_grad()


def main():
    options = arguments(__doc__, rounds=5, dtypes="float32,bfloat16")
    rows = []
    for dtype in options.dtypes.split(","):
        for varies, points in SERIES.items():
            for tokens, rank, width in points:
                models = candidates(width, rank, DTYPES[dtype])
                x = torch.randn(tokens, width, device=DEVICE, dtype=DTYPES[dtype])
                dy = torch.randn_like(x)
                steps = {name: functools.partial(step, model, x, dy) for name, model in models.items()}
                times = interleave(steps, options.rounds, warm_up=2)
                row = {"dtype": dtype, "varies": varies, "tokens": tokens, "rank": rank, "width": width}
                row |= {f"{n} / frozen": f"{ratio(times, n, 'frozen')[0]:.2f}" for n in list(models)[1:]}
                rows.append(row)
                print(row, flush=True)
    finish("growth.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
