"""Tables of a pruning run: layers, weights, pruning steps and what could not be pruned."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lightning_prune.reports.history import History
from lightning_prune.reports.model_tables import layer_table, new_table, weight_table
from lightning_prune.reports.run_summary import (
    Stage,
    layer_strip,
    metric_change,
    shares,
    shown_metrics,
    stages,
    staying,
)

__all__ = ["latex_row", "run_tables", "stages_as_csv", "stages_as_latex"]

_ROWS = 12
_NAMES = 4


def run_tables(history: History, whole: bool = False) -> list[Table]:
    """Return tables of the layers, the weights, the pruning steps and what could not be pruned.

    Args:
        history: The history of the run.
        whole: Whether to list all pruning steps and names, instead of as many as fit into a terminal.
    """
    tables = []
    if history.layers:
        before = {path: change.before for path, change in history.layers.items()}
        now = {path: change.now for path, change in history.layers.items()}
        tables.append(layer_table(before, now, _title(history), history.counted))
    if history.depth:
        tables.append(_depth_table(history))
    if history.weights:
        tables.append(weight_table(history.weights))
    found = stages(history)
    if len(found) > 1:
        tables.append(_stage_table(history, found, len(found) if whole else _ROWS))
    if history.decisions:
        tables.append(_decision_table(history))
    if staying(history):
        tables.append(_staying_table(history, len(history.pinned) + len(history.dense) if whole else _NAMES))
    return tables


def stages_as_csv(history: History) -> str:
    """Return the stages between pruning steps as CSV: what was kept, and the metrics at the end of each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows(_stage_rows(history))
    return file.getvalue()


def stages_as_latex(history: History) -> str:
    """Return the same as a LaTeX table, which needs the package ``booktabs``."""
    heading, *rows = _stage_rows(history)
    lines = [rf"\begin{{tabular}}{{{'r' * len(heading)}}}", r"\toprule", latex_row(heading), r"\midrule"]
    lines += [latex_row(row) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _stage_rows(history: History) -> list[list[str]]:
    """Return a heading and a row for every stage."""
    kept, metrics = shares(history), shown_metrics(history)
    rows = [["epoch", "step", *[f"{name} kept" for name in kept.values()], *metrics]]
    for stage in stages(history):
        left = [f"{stage.left[key]:.4f}" if key in stage.left else "" for key in kept]
        last = [f"{stage.last[name]:.6g}" if name in stage.last else "" for name in metrics]
        rows.append([str(stage.epoch), str(stage.step), *left, *last])
    return rows


def latex_row(cells: Sequence[str]) -> str:
    """Return a row of a LaTeX table."""
    escaped = []
    for cell in cells:
        plain = cell.replace("\\", r"\textbackslash ")
        escaped.append(re.sub(r"([&%$#_{}])", r"\\\1", plain))
    return " & ".join(escaped) + r" \\"


def _title(history: History) -> str:
    kept = history.left
    title = f"Kept: {kept['prune/params_kept']:.1%} of params, {kept['prune/flops_kept']:.1%} of FLOPs"
    if "prune/latency_kept" in kept:
        title += f", {kept['prune/latency_kept']:.1%} of the latency {history.measured}"
    return title


def _stage_table(history: History, found: Sequence[Stage], most: int) -> Table:
    """Return a table of the stages between pruning steps; of many, some evenly spaced."""
    kept, metrics = shares(history), shown_metrics(history)
    rows = _spread(found, most)
    caption = "Metrics: right after the pruning step → just before the next one."
    if len(rows) < len(found):
        caption += f" {len(rows)} of {len(found)} are shown."
    if history.stopped:
        caption += f" Stopped by {history.stopped}."
    headings = ["epoch", "step", *[f"{name} kept" for name in kept.values()], *metrics]
    table = new_table("Pruning steps", caption, (), headings)
    for stage in rows:
        left = [f"{stage.left[key]:.1%}" if key in stage.left else "" for key in kept]
        changes = [metric_change(stage.first.get(name), stage.last.get(name)) for name in metrics]
        table.add_row(str(stage.epoch), str(stage.step), *left, *changes)
    return table


def _depth_table(history: History) -> Table:
    """Return a table of the layers that were removed, under it a strip of all that could be."""
    strip = layer_strip(history)
    table = new_table("Removed layers", f"{strip}  (□ removed, ▣ in part, ■ kept)", ("layer", "removed in"), ())
    for path, when in history.depth.items():
        if when:
            table.add_row(Text(path), Text(when))
    return table


def _decision_table(history: History) -> Table:
    table = new_table("Decisions of MetricGuard", "", (), ("epoch", "step"))
    table.add_column("pruning step")
    table.add_column("because", overflow="fold")
    for decision in history.decisions:
        done = "kept" if decision.kept else "rolled back"
        table.add_row(str(decision.epoch), str(decision.step), done, Text(decision.why))
    return table


def _staying_table(history: History, most: int) -> Table:
    table = new_table("Not prunable", "", ("tensor", "reason"), ())
    for reason, names in staying(history).items():
        shown = ", ".join(names[:most])
        if len(names) > most:
            shown += f", and {len(names) - most} more"
        table.add_row(Text(shown), Text(reason))
    return table


def _spread(items: Sequence[Stage], most: int) -> list[Stage]:
    """Return at most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
