"PEFT's words mean what they mean in PEFT: starts, layers that are left out, files of other versions, LoraConfig."

import copy
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_nb.curvature.components import components
from dora_nb.curvature.rank_search import open_gates
from dora_nb.data.tasks import load_task
from dora_nb.layers.linear import DoRALinear, LoRALinear
from dora_nb.layers.starts import STARTS, SUBTRACTED
from dora_nb.models.adapt import adapt, adapter_layers, adapter_state, trainable_parameters
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.base_checksum import base_checksum
from dora_nb.models.compress import compress
from dora_nb.models.merge import merge, remove_adapter, unmerge
from dora_nb.models.methods import AdapterConfig, narrowing
from dora_nb.models.peft_config import from_peft
from dora_nb.models.peft_format import BIN, CONFIG, WEIGHTS
from dora_nb.models.targets import find_targets, narrowed
from dora_nb.runs.config import RunConfig
from dora_nb.runs.run import run
from dora_nb.training.evaluate import evaluate

TARGETS = ["q_proj", "v_proj", "down_proj"]
SLOW = r"(.*)(.*)(.*)[^a-z0-9_.]x?"
close = dict(atol=1e-5, rtol=1e-4)


def peft_model(model, seed=2, move=True, **settings):
    "A model that PEFT adapted; its adapter is moved away from its start."
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**dict(r=4, lora_alpha=12, target_modules=TARGETS) | settings))
    for p in model.parameters():
        if move and p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    return model.eval()


def moved(model, seed=1):
    "Moves every trained parameter a little; a start from the weights stays near."
    torch.manual_seed(seed)
    for p in trainable_parameters(model).values():
        p.data.add_(0.05 * torch.randn_like(p))
    return model


def edit_config(folder, **changes):
    path = Path(folder) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def word_in(folder):
    return json.loads((Path(folder) / CONFIG).read_text())["init_lora_weights"]


# --- what a start is


@pytest.mark.parametrize("rank", (4, 16, 64))
def test_gaussian_has_two_meanings_and_two_names(rank):
    torch.manual_seed(0)
    std = {i: LoRALinear(nn.Linear(512, 8), rank, init=i).lora_A.std().item() for i in ("gaussian", "peft_gaussian")}
    model = nn.Sequential(nn.Linear(512, 8))
    theirs = inject_adapter_in_model(LoraConfig(r=rank, target_modules=["0"], init_lora_weights="gaussian"), model)
    assert abs(std["peft_gaussian"] / theirs[0].lora_A["default"].weight.std().item() - 1) < 0.1
    assert abs(std["gaussian"] / 0.01 - 1) < 0.1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rslora", (False, True))
@pytest.mark.parametrize("start,use_dora", [(s, d) for s in SUBTRACTED for d in (False, True)] + [("mica", False)])
def test_starts_from_the_weights_are_pefts(start, use_dora, rslora, dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(24, 40, dtype=dtype), torch.randn(5, 24, dtype=dtype)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=start, use_dora=use_dora, use_rslora=rslora
    )
    theirs = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)))[0]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    ours = (DoRALinear if use_dora else LoRALinear)(copy.deepcopy(base), 4, 12, init=start, rslora=rslora)
    exact = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.03, rtol=0.03)
    torch.testing.assert_close(ours.lora_A, A.float(), **exact)
    torch.testing.assert_close(ours.lora_B, B.float(), **exact)
    assert ours.lora_B.requires_grad == B.requires_grad == (start != "mica")
    assert torch.equal(ours.base_layer.weight, base.weight)
    torch.testing.assert_close(ours(x), base(x), **exact)
    torch.testing.assert_close(ours(x), theirs(x), **exact)


def test_the_orthogonal_start_is_pefts_in_distribution():
    torch.manual_seed(0)
    ours = LoRALinear(nn.Linear(600, 400), 16, init="orthogonal")
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(600, 400)))[0]
    for mine, weight in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
        assert abs(mine.std().item() / weight["default"].weight.std().item() - 1) < 0.05
    torch.testing.assert_close(ours.lora_B @ ours.lora_A, torch.zeros(400, 600), atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", ("pissa", "olora", "mica", "orthogonal"))
def test_ranks_that_a_start_does_not_allow(llama, init):
    rank = 5 if init == "orthogonal" else 65
    model = llama()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"init='{init}' needs a"):
        adapt(model, AdapterConfig("lora", rank=rank, init=init))
    assert before == {n: p.requires_grad for n, p in model.named_parameters()} and not adapter_layers(model)


def test_dora_does_not_freeze_b():
    "PEFT has no such combination either."
    with pytest.raises(ValueError, match="init='mica' does not go with method='dora'; it needs lora"):
        AdapterConfig("dora", init="mica")
    with pytest.raises(ValueError, match="variant combination"):
        peft_model(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"], init_lora_weights="mica", use_dora=True)


# --- a start that is subtracted


@pytest.mark.parametrize("init", SUBTRACTED)
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("cls,form", [(LoRALinear, None), (DoRALinear, "delta"), (DoRALinear, "lowrank")])
def test_outputs_and_gradients_are_those_of_the_changed_weight(cls, form, init, dropout):
    "The independent implementation: an ordinary layer over the weight without the start, as PEFT has it."
    torch.manual_seed(0)
    options = dict(dropout=dropout) | ({"dropout_form": form} if form else {})
    base = nn.Linear(24, 40, dtype=torch.float64)
    ours = cls(copy.deepcopy(base), 4, 12, init=init, **options)
    for p in (ours.lora_A, ours.lora_B):
        p.data += 0.1 * torch.randn_like(p)
    base.weight.data -= ours.scaling * ours.start_B @ ours.start_A
    plain = cls(base, 4, 12, **options)
    plain.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if "base" not in k and "start" not in k}, strict=False
    )
    dy = torch.randn(5, 40, dtype=torch.float64)
    for plan in ("plain", "factored", "dense"):
        results = []
        for layer in (ours, plain):
            layer.plan = "plain" if dropout else plan
            torch.manual_seed(1)
            x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            results.append([y := layer(x), *torch.autograd.grad((y * dy).sum(), leaves)])
        torch.testing.assert_close(*results)
    if dropout:  # the fast product is left aside, as only the trained part sees dropout
        ours.plan = "auto"
        assert not ours.fast() and ours.eval().fast()


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize("init", SUBTRACTED)
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(rslora=True),
        dict(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3}),
        dict(rslora=True, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3}),  # PEFT's conversion refuses it
    ],
    ids=str,
)
def test_a_subtracted_start_is_saved_for_the_original_model(llama, ids, tmp_path, method, init, settings):
    config = AdapterConfig(method, rank=4, alpha=12, target_modules=TARGETS, init=init, **settings)
    model, plain = llama(), llama()(ids).logits
    digest = base_checksum(model)
    torch.testing.assert_close(adapt(model, config)(ids).logits, plain, **close)
    trained = moved(model)(ids).logits
    assert not torch.allclose(trained, plain, atol=1e-2) and base_checksum(model) == digest

    save_adapter(model, tmp_path)
    assert word_in(tmp_path) is True
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, trained, **close)
    again = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(again(ids).logits, trained, **close)
    found = adapter_state(again).config
    assert found.init == "kaiming" and found.rank == 8
    torch.testing.assert_close(merge(again)(ids).logits, trained, **close)

    torch.testing.assert_close(merge(model)(ids).logits, trained, **close)
    save_adapter(model, tmp_path / "merged")
    assert torch.equal(unmerge(model)(ids).logits, trained)
    both = [load_file(p / WEIGHTS) for p in (tmp_path, tmp_path / "merged")]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][k], both[1][k]) for k in both[0])
    weights = {k: v.clone() for k, v in remove_adapter(model).state_dict().items()}
    assert all(torch.equal(weights[k], v) for k, v in llama().state_dict().items())
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize("start", SUBTRACTED)
def test_pefts_file_with_a_subtracted_start(llama, ids, tmp_path, start, use_dora):
    "It holds the trained factors only; the start is computed again from the model, there and here."
    theirs = peft_model(llama(), init_lora_weights=start, use_dora=use_dora)
    theirs.save_pretrained(tmp_path / "theirs")
    assert word_in(tmp_path / "theirs") == start
    ours = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **close)
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    names = {n.replace("base_model.model.", "").replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    for name, p in trainable_parameters(ours).items():
        name = name.replace("magnitude", "lora_magnitude_vector")
        torch.testing.assert_close(p.grad, names[f"{name}.weight"], atol=1e-6, rtol=1e-3)
    save_adapter(ours, tmp_path / "ours")
    assert word_in(tmp_path / "ours") is True
    torch.testing.assert_close(
        PeftModel.from_pretrained(llama(), tmp_path / "ours")(ids).logits, ours(ids).logits, **close
    )


@pytest.mark.parametrize("start", SUBTRACTED)
def test_what_peft_converted_is_an_ordinary_adapter(llama, ids, tmp_path, start):
    theirs = peft_model(llama(), init_lora_weights=start, move=False)
    theirs.save_pretrained(tmp_path / "start")
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    torch.testing.assert_close(load_adapter(llama(), tmp_path / "end")(ids).logits, expected, **close)


def test_a_started_model_is_copied_and_moved(llama, ids):
    model = moved(adapt(llama(), AdapterConfig("dora", rank=4, init="pissa", target_modules=TARGETS)))
    expected = model(ids).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids).logits, expected)
    fresh = adapt(llama(), AdapterConfig("dora", rank=4, init="pissa", target_modules=TARGETS))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, expected)
    layer = next(iter(adapter_layers(model.to(torch.bfloat16)).values()))
    assert layer.start_A.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_start_over_a_compressed_model(llama, ids, tmp_path, method):
    "PEFT cannot replace such a weight; a second update needs no other one."
    model = compress(llama(), "rtn-8")
    plain = model(ids).logits
    adapt(model, AdapterConfig(method, rank=4, init="pissa", target_modules=TARGETS))
    torch.testing.assert_close(model(ids).logits, plain, **close)
    trained = moved(model)(ids).logits
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(compress(llama(), "rtn-8"), tmp_path)(ids).logits, trained, **close)
    assert torch.equal(remove_adapter(model)(ids).logits, plain)


def test_only_a_and_b_are_trained_after_a_start(llama, ids):
    model = adapt(llama(), AdapterConfig("lora", rank=4, init="pissa", target_modules=TARGETS))
    before = {n: b.clone() for n, b in model.named_buffers() if "start" in n}
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert model(ids, labels=ids).loss < first
    assert before and all(torch.equal(dict(model.named_buffers())[n], b) for n, b in before.items())


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("init", SUBTRACTED)
def test_what_splits_an_update_takes_no_subtracted_start(llama, tmp_path, init):
    "Saved and loaded, the start is a part of the update, and is split too."
    model = moved(adapt(llama(), AdapterConfig("lora", rank=3, init=init, target_modules=["q_proj"])))
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    for work in (lambda: components(layer), lambda: open_gates(model)):
        with pytest.raises(ValueError, match="a start is subtracted.*save the adapter and load it"):
            work()
    save_adapter(model, tmp_path)
    again = adapter_layers(load_adapter(llama(), tmp_path))["model.layers.0.self_attn.q_proj"]
    change = components(again)
    torch.testing.assert_close(
        (change.B @ change.A).float(), layer.merged_weight() - layer.base_layer.weight, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="allocate .* cannot be combined with .*pissa"):
        RunConfig(method="lora", init=init, allocate="gates")


@pytest.mark.long
@pytest.mark.parametrize("method,init", [("lora", "pissa"), ("dora", "olora"), ("lora", "mica")])
def test_a_run_with_a_start(tiny_model_dir, tmp_path, method, init):
    "Its stored adapter gives the accuracy that the run measured."
    config = RunConfig("boolq", method, str(tiny_model_dir), rank=4, init=init, train_items=32, eval_items=20)
    result = run(replace(config, precision="float32", learning_rate=1e-2), tmp_path, progress=False)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "adapter")
    items = load_task("boolq", "validation", limit=20)
    metrics, _ = evaluate(model, AutoTokenizer.from_pretrained(tiny_model_dir), items, progress=False)
    assert metrics["acc"] == result["metrics"]["acc"] and metrics["n"] == 20


# --- which word stands for a start in a file


WORDS = {"kaiming": True, "gaussian": True, "peft_gaussian": "gaussian", "orthogonal": "orthogonal", "mica": "mica"}


@pytest.mark.parametrize("init", STARTS)
def test_our_word_there_and_back(llama, ids, tmp_path, init):
    "Through our file it stays what it is; through PEFT, it stays what PEFT has a word for."
    model = moved(adapt(llama(), AdapterConfig("lora", rank=4, alpha=12, target_modules=TARGETS, init=init)))
    expected = model(ids).logits
    save_adapter(model, tmp_path / "ours")
    assert word_in(tmp_path / "ours") == WORDS.get(init, True)
    again = load_adapter(llama(), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, expected, **close)
    assert adapter_state(again).config.init == (init if init in WORDS else "kaiming")
    frozen = [n for n, p in again.named_parameters() if n.endswith("lora_B") and not p.requires_grad]
    assert bool(frozen) == (init == "mica")

    theirs = PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True)
    assert [p.requires_grad for n, p in theirs.named_parameters() if "lora_B" in n] == [init != "mica"] * 6
    theirs.save_pretrained(tmp_path / "theirs")
    assert word_in(tmp_path / "theirs") == WORDS.get(init, True)
    back = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(back(ids).logits, expected, **close)
    assert adapter_state(back).config.init == (init if WORDS.get(init, True) is not True else "kaiming")


@pytest.mark.parametrize(
    "word,use_dora",
    [(word, d) for word in (True, False, "gaussian", "Gaussian", "orthogonal") for d in (False, True)]
    + [("mica", False)],
)
def test_pefts_word_there_and_back(llama, ids, tmp_path, word, use_dora):
    theirs = peft_model(llama(), init_lora_weights=word, use_dora=use_dora)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **close)
    save_adapter(ours, tmp_path / "ours")
    assert word_in(tmp_path / "ours") == (word.lower() if isinstance(word, str) else True)
    back = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, **close)


def test_a_word_that_was_changed_in_the_file_counts(llama, tmp_path):
    "Our metadata speaks only where PEFT has no word."
    save_adapter(adapt(llama(), AdapterConfig("lora", rank=4, init="gaussian")), tmp_path)
    assert adapter_state(load_adapter(llama(), tmp_path)).config.init == "gaussian"
    edit_config(tmp_path, init_lora_weights="gaussian")
    assert adapter_state(load_adapter(llama(), tmp_path)).config.init == "peft_gaussian"


@pytest.mark.parametrize("fields", [dict(eva_config={"rho": 2.0}), dict(eva_config=None)], ids=str)
def test_eva_is_over_once_it_is_saved(llama, ids, tmp_path, fields):
    theirs = peft_model(llama())
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, init_lora_weights="eva", **fields)
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(ids).logits, theirs(ids).logits, **close)


@pytest.mark.parametrize(
    "fields,why",
    [
        (dict(init_lora_weights="pissa_niter_16"), "random approximation.*path_initial_model_for_weight_conversion"),
        (dict(init_lora_weights="corda", corda_config={}), "depends on data.*path_initial_model_for_weight_conversion"),
        (
            dict(init_lora_weights="lora_ga", lora_ga_config={"direction": "ArBr"}),
            "depends on gradients.*path_initial_model_for_weight_conversion",
        ),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "quantised.*merge_and_unload"),
        (dict(init_lora_weights="unheard"), "init_lora_weights='unheard' is unknown here.*merge_and_unload"),
        (dict(init_lora_weights=["pissa"]), "unknown here"),
        (dict(init_lora_weights=1), "unknown here"),
        (dict(target_parameters=["experts.down_proj"]), "target_parameters=.*fused experts.*merge_and_unload"),
    ],
    ids=str,
)
def test_what_changed_the_base_for_good_is_refused_by_name(llama, tmp_path, fields, why):
    peft_model(llama()).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    model = llama()
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{why}"):
        load_adapter(model, tmp_path)
    assert not adapter_layers(model)


# --- which layers are left out


class Nest(nn.Module):
    "Layers within layers, as in a mixture of experts, a list called h, and a layer outside every list."

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict(
            {"attn": nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}), "experts": nn.ModuleList()}
        )
        self.layers = nn.ModuleList(block() for _ in range(3))
        for layer in self.layers:
            layer["experts"].extend(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))
        self.h = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))
        self.inner = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))})
        self.q = nn.Linear(4, 4)


EXCLUDES = [None, [], ["v"], ["attn.q", "1.q"], ["q"], ["layers.0.attn.q", "nothing"], r".*\.1\..*", "q", r"h\..*|.*v"]
LAYERS = [None, [], 0, [1, 2], [0, 7], 7]
PATTERNS = [None, "layers", ["experts", "layers"], ["layers", "experts"], r"lay.*", ["inner.layers"], "nope"]
TARGETED = [["q"], ["q", "v"], ["layers.2.attn.q", "v"], ["attn.q"], ["q", "layers.0.experts.1.q"]]


@pytest.mark.parametrize("targets", [*TARGETED, r".*attn\.q", "all-linear"], ids=str)
@pytest.mark.parametrize("exclude", EXCLUDES, ids=str)
def test_layers_that_are_left_out_are_those_of_peft(targets, exclude):
    "Every combination: the same layers, or refused by both."
    for layers in LAYERS:
        for patterns in PATTERNS if layers not in (None, []) else [None]:
            options = dict(exclude_modules=exclude, layers_to_transform=layers, layers_pattern=patterns)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # PEFT refuses layers with "all-linear", which means the same as the list of their names
                listed = ["q", "v"] if targets == "all-linear" and layers is not None else targets
                try:
                    config = LoraConfig(r=2, target_modules=listed, **options)
                    theirs = inject_adapter_in_model(config, Nest())
                    theirs = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
                    if listed != targets and layers != []:  # a listed name that is a whole one is taken from no layer
                        theirs = theirs - {"q"} or None
                except ValueError:
                    theirs = None
            try:
                ours = AdapterConfig("lora", rank=2, target_modules=targets, **options)
                ours = set(find_targets(Nest(), ours.target_modules, **narrowing(ours)))
            except ValueError:
                ours = None
            if isinstance(listed, str) and layers == []:  # PEFT refuses the empty list too, which says nothing
                continue
            assert ours == theirs, options


@pytest.mark.parametrize("use_dora", (False, True))
@pytest.mark.parametrize(
    "options",
    [
        dict(layers_to_transform=0),
        dict(layers_to_transform=[1], layers_pattern="layers"),
        dict(layers_to_transform=[0, 1, 9], layers_pattern=["h", "layers"]),
        dict(exclude_modules=["layers.0.self_attn.q_proj"]),
        dict(exclude_modules=r".*\.1\..*q_proj|.*mlp.*", layers_to_transform=[1]),
        dict(exclude_modules=["lm_head", "down_proj", "nothing"], target_modules="all-linear"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*(matches no module|no module to adapt lies in layer 9)")
def test_layers_that_are_left_out_there_and_back(llama, ids, tmp_path, use_dora, options):
    theirs = peft_model(llama(), use_dora=use_dora, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **close)
    save_adapter(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        given = options.get(key)
        given = [given] if key == "layers_pattern" and isinstance(given, str) else given
        assert sorted(written[key]) == sorted(given) if isinstance(given, list) else written[key] == given
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        back = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, **close)
    assert torch.equal(load_adapter(llama(), tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_what_leaves_out_nothing_is_named(llama):
    with pytest.warns(UserWarning, match="exclude_modules: 'kproj' matches no module"):
        adapt(llama(), AdapterConfig(exclude_modules=["kproj"]))
    with pytest.warns(UserWarning, match="layers_to_transform: no module to adapt lies in layer 9"):
        adapt(llama(), AdapterConfig(layers_to_transform=[0, 9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(llama(), AdapterConfig(exclude_modules=["lm_head", "k_proj"], layers_to_transform=range(2)))


@pytest.mark.parametrize(
    "options,named",
    [
        (dict(layers_to_transform=-1), "layers_to_transform=-1"),
        (dict(layers_to_transform="0"), "layers_to_transform='0'"),
        (dict(layers_to_transform=[0, True]), "layers_to_transform=True"),
        (dict(layers_to_transform=0.5), "layers_to_transform=0.5"),
        (dict(layers_to_transform=0, target_modules=r".*q_proj"), "needs a list of target_modules"),
        (dict(layers_pattern="layers"), "without layers_to_transform"),
        (dict(layers_pattern="la(yers", layers_to_transform=0), "not a regular expression"),
        (dict(exclude_modules="q_(proj"), "not a regular expression"),
        (dict(exclude_modules=5), "exclude_modules=5 must be a list"),
        (dict(exclude_modules=["q_proj", 5]), "exclude_modules must hold names"),
    ],
    ids=str,
)
def test_impossible_layers(options, named):
    with pytest.raises(ValueError, match=named):
        AdapterConfig(**options)


@pytest.mark.attack("hang")
@pytest.mark.parametrize(
    "options", [dict(exclude_modules=SLOW), dict(layers_to_transform=0, layers_pattern=[SLOW])], ids=str
)
def test_expressions_that_take_too_long(monkeypatch, options):
    names = {f"model.layers.{i}.{'block_' * 30}q_proj" for i in range(5_000)}
    monkeypatch.setattr("dora_nb.models.names.SECONDS", 0.05)
    AdapterConfig(target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match="takes too long to match"):
        narrowed(names, ["q_proj"], **options)


# --- names and files of other versions

LAYOUTS = [
    ("lora_A.weight", "lora_A.default.weight"),
    ("lora_A.weight", "lora_A.my-adapter_2.weight"),
    ("lora_B.weight", "lora_B.other.weight"),
    ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    ("lora_magnitude_vector", "lora_magnitude_vector.default"),
    ("lora_magnitude_vector", "lora_magnitude_vector.other"),
    ("lora_magnitude_vector", "lora_magnitude_vector.other.weight"),
    ("base_model.model.", ""),
]


@pytest.mark.attack("crash")
@pytest.mark.parametrize("binary", (False, True))
@pytest.mark.parametrize("new,old", LAYOUTS, ids=str)
def test_layouts_of_other_versions(llama, shake, ids, tmp_path, new, old, binary):
    save_adapter(shake(adapt(llama(), AdapterConfig("dora", rank=3))), tmp_path)
    expected = load_adapter(llama(), tmp_path)(ids).logits
    tensors = {k.replace(new, old): v for k, v in load_file(tmp_path / WEIGHTS).items()}
    assert any(old in k for k in tensors) and tensors.keys() != load_file(tmp_path / WEIGHTS).keys()
    (tmp_path / WEIGHTS).unlink()
    if binary:
        torch.save(tensors, tmp_path / BIN)
    else:
        save_file(tensors, tmp_path / WEIGHTS)
    assert torch.equal(load_adapter(llama(), tmp_path)(ids).logits, expected)


def test_a_state_dict_of_a_model_without_a_wrapper(llama, ids, tmp_path):
    "As transformers holds it, whose add_adapter wraps nothing; the adapter has a name of its own."
    config = LoraConfig(r=4, target_modules=TARGETS, use_dora=True, init_lora_weights=False)
    torch.manual_seed(0)
    theirs = inject_adapter_in_model(config, llama(), adapter_name="mine").eval()
    save_file({k: v for k, v in theirs.state_dict().items() if "lora_" in k}, tmp_path / WEIGHTS)
    config.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(ids).logits, theirs(ids).logits, **close)


@pytest.mark.parametrize("use_dora", (False, True))
def test_pefts_older_format(llama, ids, tmp_path, use_dora):
    theirs = peft_model(llama(), use_dora=use_dora)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / BIN).exists() and not (tmp_path / WEIGHTS).exists()
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(ids).logits, theirs(ids).logits, **close)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"PK\x03\x04" + bytes(40),
        pickle.dumps(Evil()),
        {"lora": Evil()},
        [1, 2],
        {"name": 3},
        {5: torch.zeros(2)},
    ],
    ids=lambda c: str(c)[:20],
)
def test_older_files_that_are_damaged_or_hostile(llama, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    peft_model(llama()).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    if isinstance(content, bytes):
        (tmp_path / BIN).write_bytes(content)
    else:
        torch.save(content, tmp_path / BIN)
    with pytest.raises(ValueError, match=f"{BIN} is damaged"):
        load_adapter(llama(), tmp_path)
    assert not Path("evil").exists()


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("other", ("lora_A.weight", "lora_A.second.weight"))
def test_two_adapters_in_a_file(llama, tmp_path, other):
    peft_model(llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = {k.replace("lora_A.weight", "lora_A.first.weight"): v for k, v in tensors.items()}
    both = first | {k.replace("lora_A.weight", other): v + 1 for k, v in tensors.items() if "lora_A" in k}
    save_file(both, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds a tensor twice.*several adapters"):
        load_adapter(llama(), tmp_path)


def test_a_bias_of_b_is_no_adapter_called_bias(llama, tmp_path):
    peft_model(llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(k for k in tensors if "lora_B" in k)
    save_file(tensors | {name.replace("weight", "bias"): torch.zeros(4)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="lora_B.bias', for which this model or its configuration has no place"):
        load_adapter(llama(), tmp_path)


# --- the words of a configuration


@pytest.mark.parametrize(
    "word,hint",
    [
        ("r", "called rank here"),
        ("lora_alpha", "called alpha here"),
        ("lora_dropout", "called dropout here"),
        ("use_rslora", "called rslora here"),
        ("use_dora", "method='dora' or method='lora'"),
        ("init_lora_weights", "write init.*'peft_gaussian'"),
        ("target_parameters", "fused experts.*get_peft_model"),
        ("target_module", "did you mean 'target_modules'"),
        ("layer_pattern", "did you mean 'layers_pattern'"),
    ],
)
def test_unknown_words_are_answered(word, hint):
    with pytest.raises(TypeError, match=f"AdapterConfig has no '{word}'; .*{hint}"):
        AdapterConfig(**{word: 8})
    with pytest.raises(TypeError, match=hint):
        replace(AdapterConfig(), **{word: 8})


def test_a_configuration_stays_a_plain_dataclass():
    import inspect

    assert list(inspect.signature(AdapterConfig).parameters)[:3] == ["method", "rank", "alpha"]
    config = AdapterConfig("lora", 8, exclude_modules=["k_proj"], layers_to_transform=range(2))
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert again == config and hash(again) == hash(config)
    assert config.layers_to_transform == (0, 1) and config.exclude_modules == ("k_proj",)


LORA_CONFIGS = [
    dict(),
    dict(use_dora=True, lora_dropout=0.1),
    dict(
        use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 3}
    ),
    dict(target_modules="all-linear", exclude_modules=["down_proj"]),
    dict(target_modules=r".*\.1\..*_proj", use_dora=True),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", inference_mode=True),
    dict(init_lora_weights="gaussian"),
    dict(init_lora_weights="orthogonal", use_dora=True),
    dict(init_lora_weights="mica"),
    dict(init_lora_weights="pissa", use_dora=True),
    dict(init_lora_weights="olora"),
]


@pytest.mark.parametrize("settings", LORA_CONFIGS, ids=str)
def test_a_lora_config_is_taken(llama, ids, tmp_path, settings):
    "The same parameters as PEFT's, and with the same values the same outputs."
    theirs = peft_model(llama(), **dict(r=6, target_modules=None, task_type="CAUSAL_LM") | settings)
    ours = adapt(llama(), LoraConfig(**dict(r=6, lora_alpha=12, task_type="CAUSAL_LM") | settings)).eval()
    values = {n.replace("base_model.model.", "").replace(".default", ""): p for n, p in theirs.named_parameters()}
    learned = {n for n, p in values.items() if "lora_" in n}
    mine = {}
    for name, layer in adapter_layers(ours).items():
        for key, p in layer.named_parameters(recurse=False):
            mine[f"{name}.{key.replace('magnitude', 'lora_magnitude_vector')}.weight"] = p
    assert mine.keys() == learned
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(values[name])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **close)
    config = adapter_state(ours).config
    assert config.dropout == settings.get("lora_dropout", 0) and config.alpha == 12
    assert config.dropout_form == ("delta" if settings.get("use_dora") else "lowrank")


@pytest.mark.parametrize(
    "settings,named",
    [
        (dict(init_lora_weights="eva"), "cannot begin with init_lora_weights='eva' here. PEFT's get_peft_model"),
        (dict(init_lora_weights=False), "cannot begin with init_lora_weights=False"),
        (dict(init_lora_weights="lora_ga"), "cannot begin with init_lora_weights='lora_ga'"),
        (dict(target_parameters=["experts.down_proj"]), "LoraConfig: target_parameters.*get_peft_model.*accelerate"),
        (dict(lora_bias=True), "not supported here: lora_bias=True"),
        (dict(trainable_token_indices=[3]), "not supported here: trainable_token_indices"),
        (dict(layer_replication=[(0, 2)]), "not supported here: layer_replication"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*eva")
def test_a_lora_config_that_cannot_be_taken_is_refused_by_name(llama, settings, named):
    model = llama()
    with pytest.raises(ValueError, match=named):
        adapt(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))
    assert not adapter_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("config", ({"r": 4}, "dora", None, AdapterConfig), ids=str)
def test_what_is_no_configuration(llama, config):
    with pytest.raises(TypeError, match="adapt takes an AdapterConfig, or PEFT's LoraConfig, not"):
        adapt(llama(), config)


def test_a_model_that_peft_has_no_targets_for():
    with pytest.raises(ValueError, match="PEFT has no target_modules for a model of type None; name them"):
        adapt(nn.Sequential(nn.Linear(4, 4)), LoraConfig())


# --- fused experts


def mixtures():
    import transformers as hf

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, head_dim=16)
    qwen = dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts_per_tok=2)
    return {
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **sizes)),
        "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**qwen, **sizes)),
        "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=4, **sizes)),
    }


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("kind", ("mixtral", "qwen2_moe", "gpt_oss"))
def test_fused_experts_are_never_passed_over_in_silence(kind):
    make = mixtures()[kind]
    with pytest.warns(UserWarning, match="experts.gate_up_proj' is not adapted.*PEFT's target_parameters adapts them"):
        adapt(make(), AdapterConfig("lora", rank=2, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="experts.gate_up_proj' is not adapted"):  # without names, too
        adapt(make(), AdapterConfig("lora", rank=2))
    with pytest.raises(ValueError, match="experts.gate_up_proj' is a parameter.*PEFT's target_parameters"):
        adapt(make(), AdapterConfig("lora", rank=2, target_modules=["gate_up_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(make(), AdapterConfig("lora", rank=2, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("kind", ("mixtral", "qwen2_moe", "gpt_oss"))
def test_pefts_file_of_fused_experts_is_refused_by_name(tmp_path, kind):
    make = mixtures()[kind]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    get_peft_model(make(), config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="target_parameters=.*mlp.experts.gate_up_proj.*fused experts.*merge_and_unload"
    ):
        load_adapter(make(), tmp_path)


# --- merging and printing, as in PEFT's own tests


@pytest.mark.parametrize("init", ("kaiming", "pissa"))
@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize("targets", (["q_proj"], ["q_proj", "down_proj"], "all-linear"))
def test_merging_twice_warns_and_changes_nothing(llama, ids, method, targets, init):
    model = moved(adapt(llama(), AdapterConfig(method, rank=2, target_modules=targets, init=init)))
    once = merge(model)(ids).logits
    with pytest.warns(UserWarning, match="merged already; nothing was changed"):
        merge(model)
    assert torch.equal(model(ids).logits, once)


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize(
    "method,part,init",
    [(m, p, i) for m in ("lora", "dora") for p in ("lora_A", "lora_B") for i in ("kaiming", "pissa")]
    + [("dora", "magnitude", "kaiming"), ("lora", "start_A", "pissa")],
)
def test_merging_what_is_not_finite_names_the_layer(llama, ids, method, part, init, value):
    "PEFT raises with safe_merge, and else merges the NaN."
    model = moved(adapt(llama(), AdapterConfig(method, rank=2, target_modules=TARGETS, init=init)))
    layer = adapter_layers(model)["model.layers.1.self_attn.v_proj"]
    getattr(layer, part).data[0] = value
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for keep_base in (True, False):
        with pytest.raises(RuntimeError, match="layers.1.self_attn.v_proj' would not be finite once merged"):
            merge(model, keep_base)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.nan_to_num(before[k]), torch.nan_to_num(after[k])) for k in before)
    assert adapter_layers(model) and not adapter_state(model).merged


@pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
@pytest.mark.parametrize("init", ("kaiming", "pissa"))
def test_a_layer_is_printed_legibly(cls, init):
    text = repr(cls(nn.Linear(24, 40, bias=False), 4, 12, dropout=0.1, init=init))
    for part in (
        cls.__name__,
        "rank=4",
        "scaling=3",
        "(base_layer): Linear(in_features=24, out_features=40, bias=False)",
    ):
        assert part in text
    assert "(dropout): Dropout(p=0.1" in text and len(text.splitlines()) <= 6


def test_reading_and_writing_agree():
    "What `from_peft` reads from PEFT's own fields, with every default spelled out."
    fields = json.loads(json.dumps(LoraConfig(r=4, target_modules="q_proj", use_dora=True).to_dict(), default=list))
    assert from_peft(fields, "file") == AdapterConfig(
        "dora", rank=4, alpha=8, target_modules="q_proj", dropout_form="delta", modules_to_save=()
    )
