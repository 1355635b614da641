"""Numbers that code makes from the type of a tensor (``torch.finfo``) are no reason to keep units in half precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import prune_filters


class Between(nn.Module):
    """Three linear layers, and a function of their outputs between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.between = between

    def forward(self, x):
        x = self.between(self.first(x)).relu()
        return self.third(self.between(self.second(x)).relu())


def kind(x):
    return torch.finfo(x.dtype)


BY_TYPE = {
    "eps": lambda x: (x.abs() + kind(x).eps).sqrt(),
    "lowest": lambda x: x.clamp(min=kind(x).min),
    "half of the lowest": lambda x: x.masked_fill(x < 0, kind(x).min / 2).relu(),
    "softmax of masked": lambda x: x.masked_fill(x < 0, kind(x).min).softmax(-1),
    "smallest": lambda x: x / (x.abs() + kind(x).tiny),
    "factor": lambda x: x * kind(x).bits,
    "bytes": lambda x: x + x.itemsize,
    "a tensor of it": lambda x: x + torch.tensor(kind(x).eps, dtype=x.dtype),
    "RMSNorm": lambda x: F.rms_norm(x, (x.shape[-1],)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_TYPE)
def test_numbers_by_type_change_nothing(name, dtype):
    """As many units are pruned in any type, and no number is taken for one that the code makes from a width."""
    model = Between(BY_TYPE[name]).to(dtype)
    report = prune_filters(model, torch.randn(4, 8, dtype=dtype), 0.5)
    assert [tuple(layer.weight.shape) for layer in (model.first, model.second)] == [(8, 8), (8, 8)]
    assert report.constants == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_by_width_are_caught_beside_them(dtype):
    """A number that is made from a width, and is no factor, keeps the units, whatever else the type changes."""

    def both(x):
        return (x.abs() + kind(x).eps + x.shape[-1]).sqrt()

    model = Between(both).to(dtype)
    with pytest.warns(UserWarning, match="pruned 0.0%"):
        prune_filters(model, torch.randn(4, 8, dtype=dtype), 0.5)
    assert model.first.weight.shape == (16, 8)
