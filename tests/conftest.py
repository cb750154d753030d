"What the tests share. Real model and data come from the cache, and are fetched into it on the first run."

import copy
import json
import os
import shutil
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the Hub
os.environ.setdefault("MPLBACKEND", "Agg")
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton; only plan="triton" uses it
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))

import pytest
import torch
import warm_processes
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_nb.data.assets import load_model, model_path
from dora_nb.models.adapt import adapter_layers

LONG_FILES = "notebooks layout docs build assets benchmarks evaluate faults experiments team lm_eval report html stored curvature".split()
LONG_FIXTURES = {"smollm", "stock"}  # the real model, and processes


def is_long(path):
    return path.stem.removeprefix("test_") in LONG_FILES


def pytest_ignore_collect(collection_path, config):
    "Leave files of long tests unread where these are not wanted: what they import takes half a minute."
    unwanted = collection_path.is_file() and is_long(collection_path) and "not long" in config.getoption("markexpr")
    return True if unwanted else None


def pytest_collection_modifyitems(items):
    "Put the longest first, so that no process is left alone with one of them at the end; attacks say of which kind they are."
    items.sort(key=lambda item: ("test_a_lost_machine" not in item.nodeid, "test_notebooks" not in item.nodeid))
    for item in items:
        if is_long(item.path) or LONG_FIXTURES & {*item.fixturenames}:
            item.add_marker("long")
        for mark in item.iter_markers("attack"):
            item.user_properties.append(("attack", mark.args[0]))  # goes into pytest's XML, for reports/reliability


@pytest.fixture
def llama():
    "Makes a small Llama with random weights; the same seed gives the same model."

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        config = dict(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()

    return make


@pytest.fixture(scope="session")
def toy_tokenizer():
    "Makes a tokenizer of 128 tokens: characters, and a few parts of the word Answer."

    def make(template=None, **special):
        merges = [("A", "n"), ("An", "s"), ("w", "e"), ("we", "r"), ("Ans", "wer")]
        words = ["<s>", "</s>", "\n", *map(chr, range(32, 127)), *map("".join, merges)]
        vocab = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(BPE(vocab, merges))
        tokenizer.decoder = decoders.Fuse()
        if template:
            known = [(token, vocab[token]) for token in ("<s>", "</s>")]
            tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=known)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **dict(bos_token="<s>", eos_token="</s>", pad_token="</s>") | special
        )

    return make


@pytest.fixture
def shake():
    "Moves an adapter away from its start, where B = 0 hides every mistake."

    def move(model, seed=1):
        torch.manual_seed(seed)
        for layer in adapter_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            if hasattr(layer, "magnitude"):
                layer.magnitude.data *= 0.5 + torch.rand_like(layer.magnitude)
        return model

    return move


@pytest.fixture
def ids():
    return torch.arange(60).view(3, 20)


@pytest.fixture(scope="session")
def smollm():
    "The real model and its tokenizer; tests must leave the model as it was."
    return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def small_tokenizer():
    "The real model's tokenizer with its most frequent 8192 tokens: the size of a vocabulary is most of a small model's time."
    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2-135m-instruct"))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {word: i for word, i in spec["model"]["vocab"].items() if i < 8192}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"])
    spec["model"].update(vocab=vocab, merges=[pair for pair in pairs if "".join(pair) in vocab])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, small_tokenizer):
    "A model that runs in no time: its answers mean nothing."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(small_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir):
    "Makes a copy of this model, and gives its tokenizer: to load it takes longer."
    model, tokenizer = load_model(str(tiny_model_dir))
    return lambda: (copy.deepcopy(model), tokenizer)


@pytest.fixture(scope="session")
def stock():
    "A process that has imported everything, and forks what is to be started; None where that is not possible."
    if not (sys.platform == "linux" and hasattr(subprocess, "_fork_exec")):
        yield None
        return
    made = warm_processes.Stock()
    yield made
    made.end()


@pytest.fixture
def warm(stock, request):
    "Start Python processes that need import nothing. Tests that are `cold` or `slow` show that a fresh interpreter can."
    cold = any(request.node.get_closest_marker(mark) for mark in ("cold", "slow"))
    with warm_processes.warm_from(None if cold else stock):
        yield
