"""Compares finished runs: what each kept, its metric, and which are on the Pareto front."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_prune.analysis.sensitivity_figure import import_matplotlib, literal
from lightning_prune.model.errors import PruningError
from lightning_prune.reports.history import History
from lightning_prune.reports.metric_mode import mode_by_name
from lightning_prune.reports.model_tables import new_table
from lightning_prune.reports.run_summary import main_metric, shares, stages
from lightning_prune.reports.run_tables import latex_row

__all__ = ["Comparison", "compare_runs", "comparison_table", "draw_comparison", "write_comparison"]

_COSTS = ("prune/flops_kept", "prune/nonzero_kept", "prune/params_kept")  # the first that all runs logged is drawn


@dataclass(frozen=True)
class RunResult:
    """What one run came to.

    Attributes:
        name: Name of the run.
        kept: Fractions that are kept, by what they are fractions of.
        dense: The metric before the first pruning step, or None if it was not validated.
        pruned: The metric at the end.
        on_front: Whether no other run keeps less and is better.
    """

    name: str
    kept: dict[str, float]
    dense: float | None
    pruned: float
    on_front: bool = False


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        metric: Name of the metric.
        cost: What the front is drawn against, such as ``FLOPs``.
        runs: One result for each run, by cost.
    """

    metric: str
    cost: str
    runs: tuple[RunResult, ...]


def compare_runs(histories: Mapping[str, History], metric: str | None = None) -> Comparison:
    """Return what runs came to, by cost, the Pareto front marked.

    Args:
        histories: Name of a run -> its history.
        metric: Name of a metric that validation logged; by default the first run's main metric.

    Raises:
        PruningError: If a run did not log the metric, or the runs have no cost in common.
    """
    first = next(iter(histories.values()))
    metric = metric or main_metric(first)
    costs = [key for key in _COSTS if all(key in shares(history) for history in histories.values())]
    if metric is None or not costs:
        raise PruningError("The runs cannot be compared: validation logged no metric, or they share no cost.")
    found = []
    for name, history in histories.items():
        parts = stages(history)
        if metric not in parts[-1].last:
            raise PruningError(f"{name} logged no {metric} after its last pruning step. Name another by --metric.")
        kept = {text: history.left[key] for key, text in shares(history).items()}
        dense = parts[0].last.get(metric) if len(parts) > 1 else None
        found.append(RunResult(name, kept, dense, parts[-1].last[metric]))
    cost = shares(first)[costs[0]]
    return Comparison(metric, cost, tuple(_with_front(found, cost, mode_by_name(metric))))


def _with_front(runs: Sequence[RunResult], cost: str, mode: str) -> list[RunResult]:
    """Return the runs by cost; those that no cheaper or equally cheap run reaches are on the front."""
    sign = 1 if mode == "max" else -1
    ordered = sorted(runs, key=lambda run: (run.kept[cost], -sign * run.pruned))
    found, best = [], -float("inf")
    for run in ordered:
        better = sign * run.pruned > best
        best = max(best, sign * run.pruned)
        found.append(replace(run, on_front=better))
    return found


def comparison_table(compared: Comparison) -> Table:
    """Return a table of the runs; a star marks the Pareto front."""
    headings, rows = _rows(compared)
    caption = f"★: no run that keeps as few {compared.cost} or fewer is better."
    table = new_table(f"{len(rows)} runs", caption, headings[:1], headings[1:])
    for name, *cells in rows:
        table.add_row(Text(name), *cells[:-1], "★" if cells[-1] else "")
    return table


def write_comparison(compared: Comparison, folder: Path) -> list[Path]:
    """Write the table as CSV and LaTeX, and the picture where matplotlib is installed; return the paths."""
    headings, rows = _rows(compared)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([headings, *rows])
    columns = "l" + "r" * (len(headings) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", latex_row(headings), r"\hline"]
    for *cells, front in rows:
        lines.append(latex_row([*cells, "*" if front else ""]))
    lines += [r"\hline", r"\end{tabular}"]
    contents = {"runs.csv": file.getvalue().encode(), "runs.tex": ("\n".join(lines) + "\n").encode()}
    try:
        picture = io.BytesIO()
        draw_comparison(compared).savefig(picture, format="png", dpi=130)
        contents["runs.png"] = picture.getvalue()
    except ModuleNotFoundError:  # matplotlib is optional
        pass
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def draw_comparison(compared: Comparison) -> Any:
    """Return a figure: the metric of every run against its cost, the Pareto front as a line.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = import_matplotlib().figure.Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for run in compared.runs:
        place = 100 * run.kept[compared.cost], run.pruned
        axes.plot(*place, "o", color="#d1495b" if run.on_front else "0.6", markersize=5)
        axes.annotate(literal(run.name), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    front = [run for run in compared.runs if run.on_front]
    kept = [100 * run.kept[compared.cost] for run in front]
    axes.plot(kept, [run.pruned for run in front], color="#d1495b", linewidth=1, label="Pareto front")
    known = [run.dense for run in compared.runs if run.dense is not None]
    if known:
        axes.axhline(sum(known) / len(known), color="0.5", linestyle=":", linewidth=1, label="dense, mean of the runs")
    axes.set(xlabel=f"{compared.cost} kept, %", ylabel=literal(compared.metric))
    axes.grid(color="0.92", linewidth=0.6)
    axes.legend(loc="best", fontsize=8, frameon=False)
    return figure


def _rows(compared: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells; the last cell of a row is empty or ``front``."""
    costs = list(dict.fromkeys(name for run in compared.runs for name in run.kept))
    headings = ["run", *[f"{name} kept" for name in costs], f"{compared.metric} dense", "pruned", "front"]
    rows = []
    for run in compared.runs:
        kept = [f"{run.kept[name]:.4f}" if name in run.kept else "" for name in costs]
        dense = "" if run.dense is None else f"{run.dense:.6g}"
        rows.append([run.name, *kept, dense, f"{run.pruned:.6g}", "front" if run.on_front else ""])
    return headings, rows
