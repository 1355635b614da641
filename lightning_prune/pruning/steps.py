"""Walks from a model as it stands to a slimmer one, step by step in the order of scores; knows no cost of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.algorithms.selection import keep_highest
from lightning_prune.pruning.limits import Block, Least
from lightning_prune.structure import Structure

__all__ = ["Levels", "Walk", "each_by_itself", "within"]

Levels = NDArray[np.int64]
"""For each block how many of its steps have been taken, ``(blocks,)``."""

_ROUNDING = 1e-9


class Walk:
    """The order in which blocks lose units: each entry is one step of one block."""

    def __init__(
        self,
        structure: Structure,
        scores: Mapping[str, Tensor],
        scope: Literal["layer", "global"],
        widths: Mapping[str, int],
        blocks: Sequence[Block],
    ) -> None:
        """Sort the steps of all blocks: by the share that is then gone, or by the score of the last unit to leave.

        Args:
            structure: The channel groups as they stand.
            scores: Group name -> one score per unit, ``(width,)``.
            scope: ``"layer"`` goes by shares, ``"global"`` by scores.
            widths: Group name -> units at the start, of which shares are.
            blocks: What shrinks together.
        """
        self.blocks = blocks
        self._scores = {name: scores[name] for name in structure.groups}
        keys = [self._by_share(block, widths) if scope == "layer" else self._by_score(block) for block in blocks]
        steps = [np.full(len(found), which) for which, found in enumerate(keys)]
        self.order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if keys:
            self.order = np.concatenate(steps)[np.argsort(np.concatenate(keys), kind="stable")]

    def after(self, count: int, held: Mapping[int, int] | None = None) -> Levels:
        """Return where so many steps lead; ``held`` blocks stay at a level of their own."""
        levels = np.bincount(self.order[:count], minlength=len(self.blocks))
        for block, level in (held or {}).items():
            levels[block] = level
        return levels

    def first(self, levels: Levels, most: int) -> Levels:
        """Return where the first steps towards some levels lead that take no more than ``most`` units in all."""
        reached = np.zeros(len(self.blocks), dtype=np.int64)
        left = most
        for which in self.order:
            if reached[which] == levels[which]:
                continue
            block = self.blocks[which]
            left -= block.gone(reached[which] + 1) - block.gone(reached[which])
            if left < 0:
                break
            reached[which] += 1
        return reached

    def units(self, levels: Levels) -> int:
        """Return how many units have left."""
        return sum(block.gone(level) for block, level in zip(self.blocks, levels, strict=True))

    def keep(self, levels: Levels) -> dict[str, NDArray[np.bool_]]:
        """Return which units of every group stay: those with the highest scores."""
        return {
            name: keep_highest(self._scores[name], width).cpu().numpy()
            for block, level in zip(self.blocks, levels, strict=True)
            for name, width in block.at(level).items()
        }

    def _by_share(self, block: Block, widths: Mapping[str, int]) -> NDArray[np.float64]:
        whole = sum(widths[name] for name in block.members)
        return (whole - block.left[1:]) / whole

    def _by_score(self, block: Block) -> NDArray[np.float64]:
        keys = np.zeros(block.steps)
        units = np.zeros(block.steps)
        for which, name in enumerate(block.members):
            ranked = np.sort(self._scores[name].cpu().double().nan_to_num(nan=-math.inf).numpy())
            gone = block.widths[0, which] - block.widths[:, which]
            leaving = np.diff(gone)
            with np.errstate(invalid="ignore"):  # infinities of both signs
                keys += leaving * ranked[gone[1:] - 1]
            units += leaving
        return np.maximum.accumulate(np.nan_to_num(keys / units, nan=-math.inf, posinf=math.inf, neginf=-math.inf))


def each_by_itself(walk: Walk, counts: Mapping[str, int], least: Mapping[str, Least], fill: bool) -> Levels:
    """Remove so many units of every group, as far as its widths allow without removing more.

    Args:
        walk: The steps.
        counts: Group name -> units that are to leave.
        least: The smallest width of every group.
        fill: Whether units that linked groups cannot give, since none of the shares that they can keep is the one asked
            for, are made up for by the others, or, where these have no more, by the linked groups' next share.
    """
    stay = {
        name: max(least[name].width, width - max(0, counts[name]))
        for block in walk.blocks
        for name, width in block.at(0).items()
    }
    levels = np.array([_deepest(block, stay) for block in walk.blocks], dtype=np.int64)
    linked = [which for which, block in enumerate(walk.blocks) if len(block.members) > 1]
    while fill and linked:
        missing = {which: _missing(walk.blocks[which], int(levels[which]), stay) for which in linked}
        filled = _filled(walk, levels, sum(missing.values()), linked)
        if filled is not None:
            return filled
        further = [which for which in linked if missing[which] > 0 and levels[which] < walk.blocks[which].steps]
        if not further:
            break
        levels[max(further, key=lambda which: missing[which])] += 1
    return levels


def _deepest(block: Block, stay: Mapping[str, int]) -> int:
    """Return the last level at which as many units stay as shall; one group that shall stay whole holds the others."""
    whole = block.at(0)
    if any(stay[name] == width for name, width in whole.items()):
        return 0
    wanted = sum(stay[name] for name in whole)
    return int(np.flatnonzero(block.left >= wanted)[-1])


def _missing(block: Block, level: int, stay: Mapping[str, int]) -> int:
    if not block.steps:  # it cannot shrink at all
        return 0
    return sum(width - stay[name] for name, width in block.at(level).items())


def _filled(walk: Walk, levels: Levels, missing: int, without: Sequence[int]) -> Levels | None:
    """Remove units that are missing from other blocks, in their order; return None where these have too few."""
    filled, ahead = levels.copy(), np.zeros(len(walk.blocks), dtype=np.int64)
    for which in walk.order:
        if missing <= 0:
            break
        ahead[which] += 1
        if ahead[which] > levels[which] and which not in without:
            block = walk.blocks[which]
            missing -= block.gone(ahead[which]) - block.gone(ahead[which] - 1)
            filled[which] = ahead[which]
    return filled if missing <= 0 else None


def within(walk: Walk, cost: Callable[[Levels], float], allowed: float) -> Levels:
    """Walk the fewest steps after which the cost is no more than allowed.

    Where the last of them is a coarse one and takes far more than is asked, two ways lead nearer: it is left out, and
    what comes after it in the order makes up for it; or it is taken, and what came before is given back. Of those that
    end within one fine step of what is asked, the one counts that takes the fewest units; where none does, the nearest.

    Args:
        walk: The steps.
        cost: What the model costs at some levels; it never rises with a level.
        allowed: What it may cost.

    Returns:
        Steps taken of each block.
    """
    bound = allowed * (1 + _ROUNDING)

    def fits(count: int, held: Mapping[int, int]) -> bool:
        return cost(walk.after(count, held)) <= bound

    count = _smallest(lambda count: fits(count, {}), 0, len(walk.order))
    found = walk.after(count)
    if count == 0 or not walk.blocks[walk.order[count - 1]].coarse or cost(found) >= allowed * (1 - _ROUNDING):
        return found
    ways = [_given_back(walk, count, fits), *_made_up_for(walk, count, fits)]
    fine = [levels for levels, ends_fine in ways if ends_fine]
    if fine:
        return min(fine, key=walk.units)
    return max((levels for levels, _ in ways), key=cost)


_Fits = Callable[[int, Mapping[int, int]], bool]


def _given_back(walk: Walk, count: int, fits: _Fits) -> tuple[Levels, bool]:
    """Undo, from the last, the steps without which the cost is still allowed; return whether a fine one was not."""
    held: dict[int, int] = {}
    at = count
    while at > 0:
        held[int(walk.order[at - 1])] = int(walk.after(at, held)[walk.order[at - 1]])
        at = _smallest_from_above(lambda count: fits(count, held), at - 1)  # called at once
        if at > 0 and not walk.blocks[walk.order[at - 1]].coarse:
            return walk.after(at, held), True
    return walk.after(at, held), False


def _made_up_for(walk: Walk, count: int, fits: _Fits) -> list[tuple[Levels, bool]]:
    """Leave out the last step, and coarse ones that go too far again; tell of each way whether a fine step ended it."""
    held: dict[int, int] = {}
    ways: list[tuple[Levels, bool]] = []
    at = count
    while True:
        last = int(walk.order[at - 1])
        held[last] = int(walk.after(at - 1, held)[last])
        if not fits(len(walk.order), held):
            return ways
        at = _smallest(lambda count: fits(count, held), at, len(walk.order))  # called at once
        fine = not walk.blocks[walk.order[at - 1]].coarse
        ways.append((walk.after(at, held), fine))
        if fine:
            return ways


def _smallest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest number from ``low`` to ``high`` that fits; all above it do, ``high`` is known to."""
    reach = 1
    while low + reach < high and not fits(low + reach - 1):  # what is looked for often lies near
        low, reach = low + reach, 2 * reach
    high = min(high, low + reach)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _smallest_from_above(fits: Callable[[int], bool], high: int) -> int:
    """Return the smallest number up to ``high``, which fits, that fits; all above it do."""
    reach = 1
    while high - reach > 0 and fits(high - reach):
        high, reach = high - reach, 2 * reach
    return _smallest(fits, max(0, high - reach), high)
