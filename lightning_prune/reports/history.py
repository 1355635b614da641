"""The history of a pruning run as plain data: pruning steps, validations and layer costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_prune.measure.flops import BY_FVCORE
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.weights import WeightCount
from lightning_prune.reports.model_tables import LayerCost
from lightning_prune.structure import Pinned

__all__ = ["Decision", "Goal", "History", "LayerChange", "Moment"]


class LayerChange(NamedTuple):
    """The cost of a layer when pruning began, and now."""

    before: LayerCost
    now: LayerCost


class Goal(NamedTuple):
    """What a callback was asked to prune, and what it reached.

    Attributes:
        callback: Name of its class.
        target: What both are fractions of: ``filters``, ``params``, ``flops``, ``latency`` or ``weights``.
        asked: Fraction of the target to prune, of the dense model.
        reached: Fraction that was pruned.
    """

    callback: str
    target: str
    asked: float
    reached: float


class Decision(NamedTuple):
    """What a guard decided about a pruning step: when, whether the step was kept, and why."""

    epoch: int
    step: int
    kept: bool
    why: str


@dataclass(frozen=True)
class Moment:
    """A pruning step, or a validation.

    Attributes:
        epoch: Epoch, counted from 0.
        step: Optimizer steps made until then.
        left: What was kept of the model, by logged name: ``prune/flops_kept``, ...
        metrics: Metrics that validation logged; empty for a pruning step.
    """

    epoch: int
    step: int
    left: dict[str, float]
    metrics: dict[str, float]


@dataclass
class History:
    """The history of a run, written by its pruning callbacks and saved in checkpoints and a JSON file.

    Attributes:
        model: Name of the module's class.
        callbacks: The calls that make the pruning callbacks.
        measured: Where FLOPs and latency were measured: device, threads and shapes of the inputs.
        moments: Pruning steps and validations in order.
        layers: Path of a layer -> its width and cost when pruning began, and now; of structured pruning.
        weights: Name, size and kept entries of every prunable weight; of weight pruning.
        pinned: Channels that cannot be pruned, and why.
        dense: Name of a weight that could not be masked -> why.
        branching: Modules whose code branches on values of its input; only the path taken was traced.
        counted: How FLOPs were counted.
        goals: What each callback was asked to prune, and what it reached.
        decisions: What guards decided, in order.
        weights_bytes: Bytes of all parameters and buffers: of the dense model, and now.
        facts: When, how long and with which versions and seed it ran: name -> value. Equal histories may differ in it.
        stopped: What stopped the training before its end, and when; empty if nothing did.
    """

    model: str = ""
    callbacks: list[str] = field(default_factory=list)
    measured: str = ""
    moments: list[Moment] = field(default_factory=list)
    layers: dict[str, LayerChange] = field(default_factory=dict)
    weights: list[WeightCount] = field(default_factory=list)
    pinned: list[Pinned] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    branching: list[str] = field(default_factory=list)
    stopped: str = ""
    counted: str = BY_FVCORE
    goals: list[Goal] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    weights_bytes: tuple[int, int] = (0, 0)
    facts: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def left(self) -> dict[str, float]:
        """What is kept of the model now, by logged name."""
        return self.moments[-1].left if self.moments else {}

    def note_left(self, epoch: int, step: int, left: Mapping[str, float]) -> None:
        """Record what is kept, if that has changed; steps that start anew clear the history of the earlier run."""
        if self.moments and step < self.moments[-1].step:
            self.moments.clear()
            self.decisions.clear()
        if self.left != left:
            self.moments.append(Moment(epoch, step, dict(left), {}))

    def note_metrics(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a validation."""
        self.moments.append(Moment(epoch, step, self.left, dict(metrics)))

    def note_bytes(self, count: int) -> None:
        """Record the bytes of all parameters and buffers; those of the dense model are the first."""
        self.weights_bytes = (self.weights_bytes[0] or count, count)

    def to_plain(self) -> dict[str, Any]:
        """Return the history as dicts, lists, strings and numbers, for checkpoints and JSON."""
        plain = asdict(self)
        plain["layers"] = {path: [*map(list, change)] for path, change in self.layers.items()}
        plain["weights"] = [*map(list, self.weights)]
        plain["goals"] = [*map(list, self.goals)]
        plain["decisions"] = [*map(list, self.decisions)]
        plain["weights_bytes"] = list(self.weights_bytes)
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> History:
        """Return the history from the result of :meth:`to_plain`."""
        layers = {}
        for path, (before, now) in plain["layers"].items():
            layers[path] = LayerChange(LayerCost(*before), LayerCost(*now))
        return cls(
            model=plain["model"],
            callbacks=list(plain["callbacks"]),
            measured=plain["measured"],
            moments=[Moment(**moment) for moment in plain["moments"]],
            layers=layers,
            weights=[WeightCount(*weight) for weight in plain["weights"]],
            pinned=[Pinned(**pin) for pin in plain["pinned"]],
            dense=dict(plain["dense"]),
            branching=list(plain["branching"]),
            stopped=plain["stopped"],
            counted=plain["counted"],
            goals=[Goal(*goal) for goal in plain["goals"]],
            decisions=[Decision(*decision) for decision in plain["decisions"]],
            weights_bytes=(plain["weights_bytes"][0], plain["weights_bytes"][1]),
            facts=dict(plain["facts"]),
        )

    def to_json(self, path: str | Path) -> None:
        """Write the history to a file; its folder is created if needed."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_text(), encoding="utf-8")

    def to_text(self) -> str:
        """Return the history as JSON."""
        return json.dumps(_finite(self.to_plain()), indent=1) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> History:
        """Read a file written by :meth:`to_json`.

        Raises:
            PruningError: If the file holds no such history.
        """
        try:
            return cls.from_plain(json.loads(Path(path).read_text()))
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise PruningError(f"{path} holds no history of a pruning ({error!r}).") from error


def _finite(value: Any) -> Any:
    """Return nested dicts and lists without NaN and infinity, which JSON cannot represent."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if not isinstance(value, dict):
        return value
    finite = {}
    for key, item in value.items():
        if not isinstance(item, float) or math.isfinite(item):
            finite[key] = _finite(item)
    return finite
