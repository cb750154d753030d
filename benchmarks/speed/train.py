"Trainings on real items: our loop with our DoRA, transformers' Trainer at its defaults with PEFT's DoRA."

import copy
import gc
import itertools
import statistics
import tempfile

import torch
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from benchmarks.common import DEVICE, TARGETS, arguments, finish, ratio, seconds
from dora_nb.data.assets import load_model
from dora_nb.data.rows import encode_pair
from dora_nb.data.tasks import load_task
from dora_nb.models.adapt import adapt
from dora_nb.models.methods import AdapterConfig
from dora_nb.training.config import TrainConfig
from dora_nb.training.train import train

RANK, RATE = 16, 1e-3


class ChoicesTrainer(Trainer):
    "What a user would write for cross-entropy over choices: every choice a padded row, logits for every token."

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        gold, labels = inputs.pop("gold"), F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]  # shifted to the left
        logits = model(**inputs).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        return F.cross_entropy(-losses.sum(1).view(len(gold), -1), gold)


def encode(tokenizer, item, objective):
    "The rows of an item for the Trainer: the right choice, or all of them."
    rows = []
    for k in [item["gold"]] if objective == "answer" else range(len(item["continuations"])):
        context, continuation = encode_pair(tokenizer, item["contexts"][k], item["continuations"][k])
        rows.append(dict(input_ids=context + continuation, labels=[-100] * len(context) + continuation))
    return dict(rows=rows, gold=item["gold"])


def their_training(base, tokenizer, items, objective, precision, batch, folder):
    "The Trainer with a fresh adapter of PEFT's, as a call that trains and returns the mean loss of its steps."
    from peft import LoraConfig, get_peft_model

    def collate(features):
        inputs = DataCollatorForSeq2Seq(tokenizer)([row for f in features for row in f["rows"]])
        return inputs if objective == "answer" else inputs | {"gold": torch.tensor([f["gold"] for f in features])}

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=TARGETS,
        use_dora=True,
    )
    options = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        bf16=precision == "bfloat16",
        use_cpu=DEVICE.type == "cpu",
        dataloader_pin_memory=DEVICE.type == "cuda",
        remove_unused_columns=False,  # the collator needs them
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = (Trainer if objective == "answer" else ChoicesTrainer)(
        model=get_peft_model(copy.deepcopy(base), config), args=options, data_collator=collate
    )
    trainer.remove_callback(PrinterCallback)

    def call():
        trainer.train_dataset = [encode(tokenizer, item, objective) for item in items]
        return trainer.train().training_loss

    return call


def our_training(base, tokenizer, items, objective, precision, batch):
    "Our loop with a fresh adapter of ours, as a call that trains and returns the mean loss of its steps."
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the Trainer leaves its mixed precision behind
    model = adapt(copy.deepcopy(base), AdapterConfig("dora", rank=RANK, alpha=2 * RANK, target_modules=TARGETS))
    config = TrainConfig(objective, learning_rate=RATE, batch_size=batch, precision=precision)
    return lambda: statistics.mean(r["loss"] for r in train(model, tokenizer, items, config, progress=False))


def compare(base, tokenizer, task, objective, precision, rounds, steps, batch, folder):
    "Times of both, a list each; other items in every round, the same for both."
    setups = {
        "ours": lambda items: our_training(base, tokenizer, items, objective, precision, batch),
        "theirs": lambda items: their_training(base, tokenizer, items, objective, precision, batch, folder),
    }
    times = {name: [] for name in setups}
    items = load_task(task, "train", limit=batch, seed=rounds)  # a first step, which also warms up
    losses = {name: setup(items)() for name, setup in setups.items()}
    if precision == "float32":
        off = abs(losses["theirs"] / losses["ours"] - 1)
        assert off < 1e-2, f"{task}, {objective}: the first step's losses differ, so the objectives do: {losses}"
    for i in range(rounds):
        items = load_task(task, "train", limit=steps * batch, seed=i)
        for name in list(setups)[:: 1 if i % 2 else -1]:
            call = setups[name](items)
            gc.collect()  # the models of before
            times[name].append(seconds(call))
            del call
    return times, losses


def main():
    options = arguments(
        __doc__,
        rounds=3,
        steps=2,
        batch=8,
        dtypes="float32",
        tasks="boolq,hellaswag,winogrande",
        objectives="answer,choices",
    )
    base, tokenizer = load_model("smollm2-135m-instruct", device=DEVICE)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for objective, dtype, task in itertools.product(
            options.objectives.split(","), options.dtypes.split(","), options.tasks.split(",")
        ):
            times, losses = compare(
                base, tokenizer, task, objective, dtype, options.rounds, options.steps, options.batch, folder
            )
            row = {"task": task, "objective": objective, "dtype": dtype}
            row["Trainer+PEFT DoRA / ours"] = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, "theirs", "ours"))
            rows.append(row)
            speeds = {k: round(options.steps * options.batch / statistics.median(v), 2) for k, v in times.items()}
            print(row, "items/s:", speeds, "first losses:", losses, flush=True)
    finish("train.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None})


if __name__ == "__main__":
    main()
