"One of the processes that `test_team.py` starts with torchrun: trains in every way, and leaves adapters and records."

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.models.adapt import adapt, trainable_parameters, whole
from dora_nb.models.adapter_files import save_adapter
from dora_nb.models.methods import AdapterConfig
from dora_nb.training.checkpoints import Stopped
from dora_nb.training.config import TrainConfig
from dora_nb.training.distributed import Distributed, shard
from dora_nb.training.evaluate import rank_choices
from dora_nb.training.train import train

WAYS = {
    "dora": dict(),
    "lora": dict(method="lora"),
    "full": dict(method="full"),
    "exact": dict(detach_norm=False, watches=True),
    "answer": dict(train=dict(objective="answer", gradient_checkpointing=True)),
    "dropout": dict(dropout=0.1, stops=True),
}


def fitted(model_dir, out, way, team, sharded=False, **keep):
    "Train, save and ask a model; what came of it."
    options = dict(WAYS[way])
    config = TrainConfig(
        **dict(learning_rate=1e-3, batch_size=8, precision="float32", batch_tokens=64) | options.pop("train", {})
    )
    options.pop("stops", None)
    model, tokenizer = load_model(str(model_dir))
    asked = load_task("boolq", limit=7)
    if options.pop("watches", False) and not sharded:  # in the first process alone
        watch = lambda record: {"right": rank_choices(model, tokenizer, asked, progress=False)[0]["acc"]}
        keep["after_step"] = lambda record: watch(record) if record["step"] == 2 else None
    torch.manual_seed(team.rank)  # not everywhere the same: the first process is the one that is followed
    adapt(model, AdapterConfig(**dict(method="dora", rank=4, alpha=8) | options))
    if sharded:
        shard(model, team)
    records = train(
        model, tokenizer, load_task("arc_easy", "train", limit=33), config, progress=False, team=team, **keep
    )
    save_adapter(model, out, write=team.rank == 0)
    metrics, answers = rank_choices(model, tokenizer, asked, progress=False, team=team)
    params = {n: whole(p.detach()).clone() for n, p in trainable_parameters(model).items()}
    said = {"records": [{k: v for k, v in r.items() if k != "seconds"} for r in records], "answers": answers}
    return params, said


def stopped_and_continued(model_dir, out, way, team, sharded):
    "The last process gets a signal in its second step; all stop together, and go on to the same bits."
    plain, asked = torch.optim.AdamW.step, []

    def step(self, *args):
        asked.append(1)
        if len(asked) == 2 and team.rank == team.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    torch.optim.AdamW.step = step
    try:
        fitted(model_dir, out, way, team, sharded, checkpoints=out / "checkpoints")
        raise AssertionError("nobody stopped")
    except Stopped:
        pass
    finally:
        torch.optim.AdamW.step = plain
    assert len(asked) == 2 and [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    return fitted(model_dir, out, way, team, sharded, checkpoints=out / "checkpoints")


def main(model_dir, out):
    team = Distributed()
    assert team.size == 2
    for sharded in (False, True):
        for way in WAYS:
            folder = out / f"{way}-{'sharded' if sharded else 'copied'}"
            params, said = fitted(model_dir, folder, way, team, sharded, checkpoints=folder / "checkpoints")
            if WAYS[way].get("stops"):
                again, told = stopped_and_continued(model_dir, folder / "again", way, team, sharded)
                assert told == said and all(torch.equal(again[n], params[n]) for n in params)
            if team.rank == 0:
                (folder / "said.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
