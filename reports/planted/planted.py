"""Are planted ranks found, and do they help? SmolLM2's last blocks, updates of known rank, and every score of ranks.

python reports/planted/planted.py pilot OUT    # learning rates, on a planting of its own
python reports/planted/planted.py run OUT      # a JSON file per finished cell in OUT; goes on where it stopped
python reports/planted/planted.py report OUT   # report.md and its figures beside this file
"""

import argparse
import json
import time
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_nb.curvature.components import components, score_components
from dora_nb.curvature.kronecker import update_metrics
from dora_nb.curvature.planted import adapt_with_ranks, deal_ranks, distil, distil_parts, divergence, log_probs, plant
from dora_nb.curvature.probe import probing
from dora_nb.curvature.rank import component_costs
from dora_nb.curvature.rank_search import close_gates, open_gates, shrink, shuffled
from dora_nb.curvature.recovery import (
    gate_hessian,
    gradient_scores,
    hessian_ranks,
    input_scores,
    ranks_within,
    recovery,
)
from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.files import write_json
from dora_nb.models.adapt import adapter_layers, adapter_state, trainable_parameters
from dora_nb.models.merge import remove_adapter

HERE = Path(__file__).parent
STATES = HERE.parents[1] / "runs" / "planted"  # what is costly to compute again, and not worth keeping
SCORES = ("singular", "curvature", "hessian", "gate", "gates", "gradient", "inputs")


@dataclass
class Texts:
    "Hidden states before the last blocks, (items, tokens, width) each, and the tokens that the head keeps."

    train: Tensor
    held_out: Tensor
    probe: Tensor
    vocabulary: Tensor


def token_ids(tokenizer, plan: dict, count: int, seed: int) -> Tensor:
    "Return the first tokens of SIQA's questions with their answers, (count, tokens)."
    items, length = load_task("social_iqa", "train", limit=4 * count, seed=seed), plan["tokens"]
    texts = [item["contexts"][0] + " /".join(item["continuations"]) for item in items]
    ids = [found[:length] for found in tokenizer(texts)["input_ids"] if len(found) >= length]
    return torch.tensor(ids[:count])


@torch.no_grad()
def hidden_states(model: nn.Module, tokenizer, plan: dict, seed: int) -> Texts:
    "Return what enters the last blocks, computed once for each seed."
    path = STATES / f"texts-{plan['blocks']}-{plan['tokens']}-{seed}.pt"
    if path.exists():
        return Texts(**torch.load(path))
    sizes = [plan["train_items"], plan["held_out_items"], plan["probe_items"]]
    found, mass = [], 0
    first = model.model.layers[-plan["blocks"]]
    hook = first.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for batch in token_ids(tokenizer, plan, sum(sizes), seed).split(16):
        mass = mass + model(input_ids=batch, use_cache=False).logits.softmax(-1).sum((0, 1))
    hook.remove()
    kept = mass.topk(plan["vocabulary"]).indices.sort().values
    print(f"the head keeps {mass[kept].sum() / mass.sum():.1%} of the probability", flush=True)
    texts = Texts(*torch.cat(found).split(sizes), kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vars(texts), path)
    return texts


def last_blocks(model: nn.Module, count: int, vocabulary: Tensor) -> nn.Module:
    "Keep a model's last blocks, its final norm, and the rows of its head for some tokens."
    model.model.layers = model.model.layers[-count:]
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    model.config.num_hidden_layers, model.config.tie_word_embeddings = count, False
    head = model.lm_head.weight.detach()[vocabulary].clone()
    model.lm_head = nn.Linear(head.shape[1], len(head), bias=False)
    model.lm_head.weight = nn.Parameter(head)
    return model.requires_grad_(False).eval()


class Lab:
    "Hold the model, the texts and the teacher of one planting; every result is a cell, and none is computed twice."

    def __init__(self, plan: dict, seed: int, out: Path):
        self.plan, self.seed, self.out = plan, seed, out
        model, tokenizer = load_model("smollm2-135m-instruct")
        model.config._attn_implementation = "eager"  # faster than fused attention at this length
        self.texts = hidden_states(model, tokenizer, plan, seed)
        self.model = last_blocks(model, plan["blocks"], self.texts.vocabulary)
        linear = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        self.names = [n for kind in plan["kinds"] for n in linear if n.endswith(kind)]
        self.planted = deal_ranks(self.names, plan["ranks"], seed)
        self.costs = component_costs(adapt_with_ranks(self.model, dict.fromkeys(self.names, 1), 0))
        self.budget = sum(self.costs[n] * r for n, r in self.planted.items())
        remove_adapter(self.model)

    def cell(self, name: str, compute) -> dict:
        "Return a result from its file, or compute and store it."
        path = self.out / f"{self.seed}-{name}.json"
        if not path.exists():
            start = time.process_time()
            found = compute() | {"seed": self.seed, "cell": name}
            write_json(path, found | {"cpu_seconds": round(time.process_time() - start, 1)})
            print(path.stem, {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)
        return json.loads(path.read_text())

    def plain(self) -> nn.Module:
        "Return the model without an adapter."
        return remove_adapter(self.model) if adapter_state(self.model).config is not None else self.model

    @cached_property
    def teacher(self) -> dict[str, Tensor]:
        "Plant the updates, and return the teacher's log-probabilities on all texts."
        texts, plan = self.texts, self.plan
        self.base = log_probs(self.plain(), texts.held_out)
        plant(self.model, self.planted, texts.probe[: plan["scaled_items"]], plan["cost"], self.seed)
        return {part: log_probs(self.model, getattr(texts, part)) for part in ("train", "held_out", "probe")}

    def held_out(self, logp: Tensor | None = None) -> list[float]:
        "Return the divergence on every held-out item, nats a token."
        logp = log_probs(self.model, self.texts.held_out) if logp is None else logp
        return divergence(logp, self.teacher["held_out"]).mean(1).tolist()

    def fit(self, ranks: dict[str, int], rate: float, **options) -> list[float]:
        "Train a student of these ranks; every student of a planting sees the same items in the same order."
        plan, targets = self.plan, self.teacher["train"]
        adapt_with_ranks(self.model, ranks, self.seed)
        return distil(
            self.model, self.texts.train, targets, plan["steps"], rate, self.seed, plan["batch_size"], **options
        )

    def student(self, ranks: dict[str, int], rate: float) -> dict:
        "Return the held-out divergence of a student of these ranks."
        history, each = self.fit(ranks, rate), self.held_out()
        parameters = sum(p.numel() for p in trainable_parameters(self.model).values())
        return dict(
            loss=sum(each) / len(each),
            losses=each,
            train=sum(history[-20:]) / 20,
            ranks=ranks,
            rate=rate,
            parameters=parameters,
        )

    def planting(self) -> dict:
        "Return what was planted, and what each update is worth: the teacher's change without it."
        self.teacher  # plants
        layers, worth, sizes = adapter_layers(self.model), {}, {}
        for name, layer in layers.items():
            kept = layer.lora_B.data
            sizes[name] = ((layer.lora_B @ layer.lora_A).norm() * layer.scaling / layer.base_layer.weight.norm()).item()
            layer.lora_B.data = torch.zeros_like(kept)
            each = self.held_out()
            worth[name], layer.lora_B.data = sum(each) / len(each), kept
        each = self.held_out(self.base)
        return dict(loss=sum(each) / len(each), losses=each, ranks=self.planted, worth=worth, relative_size=sizes)

    def wide(self, rate: float) -> dict:
        "Distil the teacher into an adapter of the wide rank, and keep it for the scores."
        found = self.student(dict.fromkeys(self.names, self.plan["wide_rank"]), rate)
        torch.save({n: p.detach() for n, p in trainable_parameters(self.model).items()}, self.state(rate))
        return found

    def state(self, rate: float) -> Path:
        return STATES / f"wide-{self.out.name}-{self.seed}-{rate:g}.pt"

    def load_wide(self, rate: float) -> dict[str, Tensor]:
        "Give the model the wide student again; it is distilled again if its file is gone."
        if not self.state(rate).exists():
            self.wide(rate)
        adapt_with_ranks(self.model, dict.fromkeys(self.names, self.plan["wide_rank"]), self.seed)
        for name, value in torch.load(self.state(rate)).items():
            self.model.get_parameter(name).data = value
        return {n: p.detach() for n, p in trainable_parameters(self.model).items()}

    def scores(self, rate: float) -> dict:
        "Return every layer's scores by all ways except trained gates, and the ranks that they give."
        targets, probe = self.teacher["probe"], self.texts.probe
        params = self.load_wide(rate)
        with probing(self.model):
            parts = distil_parts(self.model, probe, targets, self.plan["batch_size"])
            metrics = update_metrics(self.model, parts, params, draws=1)
            found = {
                s: score_components(self.model, parts, params, metrics, s) for s in ("singular", "curvature", "gate")
            }
            slopes, H = gate_hessian(self.model, parts[: self.plan["hessian_parts"]], found["curvature"])
        worth = {s: {n: c.score for n, c in layers.items()} for s, layers in found.items()}
        worth |= self.before_training(targets)
        ranks = {s: ranks_within(layers, self.costs, self.budget) for s, layers in worth.items()}
        gates = {n: len(c.score) for n, c in found["curvature"].items()}
        ranks["hessian"] = hessian_ranks(slopes, H, gates, self.costs, self.budget)
        alone = (H.diag() / 2 - slopes).split(list(gates.values()))
        worth["hessian"] = {n: each.sort(descending=True).values for n, each in zip(gates, alone)}
        values = torch.linalg.eigvalsh((H + H.T).double() / 2).flip(0)
        lists = {s: {n: v.tolist() for n, v in layers.items()} for s, layers in worth.items()}
        return dict(ranks=ranks, scores=lists, eigenvalues=values.tolist(), slope=slopes.norm().item())

    def before_training(self, targets: Tensor) -> dict[str, dict[str, Tensor]]:
        "Return the scores that need no student."
        plain = self.plain()
        with probing(plain):
            parts = distil_parts(plain, self.texts.probe, targets, self.plan["batch_size"])
            weights = {f"{n}.weight": plain.get_submodule(n).weight.detach() for n in self.names}
            slopes = gradient_scores(parts, weights)
        return {"gradient": slopes, "inputs": input_scores(plain, self.names, self.texts.probe)}

    def gates(self, price: float) -> dict:
        "Train the wide student's components with gates under a penalty, and return the ranks of those left open widest."
        plan, targets = self.plan, self.teacher["train"]  # planting replaces the adapter, so it comes first
        self.load_wide(plan["rate"])
        gates = open_gates(self.model, {n: components(layer) for n, layer in adapter_layers(self.model).items()})
        penalise = lambda rate: shrink(gates, rate * price)
        steps, rate = plan["gate_steps"], plan["rate"]
        distil(self.model, self.texts.train, targets, steps, rate, self.seed + 1, plan["batch_size"], penalise)
        worth = {n: g.detach().abs().sort(descending=True).values for n, g in gates.items()}
        each = self.held_out()
        close_gates(self.model)
        lists = {n: v.tolist() for n, v in worth.items()}
        shut = sum(v == 0 for values in lists.values() for v in values) / sum(map(len, lists.values()))
        ranks = ranks_within(worth, self.costs, self.budget)
        found = recovery(ranks, self.planted)
        return dict(ranks=ranks, scores=lists, loss=sum(each) / len(each), shut=shut, recovery=found)

    def ranks_of(self, what: str) -> dict[str, int]:
        "Return the ranks of a candidate."
        score, _, dealt = what.partition(", ")
        if dealt:
            return shuffled(self.ranks_of(score), self.seed)
        if score == "oracle":
            return self.planted
        if score == "uniform":
            return dict.fromkeys(self.names, sum(self.plan["ranks"]) // len(self.plan["ranks"]))
        if score == "gates":
            return self.cell("gates", lambda: self.gates(self.plan["price"]))["ranks"]
        if score.startswith("slow "):
            slow = self.plan["more"]["slow"]
            return self.cell("slow scores", lambda: self.scores(slow))["ranks"][score.removeprefix("slow ")]
        return self.cell("scores", lambda: self.scores(self.plan["rate"]))["ranks"][score]

    def candidate(self, what: str) -> dict:
        "Train a candidate's ranks; equal ranks are trained once."
        ranks = self.ranks_of(what)
        for path in sorted(self.out.glob(f"{self.seed}-fit *.json")):
            if (other := json.loads(path.read_text()))["ranks"] == ranks:
                return {k: v for k, v in other.items() if k not in ("seed", "cell", "cpu_seconds")}
        return self.student(ranks, self.plan["rate"])


def candidates() -> list[str]:
    "Return all candidates for training at the budget, the most telling first."
    return ["oracle", "uniform", *SCORES, "oracle, shuffled", *(f"{s}, shuffled" for s in SCORES)]


def choices(out: Path, seed: int) -> dict:
    "Return the learning rate and the price that the pilot's rule chooses; RuntimeError before the pilot has ended."
    cells = [json.loads(path.read_text()) for path in sorted(out.glob(f"{seed}-*.json"))]
    rates, prices = {}, {}
    for cell in cells:
        kind, _, value = cell["cell"].partition(" ")
        if kind == "rate":
            rates.setdefault(cell["rate"], []).append(cell["loss"])
        if kind == "price":
            prices[float(value)] = cell["recovery"]["error"]
    if not rates:
        raise RuntimeError(f"{out} holds no pilot; run `planted.py pilot` first")
    best = [p for p in sorted(prices) if prices[p] == min(prices.values())]  # of equal ones the smallest is taken
    return {"rate": min(rates, key=lambda r: sum(rates[r]))} | ({"price": best[0], "equal": len(best)} if best else {})


def run(plan: dict, out: Path):
    "Compute every cell that is missing: seed by seed, so that a finished planting is whole."
    plan = plan | choices(out, plan["pilot"]["seed"])
    print({k: plan[k] for k in ("rate", "price")}, flush=True)
    for seed in (*plan["seeds"], *plan["more"]["seeds"]):
        lab, whole, slow = Lab(plan, seed, out), seed in plan["seeds"], plan["more"]["slow"]
        lab.cell("planting", lab.planting)
        if whole:
            lab.cell("wide", lambda lab=lab: lab.wide(plan["rate"]))
            for what in ("uniform", "oracle"):
                lab.cell(f"slow {what}", lambda lab=lab, what=what: lab.student(lab.ranks_of(what), slow))
        lab.cell("slow wide", lambda lab=lab: lab.wide(slow))
        for what in [*(candidates() if whole else []), *plan["more"]["candidates"]]:
            lab.cell(f"fit {what}", lambda lab=lab, what=what: lab.candidate(what))


def pilot(plan: dict, out: Path):
    "Try learning rates and prices of gates on the pilot's planting."
    seed = plan["pilot"]["seed"]
    lab = Lab(plan, seed, out)
    lab.cell("planting", lab.planting)
    for rate in plan["pilot"]["rates"]:
        for what in ("oracle", "uniform"):
            lab.cell(f"rate {rate:g} {what}", lambda what=what, rate=rate: lab.student(lab.ranks_of(what), rate))
    lab.plan = plan | choices(out, seed)
    lab.cell("wide", lambda: lab.wide(lab.plan["rate"]))
    for price in plan["pilot"]["prices"]:
        lab.cell(f"price {price:g}", lambda price=price: lab.gates(price))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pilot", "run", "report"))
    parser.add_argument("out", type=Path, help="folder of the cells")
    options = parser.parse_args()
    plan = tomllib.loads((HERE / "plan.toml").read_text())
    if options.what == "report":
        from reports.planted.page import write_page

        return write_page(plan, options.out, HERE, choices(options.out, plan["pilot"]["seed"]))
    options.out.mkdir(parents=True, exist_ok=True)
    {"pilot": pilot, "run": run}[options.what](plan, options.out)


if __name__ == "__main__":
    main()
