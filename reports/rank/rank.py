"Do ranks that curvature chooses help? Each against controls of the same size, on SmolLM2 and real text."

import json
import random
from pathlib import Path

import torch

from benchmarks.common import DEVICE, arguments, machine
from dora_nb.curvature.components import components, score_components
from dora_nb.curvature.kronecker import kfac, update_metrics
from dora_nb.curvature.operators import gradients
from dora_nb.curvature.probe import item_parts, probing
from dora_nb.curvature.rank import allocate, component_costs, truncate
from dora_nb.curvature.rank_search import close_gates, open_gates, shrink, shuffled
from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.models.adapt import adapt, adapter_layers, adapter_state, trainable_parameters
from dora_nb.models.merge import remove_adapter
from dora_nb.models.methods import AdapterConfig
from dora_nb.models.scoring import choice_logprobs, context_length
from dora_nb.training.batches import encode_items, make_batch, micro_batches
from dora_nb.training.config import TrainConfig, autocast
from dora_nb.training.evaluate import evaluate
from dora_nb.training.train import train

TARGETS = ("q_proj", "v_proj")
WIDE, NARROW = 8, 2
ANEW = ("uniform", "curvature", "curvature, shuffled", "singular", "gradient", "activation")
CUTS = ("curvature", "singular", "gate", "fisher", "singular, uniform", "random")


class Lab:
    "One model, some text, and what has been measured so far (a line of JSON each: nothing is measured twice)."

    def __init__(self, options):
        self.o, self.path = options, options.out
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {json.dumps(r["key"]): r for r in map(json.loads, lines)}
        self.model, self.tokenizer = load_model("smollm2-135m-instruct", device=DEVICE)
        self.text = lambda split, n, seed=0: load_task("boolq", split, limit=n, seed=seed)

    def measure(self, key, f):
        "What `f` gives, from the file if it is there."
        name = json.dumps(key)
        if name not in self.done:
            torch.manual_seed(0)
            self.done[name] = {"key": key} | f()
            with open(self.path, "a") as file:
                file.write(json.dumps(self.done[name]) + "\n")
            print(*key, {k: v for k, v in self.done[name].items() if isinstance(v, float)}, flush=True)
        return self.done[name]

    def config(self, rate=1e-3, seed=0):
        return TrainConfig("prompt", rate, batch_size=self.o.batch, max_tokens=self.o.tokens, seed=seed)

    def fresh(self, rank, seed, pattern=None, targets=TARGETS):
        "The model with a new adapter; α = 2r for every layer, so s = 2 whatever the rank."
        if adapter_state(self.model).config:
            remove_adapter(self.model)
        torch.manual_seed(seed)
        pattern = pattern or {}
        alphas = {n: 2.0 * r for n, r in pattern.items()}
        config = AdapterConfig(
            self.o.method, rank, 2 * rank, target_modules=targets, rank_pattern=pattern, alpha_pattern=alphas
        )
        return adapt(self.model, config)

    def fit(self, rate, seed, steps, shift=0, after_step=None):
        items = self.text("train", steps * self.o.batch, 100 * (seed + 1) + shift)
        return train(self.model, self.tokenizer, items, self.config(rate, seed), after_step=after_step, progress=False)

    @torch.no_grad()
    def losses(self, split, n):
        "Nats a token of every item, on held-out text."
        items, config = self.text(split, n), self.config()
        context = context_length(self.model)
        rows, found = encode_items(self.tokenizer, items, config, False, context), {}
        for group in micro_batches(range(len(rows)), rows, 1024):
            batch, _ = make_batch(rows, [0] * len(rows), group)
            with autocast("auto", DEVICE):
                sums = choice_logprobs(self.model.eval(), batch.to(DEVICE))
            counts = batch.owner.bincount(minlength=sums.numel()).view_as(sums)
            sums = sums.masked_fill(counts == 0, 0)
            found |= dict(zip(group, (-sums.sum(1) / counts.sum(1)).tolist()))
        return [found[i] for i in range(len(rows))]

    def judged(self):
        "Loss and accuracy on validation items."
        each = self.losses("validation", self.o.validation)
        items = self.text("validation", self.o.validation)
        _, answers = evaluate(
            self.model, self.tokenizer, items, max_tokens=self.o.tokens, precision="auto", progress=False
        )
        right = [int(a["pred"] == a["gold"]) for a in answers]
        return dict(loss=sum(each) / len(each), accuracy=sum(right) / len(right), losses=each, right=right)

    def scored(self, score, seed=7, n=None):
        "Components of the present adapter, scored on text that it was not trained on."
        params = {k: p.detach() for k, p in trainable_parameters(self.model).items()}
        with probing(self.model):
            parts = item_parts(self.model, self.tokenizer, self.text("train", n or self.o.probe, seed), self.config())
            metrics = update_metrics(self.model, parts, params, draws=1)
            return score_components(self.model, parts, params, metrics, score)


def budget(lab):
    return sum(c * NARROW for c in component_costs(lab.model).values())


def before_training(lab, what):
    "Scores of every layer's directions from gradients or activations of the untrained model."
    lab.fresh(WIDE, 0)
    layers, found = adapter_layers(lab.model), {}
    with probing(lab.model):
        parts = item_parts(lab.model, lab.tokenizer, lab.text("train", lab.o.probe, 7), lab.config(), alone=False)
        if what == "gradient":
            weights = {f"{n}.base_layer.weight": layer.base_layer.weight.detach() for n, layer in layers.items()}
            _, slopes = gradients(parts, weights)
            found = {n: torch.linalg.svdvals(slopes[f"{n}.base_layer.weight"]).square() for n in layers}
        else:
            params = {k: p.detach() for k, p in trainable_parameters(lab.model).items()}
            factors = kfac(lab.model, parts, params, draws=1)
            variance = {n: torch.linalg.eigvalsh(factors[n].C).flip(0).clamp_min(0) for n in layers}
            found = {n: v / v.sum() for n, v in variance.items()}  # as EVA: shares of explained variance
    return {n: v[:WIDE] for n, v in found.items()}


def pattern(lab, what, seed):
    "The ranks by one of `ANEW`, after a short warm-up of a wide adapter where it needs one."
    if what == "uniform":
        return {}
    if what.endswith("shuffled"):
        return shuffled(pattern(lab, what.split(",")[0], seed), seed)

    def find():
        if what in ("gradient", "activation"):
            scores = before_training(lab, what)
        else:
            lab.fresh(WIDE, seed)
            lab.fit(2e-3, seed, lab.o.warmup, shift=50)
            scores = {n: c.score for n, c in lab.scored(what).items()}
        return {"ranks": allocate(scores, component_costs(lab.model), budget(lab))}

    return lab.measure(["ranks", what, seed], find)["ranks"]


def anew(lab, what, seed, rate, judge):
    "Train a pattern from the start."
    ranks = pattern(lab, what, seed) if what != "wide" else {}

    def go():
        lab.fresh(WIDE if what == "wide" else NARROW, seed, ranks)
        lab.fit(rate, seed, lab.o.steps)
        return judge()

    return go


def tuned(lab, what):
    "The best of the rates on dev, with the first seed."
    tries = {}
    for rate in map(float, lab.o.rates.split(",")):

        def dev():
            each = lab.losses("dev", lab.o.dev)
            return dict(loss=sum(each) / len(each))

        tries[rate] = lab.measure(["dev", what, rate], anew(lab, what, 0, rate, dev))["loss"]
    return min(tries, key=tries.get)


def cut(lab, what, seed, rate):
    "Every way to cut the same wide adapter to the budget."

    def go():
        lab.fresh(WIDE, seed)
        lab.fit(rate, seed, lab.o.steps)
        state = {n: p.detach().clone() for n, p in trainable_parameters(lab.model).items()}
        result = {}
        for name in CUTS:
            lab.fresh(WIDE, seed)
            for n, p in trainable_parameters(lab.model).items():
                p.data.copy_(state[n])
            score = name.split(",")[0]
            if score == "random":
                found = {n: components(layer) for n, layer in adapter_layers(lab.model).items()}
                rng = torch.Generator().manual_seed(seed)
                for n, c in found.items():
                    keep = torch.randperm(WIDE, generator=rng)
                    found[n] = c._replace(B=c.B[:, keep], A=c.A[keep], mix=c.mix[:, keep])
            else:
                found = lab.scored(score)
            even = name in ("random", "singular, uniform")
            worth = {n: c.score for n, c in found.items()}
            ranks = dict.fromkeys(found, NARROW) if even else allocate(worth, component_costs(lab.model), budget(lab))
            truncate(lab.model, found, ranks)
            result[name] = lab.judged()
        return result

    return go


def gated(lab, seed, rate, price):
    "Plain training, then gates under a price, then what is left at the budget, trained on: the same steps in all."

    def go():
        parts = lab.o.steps // 4, lab.o.steps // 2, lab.o.steps - lab.o.steps // 4 - lab.o.steps // 2
        lab.fresh(WIDE, seed)
        lab.fit(rate, seed, parts[0])
        gates = open_gates(lab.model, {n: components(layer) for n, layer in adapter_layers(lab.model).items()})
        lab.fit(rate, seed, parts[1], 1, lambda record: shrink(gates, record["learning_rate"] * price))
        shut = sum(int((g == 0).sum()) for g in gates.values()) / sum(len(g) for g in gates.values())
        worth = {n: g.detach().abs().sort(descending=True).values for n, g in gates.items()}
        close_gates(lab.model, allocate(worth, component_costs(lab.model), budget(lab)))
        lab.fit(rate, seed, parts[2], 2)
        return lab.judged() | {"shut": shut}

    return go


def alone(lab, name):
    "What a single layer's adapter brings by itself, in nats on dev."

    def go():
        lab.fresh(NARROW, 0, targets=(name,))
        lab.fit(2e-3, 0, lab.o.alone)
        each = lab.losses("dev", lab.o.dev)
        return dict(loss=sum(each) / len(each))

    return go


def layer_scores(lab, rate):
    "Every score of every layer of a warmed-up adapter, twice on disjoint text; and what cutting one layer does."

    def go():
        result = {}
        lab.fresh(WIDE, 0)
        lab.fit(rate, 0, lab.o.warmup, shift=50)
        for half in (7, 8):
            for score in ("curvature", "singular", "gate", "fisher"):
                found = lab.scored(score, half)
                result[f"{score}, text {half}"] = {n: c.score.sum().item() for n, c in found.items()}
                result[f"{score} ranks, text {half}"] = allocate(
                    {n: c.score for n, c in found.items()}, component_costs(lab.model), budget(lab)
                )
        found, layers = lab.scored("curvature"), adapter_layers(lab.model)
        result["predicted"], result["actual"] = {}, {}
        whole = sum(lab.losses("dev", lab.o.dev)) / lab.o.dev
        for name, layer in layers.items():
            A, B = layer.lora_A.data.clone(), layer.lora_B.data.clone()
            c = found[name]
            layer.lora_B.data.zero_()
            layer.lora_B.data[:, :NARROW] = (c.B[:, :NARROW] / layer.scaling).to(B)
            layer.lora_A.data[:NARROW] = c.A[:NARROW].to(A)
            result["predicted"][name] = c.score[NARROW:].sum().item()
            result["actual"][name] = sum(lab.losses("dev", lab.o.dev)) / lab.o.dev - whole
            layer.lora_A.data, layer.lora_B.data = A, B
        for what in ("gradient", "activation"):
            result[what] = {n: v.sum().item() for n, v in before_training(lab, what).items()}
        return result

    return go


def main():
    options = arguments(
        __doc__,
        method="lora",
        steps=40,
        warmup=12,
        alone=10,
        batch=8,
        tokens=48,
        probe=32,
        dev=48,
        validation=160,
        seeds=3,
        rates="4e-3,8e-3,1.6e-2,3.2e-2",
        prices="0.5,2",
    )
    options.out = options.out or Path(__file__).parent / f"{options.method}.jsonl"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lab = Lab(options)
    given = {k: str(v) for k, v in vars(options).items() if k != "out"}
    if lab.measure(["options"], lambda: {"options": given, "machine": machine()})["options"] != given:
        raise SystemExit(f"{options.out} was measured with other options; give the same ones, or another --out")
    dev = lambda: sum(lab.losses("dev", options.dev)) / options.dev
    lab.measure(["base"], lambda: {"loss_dev": dev()} | lab.judged())
    seeds = range(options.seeds)
    rates = {what: tuned(lab, what) for what in ("wide", *ANEW)}
    for seed in seeds:
        for what in ("wide", *ANEW):
            lab.measure(["anew", what, seed], anew(lab, what, seed, rates[what], lab.judged))
        lab.measure(["cuts", seed], cut(lab, "wide", seed, rates["wide"]))
    for what in ("uniform", "curvature, shuffled"):  # is it the ranks, or the rate that dev chose?
        for seed in seeds:
            go = anew(lab, what, seed, rates["curvature"], lab.judged)
            lab.measure(["at the rate of curvature", what, seed], go)
    lab.fresh(WIDE, 0)
    names = list(adapter_layers(lab.model))
    lab.measure(["layers"], layer_scores(lab, rates["wide"]))
    for price in map(float, options.prices.split(",")):
        for seed in seeds:
            lab.measure(["gates", price, seed], gated(lab, seed, rates["wide"], price))
    for name in random.Random(0).sample(names, len(names)):
        lab.measure(["alone", name], alone(lab, name))


if __name__ == "__main__":
    main()
