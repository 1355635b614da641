"""How scores become choices: exactly as many as asked, ties by index."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import PruningError, prune_weights
from lightning_prune.algorithms import selection
from lightning_prune.algorithms.selection import Scored, keep_best_of_all, keep_highest, keep_n_of_m, parse_pattern

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


@settings(deadline=None, max_examples=30)
@given(scores=st.lists(st.floats(-1, 1), min_size=2, max_size=12, unique=True), seed=st.integers(0, 99))
def test_permuted_scores_give_permuted_choices(scores, seed):
    """Without ties, the order in which units are listed does not matter."""
    values = torch.tensor(scores, dtype=torch.float64)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    half = len(scores) // 2
    assert torch.equal(keep_highest(values[order], half), keep_highest(values, half)[order])


@pytest.mark.parametrize("count", [-1, 4])
def test_impossible_counts_are_refused(count):
    """Fewer than none or more than all cannot stay."""
    with pytest.raises(ValueError, match=f"count={count}: of 3 units, from 0 to 3 can be kept"):
        keep_highest(torch.zeros(3), count)


@settings(deadline=None, max_examples=50)
@given(scores=SCORES, data=st.data())
def test_of_equal_scores_the_later_stay(scores, data):
    """What stays is what comes last in the order of scores and, among equal ones, of places; NaN is lowest."""
    count = data.draw(st.integers(0, len(scores)))
    values = [-math.inf if math.isnan(score) else score for score in scores]
    last = sorted(range(len(scores)), key=lambda place: (values[place], place))[len(scores) - count :]
    assert keep_highest(torch.tensor(scores), count).nonzero().flatten().tolist() == sorted(last)


@settings(deadline=None, max_examples=50)
@given(one=SCORES, other=SCORES, data=st.data())
def test_of_several_tensors_as_of_one(one, other, data):
    """Tensors together keep what one long tensor of all their scores would keep."""
    count = data.draw(st.integers(0, len(one) + len(other)))
    keep = keep_best_of_all({"one": torch.tensor(one).view(-1, 1), "other": torch.tensor(other)}, count)
    assert keep["one"].shape == (len(one), 1)
    together = torch.cat([keep["one"].flatten(), keep["other"]])
    assert torch.equal(together, keep_highest(torch.tensor(one + other), count))


NUMBERS = [0.0, -0.0, 1e-40, -1e-40, 5e-324, 1e-7, 0.5, -0.5, 1.0, 3.0, -3.0, 6e4, math.inf, -math.inf, math.nan]
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PART = st.tuples(
    st.lists(st.sampled_from(NUMBERS) | st.floats(width=32), min_size=1, max_size=12),
    st.sampled_from(TYPES),
    st.booleans(),
    st.integers(0, 2**12 - 1),
)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(PART, min_size=1, max_size=4), at_once=st.integers(1, 5), data=st.data())
def test_scores_a_part_at_a_time_choose_as_all_at_once(parts, at_once, data):
    """Exactly those are kept that come last in a stable sort of all scores, whatever their type, layout and parts."""
    scores, expected = {}, []
    for number, (values, dtype, turned, bits) in enumerate(parts):
        raw = torch.tensor(values, dtype=torch.float64).to(dtype)
        alive = torch.tensor([bool(bits >> place & 1) for place in range(len(raw))])
        for value, stays in zip(raw.abs().double().tolist(), alive.tolist(), strict=True):
            expected.append((stays, -math.inf if math.isnan(value) or not stays else value))
        shaped = torch.stack([raw, raw], dim=1)[:, :1] if turned else raw  # a view that is not contiguous
        scores[str(number)] = Scored(shaped, torch.abs, alive.view(shaped.shape))
    count = data.draw(st.integers(0, len(expected)))
    last = sorted(range(len(expected)), key=lambda place: (expected[place], place))[len(expected) - count :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_AT_ONCE", at_once)
        keep = keep_best_of_all(scores, count)
    together = torch.cat([kept.flatten() for kept in keep.values()])
    assert together.nonzero().flatten().tolist() == sorted(last)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), share=st.floats(0, 1), dtype=st.sampled_from(TYPES), few=st.booleans())
def test_large_tensors_choose_as_topk(seed, share, dtype, few):
    """Over several parts the sum of what is kept is that of ``topk``, and the count is exact, with ties or without."""
    drawn = torch.randn(3000, generator=torch.Generator().manual_seed(seed))
    scores = (drawn.round() if few else drawn).to(dtype)
    count = int(share * len(scores))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_AT_ONCE", 512)
        keep = keep_highest(scores, count)
    assert torch.equal(scores[keep].sort().values, scores.topk(count).values.sort().values)


def test_whole_numbers_are_no_weights():
    """Weights of integers are refused, and nothing is changed."""
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
    with pytest.raises(PruningError, match=r"weight is a tensor of torch.int64.*only dense weights"):
        prune_weights(model, 0.5, scope="global")


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 4), more=st.integers(1, 4), seed=st.integers(0, 99), dim=st.integers(0, 3))
def test_n_of_every_m_neighbours_stay(n, more, seed, dim):
    """Along the dimension, each group of M keeps its N highest, found one by one; ties by index."""
    m = n + more
    shape = [2, 3, 2, 2]
    shape[dim] = 2 * m
    scores = torch.randint(4, shape, generator=torch.Generator().manual_seed(seed)).float()
    keep = keep_n_of_m(scores, n, m, dim).movedim(dim, -1).reshape(-1, m)
    for group, stays in zip(scores.movedim(dim, -1).reshape(-1, m).tolist(), keep.tolist(), strict=True):
        last = sorted(range(m), key=lambda place: (group[place], place))[m - n :]
        assert [place for place in range(m) if stays[place]] == sorted(last)


def test_patterns_that_keep_nothing_or_all_are_refused():
    """N:M keeps some of M and not all; a size that groups do not fill is refused."""
    for pattern in ("4:4", "0:4", "5:4", "2/4", "2:4:8", ""):
        with pytest.raises(ValueError, match="write N:M with 0 < N < M"):
            parse_pattern(pattern)
    with pytest.raises(ValueError, match="dimension 1 of size 6: groups of 4"):
        keep_n_of_m(torch.zeros(2, 6), 2, 4)
