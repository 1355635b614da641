"""Knows how narrow every layer may become, and so what can go at all; knows no scores and chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lightning_prune.structure import Structure

__all__ = ["Least", "Room", "least_widths", "rooms_told"]

_ROUNDING = 1e-9  # 0.07 * 100 must count as 7


class Least(NamedTuple):
    """The smallest width that a group may have, and which limit says so."""

    width: int
    why: str


class Room(NamedTuple):
    """What can go of one channel group.

    Attributes:
        name: The group.
        width: Its units as they stand.
        least: The fewest that must stay.
        why: What keeps these.
        params: Share of the whole model's parameters that goes with all the others, if they alone leave.
        flops: Share of its multiply-adds.
    """

    name: str
    width: int
    least: int
    why: str
    params: float
    flops: float


def least_widths(
    structure: Structure,
    widths: Mapping[str, int],
    min_width: int | Mapping[str, int] = 1,
    max_amount: float | Mapping[str, float] = 1.0,
    round_to: int = 1,
) -> dict[str, Least]:
    """Return the smallest width that every group may have.

    Args:
        structure: The channel groups as they stand.
        widths: Group name -> units at the start, of which ``max_amount`` is a fraction.
        min_width: Units that stay at least: of every group, or by group name.
        max_amount: Largest fraction, in [0, 1], of a group's units that may leave: of every group, or by group name.
        round_to: Widths are multiples of this, rounded up, or what they are now.

    Examples:
        >>> from lightning_prune.structure import find_structure, trace
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 10), torch.nn.Linear(10, 2))
        >>> least_widths(find_structure(trace(net, torch.ones(1, 2))), {"0": 10}, max_amount=0.75)
        {'0': Least(width=3, why='max_amount=0.75')}
    """
    found = {}
    for name, group in structure.groups.items():
        narrow = min_width.get(name, 1) if isinstance(min_width, Mapping) else min_width
        share = max_amount.get(name, 1.0) if isinstance(max_amount, Mapping) else max_amount
        least = max(
            Least(1, "one unit stays"),
            Least(narrow, f"min_width={narrow}"),
            Least(widths[name] - math.floor(share * widths[name] + _ROUNDING), f"max_amount={share:g}"),
            key=lambda limit: limit.width,
        )
        rounded = math.ceil(least.width / round_to) * round_to
        if rounded > least.width:
            least = Least(rounded, f"round_to={round_to}")
        found[name] = least if least.width < group.width else Least(group.width, least.why)
    return found


def rooms_told(rooms: list[Room], most: int = 8) -> str:
    """Say, one line a group, what can go, from those groups that hold most."""
    held = sorted(rooms, key=lambda room: -max(room.params, room.flops))
    lines = [
        f"  {room.name}: {room.width} units, {room.least} stay ({room.why}); "
        f"the others hold {room.params:.1%} of the params, {room.flops:.1%} of the FLOPs"
        for room in held[:most]
    ]
    more = [f"  and {len(held) - most} more groups, which hold less"] if len(held) > most else []
    return "\n".join(["What can go, group by group:", *lines, *more])
