"Models of PEFT with the fast layers: outputs, gradients and everything around them must be PEFT's."

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import dora as peft_dora
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from dora_nb import accelerate, restore
from dora_nb.models import peft as fast

EXTRAS = Path(sys.prefix) / "extras"  # quantised layers and TRL are installed there, if at all
METHODS = ("lora", "dora")


@pytest.fixture
def pefts_dropout(monkeypatch):
    "Draws what PEFT's dropout would, so that results can be compared number by number."

    def draw(x, p, dtype):
        return (F.dropout(torch.ones(x.shape, dtype=dtype), p) == 0).flatten().nonzero()[:, 0]

    monkeypatch.setattr(fast, "_draw", draw)


@pytest.fixture
def used(monkeypatch):
    "Counts the fast forward passes."
    calls, own = [], fast._forward
    monkeypatch.setattr(fast, "_forward", lambda *args: calls.append(args[1]) or own(*args))
    return calls


class Net(nn.Module):
    "Two layers, the second wider, with a head of its own."

    def __init__(self, conv1d=False, inplace=False):
        super().__init__()
        linear = (lambda i, o: Conv1D(o, i)) if conv1d else nn.Linear
        self.a, self.b, self.head = linear(32, 48), linear(48, 40), nn.Linear(40, 8)
        self.act = nn.ReLU(inplace=True) if inplace else nn.Tanh()

    def forward(self, x):
        return self.head(self.b(self.act(self.a(x))))


def shaken(model):
    "Moves every adapter away from its start."
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
        elif "magnitude" in name:
            p.data *= 0.5 + torch.rand_like(p)
    return model


def make(method="dora", dtype=torch.float32, conv1d=False, inplace=False, **options):
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=6, target_modules=["a", "b"], use_dora=method == "dora", fan_in_fan_out=conv1d)
    keep = options.pop("autocast_adapter_dtype", True)
    net = Net(conv1d, inplace).to(dtype)
    return shaken(get_peft_model(net, LoraConfig(**settings | options), autocast_adapter_dtype=keep)).train()


def inputs(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.randn(3, 20, 32, dtype=dtype)


def results(model, x=None, seed=4, **kwargs):
    "The output and every gradient, by name."
    x = (inputs() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x, **kwargs)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def same(theirs, ours, tolerance=2e-6):
    "Equal to rounding, relative to each tensor's largest entry."
    assert theirs.keys() == ours.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype
        assert (ours[name] - t).abs().max() <= tolerance * t.abs().max() + 1e-12, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("bias", ("none", "all", "lora_only"))
@pytest.mark.parametrize("conv1d", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.1, 0.3))
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients(pefts_dropout, used, method, dropout, conv1d, bias, dtype):
    model, x = make(method, dtype, conv1d, lora_dropout=dropout, bias=bias), inputs(dtype)
    theirs = results(model, x)
    assert not used
    same(theirs, results(accelerate(model), x), 2e-6 if dtype == torch.float32 else 1e-12)
    assert len(used) == 2
    model.eval()
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, restore(model)(x))
    assert len(used) == 3 + 1


@pytest.mark.parametrize("tokens", (1, 7, 300))  # row factors go to the smaller matrix
@pytest.mark.parametrize("options", (dict(r=40), dict(use_rslora=True), dict(lora_alpha=0)), ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_other_settings(pefts_dropout, method, options, tokens):
    model = make(method, lora_dropout=0.05, **options)
    x = torch.randn(tokens, 32)
    same(results(model, x), results(accelerate(model), x))


@pytest.mark.parametrize("method", METHODS)
def test_no_token_and_one_vector(method):
    model = accelerate(make(method, lora_dropout=0.1))
    assert model(torch.randn(0, 32)).shape == (0, 8) and model(torch.randn(32)).shape == (8,)


def test_dropout_of_our_own_drawing_has_the_right_mean():
    model = accelerate(make("dora", lora_dropout=0.1))
    x = inputs()[:1, :1]
    with torch.no_grad():
        layer = model.base_model.model.a
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, layer.eval()(x), atol=0.03, rtol=0)


# bfloat16, float16 and autocast: PEFT's own error against float64 is the measure


def errors(model, x, reference, autocast=None):
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        got = results(model, x)
    norm = lambda t: t.double().norm().item()
    return {n: norm(got[n].double() - t) / norm(t) for n, t in reference.items()}


@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize(
    "dtype,autocast,keep",
    [
        (torch.bfloat16, None, True),
        (torch.bfloat16, None, False),
        (torch.float16, None, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_low_precision(pefts_dropout, used, method, dtype, autocast, keep, dropout):
    model, x = make(method, dtype, lora_dropout=dropout, autocast_adapter_dtype=keep), inputs(dtype)
    exact = copy.deepcopy(model).double()
    reference = results(exact, x.double())
    theirs = errors(model, x, reference, autocast)
    ours = errors(accelerate(model), x, reference, autocast)
    assert len(used) == 2
    for name, error in theirs.items():
        assert ours[name] <= 1.3 * error + 1e-7, (name, ours[name], error)


# Everything around the layers


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_several_adapters(pefts_dropout, used, first, second, dropout):
    model = accelerate(make(first, lora_dropout=dropout))
    config = LoraConfig(r=3, target_modules=["a", "b"], use_dora=second == "dora", lora_dropout=dropout)
    model.add_adapter("second", config)  # fast at once
    shaken(model)
    for active in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(active)
        used.clear()
        ours = results(model)
        assert used == [active, active]
        same(results(restore(model)), ours)
        accelerate(model)
    model.delete_adapter("second")
    model.set_adapter("default")
    same(results(model), results(restore(model)))


@pytest.mark.parametrize("safe", (False, True))
@pytest.mark.parametrize("method", METHODS)
def test_merging(method, safe):
    x, plain, model = inputs(), make(method).eval(), accelerate(make(method).eval())
    before = model(x)
    for m in (plain, model):
        m.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    for m in (plain, model):
        m.unmerge_adapter()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(x), before, atol=1e-5, rtol=1e-5)
    assert type(merged.a) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
def test_disabling_and_unloading(method):
    model, x = make(method), inputs()
    base = copy.deepcopy(model).unload()(x)
    with accelerate(model).disable_adapter():
        assert torch.equal(model(x), base)
    assert not torch.allclose(model(x), base, atol=1e-2)
    assert torch.equal(model.unload()(x), base)


def test_batches_that_mix_adapters(used):
    model = make("lora").eval()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["a"]))
    names, x = ["default", "__base__", "second"], inputs()
    expected = shaken(model)(x, adapter_names=names)
    torch.testing.assert_close(accelerate(model)(x, adapter_names=names), expected)
    assert not used


@pytest.mark.parametrize("method", METHODS)
def test_files_and_modules_to_save(tmp_path, method):
    model = make(method, modules_to_save=["head"])
    model.save_pretrained(tmp_path / "theirs")
    accelerate(model).save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
    torch.manual_seed(0)
    loaded = accelerate(PeftModel.from_pretrained(Net(), tmp_path / "ours", is_trainable=True)).train()
    same(results(restore(model)), results(loaded))


def test_hot_swapping(tmp_path):
    other = make("lora", init_lora_weights="gaussian")  # PEFT cannot swap DoRA's
    other.save_pretrained(tmp_path)
    model = accelerate(make("lora").eval())
    for p in model.parameters():
        p.data.mul_(0.9 if p.requires_grad else 1)
    model(inputs())
    hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    torch.testing.assert_close(model(inputs()), other.eval()(inputs()))


@pytest.mark.parametrize("write", ("copy_", "load_state_dict", "optimizer", "set_scale"))
def test_no_scale_is_stale(write):
    "However a weight changes, the next forward pass sees it."
    model, plain = accelerate(make()), make()
    model(inputs())
    for m in (model, plain):
        m(inputs()).square().sum().backward()
        if write == "copy_":
            for p in m.parameters():
                p.data.copy_(p.data * 1.1)  # leaves no trace in the tensor's version
        elif write == "load_state_dict":
            m.load_state_dict({k: v * 0.7 for k, v in m.state_dict().items()})
        elif write == "optimizer":
            torch.optim.AdamW(m.parameters(), lr=0.05).step()
        else:
            m.base_model.model.a.set_scale("default", 3)
    torch.testing.assert_close(model(inputs()), plain(inputs()), atol=1e-5, rtol=1e-5)


def test_pefts_cache_of_norms(monkeypatch, used):
    monkeypatch.setattr(peft_dora, "ENABLE_DORA_CACHING", True)
    model, norms, own = accelerate(make().eval()), [], fast.factored_norm
    monkeypatch.setattr(fast, "factored_norm", lambda *args: norms.append(args) or own(*args))
    expected = restore(copy.deepcopy(model))(inputs())
    for _ in range(2):
        torch.testing.assert_close(model(inputs()), expected)
    assert len(norms) == 2  # one per layer
    model.train()(inputs())
    assert len(norms) == 4


@pytest.mark.parametrize("way", ("deepcopy", "pickle", "save"))
def test_copies(tmp_path, way, used):
    model = accelerate(make())
    if way == "deepcopy":
        new = copy.deepcopy(model)
    elif way == "pickle":
        new = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        new = torch.load(tmp_path / "model.pt", weights_only=False)
    used.clear()
    ours = results(new)
    assert len(used) == 2
    same(results(restore(model)), ours)


def test_a_layer_is_what_it_was():
    model, plain = accelerate(make()), make()
    assert accelerate(model) is model and repr(model) == repr(plain)
    layer = model.base_model.model.a
    assert isinstance(layer, PeftLinear) and type(layer).__name__ == "Linear"
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(type(m) is type(n) for m, n in zip(restore(model).modules(), plain.modules()))
    assert type(restore(model).base_model.model.a) is PeftLinear


def test_a_model_without_such_layers():
    with pytest.raises(ValueError, match="no linear layer with a LoRA or DoRA adapter.*get_peft_model"):
        accelerate(Net())
    assert restore(net := Net()) is net


def test_without_peft(monkeypatch):
    for name in [n for n in sys.modules if n == "peft" or n.startswith("peft.")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("dora_nb.models.again", fast.__file__)
    with pytest.raises(ImportError, match="pip install 'peft>=0.18'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Where PEFT's own forward pass is needed


@pytest.mark.parametrize("method", METHODS)
def test_compilers_and_transformations(used, method):
    model, x = make(method), inputs()
    expected = model(x).detach()
    accelerate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=method == "lora")  # PEFT's DoRA breaks its graph itself
    torch.testing.assert_close(compiled(x), expected)
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss = lambda values, x: torch.func.functional_call(model, values, (x,)).square().sum()
    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    name = next(n for n in params if "lora_A" in n)
    whole = torch.autograd.grad(restore(model)(x).square().sum(), [dict(model.named_parameters())[name]])[0]
    torch.testing.assert_close(rows[name].sum(0), whole, atol=1e-3, rtol=1e-4)
    accelerate(model)
    _, tangent = torch.func.jvp(model, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent, tangent)
    assert not used


@pytest.mark.parametrize("where", ("lora_A.default", "lora_dropout.default", "lora_magnitude_vector.default"))
def test_hooks_inside_a_layer_are_called(where):
    model, calls = make(lora_dropout=0.1), []
    model.base_model.model.a.get_submodule(where).register_forward_hook(lambda *args: calls.append(args))
    model(inputs())
    assert (expected := len(calls))
    accelerate(model)(inputs())
    assert len(calls) == 2 * expected


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_base_layer_change_its_output(pefts_dropout, used, method):
    "The base layer is then a black box, as a quantised one is."
    for dropout in (0.0, 0.1):
        model = make(method, lora_dropout=dropout)
        model.base_model.model.a.base_layer.register_forward_hook(lambda m, args, y: 2 * y)
        theirs = results(model)
        used.clear()
        same(theirs, results(accelerate(model)))
        assert len(used) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_a_base_that_is_trained_too(pefts_dropout, method, dropout):
    model = make(method, lora_dropout=dropout)
    model.base_model.model.a.base_layer.weight.requires_grad_()
    same(results(model), results(accelerate(model)))


def test_a_bias_of_the_update_stays_pefts(used):
    model = make("lora", lora_bias=True)
    nn.init.normal_(model.base_model.model.a.lora_B["default"].bias)
    same(results(model), results(accelerate(model)), 0)
    assert not used


def test_other_variants_stay_pefts(used):
    model = make("lora")
    layer = model.base_model.model.a
    layer.lora_variant["default"] = type(
        "Other", (fast.DoraLinearVariant,), {"forward": lambda *a, result, **k: result}
    )()
    accelerate(model)(inputs())
    assert len(used) == 1  # the other layer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_derivatives_of_second_order(pefts_dropout, method, dropout):
    model, found = make(method, torch.float64, lora_dropout=dropout), []
    for _ in range(2):
        x = inputs(torch.float64).requires_grad_()
        torch.manual_seed(0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(x).square().sum(), [x, *parameters], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters]))
        accelerate(model)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(method, reentrant):
    model = accelerate(make(method, lora_dropout=0.1))
    expected, own = results(model), model.base_model.model.forward
    model.base_model.model.forward = lambda x: torch.utils.checkpoint.checkpoint(own, x, use_reentrant=reentrant)
    same(expected, results(model), 1e-7)


def test_an_output_may_be_changed_in_place():
    model = make("dora", inplace=True)
    same(results(model), results(accelerate(model)))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parts(method):
    model = make(method)
    for name, p in model.named_parameters():
        if "lora_A" in name or "magnitude" in name:
            p.requires_grad_(False)
    same(results(model), results(accelerate(model)))


@pytest.mark.long
def test_trainer(llama, tmp_path):
    "The losses of a short training are PEFT's."
    data = [dict(input_ids=(row := torch.randint(0, 128, (12,))), labels=row) for _ in range(16)]

    def losses(prepare):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
        model = prepare(get_peft_model(llama(), config))
        args = TrainingArguments(
            tmp_path, max_steps=6, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True,
            gradient_checkpointing=True, per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    theirs, ours = losses(lambda m: m), losses(accelerate)
    assert len(theirs) == 6 and theirs == pytest.approx(ours, abs=2e-4) and theirs[-1] < theirs[0]


QUANTISED = """
    import copy, sys, warnings
    warnings.simplefilter("ignore")
    kind, method, dropout = sys.argv[1], sys.argv[2], float(sys.argv[3])
    import torch
    from torch import nn
    from peft import LoraConfig, get_peft_model
    from dora_nb import accelerate, restore
    from dora_nb.models import peft as fast

    draw = lambda x, p, dtype: (nn.functional.dropout(torch.ones(x.shape, dtype=dtype), p) == 0).flatten().nonzero()[:, 0]
    fast._draw = draw
    calls, own = [], fast._forward
    fast._forward = lambda *args: calls.append(1) or own(*args)
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "4bit" else torch.bfloat16
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(net, Int8WeightOnlyConfig())
    else:
        import bitsandbytes as bnb
        new = dict(
            zip(("4bit", "8bit"), (
                lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=dtype, quant_type="nf4"),
                lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, threshold=6.0),
            ))
        )[kind]
        for k in (0, 2):
            layer, weights = new(net[k].in_features, net[k].out_features), net[k].state_dict()
            layer.load_state_dict(weights)
            net[k] = layer.to("cpu")
        setattr(net, f"is_loaded_in_{kind}", True)
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"], use_dora=method == "dora", lora_dropout=dropout))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    assert kind in ("int8",) or type(model.base_model.model[0]).__name__.startswith("Linear" + kind[0])

    def run():
        torch.manual_seed(1)
        x = torch.randn(30, 64, dtype=dtype, requires_grad=True)
        y = model.train()(x)
        y.backward(torch.randn_like(y))
        out = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return out

    theirs = run()
    accelerate(model)
    ours = run()
    assert len(calls) == 2 and theirs.keys() == ours.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, t in theirs.items():
        assert (ours[name] - t).abs().max() <= tolerance * t.abs().max(), (name, (ours[name] - t).abs().max(), t.abs().max())
    if kind != "int8":
        with torch.no_grad():
            model.eval()
            x = torch.randn(5, 64, dtype=dtype)
            plain = copy.deepcopy(model) if kind == "4bit" else None
            model.merge_adapter()
            if plain is not None:
                restore(plain).merge_adapter()
                assert torch.equal(plain(x), model(x))
            model.unmerge_adapter()
            model(x)
    print("same")
"""


def with_extras(program, *args):
    "Runs a program that may import what is installed beside the environment."
    path = os.pathsep.join([str(Path(fast.__file__).parents[2]), str(EXTRAS)])
    command = [sys.executable, "-c", textwrap.dedent(program), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=600)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("dropout", ("0.0", "0.1"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind,package", [("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"), ("int8", "torchao")])
def test_quantised_bases(kind, package, method, dropout):
    if (kind, method) == ("8bit", "dora"):
        pytest.skip("PEFT's own DoRA over eight bits fails in its second forward pass on a CPU")
    if not (EXTRAS / package).exists() and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    with_extras(QUANTISED, kind, method, dropout)


SFT = """
    import sys, torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from dora_nb import accelerate

    def losses(prepare):
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        model = LlamaForCausalLM.from_pretrained(sys.argv[1])
        model = prepare(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=True)))
        args = SFTConfig(sys.argv[2], max_steps=3, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
                         save_strategy="no", disable_tqdm=True, max_length=32)
        data = Dataset.from_dict({"text": ["the answer is yes"] * 16})
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    a, b = losses(lambda m: m), losses(accelerate)
    assert len(a) == 3 and all(abs(x - y) < 1e-3 for x, y in zip(a, b)), (a, b)
    print("same")
"""


@pytest.mark.long
def test_trl(tiny_model_dir, tmp_path):
    if not (EXTRAS / "trl").exists() and not importlib.util.find_spec("trl"):
        pytest.skip("trl is not installed")
    with_extras(SFT, str(tiny_model_dir), str(tmp_path))
