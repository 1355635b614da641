"""Tables of a model: channel groups, layers and weights, with their costs before and after pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import measure
from lightning_prune.pruning.budget import Budget, Dense, what_can_go
from lightning_prune.pruning.weights import WeightCount
from lightning_prune.structure import Structure
from lightning_prune.surgery.sparse_files import SparseReport

__all__ = [
    "GroupCost", "LayerCost", "group_costs", "group_table", "layer_costs", "layer_table", "new_table", "pinned_table",
    "room_table", "stored_table", "weight_table",
]  # fmt: skip


class GroupCost(NamedTuple):
    """Parameters and multiply-adds of all units of a channel group, each counted as if it were pruned alone."""

    params: int
    flops: int


class LayerCost(NamedTuple):
    """One layer: output channels, its own parameters, multiply-adds."""

    width: int
    params: int
    flops: int


def new_table(title: str, caption: str, names: Iterable[str], numbers: Iterable[str]) -> Table:
    """Return a table without rows: columns of names, which fold, then columns of numbers.

    Rich would read brackets in a string as markup. Names of modules and metrics may hold some, so they must be
    :class:`rich.text.Text` in every cell.
    """
    table = Table(title=Text(title), caption=Text(caption))
    for heading in names:
        table.add_column(Text(heading), overflow="fold")
    for heading in numbers:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    return table


def group_costs(model: nn.Module, structure: Structure) -> dict[str, GroupCost]:
    """Return the cost of each channel group: that of one unit, times the number of units.

    A weight between two groups is part of both, so the costs of all groups add up to more than the model's.
    """
    whole = measure(model, structure, {})
    costs = {}
    for name, group in structure.groups.items():
        slim = measure(model, structure, {name: np.arange(group.width) > 0})
        costs[name] = GroupCost(group.width * (whole.params - slim.params), group.width * (whole.flops - slim.flops))
    return costs


def group_table(structure: Structure, costs: Mapping[str, GroupCost]) -> Table:
    """Return a table of the channel groups: producer layers, width and cost."""
    table = new_table(
        f"{len(structure.groups)} channel groups can be pruned",
        "params, FLOPs: those of one unit, times the units. FLOPs: multiply-adds of one call, as fvcore counts them.",
        ("group", "also produced by"),
        ("units", "params", "FLOPs"),
    )
    table.columns[1].style = "dim"
    for name, group in structure.groups.items():
        others = [path for path in group.producers if path != name]
        numbers = [f"{cost:,}" for cost in costs[name]]
        table.add_row(Text(name), Text(", ".join(others)), str(group.width), *numbers)
    return table


def room_table(model: nn.Module, structure: Structure, budget: Budget) -> Table:
    """Return a table of how much of each group can be pruned within limits, and what keeps the rest.

    Args:
        model: The model that ``structure`` was traced from.
        structure: Its channel groups.
        budget: The limits, by group name or for all.
    """
    whole = measure(model, structure, {})
    footprint = partial(measure, model, structure)
    dense = Dense({name: group.width for name, group in structure.groups.items()}, whole)
    rooms = what_can_go(structure, budget, dense, footprint)
    least = footprint({room.name: np.arange(room.width) < room.least for room in rooms})
    params = 1 - least.params / max(whole.params, 1)
    flops = 1 - least.flops / max(whole.flops, 1)
    table = new_table(
        f"At most {params:.1%} of the params and {flops:.1%} of the FLOPs can be pruned",
        "Fractions of the whole model, each group pruned alone.",
        ("group",),
        ("units", "prunable", "params", "FLOPs"),
    )
    table.add_column("the rest is kept because", overflow="fold", style="dim")
    for room in rooms:
        units = str(room.width), str(room.width - room.least)
        table.add_row(Text(room.name), *units, f"{room.params:.1%}", f"{room.flops:.1%}", Text(room.why))
    return table


def pinned_table(structure: Structure) -> Table:
    """Return a table of the channels that cannot be pruned, with reasons."""
    caption = ""
    if structure.branching:
        modules = ", ".join(structure.branching)
        caption = f"Code that branches on values of its input, of which only the path taken was traced: {modules}."
    table = new_table("Channels that cannot be pruned", caption, ("tensor",), ("channels",))
    table.add_column("reason", overflow="fold")
    for pin in structure.pinned:
        table.add_row(Text(f"{pin.tensor}, dimension {pin.dim}"), f"{pin.count} of {pin.size}", Text(pin.reason))
    return table


def layer_costs(model: nn.Module, flops: FlopCount) -> dict[str, LayerCost]:
    """Return the cost of every layer with a weight matrix or kernel, by module path."""
    costs = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        width = weight.shape[0]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            width = weight.shape[-1]
        elif getattr(module, "transposed", False):
            width = weight.shape[1] * module.groups
        params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        costs[path] = LayerCost(int(width), params, flops.by_module.get(path, 0))
    return costs


def layer_table(before: Mapping[str, LayerCost], after: Mapping[str, LayerCost], title: str, counted: str) -> Table:
    """Return a table of every layer's width, parameters and multiply-adds before and after.

    Args:
        before: Costs of the dense model, by module path.
        after: Costs of the pruned model, by module path.
        title: Title of the table.
        counted: How FLOPs were counted, such as ``"by fvcore"``.
    """
    caption = f"FLOPs: multiply-adds of one call on the example inputs, {counted}."
    table = new_table(title, caption, ("layer",), ("width", "params", "FLOPs"))
    for path, was in before.items():
        now = after.get(path, was)
        cells = [_change(old, new) for old, new in zip(was, now, strict=True)]
        table.add_row(Text(path), *cells, style="dim" if was == now else None)
    return table


def weight_table(weights: Iterable[WeightCount]) -> Table:
    """Return a table of the prunable weights: entries, those kept, and their fraction."""
    weights = list(weights)
    size = sum(weight.size for weight in weights)
    kept = sum(weight.stays for weight in weights)
    title = f"Kept: {kept / max(size, 1):.1%} of {size:,} weights"
    table = new_table(title, "", ("weight",), ("entries", "kept", "fraction"))
    for weight in weights:
        fraction = weight.stays / max(weight.size, 1)
        table.add_row(Text(weight.name), f"{weight.size:,}", f"{weight.stays:,}", f"{fraction:.1%}")
    return table


def stored_table(report: SparseReport) -> Table:
    """Return a table of the tensors in a sparse file: form, entries and values stored, bytes before and after."""
    fraction = report.bytes_after / max(report.bytes_before, 1)
    title = f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after: {fraction:.1%}"
    table = new_table(title, "", ("tensor", "form"), ("entries", "values", "bytes before", "after"))
    for name, form, *numbers in report.tensors:
        table.add_row(Text(name), Text(form), *[f"{number:,}" for number in numbers])
    return table


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"
