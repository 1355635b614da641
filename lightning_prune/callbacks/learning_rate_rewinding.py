"""Begins the learning-rate schedule anew after each pruning step."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.engine.packages import AnyCallback, callbacks_named
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback, pruned_so_far, pruning_callbacks
from lightning_prune.callbacks.engine.refusals import first_pruning_step
from lightning_prune.callbacks.engine.settings import compared_arguments, warn_of_changes
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.amounts import check_count


class LearningRateRewinding(AnyCallback):
    """Set the learning-rate schedule back after each pruning step, and keep the weights (Renda et al. 2020).

    Schedules end at small learning rates, at which a network hardly recovers from pruning. Put this callback beside any
    of our pruning callbacks. After optimizer step ``to`` it saves the state of all learning-rate schedulers and the
    settings of the optimizers' parameter groups (learning rate, momentum, ...). After each pruning step both are as
    they were then, and the schedule goes on from there. Weights, optimizer state and the number of steps stay. Plan
    epochs for it: a schedule of 10 epochs that two pruning steps set back to the start needs 10 more epochs behind the
    second.

    A pruning step that :class:`~lightning_prune.MetricGuard` rolls back leaves the learning rate as it is.

    Args:
        to: Optimizer step to which schedulers are set back; 0 is the start of training.

    Raises:
        ValueError: If ``to`` is no number of steps.
        PruningError: Before training: without a learning-rate scheduler, without a callback that prunes while the
            model trains, or if step ``to`` has passed. At the pruning step: if it comes before step ``to``, or
            parameter groups were added since.

    References:
        Renda, Frankle, Carbin, Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020
        (arXiv:2003.02389).

    Examples:
        >>> LearningRateRewinding(to=0).to
        0
    """

    def __init__(self, to: int = 0) -> None:
        check_count(type(self).__name__, "to", to, 0, "optimizer steps")
        self.to = to
        self._trained: weakref.ref[LightningModule] | None = None  # which the state is of
        self._early: dict[str, Any] | None = None  # schedulers and groups as they stood after step `to`
        self._pruned: list[float] | None = None  # how far each callback had pruned when last looked at

    @property
    def _where(self) -> str:
        return f"{type(self).__name__}(to={self.to})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run in which nothing is pruned; start anew for another module."""
        if stage != "fit":
            return
        if not pruning_callbacks(trainer):
            raise PruningError(
                f"{self._where} follows pruning steps, and no callback prunes. Add FilterL1Pruning or another."
            )
        if callbacks_named(trainer, "StochasticWeightAveraging"):
            raise PruningError(
                f"{self._where} and StochasticWeightAveraging contradict: one sets the learning-rate schedule back "
                "after each pruning step, and the other replaces it by its own. Leave one of them out."
            )
        if self._trained is None or self._trained() is not pl_module:
            self._early = self._pruned = None
            self._trained = weakref.ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what schedulers start from, and refuse a run that has none or is past that step."""
        if not trainer.lr_scheduler_configs:
            raise PruningError(
                f"{self._where}: configure_optimizers returns no learning-rate scheduler, so there is no schedule to "
                "set back. Return one, or leave the callback out."
            )
        if trainer.global_step <= self.to:  # what an earlier run of this module saved is not of this one
            self._early = None
        elif self._early is None:
            raise PruningError(
                f"{self._where}: training starts at step {trainer.global_step}, so the learning rate of step {self.to} "
                "is not known. Start anew, or set schedules back to a step to come."
            )
        within = [own for own in pruning_callbacks(trainer) if not own.member.clock.prunes_after_training]
        if not within:
            raise PruningError(
                f"{self._where}: all pruning comes after the last batch, so no training follows in which a schedule "
                "could go on. Prune before an epoch (OBSOneShot has epoch=), or leave the callback out."
            )
        if self._early is None:
            self._refuse_too_early(trainer, within)
        self._pruned = pruned_so_far(trainer) if self._pruned is None else self._pruned
        self._save_if_due(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set schedules back if a pruning step was made before this batch."""
        self._follow(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Set schedules back if a callback behind this one made a pruning step before this batch."""
        self._follow(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the schedules, if this is the step to which they are set back; they have moved on to its end."""
        self._save_if_due(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what was saved, and how far pruning had come."""
        return {"early": self._early, "pruned": self._pruned, "asked": compared_arguments(self, None)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        warn_of_changes(self, state_dict["asked"])
        self._early, self._pruned = state_dict["early"], state_dict["pruned"]
        if state_dict["asked"] != compared_arguments(self, None):
            self._early = None  # it is of another step

    def _refuse_too_early(self, trainer: Trainer, pruning: Iterable[PruningCallback]) -> None:
        """Refuse a pruning step before there is something to go back to, if it is known when it comes."""
        for callback in pruning:
            first = first_pruning_step(callback.member.clock.schedule, trainer)
            if first is not None and first < self.to:
                raise PruningError(
                    f"{self._where}: the first pruning step of {type(callback).__name__} comes after {first} optimizer "
                    "steps, before there is a learning rate to go back to. Go back to an earlier step, or start the "
                    "schedule later."
                )

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._early is not None or trainer.global_step < self.to:
            return
        self._early = {
            "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            "groups": [copy.deepcopy(optimizer.state_dict()["param_groups"]) for optimizer in trainer.optimizers],
        }
        if trainer.global_step > self.to:
            rank_zero_warn(
                f"{self._where}: a batch takes several optimizer steps, so schedules are set back to where they stood "
                f"after step {trainer.global_step}, at the end of a batch."
            )

    def _follow(self, trainer: Trainer) -> None:
        """Set schedules back if a callback has pruned further than when this one last looked."""
        before, self._pruned = self._pruned, pruned_so_far(trainer)
        assert before is not None  # noted when training started
        if len(before) == len(self._pruned) and all(now <= was for now, was in zip(self._pruned, before, strict=True)):
            return
        if self._early is None:
            raise PruningError(
                f"{self._where}: a pruning step comes after {trainer.global_step} optimizer steps, before there is a "
                "learning rate to go back to. Go back to an earlier step, or start the schedule later."
            )
        self._set_back(trainer, self._early)

    def _set_back(self, trainer: Trainer, early: Mapping[str, Any]) -> None:
        """Set the settings of all parameter groups, and all schedulers, to what was saved."""
        for optimizer, groups in zip(trainer.optimizers, early["groups"], strict=True):
            if len(optimizer.param_groups) != len(groups):
                raise PruningError(
                    f"{self._where}: an optimizer has {len(optimizer.param_groups)} parameter groups, and had "
                    f"{len(groups)} at that step. Give it all parameters from the start, or leave the callback out."
                )
            for group, was in zip(optimizer.param_groups, groups, strict=True):
                for name, value in was.items():
                    if name == "params":
                        continue
                    if isinstance(group.get(name), Tensor):
                        group[name].fill_(value)  # captured graphs and compiled steps read this tensor
                    else:
                        group[name] = copy.deepcopy(value)
        for config, was in zip(trainer.lr_scheduler_configs, early["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(was))
