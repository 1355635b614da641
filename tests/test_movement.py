"""The hunt for wrong answers: whatever a program moves where, no cut is made that computes something else."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.filters import prune_filters
from tests.silencing import assert_equal_to_rounding, silenced

CHANNELS = 12
INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
AXES = st.integers(1, 3)


def axis(x, which):
    """Return one of the dimensions behind the batch."""
    return 1 + which % (x.dim() - 1)


def regroup(x, seed):
    """Reshape what is behind the batch to other factors."""
    rest = math.prod(x.shape[1:])
    factors = [f for f in (2, 3, 4, 6) if rest % f == 0]
    if not factors:
        return x
    first = factors[seed % len(factors)]
    return x.reshape(len(x), first, -1) if seed % 2 else x.reshape(len(x), -1, first)


def halves(x, which):
    """Take the halves of a dimension, by its own size, and combine them the other way round."""
    dim = axis(x, which)
    if x.shape[dim] % 2:
        return x
    first, second = x.narrow(dim, 0, x.shape[dim] // 2), x.narrow(dim, x.shape[dim] // 2, x.shape[dim] // 2)
    return torch.cat([second, first.tanh()], dim) if which % 2 else first * second


def permuted(x, seed):
    """Permute the dimensions behind the batch."""
    dims = list(range(1, x.dim()))
    seed %= len(dims)
    return x.permute(0, *dims[seed:], *dims[:seed])


def windows(x, which):
    """Take overlapping windows along a dimension."""
    dim = axis(x, which)
    return x.unfold(dim, 2, 1 + which % 2) if x.shape[dim] > 2 and x.dim() < 5 else x


def strided(x, which):
    """Take overlapping windows along a dimension by reading memory."""
    dim, x = axis(x, which), x.contiguous()
    if x.shape[dim] < 3 or x.dim() > 4:
        return x
    size = [*x.shape[:dim], x.shape[dim] - 1, *x.shape[dim + 1 :], 2]
    return x.as_strided(size, [*x.stride(), x.stride(dim)])


def folded(x, _):
    """Lay every second channel beneath the one before, as blocks of images."""
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return nn.functional.fold(x, (2, x.shape[2]), (2, 1)) if x.shape[1] % 2 == 0 else x


def pooled(x, which):
    """Take the largest of each two channels side by side, or of each one."""
    return nn.functional.max_pool2d(x.flatten(2), (1 + which % 2, 1), 1) if x.dim() > 2 and x.shape[1] > 1 else x


# name -> from a tensor (batch first) and an integer to a tensor; sums over channels would change, rightly, with a cut
STEPS = {
    "permute": permuted,
    "transpose": lambda x, i: x.transpose(axis(x, i), axis(x, i + 1)),
    "regroup": regroup,
    "roll": lambda x, i: x.roll(i, axis(x, i)),
    "flip": lambda x, i: x.flip(axis(x, i)),
    "index": lambda x, i: x.index_select(axis(x, i), torch.arange(x.shape[axis(x, i)]).roll(i)),
    "fancy index": lambda x, i: x[:, torch.arange(x.shape[1]).flip(0)],
    "halves": halves,
    "windows": windows,
    "strided": strided,
    "fold": folded,
    "pool": pooled,
    "slice": lambda x, i: x.narrow(axis(x, i), 0, max(1, x.shape[axis(x, i)] - i % 2)),
    "every second": lambda x, i: x[:, i % 2 :: 2] if x.shape[1] > 2 else x,
    "expand": lambda x, i: x.unsqueeze(1 + i % x.dim()).expand(*_stretched(x, i)) if x.dim() < 5 else x,
    "repeat": lambda x, i: x.repeat(1, 2, *[1] * (x.dim() - 2)) if x.shape[1] < 30 else x,
    "interleave": lambda x, i: x.repeat_interleave(2, axis(x, i)) if x.shape[axis(x, i)] < 30 else x,
    "cat": lambda x, i: torch.cat([x, x.sigmoid()], axis(x, i)) if x.shape[axis(x, i)] < 30 else x,
    "stack": lambda x, i: torch.stack([x, x.cos()], 1 + i % x.dim()) if x.dim() < 5 else x,
    "pad": lambda x, i: nn.functional.pad(x, (i % 3, 1)),
    "split": lambda x, i: torch.cat(x.split([1, x.shape[1] - 1], 1)[::-1], 1) if x.shape[1] > 1 else x,
    "chunk": lambda x, i: torch.stack(x.chunk(2, axis(x, i)), -1).sum(-1) if not x.shape[axis(x, i)] % 2 else x,
    "select": lambda x, i: x.select(axis(x, i), 0) if x.dim() > 2 else x,
    "flatten": lambda x, i: x.flatten(1),
    "squeeze": lambda x, i: x.unsqueeze(1).squeeze(1),
    "own product": lambda x, i: x * x.flip(1),
    "mixed": lambda x, i: x + x.mT if x.dim() > 2 and x.shape[-1] == x.shape[-2] else x,
    "diagonal": lambda x, i: x.diagonal(dim1=-2, dim2=-1) if x.dim() > 3 else x,
}  # fmt: skip


def _stretched(x, i):
    shape = list(x.shape)
    shape.insert(1 + i % x.dim(), 2)
    return shape


class Program(nn.Module):
    """A layer, steps that move its channels, and a layer that reads whatever came of them."""

    def __init__(self, steps):
        super().__init__()
        self.steps = [(STEPS[name], number) for name, number in steps]
        self.made = nn.Linear(4, CHANNELS)
        self.read = nn.Linear(self.moved(torch.zeros(1, CHANNELS)).shape[1], 3)

    def moved(self, x):
        for step, number in self.steps:
            x = step(x, number)
        return x.flatten(1)

    def forward(self, x):
        return self.read(self.moved(self.made(x)))


PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), min_size=1, max_size=7)


def assert_never_wrong(steps, amount):
    """Cut a program's channels if they can be cut, and compare with the whole program, nothing reading those."""
    torch.manual_seed(0)
    model = Program(steps).double()
    full = copy.deepcopy(model)
    try:
        report = prune_filters(model, INPUTS, amount)
    except PruningError:  # every channel stays
        return
    with torch.no_grad():
        assert_equal_to_rounding(model(INPUTS), silenced(full, report.kept)(INPUTS), 1e-9)


AMOUNTS = st.sampled_from([0.2, 0.5, 0.9])


@settings(deadline=None, max_examples=60)
@given(steps=PROGRAMS, amount=AMOUNTS)
def test_no_program_is_cut_wrongly(steps, amount):
    """Whatever moves the channels, the slim program computes what the whole one does without them, or they stay."""
    assert_never_wrong(steps, amount)


@pytest.mark.slow
@settings(deadline=None, max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(steps=PROGRAMS, amount=AMOUNTS)
def test_not_one_in_ten_thousand_programs_is_cut_wrongly(steps, amount):
    """Of ten thousand programs not one is cut wrongly."""
    assert_never_wrong(steps, amount)
