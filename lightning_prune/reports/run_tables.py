"""Shows the history of a run as tables for a terminal; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lightning_prune.reports.history import History
from lightning_prune.reports.layer_table import layer_table
from lightning_prune.reports.summary import Stage, metric_change, shares, shown_metrics, stages, staying
from lightning_prune.reports.weight_table import weight_table

__all__ = ["run_tables"]

_ROWS = 12
_NAMES = 4


def run_tables(history: History) -> list[Table]:
    """Return tables of the layers, of the weights, of what each stage cost and gave, and of what stays."""
    tables = []
    if history.layers:
        before, now = ({path: change[which] for path, change in history.layers.items()} for which in (0, 1))
        tables.append(layer_table(before, now, _title(history), history.counted))
    if history.weights:
        tables.append(weight_table(history.weights))
    found = stages(history)
    if len(found) > 1:
        tables.append(_stage_table(history, found))
    if staying(history):
        tables.append(_staying_table(history))
    return tables


def _title(history: History) -> str:
    left = history.left
    title = f"Left: {left['prune/params_kept']:.1%} of params, {left['prune/flops_kept']:.1%} of FLOPs"
    if "prune/latency_kept" in left:
        title += f", {left['prune/latency_kept']:.1%} of the latency {history.measured}"
    return title


def _stage_table(history: History, found: Sequence[Stage]) -> Table:
    """List the times between cuts; of many, some evenly apart."""
    kept, metrics = shares(history), shown_metrics(history)
    rows = _spread(found, _ROWS)
    more = "" if len(rows) == len(found) else f" {len(rows)} of {len(found)} are shown."
    stopped = f" Stopped by {history.stopped}." if history.stopped else ""
    caption = f"Metrics: right after the cut → before the next one.{more}{stopped}"
    table = Table(title="From cut to cut", caption=caption)
    for heading in ("epoch", "step", *kept.values(), *metrics):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in rows:
        left = [f"{stage.left[key]:.1%}" if key in stage.left else "" for key in kept]
        changes = [metric_change(stage.first.get(name), stage.last.get(name)) for name in metrics]
        table.add_row(str(stage.epoch), str(stage.step), *left, *changes)
    return table


def _staying_table(history: History) -> Table:
    table = Table(title="What stays")
    table.add_column("of", overflow="fold")
    table.add_column("because", overflow="fold")
    for reason, names in staying(history).items():
        more = f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        table.add_row(", ".join(names[:_NAMES]) + more, reason)
    return table


def _spread(items: Sequence[Stage], most: int) -> list[Stage]:
    """Return so many of the items, evenly apart, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
