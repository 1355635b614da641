"""Finds factors for producers so that numbers made from widths change nothing; writes nothing.

Attention divides its scores by the square root of the head width. Where heads become narrower the code divides by less.
Scaling the weights that make the queries compensates that exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_prune.structure import Structure
from lightning_prune.structure.labels import Atoms, Label, Labels, Ran
from lightning_prune.structure.rules import reduces
from lightning_prune.surgery.cut import Cut
from lightning_prune.surgery.expected_outputs import Lefts
from lightning_prune.surgery.reference_run import Constant, Window
from lightning_prune.surgery.replay import is_scaling

__all__ = ["Scales", "scales_for"]

_EXPONENTS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}


@dataclass(eq=False)
class Scales:
    """Factors for tensors of the slim model, and the operators between which they show.

    Attributes:
        rows: Name of a parameter -> dimension and factors along it, ``(size after the cut,)``.
        windows: Between which operators of the trace outputs may carry a factor.
        free: Indices of traced operators whose numbers differ in the two models, as they should.
    """

    rows: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    free: set[int] = field(default_factory=set)


def scales_for(structure: Structure, cut: Cut, constants: tuple[Constant, ...]) -> Scales:
    """Return the factors that compensate numbers that a cut changes, where what they multiply shows its producers."""
    lefts = Lefts(structure, cut.keep)
    ran = structure.ledger.ran
    sources = _Sources(structure)
    scales = Scales()
    for constant in constants:
        at = constant.at if is_scaling(ran[constant.at].func) else _consumer(ran, constant.at)
        if at is None:
            continue
        made = sources.of(_scaled_labels(ran, lefts, at))
        if not made:
            continue
        # The slim model multiplies by so much more than the full one, and its producers by so much less.
        more = _ratio_at(ran, constant, at)
        factor = more if "div" in str(ran[at].func) else 1 / more
        scales.windows.append(Window(min(sources.first_use[slot] for slot in made), at, factor))
        scales.free |= {at, constant.at, *_between(ran, constant.at, at)}
        for slot, indices in made.items():
            for name, dim, size in sources.with_bias(slot):
                _add_rows(scales, cut, name, dim, size, indices, factor)
    return scales


def _consumer(ran: list[Ran], at: int) -> int | None:
    """Return the next operator that multiplies or divides data by a single number."""
    for later in range(at + 1, min(at + 12, len(ran))):
        single = [int(np.prod(shape)) == 1 for shape in ran[later].entering]
        if is_scaling(ran[later].func) and any(single) and not all(single):
            return later
    return None


def _ratio_at(ran: list[Ran], constant: Constant, at: int) -> float:
    """Return by how much a constant is larger in the slim model when it is used, after roots and powers of it."""
    ratio = constant.after / constant.before
    for between in sorted(_between(ran, constant.at + 1, at)):
        name = ran[between].func._opname
        exponent = ran[between].plain[1] if name == "pow" else _EXPONENTS.get(name, 1.0)
        ratio **= exponent if isinstance(exponent, int | float) else 1.0
    return ratio


def _between(ran: list[Ran], first: int, last: int) -> set[int]:
    """Return the operators between two that work on single numbers."""
    return {at for at in range(first, last) if all(int(np.prod(shape)) <= 1 for shape in ran[at].leaving)}


def _scaled_labels(ran: list[Ran], lefts: Lefts, at: int) -> list[Label]:
    """Return the labels along the narrowed width of what an operator scales, or of the product that made it."""
    labels = _narrowed(lefts, ran[at].taken)
    if labels:
        return labels
    product = next((ran[i] for i in range(at - 1, -1, -1) if reduces(ran[i].func)), None)
    return _narrowed(lefts, product.taken[:1]) if product is not None else []


def _narrowed(lefts: Lefts, taken: Sequence[Labels]) -> list[Label]:
    """Return the labels along the last dimension of data that loses indices."""
    for labels in taken:
        left = lefts.of(labels)
        if left and not labels.weight:
            return list(labels.dims[max(left)])
    return []


class _Sources:
    """Tells which rows of which parameters the numbers of a tensor come from.

    Attributes:
        first_use: For each slot the first operator that takes it.
    """

    def __init__(self, structure: Structure) -> None:
        self._slots = structure.ledger.slots
        self._starts = np.array([slot.start for slot in self._slots])
        self._ends = self._starts + np.array([slot.size for slot in self._slots])
        self._by_place = {(slot.tensor, slot.dim): slot for slot in self._slots}
        self._steps = self._conditional(structure)
        self.first_use: dict[int, int] = {}
        for at, ran in enumerate(structure.ledger.ran):
            for labels in ran.taken:
                for own in labels.dims.values():
                    for slot in self._slots_of(np.array([label.atoms[0] for label in own])):
                        self.first_use.setdefault(slot, at)

    def of(self, labels: Sequence[Label]) -> dict[int, set[int]]:
        """Return for each slot that labels come from which of its indices do."""
        if not labels:
            return {}
        atoms = self._real(np.unique(np.concatenate([label.atoms for label in labels])))
        found = {}
        for which in self._slots_of(atoms):
            start, end = self._starts[which], self._ends[which]
            found[which] = set((atoms[(atoms >= start) & (atoms < end)] - start).tolist())
        return {which: indices for which, indices in found.items() if which in self.first_use}

    def with_bias(self, slot: int) -> list[tuple[str, int, int]]:
        """Return tensor, dimension and size of a slot, and of the bias beside it."""
        own = self._slots[slot]
        places = [(own.tensor, own.dim, own.size)]
        bias = self._by_place.get((own.tensor.removesuffix("weight") + "bias", 0))
        if own.tensor.endswith("weight") and bias is not None and bias.size == own.size:
            places.append((bias.tensor, bias.dim, bias.size))
        return places

    def _slots_of(self, atoms: Atoms) -> list[int]:
        which = np.searchsorted(self._starts, atoms, side="right") - 1
        inside = (which >= 0) & (atoms < self._ends[which])
        return [int(slot) for slot in np.unique(which[inside])]

    def _conditional(self, structure: Structure) -> tuple[Atoms, Atoms]:
        """Return conditional atoms, ascending, each beside one that it stands for."""
        conditional, real = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for key, choice in structure.ledger.choices.items():
            way = structure.taken.get(key, next(iter(choice.alternatives)))
            for atoms, columns in choice.alternatives[way]:
                conditional.append(np.broadcast_to(atoms, columns.shape).ravel())
                real.append(columns.ravel())
        every = np.concatenate(conditional)
        order = np.argsort(every, kind="stable")
        return every[order], np.concatenate(real)[order]

    def _real(self, atoms: Atoms) -> Atoms:
        """Return atoms with those that they stand for."""
        conditional, real = self._steps
        found = frontier = atoms
        while len(frontier):
            first = np.searchsorted(conditional, frontier, side="left")
            last = np.searchsorted(conditional, frontier, side="right")
            more = [real[start:stop] for start, stop in zip(first, last, strict=True) if stop > start]
            frontier = np.setdiff1d(np.concatenate(more), found) if more else np.empty(0, dtype=np.int64)
            found = np.union1d(found, frontier)
        return found


def _add_rows(scales: Scales, cut: Cut, name: str, dim: int, size: int, indices: set[int], factor: float) -> None:
    kept = cut.kept.get(name, {}).get(dim, torch.arange(size))
    factors = torch.ones(len(kept), dtype=torch.float64)
    factors[torch.isin(kept, torch.tensor(sorted(indices)))] = factor
    if name in scales.rows and scales.rows[name][0] == dim:
        factors = factors * scales.rows[name][1]
    scales.rows[name] = dim, factors
