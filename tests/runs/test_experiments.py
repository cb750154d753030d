"What the reproduction's experiments need of a run: mixtures, shared trainings, ranks found in a warm-up, ΔM and ΔD."

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dora_nb.data.assets import load_model
from dora_nb.layers.decompose import decompose
from dora_nb.models.adapt import adapt, adapter_layers
from dora_nb.models.adapter_files import load_adapter
from dora_nb.models.merge import merge
from dora_nb.runs.config import RunConfig, config_from
from dora_nb.runs.folder import GEOMETRY, HISTORY, PREDICTIONS, RANKS, RESULT
from dora_nb.runs.grid import load_grid
from dora_nb.runs.identity import run_name, training_id
from dora_nb.runs.jobs import Job, waves
from dora_nb.runs.launcher import run_grid
from dora_nb.runs.observers import geometry_observer
from dora_nb.runs.progress import time_left
from dora_nb.runs.run import run

SMALL = dict(
    task="arc_easy", rank=2, alpha=4.0, train_items=12, batch_size=4, eval_items=6, precision="float32", dropout=0.0
)


@pytest.fixture
def make(tiny_model_dir, tmp_path):
    "Makes a run of the tiny model, beside the others of the test."

    def go(**params):
        config = RunConfig(**SMALL | dict(model=str(tiny_model_dir)) | params)
        folder = tmp_path / "runs" / run_name(config)
        return run(config, folder, progress=False), folder

    return go


def test_a_gpu_s_seconds_are_no_estimate_for_a_cpu(tmp_path, monkeypatch):
    params = dict(method="lora", task="boolq")
    made = dict(
        params=params, seconds=6.0, machine={"gpu": "one"}, training={"steps": 1}, timings=dict(loading=1, evaluation=2)
    )
    jobs = [Job(RunConfig(**params, seed=i), tmp_path / "ab"[i]) for i in (0, 1)]
    jobs[0].state, jobs[0].result = "done", made
    monkeypatch.setattr("dora_nb.runs.progress.gpus", lambda: ["0"])
    assert time_left(jobs, 1) == 6.0
    monkeypatch.setattr("dora_nb.runs.progress.gpus", lambda: [])
    assert time_left(jobs, 1) is None


def test_what_is_trained_already_is_not_counted_again(tmp_path):
    "Two questions to one adapter: a training and two times the rest, or twice everything where nothing is shared."
    params = dict(method="lora", task="boolq")
    made = dict(params=params, seconds=100.0, machine={}, training={"steps": 1}, timings=dict(loading=1, evaluation=9))
    base = dict(params=params | dict(method="base"), seconds=50.0, machine={}, training=None)
    base["timings"] = dict(loading=2, evaluation=48)
    job = lambda **more: Job(RunConfig(**params | more), tmp_path / str(more))
    jobs = [job(), job(eval_split="dev"), job(seed=1), job(seed=1, eval_split="dev"), job(method="base")]
    jobs[4].state, jobs[4].result = "done", base
    assert time_left(jobs, 1) is None  # nothing has been trained yet
    jobs[0].state, jobs[0].result = "done", made
    assert time_left(jobs, 1, shared=False) == 100 + 100 + 100
    assert time_left(jobs, 1) == 100 + 100 + 10  # the first is known from a report only, without its adapter
    (jobs[0].folder / "adapter").mkdir(parents=True)
    (jobs[0].folder / RESULT).touch()
    assert time_left(jobs, 1) == 10 + 100 + 10


def test_what_cannot_be_merged_is_asked_as_it_is(make, tmp_path, tiny_model_dir, small_tokenizer):
    "An adapter on a vocabulary projection whose weight is the embeddings', too."
    config = LlamaConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    small_tokenizer.save_pretrained(tmp_path / "tied")
    options = dict(method="dora", model=str(tmp_path / "tied"), target_modules="q_proj,lm_head")
    result, _ = make(**options)
    again, _ = make(**options, eval_split="dev")
    assert result["metrics"]["n"] == 6 and again["training"]["trained_by"] == result["run"]


@pytest.mark.parametrize("method", ("lora", "dora", "full"))
def test_what_is_asked_afterwards_needs_no_second_training(make, method):
    first, one = make(method=method, task="boolq")
    second, two = make(method=method, task="boolq", eval_split="dev")
    assert second["training"]["trained_by"] == first["run"] and "trained_by" not in first["training"]
    assert (one / HISTORY).read_bytes() == (two / HISTORY).read_bytes()
    again, three = make(method=method, task="boolq", eval_split="dev", seed=1)
    assert "trained_by" not in again["training"]
    (one / RESULT).unlink()  # so that nothing is left to take over but the second's
    for folder in (two, three):
        (folder / RESULT).unlink()
        (folder / "adapter").rename(folder / "old")
    afresh, _ = make(method=method, task="boolq", eval_split="dev")
    assert "trained_by" not in afresh["training"]
    assert afresh["metrics"]["acc"] == second["metrics"]["acc"]
    new, old = (load_file(next((two / name).glob("*.safetensors"))) for name in ("adapter", "old"))
    assert all(torch.equal(new[k], old[k]) for k in old) and new.keys() == old.keys()


def test_taken_over_answers_are_those_of_one_s_own_training(make, tmp_path):
    make()
    _, taken = make(eval_items=9)
    config = RunConfig(**SMALL | json.loads((taken / RESULT).read_text())["params"])
    run(config, tmp_path / "elsewhere" / "run", progress=False)
    own = pd.read_parquet(tmp_path / "elsewhere" / "run" / PREDICTIONS)
    assert own.equals(pd.read_parquet(taken / PREDICTIONS))


def test_a_mixture_is_trained_once_and_asked_about_each_task(make):
    tasks = ("winogrande", "arc_easy", "boolq")
    results = [make(mixture=" winogrande, arc_easy,boolq", task=t)[0] for t in tasks]
    assert [r["training"]["items"] for r in results] == [36] * 3
    assert ["trained_by" in r["training"] for r in results] == [False, True, True]
    ids = {training_id(RunConfig(mixture="boolq,piqa", task=t)) for t in ("boolq", "piqa")}
    assert len(ids) == 1 and training_id(RunConfig(mixture="piqa,boolq")) not in ids


def test_instruction_items_are_ranked_too(make):
    ranked, folder = make(format="instruction", objective="prompt", eval_format="instruction")
    written, _ = make(format="instruction", objective="prompt", protocol="generate")
    assert written["training"]["trained_by"] == ranked["run"] and "unparsed" in written["metrics"]
    assert len(pd.read_parquet(folder / PREDICTIONS).loglikelihood[0]) == 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_untrained_weight_of_a_conv1d_has_not_moved(tmp_path, dtype):
    "GPT-2 keeps its weights as (in, out); and a change that bfloat16 would round away is seen."
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).to(dtype)
    config = RunConfig(rank=2, dropout=0.0, target_modules="c_attn,c_proj", geometry=1)
    adapt(model, config.adapter())
    observe = geometry_observer(config, model, tmp_path)
    for factor, moved in ((1, 0.0), (1.0005, 5e-4)):
        for layer in adapter_layers(model).values():
            layer.magnitude.data *= factor
        observe(dict(step=1, steps=1))
        (point,) = json.loads((tmp_path / GEOMETRY).read_text())["points"]
        assert [w["inputs"] for w in point["weights"]] == [16, 16, 64]  # c_attn, and both c_proj
        for w in point["weights"]:
            assert w["delta_m"] / w["m0"] == pytest.approx(moved, abs=1e-5) and abs(w["delta_d"]) < 1e-6


def test_full_fine_tuning_records_the_layers_of_any_model(tmp_path):
    "Those that `adapt` chooses by itself, as GPT-2 has none of the paper's."
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    observe = geometry_observer(RunConfig(method="full", geometry=1), model, tmp_path)
    model.transformer.h[0].attn.c_attn.weight.data *= 1.5
    observe(dict(step=1, steps=1))
    (point,) = json.loads((tmp_path / GEOMETRY).read_text())["points"]
    (weight,) = point["weights"]
    assert weight["weight"].endswith("c_attn") and weight["delta_m"] / weight["m0"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("method", ("lora", "dora", "full"))
def test_geometry(make, tiny_model_dir, method):
    result, folder = make(method=method, geometry=2, task="boolq")
    points = json.loads((folder / GEOMETRY).read_text())["points"]
    assert [p["step"] for p in points] == [2, 3] and all(len(p["weights"]) == 5 for p in points)
    base, _ = load_model(str(tiny_model_dir))
    if method == "full":
        trained, _ = load_model(str(folder / "adapter"))
    else:
        trained, _ = load_model(str(tiny_model_dir))
        merge(load_adapter(trained, folder / "adapter"), keep_base=False)
    for row in points[-1]["weights"]:
        W0, W = (m.get_submodule(row["weight"]).weight.detach().double() for m in (base, trained))
        (m0, _), (m, _) = decompose(W0), decompose(W)
        assert row["m0"] == pytest.approx(m0.mean().item(), rel=1e-5)
        assert row["delta_m"] == pytest.approx((m - m0).abs().mean().item(), rel=2e-2, abs=1e-8)
        assert row["delta_d"] == pytest.approx(
            (1 - torch.nn.functional.cosine_similarity(W, W0, dim=1)).mean().item(), rel=2e-2, abs=1e-9
        )
        assert row["delta_d"] > 0
    plain, other = make(method=method, task="boolq")
    assert "trained_by" not in plain["training"]  # which has no geometry
    same = [load_file(next((f / "adapter").glob("*.safetensors"))) for f in (folder, other)]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])  # looking changes nothing


@pytest.mark.parametrize("way", ("curvature", "gates", "random"))
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_ranks_found_in_a_warm_up(make, way, method):
    result, folder = make(method=method, allocate=way, train_items=44)
    ranks = json.loads((folder / RANKS).read_text())
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["rank_pattern"] == ranks["rank_pattern"] and len(ranks["rank_pattern"]) == 5
    uniform, _ = make(method=method, train_items=44)
    assert 0 <= uniform["training"]["trainable"] - result["training"]["trainable"] < 2 * (32 + 48)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, r in ranks["rank_pattern"].items():
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == r
        assert ranks["alpha_pattern"][name] / r == pytest.approx(2.0)


@pytest.mark.parametrize(
    "params,named",
    [
        ({"mixture": "boolq, hellaswagg"}, "mixture: 'hellaswagg' is not a task"),
        ({"allocate": "magic"}, "curvature, gates, random"),
        ({"allocate": "gates", "processes": 2}, "allocate needs processes=1"),
        ({"allocate": "gates", "init": "orthogonal"}, "cannot be combined with ranks or with init=.*'orthogonal'"),
        ({"eval_format": "cloze", "protocol": "generate"}, "needs eval_format='instruction'"),
        ({"geometry": -1}, "geometry=-1"),
        ({"geometry": 4, "processes": 2, "fsdp": True}, "cannot be combined with probe, geometry"),
    ],
)
def test_what_does_not_go_together(params, named):
    with pytest.raises(ValueError, match=named):
        config_from(params)


def test_too_few_items_for_a_warm_up(make):
    with pytest.raises(ValueError, match="12 training items are too few"):
        make(allocate="curvature")


GRID = """
name = "x"
[fixed]
model = "MODEL"
task = "arc_easy"
train_items = 8
batch_size = 4
precision = "float32"
[axes]
method = ["base", "lora"]
eval_split = ["dev", "validation"]
[scale.small]
fixed = { eval_items = 3 }
[scale.large]
axes = { seed = [0, 1] }
fixed = { train_items = 16 }
override = [{ when = { method = "lora" }, set = { rank = 4 } }]
"""


def test_scales(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    small, large = load_grid(path), load_grid(path, "large")
    assert (small.name, large.name) == ("x-small", "x-large") and load_grid(path, "small") == small
    assert len(small.configs) == 4 and {c.eval_items for c in small.configs} == {3}
    assert len(large.configs) == 6  # the base model has no seed
    assert {(c.rank, c.train_items) for c in large.configs if c.method == "lora"} == {(4, 16)}
    with pytest.raises(ValueError, match="no scale 'huge'; choose one of small, large"):
        load_grid(path, "huge")
    path.write_text(GRID.replace("axes = { seed", "axs = { seed"))
    with pytest.raises(ValueError, match="scale.large: unknown key 'axs'; did you mean 'axes'"):
        load_grid(path, "large")
    path.write_text(GRID[: GRID.index("[scale.small]")])
    with pytest.raises(ValueError, match="only one scale"):
        load_grid(path, "small")


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "words,said",
    [
        ("scale.a = 3", "scale: a must be of type dict, not int"),
        ("scale.a.fixed = 3", "scale.a: fixed must be of type dict, not int"),
        ("scale.a.axes = [1]", "scale.a: axes must be of type dict, not list"),
        ("scale.a.override = {}", "scale.a: override must be of type list, not dict"),
        ("scale.a.exclude = 3", "scale.a: exclude must be of type list, not int"),
        ("scale.a.exclude = [3]", "an exclude is a table of parameters, not 3"),
        ("scale.a.override = [3]", "an override has exactly the keys 'when' and 'set'"),
        ("scale.a.axes.seed = 3", "axes.seed must be a list of values"),
        ("scale.a.axes.seed = [[1]]", "seed=[1] is of type list"),
        ("scale.a.fixed.seed = 2000-01-01", "is of type date"),
        ("scale = 3", "scale must be of type dict, not int"),
        ("fixed = 3", "fixed must be of type dict, not int"),
        ("axes = 3", "axes must be of type dict, not int"),
        ("override = 3", "override must be of type list, not int"),
        ("exclude = 3", "exclude must be of type list, not int"),
        ("report = 3", "report must be of type dict, not int"),
        (f"fixed.rank = {'9' * 5000}", "not TOML"),
    ],
)
def test_a_grid_of_wrong_types_is_answered_in_a_line(tmp_path, words, said):
    path = tmp_path / "grid.toml"
    path.write_text(f'name = "x"\n{words}\n')
    with pytest.raises(ValueError) as e:
        load_grid(path)
    assert str(e.value).startswith(f"{path}: ") and said in str(e.value) and "\n" not in str(e.value)


def test_a_grid_trains_once_what_is_asked_twice(tmp_path, tiny_model_dir, warm):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace("MODEL", str(tiny_model_dir)))
    jobs = [Job(c, tmp_path / run_name(c)) for c in load_grid(path).configs]
    first, rest = waves(jobs)
    assert [len(first), len(rest)] == [3, 1] and rest[0].config.method == "lora"
    folder = run_grid(path, tmp_path / "runs", workers=2)
    results = [json.loads(p.read_text()) for p in folder.glob("*/result.json")]
    assert len(results) == 4 and sum("trained_by" in (r["training"] or {}) for r in results) == 1
