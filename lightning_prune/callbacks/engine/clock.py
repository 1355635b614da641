"""Counts how far one callback's schedule has come and what is due; reads no model and no Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prune.algorithms.schedules import Moments, Schedule
from lightning_prune.pruning.amounts import Amount

__all__ = ["AfterTraining", "Clock", "first_moment", "share_due"]

_SMALLEST_STEP = 0.01  # of all pruning; below it a guard that halves steps gives up


@dataclass(frozen=True)
class AfterTraining(Schedule):
    """One pruning step after the last batch: at no epoch or step of the training itself."""

    by: Moments = "epochs"

    def progress(self, moment: int) -> float:
        """Return 0: nothing is due while the model trains."""
        return 0.0

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the sparsity at a share of all pruning steps."""
        return progress * amount

    @property
    def last(self) -> int:
        """The first epoch, so that no training is too short."""
        return 0


@dataclass
class Clock:
    """A schedule, and the share of its pruning steps that was made.

    Attributes:
        schedule: What the user asked for.
        progress: Share of the schedule's pruning steps made so far.
        largest: Largest pruning step, as a share of all; a guard halves it, or sets it to 0.
        epoch: The last epoch whose start was seen in this run.
        moment: Epoch and optimizer step of the last pruning step in this run.
    """

    schedule: Schedule
    progress: float = 0.0
    largest: float = 1.0
    epoch: int = -1
    moment: tuple[int, int] = (-1, -1)

    @property
    def unfinished(self) -> bool:
        """Whether a pruning step is still to come."""
        return self.progress < 1.0 and not self.stopped

    @property
    def stopped(self) -> bool:
        """Whether a guard ended pruning before the schedule did."""
        return self.progress < 1.0 and self.largest == 0.0

    @property
    def prunes_after_training(self) -> bool:
        """Whether the one pruning step comes after the last batch."""
        return isinstance(self.schedule, AfterTraining)

    def due(self, schedule: Schedule, epoch: int, step: int) -> float | None:
        """Return the progress that is due, or None if all that is due was done.

        Args:
            schedule: The schedule, for as many units as will be removed in all.
            epoch: The current epoch.
            step: Optimizer steps made.
        """
        moment = step if schedule.by == "steps" else epoch
        if self.stopped:
            return None
        most = self.progress + self.largest
        if most > 1.0 - _SMALLEST_STEP:
            most = 1.0  # no step for a remainder that rounding leaves
        progress = min(schedule.progress(moment), most)
        again = self.moment == (epoch, step)  # the start of an epoch and that of its first batch both ask
        return progress if progress > self.progress and not again else None

    def rollback(self, progress: float, halve: bool) -> None:
        """Return to an earlier progress, to go on from there by half the step at a time, or never."""
        step = self.progress - progress
        self.progress = progress
        if step > 0:
            self.largest = step / 2 if halve and step / 2 >= _SMALLEST_STEP else 0.0

    def start_run(self) -> None:
        """Forget what belongs to the last run."""
        self.epoch, self.moment = -1, (-1, -1)

    def reset(self) -> None:
        """Start anew, for another model."""
        self.progress, self.largest = 0.0, 1.0
        self.start_run()

    def state_dict(self) -> dict[str, float]:
        """Return the state to save."""
        return {"progress": self.progress, "largest": self.largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.progress, self.largest = float(state["progress"]), float(state["largest"])


def share_due(amount: Amount, schedule: Schedule, progress: float) -> Amount:
    """Return the part of an amount, or of each by name, that a schedule asks for at ``progress``."""
    if not isinstance(amount, Mapping):
        return schedule.sparsity(progress, amount)
    return {name: schedule.sparsity(progress, share) for name, share in amount.items()}


def first_moment(schedule: Schedule) -> int:
    """Return the epoch or optimizer step before which the first pruning step falls."""
    return next((moment for moment in range(schedule.last + 1) if schedule.progress(moment) > 0), schedule.last)
