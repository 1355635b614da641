"""Draws the history of a run: what was left and what validation said, over time and against cost; writes no file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.analysis.sensitivity_figure import import_matplotlib
from lightning_prune.reports.history import History
from lightning_prune.reports.summary import main_metric, shares, stages

__all__ = ["draw_run", "picture_of"]

_COLOURS = {
    "prune/flops_kept": "#d1495b",
    "prune/params_kept": "#2e6f95",
    "prune/latency_kept": "#6b4e9b",
    "prune/nonzero_kept": "#3a7d44",
}
_PREFERRED = ("prune/flops_kept", "prune/nonzero_kept")  # what a metric is drawn against
_NAMED = 60  # bars that have room for their names


def picture_of(history: History) -> bytes:
    """Return the picture as a PNG.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    file = io.BytesIO()
    draw_run(history).savefig(file, format="png", dpi=130)
    return file.getvalue()


def draw_run(history: History) -> Any:
    """Return a figure of what was left and of a metric over time, of both against each other, and of every layer.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    bars = [rows for rows in (_layers(history), _weights(history)) if rows]
    figure = matplotlib.figure.Figure(figsize=(10, 5 + 2.8 * len(bars)), layout="constrained")
    top, *below = figure.subfigures(1 + len(bars), 1, height_ratios=(5, *(2.8 for _ in bars)), squeeze=False)[:, 0]
    over_time, against = top.subfigures(1, 2, width_ratios=(3, 2))
    _draw_over_time(over_time, history)
    _draw_against(against, history)
    for part, (label, before, now) in zip(below, bars, strict=True):
        _draw_bars(part.subplots(), label, before, now)
    return figure


def _draw_over_time(figure: Any, history: History) -> None:
    metric = main_metric(history)
    upper, lower = figure.subplots(2, 1, sharex=True) if metric else (None, figure.subplots())
    steps = [moment.step for moment in history.moments]
    for key, name in reversed(shares(history).items()):
        left = [100 * moment.left.get(key, 1.0) for moment in history.moments]
        dashes = "--" if key == "prune/params_kept" else "-"  # which often runs where FLOPs do
        lower.step([0, *steps], [left[0], *left], dashes, where="post", color=_COLOURS[key], label=name)
    lower.set(xlabel="optimizer steps", ylabel="left, %", ylim=(0, 105))
    lower.xaxis.get_major_locator().set_params(integer=True)
    lower.legend(loc="lower left", fontsize=8, frameon=False)
    if upper is not None:
        seen = [(moment.step, moment.metrics[metric]) for moment in history.moments if metric in moment.metrics]
        upper.plot(*zip(*seen, strict=True), color="0.25", marker=".", markersize=4, linewidth=1)
        upper.set(ylabel=metric)
        cuts = [stage.step for stage in stages(history)[1:]]
        for axes in (upper, lower) if len(cuts) <= 40 else ():
            for step in cuts:
                axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    (upper or lower).set_title("over time" + (", lines mark cuts" if upper is not None else ""), fontsize=10)


def _draw_against(figure: Any, history: History) -> None:
    """Draw a metric against a cost: all validations small, the last before each cut large."""
    axes, metric = figure.subplots(), main_metric(history)
    key = next((key for key in _PREFERRED if key in shares(history)), None)
    if metric is None or key is None:
        axes.text(0.5, 0.5, "validation logged nothing", ha="center", va="center", color="0.5")
        axes.set_axis_off()
        return
    found = [stage for stage in stages(history) if key in stage.left]
    seen = [  # before the first cut they tell of learning
        m for m in history.moments if metric in m.metrics and key in m.left and m.left != found[0].left
    ]
    axes.scatter([100 * m.left[key] for m in seen], [m.metrics[metric] for m in seen], s=8, color="0.75", zorder=2)
    ends = [stage for stage in found if metric in stage.last]
    axes.plot(
        [100 * stage.left[key] for stage in ends], [stage.last[metric] for stage in ends],
        color=_COLOURS[key], marker="o", markersize=5, linewidth=1, zorder=3,
    )  # fmt: skip
    axes.set_xlim(103, min((100 * stage.left[key] for stage in found), default=100.0) - 3)  # ever less to the right
    axes.set(xlabel=f"{shares(history)[key]} left, %", ylabel=metric)
    axes.set_title("against cost: large, before each cut", fontsize=10)
    axes.grid(color="0.92", linewidth=0.6)


def _draw_bars(axes: Any, label: str, before: Mapping[str, float], now: Sequence[float]) -> None:
    """Draw for every layer what it was, light, and what it is."""
    places = range(len(before))
    axes.bar(places, before.values(), color="#d9dee3", width=0.85, label="before")
    axes.bar(places, now, color="#2e6f95", width=0.85, label="now")
    axes.set(ylabel=label, xlim=(-0.6, len(before) - 0.4))
    if len(before) <= _NAMED:
        axes.set_xticks(places, before, rotation=45 if len(before) <= 30 else 90, ha="right", fontsize=7)
    else:
        axes.set_xlabel("layers, from the first to the last")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def _layers(history: History) -> tuple[str, dict[str, float], list[float]] | None:
    if not history.layers:
        return None
    before = {path: float(change.before.width) for path, change in history.layers.items()}
    return "width", before, [float(change.now.width) for change in history.layers.values()]


def _weights(history: History) -> tuple[str, dict[str, float], list[float]] | None:
    if not history.weights:
        return None
    left = [100 * weight.stays / max(weight.size, 1) for weight in history.weights]
    return "weights left, %", {weight.name: 100.0 for weight in history.weights}, left
