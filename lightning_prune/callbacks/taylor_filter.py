"""Prunes filters by what the loss would change by without them, from the run's own backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.budget import Scores
from lightning_prune.callbacks._structured import StructuredPruning
from lightning_prune.schedules import OneShot, Schedule
from lightning_prune.scoring import CRITERIA
from lightning_prune.statistics import UnitMeans, gather_contributions, taylor_over_units, watch_contributions
from lightning_prune.structure import Structure

__all__ = ["TaylorFilterPruning"]


class TaylorFilterPruning(StructuredPruning):
    """Remove the filters, neurons and channels that the loss would miss least, to first order, while the model trains.

    The gradients are those of the training itself: no extra passes, no labels. Scores gather from one cut to the next.
    For the rest, what leaves, is logged and is saved, see :class:`~lightning_prune.FilterL1Pruning`.

    Args:
        amount: Fraction, in [0, 1), of the target that shall be gone at the end, of what was there at the start; or
            fractions by pattern of module paths, of the channels that these modules produce.
        target: What ``amount`` is a fraction of: the filters that can leave, or the whole model's parameters or FLOPs.
        scope: ``global`` compares scores across layers; ``layer`` takes the same share of every layer.
        schedule: When how much of it leaves, not before epoch 1, since gradients must be seen first; by default
            everything before epoch 1.
        ignore: Patterns of module paths whose channels stay.
        round_to: Widths after a cut are multiples of this, rounded up.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs of ``forward``; by default
            the module's ``example_input_array``, else one example of the first training batch.
        form: ``weights`` squares the sum of weight times gradient over the weights that read a unit (Molchanov et al.
            2019); ``activations`` averages over examples the absolute sum of activation times gradient, and divides by
            the layer's l2 norm (2016); it takes the training loss to be the mean over the batch.
        flops_penalty: Score taken off a unit for each million multiply-adds that leave with it; the 2016 paper uses
            0.001.

    Raises:
        ValueError: If an argument is out of range, or the schedule cuts before epoch 1.
        TypeError: If an argument is of a wrong kind.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017 (arXiv:1611.06440);
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019 (arXiv:1906.10771).
    """

    gathers = True

    def __init__(
        self,
        amount: float | dict[str, float] = 0.3,
        target: Literal["filters", "params", "flops"] = "filters",
        scope: Literal["layer", "global"] = "global",
        schedule: Schedule | None = None,
        ignore: Sequence[str] = (),
        round_to: int = 1,
        example_inputs: Any = None,
        form: Literal["weights", "activations"] = "weights",
        flops_penalty: float = 0.0,
    ) -> None:
        schedule = schedule if schedule is not None else OneShot(at=1)
        super().__init__(amount, target, scope, schedule, ignore, round_to, example_inputs)
        if self.schedule.progress(0) > 0:
            raise ValueError(
                f"TaylorFilterPruning(schedule={schedule!r}): gradients must be seen before the first cut. "
                "Start at epoch 1."
            )
        if form not in ("weights", "activations"):
            raise ValueError(f"TaylorFilterPruning(form={form!r}): choose 'weights' or 'activations'.")
        if not flops_penalty >= 0:
            raise ValueError(f"TaylorFilterPruning(flops_penalty={flops_penalty!r}): it must be 0 or more.")
        self.form = form
        self.flops_penalty = flops_penalty
        self._means: UnitMeans | None = None
        self._gathered: dict[str, list[Any]] | None = None  # what a checkpoint brought, until the model is traced
        self._structure: Structure | None = None
        self._contributions: dict[tuple[str, int], Tensor] = {}
        self._watching = ExitStack()

    def scores(self, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return the mean of what was gathered on all processes since the last cut, ``(width,)`` for each group."""
        assert self._means is not None  # ready was asked first
        means = self._means.compute()
        normalise = CRITERIA["taylor" if self.form == "weights" else "taylor_activations"].normalise
        return {
            name: normalise(means[name]) - self.flops_penalty * _mega_flops(structure, name)
            for name in structure.groups
        }

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Gather from nothing, or from what a checkpoint brought."""
        self.rest()
        self._structure = structure
        self._means = UnitMeans({name: group.width for name, group in structure.groups.items()}, pl_module.device)
        if self._gathered is not None:
            self._means.take_up(self._gathered)
            self._gathered = None
        if self.form == "activations":
            self._contributions = self._watching.enter_context(watch_contributions(pl_module, structure))

    @property
    def ready(self) -> bool:
        """Whether gradients were seen since the last cut."""
        return self._means is not None and self._means.has_seen

    def rest(self) -> None:
        """Stop gathering, and take every hook off the model."""
        self._watching.close()
        self._means = self._structure = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather from the gradients that the step is made of: accumulated, averaged over processes, unscaled."""
        if self._means is not None and self._structure is not None and self.form == "weights":
            parameters = dict(pl_module.named_parameters())
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            # what other optimizers train may hold gradients of an earlier pass
            gradients = {name: parameter.grad for name, parameter in parameters.items() if id(parameter) in stepped}
            self._means.update(taylor_over_units(self._structure, parameters, gradients))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forget what backward passes outside the training step have left."""
        self._contributions.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what each example of this backward pass contributes."""
        if self._means is not None and self.form == "activations":
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            gather_contributions(self._means, self._contributions, 1.0 if scaler is None else scaler.get_scale())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep each process's share of what all have gathered: the same file is read by all of them."""
        if self._means is not None and trainer.world_size > 1:
            gathered = checkpoint["callbacks"][self.state_key]["gathered"]
            for sums in gathered.values():
                total, count = (
                    trainer.strategy.reduce(torch.as_tensor(value).to(self._means.device), reduce_op="mean")
                    for value in sums
                )
                sums[:] = total.cpu(), float(count)

    def state_dict(self) -> dict[str, Any]:
        """Return what the base remembers, and what was gathered since the last cut."""
        return {**super().state_dict(), "gathered": None if self._means is None else self._means.gathered()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint remembers."""
        super().load_state_dict(state_dict)
        self._gathered = state_dict["gathered"]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what belongs to this process alone."""
        alone: dict[str, Any] = {"_means": None, "_structure": None, "_contributions": {}, "_watching": ExitStack()}
        return {**super().__getstate__(), **alone}


def _mega_flops(structure: Structure, name: str) -> float:
    """Return the multiply-adds, in millions, that leave with one unit of a group."""
    keep = np.ones(structure.groups[name].width, dtype=bool)
    keep[0] = False
    return (structure.flops({}) - structure.flops({name: keep})) / 1e6
