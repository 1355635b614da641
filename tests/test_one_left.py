"""Cuts that leave a single unit: what the code makes of its place is seen in whatever form outputs have."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.filters import prune_filters
from tests.silencing import silence_

# What code makes for each unit: alike whatever the width, or another number for each place.
MADE = {
    "seeded": lambda size: torch.randn(size, generator=torch.Generator().manual_seed(3)),
    "permuted": lambda size: 1 + torch.randperm(size, generator=torch.Generator().manual_seed(1)),
    "numpy": lambda size: torch.from_numpy(np.random.default_rng(3).normal(size=int(size))),
    "counted": lambda size: torch.arange(1, size + 1),
    "spread": lambda size: torch.linspace(1, 2, size),
    "divided": lambda size: torch.arange(1, size + 1) / size,
    "alike": torch.ones,
}
FORMS = {
    "plain": lambda scores: scores,
    "complex": torch.fft.rfft,
    "spectrum": lambda scores: torch.complex(scores, scores.flip(-1)),
    "chosen": lambda scores: scores.argmax(-1),
    "passed": lambda scores: scores > 0.1,
    "tiny": lambda scores: scores * 1e-7,
    "undefined": lambda scores: torch.cat([scores, scores[:, :1] * torch.nan], -1),
    "rounded": lambda scores: (scores * 4).round().long(),
    "named": lambda scores: {"scores": torch.view_as_complex(torch.stack([scores, scores], -1))},
}


class Placed(nn.Module):
    """Multiplies each hidden unit by a number that goes by its place, and returns scores in some form."""

    def __init__(self, width, stays, made, form, how):
        super().__init__()
        self.width, self.made, self.form, self.how = width, MADE[made], FORMS[form], how
        self.enter, self.leave = nn.Linear(6, width), nn.Linear(width, 5)
        with torch.no_grad():
            self.enter.weight[stays] += 10 * self.enter.weight[stays].sign()

    def scores(self, x):
        hidden = self.enter(x)
        made = self.made(self.width).to(hidden)
        if self.how == "einsum":  # which runs other operators where a dimension is one
            return torch.einsum("bh,h,oh->bo", hidden, made, self.leave.weight)
        if self.how == "squeezed":
            return self.leave(torch.tanh(hidden.unsqueeze(1).mul(made).squeeze().reshape(len(x), -1)))
        return self.leave(torch.tanh(hidden * made))

    def forward(self, x):
        return self.form(self.scores(x))


@pytest.mark.parametrize("how", ["times", "einsum", "squeezed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(("width", "stays"), [(2, 1), (3, 1), (6, 1), (6, 5)])
def test_a_single_unit_that_is_left_is_the_right_one(width, stays, made, form, how):
    """Whatever is returned, the scores behind it are those of the unit that stays, or nothing was cut."""
    torch.manual_seed(width + stays)
    model = Placed(width, stays, made, form, how).double().eval()
    full = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = prune_filters(model, torch.randn(2, 6).double(), 1 - 1 / width, criterion="l1")
        except PruningError:
            report = None
    if report is not None:
        silence_(full, report.kept)
    x = torch.randn(16, 6).double()
    torch.testing.assert_close(model.scores(x), full.scores(x))
    if made == "alike" and how == "times":
        assert model.enter.out_features == 1
