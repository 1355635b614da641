"""Holds the state of a callback that removes layers, and its form in checkpoints; changes no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_prune.pruning.layer_plan import LayerCosts
from lightning_prune.pruning.report_types import RemovedLayer
from lightning_prune.reports import LayerCost

__all__ = ["DenseLayers", "LayerState"]


@dataclass(frozen=True)
class DenseLayers:
    """The model when pruning began, which amounts are relative to.

    Attributes:
        costs: What it and its layers cost.
        layers: What each module with weights costs, for the report.
    """

    costs: LayerCosts
    layers: dict[str, LayerCost]

    def to_plain(self) -> dict[str, Any]:
        """Return the same as dicts, lists, strings and numbers."""
        return {"costs": asdict(self.costs), "layers": {path: list(c) for path, c in self.layers.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> DenseLayers:
        """Return what :meth:`to_plain` made plain."""
        return cls(LayerCosts(**plain["costs"]), {path: LayerCost(*cost) for path, cost in plain["layers"].items()})


@dataclass
class LayerState:
    """Everything that changes in the life of a callback that removes layers.

    Attributes:
        dense: The dense model, once it was looked at.
        removed: Path of a removed layer -> itself, and when it left, in words.
        latency: Share of the latency that is left, where it is a target.
        refused: Layers whose removal could not be verified, and why.
        pinned: Modules that cannot be removed, and why, as last found.
        warned: Whether it was said that less is removed than was asked.
    """

    dense: DenseLayers | None = None
    removed: dict[str, tuple[RemovedLayer, str]] = field(default_factory=dict)
    latency: float = 1.0
    refused: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    warned: bool = False

    @property
    def gone(self) -> dict[str, RemovedLayer]:
        """The removed layers by path."""
        return {path: layer for path, (layer, _) in self.removed.items()}

    def to_plain(self) -> dict[str, Any]:
        """Return the state to save."""
        return {
            "dense": None if self.dense is None else self.dense.to_plain(),
            "removed": {path: [list(layer), when] for path, (layer, when) in self.removed.items()},
            "latency": self.latency,
            "refused": dict(self.refused),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LayerState:
        """Return a saved state."""
        dense = None if plain["dense"] is None else DenseLayers.from_plain(plain["dense"])
        removed = {path: (RemovedLayer(*layer), when) for path, (layer, when) in plain["removed"].items()}
        return cls(dense, removed, float(plain["latency"]), dict(plain["refused"]))
