"""Adapt models that bitsandbytes and torchao quantised, in a process of its own, and print what was found as JSON.

These libraries lie aside (see the Makefile), as transformers and PEFT import them wherever they find them.
"""

import copy
import json
import sys
import tempfile
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
sys.path.insert(0, __file__.rpartition("/")[0])

from architectures import build, output, shake  # noqa: E402

from dora_nb.layers.base import frozen_weight  # noqa: E402
from dora_nb.models.adapt import adapt, adapter_layers, trainable_parameters  # noqa: E402
from dora_nb.models.adapter_files import load_adapter, save_adapter  # noqa: E402
from dora_nb.models.compress import compress  # noqa: E402
from dora_nb.models.merge import merge, remove_adapter, unmerge  # noqa: E402
from dora_nb.models.methods import AdapterConfig  # noqa: E402
from dora_nb.training.checkpoints import _sum_of_bits  # noqa: E402


def replace_layers(model, make):
    "Replace every linear layer of the blocks by what `make` returns for it."
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "layers." in name:
            model.set_submodule(name, make(layer))
    return model


def bitsandbytes_8(model):
    import bitsandbytes as bnb

    def make(layer):
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    return replace_layers(model, make)


def bitsandbytes_4(model):
    import bitsandbytes as bnb

    def make(layer):
        options = dict(compute_dtype=torch.float32, quant_type="nf4")
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    return replace_layers(model, make)


def torchao_weight_only(kind, **options):
    def quantise(model):
        import torchao.quantization as ao

        blocks = lambda m, name: isinstance(m, nn.Linear) and "layers." in name
        ao.quantize_(model, getattr(ao, kind)(**options), filter_fn=blocks)
        return model

    return quantise


BASES = {
    "bitsandbytes, 8 bits": bitsandbytes_8,
    "bitsandbytes, 4 bits": bitsandbytes_4,
    "torchao, 8 bits": torchao_weight_only("Int8WeightOnlyConfig"),
    "torchao, 4 bits": torchao_weight_only("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao, 8 bits, inputs too": torchao_weight_only("Int8DynamicActivationInt8WeightConfig"),
    "dora_nb, 4 bits": lambda model: compress(model, "rtn-4", group=16),
}


def dense_twin(model):
    "Return a copy of a quantised model whose layers hold the same weights as ordinary numbers."
    twin, _ = build("wide_llama")
    for name, layer in twin.named_modules():
        if type(layer) is nn.Linear and "layers." in name:
            layer.weight.data = frozen_weight(model.get_submodule(name)).detach().clone().float()
    return twin


def gradients(model, inputs):
    "Return the gradients of a step after an evaluation."
    with torch.no_grad():
        model.eval()(**inputs)
    model.train()(**inputs).loss.backward()
    return {n: p.grad for n, p in trainable_parameters(model).items()}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def examine(base, method):
    "Return how far a quantised model with an adapter is from its dense twin, and what holds exactly."
    full, inputs = build("wide_llama")
    quantised = lambda: BASES[base](build("wide_llama")[0]).train()  # in eval mode, bitsandbytes rounds once more
    model, result = quantised(), {}
    before, twin = output(model, inputs).detach(), dense_twin(model)
    result["quantised"] = relative(before, output(full, inputs))
    config = AdapterConfig(method, rank=4, alpha=8, target_modules="all-linear")
    for each in (model, twin):
        torch.manual_seed(0)
        adapt(each, config)
    result["start"] = relative(output(model, inputs), before)
    shake(model), shake(twin)
    after, want = output(model, inputs).detach(), output(twin, inputs).detach()
    result["output"] = relative(after, want)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        result["loaded"] = relative(output(load_adapter(quantised(), folder), inputs), after)
    twice = copy.deepcopy(model)
    sums = [[_sum_of_bits(p) for p in each.parameters()] for each in (model, twice)]
    result["copied"] = torch.equal(output(twice, inputs), after) and sums[0] == sums[1]  # by which checkpoints know it
    result["merged"] = relative(output(merge(model), inputs), want)
    result["plain"] = all(type(model.get_submodule(n)) is nn.Linear for n in adapter_layers(twin))
    result["unmerged"] = torch.equal(output(unmerge(model), inputs), after)
    own, theirs = gradients(model, inputs), gradients(twin, inputs)
    result["gradient"] = max(relative(own[n], theirs[n]) for n in theirs)
    removed = remove_adapter(copy.deepcopy(model))
    result["removed"] = relative(output(removed, inputs), before)
    return result


def loaded_quantised(folder):
    "Return what loads a model in each form of transformers."
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    forms = {"4 bits": four, "8 bits": BitsAndBytesConfig(load_in_8bit=True)}
    forms["torchao"] = TorchAoConfig(Int8WeightOnlyConfig())
    load = lambda form=None: AutoModelForCausalLM.from_pretrained(folder, quantization_config=form).train()
    return load, forms


def trained(model, folder, **options):
    "Train a model for two steps with Trainer, with an evaluation after each; return the losses."
    from transformers import Trainer, TrainingArguments

    row = dict(input_ids=torch.arange(3, 23), labels=torch.arange(3, 23))
    arguments = TrainingArguments(folder, max_steps=2, eval_strategy="steps", eval_steps=1, report_to=[], **options)
    trainer = Trainer(model, arguments, train_dataset=[row] * 4, eval_dataset=[row])
    trainer.train()
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def through_transformers(name):
    "Load a quantised model as users do, train it, merge its adapter, and load the checkpoints."
    plain, inputs = build("wide_llama")
    with (
        tempfile.TemporaryDirectory() as base,
        tempfile.TemporaryDirectory() as merged,
        tempfile.TemporaryDirectory() as adapted,
    ):
        plain.save_pretrained(base)
        load, forms = loaded_quantised(base)
        model = shake(adapt(load(forms[name]), AdapterConfig(rank=4)))
        losses = trained(model, adapted, save_steps=2, learning_rate=1e-2)
        model.train()
        after = output(model, inputs)
        resumed = relative(output(load_adapter(load(forms[name]), f"{adapted}/checkpoint-2"), inputs), after)
        merge(model).save_pretrained(merged)
        checkpoint = loaded_quantised(merged)[0]()
        again = relative(output(checkpoint, inputs), after)
        clean = getattr(checkpoint.config, "quantization_config", None) is None
        restored = torch.equal(output(unmerge(model), inputs), after) and model.is_quantized
    return dict(losses=losses, resumed=resumed, checkpoint=again, clean=clean, restored=restored)


def packed():
    "Return the error of adapting a 4-bit model after its evaluation, or None on processors where nothing is packed."
    model, inputs = build("wide_llama")
    bitsandbytes_4(model).eval().requires_grad_(False)
    with torch.no_grad():
        output(model, inputs)
    try:
        adapt(model, AdapterConfig(rank=4))
    except ValueError as e:
        return str(e)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {f"transformers, {name}": through_transformers(name) for name in ("4 bits", "8 bits", "torchao")}
    for base in BASES:
        for method in ("lora", "dora"):
            try:
                found[f"{base}: {method}"] = examine(base, method)
            except Exception as e:
                found[f"{base}: {method}"] = dict(error=f"{type(e).__name__}: {e}")
    found["packed"] = packed()
    print(json.dumps(found))
