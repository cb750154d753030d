"What the benchmarks share: models to compare, rounds that interleave them, ratios, and the machine they ran on."

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaModel

from dora_nb.files import write_whole
from dora_nb.runs.source import source_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SMALL = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)  # SmolLM2-135M's
LARGE = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)  # LLaMA-7B's
PACKAGES = ("torch", "transformers", "peft", "accelerate", "lm_eval")  # whose versions matter
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)


def blocks(shape, layers, dtype):
    "A Llama without its head, frozen, random, always the same."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, num_hidden_layers=layers, attn_implementation="sdpa", **shape)
    with DEVICE:  # drawn there: on a CPU it takes longer than all that is measured
        model = LlamaModel(config)
    return model.to(dtype).requires_grad_(False).train()


def shape_of(name=""):
    "A model's shape by name: small (SmolLM2-135M's), large (LLaMA-7B's), or what suits the device."
    return {"small": SMALL, "large": LARGE, "": LARGE if DEVICE.type == "cuda" else SMALL}[name]


def ours(model, method, rank, **options):
    "Our adapter on `model`, away from its start."
    from dora_nb.models.adapt import adapt
    from dora_nb.models.methods import AdapterConfig

    return shaken(adapt(model, AdapterConfig(method, rank=rank, alpha=2 * rank, target_modules=TARGETS, **options)))


def peft(model, method, rank, dropout=0.0):
    "PEFT's adapter on `model`, away from its start."
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=TARGETS, use_dora=method == "dora"
    )
    return shaken(get_peft_model(model, config))


def shaken(model):
    "Give every B a value: products with zeros might be cheaper."
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    return model.train()


def training_pass(shape, tokens, length, dtype):
    "Random inputs, (rows, length, width), and a call that takes a model forward and backward through them."
    x = torch.randn(max(1, tokens // length), length, shape["hidden_size"], device=DEVICE).to(dtype)
    dy = torch.randn_like(x)

    def step(model):
        inputs = x.clone().requires_grad_()  # so that the frozen model has a backward pass, to its inputs
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(dy)
        model.zero_grad()

    return x, step


def seconds(f):
    "How long a call takes."
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(line):
    "Bytes of this process in memory: now (VmRSS) or at most (VmHWM), as Linux counts them."
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def peak_bytes(f):
    "Bytes at the peak of a call, beyond what was there before: of the GPU's allocator, or of this process."
    if DEVICE.type == "cuda":
        before, used = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
        torch.cuda.reset_peak_memory_stats()
    else:
        before, used = resident("VmRSS"), lambda: resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    f()
    return max(1, used() - before)


def alone(f, *args):
    "What a call returns in a process of its own: one that did other work has memory to use again, which no peak shows."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["peft", "transformers", "dora_nb.models.adapt"]
    )  # imported once and not for every call
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(f, *args).result()


def interleave(candidates, rounds, warm_up=1):
    "Times of every candidate, a list each; one call of each per round, so that all see the same weather."
    for _ in range(warm_up):
        for f in candidates.values():
            f()
    times = {name: [] for name in candidates}
    for i in range(rounds):
        order = list(candidates)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(seconds(candidates[name]))
    return times


def ratio(times, name, base):
    "Median over the rounds of one candidate's time over another's, and the quartiles of these."
    return quartiles([a / b for a, b in zip(times[name], times[base])])


def quartiles(values):
    "The median of some values, and their quartiles."
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), low, high


def machine():
    "Where this ran, in words and numbers, and which revision of the package."
    if DEVICE.type == "cuda":
        name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
        count = torch.get_num_threads()
    packages = [p for p in PACKAGES if find_spec(p)]
    where = dict(device=name, count=count, unit="GPU" if DEVICE.type == "cuda" else "threads")
    return where | dict(revision=source_state()[0]) | {p: version(p) for p in packages}


def table(rows, columns):
    "Rows as a markdown table."
    cells = [[str(r.get(c, "")) for c in columns] for r in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arguments(doc, **defaults):
    "Options of a benchmark: --rounds and the like, and --out, a JSON file for the report."
    parser = argparse.ArgumentParser(description=doc)
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, help="also write the rows here, for the report")
    return parser.parse_args()


def write_text(path, text):
    "Write a file under a temporary name and rename it: a reader sees the old text or the new one."
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def finish(name, rows, columns, out, **more):
    "Print the table and, if asked, write it down."
    where = machine()
    print(f"\n{name}, {where['count']} {where['unit']} of {where['device']}, torch {where['torch']}\n")
    print(table(rows, columns))
    if out:
        write_text(out, json.dumps(dict(name=name, machine=where, columns=columns, rows=rows) | more, indent=1))
