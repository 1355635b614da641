"""Stops training early only once pruning is finished; knows no criterion and no model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_prune.callbacks.engine.packages import AnyEarlyStopping
from lightning_prune.callbacks.engine.pruning_callback import pruned_so_far, pruning_finished


class PruningEarlyStopping(AnyEarlyStopping):
    """Stop as Lightning's EarlyStopping does, with its arguments, but count patience only once pruning is finished.

    The best value is forgotten at each pruning step, so that the pruned model is not compared with the dense one.
    Until the last one, neither ``patience`` nor ``stopping_threshold`` ends training; a metric that is not finite, or
    beyond ``divergence_threshold``, does.

    Examples:
        >>> PruningEarlyStopping(monitor="val_loss", patience=3).patience
        3
    """

    _size: list[float] | None = None  # how far each callback had pruned what best_score is of

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        size = pruned_so_far(trainer)
        if size != self._size:
            self._size, self.wait_count = size, 0
            self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        asked, finished = (self.patience, self.stopping_threshold), pruning_finished(trainer)
        if not finished:
            self.patience, self.stopping_threshold = sys.maxsize, None
        try:
            super()._run_early_stopping_check(trainer)
        finally:
            self.patience, self.stopping_threshold = asked
            if not finished:
                self.wait_count = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of EarlyStopping, and how far pruning had come."""
        return {**super().state_dict(), "size": self._size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state."""
        super().load_state_dict(state_dict)
        self._size = state_dict["size"]
