"""Shows, layer by layer, how wide and how costly a model was and is; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table
from torch import nn

from lightning_prune.measure.flops import FlopCount

__all__ = ["LayerCost", "count_change", "layer_costs", "layer_table"]


class LayerCost(NamedTuple):
    """One layer: output channels, parameters of its own, multiply-adds."""

    width: int
    params: int
    flops: int


def layer_costs(model: nn.Module, flops: FlopCount) -> dict[str, LayerCost]:
    """Return the cost of every layer whose weight makes channels, by module path."""
    costs = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() >= 2:
            transposed = getattr(module, "transposed", False)
            width = weight.shape[1] * module.groups if transposed else weight.shape[-1 if _looks_up(module) else 0]
            params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            costs[path] = LayerCost(int(width), params, flops.by_module.get(path, 0))
    return costs


def layer_table(before: Mapping[str, LayerCost], after: Mapping[str, LayerCost], title: str, counted: str) -> Table:
    """Set every layer's width, parameters and multiply-adds before beside those after; ``counted`` by what."""
    table = Table(title=title, caption=f"FLOPs: multiply-adds of one call on the example inputs, {counted}.")
    table.add_column("layer", overflow="fold")
    for heading in ("width", "params", "FLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for path, was in before.items():
        now = after.get(path, was)
        cells = (count_change(a, b) for a, b in zip(was, now, strict=True))
        table.add_row(path, *cells, style=None if was != now else "dim")
    return table


def count_change(before: int, after: int) -> str:
    """Return what a number was and became."""
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)
