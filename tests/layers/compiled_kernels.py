"Compile every kernel for GPUs, which needs none, and print what each became, as JSON. In a process without the interpreter."

import json
import re

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dora_nb.layers.kernels import GRADIENT_TILES, OUTPUT_TILES, _gradient_kernel, _norm_kernel, _output_kernel

NUMBERS = {"tokens", "outs", "ins", "rank", "part", "x_row", "W_row", "h_row", "dz_row"}  # multiples of 16 here
FLOATS = {"g", "sums", "products", "factors", "norms"}  # float32 whatever the model's dtype


def compiled(kernel, dtype, capability, warps, stages, **constants):
    "What the compiler makes of a kernel whose inner strides are 1."
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("_column")}
    kind = lambda n: "i32" if n in NUMBERS else "*fp32" if n in FLOATS else "*i64" if n == "table" else f"*{dtype}"
    signature = {n: "constexpr" if n in constants else kind(n) for n in kernel.arg_names}
    places = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    aligned = {places[n]: [["tt.divisibility", 16]] for n in kernel.arg_names if n not in constants}
    source = ASTSource(kernel, signature, {places[n]: v for n, v in constants.items()}, aligned)
    made = compile(source, GPUTarget("cuda", capability, 32), dict(num_warps=warps, num_stages=stages))
    code = made.asm["ptx"]
    return dict(
        kernel=kernel.__name__,
        dtype=dtype,
        capability=capability,
        shared=made.metadata.shared,
        products=next((word for word in ("wgmma", "mma.sync") if word in code), None),
        ahead="cp.async.cg" in code,  # whole rows of tiles are read ahead
        spills=len(re.findall(r"(?:st|ld)\.local", code)),
    )


def main():
    found, shared = [], dict(PRECISION="ieee", WIDE=False)
    for dtype, element in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        for capability in (80, 90):
            o, g = OUTPUT_TILES, GRADIENT_TILES
            sizes = dict(ROWS=o.rows, COLUMNS=o.columns, DEPTH=o.depth, GROUP=8)
            found.append(compiled(_output_kernel, dtype, capability, o.warps, o.stages, SCALED=True, **sizes, **shared))
            for rank in (16, 64):
                sizes = dict(ROWS=g.rows, COLUMNS=g.columns, RANK=rank)
                found.append(compiled(_gradient_kernel, dtype, capability, g.warps, g.stages, **sizes, **shared))
            sizes = dict(ENTRIES=10, DTYPE=element, ROWS=32, DEPTH=128, RANK=16)
            found.append(compiled(_norm_kernel, dtype, capability, 4, 3, PRECISION="tf32x3", **sizes))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
