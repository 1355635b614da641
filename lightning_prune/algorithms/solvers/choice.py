"""Row solvers: ways to prune all rows of a layer, with one interface and a table of names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.admm import alternate
from lightning_prune.algorithms.solvers.blocked import factor, sweep
from lightning_prune.algorithms.solvers.damping import inverse
from lightning_prune.algorithms.solvers.exchange import exchange
from lightning_prune.algorithms.solvers.least_squares import best_on_support, fit_by_blocks, nearer_on_support, rise
from lightning_prune.algorithms.solvers.patterns import Pattern
from lightning_prune.algorithms.solvers.rows import Paths, greedy_paths, keep_along, rises_along

__all__ = ["SOLVERS", "Admm", "Blocked", "Exact", "RowSolver"]

Leaving = int | Pattern
"""The number of weights to remove from all rows together, or a pattern that every row must follow."""

_WIDTH, _CHOSEN = 128, 8  # columns of a sweep's blocks, and of those in which it chooses
_SINGLE = 1e-3  # smallest square of a pivot, in mean diagonal entries, with which single precision is used
_NARROW = 64  # columns up to which an inverse for each row takes less time than ADMM
_EXCHANGED = 160, 320  # columns up to which all rows exchange weights, and from which none does
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
    """One sweep over the columns, then a fit of what is kept: fast for wide layers.

    Works in single precision, which suffices for a fit of so few steps, unless H is too ill-conditioned for that.
    """

    def solve(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Sweep; then a few steps of descent let the columns in front compensate as well."""
        return self._swept([leaving])

    def errors(self, counts: Sequence[int]) -> list[float]:
        """Sweep for several counts at once, as if each had rows of its own."""
        errors: list[float] = []
        most = max(1, _MEMORY // (self.given.numel() * self.hessian.element_size()))
        for first in range(0, len(counts), most):
            part = counts[first : first + most]
            new, _ = self._swept(part)
            for weights in new.chunk(len(part), dim=1):
                errors.append(float(rise(weights - self.weights, self.hessian).sum()))
        return errors

    def _swept(self, leaving: Sequence[Leaving]) -> tuple[Tensor, Tensor]:
        """Sweep the rows once for each way of leaving, ``(groups, ways * rows, columns)``."""
        dtype = self._factor.dtype
        # In these units, single precision cannot overflow.
        weights = self.weights
        size = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        aim, hessian = (weights / size).to(dtype), (self.hessian / self._scale).to(dtype)
        del weights  # which may be a copy
        wide, narrow = _widths(leaving[0])
        # What each weight alone would cost, if no other compensated.
        worth = aim.square() * hessian.diagonal(dim1=1, dim2=2)[:, None]
        choose = _BlockChooser(leaving, worth, wide, narrow)
        rows = aim.repeat(1, len(leaving), 1)
        swept, keep = sweep(rows, self._factor, choose, wide, narrow)
        new = fit_by_blocks(rows, hessian, keep, swept)
        return new.to(self.hessian).mul_(size), keep

    @cached_property
    def _factor(self) -> Tensor:
        """The factor of H so scaled, in single precision if it does."""
        exact = factor(self.hessian).div_(self._scale.sqrt())
        least = float(exact.diagonal(dim1=1, dim2=2).square().amin())  # no less than the smallest eigenvalue
        return exact.float() if least > _SINGLE else exact

    @property
    def _scale(self) -> Tensor:
        return self.hessian.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]


SOLVERS: dict[str, type[RowSolver]] = {"exact": Exact, "admm": Admm, "blocked": Blocked}


def _highest(scores: Tensor, leaving: Leaving) -> Tensor:
    """Return the mask of all but so many of the lowest scores, in their shape."""
    if isinstance(leaving, Pattern):
        return leaving.highest(scores.reshape(-1, scores.shape[-1])).view_as(scores)
    flat = scores.reshape(-1)
    if not 0 < leaving < len(flat):
        return torch.full_like(scores, leaving <= 0, dtype=torch.bool)
    return _above(flat, _threshold(flat, leaving), leaving).view_as(scores)


def _threshold(flat: Tensor, leaving: int, scatters: bool = False) -> float:
    """Return the lowest of the scores that are kept if so many of the lowest leave.

    Args:
        flat: Scores, ``(n,)``.
        leaving: How many leave.
        scatters: Whether scores may be moved about, so that no copy is needed.
    """
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        scores = flat.numpy()
        parted = scores if scatters else scores.copy()
        parted.partition(leaving)  # torch takes twenty times as long
        return float(parted[leaving])
    return float(flat.kthvalue(leaving + 1).values)


def _above(flat: Tensor, threshold: float, leaving: int) -> Tensor:
    """Return the mask of the scores that are kept, given their threshold; of equal ones the first are kept."""
    # Like selection.keep_highest, except for the order of ties, and many times faster in a loop.
    keep = flat > threshold
    missing = len(flat) - leaving - int(keep.count_nonzero())  # a sum would make whole numbers of all entries
    tied = (flat == threshold).nonzero()[:, 0]
    if missing > len(tied):  # NaN compares with nothing
        kept = flat.topk(len(flat) - leaving, sorted=False).indices
        return torch.zeros_like(keep).index_fill(0, kept, True)
    keep[tied[:missing]] = True
    return keep


class _Chooser:
    """Keeps the weights largest in absolute value, again and again; by the last threshold where a rough number will do.

    Holds one tensor of scores, in the shape of the weights.
    """

    def __init__(self, leaving: Leaving) -> None:
        self.leaving = leaving
        self.threshold: float | None = None
        self.scores: Tensor | None = None

    def __call__(self, weights: Tensor, rough: bool) -> Tensor:
        """Return the mask of what is kept, in the shape of the weights."""
        if self.scores is None:
            self.scores = torch.empty_like(weights)
        scores = torch.abs(weights, out=self.scores)
        if rough and self.threshold is not None:
            return scores > self.threshold
        if isinstance(self.leaving, Pattern) or not 0 < self.leaving < scores.numel():
            return _highest(scores, self.leaving)
        flat = scores.reshape(-1)
        self.threshold = _threshold(flat, self.leaving, scatters=True)
        torch.abs(weights, out=scores)
        return _above(flat, self.threshold, self.leaving).view_as(scores)


class _BlockChooser:
    """Keeps the highest saliencies of a few columns at a time; how many, is planned for the wide block around them.

    A wide block keeps as many as a threshold across all blocks leaves there, on what each weight alone would cost; and
    the few columns as many as are among the highest of the wide block when it begins. Equal shares everywhere would
    have to spare worthless columns; a choice for the whole wide block would be made before its weights have moved.
    """

    def __init__(self, leaving: Sequence[Leaving], worth: Tensor, wide: int, narrow: int) -> None:
        self.leaving = leaving
        self.wide, self.narrow = wide, narrow
        self.of_wide = [self._counts(worth, each, wide) for each in leaving]
        self.of_narrow: list[list[int]] = []

    def __call__(self, free: Tensor, diagonal: Tensor, first: int) -> Tensor:
        """Return what is kept of the next columns, in the rows of each way of leaving."""
        if first % self.wide == 0:
            self._plan(free, diagonal, first // self.wide)
        place = first % self.wide // self.narrow
        saliency = (free[:, : self.narrow] / diagonal[:, : self.narrow, None]).square()
        found = []
        for leaving, counts, part in zip(self.leaving, self.of_narrow, self._by_way(saliency), strict=True):
            if isinstance(leaving, Pattern):
                found.append(_highest(part.transpose(1, 2), leaving).transpose(1, 2))
            else:
                found.append(_highest(part, part.numel() - counts[place]))
        return torch.cat(found, dim=2)

    def _plan(self, block: Tensor, diagonal: Tensor, number: int) -> None:
        """Part what a wide block keeps among its columns, by their saliencies as they are at its beginning."""
        saliency = (block / diagonal[..., None]).square()
        self.of_narrow = []
        for leaving, counts, part in zip(self.leaving, self.of_wide, self._by_way(saliency), strict=True):
            if isinstance(leaving, Pattern):
                self.of_narrow.append([])
            else:
                gone = part.numel() - counts[number]
                self.of_narrow.append(self._counts(part.transpose(1, 2), gone, self.narrow))

    def _by_way(self, block: Tensor) -> Sequence[Tensor]:
        return block.chunk(len(self.leaving), dim=2)

    @staticmethod
    def _counts(scores: Tensor, leaving: Leaving, width: int) -> list[int]:
        """Return how many of the highest scores lie in each block of columns; for a pattern, none is counted."""
        if isinstance(leaving, Pattern):
            return []
        of_columns = _highest(scores, leaving).sum(dim=(0, 1))
        return [int(block.sum()) for block in of_columns.split(width)]


def _widths(leaving: Leaving) -> tuple[int, int]:
    """Return the columns of a product and those of a choice; for a pattern, multiples of its blocks."""
    if not isinstance(leaving, Pattern):
        return _WIDTH, _CHOSEN
    period = leaving.of * leaving.apart
    return period * max(1, round(_WIDTH / period)), period
