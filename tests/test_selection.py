"""How scores become choices: exactly as many as asked, ties by index."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.selection import keep_highest, ranks

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, math.inf, math.nan]), min_size=1, max_size=20)


@settings(deadline=None, max_examples=50)
@given(scores=SCORES, data=st.data())
def test_exactly_as_many_stay_as_asked(scores, data):
    """Exactly `count` stay, also among ties, infinities and NaN, and none that leaves scores above one that stays."""
    count = data.draw(st.integers(0, len(scores)))
    keep = keep_highest(torch.tensor(scores), count)
    assert keep.sum() == count
    numbers = [-math.inf if math.isnan(score) else score for score in scores]
    stay = [n for n, kept in zip(numbers, keep, strict=True) if kept]
    leave = [n for n, kept in zip(numbers, keep, strict=True) if not kept]
    assert not stay or not leave or min(stay) >= max(leave)


@settings(deadline=None, max_examples=50)
@given(scores=SCORES)
def test_larger_counts_keep_a_superset(scores):
    """Whatever stays among few stays among more."""
    keeps = [keep_highest(torch.tensor(scores), count) for count in range(len(scores) + 1)]
    assert all((few <= more).all() for few, more in itertools.pairwise(keeps))


@settings(deadline=None, max_examples=50)
@given(scores=SCORES)
def test_ranks_are_a_permutation(scores):
    """Every rank from 0 to n - 1 is given once; of equal scores the earlier has the lower one."""
    found = ranks(torch.tensor(scores))
    assert sorted(found.tolist()) == list(range(len(scores)))
    assert ranks(torch.zeros(len(scores))).tolist() == list(range(len(scores)))


@settings(deadline=None, max_examples=30)
@given(scores=st.lists(st.floats(-1, 1), min_size=2, max_size=12, unique=True), seed=st.integers(0, 99))
def test_permuted_scores_give_permuted_ranks(scores, seed):
    """Without ties, the order in which units are listed does not matter."""
    values = torch.tensor(scores, dtype=torch.float64)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ranks(values[order]), ranks(values)[order])


@pytest.mark.parametrize("count", [-1, 4])
def test_impossible_counts_are_refused(count):
    """Fewer than none or more than all cannot stay."""
    with pytest.raises(ValueError, match=f"count={count}: of 3 units, from 0 to 3 can stay"):
        keep_highest(torch.zeros(3), count)
