"""Summaries of a run's history: stages between pruning steps, kept fractions, metrics to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_prune.reports.history import History
from lightning_prune.reports.metric_mode import mode_by_name
from lightning_prune.structure.skippable import is_inside, outermost_of

__all__ = [
    "Stage", "headline", "layer_strip", "main_metric", "metric_change", "shares", "shown_metrics", "stages", "staying",
]  # fmt: skip

_SHARES = {
    "prune/params_kept": "parameters",
    "prune/flops_kept": "FLOPs",
    "prune/latency_kept": "latency",
    "prune/nonzero_kept": "nonzero parameters",
}
_TARGETS = {"filters": "prunable filters", "params": "parameters", "flops": "FLOPs"}
_MOST_METRICS = 3


@dataclass(frozen=True)
class Stage:
    """The time between two pruning steps.

    Attributes:
        epoch: Epoch in which it began.
        step: Optimizer steps made until then.
        left: What was kept of the model, by logged name.
        first: Metrics of its first validation, right after the pruning step; empty if there was none.
        last: Metrics of its last validation, when the model had recovered.
    """

    epoch: int
    step: int
    left: Mapping[str, float]
    first: Mapping[str, float]
    last: Mapping[str, float]


def shares(history: History) -> dict[str, str]:
    """Return the kept fractions that the run logged: logged name -> what it is a fraction of."""
    return {key: name for key, name in _SHARES.items() if key in history.left}


def stages(history: History) -> list[Stage]:
    """Return the stages between pruning steps, with the metrics at their beginning and end."""
    found: list[Stage] = []
    for moment in history.moments:
        if not found or moment.left != found[-1].left:
            found.append(Stage(moment.epoch, moment.step, moment.left, moment.metrics, moment.metrics))
        else:
            stage = found[-1]
            first = stage.first or moment.metrics
            found[-1] = replace(stage, first=first, last=moment.metrics or stage.last)
    return found


def shown_metrics(history: History) -> list[str]:
    """Return the names of the metrics to show: the first that validation logged."""
    names: list[str] = []
    for moment in history.moments:
        names += [name for name in moment.metrics if name not in names]
    return names[:_MOST_METRICS]


def headline(history: History) -> list[str]:
    """Return what a run came to, one fact a line: asked and reached, the metric, the size of the weights."""
    lines = []
    for goal in history.goals:
        target = _TARGETS.get(goal.target, goal.target)
        lines.append(
            f"{goal.callback}: asked to prune {goal.asked:.1%} of the {target}, pruned {goal.reached:.1%} "
            f"({1 - goal.reached:.1%} kept)."
        )
    change = metric_of_dense_and_pruned(history)
    if change:
        lines.append(change)
    dense, now = history.weights_bytes
    if dense:
        lines.append(f"Size of the weights: {_in_bytes(dense)} dense, {_in_bytes(now)} now.{_sparse(history)}")
    return lines


def metric_of_dense_and_pruned(history: History) -> str:
    """Return the main metric before the first pruning step and at the end, in words; empty if none was logged."""
    name, found = main_metric(history), stages(history)
    if name is None:
        return ""
    values = [stage.last.get(name) for stage in found]
    if values[-1] is None and history.decisions and not history.decisions[-1].kept:
        # A guard rolled the last step back when training ended: the model is that of the stage before it again.
        values[-1] = next(
            (stage.last.get(name) for stage in reversed(found[:-1]) if stage.left == found[-1].left), None
        )
    if values[-1] is None:
        return ""
    if _is_whole(history):
        return f"{name}: {values[-1]:.4g}; nothing of the model is pruned."
    if len(found) < 2 or values[0] is None:
        return f"{name}: {values[-1]:.4g} pruned; the dense model was not validated in this run."
    sentence = f"{name}: {values[0]:.4g} dense, {values[-1]:.4g} pruned, difference {values[-1] - values[0]:+.4g}."
    if still_learning(history):
        sentence += " The dense model was still learning when pruning began."
    return sentence


def _is_whole(history: History) -> bool:
    """Return whether all of a model is left: before the first pruning step, or once every step was taken back."""
    kept = [history.left[name] for name in shares(history) if name != "prune/latency_kept"]  # it varies by itself
    return bool(kept) and min(kept) >= 1


def still_learning(history: History) -> bool:
    """Return whether the model was better after a pruning step than ever before: then its dense values say little."""
    name, (dense, *others) = main_metric(history), stages(history)
    if name is None or name not in dense.last:
        return False
    sign = 1 if mode_by_name(name) == "max" else -1
    return any(sign * stage.last[name] > sign * dense.last[name] for stage in others if name in stage.last)


def _sparse(history: History) -> str:
    """Return what holds for masks, which leave shapes as they are."""
    dense, now = history.weights_bytes
    return " Zeros take space until save_sparse leaves them out." if history.weights and dense == now else ""


def _in_bytes(count: int) -> str:
    """Return a number of bytes in units of 1,000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


def metric_change(first: float | None, last: float | None) -> str:
    """Return a metric before and after as text; empty if it was not logged."""
    if first is None or last is None:
        return ""
    return f"{first:.4g}" if first == last else f"{first:.4g} → {last:.4g}"


def main_metric(history: History) -> str | None:
    """Return the metric to draw: the first that is not a loss, else the first."""
    names = shown_metrics(history)
    for name in names:
        if "loss" not in name.lower():
            return name
    return names[0] if names else None


def layer_strip(history: History) -> str:
    """Return one sign for each layer that lies in no other: removed, removed in part, or kept."""
    signs = ""
    for path in outermost_of(history.depth):
        inside = [other for other in history.depth if is_inside(other, [path])]
        if history.depth[path]:
            signs += "□"
        elif any(history.depth[part] for part in inside):
            signs += "▣"
        else:
            signs += "■"
    return signs


def staying(history: History) -> dict[str, list[str]]:
    """Return, by reason, the tensors with channels that cannot be pruned, and the weights that cannot be masked."""
    found: dict[str, list[str]] = {}
    for pin in history.pinned:
        many = "" if pin.count == pin.size else f" ({pin.count} of {pin.size})"
        found.setdefault(pin.reason, []).append(f"{pin.tensor}{many}")
    for name, reason in history.dense.items():
        found.setdefault(reason, []).append(name)
    if history.branching:
        found["branches on its input: only the path that the example inputs took was traced"] = list(history.branching)
    return found
