"Compressed bases: what is stored is what is multiplied with, and adapters over it are adapters over that weight."

import copy
import json
import sys
import warnings

import pytest
import torch
from torch import nn

from dora_nb.data.tasks import load_task
from dora_nb.layers.decompose import row_norm
from dora_nb.models.adapt import adapt, adapter_state, count_parameters
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.compress import (
    QuantisedLinear,
    compress,
    input_norms,
    on_grid,
    parse_scheme,
    prune_,
    round_to_nearest,
    weight_bits,
)
from dora_nb.models.merge import merge, remove_adapter, unmerge
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.targets import unreached
from dora_nb.runs.config import RunConfig
from dora_nb.runs.folder import RESULT
from dora_nb.runs.identity import run_id
from dora_nb.runs.run import run

sys.path.append(f"{sys.prefix}/hqq")  # where `make` puts it
from hqq.core.quantize import Quantizer


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_round_to_nearest_against_hqq(bits):
    "HQQ without its optimisation is the same method, in another implementation."
    torch.manual_seed(0)
    W = torch.randn(64, 192)
    codes, meta = Quantizer.quantize(W, nbits=bits, group_size=64, axis=1, bitpack=False, device="cpu", optimize=False)
    theirs = ((codes - meta["zero"]) * meta["scale"]).view(W.shape)
    mine, step, low = round_to_nearest(W, bits)
    far = (on_grid(mine, step, low) - theirs).abs() > 0.2 * step.float().repeat_interleave(64, 1)
    assert far.float().mean() < 0.03  # half precision moves an entry over an edge now and then
    assert (mine.float() - codes.view(W.shape)).abs().max() <= 1


def test_a_group_of_equal_entries():
    W = torch.tensor([[0.0] * 32 + [0.25] * 32])
    torch.testing.assert_close(on_grid(*round_to_nearest(W, 2, 32)), W)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return QuantisedLinear(nn.Linear(128, 48), bits=3)


def test_a_layer_travels(layer, tmp_path):
    "state_dict, deepcopy, other dtypes: the codes and their grid stay what they are."
    x, W = torch.randn(5, 128), layer.weight
    other = QuantisedLinear(nn.Linear(128, 48), bits=3)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer)):
        assert torch.equal(same.weight, W) and torch.equal(same(x), layer(x))
    assert layer.half().weight.dtype == torch.float16 and layer.step.dtype == torch.float16
    assert torch.equal(layer.double().weight, W.double()) and layer(x.double()).dtype == torch.float64
    assert torch.equal(layer.float().weight, W)
    assert sum(t.numel() * t.element_size() for t in layer.stored) < 0.17 * 4 * W.numel()


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match="a row of 100 entries cannot be cut into groups of 64"):
        QuantisedLinear(nn.Linear(100, 4), bits=4)


@pytest.mark.parametrize("scheme", ("rtn", "rtn-5", "gptq-4", "rtn-x", "wanda-1", "magnitude-0", ""))
def test_wrong_schemes(scheme):
    with pytest.raises(ValueError, match="does not exist; give rtn or hqq"):
        parse_scheme(scheme)


@pytest.mark.parametrize("plan", ("plain", "factored", "dense"))
@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize("detach", (True, False))
def test_over_codes_as_over_their_weight(layer, method, plan, detach):
    dense, results = nn.Linear(128, 48), []
    dense.weight.data, dense.bias.data = layer.weight, layer.bias.data.clone()
    x = torch.randn(30, 128, requires_grad=True)
    for base in (layer, dense):
        torch.manual_seed(1)
        config = AdapterConfig(method, rank=4, target_modules=["0"], plan=plan, detach_norm=detach)
        held = adapt(nn.Sequential(base), config)[0]
        nn.init.normal_(held.lora_B, std=0.1)
        learned = [p for p in held.parameters() if p.requires_grad]
        first = held(x)
        with torch.no_grad():
            held.lora_B += 0.1  # the scale that is kept must follow
        y = held(x)
        results.append([first, y, held.merged_weight(), *torch.autograd.grad(y.square().sum(), [x, *learned])])
    torch.testing.assert_close(*results)


def test_the_scale_follows_the_codes(layer):
    held = adapt(nn.Sequential(layer), AdapterConfig("dora", rank=4, target_modules=["0"]))[0]
    before = held.scale()
    layer.step.mul_(2)
    layer.low.mul_(2)
    torch.testing.assert_close(held.scale(), before / 2)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_model_over_codes(llama, shake, ids, method, tmp_path):
    model = llama()
    compress(model, "rtn-3")
    assert 4 < weight_bits(model) < 6.5  # groups of 32 have more grids
    plain = model(ids).logits.detach()
    adapt(model, AdapterConfig(method, rank=4))
    torch.testing.assert_close(model(ids).logits, plain)
    q = model.model.layers[0].self_attn.q_proj
    if method == "dora":
        torch.testing.assert_close(q.magnitude.detach(), row_norm(q.base_layer.weight))
    shake(model)
    adapted = model(ids).logits.detach()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(merge(model)(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(unmerge(model)(ids).logits, adapted)
    torch.testing.assert_close(remove_adapter(model)(ids).logits, plain)
    torch.testing.assert_close(load_adapter(model, tmp_path)(ids).logits, adapted)


@pytest.mark.long
def test_wanda_against_its_formula(tiny_model_dir):
    "The entries that go are those that a loop over the rows finds, from inputs that a loop over the items sees."
    from dora_nb.data.assets import load_model

    model, tokenizer = load_model(str(tiny_model_dir))
    items = load_task("winogrande", "train", limit=3)
    layers = {"model.layers.0.mlp.down_proj": model.model.layers[0].mlp.down_proj}
    norms = input_norms(model, tokenizer, items, layers)["model.layers.0.mlp.down_proj"]
    total, mlp = torch.zeros(48), model.model.layers[0].mlp
    inputs = []
    hook = mlp.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    for item in items:
        text = item["contexts"][item["gold"]] + item["continuations"][item["gold"]]
        model(torch.tensor([tokenizer(text).input_ids[:-1]]))
    hook.remove()
    for x in inputs:
        total += (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[0].square().sum(0)
    torch.testing.assert_close(norms, total.detach().sqrt(), rtol=1e-4, atol=1e-6)
    W = mlp.down_proj.weight.detach().clone()
    prune_(mlp.down_proj, 0.25, norms)
    for row, pruned in zip(W, mlp.down_proj.weight):
        gone = sorted(range(48), key=lambda j: (row[j].abs() * norms[j]).item())[:12]
        assert sorted((pruned == 0).nonzero()[:, 0].tolist()) == sorted(gone)
    with pytest.raises(ValueError, match="wanda needs inputs"):
        compress(model, "wanda-0.5")


@pytest.mark.long
def test_an_adapter_knows_what_its_base_was_pruned_by(tiny_model_dir, tmp_path):
    "Other items make other zeros."
    from dora_nb.data.assets import load_model

    def pruned(task):
        model, tokenizer = load_model(str(tiny_model_dir))
        return compress(model, "wanda-0.5", tokenizer, load_task(task, "train", limit=2))

    save_adapter(adapt(pruned("boolq"), AdapterConfig("dora", rank=2)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(pruned("boolq"), tmp_path)
    with pytest.warns(UserWarning, match="compressed by wanda-0.5 on items"):
        load_adapter(pruned("winogrande"), tmp_path)


def test_compressed_once(llama):
    "What is pruned or coded already is refused, and every weight of the coded model is counted."
    model = llama()
    trained, whole = count_parameters(model)
    with pytest.raises(RuntimeError, match="compressed already"):
        compress(compress(llama(), "magnitude-0.5"), "rtn-4")
    coded = compress(model, "rtn-4")
    assert count_parameters(coded)[1] == whole
    with pytest.raises(RuntimeError, match="compressed already"):
        compress(coded, "magnitude-0.5")


def test_a_pruned_base_stays_pruned(llama):
    model = adapt(compress(llama(), "magnitude-0.5"), AdapterConfig("dora", rank=4))
    with pytest.raises(RuntimeError, match=r"q_proj' is pruned \(50% zeros\).*use the adapter unmerged"):
        merge(model)
    base = model.model.layers[1].mlp.up_proj.base_layer
    assert (base.weight == 0).float().mean() == 0.5


@pytest.mark.long
@pytest.mark.parametrize("scheme", ("rtn-4", "magnitude-0.5", "wanda-0.5"))
def test_a_run_over_a_compressed_base(tiny_model_dir, tmp_path, scheme):
    options = dict(model=str(tiny_model_dir), rank=2, train_items=8, batch_size=4, eval_items=4)
    config = RunConfig(compress=scheme, **options)
    result = run(config, tmp_path, progress=False)
    assert result["params"]["compress"] == scheme and result["metrics"]["n"] == 4
    assert json.loads((tmp_path / RESULT).read_text())["training"]["steps"] == 2
    assert run_id(config) != run_id(RunConfig(**options))
    for wrong in (dict(method="full"), dict(fsdp=True, processes=2)):
        with pytest.raises(ValueError, match="compress cannot be combined with"):
            RunConfig(compress=scheme, **options | wrong)
    with pytest.raises(ValueError, match="compress='rtn-9' does not exist"):
        RunConfig(compress="rtn-9")


def tiny(kind):
    "A model of some architecture, with random weights."
    import transformers

    options = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    if kind not in ("GPTNeoX", "OPT"):
        options |= dict(num_key_value_heads=1, head_dim=16, pad_token_id=0)
    if "Moe" in kind or kind == "Mixtral":
        options |= dict(num_experts=4, num_local_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
        options |= dict(shared_expert_intermediate_size=16)
    if kind == "OPT":
        options |= dict(ffn_dim=48, word_embed_proj_dim=32)
    name = kind + ("TextConfig" if kind == "Gemma3" else "Config")
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, name)(**options)).eval()


MIXTURES, DENSE = ("Mixtral", "Qwen2Moe", "Qwen3Moe"), ("Llama", "GPTNeoX", "OPT", "Gemma3", "Phi3")


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_no_adapter_reaches(kind):
    model = tiny(kind)
    lost, part = unreached(model)
    total = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "lm_head" not in n
    )
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts." in n or n.endswith("mlp.gate.weight"))
    assert part == experts / total > 0.5 and sum(p.numel() for p in lost.values()) == experts
    with pytest.warns(UserWarning, match=rf"experts.gate_up_proj' is not adapted.* {part:.0%} .*target_parameters"):
        adapt(model, AdapterConfig(target_modules="all-linear", rank=2))
    model = tiny(kind)
    model.model.layers[0].down_proj = torch.nn.Linear(4, 4)  # a layer of the name that the experts' weights have too
    with pytest.warns(UserWarning, match="experts.down_proj' is not adapted"):
        adapt(model, AdapterConfig(target_modules=["q_proj", "down_proj"], rank=2))


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_model_is_reached(kind):
    model = tiny(kind)
    assert unreached(model) == ({}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, AdapterConfig(target_modules="all-linear", rank=2))
    assert unreached(model) == ({}, 0)  # adapted, too
    bits = weight_bits(compress(tiny(kind), "rtn-4"))
    assert 4 < bits < 5.5


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("scheme", ("rtn-4", "magnitude-0.5"))
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_not_compressed(kind, scheme):
    model = tiny(kind)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    _, part = unreached(model)
    with pytest.raises(ValueError, match=rf"{part:.0%} of the weights .*'model.layers.0.mlp.experts.gate_up_proj'"):
        compress(model, scheme)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not adapter_state(model).compressed


@pytest.mark.attack("silent error")
def test_bits_count_what_stays_as_it_was():
    "A layer that all-linear does not reach, an eighth of the weights, counts with its 32 bits."
    model = tiny("Llama")
    fused = torch.nn.Parameter(torch.randn(1, 32, 32))
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    model.model.layers[0].mlp.fused = torch.nn.ParameterList([fused])
    alone = weight_bits(compress(tiny("Llama"), "rtn-4"))
    bits = weight_bits(compress(model, "rtn-4"))
    assert bits == pytest.approx((alone * linear + 32 * fused.numel()) / (linear + fused.numel()))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("scheme", ["rtn-4", "magnitude-0.5"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_compressed(llama, scheme, value):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(FloatingPointError, match="layers.1.mlp.up_proj"):
        compress(model, scheme)
