"Two hundred tiny runs on two workers: what the launcher costs and leaves behind, against bare papermill calls."

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import arguments, finish, resident
from dora_nb.data.assets import load_model
from dora_nb.files import write_json
from dora_nb.runs.folder import load
from dora_nb.runs.grid import load_grid
from dora_nb.runs.identity import run_name
from dora_nb.runs.jobs import notebook
from dora_nb.runs.launcher import run_grid
from dora_nb.runs.progress import ProgressBoard

GRID = """
name = "soak"
fixed = {{ model = "{model}", task = "winogrande", method = "lora", rank = 2, train_items = 8, batch_size = 4, eval_items = 4 }}
axes = {{ seed = {seeds} }}
"""


def tiny_model(folder):
    "A model that runs in no time, with the real tokenizer."
    tokenizer = load_model("smollm2-135m-instruct")[1]
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def grid_file(folder, model, seeds):
    (folder / "grid.toml").write_text(GRID.format(model=model, seeds=list(seeds)))
    return folder / "grid.toml"


def bare(file, folder, workers):
    "papermill's own command for each run, so many at a time; seconds in all."
    env = os.environ | ({"OMP_NUM_THREADS": str(max(1, os.cpu_count() // workers))} if workers > 1 else {})

    def call(config):
        out = folder / run_name(config)
        out.mkdir(parents=True)
        write_json(out / "params.json", asdict(config) | {"run_dir": str(out)})
        command = [
            sys.executable,
            "-m",
            "papermill",
            notebook("finetune"),
            out / "out.ipynb",
            "-f",
            out / "params.json",
        ]
        subprocess.run([*map(str, command), "--no-progress-bar"], check=True, capture_output=True, env=env)

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(call, load_grid(file).configs))
    return time.perf_counter() - began


class Watch(ProgressBoard):
    "A board that notes, at every look, what the launcher holds."

    seen = []

    def show(self):
        me = psutil.Process()
        done = sum(j.state == "done" for j in self.jobs)
        Watch.seen.append((done, resident("VmRSS"), me.num_fds(), len(me.children(recursive=True))))


def main():
    options = arguments(__doc__, runs=200, bare=10, workers=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model")
        few = grid_file(folder, model, range(1000, 1000 + options.bare))
        each = [bare(few, folder / "before", options.workers) / options.bare]
        import dora_nb.runs.launcher

        dora_nb.runs.launcher.ProgressBoard = Watch
        began = time.perf_counter()
        made = run_grid(grid_file(folder, model, range(options.runs)), folder, workers=options.workers)
        ours = (time.perf_counter() - began) / options.runs
        few = grid_file(folder, model, range(1000, 1000 + options.bare))
        each.append(bare(few, folder / "after", options.workers) / options.bare)
        results, problems = load(made)
        assert len(results) == options.runs and not problems
        own = statistics.mean(r["seconds"] for r in results) / options.workers
    at = lambda share: next(s for s in Watch.seen if s[0] >= share * options.runs)
    row = {
        "runs": options.runs,
        "at a time": options.workers,
        "a run, s": f"{ours:.2f}",
        "bare papermill, before and after, s": ", ".join(f"{b:.2f}" for b in each),
        "ours / bare": f"{ours / statistics.mean(each):.2f}",
        "of that inside `run`, s": f"{own:.2f}",
    }
    for share in (0.1, 0.5, 1.0):
        row[f"launcher at {share:.0%}: MiB, open files"] = f"{at(share)[1] / 2**20:.0f}, {at(share)[2]}"
    row["processes left"] = len(psutil.Process().children(recursive=True))
    finish("soak.py", [row], list(row), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
