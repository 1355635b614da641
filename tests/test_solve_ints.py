"""Numbers on modules that show only in what code makes of them follow."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.filters import prune_filters
from lightning_prune.structure.solve_ints import place_of, worked_back
from lightning_prune.structure.traced_ints import Held, Number
from tests.models import SEQUENCE

HELD = Held("module", "name")


@given(
    before=st.integers(1, 99),
    after=st.integers(1, 99),
    steps=st.lists(
        st.tuples(st.sampled_from([operator.add, operator.sub, operator.floordiv]), st.integers(1, 9)), max_size=4
    ),
    times=st.integers(1, 9),
)
def test_numbers_are_worked_back(before, after, steps, times):
    """From the number that code should come to, what the module must hold is found, through any arithmetic."""
    number = Number(before, HELD)
    for operation, other in steps:
        number = operation(number, other)
    number = times * number
    wanted = number.evaluate(lambda origin, value: after)
    found = worked_back(number, place_of(HELD), wanted, lambda origin, value: value)
    assert number.evaluate(lambda origin, value: found) == wanted


@pytest.mark.parametrize("operation", [operator.sub, operator.floordiv])
def test_numbers_that_are_taken_away_or_divided_by_are_worked_back(operation):
    """What stands on the right of an operator that tells its sides apart is found, too."""
    number = operation(24, Number(4, HELD))
    found = worked_back(number, place_of(HELD), operation(24, 3), lambda origin, value: value)
    assert operation(24, found) == operation(24, 3)


class Halves(nn.Module):
    """Keeps a width and a number of parts, and splits into these; or keeps heads, and asks for them with the batch."""

    def __init__(self, way):
        super().__init__()
        self.width, self.parts, self.heads, self.way = 8, 2, 4, way
        self.enter, self.out = nn.Linear(6, 8), nn.Linear(4 if way == "split" else 8, 2)

    def forward(self, x):
        x = self.enter(x)
        if self.way == "split":
            first, second = x.split(self.width // self.parts, -1)
            return self.out(first * second.sigmoid())
        x = x.transpose(1, 2).reshape(len(x) * self.heads, -1, x.shape[1]).cumsum(-1)
        return self.out(x.reshape(len(x) // self.heads, -1, x.shape[-1]).transpose(1, 2))


@pytest.mark.parametrize(("way", "width", "heads"), [("split", 4, 4), ("batch", 8, 2)])
def test_a_number_follows_what_code_makes_of_it(way, width, heads):
    """Of a share of the width, or heads times the batch, whatever is left tells what the module must keep."""
    model = Halves(way).double()
    report = prune_filters(model, SEQUENCE, 0.5)
    assert (model.enter.out_features, model.width, model.heads) == (4, width, heads)
    assert model(SEQUENCE).shape == (2, 5, 2) and not any(pin.tensor == "enter.weight" for pin in report.pinned)


class Square(nn.Module):
    """Keeps the side of a square, and asks for as many channels as it has fields."""

    def __init__(self):
        super().__init__()
        self.side, self.enter, self.out = 3, nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x):
        return self.out(self.enter(x).reshape(len(x), -1, self.side * self.side))


def test_a_number_that_stands_twice_in_what_code_makes_is_not_worked_back():
    """Where a width is the square of a number, it stays, with the reason."""
    with pytest.raises(PruningError, match="enter.weight: a number in the code fixes its width"):
        prune_filters(Square().double(), SEQUENCE, 0.5)
