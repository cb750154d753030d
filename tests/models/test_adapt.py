"Finding, freezing, merging, saving: and that what is refused leaves the model as it was."

import dataclasses
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dora_nb.models.adapt import adapt, adapter_layers, adapter_state, count_parameters, trainable_parameters
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.compress import compress
from dora_nb.models.disable import disable_adapter
from dora_nb.models.merge import can_merge, merge, remove_adapter, unmerge
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.names import match_names
from dora_nb.models.peft_format import CONFIG, WEIGHTS
from dora_nb.models.targets import find_targets

METHODS = ("lora", "dora")


def state(model):
    return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def assert_untouched(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n][0], p) and after[n][1] == g for n, (p, g) in before.items())
    assert not adapter_layers(model) and not adapter_state(model).config


@pytest.mark.parametrize(
    "field,value,named",
    [
        ("method", "qlora", "lora, dora, full"),
        ("rank", 0, "rank=0"),
        ("rank", 2.5, "rank=2.5"),
        ("alpha", 0, "alpha=0"),
        ("dropout", 1.0, "dropout=1.0"),
        ("alpha", "32", "alpha='32'"),
        ("rank", True, "rank=True"),
        ("rslora", "false", "rslora='false'"),
        ("init", "zeros", "kaiming"),
        ("dropout_form", "x", "delta"),
        ("target_modules", [], "target_modules"),
        ("target_modules", "q_(proj", "not a regular expression"),
        ("target_modules", 5, "must be a list"),
        ("target_modules", {"q_proj": 1}, "must be a list"),
        ("target_modules", ["q_proj", 5], "must hold names"),
        ("rank", 10**9, "rank=1000000000 is not possible.*at most 65536"),
        ("alpha", 10**400, "alpha=1000.* is not possible"),
        ("alpha", float("nan"), "alpha=nan"),
        ("rank_pattern", ["q_proj"], "rank_pattern must be a dictionary"),
        ("alpha_pattern", {"q_proj": float("inf")}, r"alpha_pattern\['q_proj'\]=inf"),
    ],
)
def test_impossible_configurations(field, value, named):
    with pytest.raises(ValueError, match=named):
        AdapterConfig(**{field: value})


@pytest.mark.parametrize(
    "targets,named",
    [
        (["q_proj", "kproj"], "'kproj' matches no module; did you mean 'k_proj'"),
        (["nothing"], "the linear layers are called"),
        (["embed_tokens"], "Embedding"),
        (r".*\.attention\..*", "matches no module"),
        (["layers.0.mlp"], "LlamaMLP"),
        ("q_proj", r"'q_proj' matches no module: a string is one regular expression.*give a list: \['q_proj'\]"),
        ("q_proj,lm_head", r"give a list: \['q_proj', 'lm_head'\]"),
        ("all-linear,lm_head", "'all-linear' cannot be combined.*list the names: down_proj, gate_proj, .*lm_head"),
        (["all-linear", "lm_head"], "'all-linear' cannot be combined"),
    ],
)
def test_targets_that_are_not_there(llama, targets, named):
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match=named):
        adapt(model, AdapterConfig(target_modules=targets))
    assert_untouched(model, before)


def test_targets(llama):
    model = llama()
    assert list(find_targets(model, ["layers.1.self_attn.q_proj"])) == ["model.layers.1.self_attn.q_proj"]
    assert len(find_targets(model, r"model\.layers\.\d+\.mlp\..*_proj")) == 6
    assert "lm_head" not in find_targets(model, "all-linear") and len(find_targets(model, "all-linear")) == 14


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_learns(llama, method):
    model = adapt(llama(), AdapterConfig(method, rank=4))
    assert all("lora_" in n or "magnitude" in n for n in trainable_parameters(model))
    layers = find_targets(llama(), None).values()
    want = sum(4 * (m.in_features + m.out_features) + (method == "dora") * m.out_features for m in layers)
    assert count_parameters(model)[0] == want


def test_full_trains_everything(llama):
    trainable, total = count_parameters(adapt(llama(), AdapterConfig("full")))
    assert trainable == total


def test_adapting_twice_is_refused(llama):
    model = adapt(llama(), AdapterConfig())
    with pytest.raises(RuntimeError, match="remove_adapter"):
        adapt(model, AdapterConfig())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merge_and_unmerge(llama, shake, ids, method, dtype):
    model = llama().to(dtype)
    plain = model(ids).logits
    model = shake(adapt(model, AdapterConfig(method, rank=4)))
    W0 = {n: layer.base_layer.weight.clone() for n, layer in adapter_layers(model).items()}
    adapted = model(ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    merge(model)
    assert not any("lora" in n or "base_layer" in n or "magnitude" in n for n in model.state_dict())
    tolerance = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.05, rtol=0.05)
    torch.testing.assert_close(model(ids).logits, adapted, **tolerance)
    with pytest.warns(UserWarning, match="merged already; nothing was changed"):
        merge(model)
    unmerge(model)
    unmerge(model)
    assert torch.equal(model(ids).logits, adapted)
    assert all(torch.equal(layer.base_layer.weight, W0[n]) for n, layer in adapter_layers(model).items())
    assert torch.equal(remove_adapter(model)(ids).logits, plain)


def test_what_is_merged_may_still_be_merged_for_good(llama, shake, ids):
    model = merge(shake(adapt(llama(), AdapterConfig("dora"))))
    merged = model(ids).logits
    assert torch.equal(merge(model, keep_base=False)(ids).logits, merged) and not adapter_layers(model)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        unmerge(model)


def test_merge_for_good(llama, shake, ids):
    model = shake(adapt(llama(), AdapterConfig("dora")))
    adapted = model(ids).logits
    merge(model, keep_base=False)
    torch.testing.assert_close(model(ids).logits, adapted, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        unmerge(model)
    adapt(model, AdapterConfig("lora"))  # a plain model, ready for the next adapter


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_is_a_plain_checkpoint(llama, shake, ids, tmp_path, method):
    model = shake(adapt(llama(), AdapterConfig(method)))
    adapted = model(ids).logits
    merge(model).save_pretrained(tmp_path)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, adapted, atol=1e-5, rtol=1e-4
    )


def test_over_codes_too_a_merged_model_is_a_plain_checkpoint(llama, shake, ids, tmp_path):
    "The layers without an adapter are written out as well, and unmerging brings their codes back."
    model = shake(adapt(compress(llama(), "rtn-4"), AdapterConfig("dora", rank=3)))
    adapted, codes = model(ids).logits, {n for n in model.state_dict() if n.endswith("codes")}
    merge(model).save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert {n for n in unmerge(model).state_dict() if n.endswith("codes")} == codes
    torch.testing.assert_close(model(ids).logits, adapted)
    merge(model, keep_base=False)
    assert not [n for n in model.state_dict() if n.endswith("codes")] and not adapter_state(model).compressed


def test_what_torch_compile_wraps_is_saved_by_its_own_names(llama, shake, ids, tmp_path):
    model = llama()
    compiled = torch.compile(model)
    shake(adapt(compiled, AdapterConfig(rank=3)))
    adapted = model(ids).logits
    save_adapter(compiled, tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(ids).logits, adapted)
    torch.testing.assert_close(merge(compiled)._orig_mod(ids).logits, adapted, atol=1e-5, rtol=1e-4)
    assert torch.equal(unmerge(compiled)._orig_mod(ids).logits, adapted)
    again = load_adapter(torch.compile(llama()), tmp_path)
    assert torch.equal(again._orig_mod(ids).logits, adapted)


def test_one_layer_under_two_names(llama):
    model = llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    for targets in ("all-linear", ["up_proj"]):
        with pytest.raises(ValueError, match="one layer under two names"):
            adapt(model, AdapterConfig(target_modules=targets))


def test_tied_weights_are_not_merged(llama):
    model = adapt(llama(tie_word_embeddings=True), AdapterConfig("dora", target_modules=["q_proj", "lm_head"]))
    before = model.state_dict().keys()
    with pytest.raises(RuntimeError, match="lm_head.*shares its weight"):
        merge(model)
    assert not can_merge(model) and can_merge(adapt(llama(), AdapterConfig()))
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(llama, shake, ids, tmp_path, method):
    model = shake(
        adapt(
            llama(),
            AdapterConfig(
                method, rank=4, alpha=12, rslora=True, init="gaussian", target_modules=["q_proj", "down_proj"]
            ),
        )
    )
    save_adapter(model, tmp_path / "deep" / "folder")
    again = load_adapter(llama(), tmp_path / "deep" / "folder", dropout=0.1)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (
        adapter_state(again).config.dropout == 0.1
        and adapter_state(again).config.rslora
        and adapter_state(again).config.init == "gaussian"
    )
    merge(model)
    save_adapter(model, tmp_path / "merged")  # what is merged can still be saved
    assert torch.equal(load_adapter(llama(), tmp_path / "merged")(ids).logits, again(ids).logits)
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == [CONFIG, WEIGHTS]


def test_what_peft_has_no_field_for_comes_back_too(llama, tmp_path):
    config = AdapterConfig(
        "dora",
        target_modules=["q_proj"],
        **dict(init="gaussian", detach_norm=False, dropout_form="lowrank", dropout=0.2, modules_to_save=()),
    )
    save_adapter(adapt(llama(), config), tmp_path)
    assert adapter_state(load_adapter(llama(), tmp_path)).config == config
    assert adapter_state(load_adapter(llama(), tmp_path, detach_norm=True)).config.detach_norm
    with pytest.raises(ValueError, match="alpha cannot be changed"):
        load_adapter(llama(), tmp_path, alpha=1.0)


@pytest.mark.parametrize("undo", (unmerge, remove_adapter))
def test_a_merged_model_may_be_cast(llama, shake, ids, undo):
    model = shake(adapt(llama(attention_bias=True), AdapterConfig("dora")))
    merge(model).to(torch.bfloat16)
    assert undo(model)(ids).logits.dtype == torch.bfloat16
    assert {layer.magnitude.dtype for layer in adapter_layers(model).values()} <= {torch.float32}


def test_a_merged_model_may_be_cast_and_its_adapter_disabled(llama, shake, ids):
    model = shake(adapt(llama(), AdapterConfig("dora")))
    merge(model).double()
    with disable_adapter(model):
        assert model(ids).logits.dtype == torch.float64
    assert unmerge(model)(ids).logits.dtype == torch.float64
    layers = adapter_layers(model).values()
    assert {p.dtype for m in layers for p in (m.lora_A, m.lora_B, m.magnitude)} == {torch.float64}


def test_merging_needs_an_adapter(llama, shake):
    for model in (llama(), merge(shake(adapt(llama(), AdapterConfig())), keep_base=False)):
        with pytest.raises(RuntimeError, match="this model has no adapter to merge"):
            merge(model)


def test_a_compressed_model_is_not_trained_whole(llama):
    for scheme in ("rtn-4", "magnitude-0.5"):
        model = compress(llama(), scheme)
        required = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"'full' trains every weight, and this model is compressed \({scheme}\)"):
            adapt(model, AdapterConfig("full"))
        assert [p.requires_grad for p in model.parameters()] == required and adapter_state(model).config is None


def test_a_set_of_names_has_one_order():
    names = [f"{k}_proj" for k in "qkvo"]
    assert AdapterConfig(target_modules=set(names)).target_modules == tuple(sorted(names))
    assert AdapterConfig(target_modules=names).target_modules == tuple(names)


def test_layers_that_others_look_into():
    "T5 reads the dtype of a layer's weight; an adapted layer must have one."
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    adapt(model, AdapterConfig("dora", rank=2, target_modules=["wo", "q"]))
    assert model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.isfinite()


def test_models_that_cannot_be_adapted(llama):
    with pytest.raises(ValueError, match="finds no linear layer; this model is made of Conv2d, ReLU, Sequential"):
        adapt(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.ReLU()), AdapterConfig())
    twice = llama()
    twice.model.layers[1].mlp.up_proj = twice.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="one layer under two names"):
        adapt(twice, AdapterConfig(target_modules=["up_proj"]))
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="meta device"):
        adapt(empty, AdapterConfig())
    attention = torch.nn.MultiheadAttention(8, 2)  # reads its projection's weight itself, past any adapter
    with pytest.raises(ValueError, match="is inside a torch.nn.*MultiheadAttention"):
        adapt(attention, AdapterConfig(target_modules=["out_proj"]))


def test_full_saves_a_model(llama, ids, tmp_path):
    model = adapt(llama(), AdapterConfig("full"))
    save_adapter(model, tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_full_keeps_no_original(llama):
    with pytest.warns(UserWarning, match="'full' trains every weight; target_modules has no effect"):
        model = adapt(llama(), AdapterConfig("full", target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="no original is kept; load the base model again"):
        remove_adapter(model)
    with pytest.raises(RuntimeError, match="is trained, by method 'full'; merge.model, keep_base=False. ends that"):
        adapt(model, AdapterConfig("lora"))
    adapt(merge(model, keep_base=False), AdapterConfig("lora", rank=2))
    assert all("lora_" in name for name in trainable_parameters(model))


@pytest.mark.parametrize("option", (dict(layers_to_transform=0), dict(bias="all"), dict(rank=4), dict(rslora=True)))
def test_full_names_every_option_without_effect(llama, option):
    with pytest.warns(UserWarning, match=f"'full' trains every weight; {next(iter(option))} has no effect"):
        adapt(llama(), AdapterConfig("full", **option))


def test_values_of_numpy():
    "A sweep gives them, and JSON holds Python's."
    given = dict(rank=np.int64(4), alpha=np.float32(8), rslora=np.True_, detach_norm=np.array(False))
    config = AdapterConfig(**given, layers_to_transform=np.array(0), rank_pattern={"q_proj": np.int8(2)})
    kinds = [type(v) for v in (config.rank, config.alpha, config.rslora, config.detach_norm)]
    assert kinds == [int, float, bool, bool] and config.layers_to_transform == 0
    json.dumps(dataclasses.asdict(config))
    assert AdapterConfig(layers_to_transform=np.arange(2)).layers_to_transform == (0, 1)
    with pytest.raises(ValueError, match="layers_to_transform"):
        AdapterConfig(layers_to_transform=np.array(1.5))


def _checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, LlamaDecoderLayer))


def _compiled(model):
    model.model = torch.compile(model.model, backend="eager")


@pytest.mark.parametrize("init", ("kaiming", "pissa"))
@pytest.mark.parametrize("wrap", (_checkpointed, _compiled))
@pytest.mark.parametrize("before", (False, True))
@pytest.mark.attack("data loss")
def test_parts_of_a_model_may_be_wrapped(llama, shake, ids, tmp_path, init, wrap, before):
    "By activation checkpointing or torch.compile, before `adapt` or after it: the file is that of the model without."
    config = AdapterConfig(
        rank=2, init=init, target_modules="all-linear", modules_to_save=["input_layernorm"], bias="all"
    )
    model = llama(mlp_bias=True)
    if before:
        wrap(model)
    adapt(model, config)
    if not before:
        wrap(model)
    model.model.norm.requires_grad_(True)  # by hand
    shake(model)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.01
    trained = model(ids).logits
    save_adapter(model, tmp_path)
    plain, wrapped, restored = (llama(mlp_bias=True) for _ in range(3))
    wrap(wrapped)
    adapt(restored, dataclasses.replace(config, modules_to_save=["input_layernorm", "model.norm"]))
    wrap(restored)
    restored.load_state_dict(load_file(tmp_path / WEIGHTS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = load_adapter(plain, tmp_path), load_adapter(wrapped, tmp_path), restored
        again += (PeftModel.from_pretrained(llama(mlp_bias=True), tmp_path).eval(),)
    for one in again:
        torch.testing.assert_close(one(ids).logits, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize("dropout_form", ("lowrank", "delta"))
def test_hooks_on_a_layer_run_once(llama, ids, shake, tmp_path, method, dropout_form):
    "As in PEFT. A hook that was registered before `adapt` acts on the adapted model too."
    calls = []

    def halve(module, args, output):
        calls.append(module)
        return output / 2

    def hooked():
        model = llama(mlp_bias=True).eval()
        model.model.layers[0].mlp.up_proj.register_forward_hook(halve)
        return model

    dropped = dict(dropout=0.5, dropout_form=dropout_form) if method == "dora" else {}
    model = adapt(hooked(), AdapterConfig(method, rank=2, **dropped))
    plain = model(ids).logits
    shake(model)
    calls.clear()
    ours = model(ids).logits
    assert len(calls) == 1 and not torch.allclose(ours, plain, atol=1e-3)
    peft = PeftModel.from_pretrained(hooked(), save_adapter(model, tmp_path)).eval()
    torch.testing.assert_close(ours, peft(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="hooks of 'model.layers.0.mlp.up_proj' do not run once it is merged"):
        merge(model)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_hook_may_return_what_has_no_gradient(llama, ids, method):
    model = llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
    plain = model(ids).logits
    adapt(model, AdapterConfig(method, rank=2))
    torch.testing.assert_close(model(ids).logits, plain)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_pruned_layer_may_be_cast(llama, ids, method):
    "PyTorch's pruning computes the weight in a hook of the layer."
    model = llama()
    torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    plain = model(ids).logits
    adapt(model, AdapterConfig(method, rank=2))
    torch.testing.assert_close(model(ids).logits, plain)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.base_layer.weight_orig *= 1.5
    first, plain = model(ids).logits, model(ids).logits
    torch.testing.assert_close(first, plain)  # DoRA's norm is of the weight of this call
    with pytest.raises(RuntimeError, match=r"up_proj' is pruned \(50% zeros\), and merging would fill its zeros"):
        merge(model)
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(ids).logits.float(), plain, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("targets", (None, "all-linear"))
def test_layers_to_transform_without_a_list(targets, tmp_path):
    "ViT has no targets of its own: all linear layers of the layers that are named."
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    make = lambda: torch.manual_seed(0) and ViTForImageClassification(config)
    model = adapt(make(), AdapterConfig(rank=2, layers_to_transform=[1], target_modules=targets))
    assert adapter_layers(model) and all(".1." in name for name in adapter_layers(model))
    save_adapter(model, tmp_path)
    again = load_adapter(make(), tmp_path)
    assert adapter_layers(again).keys() == adapter_layers(model).keys()
    peft = PeftModel.from_pretrained(make(), tmp_path).base_model.model
    assert {n.removesuffix(".lora_A") for n, _ in peft.named_modules() if n.endswith(".lora_A")} == adapter_layers(
        model
    ).keys()


def test_nothing_to_save(llama, tmp_path):
    with pytest.raises(RuntimeError, match="no adapter to save"):
        save_adapter(llama(), tmp_path)


@pytest.fixture
def saved(llama, shake, tmp_path):
    return save_adapter(
        shake(adapt(llama(), AdapterConfig("dora", rank=4, target_modules=["q_proj", "v_proj"]))), tmp_path / "adapter"
    )


def spoil_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def spoil_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


SPOILT = {
    "another rank": (lambda f: spoil_config(f, r=8), r"shape \(4, 64\) where this model needs \(8, 64\)"),
    "more targets": (lambda f: spoil_config(f, target_modules=["q_proj", "v_proj", "up_proj"]), "lacks .*up_proj"),
    "fewer targets": (lambda f: spoil_config(f, target_modules=["q_proj"]), "v_proj.*has no place"),
    "lora, not dora": (lambda f: spoil_config(f, use_dora=False), "lora_magnitude_vector.*has no place"),
    "another method": (lambda f: spoil_config(f, peft_type="IA3"), "IA3"),
    "loftq": (lambda f: spoil_config(f, init_lora_weights="loftq"), "loftq.*base weights"),
    "unknown biases": (lambda f: spoil_config(f, bias="some"), "bias='some' does not exist"),
    "another rank pattern": (lambda f: spoil_config(f, rank_pattern={"q_proj": 2}), r"q_proj.*needs \(2, 64\)"),
    "a pattern that is none": (lambda f: spoil_config(f, rank_pattern={"q_(": 2}), "not a regular expression"),
    "more saved modules": (lambda f: spoil_config(f, modules_to_save=["lm_head"]), "lacks .*lm_head.weight"),
    "no list of modules": (lambda f: spoil_config(f, modules_to_save="lm_head"), "modules_to_save='lm_head' must be"),
    "no targets": (lambda f: spoil_config(f, target_modules=None), "lacks target_modules"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), f"{WEIGHTS} is damaged"),
    "a config cut short": (lambda f: (f / CONFIG).write_text('{"r":'), f"{CONFIG} is damaged"),
    "missing tensor": (lambda f: spoil_weights(f, lambda t: t.pop(sorted(t)[0])), "lacks"),
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds neither adapter_model.safetensors nor adapter_model.bin"),
    "half a config": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": 4}'),
        "lacks lora_alpha, target_modules",
    ),
}


@pytest.mark.parametrize("spoil,named", SPOILT.values(), ids=SPOILT.keys())
def test_adapters_that_do_not_fit(llama, saved, spoil, named):
    spoil(saved)
    model = llama()
    before = state(model)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        load_adapter(model, saved)
    assert_untouched(model, before)


def test_an_adapter_for_another_width(llama, saved):
    model = llama(hidden_size=32)
    before = state(model)
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(model, saved)
    assert_untouched(model, before)


@pytest.mark.long
def test_an_adapter_from_elsewhere_opens_only_its_own_files(tmp_path):
    "Whatever its configuration names, nothing outside its folder is read."
    code = """
import json, sys
from pathlib import Path
from torch import nn
from dora_nb.models.methods import AdapterConfig; from dora_nb.models.adapt import adapt; from dora_nb.models.adapter_files import load_adapter, save_adapter
folder = Path(sys.argv[1])
plain = lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
file = save_adapter(adapt(plain(), AdapterConfig("dora", rank=2, target_modules=("q_proj",))), folder / "adapter") / "adapter_config.json"
keys = ("base_model_name_or_path", "revision", "auto_mapping", "megatron_config", "trainable_token_indices")
file.write_text(json.dumps(json.loads(file.read_text()) | {k: str(folder / "secret") for k in keys}))
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
try:
    load_adapter(plain(), folder / "adapter")
except ValueError as e:
    print(e)
assert any("adapter_config.json" in path for path in opened) and not any("secret" in path for path in opened)
"""
    (tmp_path / "secret").write_text("{}")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


ENDLESS = {
    "nested repeats": r"(([a-z0-9_.])+)+[^a-z0-9_.]",
    "alternatives": r"((\w|[a-z])+\.?)+[^\w.]",
    "back references": r"(.*)(.*)(.*)(.*)(.*)(.*)(?:a\2\3\4\5\6)[.]7",
    "counted repeats": r"((((a{1000}){1000}){1000}){1000})",
    "ten megabytes": "x|" * 5_000_000,
    "ten megabytes of a name": "q" * 10_000_000,
    "two thousand brackets": "(" * 1_900 + "a" + ")" * 1_900,
}


@pytest.mark.attack("hang")
@pytest.mark.parametrize("field", ("target_modules", "rank_pattern", "alpha_pattern"))
@pytest.mark.parametrize("entry", ENDLESS.values(), ids=ENDLESS.keys())
def test_expressions_without_an_end(llama, saved, monkeypatch, entry, field):
    "Whether it is refused when it is read or when it is matched, the message names the entry, and is short."
    monkeypatch.setattr("dora_nb.models.names.SECONDS", 0.05)
    spoil_config(saved, **{field: entry if field == "target_modules" else {entry: 4}})
    model = llama(num_hidden_layers=1)
    before = state(model)
    with pytest.raises((ValueError, UserWarning)) as e, warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # of an entry that matches nothing: some end soon where the rest has to match too
        load_adapter(model, saved)
    assert repr(entry[:20])[1:-1] in str(e.value) and len(str(e.value)) < 500
    assert_untouched(model, before)


@pytest.mark.attack("hang")
def test_time_is_limited_for_all_layers_together(monkeypatch):
    "Each name takes a moment; there are many."
    names = [f"model.layers.{i}.{'block_' * 30}q_proj" for i in range(5_000)]
    monkeypatch.setattr("dora_nb.models.names.SECONDS", 0.05)
    with pytest.raises(ValueError, match="takes too long to match"):
        match_names([r"(.*)(.*)(.*)[^a-z0-9_.]x?"], names)
    monkeypatch.setattr("dora_nb.models.names.SECONDS", 60)
    plain = {name: 3 for name in names}  # what names a layer is not an expression, and costs next to nothing
    assert match_names(list(plain), names)[names[7]] == {names[7]}


def test_names_are_matched_as_peft_matches_them():
    import re

    names = [f"model.layers.{i}.{p}.{k}_proj" for i in (1, 11) for p in ("attn", "xattn") for k in "qk"]
    entries = [
        "q_proj",
        "attn.q_proj",
        "1.attn.q_proj",
        "attn.k.proj",
        "proj",
        ".*q_proj",
        r"layers\.1\..*",
        "(q|k)_proj",
    ]
    entries += ["", "model.layers.1.attn.q_proj", "attn", r"[ax]+ttn\.k_proj", "layers.1"]
    theirs = {e: {n for n in names if re.match(rf"(.*\.)?({e})$", n)} for e in entries}
    assert match_names(entries, names) == theirs
    assert match_names([r".*\.q_proj"], names, whole=True) == {
        r".*\.q_proj": {n for n in names if n.endswith(".q_proj")}
    }
    assert match_names(["q_proj"], names, whole=True) == {"q_proj": set()}


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def metadata(text):
    def spoil(f):
        save_file(load_file(f / WEIGHTS), f / WEIGHTS, metadata={"dora_nb": text})

    return spoil


def header(text):
    "Weights that begin with another header."
    return lambda f: (f / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"0" * 64)


HOSTILE = {
    "the config is a pipe": (lambda f: pipe(f / CONFIG), "is a pipe"),
    "the config is a folder": (lambda f: folder(f / CONFIG), "is a folder"),
    "the weights are a pipe": (lambda f: pipe(f / WEIGHTS), "is a pipe"),
    "the weights are a folder": (lambda f: folder(f / WEIGHTS), "is a folder"),
    "a list": (lambda f: (f / CONFIG).write_text("[1]"), "must hold a JSON object"),
    "a number": (lambda f: (f / CONFIG).write_text("5"), "must hold a JSON object"),
    "null": (lambda f: (f / CONFIG).write_text("null"), "must hold a JSON object"),
    "nothing": (lambda f: (f / CONFIG).write_text(""), "is damaged"),
    "no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "is not UTF-8 text"),
    "a hundred thousand brackets": (lambda f: (f / CONFIG).write_text("[" * 100_000), "is damaged"),
    "a giant rank": (lambda f: spoil_config(f, r=10**9), "rank=1000000000 is not possible"),
    "a large rank": (lambda f: spoil_config(f, r=60_000), r"shape \(4, 64\) where this model needs \(60000, 64\)"),
    "a giant rank in a pattern": (lambda f: spoil_config(f, rank_pattern={"q_proj": 10**9}), "1000000000"),
    "a giant alpha": (lambda f: spoil_config(f, lora_alpha=10**400), "alpha=1000"),
    "an infinite alpha": (lambda f: spoil_config(f, lora_alpha=float("inf")), "alpha=inf"),
    "no number": (lambda f: spoil_config(f, lora_dropout=float("nan")), "dropout=nan"),
    "a list as rank": (lambda f: spoil_config(f, r=[4]), r"rank=\[4\]"),
    "an object as rank": (lambda f: spoil_config(f, r={"a": {"b": 1}}), "rank={'a'"),
    "a list as pattern": (lambda f: spoil_config(f, rank_pattern=[1]), "rank_pattern must be a dictionary"),
    "numbers as targets": (lambda f: spoil_config(f, target_modules=[1, 2]), "target_modules must hold names"),
    "an object as targets": (lambda f: spoil_config(f, target_modules={"q_proj": 1}), "must be a list"),
    "a list as peft_type": (lambda f: spoil_config(f, peft_type=["LORA"]), "peft_type"),
    "a text as use_dora": (lambda f: spoil_config(f, use_dora="no"), "use_dora='no'"),
    "a list as start": (lambda f: spoil_config(f, init_lora_weights=[{}]), "init_lora_weights"),
    "metadata cut short": (metadata('{"init":'), "metadata 'dora_nb' is not JSON"),
    "metadata of another kind": (metadata("[1]"), "metadata 'dora_nb'"),
    "metadata in depth": (metadata("[" * 100_000), "metadata 'dora_nb' is not JSON"),
    "metadata with another start": (metadata('{"init": [1]}'), r"init=\[1\]"),
    "metadata with another base": (metadata('{"compress": 5}'), "metadata 'dora_nb'"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "is damaged"),
    "a header that is none": (header("{]"), "is damaged"),
    "a giant header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "is damaged"),
    "a tensor of giant size": (
        header('{"a": {"dtype": "F32", "shape": [1000000000000, 1000], "data_offsets": [0, 8]}}'),
        "is damaged",
    ),
    "a name twice": (
        lambda f: spoil_weights(f, lambda t: t.update({k.replace("lora_A", "lora_A.default"): t[k] + 1 for k in [*t]})),
        "twice",
    ),
}


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("spoil,named", HOSTILE.values(), ids=HOSTILE.keys())
def test_files_of_a_stranger(llama, saved, spoil, named):
    spoil(saved)
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match=named) as e:
        load_adapter(model, saved)
    assert str(saved) in str(e.value) and len(str(e.value)) < 1000 and "\n" not in str(e.value)
    assert_untouched(model, before)


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("what", (CONFIG, WEIGHTS))
def test_any_damage_is_refused_or_harmless(llama, saved, what):
    "Some hundred mutations of a file: it loads, with finite weights, or is refused, and then the model is as it was."
    rng, whole, model = random.Random(0), (saved / what).read_bytes(), llama()
    values = ["[]", "{}", "null", "-1", "1e999", "9" * 30, '"' + "x" * 99 + '"', "true", '{"a": [1]}', "NaN"]
    before, outcomes = state(model), {"refused": 0, "loaded": 0}
    for _ in range(150):
        data = bytearray(whole)
        kind, at = rng.randrange(4), rng.randrange(len(data))
        if kind == 0:  # a few bits
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(at + 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif what == CONFIG:  # another value
            found = json.loads(whole)
            found[rng.choice(sorted(found))] = "?"
            data = json.dumps(found).replace('"?"', rng.choice(values)).encode()
        else:
            data[8:16] = rng.randbytes(8)
        (saved / what).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_adapter(model, saved)
        except (ValueError, FileNotFoundError):
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
            assert all(p.isfinite().all() for p in trainable_parameters(model).values())
            remove_adapter(model)
            for n, p in model.named_parameters():
                p.requires_grad_(before[n][1])
        assert_untouched(model, before)
    assert outcomes["refused"] > 50 and outcomes["loaded"] > 0


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("part", ("lora_A", "lora_B", "magnitude"))
def test_values_that_are_not_finite(llama, saved, part, value):
    key = next(k for k in load_file(saved / WEIGHTS) if part in k)
    spoil_weights(saved, lambda t: t[key].view(-1)[3:4].fill_(value))
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match=f"{key}.*not finite"):
        load_adapter(model, saved)
    assert_untouched(model, before)


@pytest.mark.attack("silent error")
def test_what_would_not_be_finite_is_not_merged(llama, shake):
    model = shake(adapt(llama(), AdapterConfig("dora", rank=2)))
    adapter_layers(model)["model.layers.1.self_attn.k_proj"].magnitude.data[2] = float("nan")
    before = model.state_dict().keys()
    with pytest.raises(RuntimeError, match="layers.1.self_attn.k_proj' would not be finite"):
        merge(model)
    assert model.state_dict().keys() == before


LAYOUTS = {
    "older files and torchtune": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "with the adapter's name": ("lora_A.weight", "lora_A.default.weight"),
    "a magnitude with the adapter's name": ("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
}


@pytest.mark.attack("crash")
@pytest.mark.parametrize("new,old", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_names_of_other_versions(llama, saved, ids, new, old):
    expected = load_adapter(llama(), saved)(ids).logits
    tensors = {k.replace(new, old): v for k, v in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    assert any(old in k for k in tensors)
    assert torch.equal(load_adapter(llama(), saved)(ids).logits, expected)


@pytest.mark.parametrize(
    "changes",
    [dict(trainable_token_indices=[3, 5]), dict(init_lora_weights="loftq"), dict(peft_type="IA3")]
    + [dict(target_parameters=["mlp.experts.gate_up_proj"])],
    ids=str,
)
def test_what_cannot_be_loaded_here_has_a_way_out(llama, saved, changes):
    spoil_config(saved, **changes)
    with pytest.raises(ValueError, match="merge_and_unload.*load that folder as a model"):
        load_adapter(llama(), saved)


@pytest.mark.attack("crash")
@pytest.mark.parametrize("method", METHODS)
def test_adapting_is_all_or_nothing(llama, monkeypatch, method):
    from dora_nb.layers import starts as module

    model, made, original = llama(), [], module.start_update
    model.model.layers[0].requires_grad_(False)
    before = state(model)

    def fail(*args):
        made.append(args)
        if len(made) == 3:
            raise KeyError("no memory")
        return original(*args)

    monkeypatch.setattr(module, "start_update", fail)
    with pytest.raises(KeyError, match="no memory"):
        adapt(model, AdapterConfig(method))
    assert_untouched(model, before)


@pytest.mark.attack("crash")
@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.float8_e4m3fn))
@pytest.mark.parametrize("method", METHODS)
def test_bases_that_another_library_quantised(llama, dtype, method):
    model = llama()
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    learned = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=f"layers.1.self_attn.k_proj' .* a quantised weight .*{dtype}.*forward pass fails"
    ):
        adapt(model, AdapterConfig(method))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == learned and not adapter_layers(model)


@pytest.mark.attack("crash")
@pytest.mark.parametrize("limit", (300, 20_000))
def test_a_disk_that_is_full(llama, saved, tmp_path, limit):
    "The line names the folder, and what was there stays."
    before = {p: p.read_bytes() for p in saved.iterdir()}
    model = adapt(llama(), AdapterConfig("dora", rank=8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=f"nothing can be saved in {saved}"):
            save_adapter(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_another_base_of_the_same_shapes(llama, shake, tmp_path, dtype):
    "A warning says so; the base that it was trained on is known in any dtype."
    save_adapter(shake(adapt(llama(0), AdapterConfig(rank=2))), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(0).to(dtype), tmp_path)
    with pytest.warns(UserWarning, match="was trained on another base model"):
        load_adapter(llama(1).to(dtype), tmp_path)


OTHER_WEIGHTS = (
    "embed_tokens.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.1.mlp.gate_proj.weight",
    "norm.weight",
)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("changed", [*OTHER_WEIGHTS, "lm_head.weight"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_base_that_differs_where_no_adapter_is(llama, shake, tmp_path, changed, merged):
    model = shake(adapt(llama(), AdapterConfig("dora", 2, target_modules=("q_proj",))))
    save_adapter(merge(model) if merged else model, tmp_path)
    other = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(), tmp_path)
    with torch.no_grad():
        other.get_parameter(changed if changed.startswith("lm_head") else f"model.{changed}").mul_(1.5)
    with pytest.warns(UserWarning, match="was trained on another base model"):
        load_adapter(other, tmp_path)


def test_adapters_of_earlier_versions_are_checked_by_their_first_rows(llama, shake, tmp_path):
    model = shake(adapt(llama(), AdapterConfig(rank=2)))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    ours = json.loads(metadata["dora_nb"])
    del ours["weights"]
    rows = hashlib.sha256()
    for name, layer in adapter_layers(model).items():
        row = layer.base_layer.weight[0].detach().bfloat16()
        rows.update(name.encode() + row.view(torch.int16).numpy().tobytes())
    metadata["dora_nb"] = json.dumps(ours | {"base": rows.hexdigest()})
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(), tmp_path)
    with pytest.warns(UserWarning, match="was trained on another base model"):
        load_adapter(llama(1), tmp_path)
