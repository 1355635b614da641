"""Row solvers: ways to prune all rows of a layer, with one interface and a table of names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.admm import alternate
from lightning_prune.algorithms.solvers.blocked import factor, sweep
from lightning_prune.algorithms.solvers.damping import inverse
from lightning_prune.algorithms.solvers.exchange import exchange
from lightning_prune.algorithms.solvers.least_squares import best_on_support, nearer_on_support, rise
from lightning_prune.algorithms.solvers.patterns import Pattern
from lightning_prune.algorithms.solvers.rows import Paths, greedy_paths, keep_along, rises_along

__all__ = ["SOLVERS", "Admm", "Blocked", "Exact", "RowSolver"]

Leaving = int | Pattern
"""The number of weights to remove from all rows together, or a pattern that every row must follow."""

_WIDTH = 128  # columns of a sweep's blocks
_NARROW = 64  # columns up to which an inverse for each row takes less time than ADMM
_EXCHANGED = 160, 320  # columns up to which all rows exchange weights, and from which none does
_NEAR = 0.03  # of a threshold; the next one is most often as near
_TOLERANCE = 1e-5  # of the fit to a support, from what ADMM ends at: the error is within 0.1 % of the best
_PATHS = 640  # columns up to which greedy paths are computed to estimate errors
_MEMORY = 256 * 2**20  # bytes of rows in one sweep


class RowSolver(ABC):
    """Prunes rows of weights, ``(groups, rows, columns)``, given the damped Hessian of each group.

    Args:
        weights: ``(groups, rows, columns)``, in any precision.
        hessian: Positive definite, ``(groups, columns, columns)``.
    """

    def __init__(self, weights: Tensor, hessian: Tensor) -> None:
        self.given = weights
        self.hessian = hessian

    @property
    def weights(self) -> Tensor:
        """The weights in the Hessian's precision: a copy where they are in another."""
        return self.given.to(self.hessian)

    @abstractmethod
    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Return the new weights and the mask of those that are kept, both in the shape of the weights."""

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Return half the squared distance of the new weights, measured by H, for each number of removed weights."""
        return [float(rise(self.solve(count)[0] - self.weights, self.hessian).sum()) for count in counts]

    def quick(self, widest: int) -> RowSolver:
        """Return a faster solver whose errors rank layers as well.

        Args:
            widest: Columns of the widest layer that this one is compared with. All layers must be estimated by the same
                solver, since each has errors of its own.
        """
        return self


class Exact(RowSolver):
    """Greedy: removes one weight at a time, the one that costs least once the others of its row compensate."""

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Follow the greedy path of every row; the kept weights are then the best on their support."""
        if isinstance(leaving, Pattern):
            paths = greedy_paths(self.weights, inverse(self.hessian), pattern=leaving)
            keep = keep_along(paths, paths.order.numel())
        else:
            keep = keep_along(self._paths, leaving)
        keep = keep.view_as(self.given)
        return best_on_support(self.weights, self.hessian, keep), keep

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Read the errors off the greedy paths, which cover every count."""
        return rises_along(self._paths, counts)

    @cached_property
    def _paths(self) -> Paths:
        return greedy_paths(self.weights, inverse(self.hessian))


class Admm(RowSolver):
    """ADMM on all rows together.

    In narrow rows, the result of ADMM and the greedy one are both improved by exchanges of single weights, and the
    better one is returned.
    """

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Choose the support by ADMM; then fit the weights to it, in wide rows by conjugate gradients."""
        keep, near = alternate(self.given, self.hessian, _Chooser(leaving))
        if self.given.shape[2] > _NARROW:
            # An exchange takes an inverse for each row, so the wider the rows, the fewer take part.
            share = min(1.0, (_EXCHANGED[1] - self.given.shape[2]) / (_EXCHANGED[1] - _EXCHANGED[0]))
            if share > 0:
                pattern = leaving if isinstance(leaving, Pattern) else None
                keep = exchange(self.weights, self.hessian, keep, pattern, share)
            return nearer_on_support(self.given, self.hessian, keep, near, tolerance=_TOLERANCE), keep
        del near
        pattern = leaving if isinstance(leaving, Pattern) else None
        starts = keep, self._exact.solve(leaving)[1]
        best, least = None, float("inf")
        for start in starts:
            traded = exchange(self.weights, self.hessian, start, pattern)
            new = best_on_support(self.weights, self.hessian, traded)
            error = float(rise(new - self.weights, self.hessian).sum())
            if best is None or error < least:
                best, least = (new, traded), error
        assert best is not None
        return best

    def quick(self, widest: int) -> RowSolver:
        """Return greedy paths where they are affordable for all layers, else a sweep."""
        return self._exact if widest <= _PATHS else Blocked(self.given, self.hessian)

    @cached_property
    def _exact(self) -> Exact:
        return Exact(self.given, self.hessian)


class Blocked(RowSolver):
    """One sweep over the columns that prunes the same fraction of every block: fast for wide layers."""

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Sweep; then a few steps of conjugate gradients let the columns in front compensate as well."""
        if isinstance(leaving, Pattern):
            return self._swept([leaving], _whole_blocks(leaving))
        return self._swept([leaving / self.given.numel()], [_WIDTH])

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Sweep for several counts at once, as if each had rows of its own."""
        errors: list[float] = []
        shares = [count / self.given.numel() for count in counts]
        most = max(1, _MEMORY // (self.given.numel() * self.hessian.element_size()))
        for first in range(0, len(shares), most):
            part = shares[first : first + most]
            new, _ = self._swept(part, [_WIDTH])
            for weights in new.chunk(len(part), dim=1):
                errors.append(float(rise(weights - self.weights, self.hessian).sum()))
        return errors

    def _swept(self, shares: Sequence[float | Pattern], blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sweep the rows once for each share, ``(groups, shares * rows, columns)``."""
        weights = self.weights.repeat(1, len(shares), 1)
        size = self.given[0].numel()
        swept, kept = [], []
        for group, own_factor in enumerate(self._factors):
            choose = partial(_highest_of_block, shares, group * size)
            new, keep = sweep(weights[group], own_factor, choose, blocks)
            swept.append(new)
            kept.append(keep)
        support = torch.stack(kept)
        return nearer_on_support(weights, self.hessian, support, torch.stack(swept), steps=10), support

    @cached_property
    def _factors(self) -> list[Tensor]:
        return [factor(h) for h in self.hessian]


SOLVERS: dict[str, type[RowSolver]] = {"exact": Exact, "admm": Admm, "blocked": Blocked}


def _highest(scores: Tensor, leaving: Leaving) -> Tensor:
    if isinstance(leaving, Pattern):
        return leaving.highest(scores.reshape(-1, scores.shape[-1])).view_as(scores)
    # Like selection.keep_highest, except for the order of ties, and many times faster in a loop.
    flat = scores.reshape(-1)
    kept = flat.topk(len(flat) - leaving, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, kept, True).view_as(scores)


class _Chooser:
    """Keeps the highest scores, again and again of scores that change little from one time to the next.

    The threshold lies near the last one, so only scores near that are sorted. The number that is kept is exact, unless
    it may be rough.
    """

    def __init__(self, leaving: Leaving) -> None:
        self.leaving = leaving
        self.low, self.high = -torch.inf, torch.inf  # the threshold is expected between these
        self.threshold: float | None = None

    def __call__(self, scores: Tensor, rough: bool) -> Tensor:
        """Return the mask of what is kept, in the shape of the scores; if ``rough``, by the last threshold."""
        if rough and self.threshold is not None:
            return scores > self.threshold
        flat = scores.reshape(-1)
        if isinstance(self.leaving, Pattern) or not 0 < self.leaving < len(flat):
            return _highest(scores, self.leaving)
        count = len(flat) - self.leaving
        near, missing = flat, count
        if self.threshold is not None:
            near = flat[(flat >= self.low) & (flat <= self.high)]
            missing = count - int((flat > self.high).count_nonzero())
        if not 0 < missing <= len(near):  # it lies elsewhere this time
            near, missing = flat, count
        self.threshold = threshold = _kth_smallest(near, len(near) - missing)
        keep = flat > threshold
        tied = (flat == threshold).nonzero()[:, 0]
        keep[tied[: count - int(keep.count_nonzero())]] = True
        self.low, self.high = threshold * (1 - _NEAR), threshold * (1 + _NEAR)
        return keep.view_as(scores)


def _kth_smallest(values: Tensor, k: int) -> float:
    """Return the entry before which there are ``k`` smaller or equal ones."""
    if values.is_cpu:
        return float(np.partition(values.numpy(), k)[k])
    return float(values.kthvalue(k + 1).values)  # its indices weigh twice as much as the values, or more


def _highest_of_block(shares: Sequence[float | Pattern], before: int, saliency: Tensor, start: int) -> Tensor:
    """Choose what is kept of a block, in the rows of each share; ``before`` counts the weights of earlier groups."""
    found = []
    for share, part in zip(shares, saliency.chunk(len(shares)), strict=True):
        if isinstance(share, Pattern):
            found.append(_highest(part, share))
        else:
            # Rounding the running total, not the block's own number, lets the blocks add up to the whole.
            front = before + len(part) * start
            through = front + part.numel()
            found.append(_highest(part, round(share * through) - round(share * front)))
    return torch.cat(found)


def _whole_blocks(pattern: Pattern) -> list[int]:
    """Return a width near the usual one that is a multiple of the pattern's block, and the width of that block."""
    period = pattern.of * pattern.apart
    return [period * max(1, round(_WIDTH / period)), period]
