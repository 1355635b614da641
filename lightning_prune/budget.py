"""From scores and a target to a plan: which units leave, so that a count of filters, parameters or FLOPs is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.selection import keep_highest
from lightning_prune.structure import Keep, Structure

__all__ = ["Dense", "Footprint", "Scope", "Scores", "Target", "measure", "plan"]

Target = Literal["filters", "params", "flops"]
Scope = Literal["layer", "global"]
Scores = Mapping[str, Tensor]
"""Group name -> one score per unit, ``(width,)``; higher is kept longer."""

_ROUNDING = 1e-9  # 0.07 * 100 must count as 7


@dataclass(frozen=True)
class Footprint:
    """What a model costs: its parameters, and the multiply-adds of one forward pass on the example inputs."""

    params: int
    flops: int


@dataclass(frozen=True)
class Dense:
    """What was there at the start, of which amounts are fractions.

    Attributes:
        widths: Group name -> number of units.
        footprint: Parameters and multiply-adds.
    """

    widths: Mapping[str, int]
    footprint: Footprint

    def without(self, names: Iterable[str]) -> Dense:
        """Return the same without some groups, which turned out to stay."""
        gone = set(names)
        return Dense({name: width for name, width in self.widths.items() if name not in gone}, self.footprint)


def measure(model: nn.Module, structure: Structure, keep: Keep, uncounted: int = 0) -> Footprint:
    """Predict what the model costs once the units with ``keep == False`` have gone.

    ``uncounted`` are multiply-adds that the structure does not know of.
    """
    alive = structure.alive(keep)
    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for slot in structure.ledger.slots:
        if slot.tensor in sizes:
            sizes[slot.tensor][slot.dim] = int(alive[slot.start : slot.start + slot.size].sum())
    return Footprint(sum(map(math.prod, sizes.values())), structure.flops(keep) + uncounted)


def plan(
    structure: Structure,
    scores: Scores,
    amount: float | Mapping[str, float],
    *,
    target: Target,
    scope: Scope,
    round_to: int,
    dense: Dense,
    footprint: Callable[[Keep], Footprint],
) -> Keep:
    """Choose the units that leave, lowest scores first: the fewest with which the amount asked for is gone.

    Args:
        structure: The channel groups of the model as it stands.
        scores: One score per unit of every group.
        amount: Fraction, in [0, 1), of what was there at the start: of the target over the whole model, or, by group
            name, of the filters of each group.
        target: What ``amount`` is a fraction of.
        scope: ``"layer"`` takes the same share of every group, ``"global"`` compares scores across groups.
        round_to: Widths after the cut are multiples of this, rounded up.
        dense: What was there at the start.
        footprint: Tells what the model costs under a choice.

    Returns:
        For every group which units stay. Each group keeps at least one.

    Raises:
        PruningError: If the target lies beyond what can be cut.
    """
    if isinstance(amount, Mapping):
        counts = {name: _share(amount.get(name, 0.0), dense.widths[name]) for name in structure.groups}
        return _keep(structure, scores, {n: c - _gone(structure, dense, n) for n, c in counts.items()}, round_to)
    order = _leaving_order(structure, scores, scope, dense)

    def choose(count: int) -> Keep:
        leaving = dict.fromkeys(structure.groups, 0)
        for name, units in zip(*np.unique(order[:count], return_counts=True), strict=True):
            leaving[name] = int(units)
        return _keep(structure, scores, leaving, round_to)

    if target == "filters" and scope == "layer":
        counts = {name: _share(amount, dense.widths[name]) - _gone(structure, dense, name) for name in structure.groups}
        return _keep(structure, scores, counts, round_to)
    if target == "filters":
        whole, left = sum(dense.widths.values()), sum(group.width for group in structure.groups.values())
        left += len(dense.widths.keys() - structure.groups.keys())  # a group of one unit is no group any more
        if _share(amount, whole) > whole - len(dense.widths):
            raise _beyond(amount, target, 1 - len(dense.widths) / whole)
        return choose(max(0, _share(amount, whole) - (whole - left)))
    whole = getattr(dense.footprint, target)
    budget = (1.0 - amount) * whole
    least = getattr(footprint(choose(len(order))), target)
    if least > budget:
        raise _beyond(amount, target, 1 - least / whole)
    low, high = 0, len(order)  # the cost of choose(count) never rises with count
    while low < high:
        middle = (low + high) // 2
        if getattr(footprint(choose(middle)), target) <= budget * (1 + _ROUNDING):
            high = middle
        else:
            low = middle + 1
    return choose(low)


def _share(amount: float, width: int) -> int:
    return math.ceil(amount * width - _ROUNDING)  # Li et al. keep int((1 - amount) * width)


def _gone(structure: Structure, dense: Dense, name: str) -> int:
    return dense.widths[name] - structure.groups[name].width


def _leaving_order(structure: Structure, scores: Scores, scope: Scope, dense: Dense) -> NDArray[np.str_]:
    """Return the group that loses its next lowest unit, again and again, until each has one left."""
    names, keys = [], []
    for name, group in structure.groups.items():
        if scope == "layer":  # by the share of the group that would then be gone
            key = (np.arange(group.width) + 1 + _gone(structure, dense, name)) / dense.widths[name]
        else:
            key = np.sort(scores[name].double().nan_to_num(nan=-math.inf).cpu().numpy())
        keys.append(key[:-1])
        names.append(np.full(group.width - 1, name))
    if not names:
        return np.empty(0, dtype=np.str_)
    return np.concatenate(names)[np.argsort(np.concatenate(keys), kind="stable")]


def _keep(
    structure: Structure, scores: Scores, leaving: Mapping[str, int], round_to: int
) -> dict[str, NDArray[np.bool_]]:
    stay = {name: max(1, group.width - max(0, leaving[name])) for name, group in structure.groups.items()}
    for link in structure.links:
        stay |= _alike({name: structure.groups[name].width for name in link}, stay, round_to)
    keep = {}
    for name, group in structure.groups.items():
        stays = min(group.width, math.ceil(stay[name] / round_to) * round_to)
        keep[name] = keep_highest(scores[name], stays).cpu().numpy()
    return keep


def _alike(widths: Mapping[str, int], stay: Mapping[str, int], round_to: int) -> dict[str, int]:
    """Let linked groups keep the same share: the largest whole one within what they were to keep together."""
    steps = math.gcd(*widths.values())
    share = sum(stay[name] for name in widths) / sum(widths.values())
    if any(stay[name] == width for name, width in widths.items()):  # one that was to stay whole holds the others
        return dict(widths)
    least = max(1, math.floor(share * steps + _ROUNDING))
    fits = (k for k in range(least, steps) if all(k * width // steps % round_to == 0 for width in widths.values()))
    kept = next(fits, steps)
    return {name: kept * width // steps for name, width in widths.items()}


def _beyond(amount: float, target: str, most: float) -> PruningError:
    return PruningError(
        f"amount={amount:g} of the {target} cannot go: with one unit left in every group that can be cut, "
        f"{most:.1%} would be gone. Ask for less, or free more of the model (see the report's pinned channels)."
    )
