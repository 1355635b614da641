"""Every activation that torch offers lets channels through."""

import re

import pytest
import torch
from torch import nn

from lightning_prune import prune_filters

ELEMENTWISE = [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
    lambda: nn.Threshold(0.1, 0.2), nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout,
    *(lambda kind=kind: kind(inplace=True) for kind in (
        nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.RReLU, nn.ReLU, nn.ReLU6,
        nn.SELU, nn.SiLU,
    )),
    lambda: nn.Threshold(0.1, 0.2, inplace=True),
]  # fmt: skip


@pytest.mark.parametrize("make", ELEMENTWISE, ids=lambda make: repr(make()))
def test_activations_let_channels_through(make):
    """Channels before an activation can be cut, with the output of every operator compared."""
    model = nn.Sequential(nn.Conv2d(2, 8, 3), make(), nn.Conv2d(8, 3, 3)).double()
    report = prune_filters(model, torch.randn(2, 2, 7, 7, dtype=torch.float64), 0.5)
    assert [(group.before, group.after) for group in report.groups] == [(8, 4)]
    told = re.fullmatch(r"1 groups cut; \d+ operators ran, (\d+) outputs compared on [^;]+", report.proof)
    assert int(told[1]) >= 2
