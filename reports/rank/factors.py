"What the curvature says that each layer's update is worth, by Kronecker factors with and without the true trace, and exactly."

import json

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import DEVICE, arguments, finish
from dora_nb.curvature.components import canonical
from dora_nb.curvature.kronecker import update_metrics
from dora_nb.curvature.operators import ggnvp
from dora_nb.curvature.probe import item_parts, probing
from dora_nb.data.assets import load_model
from dora_nb.data.tasks import load_task
from dora_nb.models.adapt import adapt, adapter_layers, trainable_parameters
from dora_nb.models.methods import AdapterConfig
from dora_nb.training.config import TrainConfig
from dora_nb.training.train import train


def worth(parts, layer, name, metric):
    "Half of ΔW·G·ΔW for the update of a layer, in nats: exactly, by the factors, and by the factors as they come."
    sigma = canonical(layer.lora_B, layer.lora_A, layer.scaling, metric).sigma
    weight = f"{name}.base_layer.weight"
    at, update = layer.base_layer.weight.detach(), (layer.scaling * layer.lora_B @ layer.lora_A).detach()
    exact = sum((ggnvp(part, {weight: at})({weight: update})[weight] * update).sum().item() for part in parts)
    factors = sigma.square().sum().item()
    return {"exact": exact / 2, "factors": factors / 2, "unscaled": factors / metric.scale / 2}


def off(rows, kind):
    "The sum over layers as a share of the exact one, the median factor that a layer is off by, and Spearman's correlation."
    exact, by = (np.array([r[k] for r in rows]) for k in ("exact", kind))
    return by.sum() / exact.sum(), np.exp(np.median(np.abs(np.log(by / exact)))), spearmanr(exact, by)[0]


def main():
    options = arguments(__doc__, layers="0,5,11,15,29", task="social_iqa", train_items=80, items=16, rank=8)
    model, tokenizer = load_model("smollm2-135m-instruct", device=DEVICE)
    targets = rf"model\.layers\.({options.layers.replace(',', '|')})\.(self_attn\.[qv]|mlp\.(up|down))_proj"
    torch.manual_seed(0)
    adapt(model, AdapterConfig("lora", rank=options.rank, alpha=2 * options.rank, target_modules=targets))
    config = TrainConfig(learning_rate=1e-3, batch_size=8)
    draw = lambda split, n: load_task(options.task, split, limit=n, seed=1)
    train(model, tokenizer, draw("train", options.train_items), config, progress=False)
    rows = []
    with probing(model):
        params = {n: p.detach() for n, p in trainable_parameters(model).items()}
        parts = item_parts(model, tokenizer, draw("dev", options.items), config)
        metrics = update_metrics(model, parts, params)
        for name, layer in adapter_layers(model).items():
            found = worth(parts, layer, name, metrics[name])
            rows.append({"layer": name.removeprefix("model.layers."), **found})
            print(json.dumps(rows[-1]), flush=True)
    for kind in ("factors", "unscaled"):
        print(
            "{}: {:.2f} of the exact sum, off by a factor of {:.1f} (median), Spearman {:.2f}".format(
                kind, *off(rows, kind)
            )
        )
    finish(
        "factors.py",
        rows,
        ["layer", "exact", "factors", "unscaled"],
        options.out,
        options=vars(options) | {"out": None},
    )


if __name__ == "__main__":
    main()
