"""The ways to prune all rows of a layer, with one face and by name; knows matrices, no models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial

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
"""How many weights leave, in all rows together; or a pattern that every row must follow."""


_WIDTH = 128  # columns of a sweep's blocks
_NARROW = 320  # columns up to which an inverse for each row costs little
_PATHS = 640  # columns up to which all paths can be walked for what they tell
_MEMORY = 256 * 2**20  # bytes of rows swept side by side


class RowSolver(ABC):
    """Rows of weights, ``(groups, rows, columns)``, beside the damped Hessian of each group.

    Args:
        weights: ``(groups, rows, columns)``.
        hessian: Positive definite, ``(groups, columns, columns)``.
    """

    def __init__(self, weights: Tensor, hessian: Tensor) -> None:
        self.weights = weights
        self.hessian = hessian

    @abstractmethod
    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Return the new weights and what stays, both in the shape of the weights."""

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Return half the squared distance of the new weights, measured by H, as ever more of them leave."""
        return [float(rise(self.solve(count)[0] - self.weights, self.hessian).sum()) for count in counts]

    def quick(self, widest: int) -> RowSolver:
        """Return what tells as well how errors grow, and sooner.

        Args:
            widest: Columns of the widest layer that is compared with this one: one way must tell of all, since each
                errs in a way of its own.
        """
        return self


class Exact(RowSolver):
    """Greedy, one weight at a time, each time the one that costs least after all others of its row have moved."""

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Follow the path of every row; afterwards the weights are the best on what stays."""
        if isinstance(leaving, Pattern):
            paths = greedy_paths(self.weights, inverse(self.hessian), pattern=leaving)
            keep = keep_along(paths, paths.order.numel())
        else:
            keep = keep_along(self._paths, leaving)
        keep = keep.view_as(self.weights)
        return best_on_support(self.weights, self.hessian, keep), keep

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Read them off the paths, which are known to their ends."""
        return rises_along(self._paths, counts)

    @cached_property
    def _paths(self) -> Paths:
        return greedy_paths(self.weights, inverse(self.hessian))


class Admm(RowSolver):
    """All rows together, by alternating directions: what stays is negotiated rather than taken greedily.

    Where rows are narrow, what is negotiated and what is greedy are both mended by trades of single weights, and the
    better one is taken.
    """

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Settle what stays; then the weights are the best on that, in wide rows by conjugate gradients."""
        keep = alternate(self.weights, self.hessian, lambda scores: _highest(scores, leaving))
        if self.weights.shape[2] > _NARROW:
            return nearer_on_support(self.weights, self.hessian, keep, self.weights), keep
        pattern = leaving if isinstance(leaving, Pattern) else None
        starts = keep, self._exact.solve(leaving)[1]
        traded = [exchange(self.weights, self.hessian, start, pattern) for start in starts]
        found = [(best_on_support(self.weights, self.hessian, keep), keep) for keep in traded]
        return min(found, key=lambda pair: float(rise(pair[0] - self.weights, self.hessian).sum()))

    def quick(self, widest: int) -> RowSolver:
        """Return greedy paths, where those of all layers can be walked; else a sweep."""
        return self._exact if widest <= _PATHS else Blocked(self.weights, self.hessian)

    @cached_property
    def _exact(self) -> Exact:
        return Exact(self.weights, self.hessian)


class Blocked(RowSolver):
    """One sweep over the columns, the same share of every block of them: fast where layers are wide."""

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Sweep; then some steps of conjugate gradients let the columns in front move as well."""
        if isinstance(leaving, Pattern):
            return self._swept([leaving], _whole_blocks(leaving))
        return self._swept([leaving / self.weights.numel()], [_WIDTH])

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Sweep for several counts side by side."""
        found: list[float] = []
        shares = [count / self.weights.numel() for count in counts]
        most = max(1, _MEMORY // (self.weights.numel() * self.weights.element_size()))
        for part in (shares[i : i + most] for i in range(0, len(shares), most)):
            new, _ = self._swept(part, [_WIDTH])
            found += [float(rise(w - self.weights, self.hessian).sum()) for w in new.chunk(len(part), dim=1)]
        return found

    def _swept(self, shares: Sequence[float | Pattern], blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sweep the rows once for each share, ``(groups, shares * rows, columns)``."""
        weights = self.weights.repeat(1, len(shares), 1)
        size = self.weights[0].numel()
        found = [
            sweep(w, u, partial(_highest_of_block, shares, i * size), blocks)
            for i, (w, u) in enumerate(zip(weights, self._factors, strict=True))
        ]
        start, keep = torch.stack([w for w, _ in found]), torch.stack([k for _, k in found])
        return nearer_on_support(weights, self.hessian, keep, start, steps=10), keep

    @cached_property
    def _factors(self) -> list[Tensor]:
        return [factor(h) for h in self.hessian]


SOLVERS: dict[str, type[RowSolver]] = {"exact": Exact, "admm": Admm, "blocked": Blocked}


def _highest(scores: Tensor, leaving: Leaving) -> Tensor:
    if isinstance(leaving, Pattern):
        return leaving.highest(scores.reshape(-1, scores.shape[-1])).view_as(scores)
    # As exact as selection.keep_highest, but for the order of ties, and many times faster in a loop.
    flat = scores.reshape(-1)
    kept = flat.topk(len(flat) - leaving, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, kept, True).view_as(scores)


def _highest_of_block(shares: Sequence[float | Pattern], before: int, saliency: Tensor, start: int) -> Tensor:
    """Choose what stays of a block, in the rows of each share; ``before``, weights of groups in front."""
    found = []
    for share, part in zip(shares, saliency.chunk(len(shares)), strict=True):
        if isinstance(share, Pattern):
            found.append(_highest(part, share))
        else:
            front = before + len(part) * start  # so that what is rounded off is made up for
            found.append(_highest(part, round(share * (front + part.numel())) - round(share * front)))
    return torch.cat(found)


def _whole_blocks(pattern: Pattern) -> list[int]:
    """Return a width near the usual one that parts into whole blocks of the pattern, and theirs."""
    period = pattern.of * pattern.apart
    return [period * max(1, round(_WIDTH / period)), period]
