"""Numbers that remember where they came from are numbers like any other."""

import copy
import operator
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.filters import prune_filters
from lightning_prune.structure.traced_ints import Held, Number
from tests.models import SEQUENCE

OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]


@given(value=st.integers(2, 50), other=st.integers(1, 50), which=st.sampled_from(OPERATORS), after=st.integers(1, 50))
def test_arithmetic_is_remembered(value, other, which, after):
    """What arithmetic makes of a number equals what it makes of a plain one, and can be worked out anew."""
    number = Number(value, Held("module", "name"))
    for result, plain, anew in (
        (which(number, other), which(value, other), which(after, other)),
        (which(other, number), which(other, value), which(other, after)),
    ):
        assert result == plain and hash(result) == hash(plain) and f"{result}" == f"{plain}"
        assert result.evaluate(lambda origin, before: after) == anew


def test_copies_are_plain():
    """A copied or pickled number is a plain one."""
    number = Number(3, Held("module", "name"))
    assert type(copy.deepcopy(number)) is type(pickle.loads(pickle.dumps(number))) is int


class Counting(nn.Module):
    """Takes plain numbers alone, compares widths, and writes down what it saw."""

    def __init__(self, strict):
        super().__init__()
        self.width, self.strict, self.seen = 8, strict, None
        self.enter, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.enter(x)
        self.seen = x.shape[-1]
        assert self.width == x.shape[-1]
        if self.strict and type(self.width) is not int:
            raise TypeError("a plain number, please")
        return self.out(x)


def test_a_number_that_code_compares_follows():
    """A width that code checks against an attribute can leave: the attribute follows."""
    model = Counting(strict=False).double()
    prune_filters(model, SEQUENCE, 0.5)
    assert (model.width, model.enter.out_features, type(model.width), model.seen) == (4, 4, int, None)


def test_code_that_takes_plain_numbers_alone_is_traced_without():
    """Where numbers with a memory do not do, the trace goes without, and what then cannot follow is not prunable."""
    model = Counting(strict=True).double()
    with pytest.raises(PruningError, match=r"Nothing is left to prune.*enter\.weight: the slim model does not run"):
        prune_filters(model, SEQUENCE, 0.5)
    assert model.enter.out_features == 8


class Shaped(nn.Module):
    """Holds sizes in a list, as ``Unflatten`` does in a tuple."""

    def __init__(self):
        super().__init__()
        self.sizes = [2, 6]
        self.enter, self.unflatten, self.out = nn.Linear(6, 8), nn.Unflatten(-1, (4, 2)), nn.Linear(8, 2)

    def forward(self, x):
        first, second = self.unflatten(self.enter(x)).flatten(-2).split(self.sizes, -1)
        return self.out(torch.cat([second, first], -1))


@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_numbers_in_tuples_and_lists_follow(amount):
    """Sizes held in a list or tuple stay a list or tuple, and repeat the widths that are left."""
    model = Shaped().double()
    prune_filters(model, SEQUENCE, amount)
    assert type(model.sizes) is list and sum(model.sizes) == model.enter.out_features < 8
    assert type(model.unflatten.unflattened_size) is tuple
    assert model.unflatten.unflattened_size[0] * model.unflatten.unflattened_size[1] == model.enter.out_features
    assert model(SEQUENCE).shape == (*SEQUENCE.shape[:2], 2)
