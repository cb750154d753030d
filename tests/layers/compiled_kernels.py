"Compile every kernel for GPUs, which needs none, and print what each became, as JSON. In a process without the interpreter."

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dora_nb.layers.kernels import (
    GRADIENT_TILES,
    NORM_TILES,
    OUTPUT_TILES,
    WIDEST_RANK,
    _gradient_kernel,
    _norm_kernel,
    _output_kernel,
)

NUMBERS = {"tokens", "outs", "ins", "rank", "part", "x_row", "W_row", "h_row", "dz_row"}  # multiples of 16 here
FLOATS = {"g", "sums", "products", "factors", "norms"}  # float32 whatever the model's dtype


TOOL = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def resources(code):
    "The registers and the bytes of stack of a thread, from the finished program: PTX does not know them yet."
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        said = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", said.stdout)}


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
        **resources(made.asm["cubin"]),
    )


def main():
    found, o, g = [], OUTPUT_TILES, GRADIENT_TILES
    kinds = (("bf16", tl.bfloat16, "ieee"), ("fp16", tl.float16, "ieee"), ("fp32", tl.float32, "ieee"))
    for dtype, element, precision in (*kinds, ("fp32", tl.float32, "tf32")):
        wide = dtype == "fp32"
        for capability in (80, 90):
            shared = dict(PRECISION=precision, WIDE=False)
            sizes = dict(ROWS=o.rows, COLUMNS=o.columns, DEPTH=o.depth // (2 if wide else 1), GROUP=8, **shared)
            for scaled in (True, False):
                found.append(compiled(_output_kernel, dtype, capability, o.warps, o.stages, SCALED=scaled, **sizes))
            for rank in {16, WIDEST_RANK[4 if wide else 2]}:
                sizes = dict(ROWS=g.rows, COLUMNS=g.columns, RANK=rank, **shared)
                found.append(compiled(_gradient_kernel, dtype, capability, g.warps, g.stages, **sizes))
            if precision == "ieee":
                sizes = dict(ENTRIES=9, DTYPE=element, PRECISION="tf32x3", **NORM_TILES)
                found.append(compiled(_norm_kernel, dtype, capability, 4, 3, **sizes))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
