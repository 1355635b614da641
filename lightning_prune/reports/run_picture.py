"""The picture of a pruning run: kept fractions and metrics over time, metrics against cost, and layer widths."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_prune.analysis.sensitivity_figure import import_matplotlib, literal
from lightning_prune.reports.history import History, Moment
from lightning_prune.reports.run_summary import headline, main_metric, shares, stages, still_learning

__all__ = ["Picture", "draw_run", "picture_of"]

_COLOURS = {
    "prune/flops_kept": "#d1495b",
    "prune/params_kept": "#2e6f95",
    "prune/latency_kept": "#6b4e9b",
    "prune/nonzero_kept": "#3a7d44",
}
_PREFERRED = ("prune/flops_kept", "prune/nonzero_kept")  # costs to draw a metric against
_METRIC = "metric over time"  # marks the line whose points the page explains
_NAMED = 60  # more bars have no room for names
_MOST_LINES = 40  # more pruning steps are not marked


class Picture(NamedTuple):
    """A PNG, and the values behind its points.

    Attributes:
        png: The file.
        points: For every validation, how far from the left and from the top its point is (fractions of the
            picture), and its values in words.
    """

    png: bytes
    points: list[tuple[float, float, str]]


def picture_of(history: History) -> Picture:
    """Return the picture, and where the points of its metric are.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    file, figure = io.BytesIO(), draw_run(history)
    figure.savefig(file, format="png", dpi=130)
    lines = figure.findobj(lambda artist: artist.get_gid() == _METRIC)
    if not lines:
        return Picture(file.getvalue(), [])
    width, height = figure.bbox.size
    places = lines[0].axes.transData.transform(lines[0].get_xydata())
    points = [
        (float(x / width), 1 - float(y / height), _in_words(history, moment))
        for (x, y), moment in zip(places, _validations(history), strict=True)
    ]
    return Picture(file.getvalue(), points)


def _validations(history: History) -> list[Moment]:
    """Return the moments at which the metric of the picture was measured."""
    metric = main_metric(history)
    return [moment for moment in history.moments if metric in moment.metrics]


def _in_words(history: History, moment: Moment) -> str:
    """Return the metrics of a validation, and what was kept of the model then."""
    metrics = [f"{name} {value:.4g}" for name, value in moment.metrics.items()]
    kept = [f"{moment.left[key]:.1%} of the {name}" for key, name in shares(history).items() if key in moment.left]
    return f"epoch {moment.epoch}, step {moment.step}: {', '.join(metrics)}; kept: {', '.join(kept)}"


def draw_run(history: History) -> Any:
    """Return a figure: kept fractions and a metric over time, both against each other, and every layer.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    bars = [rows for rows in (_layers(history), _weights(history)) if rows]
    figure = matplotlib.figure.Figure(figsize=(10, 5 + 2.8 * len(bars)), layout="constrained")
    if history.goals:
        lines = [literal(line) for line in headline(history)[: len(history.goals)]]
        figure.suptitle("\n".join(lines), fontsize=10)
    heights = [5.0] + [2.8] * len(bars)
    top, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    over_time, against = top.subfigures(1, 2, width_ratios=(3, 2))
    _draw_over_time(over_time, history)
    _draw_against(against, history)
    for part, (label, before, now) in zip(below, bars, strict=True):
        _draw_bars(part.subplots(), label, before, now)
    return figure


def _draw_over_time(figure: Any, history: History) -> None:
    metric = main_metric(history)
    if metric is None:
        lower = figure.subplots()
        lower.set_title("over time", fontsize=10)
        _draw_kept(lower, history)
        return
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set_title("over time (vertical lines: pruning steps)", fontsize=10)
    _draw_kept(lower, history)
    seen = _validations(history)
    steps, values = [moment.step for moment in seen], [moment.metrics[metric] for moment in seen]
    upper.plot(steps, values, color="0.25", marker=".", markersize=4, linewidth=1, gid=_METRIC)
    upper.set(ylabel=literal(metric))
    _draw_decisions(upper, history, dict(zip(steps, values, strict=True)))
    pruned = [stage.step for stage in stages(history)[1:]]
    if len(pruned) <= _MOST_LINES:
        for step in pruned:
            upper.axvline(step, color="0.85", linewidth=0.8, zorder=0)
            lower.axvline(step, color="0.85", linewidth=0.8, zorder=0)


def _draw_decisions(axes: Any, history: History, values: Mapping[int, float]) -> None:
    """Mark on the curve where a guard kept a pruning step, and where it rolled one back."""
    for kept, marker, colour, label in ((True, "^", "#3a7d44", "step kept"), (False, "x", "#d1495b", "rolled back")):
        steps = [decision.step for decision in history.decisions if decision.kept == kept and decision.step in values]
        if steps:
            heights = [values[step] for step in steps]
            axes.plot(steps, heights, marker, color=colour, markersize=7, label=f"guard: {label}")
            axes.legend(loc="best", fontsize=8, frameon=False)


def _draw_kept(axes: Any, history: History) -> None:
    """Draw the kept fractions as steps over time."""
    steps = [moment.step for moment in history.moments]
    for key, name in reversed(shares(history).items()):
        kept = [100 * moment.left.get(key, 1.0) for moment in history.moments]
        dashes = "--" if key == "prune/params_kept" else "-"  # parameters often coincide with FLOPs
        axes.step([0, *steps], [kept[0], *kept], dashes, where="post", color=_COLOURS[key], label=name)
    axes.set(xlabel="optimizer steps", ylabel="kept, %", ylim=(0, 105))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower left", fontsize=8, frameon=False)


def _draw_against(figure: Any, history: History) -> None:
    """Draw a metric against a cost: all validations small, the last before each pruning step large."""
    axes, metric = figure.subplots(), main_metric(history)
    costs = [key for key in _PREFERRED if key in shares(history)]
    if metric is None or not costs:
        axes.text(0.5, 0.5, "validation logged no metrics", ha="center", va="center", color="0.5")
        axes.set_axis_off()
        return
    cost = costs[0]
    found = [stage for stage in stages(history) if cost in stage.left]
    kept, values = [], []
    for moment in history.moments:
        # Validations before the first pruning step show learning, not the effect of pruning.
        if metric in moment.metrics and cost in moment.left and moment.left != found[0].left:
            kept.append(100 * moment.left[cost])
            values.append(moment.metrics[metric])
    axes.scatter(kept, values, s=8, color="0.75", zorder=2)
    ends = [stage for stage in found if metric in stage.last]
    if ends and ends[0] is found[0] and still_learning(history):
        # A network that is still learning says little about what pruning costs: the curve begins after it.
        dense = ends.pop(0)
        label = "dense, still learning"
        axes.plot([100 * dense.left[cost]], [dense.last[metric]], "o", markerfacecolor="none", color="0.5", label=label)
        axes.legend(loc="best", fontsize=8, frameon=False)
    kept = [100 * stage.left[cost] for stage in ends]
    values = [stage.last[metric] for stage in ends]
    axes.plot(kept, values, color=_COLOURS[cost], marker="o", markersize=5, linewidth=1, zorder=3)
    least = min((100 * stage.left[cost] for stage in found), default=100.0)
    axes.set_xlim(103, least - 3)  # cost falls from left to right
    axes.set(xlabel=f"{shares(history)[cost]} kept, %", ylabel=literal(metric))
    axes.set_title("against cost (large: before a pruning step)", fontsize=10)
    axes.grid(color="0.92", linewidth=0.6)


def _draw_bars(axes: Any, label: str, before: Mapping[str, float], now: Sequence[float]) -> None:
    """Draw a bar for every layer: before in light, now in dark."""
    places = range(len(before))
    axes.bar(places, before.values(), color="#d9dee3", width=0.85, label="before")
    axes.bar(places, now, color="#2e6f95", width=0.85, label="now")
    axes.set(ylabel=label, xlim=(-0.6, len(before) - 0.4))
    if len(before) <= _NAMED:
        names = [literal(name) for name in before]
        axes.set_xticks(places, names, rotation=45 if len(before) <= 30 else 90, ha="right", fontsize=7)
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
    return "weights kept, %", {weight.name: 100.0 for weight in history.weights}, left
