"""Declares what masking in a run calls of each way to choose weights; chooses none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_prune.callbacks.engine.strategy import Run, RunEvents
from lightning_prune.pruning.amounts import Amount
from lightning_prune.pruning.weights import ToPrune, WeightCount
from lightning_prune.surgery.masks import Masks

__all__ = ["MaskedWeights", "WeightChoice"]


@dataclass
class MaskedWeights:
    """The weights of one callback in a run.

    Attributes:
        to_prune: Which weights, and how much of them in the end.
        masks: What of them is kept.
        masks_gradients: Whether their gradients are masked, too.
        counts: How many entries of each.
    """

    to_prune: ToPrune
    masks: Masks
    masks_gradients: bool
    counts: tuple[WeightCount, ...] = field(default_factory=tuple)


class WeightChoice(RunEvents, ABC):
    """Base of the ways to choose which weights are masked, and of what else belongs to a pruning step."""

    reads_batches: bool = False
    """Whether the model will be run on training batches beside the training."""

    @property
    def needs_whole_model(self) -> bool:
        """Whether it looks at, or draws, all of a model that is split over processes."""
        return self.reads_batches

    def refuse(self, run: Run) -> None:
        """Refuse a run in which this choice cannot work."""

    def prepare(self, run: Run, own: MaskedWeights) -> None:
        """Prepare when training starts."""

    @abstractmethod
    def choose(self, run: Run, own: MaskedWeights, due: Amount, progress: float) -> dict[str, Tensor]:
        """Return what of every weight is kept when ``due`` of it is pruned, as bool of its shape, by name."""

    @abstractmethod
    def after_masking(self, run: Run, progress: float) -> None:
        """Finish a pruning step, once its masks are set."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""

    def reset(self) -> None:
        """Start anew, for another model."""
