"Curvature: what a product costs, how many are needed, and what other tools say of a case whose truth is known."

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from benchmarks.common import DEVICE, alone, arguments, finish, interleave, peak_bytes, ratio
from dora_nb.curvature.lanczos import top_eigenpairs
from dora_nb.curvature.operators import Operator, Part, ggnvp, gradients, hvp
from dora_nb.curvature.probe import loss_parts, probing
from dora_nb.data.assets import load_model
from dora_nb.data.rows import encode_item
from dora_nb.data.tasks import load_task
from dora_nb.layers.linear import DoRALinear, LoRALinear
from dora_nb.models.adapt import adapt, trainable_parameters
from dora_nb.models.methods import AdapterConfig
from dora_nb.training.batches import make_batch
from dora_nb.training.objectives import choice_scores

TARGETS = ("q_proj", "v_proj")


def setup(method, items, layers=None):
    "SmolLM2 with a moved adapter, its loss on some WinoGrande items in one part, and its parameters."
    model, tokenizer = load_model("smollm2-135m-instruct", device=DEVICE)
    torch.manual_seed(0)
    targets = TARGETS if layers is None else rf"model\.layers\.({layers})\.self_attn\.[qv]_proj"
    adapt(model, AdapterConfig(method, rank=8, alpha=16, target_modules=targets))
    for name, p in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(p, std=1e-2)
    data = load_task("winogrande", "train", limit=items, seed=0)
    rows = [encode_item(tokenizer, item)[0] for item in data]
    batch = [t.to(DEVICE) for t in make_batch(rows, data["gold"], range(items))]
    params = {n: p.detach() for n, p in trainable_parameters(model).items()}
    return model, loss_parts(model, [batch], "choices"), params, batch


def curvlinops_product(model, batch, gold):
    "Their GGN of the same outputs and loss, as a call with a vector."
    from curvlinops import GGNLinearOperator

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, _):
            return choice_scores(self.model, batch, "choices")

    learnt = list(trainable_parameters(model).values())
    data = [(torch.zeros(len(gold), 1, device=DEVICE), gold)]
    operator = GGNLinearOperator(Scores(), nn.CrossEntropyLoss(), learnt, data, check_deterministic=False)
    return lambda v: operator @ v


CALLS = {
    "gradient": lambda parts, params: lambda v: gradients(parts, params),
    "Hessian product": lambda parts, params: Operator(hvp, parts, params).__matmul__,
    "Hessian product, graph kept": lambda parts, params: Operator(hvp, parts, params, keep=True).__matmul__,
    "GGN product": lambda parts, params: Operator(ggnvp, parts, params).__matmul__,
    "GGN product, graph kept": lambda parts, params: Operator(ggnvp, parts, params, keep=True).__matmul__,
}


def costs(method, rounds, items):
    "Times and peak memory of each product, over a gradient's."
    model, parts, params, batch = setup(method, items)
    v = torch.randn(sum(p.numel() for p in params.values()), device=DEVICE)
    with probing(model):
        candidates = {name: make(parts, params) for name, make in CALLS.items()}
        candidates["curvlinops, GGN product"] = curvlinops_product(model, *batch)
        off = (candidates["curvlinops, GGN product"](v) - candidates["GGN product"](v)).norm() / v.norm()
        assert off < 1e-4, f"the two GGNs differ by {off}"
        times = interleave({name: lambda f=f: f(v) for name, f in candidates.items()}, rounds)
    peaks = {name: alone(peak_of, method, items, name) for name in CALLS}
    for name in candidates:
        row = {
            "method": method,
            "what": name,
            "time / gradient": "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(times, name, "gradient")),
        }
        row["peak memory / gradient"] = f"{peaks[name] / peaks['gradient']:.2f}" if name in peaks else ""
        row["time / curvlinops"] = f"{ratio(times, name, 'curvlinops, GGN product')[0]:.2f}" if "GGN" in name else ""
        yield row


def peak_of(method, items, name):
    "Bytes above the loaded model."
    model, parts, params, _ = setup(method, items)
    v = torch.randn(sum(p.numel() for p in params.values()), device=DEVICE)
    with probing(model):
        call = CALLS[name](parts, params)
        return peak_bytes(lambda: call(v))


class Counted:
    "A matrix that counts its products."

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device, self.count = (
            matrix,
            matrix.shape,
            matrix.dtype,
            matrix.device,
            0,
        )

    def __matmul__(self, V):
        self.count += 1 if V.dim() == 1 else V.shape[1]
        return self.matrix @ V


def products(method, k, tol, items):
    "How many products the top k of the last layer's Hessian take, ours and scipy's, and how far each is from the truth."
    model, parts, params, _ = setup(method, items, "29")

    n = sum(p.numel() for p in params.values())
    start = lambda seed: torch.randn(1, n, generator=torch.Generator().manual_seed(seed))[0].numpy()  # as ours

    def scipys(matrix, tol, seed):
        times = lambda v: (matrix @ torch.tensor(v.ravel(), dtype=torch.float32, device=DEVICE)).cpu().numpy()
        A = LinearOperator(matrix.shape, times, dtype=np.float32)
        return np.sort(eigsh(A, k, which="LA", tol=tol, v0=start(seed))[0])[::-1]

    def ours(matrix, block, seed):
        found = top_eigenpairs(matrix, k, tol=tol, block=block, max_products=400, seed=seed)
        return found["top"].values.numpy()

    candidates = {
        "scipy's eigsh": lambda m, seed: scipys(m, tol, seed),
        "ours": lambda m, seed: ours(m, 1, seed),
        "ours, blocks of 2": lambda m, seed: ours(m, 2, seed),
    }
    with probing(model):
        operator = Operator(hvp, parts, params, keep=True)
        truth = scipys(operator, 1e-6, 0)
        equal = lambda values: int((values > 0.99 * truth[0]).sum())
        for name, find in candidates.items():
            counts, copies = [], []
            for seed in range(2):
                counted = Counted(operator)
                copies.append(equal(find(counted, seed)))
                counts.append(counted.count)
            row = {"method": method, "by": name, "products, by start": counts}
            yield row | {"copies of λ₁ found (within 1 %)": copies, "true copies": equal(truth)}


def small(kind, moved):
    "A network of some fifty parameters, float32: module, inputs, labels."
    torch.manual_seed(1)
    options = dict(plan="plain") | (dict(detach_norm=False) if kind is DoRALinear else {})
    net = nn.Sequential(kind(nn.Linear(6, 5), 3, 6.0, **options), nn.SiLU(), kind(nn.Linear(5, 3), 3, 6.0, **options))
    for m in (net[0], net[2]):
        m.lora_B.data.normal_(std=0.5 * moved)
    return net, torch.randn(16, 6), torch.randint(3, (16,))


def pyhessian(net, x, y):
    from pyhessian import hessian

    return hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(maxIter=200, tol=1e-4, top_n=3)[0]


def eigenthings(net, x, y, products, seed):
    "hessian-eigenthings' Lanczos, with so many products; its own choice, 2k, if None."
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(net, [(x, y)], supervised_loss(F.cross_entropy))
    return lanczos(operator, k=3, max_iter=products, which="LA", seed=seed).eigenvalues


def cases():
    "Three eigenvalues by each tool, and the truth."
    for kind in (LoRALinear, DoRALinear):
        for moved in (0.0, 1.0):
            net, x, y = small(kind, moved)
            params = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
            part = Part(
                lambda p: torch.func.functional_call(net, p, (x,)),
                lambda z: F.cross_entropy(z, y, reduction="none"),
                1 / 16,
            )
            operator = Operator(hvp, part, params)
            true = torch.linalg.eigvalsh(operator.dense().double())
            ours = top_eigenpairs(operator, 3, "both", tol=1e-5, block=3)
            show = lambda values: ", ".join(f"{float(v):+.3f}" for v in values)
            row = {"case": f"{kind.__name__[:4]}, B {'moved' if moved else '= 0'}", "true top": show(true.flip(0)[:3])}
            row |= {
                "ours": show(ours["top"].values),
                "true bottom": show(true[:3]),
                "ours ": show(ours["bottom"].values),
            }
            for seed in (0, 1):
                torch.manual_seed(seed)
                row[f"PyHessian, seed {seed}"] = show(pyhessian(net, x, y))
            row["hessian-eigenthings"] = show(eigenthings(net, x, y, None, 0))
            row["hessian-eigenthings, 55 products"] = show(eigenthings(net, x, y, 55, 0))
            yield row


def main():
    options = arguments(__doc__, rounds=5, items=8, k=10, tol=1e-3, methods="lora,dora")
    methods, tables = options.methods.split(","), {}
    rows = []
    for method in methods:
        for row in costs(method, options.rounds, options.items):
            rows.append(row)
            print(row, flush=True)
    tables["Products for the ten largest eigenvalues"] = [
        row for method in methods for row in products(method, options.k, options.tol, options.items)
    ]
    tables["Three outermost eigenvalues of a small network, by tool"] = list(cases())
    for title, more in tables.items():
        print(f"\n{title}\n", *more, sep="\n")
    finish("curvature.py", rows, list(rows[0]), options.out, options=vars(options) | {"out": None}, tables=tables)


if __name__ == "__main__":
    main()
