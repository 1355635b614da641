"""From scores and a budget to a plan: which units leave, so that what is asked for is gone; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_prune.algorithms.selection import number_to_prune
from lightning_prune.measure.footprint import WHOLE, Footprint, Part
from lightning_prune.model.errors import OutOfReachError
from lightning_prune.pruning.limits import Block, Least, Room, blocks_of, least_widths, rooms_in_words
from lightning_prune.pruning.steps import Levels, Walk, each_by_itself, within
from lightning_prune.structure import Keep, Structure

__all__ = ["NEAR", "Budget", "Dense", "Scope", "Scores", "Target", "per_saving", "select_units", "what_can_go"]

Target = Literal["filters", "params", "flops", "latency"]
Scope = Literal["layer", "global"]
Scores = Mapping[str, Tensor]
"""Group name -> one score per unit, ``(width,)``; higher is kept longer."""

_ROUNDING = 1e-9  # 0.07 * 100 must count as 7
NEAR = 0.05  # of a latency: how near what is measured must come to what was asked


@dataclass(frozen=True)
class Budget:
    """What an amount is a fraction of, how it is spread over the layers, and what every layer keeps.

    Attributes:
        target: ``"filters"`` that can leave, or ``"params"``, ``"flops"`` or ``"latency"`` of the whole model.
        scope: ``"layer"`` takes the same share of every group, ``"global"`` compares scores across groups.
        round_to: Numbers of channels after the cut are multiples of this, rounded up.
        min_width: Channels that stay at least: of every group, or by group name.
        max_amount: Largest fraction, in [0, 1], of a group's channels that may leave: of every group, or by group name.
        part: What of the model is counted.
        parts: Processes that tensor parallelism splits layers over; numbers of units are multiples of this.
    """

    target: Target = "filters"
    scope: Scope = "layer"
    round_to: int = 1
    min_width: int | Mapping[str, int] = 1
    max_amount: float | Mapping[str, float] = 1.0
    part: Part = WHOLE
    parts: int = 1

    def least(self, structure: Structure, dense: Dense) -> dict[str, Least]:
        """Return the smallest width that every group may have, and what says so."""
        return self.blocks_and_least(structure, dense)[1]

    def blocks_and_least(self, structure: Structure, dense: Dense) -> tuple[list[Block], dict[str, Least]]:
        """Return what shrinks together, with all widths that it may have; and the smallest width of every group."""
        alone = least_widths(structure, dense.widths, self.min_width, self.max_amount, self.round_to, self.parts)
        blocks = blocks_of(structure, alone, self.round_to, self.parts)
        found = dict(alone)
        for block in blocks:
            narrowest = block.at(-1)
            for name, width in narrowest.items():
                if width == alone[name].width:
                    continue
                tied = [other for other in narrowest if other != name]
                why = f"it keeps the same share as {', '.join(tied)}" if tied else alone[name].why
                found[name] = Least(width, why)
        return blocks, found


@dataclass(frozen=True)
class Dense:
    """What was there at the start, of which amounts are fractions.

    Attributes:
        widths: Group name -> number of units.
        footprint: Parameters and multiply-adds.
        left: Group name -> units that earlier cuts left, of groups that are no groups any more; one if it is not there.
    """

    widths: Mapping[str, int]
    footprint: Footprint
    left: Mapping[str, int] = field(default_factory=dict)

    def without(self, names: Iterable[str]) -> Dense:
        """Return the same without some groups, which turned out to stay."""
        gone = set(names)
        widths = {name: width for name, width in self.widths.items() if name not in gone}
        return Dense(widths, self.footprint, self.left)

    def lone(self, names: Iterable[str]) -> dict[str, int]:
        """Return the units left of all groups but some, which an earlier cut left and which are no groups any more."""
        return {name: self.left.get(name, 1) for name in self.widths.keys() - set(names)}


def select_units(
    structure: Structure,
    scores: Scores,
    amount: float | Mapping[str, float],
    budget: Budget,
    *,
    dense: Dense,
    footprint: Callable[[Keep], Footprint],
    latency: Callable[[Keep], float] | None = None,
    at_most: int | None = None,
) -> Keep:
    """Choose the units that leave, lowest scores first: the fewest with which the amount asked for is gone.

    Amounts of each layer's filters (by group name, or with ``scope="layer"``) stop at the least width of the layer;
    every other amount is made up for by the layers that have more to give. Where one step of linked groups, or one
    head, would take far more than is asked, finer ones compensate for it.

    Args:
        structure: The channel groups of the model as it stands.
        scores: One score per unit of every group.
        amount: Fraction, in [0, 1), of what was there at the start: of the target over the whole model, or, by group
            name, of the filters of each group.
        budget: What the amount is a fraction of, and what every layer keeps.
        dense: What was there at the start.
        footprint: Tells what the model costs under a choice.
        latency: Measures the share of the latency at the start that a choice leaves; for ``target="latency"``.
        at_most: Units that may be gone in all, of those at the start: what then leaves are the first of those that
            would leave without this limit.

    Returns:
        For every group which units stay.

    Raises:
        OutOfReachError: If the target lies beyond what can be cut, with a table of what can.
    """
    blocks, least = budget.blocks_and_least(structure, dense)
    walk = Walk(structure, scores, budget.scope, dense.widths, blocks)
    if isinstance(amount, Mapping):
        counts = _still_to_take(structure, dense, amount)
        levels = each_by_itself(walk, counts, least, fill=False)
    elif budget.target == "filters" and budget.scope == "layer":
        counts = _still_to_take(structure, dense, dict.fromkeys(structure.groups, amount))
        levels = each_by_itself(walk, counts, least, fill=True)
    else:
        levels = _over_all_groups(walk, structure, amount, budget, dense, footprint, latency)
    if at_most is not None:
        levels = walk.first(levels, _units_allowed(structure, dense, at_most))
    return walk.keep(levels)


def _still_to_take(structure: Structure, dense: Dense, amounts: Mapping[str, float]) -> dict[str, int]:
    """Return how many units of each group are still to be pruned, given fractions of the dense groups."""
    counts = {}
    for name, group in structure.groups.items():
        asked = number_to_prune(amounts.get(name, 0.0), dense.widths[name])
        gone = dense.widths[name] - group.width
        counts[name] = asked - gone
    return counts


def _over_all_groups(
    walk: Walk,
    structure: Structure,
    amount: float,
    budget: Budget,
    dense: Dense,
    footprint: Callable[[Keep], Footprint],
    latency: Callable[[Keep], float] | None,
) -> Levels:
    """Walk the fewest steps of all groups after which the target of the whole model is met."""
    whole, cost = _cost(structure, budget.target, dense, footprint, latency)
    allowed = (1.0 - amount) * whole
    if budget.target == "filters":  # whole units
        allowed = whole - number_to_prune(amount, int(whole))
    tolerance = NEAR if budget.target == "latency" else _ROUNDING
    fewest = cost(walk.keep(walk.after(len(walk.order))))
    if fewest > allowed * (1 + tolerance):
        rooms = rooms_in_words(what_can_go(structure, budget, dense, footprint))
        raise _beyond(amount, budget, 1 - fewest / whole, rooms)
    if budget.target != "latency":
        return within(walk, lambda levels: cost(walk.keep(levels)), allowed)
    count = _nearest(lambda count: cost(walk.keep(walk.after(count))), len(walk.order), allowed)
    return walk.after(count)


def per_saving(scores: Scores, saved: Mapping[str, Footprint], target: Target) -> Scores:
    """Divide scores by what one unit of their group saves of the target.

    Where scores are losses that add up, units that leave in the order of loss per saving are the greedy answer to what
    a budget asks: so much saved, at the least loss. Latency is not known unit by unit; multiply-adds stand for it.

    Args:
        scores: One score per unit of every group, 0 or more.
        saved: Group name -> what goes with one of its units.
        target: What is to be saved; filters save one each, so their scores stay as they are.

    Returns:
        Group name -> one score per unit, ``(width,)``. Units that save nothing leave last.

    References:
        Theis et al., Faster Gaze Prediction with Dense Networks and Fisher Pruning, 2018, sec. 2.3 (arXiv:1801.05787);
        Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021, sec. 3.3 (arXiv:2108.00708).
    """
    if target == "filters":
        return scores
    what = "params" if target == "params" else "flops"
    divided = {}
    for name, one in saved.items():
        price = getattr(one, what)
        if price > 0:
            divided[name] = scores[name] / price
        else:
            divided[name] = torch.full_like(scores[name], math.inf)
    return divided


def what_can_go(
    structure: Structure, budget: Budget, dense: Dense, footprint: Callable[[Keep], Footprint]
) -> list[Room]:
    """Return for every group how many units may leave, what keeps the others, and how much of the model they hold."""
    now = footprint({})
    params, flops = max(dense.footprint.params, 1), max(dense.footprint.flops, 1)
    rooms = []
    for name, least in budget.least(structure, dense).items():
        width = structure.groups[name].width
        slim = footprint({name: np.arange(width) < least.width})
        saved = (now.params - slim.params) / params, (now.flops - slim.flops) / flops
        rooms.append(Room(name, width, least.width, least.why, *saved))
    return rooms


def _cost(
    structure: Structure,
    target: Target,
    dense: Dense,
    footprint: Callable[[Keep], Footprint],
    latency: Callable[[Keep], float] | None,
) -> tuple[float, Callable[[Keep], float]]:
    """Return what the whole model costs, by the target, and what tells the cost of a choice."""
    if target == "filters":
        lone = sum(dense.lone(structure.groups).values())
        return sum(dense.widths.values()), lambda keep: lone + sum(int(kept.sum()) for kept in keep.values())
    if target == "latency":
        if latency is None:
            raise ValueError("target='latency': pass latency=, which measures what a choice leaves of it.")
        return 1.0, latency
    return getattr(dense.footprint, target), lambda keep: getattr(footprint(keep), target)


def _nearest(cost: Callable[[int], float], most: int, allowed: float) -> int:
    """Return the count whose cost, as measured, comes nearest to what is allowed; cost falls with the count, roughly.

    A measurement may be disturbed and lead a bisection astray: where it ends off the mark, another starts afresh.
    """
    best = (math.inf, most)
    for _ in range(4):
        best = min(best, _bisected(cost, most, allowed))
        if best[0] <= NEAR / 2 * allowed:
            break
    return best[1]


def _bisected(cost: Callable[[int], float], most: int, allowed: float) -> tuple[float, int]:
    """Return how far off, as the median of three measurements, the nearest count that a bisection found is, and it."""
    tried: dict[int, list[float]] = {}

    def measured(count: int, times: int = 1) -> float:
        seen = tried.setdefault(count, [])
        seen += [cost(count) for _ in range(times - len(seen))]
        return median(seen)

    def miss(count: int) -> float:
        found = median(tried[count])
        # where units are few and weigh much, rather less is left than was asked for
        return abs(found - allowed) + (1.0 if found > allowed * (1 + NEAR) else 0.0)

    if measured(0, times=3) <= allowed:
        return 0.0, 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if measured(middle) > allowed:
            low = middle
        else:
            high = middle
    measured(high)
    # The best so far may be so by a disturbed measurement: it counts once it was measured three times.
    best = min(tried, key=miss)
    while len(tried[best]) < 3:
        measured(best, times=len(tried[best]) + 1)
        best = min(tried, key=miss)
    return miss(best), best


def _units_allowed(structure: Structure, dense: Dense, at_most: int) -> int:
    """Return how many more units may be pruned so that no more than so many are in all."""
    now = sum(dense.lone(structure.groups).values()) + sum(group.width for group in structure.groups.values())
    gone = sum(dense.widths.values()) - now
    return max(0, at_most - gone)


def _beyond(amount: float, budget: Budget, most: float, rooms: str) -> OutOfReachError:
    free = (budget.min_width, budget.max_amount, budget.round_to, budget.parts) == (1, 1.0, 1, 1)
    stay = "one unit left in" if free else "no more than min_width, max_amount and round_to keep of"
    return OutOfReachError(
        f"amount={amount:g} of the {budget.target} cannot go: with {stay} every group that can be cut, "
        f"{most:.1%} would be gone. Ask for less, or free more of the model (see the report's pinned channels).\n"
        f"{rooms}"
    )
