"""How scores and a target become a plan."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import PruningError
from lightning_prune.budget import Budget, Dense, Footprint, measure, plan
from lightning_prune.structure import find_structure, trace
from tests.models import ROWS

MODEL = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)).double()
STRUCTURE = find_structure(trace(MODEL, ROWS))
SCORES = {"0": torch.arange(8.0), "2": torch.arange(12.0).flip(0)}
DENSE = Dense({"0": 8, "2": 12}, measure(MODEL, STRUCTURE, {}))


def planned(amount, target="filters", scope="layer", round_to=1, scores=SCORES, dense=DENSE, **limits):
    return plan(
        STRUCTURE, scores, amount, Budget(target, scope, round_to, **limits), dense=dense,
        footprint=lambda keep: measure(MODEL, STRUCTURE, keep),
    )  # fmt: skip


def left(keep):
    return [int(keep[name].sum()) for name in ("0", "2")]


def test_footprints_are_arithmetic():
    """Parameters and multiply-adds of two rows through three linear layers, before and after a cut."""
    assert measure(MODEL, STRUCTURE, {}) == Footprint(56 + 108 + 26, 2 * (48 + 96 + 24))
    keep = {"0": np.arange(8) < 5, "2": np.arange(12) < 3}
    assert measure(MODEL, STRUCTURE, keep) == Footprint(35 + 18 + 8, 2 * (30 + 15 + 6))
    assert measure(MODEL, STRUCTURE, keep, uncounted=7).flops == 2 * (30 + 15 + 6) + 7


@given(amount=st.floats(0, 1, exclude_max=True))
def test_the_lowest_of_every_layer_leave(amount):
    """With scope="layer" the share of each group leaves, lowest scores first, and one unit stays at least."""
    keep = planned(amount)
    assert left(keep) == [max(1, n - math.ceil(amount * n - 1e-9)) for n in (8, 12)]
    assert keep["0"].tolist() == sorted(keep["0"].tolist())
    assert keep["2"].tolist() == sorted(keep["2"].tolist(), reverse=True)


@given(first=st.floats(0, 0.9), second=st.floats(0, 0.9))
def test_amounts_count_from_the_start(first, second):
    """A plan on a model that was cut already goes on to the amount of what was there at first."""
    dense = Dense({"0": 16, "2": 12}, DENSE.footprint)  # half of the first layer has gone before
    keep = planned({"0": first, "2": second}, dense=dense)
    assert left(keep) == [min(8, max(1, 16 - math.ceil(16 * first - 1e-9))), 12 - math.ceil(12 * second - 1e-9)]


@settings(deadline=None, max_examples=30)
@given(
    amounts=st.tuples(st.floats(0, 0.75), st.floats(0, 0.75)),
    target=st.sampled_from(["filters", "params", "flops"]),
    scope=st.sampled_from(["layer", "global"]),
)
def test_larger_amounts_keep_a_subset(amounts, target, scope):
    """What a larger amount keeps a smaller one keeps too, for every target and scope."""
    less, more = (planned(amount, target, scope) for amount in sorted(amounts))
    assert all((more[name] <= less[name]).all() for name in less)


@settings(deadline=None, max_examples=30)
@given(amount=st.floats(0, 0.75), target=st.sampled_from(["params", "flops"]), round_to=st.integers(1, 5))
def test_budgets_hold(amount, target, round_to):
    """The plan costs no more than the budget, also with rounded widths."""
    try:
        keep = planned(amount, target, round_to=round_to)
    except PruningError:
        assert round_to > 1
        return
    assert getattr(measure(MODEL, STRUCTURE, keep), target) <= (1 - amount) * getattr(DENSE.footprint, target) * (
        1 + 1e-9
    )
    assert all(n % round_to == 0 or n == width for n, width in zip(left(keep), (8, 12), strict=True))


def test_equal_scores_leave_exactly_as_many():
    """Ties do not let more or fewer leave than asked."""
    ties = {"0": torch.zeros(8), "2": torch.zeros(12)}
    for scope in ("layer", "global"):
        assert sum(left(planned(0.5, scope=scope, scores=ties))) == 10


def test_scores_that_are_not_numbers_leave_first():
    """NaN counts as the lowest score."""
    scores = {**SCORES, "0": torch.tensor([math.nan, *range(7)])}
    for scope in ("layer", "global"):
        assert not planned(0.1, scope=scope, scores=scores)["0"][0]


def test_what_cannot_be_reached_is_refused():
    """Beyond what one unit per group leaves, the error says how much can go."""
    with pytest.raises(PruningError, match=r"amount=0\.95 of the params cannot go.*93\.2% would be gone"):
        planned(0.95, "params")
