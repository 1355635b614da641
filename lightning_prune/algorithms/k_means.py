"""Chooses few values that stand for many: k-means in one dimension, exactly reproducible; knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ROUNDS = 1000  # k-means ends by itself, and far earlier


def share_values(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find at most ``count`` values that stand for all: k-means from centres spread evenly over the range.

    Centres to which no value is nearest then divide the clusters of the largest squared error, and k-means goes on. No
    random number is drawn. Values are sorted once, so a cluster is a stretch of them, and a round costs as much as
    ``count`` searches, however many values there are.

    Args:
        values: Finite values, ``(n,)``, of any floating dtype.
        count: Number of centres, at least 1.

    Returns:
        The centres, ``(k,)`` with ``k <= count``, ascending and distinct, in the dtype of the values; and the index of
        the centre of each value, ``(n,)`` int64. Where there are no more than ``count`` distinct values, these are the
        centres.

    Examples:
        >>> share_values(torch.tensor([0.0, 0.1, 1.0, 0.9]), 2)
        (tensor([0.0500, 0.9500]), tensor([0, 0, 1, 1]))

    References:
        Han, Mao, Dally, Deep Compression, ICLR 2016, sec. 3 (arXiv:1510.00149): "linear initialization works best".
    """
    own = values.detach().cpu()
    distinct = own.unique()
    if len(distinct) <= count:
        return distinct, torch.searchsorted(distinct, own)
    ranked = own.double().sort().values
    found = _settled(ranked, torch.linspace(float(ranked[0]), float(ranked[-1]), count, dtype=torch.float64))
    while len(found) < count:
        more = _settled(ranked, _with_halves(ranked, found, count - len(found)))
        if len(more) <= len(found):
            break
        found = more
    centres = found.to(own.dtype).unique()  # rounding may make two centres one
    return centres, torch.searchsorted(_between(centres.double()), own.double())


def _settled(ranked: Tensor, centres: Tensor) -> Tensor:
    """Move centres to the mean of the values nearest to them until none of these changes its centre.

    Args:
        ranked: Values, ascending, ``(n,)`` float64.
        centres: Where centres start, ascending, float64.

    Returns:
        The centres that some value is nearest to, ascending, float64.
    """
    sums = _sums(ranked)
    bounds = torch.empty(0)
    for _ in range(_MOST_ROUNDS):
        before, bounds = bounds, _bounds(ranked, centres)
        if torch.equal(bounds, before):
            break
        sizes = bounds.diff()
        means = sums[bounds].diff() / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)  # an empty cluster waits where it is
        centres = centres.sort().values  # sums are rounded, so means of neighbours might change places
    return centres[bounds.diff() > 0]


def _with_halves(ranked: Tensor, centres: Tensor, most: int) -> Tensor:
    """Add centres where values lie farthest from theirs: clusters of the largest squared error get a second one.

    Magnitude pruning leaves no value near zero, so centres that start there stay empty. They are of use elsewhere.
    """
    bounds = _bounds(ranked, centres)
    sizes = bounds.diff()
    errors = _sums(ranked.square())[bounds].diff() - sizes * centres.square()
    lowest, highest = ranked[bounds[:-1]], ranked[bounds[1:] - 1]
    errors = torch.where(lowest < highest, errors, -torch.inf)  # equal values need no second centre
    chosen = errors.argsort(descending=True, stable=True)[: min(most, int((lowest < highest).sum()))]
    centres = centres.clone()
    centres[chosen] = (centres[chosen] + lowest[chosen]) / 2
    return torch.cat([centres, (centres[chosen] + highest[chosen]) / 2]).sort().values


def _bounds(ranked: Tensor, centres: Tensor) -> Tensor:
    """Return where the values of each centre begin, and the end; of two centres as near the lower one counts."""
    inner = torch.searchsorted(ranked, _between(centres), right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ranked)])])


def _sums(ranked: Tensor) -> Tensor:
    """Return the sum of all values before each place."""
    return torch.cat([ranked.new_zeros(1), ranked.cumsum(0)])


def _between(centres: Tensor) -> Tensor:
    """Return the middles between neighbours: where the nearest centre changes."""
    return (centres[1:] + centres[:-1]) / 2
