"""Shows which channels may leave a model, what they cost, and which stay and why; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from rich.table import Table
from torch import nn

from lightning_prune.measure.footprint import measure
from lightning_prune.pruning.budget import Budget, Dense, what_can_go
from lightning_prune.structure import Structure

__all__ = ["GroupCost", "group_costs", "group_table", "pinned_table", "room_table"]


class GroupCost(NamedTuple):
    """What all units of a channel group hold, each counted as if it left alone: parameters and multiply-adds."""

    params: int
    flops: int


def group_costs(model: nn.Module, structure: Structure) -> dict[str, GroupCost]:
    """Return, by group, what leaves with one unit, times the number of units.

    A weight between two groups is part of both: the costs of all groups come to more than the model's.
    """
    whole = measure(model, structure, {})
    costs = {}
    for name, group in structure.groups.items():
        slim = measure(model, structure, {name: np.arange(group.width) > 0})
        costs[name] = GroupCost(group.width * (whole.params - slim.params), group.width * (whole.flops - slim.flops))
    return costs


def group_table(structure: Structure, costs: Mapping[str, GroupCost]) -> Table:
    """List the channel groups: who makes them, how wide they are and what their units hold."""
    table = Table(
        title=f"{len(structure.groups)} channel groups can be cut",
        caption="params, FLOPs: what one unit takes along, times the units; FLOPs of one call, as fvcore counts.",
    )
    table.add_column("group", overflow="fold")
    table.add_column("also made by", overflow="fold", style="dim")
    for heading in ("units", "params", "FLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in structure.groups.items():
        made = [path for path in group.producers if path != name]
        table.add_row(name, ", ".join(made), str(group.width), *(f"{cost:,}" for cost in costs[name]))
    return table


def room_table(model: nn.Module, structure: Structure, budget: Budget) -> Table:
    """List what can go: of every group, the units that may leave, what keeps the others, and what share leaves.

    Args:
        model: The model that ``structure`` was traced from.
        structure: Its channel groups.
        budget: Its limits, by group name or for all.
    """
    whole, footprint = measure(model, structure, {}), partial(measure, model, structure)
    dense = Dense({name: group.width for name, group in structure.groups.items()}, whole)
    rooms = what_can_go(structure, budget, dense, footprint)
    left = footprint({room.name: np.arange(room.width) < room.least for room in rooms})
    params, flops = 1 - left.params / max(whole.params, 1), 1 - left.flops / max(whole.flops, 1)
    table = Table(
        title=f"At most {params:.1%} of the params and {flops:.1%} of the FLOPs can go",
        caption="Shares are of the whole model, each group counted as if it left alone.",
    )
    table.add_column("group", overflow="fold")
    for heading in ("units", "can go", "params", "FLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("the others stay", overflow="fold", style="dim")
    for room in rooms:
        shares = f"{room.params:.1%}", f"{room.flops:.1%}"
        table.add_row(room.name, str(room.width), str(room.width - room.least), *shares, room.why)
    return table


def pinned_table(structure: Structure) -> Table:
    """List the channels that stay, and why."""
    table = Table(title="Channels that stay")
    table.add_column("of", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("because", overflow="fold")
    for pin in structure.pinned:
        table.add_row(f"{pin.tensor}, dimension {pin.dim}", f"{pin.count} of {pin.size}", pin.reason)
    if structure.branching:
        table.caption = f"Only the path that the example inputs took was seen of: {', '.join(structure.branching)}."
    return table
