"""Takes every layer's Hessian to a solver: all layers at once or one after the other; writes nothing into the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_prune.algorithms.solvers import (
    Curve,
    Pattern,
    RowSolver,
    best_on_support,
    damped,
    nearer_on_support,
    rise,
    share_lost,
)
from lightning_prune.algorithms.solvers.damping import cholesky, damp_, mean_diagonal
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import Change, Gram, Pair, fitting, gather_grams, gather_pair
from lightning_prune.measure.output_change import Outputs, replaced
from lightning_prune.measure.products import Products
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import seen

__all__ = [
    "Leaving", "Solved", "Surgery", "all_together", "error_curves", "most_that_leaves", "one_by_one", "shown",
    "naming_weight",
]  # fmt: skip

Leaving = Mapping[str, int | Pattern]
"""By parameter name, how many of its weights leave, or by what pattern."""

_AT_ONCE = 256  # rows whose means are measured together
_MEMORY = 2 * 2**30  # bytes of Hessians held at a time, where nothing else is asked for
_Item = TypeVar("_Item")

_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # shares gone at which errors are taken
_WIDE = 64  # columns from which rows are refitted by conjugate gradients


@dataclass(frozen=True, eq=False)
class Solved:
    """What a layer's weight becomes.

    Attributes:
        weight: Its new value.
        keep: True for each weight that stays, in its shape.
        error: Share of the energy of its outputs on the batches that is lost; where a bias or BatchNorm compensates for
            the mean, of their variance.
        others: What else changes, by name: its bias, or the running mean of the BatchNorm behind it.
    """

    weight: Tensor
    keep: Tensor
    error: float
    others: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Surgery:
    """A model, the data that its layers shall go on to serve, and how each layer is solved.

    Attributes:
        model: The model.
        calibration: That data.
        products: Which of its parameters multiply what.
        solver: Prunes the rows of one layer.
        damping: Share of the mean diagonal entry that is added to Hessians.
        tensors: The model's parameters and buffers, by name.
        masks: What earlier calls left of parameters, as bool, by name; what they zeroed stays zero.
        after: Makes a block in which the model runs on what pruned layers in front of it give, where these are no part
            of it.
        memory: Bytes of Hessians that are held at a time, beside what solving them takes; by default 2 GiB.
    """

    model: nn.Module
    calibration: Calibration
    products: Products
    solver: type[RowSolver]
    damping: float
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    after: Change = nullcontext
    memory: int | None = None
    _held: dict[str, _Patient] = field(default_factory=dict)

    def patients(self, names: Sequence[str], last: bool = False) -> Iterator[tuple[str, _Patient]]:
        """Yield each layer with its Hessian; where those of all fit into memory, they are gathered once.

        Args:
            names: The layers' weights.
            last: Whether nobody asks for them again, so that each can be let go of once the next one is asked for.
        """
        for part in self._fitting(names):
            if part[0] not in self._held:
                self._held.clear()
                self._held.update(self._gathered(part))
            for name in part:
                yield name, self._held.pop(name) if last else self._held[name]

    def _gathered(self, names: Sequence[str]) -> dict[str, _Patient]:
        """Gather the Hessians of some layers; those that multiply the same inputs share one."""
        firsts: dict[str, str] = {}  # by what a weight multiplies, the first weight that does
        for name in names:
            firsts.setdefault(self.products.alike.get(name, name), name)
        grams = gather_grams(self.model, self.products, firsts.values(), self.calibration)
        shared: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        found = {}
        for name in names:
            first, shifted = firsts[self.products.alike.get(name, name)], name in self.products.shifts
            gram = grams[first]
            if (first, shifted) not in shared:
                others = [other for other in names if firsts[self.products.alike.get(other, other)] == first]
                alone = all((other in self.products.shifts) == shifted for other in others)
                shared[first, shifted] = self._damped(gram, shifted, gram.hessian if alone else gram.hessian.clone())
            hessian, added = shared[first, shifted]
            rows = self.products.readings[name].rows(self.tensors[name].detach())
            found[name] = _Patient(rows, added, gram.mean, self.solver(rows, hessian))
        return found

    def rows(self, name: str) -> Tensor:
        """Return a layer's weights as ``(groups, rows, columns)``."""
        weight = self.tensors[name].detach()
        return self.products.readings[name].rows(weight).to(self.calibration.dtype_on(weight.device))

    def solve(self, name: str, solver: RowSolver, leaving: int | Pattern) -> tuple[Tensor, Tensor]:
        """Return the new rows of a layer and what stays of them, which is nothing that was zeroed before."""
        new, keep = solver.solve(leaving)
        if name not in self.masks:
            return new, keep
        alive = self.products.readings[name].rows(self.masks[name].to(new.device).expand(self.tensors[name].shape))
        revived = int((keep & ~alive).sum())
        if not revived:
            return new, keep
        keep = keep & alive
        if not isinstance(leaving, Pattern):
            # As many others stay instead: those that matter most by the Hessian's diagonal.
            worth = solver.weights.square() * solver.hessian.diagonal(dim1=1, dim2=2)[:, None]
            worth = worth.masked_fill(keep | ~alive, -torch.inf).flatten()
            keep = keep.flatten().index_fill(0, worth.topk(revived).indices, True).view_as(keep)
        if keep.shape[2] > _WIDE:
            return nearer_on_support(solver.given, solver.hessian, keep, new, tolerance=1e-5), keep
        return best_on_support(solver.weights, solver.hessian, keep), keep

    def solved(self, name: str, rows: Tensor, keep: Tensor, error: float, lost: Tensor) -> Solved:
        """Lay what a solver returned out as the layer's weight, and compensate for the mean that its outputs lose.

        Args:
            name: The layer's weight.
            rows: Its new rows.
            keep: What stays of them.
            error: Share of the energy that is lost.
            lost: Mean of each output that is lost, ``(groups, rows)``.
        """
        reading = self.products.readings[name]
        others = {}
        if (shift := self.products.shifts.get(name)) is not None:
            held = self.tensors[shift.name].detach()
            moved = held + shift.sign * lost.flatten().to(held)
            others[shift.name] = moved * self.masks[shift.name].to(moved) if shift.name in self.masks else moved
        weight = reading.weight(rows).to(self.tensors[name].dtype)
        return Solved(weight, reading.weight(keep), error, others)

    def _damped(self, gram: Gram, shifted: bool, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Damp a Hessian in place, less its mean where that is made up for; and return what that added."""
        whole = mean_diagonal(hessian)
        if shifted:
            hessian.baddbmm_(gram.mean[:, :, None], gram.mean[:, None], alpha=-1)
        return hessian, damp_(hessian, self.damping, whole)

    def _fitting(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Part the layers so that the Hessians of each part, and what solving them takes, fit into memory together."""
        return fitting(
            {name: 3 * self.products.bytes(name, self.calibration.dtype) for name in names}, self.memory or _MEMORY
        )


@dataclass(frozen=True, eq=False)
class _Patient:
    """One layer.

    Attributes:
        weights: Its weights, ``(groups, rows, columns)``.
        added: What damping added to the diagonal of its Hessian, ``(groups,)``.
        mean: Mean input, ``(groups, columns)``.
        solver: What solves it, with the damped Hessian.
    """

    weights: Tensor
    added: Tensor
    mean: Tensor
    solver: RowSolver

    def lost(self, new: Tensor) -> tuple[float, Tensor]:
        """Return the share of the outputs' energy that new weights lose, undamped, and the means that they lose.

        Args:
            new: New weights, ``(groups, rows, columns)``.

        Returns:
            The share, and for each output how much less its mean is, ``(groups, rows)``.
        """
        means = []
        for old, part in zip(self.weights.split(_AT_ONCE, dim=1), new.split(_AT_ONCE, dim=1), strict=True):
            means.append(((old.to(part) - part) @ self.mean[..., None])[..., 0])
        return share_lost(new, self.weights, self.solver.hessian, self.added), torch.cat(means, dim=1)


def all_together(surgery: Surgery, leaving: Leaving, progress: bool) -> dict[str, Solved]:
    """Solve every layer for the inputs that the whole model gives it."""
    found = {}
    patients = surgery.patients(list(leaving), last=True)
    for _ in shown("layers pruned", list(leaving), progress):
        patient = None  # so that the last one's memory is free before the next one's is taken
        name, patient = next(patients)
        with naming_weight(name):
            new, keep = surgery.solve(name, patient.solver, leaving[name])
        found[name] = surgery.solved(name, new, keep, *patient.lost(new))
    return found


def one_by_one(surgery: Surgery, leaving: Leaving, progress: bool) -> dict[str, Solved]:
    r"""Solve layer after layer for the inputs that the pruned ones before give it, aiming at the whole model's outputs.

    With inputs X before and Y after, :math:`\|W X - \hat W Y\|^2` is, up to a constant, the distance of
    :math:`\hat W` from :math:`W X Y^T (Y Y^T)^{-1}` measured by :math:`Y Y^T`.
    """
    found: dict[str, Solved] = {}
    pairs: dict[str, Pair] = {}
    for name in shown("layers pruned", list(leaving), progress):
        first = surgery.products.alike.get(name, name)
        if first not in pairs:
            others = {other: solved.weight for other, solved in found.items()}
            for solved in found.values():
                others |= solved.others
            change = partial(_changed, surgery, others)
            pairs = {first: gather_pair(surgery.model, surgery.products, first, surgery.calibration, change)}
        pair = pairs[first]
        whole = pair.after
        pair = pair.centred() if name in surgery.products.shifts else pair
        weights, hessian = surgery.rows(name), damped(pair.after, surgery.damping, whole)
        pull = weights @ (pair.cross + (hessian - pair.after))  # what is added holds on to the weights as they are
        with naming_weight(name):
            aim = torch.cholesky_solve(pull.transpose(1, 2), cholesky(hessian)).transpose(1, 2)
            new, keep = surgery.solve(name, surgery.solver(aim, hessian), leaving[name])
        energy = rise(weights, pair.before).sum()
        lost = energy + rise(new, pair.after).sum() - ((weights @ pair.cross) * new).sum()
        mean = (weights @ pair.mean_before[..., None] - new @ pair.mean_after[..., None])[..., 0]
        found[name] = surgery.solved(name, new, keep, _share(lost, energy), mean)
    return found


@contextmanager
def _changed(surgery: Surgery, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    with surgery.after(), replaced(surgery.model, tensors):
        yield


def error_curves(surgery: Surgery, names: Sequence[str], amount: float, progress: bool) -> dict[str, Curve]:
    """Return what pruning ever more of each layer alone does to the model's outputs.

    How a layer's own error grows is found by what tells it soonest. What it means for the model is measured once, at
    the level nearest to ``amount``: how far, squared, the outputs move.
    """
    level = min(_LEVELS, key=lambda level: abs(level - amount))
    outputs = Outputs(surgery.model, surgery.calibration)
    curves = {}
    widest = max(surgery.products.shapes[name][2] for name in names)
    patients = surgery.patients(names)
    for _ in shown("layers measured", names, progress):
        name, patient = next(patients)
        quick, size = patient.solver.quick(widest), patient.weights.numel()
        counts = list(dict.fromkeys(int(share * size) for share in _LEVELS))
        asked = int(level * size)
        with naming_weight(name):
            errors = dict(zip(counts, quick.errors(counts), strict=True))
            new, _ = quick.solve(asked)
        mean = ((patient.weights - new) @ patient.mean[..., None])[..., 0]
        solved = surgery.solved(name, new, new != 0, 0.0, mean)
        moved = outputs.moved({name: solved.weight, **solved.others})
        scale = moved / errors[asked] if errors[asked] > 0 else 0.0
        curve = {0: 0.0} | {count: scale * error for count, error in errors.items()}
        curves[name] = Curve(list(curve), list(curve.values()))
    return curves


def most_that_leaves(size: int) -> int:
    """Return how far the curve of a weight of so many entries goes."""
    return int(_LEVELS[-1] * size)


@contextmanager
def naming_weight(name: str) -> Iterator[None]:
    """Begin an error of the body with the name of the weight that cannot be solved."""
    try:
        yield
    except PruningError as error:
        raise PruningError(f"{name}: {error} Or leave it out by ignore=.") from error


def _share(lost: Tensor, whole: Tensor) -> float:
    """Return the share that is lost; of nothing, nothing."""
    return float(lost / whole) if whole > 0 else 0.0


def shown(description: str, items: Sequence[_Item], progress: bool) -> Iterable[_Item]:
    """Show a progress bar while items are gone through."""
    return track(items, description, transient=True) if progress and seen() else items
