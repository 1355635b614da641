"""Keeps the best checkpoints of the pruned model, not of the dense one; knows no metric and no file format."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.engine.packages import AnyModelCheckpoint
from lightning_prune.callbacks.engine.pruning_callback import pruned_so_far


class PruningCheckpoint(AnyModelCheckpoint):
    """Save checkpoints as Lightning's ModelCheckpoint does, and compare those of the model's current size alone.

    The dense model is nearly always better than the pruned one, so a ModelCheckpoint keeps the dense one as its best.
    Here the comparison starts anew at each pruning step, and when a guard rolls one back. When training ends,
    ``best_model_path`` is the best checkpoint of the final size. Files of earlier sizes are deleted once one of the new
    size is written.

    If the model changes when training ends (a rollback, or a pruning step after the last batch), it is saved as it is.

    Args:
        dirpath: Folder of the checkpoints, as for ModelCheckpoint.
        filename: Their name, as for ModelCheckpoint.
        monitor: Name of the metric to compare by, as for ModelCheckpoint.
        each_size: Whether the best checkpoints of earlier sizes are kept, too.
        **kwargs: All other arguments of ModelCheckpoint.

    Examples:
        >>> PruningCheckpoint(monitor="val_acc", mode="max").monitor
        'val_acc'
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        *,
        each_size: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename, monitor, **kwargs)
        self.each_size = each_size
        self._size: list[float] = []  # how far each callback had pruned what best_k_models holds
        self._to_delete: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the best of a checkpoint that is resumed: it was of the size that the model has now."""
        super().on_train_start(trainer, pl_module)
        self._size = pruned_so_far(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the comparison anew after a pruning step; checkpoint callbacks come after those that prune."""
        self._forget_other_sizes(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what no checkpoint holds yet."""
        super().on_train_end(trainer, pl_module)
        self._forget_other_sizes(trainer)
        if not self.best_model_path and self.save_top_k != 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            candidates = self._monitor_candidates(trainer)
            self._save_none_monitor_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _forget_other_sizes(self, trainer: Trainer) -> None:
        size = pruned_so_far(trainer)
        if size == self._size:
            return
        self._size = size
        if not self.each_size and self.save_top_k != -1:
            self._to_delete += {*self.best_k_models, self.best_model_path} - {""}
        self.best_k_models = {}
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = self.current_score = None
        self.kth_value = torch.tensor(math.inf if self.mode == "min" else -math.inf)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Delete files of earlier sizes only once there is another, so that a kill leaves one of them."""
        super()._save_checkpoint(trainer, filepath)
        outdated, self._to_delete = self._to_delete, []
        for path in outdated:
            if self._should_remove_checkpoint(trainer, path, filepath):
                self._remove_checkpoint(trainer, path)
