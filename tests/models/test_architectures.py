"An adapter with default targets on every architecture: adapt, train, merge, remove, save, load, and load in PEFT."

import copy

import peft
import pytest
import torch
from architectures import ARCHITECTURES, build, output, shake
from torch import nn
from transformers import AutoModelForCausalLM

from dora_nb.files import read_json
from dora_nb.models.adapt import adapt, adapter_layers, adapter_state, trainable_parameters
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.merge import merge, remove_adapter, unmerge
from dora_nb.models.methods import PAPER_TARGETS, AdapterConfig
from dora_nb.models.peft_format import CONFIG

DEFAULTS = {
    "llama qwen2 qwen3 gemma3 mistral": PAPER_TARGETS,
    "phi3 clip distilbert vit": "all-linear",
    "mamba": ("in_proj", "x_proj"),
    "gpt_neox falcon bloom": ("query_key_value",),
    "opt mixtral bart whisper gptj": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "mpt": ("Wqkv",),
    "t5": ("q", "v"),
    "bert roberta": ("query", "value"),
    "deberta": ("query_proj", "value_proj"),
}
NAMES = [(name, method) for name in ARCHITECTURES for method in ("lora", "dora")]


def adapted(name, method="dora", **options):
    model, inputs = build(name)
    return shake(adapt(model, AdapterConfig(method, rank=4, alpha=8, **options))), inputs


@pytest.mark.parametrize("name,method", NAMES)
def test_gradients_merging_and_removing(name, method):
    plain, inputs = build(name)
    before = output(plain, inputs)
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    model, _ = adapted(name, method)
    after = output(model, inputs)
    assert not torch.allclose(before, after, atol=1e-5)
    grads = []
    for plan in ("plain", "auto"):
        for layer in adapter_layers(model).values():
            layer.plan = plan
        model.zero_grad()
        model(**inputs).loss.backward()
        grads.append({n: p.grad for n, p in trainable_parameters(model).items() if "lora_" in n or "magnitude" in n})
    assert all(g is not None and g.any() for g in grads[0].values())
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-3)
    keys = set(state)
    merge(model)
    torch.testing.assert_close(output(model, inputs), after, atol=2e-5, rtol=1e-4)
    assert set(model.state_dict()) == keys and all(v.shape == state[k].shape for k, v in model.state_dict().items())
    assert torch.equal(output(unmerge(model), inputs), after)
    remove_adapter(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and set(model.state_dict()) == keys


@pytest.mark.parametrize("name,method", NAMES)
def test_files_are_those_of_peft(name, method, tmp_path):
    model, inputs = adapted(name, method)
    want = output(model, inputs)
    save_adapter(model, tmp_path)
    targets = read_json(tmp_path / CONFIG)["target_modules"]
    assert isinstance(targets, list) and "all-linear" not in targets
    assert torch.equal(output(load_adapter(build(name)[0], tmp_path), inputs), want)
    theirs = peft.PeftModel.from_pretrained(build(name)[0], tmp_path).eval()
    torch.testing.assert_close(output(theirs, inputs), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_targets(name):
    model, _ = adapted(name)
    want = next(targets for names, targets in DEFAULTS.items() if name in names.split())
    assert adapter_state(model).config.target_modules == want


@pytest.mark.parametrize("name", ("llama", "gpt2", "falcon", "t5", "vit"))
def test_training_steps_are_those_of_the_plain_formula(name):
    "Three steps of AdamW, with the fast product where it applies and without."
    results = []
    for plan in ("auto", "plain"):
        model, inputs = adapted(name, plan=plan)
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3, eps=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        results.append(output(model, inputs))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


def test_a_merged_gpt2_is_an_ordinary_checkpoint(tmp_path):
    "Its weights keep the layout of Conv1D, (in, out)."
    model, inputs = adapted("gpt2", target_modules="all-linear")
    want = output(merge(model, keep_base=False), inputs)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), inputs), want)


@pytest.mark.parametrize("targets", ("all-linear", ["down_proj"], ["gate_up_proj"]))
def test_fused_experts_are_named(targets):
    model, _ = build("mixtral")
    if targets == "all-linear":
        with pytest.warns(UserWarning, match=r"experts.*is not adapted.*fused experts"):
            adapt(model, AdapterConfig(target_modules=targets))
    else:
        with pytest.raises(ValueError, match="matches no module"):
            adapt(model, AdapterConfig(target_modules=targets))


def test_modules_that_read_weights_are_refused_before_any_change():
    model = nn.ModuleDict(dict(attention=nn.MultiheadAttention(8, 2), out=nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="'attention.out_proj' is inside .*MultiheadAttention"):
        adapt(model, AdapterConfig(target_modules=["out_proj"]))
    assert list(adapter_layers(adapt(copy.deepcopy(model), AdapterConfig(target_modules="all-linear")))) == ["out"]
    with pytest.raises(ValueError, match="is an adapter already .peft's Linear"):
        adapt(peft.get_peft_model(build("llama")[0], peft.LoraConfig(target_modules=["q_proj"])), AdapterConfig())


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_weight_that_a_model_reads_is_the_adapted_one(method):
    "Mamba's fast path multiplies by the weights of dt_proj and out_proj without calling these layers."
    model, inputs = adapted("mamba", method, target_modules=["dt_proj", "out_proj"])
    for layer in adapter_layers(model).values():
        want = layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer.weight.T, want)
        grads = torch.autograd.grad(layer.weight.square().sum(), [p for p in layer.parameters() if p.requires_grad])
        assert all(g.any() for g in grads)
    after = output(model, inputs)
    torch.testing.assert_close(output(merge(model), inputs), after, atol=2e-5, rtol=1e-4)
