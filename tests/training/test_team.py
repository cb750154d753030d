"Several processes are as good as one: the same adapter, the same answers; and nobody is left waiting."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from team_member import WAYS, fitted
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from warm_processes import warm_from

import dora_nb.runs.engines
import dora_nb.runs.launcher
import dora_nb.training.distributed
from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.models.adapter_files import load_adapter
from dora_nb.models.merge import merge
from dora_nb.runs.config import RunConfig
from dora_nb.runs.engines import Local
from dora_nb.runs.execute import DIED
from dora_nb.runs.folder import CHECKPOINTS, ERROR, HISTORY, RESULT
from dora_nb.runs.identity import run_id
from dora_nb.runs.jobs import Job, default_workers, notebook
from dora_nb.runs.launcher import run_grid
from dora_nb.runs.run import run
from dora_nb.training.distributed import Distributed, shard
from dora_nb.training.evaluate import rank_choices

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, small_tokenizer):
    "Two blocks, and an output layer that is the embedding."
    folder, sizes = tmp_path_factory.mktemp("model"), dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(small_tokenizer), **sizes, **heads)).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(model_dir, tmp_path_factory, stock):
    "What two processes make of everything, started once by torchrun."
    out, member = tmp_path_factory.mktemp("two"), Path(__file__).parent / "team_member.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    with warm_from(stock):
        done = subprocess.run([*command, member, model_dir, out], **options)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def one(model_dir, tmp_path_factory):
    "What one process makes of the same."
    made, out = {}, tmp_path_factory.mktemp("one")

    def make(way):
        if way not in made:
            made[way] = fitted(model_dir, out / way, way, Distributed())
        return made[way]

    return make


WITHOUT_DROPOUT = [way for way in WAYS if way != "dropout"]  # of which each process draws its own
KINDS = ("copied", "sharded")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WITHOUT_DROPOUT)
def test_two_processes_are_as_one(two, one, way, kind):
    params, said = one(way)
    told = json.loads((two / f"{way}-{kind}" / "said.json").read_text())
    assert [r["items"] for r in told["records"]] == [r["items"] for r in said["records"]]
    assert 1 in [r["items"] for r in told["records"]]  # a step in which one process has nothing to do
    for mine, theirs in zip(said["records"], told["records"]):
        for key in mine.keys() - {"padding", "right"}:  # there is less in smaller micro-batches
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key
    for mine, theirs in zip(said["answers"], told["answers"]):
        assert theirs["loglikelihood"] == pytest.approx(mine["loglikelihood"], abs=1e-3)
        assert theirs["doc_index"] == mine["doc_index"]
    (last,) = (two / f"{way}-{kind}" / "checkpoints").iterdir()
    state = load_file(last)
    for (
        name,
        p,
    ) in params.items():  # where a gradient is nearly 0, Adam makes a part of a step (1e-3) of its rounding error
        difference = (state[f"parameter/{name}"] - p).abs()
        assert difference.max() < 1e-4 and difference.square().mean().sqrt() < 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WITHOUT_DROPOUT)
def test_what_two_saved_one_loads(model_dir, two, way, kind):
    "The adapter gives the answers that the two gave; and their checkpoint is gone on from by one."
    folder = two / f"{way}-{kind}"
    told = json.loads((folder / "said.json").read_text())
    model, tokenizer = load_model(str(model_dir))
    if way == "full":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        merge(load_adapter(model, folder))
    answers = rank_choices(model, tokenizer, load_task("boolq", limit=7), progress=False)[1]
    for mine, theirs in zip(answers, told["answers"]):
        assert mine["loglikelihood"] == pytest.approx(theirs["loglikelihood"], abs=1e-3)
    with pytest.warns(UserWarning, match="processes: begun with 2, continued with 1"):
        params, said = fitted(model_dir, folder / "one", way, Distributed(), checkpoints=folder / "checkpoints")
    assert said["records"] == told["records"]  # all was done, and nothing was done again
    state = load_file(next((folder / "checkpoints").iterdir()))
    assert all(torch.equal(state[f"parameter/{name}"], p) for name, p in params.items())


def small(model_dir, **changes):
    "A run of two processes."
    options = dict(
        task="arc_easy", model=str(model_dir), rank=2, train_items=16, batch_size=8, eval_items=6, precision="float32"
    )
    return RunConfig(**dict(processes=2) | options | changes)


def test_a_run_of_two_processes(model_dir, tmp_path):
    "Through a grid, papermill and torchrun: one folder, one result, and the identity of a run by one."
    text = 'name = "two"\n[fixed]\n' + "".join(
        f"{k} = {json.dumps(v)}\n"
        for k, v in dict(
            task="arc_easy",
            model=str(model_dir),
            rank=2,
            dropout=0.0,
            train_items=16,
            batch_size=8,
            eval_items=6,
            precision="float32",
        ).items()
    )
    (tmp_path / "one.toml").write_text(text)
    (tmp_path / "two.toml").write_text(text + "processes = 2\nfsdp = true\n")
    folders = [run_grid(tmp_path / f"{name}.toml", tmp_path / name, workers=1) for name in ("one", "two")]
    (mine, theirs) = (next(folder.iterdir()) for folder in folders)
    assert mine.name == theirs.name
    results = [json.loads((folder / RESULT).read_text()) for folder in (mine, theirs)]
    assert results[1]["params"]["processes"] == 2 and results[0]["params"]["processes"] == 1
    assert results[1]["training"]["tokens"] == results[0]["training"]["tokens"]
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (mine, theirs)]
    for name, t in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], t, atol=1e-5, rtol=0)
    assert not (theirs / CHECKPOINTS).exists() and len((theirs / HISTORY).read_text().splitlines()) == 2
    assert {"loading", "training", "probing", "evaluation"} == results[1]["timings"].keys()


def members(folder):
    "The processes of a run that torchrun started."
    lines = {p: p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])}
    return [p for p, line in lines.items() if str(folder) in line and "torch.distributed.run" not in line]


def started(config, folder):
    "A run in a notebook in a process of its own, when its training has begun."
    (folder / "params.json").write_text(json.dumps(vars(config) | {"run_dir": str(folder / "run")}))
    files = [notebook("finetune"), folder / "params.json", folder / "out.ipynb", folder / ERROR]
    command = [sys.executable, "-m", "dora_nb.runs.execute", *map(str, files), str(os.getpid())]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not ((folder / "run" / HISTORY).exists() and (folder / "run" / HISTORY).read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("victim", ("member", pytest.param("kernel", marks=pytest.mark.slow)))
def test_a_process_is_killed(model_dir, tmp_path, victim):
    "The others leave with a checkpoint, and the run counts as died."
    config = small(model_dir, train_items=2000, batch_size=4, checkpoint_seconds=0.0)
    process = started(config, tmp_path)
    assert len(members(tmp_path / "run")) == 2
    prey = members(tmp_path / "run")[-1] if victim == "member" else psutil.Process(process.pid).children()[0]
    prey.send_signal(signal.SIGKILL)
    assert process.wait(90) == DIED
    end = time.monotonic() + 30
    while members(tmp_path / "run"):
        assert time.monotonic() < end, "somebody was left waiting"
        time.sleep(0.1)
    assert not (tmp_path / "run" / RESULT).exists()
    assert list((tmp_path / "run" / CHECKPOINTS).iterdir())


def test_told_to_stop(model_dir, tmp_path):
    "SIGTERM goes down to every process, and the state is written."
    config = small(model_dir, train_items=2000, batch_size=4)
    process = started(config, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and not members(tmp_path / "run")
    (last,) = (tmp_path / "run" / CHECKPOINTS).iterdir()
    steps = len((tmp_path / "run" / HISTORY).read_text().splitlines())
    assert last.name == f"step-{steps:08}.safetensors"


def test_an_error_in_one_process(model_dir, tmp_path):
    "It is the run's, with its own words."
    config = small(model_dir, learning_rate=1e30, max_grad_norm=1e30, train_items=64)
    with pytest.raises(RuntimeError, match=r"Diverged: step \d+ of 8: .*\(in process [01]\)"):
        run(config, tmp_path, progress=False)
    assert not (tmp_path / RESULT).exists()


@pytest.mark.attack("hang")
def test_after_step_may_evaluate(two, one):
    "Only the first process calls it, so its evaluation must not wait for the others."
    told = json.loads((two / "exact-copied" / "said.json").read_text())
    assert [r.get("right") for r in told["records"]] == [r.get("right") for r in one("exact")[1]["records"]]
    assert told["records"][1]["right"] >= 0


def test_never_one_where_two_were_asked(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Distributed, "__init__", lambda self, join=True: vars(self).update(rank=0, size=3, device=torch.device("cpu"))
    )
    with pytest.raises(ValueError, match="processes=2 was asked for, and 3 came together"):
        run(small(model_dir), tmp_path)
    with pytest.raises(ValueError, match="processes=1 was asked for, and 3 came together"):
        run(small(model_dir, processes=1), tmp_path)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="can only be sharded over several processes"):
        shard(None, Distributed())


def test_settings(model_dir, monkeypatch, tmp_path):
    for wrong in (dict(processes=1, fsdp=True), dict(fsdp=True, probe=True), dict(fsdp=True, protocol="generate")):
        with pytest.raises(ValueError, match="fsdp=true needs processes"):
            small(model_dir, **wrong)
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        small(model_dir, processes=0)
    assert run_id(small(model_dir)) == run_id(small(model_dir, processes=1)) == run_id(small(model_dir, fsdp=True))
    for module in (dora_nb.runs.jobs, dora_nb.runs.engines, dora_nb.runs.launcher):
        monkeypatch.setattr(module, "gpus", lambda: ["3", "5", "6", "7", "9"])
    assert (default_workers(), default_workers(2)) == (5, 2)
    engine, seen = Local(processes=2), []
    monkeypatch.setattr(dora_nb.runs.engines, "prepare", lambda job: ["true"])
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **rest: seen.append(env["CUDA_VISIBLE_DEVICES"]))
    for i, processes in enumerate((2, 1)):
        job = Job(replace(small(model_dir), processes=processes), tmp_path / str(i))
        job.folder.mkdir()
        engine.start(job)
    assert seen == ["3,5", "6"]
    (tmp_path / "grid.toml").write_text('name = "g"\nfixed = { processes = 6 }\n')
    with pytest.raises(ValueError, match="processes=6 needs as many GPUs, and this process may use 5"):
        run_grid(tmp_path / "grid.toml", tmp_path, dry_run=True)


def surroundings(monkeypatch, **variables):
    "An environment with these variables of a job, and no others."
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    dora_nb.training.distributed._log_once.cache_clear()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


WHOLE = dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1")


@pytest.mark.attack("hang")
@pytest.mark.parametrize(
    "left, named",
    [
        (dict(WORLD_SIZE="2"), "RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="2", MASTER_ADDR="node1", MASTER_PORT="1234"), "RANK"),
        (WHOLE | dict(MASTER_PORT="auto"), "MASTER_PORT"),
        (WHOLE | dict(WORLD_SIZE="two", MASTER_PORT="1234"), "WORLD_SIZE"),
    ],
    ids=str,
)
def test_what_a_job_system_left_behind_is_ignored(monkeypatch, capsys, left, named):
    "With one line, said once."
    surroundings(monkeypatch, **left)
    assert [Distributed().size, Distributed().rank, Distributed().size] == [1, 0, 1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"({named} is missing or not a number)" in lines[0] and "works alone" in lines[0]


@pytest.mark.parametrize("size", ["", "0", "1"])
def test_a_world_of_one_needs_no_word(monkeypatch, capsys, size):
    surroundings(monkeypatch, WORLD_SIZE=size)
    assert Distributed().size == 1 and not capsys.readouterr().err


@pytest.mark.attack("hang")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_never_come(monkeypatch, rank):
    "The first process waits for workers, another one for the first: not for ever."
    surroundings(monkeypatch, **WHOLE | dict(RANK=rank, MASTER_PORT=free_port()))
    monkeypatch.setattr(dora_nb.training.distributed, "JOIN_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match=rf"did not arrive within 1 s: RANK={rank} of WORLD_SIZE=2 at .*unset these"):
        Distributed()
    assert not dist.is_initialized()


@pytest.mark.attack("hang")
def test_a_store_that_answers_and_a_process_that_does_not_come(monkeypatch):
    "As under torchrun, whose agent keeps the store."
    port = free_port()
    store = dist.TCPStore("127.0.0.1", int(port), 2, is_master=True, wait_for_workers=False)
    surroundings(monkeypatch, **WHOLE | dict(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True"))
    monkeypatch.setattr(dora_nb.training.distributed, "JOIN_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match="1 of 2 arrived"):
        Distributed()
    del store
    assert not dist.is_initialized()


@pytest.mark.attack("hang")
def test_nobody_is_joined_where_none_is_wanted(monkeypatch, capsys):
    surroundings(monkeypatch, **WHOLE | dict(MASTER_PORT=free_port()))
    assert Distributed(join=False).size == 1 and not capsys.readouterr().err
