"""Works out how narrow every layer may become, and by which steps; reads no scores and chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure import ChannelGroup, Structure

__all__ = ["Block", "Least", "Room", "blocks_of", "least_widths", "rooms_in_words", "rounding_in_words", "step_of"]

_ROUNDING = 1e-9  # 0.07 * 100 must count as 7


class Least(NamedTuple):
    """The smallest width that a group may have, and which limit says so."""

    width: int
    why: str


@dataclass(frozen=True, eq=False)
class Block:
    """Groups that shrink together, most often one alone, and the widths that they may have.

    Attributes:
        members: Names of the groups.
        widths: Their units at each level, ``(levels, members)``: as they stand and then ever fewer.
        coarse: Whether single steps may weigh much: widths are tied together, or one unit is several channels.
    """

    members: tuple[str, ...]
    widths: NDArray[np.int64]
    coarse: bool

    @cached_property
    def left(self) -> NDArray[np.int64]:
        """Units of all members at each level, ``(levels,)``."""
        return self.widths.sum(axis=1)

    @property
    def steps(self) -> int:
        """How often the groups can shrink further."""
        return len(self.widths) - 1

    def at(self, level: int) -> dict[str, int]:
        """Return the units of each group at a level."""
        return dict(zip(self.members, self.widths[level].tolist(), strict=True))

    def gone(self, level: int) -> int:
        """Return how many units have left at a level."""
        return int(self.left[0] - self.left[level])


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
    parts: int = 1,
) -> dict[str, Least]:
    """Return the smallest width, in units, that every group may have by itself.

    Args:
        structure: The channel groups as they stand.
        widths: Group name -> units at the start, of which ``max_amount`` is a fraction.
        min_width: Channels that stay at least: of every group, or by group name.
        max_amount: Largest fraction, in [0, 1], of a group's channels that may leave: of every group, or by group name.
        round_to: Numbers of channels are multiples of this, rounded up, or what they are now.
        parts: Numbers of units are multiples of this, likewise.

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
            Least(math.ceil(narrow / group.channels), f"min_width={narrow}"),
            Least(widths[name] - math.floor(share * widths[name] + _ROUNDING), f"max_amount={share:g}"),
            key=lambda limit: limit.width,
        )
        step = step_of(group, round_to, parts)
        rounded = math.ceil(least.width / step) * step
        if rounded > least.width:
            least = Least(rounded, rounding_in_words(round_to, parts))
        found[name] = least if least.width < group.width else Least(group.width, least.why)
    return found


def blocks_of(structure: Structure, least: Mapping[str, Least], round_to: int = 1, parts: int = 1) -> list[Block]:
    """Return what shrinks together, with all widths from those that groups have down to the least.

    Groups that are linked keep the same share, so their widths are the whole ones of such shares.

    Args:
        structure: The channel groups as they stand.
        least: The smallest width that every group may have by itself.
        round_to: Numbers of channels are multiples of this, or what they are now.
        parts: Numbers of units are multiples of this, likewise.
    """
    linked = {name: link for link in structure.links for name in link}
    found = []
    for name, group in structure.groups.items():
        link = linked.get(name, (name,))
        if name != link[0]:
            continue
        if len(link) == 1 and step_of(group, round_to, parts) == 1:  # as most often
            widths = np.arange(group.width, min(least[name].width, group.width) - 1, -1)[:, None]
            found.append(Block(tuple(link), widths, coarse=group.channels > 1))
            continue
        whole = np.array([structure.groups[member].width for member in link])
        steps = np.array([step_of(structure.groups[member], round_to, parts) for member in link])
        fewest = np.array([least[member].width for member in link])
        finest = int(np.gcd.reduce(whole))
        shares = np.arange(finest - 1, 0, -1)[:, None] * (whole // finest)
        fits = ((shares >= fewest) & (shares % steps == 0)).all(axis=1)
        widths = np.concatenate([whole[None], shares[fits]])
        found.append(Block(tuple(link), widths, coarse=len(link) > 1 or group.channels > 1))
    return found


def step_of(group: ChannelGroup, round_to: int, parts: int = 1) -> int:
    """Return the fewest units that make up equal ``parts``, and whose channels are a multiple of ``round_to``."""
    return math.lcm(round_to // math.gcd(round_to, group.channels), parts)


def rounding_in_words(round_to: int, parts: int) -> str:
    """Say what widths are rounded to."""
    split = f"tensor_parallel_size={parts}"
    if round_to == 1:
        return split
    return f"round_to={round_to}" if parts == 1 else f"round_to={round_to} and {split}"


def rooms_in_words(rooms: list[Room], most: int = 8) -> str:
    """Say, one line a group, what can go, from those groups that hold most."""
    held = sorted(rooms, key=lambda room: -max(room.params, room.flops))
    lines = [
        f"  {room.name}: {room.width} units, {room.least} stay ({room.why}); "
        f"the others hold {room.params:.1%} of the params, {room.flops:.1%} of the FLOPs"
        for room in held[:most]
    ]
    more = [f"  and {len(held) - most} more groups, which hold less"] if len(held) > most else []
    return "\n".join(["What can go, group by group:", *lines, *more])
