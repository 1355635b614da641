"""Boils the history of a run down to what a reader wants to know first; knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lightning_prune.reports.history import History

__all__ = ["Stage", "Total", "main_metric", "metric_change", "shares", "shown_metrics", "stages", "staying", "totals"]

_SHARES = {
    "prune/params_kept": "parameters",
    "prune/flops_kept": "FLOPs",
    "prune/latency_kept": "latency",
    "prune/nonzero_kept": "nonzero parameters",
}
_MOST_METRICS = 3


class Total(NamedTuple):
    """A cost of the whole model: its name, what it was, what it is, and the share that is left."""

    name: str
    before: int
    now: int
    kept: float


@dataclass(frozen=True)
class Stage:
    """The time between two cuts.

    Attributes:
        epoch: When it began.
        step: Optimizer steps made until then.
        left: What was left of the model.
        first: What the first validation in it said, right after the cut; empty if there was none.
        last: What the last one said, when the model had recovered.
    """

    epoch: int
    step: int
    left: Mapping[str, float]
    first: Mapping[str, float]
    last: Mapping[str, float]


def shares(history: History) -> dict[str, str]:
    """Return the shares that the run logged of what is left, as name in the log -> what it is of."""
    return {key: name for key, name in _SHARES.items() if key in history.left}


def totals(history: History) -> list[Total]:
    """Return what the whole model cost and costs, as far as it can be counted.

    Examples:
        >>> history = History()
        >>> history.note_left(0, 0, {"prune/flops": 50.0, "prune/flops_kept": 0.5})
        >>> totals(history)
        [Total(name='FLOPs', before=100, now=50, kept=0.5)]
    """
    found, left = [], history.left
    for key, name in shares(history).items():
        now, kept = left.get(key.removesuffix("_kept")), left[key]
        if now is not None:
            found.append(Total(name, round(now / kept) if kept else 0, round(now), kept))
    return found


def stages(history: History) -> list[Stage]:
    """Return the times between cuts, with what validation said at their beginning and end."""
    found: list[Stage] = []
    for moment in history.moments:
        if not found or moment.left != found[-1].left:
            found.append(Stage(moment.epoch, moment.step, moment.left, moment.metrics, moment.metrics))
        else:
            last = found[-1]
            found[-1] = Stage(
                last.epoch, last.step, last.left, last.first or moment.metrics, moment.metrics or last.last
            )
    return found


def shown_metrics(history: History) -> list[str]:
    """Return the names of the metrics that have room in a table: those that validation logged first."""
    names = dict.fromkeys(name for moment in history.moments for name in moment.metrics)
    return list(names)[:_MOST_METRICS]


def metric_change(first: float | None, last: float | None) -> str:
    """Return what a metric was and became, or nothing where it was not logged."""
    if first is None or last is None:
        return ""
    return f"{first:.4g}" if first == last else f"{first:.4g} → {last:.4g}"


def main_metric(history: History) -> str | None:
    """Return the metric that a picture shows: the first that is not a loss, else the first."""
    names = shown_metrics(history)
    return next((name for name in names if "loss" not in name.lower()), next(iter(names), None))


def staying(history: History) -> dict[str, list[str]]:
    """Return, by reason, the tensors whose channels stay, how many of them do, and the weights that stay dense."""
    found: dict[str, list[str]] = {}
    for pin in history.pinned:
        many = "" if pin.count == pin.size else f" ({pin.count} of {pin.size})"
        found.setdefault(pin.reason, []).append(f"{pin.tensor}{many}")
    for name, reason in history.dense.items():
        found.setdefault(reason, []).append(name)
    if history.branching:
        found["stays right for the path that the example inputs took; no other was seen"] = list(history.branching)
    return found
