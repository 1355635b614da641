"""Drives the units that the next pruning step removes to zero over the steps before it; selects no units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.algorithms.schedules import Moments
from lightning_prune.callbacks.engine.strategy import Coming, Run
from lightning_prune.pruning.plan import Plan
from lightning_prune.structure import ChannelGroup, Keep, Structure, named_tensors
from lightning_prune.surgery import Kept

__all__ = ["Fade", "coming_step", "steps_until"]


@dataclass
class Fade:
    """Units that fade, and how far they have.

    What units hand on is the product of their values and the weights that sum over them. These weights are multiplied,
    after each optimizer step, by factors whose product falls evenly from 1 to 0. Units that no weight sums over, such
    as those of queries and keys, fade where they are made. At zero the model is what the cut leaves of it.

    Attributes:
        coming: The pruning step at which they are removed.
        keep: Group name -> for each of its units whether it is kept, bool ``(width,)``.
        places: Entries that fade: name of a tensor, dimension, indices along it.
        left: Optimizer steps until then, when the entries were last multiplied.
    """

    coming: Coming
    keep: dict[str, Tensor]
    places: list[tuple[str, int, Tensor]]
    left: int

    @classmethod
    def of(cls, plan: Plan, coming: Coming) -> Fade:
        """Begin to fade the units that a plan removes."""
        places = []
        own = named_tensors(plan.model)
        for name, stays in plan.cut.keep.items():
            for tensor, dim, indices in _handed_on(plan.structure.groups[name], stays):
                if isinstance(own[tensor], nn.Parameter):  # statistics of BatchNorm stay
                    places.append((tensor, dim, indices))
        keep = {name: torch.from_numpy(kept.copy()) for name, kept in plan.keep.items()}
        return cls(coming, keep, places, coming.left)

    def scale_(self, pl_module: LightningModule, left: int) -> None:
        """Multiply what fades, as so many optimizer steps are left; at 0 it is exactly zero."""
        if left >= self.left:
            return
        own, factor = named_tensors(pl_module), left / self.left
        with torch.inference_mode(False), torch.no_grad():
            for name, dim, indices in self.places:
                tensor = own[name].detach()
                indices = indices.to(tensor.device)
                faded = tensor.index_select(dim, indices) * factor if left else 0.0
                if isinstance(faded, Tensor):
                    tensor.index_copy_(dim, indices, faded)
                else:
                    tensor.index_fill_(dim, indices, faded)  # a product with NaN or infinity would not be zero
        self.left = left

    def chosen(self, structure: Structure) -> Keep | None:
        """Return what is kept, as plans want it; None if the groups are others than when the fade began."""
        widths = {name: len(kept) for name, kept in self.keep.items()}
        if any(widths.get(name) != group.width for name, group in structure.groups.items()):
            return None
        return {name: self.keep[name].numpy() for name in structure.groups}

    def follow(self, kept: Kept) -> None:
        """Follow a cut of other units, which moves entries."""
        places = []
        for name, dim, indices in self.places:
            stay = kept.get(name, {}).get(dim)
            if stay is not None:
                indices = torch.isin(stay, indices).nonzero()[:, 0]
            places.append((name, dim, indices))
        self.places = places

    def to_plain(self) -> dict[str, Any]:
        """Return the same as dicts, lists, numbers and tensors."""
        coming = [self.coming.progress, self.coming.moment, self.coming.left]
        return {"coming": coming, "keep": self.keep, "places": list(map(list, self.places)), "left": self.left}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Fade:
        """Return what :meth:`to_plain` made plain."""
        places = [(str(name), int(dim), indices) for name, dim, indices in plain["places"]]
        return cls(Coming(*plain["coming"]), dict(plain["keep"]), places, int(plain["left"]))


def _handed_on(group: ChannelGroup, keep: np.ndarray) -> list[tuple[str, int, Tensor]]:
    """Return where weights sum over pruned units; where none does, what makes them."""
    consumers = [slot for slot in group.slots if slot.role == "consumer"]
    found = []
    for slot in consumers or group.slots:
        gone = np.flatnonzero((slot.units >= 0) & ~keep[slot.units])
        found.append((slot.tensor, slot.dim, torch.from_numpy(gone)))
    return found


def coming_step(run: Run, most: int) -> Coming | None:
    """Return the next pruning step, if it is at most so many optimizer steps away, and not due already."""
    schedule, clock, trainer = run.own.schedule, run.own.clock, run.trainer
    by_steps = schedule.by == "steps"
    now = trainer.global_step if by_steps else trainer.current_epoch
    ahead = most if by_steps else math.ceil(most / _steps_in_epoch(trainer))
    if schedule.progress(now) > clock.progress or schedule.progress(now + ahead) <= clock.progress:
        return None
    moment = now
    while schedule.progress(moment) <= clock.progress:
        moment += 1
    left = steps_until(trainer, schedule.by, moment)
    return Coming(clock.reach(schedule, moment), moment, left) if 0 < left <= most else None


def steps_until(trainer: Trainer, by: Moments, moment: int) -> int:
    """Return the optimizer steps until a pruning step, before the first batch of an epoch or before a step.

    Where a training step optimizes manually and the schedule counts epochs, the batches until then.
    """
    if by == "steps":
        return max(0, moment - trainer.global_step)
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    in_epoch, batches = _steps_in_epoch(trainer), progress.current.processed
    done = in_epoch if batches >= trainer.num_training_batches else batches // _batches_of_step(trainer)
    return max(0, in_epoch * (moment - trainer.current_epoch) - done)


def _steps_in_epoch(trainer: Trainer) -> int:
    return math.ceil(trainer.num_training_batches / _batches_of_step(trainer))


def _batches_of_step(trainer: Trainer) -> int:
    return trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
