"Against PEFT, an independent implementation: files both ways, logits, gradients."

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from dora_nb.models.adapt import adapt, adapter_layers, adapter_state
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.merge import remove_adapter
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.peft_format import WEIGHTS

SETTINGS = [
    dict(),
    dict(use_rslora=True),
    dict(r=3, lora_alpha=1, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"]),
    dict(target_modules="all-linear"),
]


def shaken_peft(model, use_dora, settings):
    "A PEFT model with a random, non-zero adapter."
    torch.manual_seed(2)
    model = get_peft_model(
        model,
        LoraConfig(
            **dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=use_dora) | settings
        ),
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
        elif "magnitude" in name:
            p.data *= 0.5 + torch.rand_like(p)
    return model.eval()


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize("settings", SETTINGS)
def test_we_load_pefts(llama, ids, tmp_path, use_dora, settings):
    theirs = shaken_peft(llama(), use_dora, settings)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours(ids).logits, llama()(ids).logits, atol=1e-2)


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(rslora=True), dict(target_modules="all-linear"), dict(target_modules=r".*\.layers\.0\..*_proj")],
)
def test_peft_loads_ours(llama, shake, ids, tmp_path, method, settings):
    ours = shake(adapt(llama(), AdapterConfig(method, rank=5, alpha=7, **settings)))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours(ids).logits, llama()(ids).logits, atol=1e-2)


def test_an_adapted_head_comes_with_the_base_s_own_weights(llama, ids, tmp_path):
    theirs = shaken_peft(llama(), True, dict(target_modules=["q_proj", "lm_head"]))
    theirs.save_pretrained(tmp_path)
    assert any(k.endswith("base_layer.weight") for k in load_file(tmp_path / WEIGHTS))
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    other = llama()
    other.lm_head.weight.data.add_(1)
    before = other(ids).logits
    torch.testing.assert_close(load_adapter(other, tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(remove_adapter(other)(ids).logits, before)


def test_targets_that_peft_passed_over_are_named(llama, ids, tmp_path):
    theirs = shaken_peft(llama(), False, dict(target_modules=["q_proj", "c_attn"]))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="target_modules: 'c_attn' matches no layer"):
        ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_pefts_dropout_is_gone_on_with(llama, tmp_path):
    shaken_peft(llama(), True, dict(lora_dropout=0.5)).save_pretrained(tmp_path)
    assert adapter_state(load_adapter(llama(), tmp_path)).config.dropout_form == "delta"
    assert adapter_state(load_adapter(llama(), tmp_path, dropout_form="lowrank")).config.dropout_form == "lowrank"


def test_a_model_that_does_not_generate(shake, ids, tmp_path):
    "PEFT wraps what it is told; a classifier is not a causal language model."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    weights = LlamaForSequenceClassification(config).state_dict()

    def fresh():
        model = LlamaForSequenceClassification(config).eval()
        model.load_state_dict(weights)
        return model

    ours = shake(adapt(fresh(), AdapterConfig("dora", rank=3)))
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(fresh(), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)


def test_there_and_back_keeps_every_tensor(llama, shake, tmp_path):
    save_adapter(shake(adapt(llama(), AdapterConfig("dora"))), tmp_path / "ours")
    PeftModel.from_pretrained(llama(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("use_dora", (False, True))
def test_gradients_are_pefts(llama, ids, tmp_path, use_dora):
    "PEFT detaches the norm as we do, so one backward pass must agree parameter by parameter."
    theirs = shaken_peft(llama(), use_dora, {})
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    theirs_by_name = {
        n.replace("base_model.model.", "")
        .replace(".default", "")
        .replace(".weight", "")
        .replace("lora_magnitude_vector", "magnitude"): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    if not theirs_by_name:  # loading freezes nothing here; a silent pass would prove nothing
        pytest.fail("PEFT computed no gradients")
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs_by_name[name], atol=1e-6, rtol=1e-4)


@pytest.mark.attack("crash")
@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize(
    "settings,count",
    [
        (dict(layers_to_transform=0), 3),
        (dict(layers_to_transform=[1], layers_pattern="layers"), 3),
        (dict(exclude_modules=["layers.0.self_attn.q_proj"]), 5),
        (
            dict(
                exclude_modules=r".*\.1\..*q_proj|.*embed_tokens", target_modules=["q_proj", "embed_tokens", "v_proj"]
            ),
            3,
        ),
        (dict(target_modules="all-linear", exclude_modules=["lm_head", "down_proj"]), 12),
    ],
    ids=str,
)
def test_layers_that_peft_left_out(llama, ids, tmp_path, use_dora, settings, count):
    "Saved and loaded again, it is the same."
    theirs = shaken_peft(llama(), use_dora, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(llama(), tmp_path / "theirs")
    assert len(adapter_layers(ours)) == count
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    again = load_adapter(llama(), save_adapter(ours, tmp_path / "ours"))
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_layers_that_peft_left_out_have_to_be_this_model_s(llama, tmp_path):
    shaken_peft(llama(), False, dict(layers_to_transform=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers_to_transform leave none of the 3 modules"):
        load_adapter(llama(num_hidden_layers=1), tmp_path)


@pytest.mark.attack("crash")
def test_a_start_that_leaves_the_base_as_it_is(llama, ids, tmp_path):
    theirs = shaken_peft(llama(), False, dict(init_lora_weights="mica"))
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ("q_proj", "q_proj,v_proj"))
def test_a_text_of_targets_is_one_expression(llama, targets):
    "PEFT finds no module either; we say what to write."
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(llama(), LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="to match the ends of names, give a list"):
        adapt(llama(), AdapterConfig(target_modules=targets))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_all_linear_is_saved_by_the_names_that_it_meant(shake, ids, tmp_path, method):
    "PEFT would take a classifier's pooler and head for linear layers too."
    from transformers import BertConfig, BertForSequenceClassification

    make = lambda: BertForSequenceClassification(
        BertConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    torch.manual_seed(0)
    base = make()
    ours = shake(adapt(make(), AdapterConfig(method, rank=2, target_modules="all-linear")))
    ours.load_state_dict(base.state_dict(), strict=False)
    for name, layer in adapter_layers(ours).items():
        layer.base_layer.load_state_dict(base.get_submodule(name).state_dict())
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing keys
        theirs = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)
    assert (
        len(load_file(tmp_path / WEIGHTS)) == (3 if method == "dora" else 2) * len(adapter_layers(ours)) + 2
    )  # its head
