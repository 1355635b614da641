"""Shows, weight by weight, how many entries there are and how many of them are left; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from lightning_prune.pruning.weights import WeightCount

__all__ = ["weight_table"]


def weight_table(weights: Iterable[WeightCount]) -> Table:
    """List every weight that could be pruned: its size, what stays of it, and the share that is."""
    weights = list(weights)
    size, stays = sum(weight.size for weight in weights), sum(weight.stays for weight in weights)
    table = Table(title=f"Left: {stays / max(size, 1):.1%} of {size:,} weights")
    table.add_column("weight", overflow="fold")
    for heading in ("entries", "left", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for weight in weights:
        table.add_row(weight.name, f"{weight.size:,}", f"{weight.stays:,}", f"{weight.stays / max(weight.size, 1):.1%}")
    return table
