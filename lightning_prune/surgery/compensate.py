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
from lightning_prune.surgery.course import Lefts
from lightning_prune.surgery.cut import Cut
from lightning_prune.surgery.replay import Constant, Window, is_scaling

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
    """Return the factors that make up for numbers that a cut changes, where what they multiply shows its producers."""
    lefts = Lefts(structure, cut.keep)
    ran = structure.ledger.ran
    scales = Scales()
    for constant in constants:
        at = constant.at if is_scaling(ran[constant.at].func) else _consumer(ran, constant.at)
        if at is None:
            continue
        made = _producers(structure, lefts, at)
        if not made:
            continue
        # The slim model multiplies by so much more than the full one, and its producers by so much less.
        more = _ratio_at(ran, constant, at)
        factor = more if "div" in str(ran[at].func) else 1 / more
        first = min(_first_use(structure, name, dim) for name, dim in made)
        scales.windows.append(Window(first, at, factor))
        scales.free |= {at, constant.at, *_between(ran, constant.at, at)}
        for (name, dim), indices in made.items():
            _add_rows(scales, cut, structure, name, dim, indices, factor)
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


def _producers(structure: Structure, lefts: Lefts, at: int) -> dict[tuple[str, int], set[int]]:
    """Return where the numbers of what an operator scales are made: parameter and dimension -> indices."""
    ran = structure.ledger.ran
    labels = _narrowed(lefts, ran[at].taken)
    if not labels:
        product = next((ran[i] for i in range(at - 1, -1, -1) if reduces(ran[i].func)), None)
        if product is None or len(product.taken) < 2:
            return {}
        labels = _narrowed(lefts, product.taken[:1])
    atoms = _real(structure, [label.atoms for label in labels])
    found: dict[tuple[str, int], set[int]] = {}
    for slot in structure.ledger.slots:
        own = atoms[(atoms >= slot.start) & (atoms < slot.start + slot.size)] - slot.start
        if not len(own):
            continue
        found.setdefault((slot.tensor, slot.dim), set()).update(own.tolist())
        bias = slot.tensor.removesuffix("weight") + "bias"
        for other in structure.ledger.slots:
            if other.tensor == bias != slot.tensor and other.size == slot.size:
                found.setdefault((bias, other.dim), set()).update(own.tolist())
    return found


def _narrowed(lefts: Lefts, taken: Sequence[Labels]) -> list[Label]:
    """Return the labels along the last dimension of data that loses indices."""
    for labels in taken:
        left = lefts.of(labels)
        if left and not labels.weight:
            return list(labels.dims[max(left)])
    return []


def _real(structure: Structure, blocks: list[Atoms]) -> Atoms:
    """Return the atoms of parameters that conditional ones stand for."""
    steps: list[tuple[Atoms, Atoms]] = []
    for key, choice in structure.ledger.choices.items():
        way = structure.taken.get(key, next(iter(choice.alternatives)))
        for atoms, columns in choice.alternatives[way]:
            steps.append((np.broadcast_to(atoms, columns.shape).ravel(), columns.ravel()))
    found = np.unique(np.concatenate([block.ravel() for block in blocks]))
    while True:
        more = [target[np.isin(conditional, found)] for conditional, target in steps]
        grown = np.unique(np.concatenate([found, *more]))
        if len(grown) == len(found):
            return grown
        found = grown


def _first_use(structure: Structure, name: str, dim: int) -> int:
    """Return the first operator that takes a parameter."""
    slot = next(slot for slot in structure.ledger.slots if (slot.tensor, slot.dim) == (name, dim))
    for at, ran in enumerate(structure.ledger.ran):
        for labels in ran.taken:
            for own in labels.dims.values():
                if any(slot.start <= int(label.atoms[0]) < slot.start + slot.size for label in own):
                    return at
    return 0


def _add_rows(
    scales: Scales, cut: Cut, structure: Structure, name: str, dim: int, indices: set[int], factor: float
) -> None:
    slot = next(slot for slot in structure.ledger.slots if (slot.tensor, slot.dim) == (name, dim))
    kept = cut.kept.get(name, {}).get(dim, torch.arange(slot.size))
    factors = torch.ones(len(kept), dtype=torch.float64)
    factors[torch.isin(kept, torch.tensor(sorted(indices)))] = factor
    if name in scales.rows and scales.rows[name][0] == dim:
        factors = factors * scales.rows[name][1]
    scales.rows[name] = dim, factors
