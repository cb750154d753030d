"Finding, freezing, merging, saving: and that what is refused leaves the model as it was."

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dora_nb.adapt import (
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    adapt,
    adapter_layers,
    can_merge,
    count_parameters,
    find_targets,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    trainable_parameters,
    unmerge,
)
from dora_nb.compress import compress

METHODS = ("lora", "dora")


def state(model):
    return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def assert_untouched(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n][0], p) and after[n][1] == g for n, (p, g) in before.items())
    assert not adapter_layers(model) and not getattr(model, "dora_nb_config", None)


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
        ("init", "pissa", "kaiming"),
        ("dropout_form", "x", "delta"),
        ("target_modules", [], "target_modules"),
        ("target_modules", None, "target_modules"),
        ("target_modules", "q_(proj", "no regular expression"),
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
    layers = find_targets(llama(), AdapterConfig().target_modules).values()
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
    merge(model)  # once more changes nothing
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
    assert not [n for n in model.state_dict() if n.endswith("codes")] and not model.dora_nb_compressed


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
        again.dora_nb_config.dropout == 0.1 and again.dora_nb_config.rslora and again.dora_nb_config.init == "gaussian"
    )
    merge(model)
    save_adapter(model, tmp_path / "merged")  # what is merged can still be saved
    assert torch.equal(load_adapter(llama(), tmp_path / "merged")(ids).logits, again(ids).logits)
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == [CONFIG, WEIGHTS]


def test_what_peft_has_no_field_for_comes_back_too(llama, tmp_path):
    config = AdapterConfig("dora", init="gaussian", detach_norm=False, dropout_form="lowrank", dropout=0.2)
    save_adapter(adapt(llama(), config), tmp_path)
    assert load_adapter(llama(), tmp_path).dora_nb_config == config
    assert load_adapter(llama(), tmp_path, detach_norm=True).dora_nb_config.detach_norm
    with pytest.raises(ValueError, match="alpha cannot be changed"):
        load_adapter(llama(), tmp_path, alpha=1.0)


@pytest.mark.parametrize("undo", (unmerge, remove_adapter))
def test_a_merged_model_may_be_cast(llama, shake, ids, undo):
    model = shake(adapt(llama(attention_bias=True), AdapterConfig("dora")))
    merge(model).to(torch.bfloat16)
    assert undo(model)(ids).logits.dtype == torch.bfloat16
    assert {layer.magnitude.dtype for layer in adapter_layers(model).values()} <= {torch.float32}


def test_layers_that_others_look_into():
    "T5 reads the dtype of a layer's weight; an adapted layer must have one."
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    adapt(model, AdapterConfig("dora", rank=2, target_modules=["wo", "q"]))
    assert model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.isfinite()


def test_models_that_cannot_be_adapted(llama):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(ValueError, match="Conv1D"):
        adapt(gpt2, AdapterConfig(target_modules="all-linear"))
    twice = llama()
    twice.model.layers[1].mlp.up_proj = twice.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="one layer under two names"):
        adapt(twice, AdapterConfig(target_modules=["up_proj"]))
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="meta device"):
        adapt(empty, AdapterConfig())
    attention = torch.nn.MultiheadAttention(8, 2)  # reads its projection's weight itself, past any adapter
    with pytest.raises(ValueError, match="NonDynamically"):
        adapt(attention, AdapterConfig(target_modules=["out_proj"]))


def test_full_saves_a_model(llama, ids, tmp_path):
    model = adapt(llama(), AdapterConfig("full"))
    save_adapter(model, tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


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
    "pissa": (lambda f: spoil_config(f, init_lora_weights="pissa"), "pissa.*base weights"),
    "trained biases": (lambda f: spoil_config(f, bias="all"), "bias='all'"),
    "another rank pattern": (lambda f: spoil_config(f, rank_pattern={"q_proj": 2}), r"q_proj.*needs \(2, 64\)"),
    "a pattern that is none": (lambda f: spoil_config(f, rank_pattern={"q_(": 2}), "no regular expression"),
    "saved modules": (lambda f: spoil_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "no targets": (lambda f: spoil_config(f, target_modules=None), "lacks target_modules"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), f"{WEIGHTS} is damaged"),
    "a config cut short": (lambda f: (f / CONFIG).write_text('{"r":'), f"{CONFIG} is damaged"),
    "missing tensor": (lambda f: spoil_weights(f, lambda t: t.pop(sorted(t)[0])), "lacks"),
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no adapter_model.safetensors.*bin"),
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


def test_an_adapter_from_elsewhere_opens_only_its_own_files(tmp_path):
    "Whatever its configuration names, nothing outside its folder is read."
    code = """
import json, sys
from pathlib import Path
from torch import nn
from dora_nb.adapt import AdapterConfig, adapt, load_adapter, save_adapter
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
