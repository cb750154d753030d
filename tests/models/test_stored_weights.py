"Adapters over a frozen layer of another program's making, which computes its weight from what it stores."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_nb.layers.stored import StoredLinear
from dora_nb.models.adapt import adapt, count_parameters
from dora_nb.models.merge import merge, remove_adapter
from dora_nb.models.methods import AdapterConfig


class Int8Linear(StoredLinear):
    "Keeps a weight as whole numbers and a step per row."

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias, W = linear.bias, linear.weight.detach()
        self.register_buffer("step", W.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (W / self.step).round().to(torch.int8))

    weight = property(lambda self: self.codes * self.step)
    stored = property(lambda self: (self.codes, self.step))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_stored_weight_is_adapted_as_the_same_weight_in_full(method):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 64), torch.randn(20, 96)
    coded = Int8Linear(linear)
    dense = nn.Linear(96, 64)
    dense.weight.data, dense.bias.data = coded.weight, linear.bias.detach().clone()
    results, start = [], dense(x).detach()
    for base in (coded, dense):
        torch.manual_seed(1)  # the same start of A
        model = adapt(nn.Sequential(base), AdapterConfig(method, rank=4, target_modules=["0"]))
        torch.testing.assert_close(model(x), start)
        nn.init.normal_(model[0].lora_B, std=0.1)
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), [inputs, *trained]), torch.tensor(count_parameters(model))]
        )
        with torch.no_grad():
            torch.testing.assert_close(merge(model)(x), y, atol=1e-5, rtol=1e-4)
        assert type(model[0]) is nn.Linear
        assert remove_adapter(model)[0] is base
    torch.testing.assert_close(*results)
