"""Chooses the weights with the lowest scores, and rewinds the run after each round if asked to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.averaging import restart_averages_
from lightning_prune.callbacks.engine.clock import first_moment
from lightning_prune.callbacks.engine.guard import guards
from lightning_prune.callbacks.engine.packages import callbacks_named
from lightning_prune.callbacks.engine.refusals import first_pruning_step
from lightning_prune.callbacks.engine.rewind import draw_anew_, remember, rewind_
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval
from lightning_prune.callbacks.engine.weight_choice import MaskedWeights, WeightChoice
from lightning_prune.callbacks.engine.weight_masking import WeightMasking
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import whole
from lightning_prune.pruning.amounts import Amount, check_count
from lightning_prune.pruning.weights import WeightCriterion, WeightScope, choose_weights, score_weights, shuffled

__all__ = ["Control", "SmallestWeights"]

Control = Literal["reinitialize", "shuffle"]
"""What the last round does instead of a lottery ticket's, to compare."""


class SmallestWeights(WeightChoice):
    """The choice of :class:`~lightning_prune.IterativeMagnitudePruning`, which documents the arguments."""

    def __init__(
        self,
        criterion: WeightCriterion,
        scope: WeightScope,
        pattern: str | None,
        rewind_to: int | None,
        control: Control | None,
    ) -> None:
        self.criterion = criterion
        self.scope: WeightScope = scope
        self.pattern = pattern
        self.rewind_to = rewind_to
        self.control: Control | None = control
        self._early: dict[str, Any] | None = None  # the run as it stood at rewind_to
        self._seed: int | None = None  # of the run that began, which one that resumes it may not have

    def check(self, where: str, schedule: Schedule) -> None:
        """Refuse arguments that contradict each other.

        Raises:
            ValueError: Saying which.
        """
        steps, control = self.rewind_to, self.control
        if steps is not None:
            check_count(where, "rewind_to", steps, 0, "optimizer steps")
        if control not in (None, "reinitialize", "shuffle"):
            raise ValueError(f"{where}(control={control!r}): choose 'reinitialize', 'shuffle' or None.")
        if control is not None and steps is None:
            raise ValueError(f"{where}(control={control!r}): controls are for runs that rewind. Give rewind_to, too.")
        if steps is not None and schedule.by == "steps" and first_moment(schedule) < steps:
            raise ValueError(
                f"{where}(schedule={schedule!r}, rewind_to={steps}): the first cut, at step "
                f"{first_moment(schedule)}, comes before the step that it rewinds to. Rewind to an earlier one."
            )

    @property
    def needs_whole_model(self) -> bool:
        """Whether whole weights are drawn anew, as one process would draw them."""
        return self.control == "reinitialize"

    def refuse(self, run: Run) -> None:
        """Refuse a run that cannot go back."""
        if self.rewind_to is None:
            return
        removing = [member.callback for member in run.members if isinstance(member.strategy, UnitRemoval)]
        # Those that average weights, or unfreeze layers, from some epoch on cannot go back.
        scheduled = callbacks_named(run.trainer, "StochasticWeightAveraging", "BaseFinetuning")
        others = [*guards(run.trainer), *removing, *scheduled]
        if others:
            raise PruningError(
                f"{run.where}(rewind_to={self.rewind_to}) and {type(others[0]).__name__} contradict: one "
                "takes the whole run back to where it was, and the other goes by how far it has come. Use one of them."
            )

    def prepare(self, run: Run, own: MaskedWeights) -> None:
        """Save the run as it stands, if this is where rounds start."""
        trainer, schedule = run.trainer, run.own.clock.schedule
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
        if self.rewind_to is None or self._early is not None:
            return
        if trainer.global_step > self.rewind_to:
            raise PruningError(
                f"{run.where}(rewind_to={self.rewind_to}): training starts at step "
                f"{trainer.global_step}, so what was there is not known. Start anew, or rewind to a step to come."
            )
        first = first_pruning_step(schedule, trainer)
        if first is not None and first < self.rewind_to:  # else it shows at the pruning step
            raise PruningError(
                f"{run.where}(rewind_to={self.rewind_to}): the first cut of {schedule}, at step "
                f"{first}, comes before. Rewind to an earlier step, or let it come later."
            )
        self.after_batch(run)

    def choose(self, run: Run, own: MaskedWeights, due: Amount, progress: float) -> dict[str, Tensor]:
        """Return what is kept when those with the lowest scores are masked; what was masked stays so."""
        if self.rewind_to is not None and self._early is None:
            raise PruningError(
                f"{run.where}(rewind_to={self.rewind_to}): the first pruning step of {run.own.clock.schedule} comes "
                f"after {run.trainer.global_step} optimizer steps, before there is anything to go back to. Rewind to "
                "an earlier step, or start the schedule later."
            )
        weights = own.to_prune.weights
        scores = score_weights(weights, self.criterion, self._known_seed)
        keep = choose_weights(weights, scores, own.masks.keep, due, self.scope, self.pattern)
        return shuffled(keep, self._known_seed) if self.control == "shuffle" and progress >= 1.0 else keep

    def after_masking(self, run: Run, progress: float) -> None:
        """Go back to where the round began."""
        if self._early is None:
            return
        early = tree_map_only(Tensor, whole, self._early) if self.needs_whole_model else self._early
        rewind_(run.trainer, run.module, early)
        if self.control == "reinitialize" and progress >= 1.0:
            draw_anew_(run.module, self._known_seed)
        for masking in run.strategies(WeightMasking):
            masking.own.masks.clear_(run.trainer.optimizers)
        restart_averages_(run.trainer, run.module)

    def after_batch(self, run: Run) -> None:
        """Save the run as it stands, if this is where rounds start."""
        if self.rewind_to is not None and self._early is None and run.trainer.global_step >= self.rewind_to:
            self._early = remember(run.trainer, run.module)
            if run.trainer.global_step > self.rewind_to:
                rank_zero_warn(
                    f"{run.where}(rewind_to={self.rewind_to}): a batch takes several optimizer steps, so the state "
                    f"after step {run.trainer.global_step}, at the end of a batch, is what rounds go back to."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the run as it stood where rounds start."""
        # all processes are here; a run of another number of them may go on
        return {"early": tree_map_only(Tensor, whole, self._early), "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._early, self._seed = state["early"], state["seed"]

    def reset(self) -> None:
        """Start anew, for another model."""
        self._early = self._seed = None

    @property
    def _known_seed(self) -> int:
        assert self._seed is not None  # set when training begins
        return self._seed
