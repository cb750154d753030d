"A method and a benchmark from outside the package, from the layer to the page; and stored results whose method is unknown."

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_nb.data.tasks import TASKS, load_task, task_digest
from dora_nb.layers.linear import LoRALinear
from dora_nb.models.adapt import adapt, adapter_layers, adapter_state
from dora_nb.models.adapter_files import load_adapter, save_adapter
from dora_nb.models.merge import merge, remove_adapter, unmerge
from dora_nb.models.methods import METHODS, AdapterConfig, Method
from dora_nb.registry import Registry, announced
from dora_nb.results.collect import collect
from dora_nb.results.page import render
from dora_nb.runs.config import RunConfig
from dora_nb.runs.grid import RESULTS
from dora_nb.runs.run import run
from dora_nb.training.evaluate import evaluate

QUICK = Path(__file__).parents[1] / "reports" / "quick"
TOYS = """
"PiSSA (arXiv 2404.02948), and a benchmark of sums."

import torch
import torch.nn.functional as F

from dora_nb import METHODS, LoRALinear, Method, Task


class PiSSALinear(LoRALinear):
    "Start B and A from the leading singular vectors of W0, and freeze what is left of W0."

    def __init__(self, base_layer, rank, alpha, **options):
        super().__init__(base_layer, rank, alpha, **options)
        W0 = base_layer.weight.detach().float()
        U, S, V = torch.linalg.svd(W0, full_matrices=False)
        root = (S[:rank] / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_B.copy_(U[:, :rank] * root)
            self.lora_A.copy_(root[:, None] * V[:rank])
            rest = W0 - self.scaling * self.lora_B @ self.lora_A
        self.register_buffer("rest", rest, persistent=False)

    def plain(self, x):
        return F.linear(x, self.rest, self.bias) + self.update(self.dropout(x))

    def operands(self, x):
        return super().operands(x)._replace(W0=self.rest)

    def adapted_weight(self):
        return self.rest + self.scaling * (self.lora_B @ self.lora_A)


PISSA = Method(
    "pissa", "PiSSA", "C5", PiSSALinear, METHODS["lora"].options, {"use_dora": False, "init_lora_weights": "pissa"}
)


def sums(split):
    numbers = range(60) if split == "train" else range(60, 72)
    return [{"a": n, "sum": n + 1 + n % 2, "label": 1 - n % 2} for n in numbers]


def f1(items, records):
    "F1 of the answer that the sum is true."
    said, right = (sum(r[k] == 1 for r in records) for k in ("pred", "gold"))
    both = sum(r["pred"] == r["gold"] == 1 for r in records)
    assert [i["gold"] for i in items] == [r["gold"] for r in records]
    return {"f1": 2 * both / (said + right)}


SUMS = Task(
    "sums",
    "Sums",
    {"train": 60, "validation": 12},
    ("a", "sum"),
    ("false", "true"),
    lambda r: ([f"{r['a']} + 1 = {r['sum']}. True or false? Answer:"] * 2, [" false", " true"]),
    lambda r: f"Is {r['a']} + 1 = {r['sum']}?\\n\\nAnswer format: false/true",
    one_word=True,
    rows=sums,
    metric=f1,
)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    "Installs a package that announces the toys, as pip would, into a folder."
    folder = tmp_path_factory.mktemp("site")
    (folder / "toys.py").write_text(TOYS)
    (info := folder / "toys-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dora_nb.methods]\npissa = toys:PISSA\n\n[dora_nb.tasks]\nsums = toys:SUMS\n"
    )
    return folder


@pytest.fixture
def toys(package, monkeypatch):
    "Makes the package importable, and has the registries look again."
    monkeypatch.syspath_prepend(str(package))
    for registry in (METHODS, TASKS):
        monkeypatch.setitem(vars(registry), "_announced", announced(registry._group))
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_a_method_of_another_package(toys, llama, ids, tmp_path):
    model, config = llama(), AdapterConfig("pissa", rank=4, alpha=8, target_modules=["q_proj", "up_proj"])
    plain = model(ids).logits
    adapt(model, config)
    torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-4)
    assert {type(layer).__name__ for layer in adapter_layers(model).values()} == {"PiSSALinear"}
    loss = model(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():  # a step of plain gradient descent
        for layer in adapter_layers(model).values():
            layer.lora_A -= 0.5 * layer.lora_A.grad
            layer.lora_B -= 0.5 * layer.lora_B.grad
    trained = model(ids).logits
    assert model(ids, labels=ids).loss < loss and not torch.allclose(trained, plain)

    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    torch.testing.assert_close(load_adapter(llama(), tmp_path / "adapter")(ids).logits, trained)
    by_peft = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(by_peft(ids).logits, trained, atol=1e-5, rtol=1e-4)

    torch.testing.assert_close(merge(model)(ids).logits, trained, atol=1e-5, rtol=1e-4)
    assert torch.equal(unmerge(model)(ids).logits, trained)
    assert torch.equal(remove_adapter(model)(ids).logits, plain)


def test_peft_s_file_of_a_method_that_is_not_installed_means_what_peft_means(
    llama, ids, shake, tmp_path, package, monkeypatch
):
    with monkeypatch.context() as m:
        m.syspath_prepend(str(package))
        m.setitem(vars(METHODS), "_announced", announced(METHODS._group))
        m.setattr(METHODS, "_entries", dict(METHODS._entries))
        theirs = shake(adapt(llama(), AdapterConfig("pissa", rank=2)))
        save_adapter(theirs, tmp_path)
    assert "pissa" not in METHODS
    ours = load_adapter(llama(), tmp_path)
    assert adapter_state(ours).config.method == "lora" and adapter_state(ours).config.init == "pissa"
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_method_without_a_format_is_refused_before_it_is_trained(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    METHODS.add(Method("secret", "Secret", "C6", LoRALinear, METHODS["lora"].options))
    with pytest.raises(ValueError, match="method 'secret' cannot be saved"):
        save_adapter(adapt(llama(), AdapterConfig("secret")), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match="method='secret' .* cannot be saved"):
        RunConfig(method="secret")


def test_a_method_that_peft_lacks_has_a_peft_type_of_its_own(llama, ids, shake, tmp_path, monkeypatch):
    "It is saved and loaded with its own parameters, and PEFT refuses the file: it would lose them without a word."

    class Gated(LoRALinear):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.gate = torch.nn.Parameter(self.lora_B.new_full((1,), 0.5))

        @classmethod
        def parameter_shapes(cls, out_features, in_features, rank):
            return super().parameter_shapes(out_features, in_features, rank) | {"gate": (1,)}

        def plain(self, x):
            return self.base_layer(x) + self.gate * self.update(self.dropout(x))

        def operands(self, x):
            return super().operands(x)._replace(B=self.gate * self.lora_B)

        def adapted_weight(self):
            return self.base_layer.weight + self.gate * self.scaling * (self.lora_B @ self.lora_A)

    with monkeypatch.context() as m:
        m.setattr(METHODS, "_entries", dict(METHODS._entries))
        METHODS.add(Method("gated", "gated LoRA", "C6", Gated, METHODS["lora"].options, {"peft_type": "GATED"}))
        assert RunConfig(method="gated").method == "gated"
        model = shake(adapt(llama(), AdapterConfig("gated", rank=4)))
        trained = model(ids).logits
        save_adapter(model, tmp_path)
        torch.testing.assert_close(load_adapter(llama(), tmp_path)(ids).logits, trained)
        torch.testing.assert_close(merge(model)(ids).logits, trained, atol=1e-5, rtol=1e-4)
        save_adapter(adapt(llama(), AdapterConfig("lora", rank=4)), tmp_path / "lora")
        load_adapter(loaded := llama(), tmp_path / "lora")
        assert {type(layer) for layer in adapter_layers(loaded).values()} == {LoRALinear}
    with pytest.raises((KeyError, ValueError), match="GATED"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'GATED'; only LORA adapters"):
        load_adapter(llama(), tmp_path)


def test_a_benchmark_of_another_package(toys):
    assert [len(load_task("sums", split)) for split in ("train", "dev", "validation")] == [48, 12, 12]
    seen = {split: set(load_task("sums", split)["doc_index"]) for split in ("train", "dev")}
    assert not seen["train"] & seen["dev"]
    item = load_task("sums", "validation", "instruction")[1]
    assert (
        item["continuations"][item["gold"]] == "the correct answer is false"
        and "Is 61 + 1 = 63?" in item["contexts"][0]
    )
    assert len(task_digest("sums")) == 64
    wrong = TASKS["sums"].__class__(
        **vars(TASKS["sums"]) | {"name": "short", "counts": {"train": 61, "validation": 12}}
    )
    TASKS.add(wrong)
    with pytest.raises(
        ValueError, match="short train has 60 items where the official split has 61; correct its `rows`"
    ):
        load_task("short", "train")


@pytest.mark.long
def test_a_run_and_a_page_of_both(toys, tiny_model_dir, tmp_path):
    params = dict(task="sums", model=str(tiny_model_dir), rank=2, batch_size=8, precision="float32", learning_rate=1e-2)
    for method in ("pissa", "lora"):
        result = run(RunConfig(method=method, **params), tmp_path / "runs" / method, progress=False)
        assert result["metrics"]["n"] == 12 and 0 <= result["metrics"]["acc"] <= 1
    weights = load_file(tmp_path / "runs" / "pissa" / "adapter" / "adapter_model.safetensors")
    assert weights and all(t.isfinite().all() for t in weights.values())
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "runs" / "pissa" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    metrics, _ = evaluate(model, tokenizer, load_task("sums"), progress=False)
    stored = json.loads((tmp_path / "runs" / "pissa" / "result.json").read_text())["metrics"]
    assert metrics["acc"] == stored["acc"]
    _, records = evaluate(model, tokenizer, load_task("sums"), progress=False)
    golds, said = ([r[k] == 1 for r in records] for k in ("gold", "pred"))
    both = sum(a and b for a, b in zip(golds, said))
    assert stored["f1"] == pytest.approx(2 * both / (sum(golds) + sum(said))) and "f1" not in metrics
    assert TASKS["sums"].metric(load_task("sums").to_list(), records) == {"f1": stored["f1"]}
    collect(tmp_path / "runs", tmp_path / "report")
    page = render(tmp_path / "report", "Toys").read_text()
    assert "| PiSSA, rank 2" in page and "| LoRA, rank 2" in page and "Sums (n = 12)" in page


@pytest.mark.long
def test_a_process_that_imports_nothing_of_the_package_knows_both(package):
    "As a kernel does that a grid starts."
    code = """
        from dora_nb.runs.config import RunConfig
        from dora_nb.runs.identity import run_name
        from dora_nb.command.options import task_names
        assert "sums" in task_names()
        print(run_name(RunConfig(task="sums", method="pissa", rank=2)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("sums-pissa-r2-s0-"), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "old,new,label", [("dora", "renamed", r"\| renamed +\|"), ("winogrande", "gone", r"gone \(n = ")]
)
def test_a_stored_result_keeps_a_plain_label(tmp_path, old, new, label):
    "A report was made with a method or a task that is not installed here."
    page = shutil.copytree(QUICK, tmp_path / "page")
    stored = json.loads((page / RESULTS).read_text())
    for result in stored["results"]:
        result["params"] |= {k: new for k, v in result["params"].items() if v == old and k in ("task", "method")}
    (page / RESULTS).write_text(json.dumps(stored))
    assert re.search(label, render(page).read_text())


class Thing:
    "An entry of a registry."

    def __init__(self, name):
        self.name = name


def test_a_registry_says_what_is_wrong(tmp_path, monkeypatch):
    registry = Registry("thing", Thing, "dora_nb.test_things")
    registry.add(first := Thing("first"))
    assert registry["first"] is first and list(registry) == ["first"] and len(registry) == 1
    with pytest.raises(KeyError, match="no thing 'frist'; did you mean 'first'"):
        registry["frist"]
    with pytest.raises(ValueError, match="there is a thing 'first' already"):
        registry.add(Thing("first"))
    with pytest.raises(TypeError, match="a thing must be a Thing"):
        registry.add("first")
    (info := tmp_path / "broken-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dora_nb.test_things]\nlost = no_such_module:LOST\nother = os:sep\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("thing", Thing, "dora_nb.test_things")
    assert list(registry) == ["lost", "other"]
    with pytest.raises(ImportError, match="thing 'lost' of the package broken .*no_such_module"):
        registry["lost"]
    with pytest.raises(ImportError, match="thing 'other' of the package broken .* must be a Thing of that name"):
        registry["other"]
    shutil.rmtree(info)
