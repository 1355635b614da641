"""What is remembered of a run's pruning, as plain data: what left when, and what validation said; draws nothing."""

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
from lightning_prune.reports.layer_table import LayerCost
from lightning_prune.structure import Pinned

__all__ = ["History", "LayerChange", "Moment"]


class LayerChange(NamedTuple):
    """What a layer cost when pruning began, and what it costs now."""

    before: LayerCost
    now: LayerCost


@dataclass(frozen=True)
class Moment:
    """A cut, or a validation.

    Attributes:
        epoch: Counted from 0.
        step: Optimizer steps made until then.
        left: What was left of the model, by the names under which it is logged: ``prune/flops_kept``, ...
        metrics: What validation logged; empty where the moment is a cut.
    """

    epoch: int
    step: int
    left: dict[str, float]
    metrics: dict[str, float]


@dataclass
class History:
    """The history of a run: its pruning callbacks write it, reports show it, checkpoints and a JSON file keep it.

    Attributes:
        model: Name of the module's class.
        callbacks: The calls that make the pruning callbacks.
        measured: What FLOPs and latency are of: device, threads and shapes of the inputs.
        moments: Cuts and validations in the order they came.
        layers: Path of a layer -> its width and cost when pruning began, and now; where units leave.
        weights: Name, size and what stays of every weight that could be masked; where weights become zero.
        pinned: Channels that stay, and why.
        dense: Name of a weight that could not be masked -> why.
        branching: Modules whose code goes by numbers of its input, so that only the path taken was seen.
        counted: By what the FLOPs are counted.
        stopped: What stopped the training before its end, and when; empty where nothing did.
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

    @property
    def left(self) -> dict[str, float]:
        """What is left of the model now, by the names under which it is logged."""
        return self.moments[-1].left if self.moments else {}

    def note_left(self, epoch: int, step: int, left: Mapping[str, float]) -> None:
        """Note what is left, if that has changed; a training that counts from the start is another one's history."""
        if self.moments and step < self.moments[-1].step:
            self.moments.clear()
        if self.left != left:
            self.moments.append(Moment(epoch, step, dict(left), {}))

    def note_metrics(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Note what a validation said of the model as it stands."""
        self.moments.append(Moment(epoch, step, self.left, dict(metrics)))

    def to_plain(self) -> dict[str, Any]:
        """Return the same as dicts, lists, strings and numbers, which checkpoints and JSON can hold."""
        return {
            **asdict(self),
            "layers": {path: [list(cost) for cost in change] for path, change in self.layers.items()},
            "weights": [list(weight) for weight in self.weights],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> History:
        """Return the history that :meth:`to_plain` made plain."""
        return cls(
            plain["model"],
            list(plain["callbacks"]),
            plain["measured"],
            [Moment(**moment) for moment in plain["moments"]],
            {path: LayerChange(*(LayerCost(*cost) for cost in change)) for path, change in plain["layers"].items()},
            [WeightCount(*weight) for weight in plain["weights"]],
            [Pinned(**pin) for pin in plain["pinned"]],
            dict(plain["dense"]),
            list(plain.get("branching", ())),  # histories written before this was noted
            plain.get("stopped", ""),  # likewise
            plain.get("counted", BY_FVCORE),  # likewise
        )

    def to_json(self, path: str | Path) -> None:
        """Write the history to a file; its folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_finite(self.to_plain()), indent=1) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> History:
        """Read what :meth:`to_json` wrote.

        Raises:
            PruningError: If the file holds something else.
        """
        try:
            return cls.from_plain(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise PruningError(f"{path} holds no history of a pruning ({error!r}).") from error


def _finite(value: Any) -> Any:
    """Leave out metrics that are not finite, which JSON has no word for."""
    if isinstance(value, dict):
        kept = {k: _finite(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if not isinstance(v, float) or math.isfinite(v)}
    return [_finite(v) for v in value] if isinstance(value, list) else value
