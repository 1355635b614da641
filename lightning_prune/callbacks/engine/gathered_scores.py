"""Gathers from a run, as it goes, what criteria look at, and hands out scores when a cut is due; cuts nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.engine.batches import losses_of, training_batches
from lightning_prune.callbacks.engine.gathering import Gathering, OverTheRun
from lightning_prune.callbacks.engine.processes import calibration_of
from lightning_prune.measure.products import find_products
from lightning_prune.measure.unit_statistics import (
    gather_contributions,
    taylor_over_units,
    watch_contributions,
    watch_moments,
)
from lightning_prune.pruning.budget import Scores
from lightning_prune.pruning.consumers import score_by_readers
from lightning_prune.pruning.scoring import CRITERIA, Criterion, adds_up, score_units
from lightning_prune.structure import Structure

__all__ = ["DAMPING", "gathering_for"]

DAMPING = 0.01
"""Share of its mean diagonal entry that is added to a Hessian's diagonal."""

_MOMENTS = ("total", "squares", "zeros")


class AtTheCut(Gathering):
    """Looks at the model when a cut is due, and at some training batches if its criterion needs any."""

    def __init__(self, criterion: Criterion, batches: int) -> None:
        """Take a criterion, by name or as a function of a weight."""
        self.criterion = criterion
        self.batches = batches

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Score the model as it is; what was found on batches is averaged over processes."""
        if callable(self.criterion) or not CRITERIA[self.criterion].needs:
            return score_units(pl_module, structure, self.criterion)
        with training_batches(trainer, pl_module, self.batches) as batches, losses_of(pl_module) as loss:
            found = score_units(pl_module, structure, self.criterion, batches, loss)
        return {name: trainer.strategy.reduce(score, reduce_op="mean") for name, score in found.items()}  # type: ignore[misc]

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Do nothing: everything is seen when it is asked for."""

    def rest(self) -> None:
        """Do nothing."""

    @property
    def ready(self) -> bool:
        """Whether there is something to score by: always."""
        return True

    def blind(self, pl_module: LightningModule) -> bool:
        """Tell whether something went by unseen: never."""
        return False

    def gathered(self) -> None:
        """Return nothing."""

    def take_up(self, gathered: dict[str, list[Any]] | None) -> None:
        """Do nothing."""


class ByReaders(AtTheCut):
    """Asks what reads the units how well it can make up for them, on some training batches when a cut is due."""

    def __init__(self, batches: int) -> None:
        """Take how many batches are looked at."""
        super().__init__("obs", batches)

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Score by the batches of all processes."""
        with calibration_of(trainer, pl_module, self.batches) as calibration:
            products = find_products(pl_module, calibration.batches[0], calibration.forward)
            return score_by_readers(pl_module, structure, products, calibration, DAMPING)


class TaylorOfWeights(OverTheRun):
    """Expands the loss in the weights, from the gradients that steps are made of (Molchanov et al. 2019)."""

    looks_at_training = "gradients"

    def sums(self, structure: Structure) -> dict[str, int]:
        """Return one number per unit."""
        return {name: group.width for name, group in structure.groups.items()}

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return the mean over steps."""
        found = self.found()
        return {name: CRITERIA["taylor"].normalise(found[name]) for name in structure.groups}

    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather from gradients accumulated, averaged over processes and unscaled, of what this optimizer trains."""
        if self.means is None or self._structure is None:
            return
        parameters = dict(pl_module.named_parameters())
        mine, others = (
            {id(p) for other in trainer.optimizers if _same(other, optimizer) is same for p in _trained(other)}
            for same in (True, False)
        )
        # what other optimizers train may hold gradients of an earlier pass
        gradients = {name: parameter.grad for name, parameter in parameters.items() if id(parameter) in mine}
        elsewhere = {name for name, parameter in parameters.items() if id(parameter) in others - mine}
        self.means.update(taylor_over_units(self._structure, parameters, gradients, elsewhere))


class TaylorOfActivations(OverTheRun):
    """Expands each example's loss in the feature maps, during backward passes (Molchanov et al. 2016)."""

    looks_at_training = "gradients"

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.contributions: dict[tuple[str, int], Tensor] = {}

    def sums(self, structure: Structure) -> dict[str, int]:
        """Return one number per unit."""
        return {name: group.width for name, group in structure.groups.items()}

    def hook(self, pl_module: LightningModule, structure: Structure) -> None:
        """Watch backward passes."""
        self.contributions = self._hooks.enter_context(watch_contributions(pl_module, structure))

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return the mean over examples, of each layer divided by its norm."""
        found = self.found()
        return {name: CRITERIA["taylor_activations"].normalise(found[name]) for name in structure.groups}

    def before_backward(self) -> None:
        """Forget what backward passes outside the training step have left."""
        self.contributions.clear()

    def after_backward(self, trainer: Trainer) -> None:
        """Gather what each example of this backward pass contributes."""
        if self.means is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            gather_contributions(self.means, self.contributions, 1.0 if scaler is None else scaler.get_scale())

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what belongs to this process alone."""
        return {**super().__getstate__(), "contributions": {}}


class Moments(OverTheRun):
    """Averages activations, their squares and how many are zero, over the training's own forward passes."""

    looks_at_training = "activations"

    def __init__(self, criterion: str) -> None:
        """Take the name of a criterion of activations."""
        super().__init__()
        self.criterion = criterion
        self.found_now: dict[str, dict[str, Tensor]] = {}

    def sums(self, structure: Structure) -> dict[str, int]:
        """Return three numbers per unit."""
        return {f"{name}/{what}": group.width for name, group in structure.groups.items() for what in _MOMENTS}

    def hook(self, pl_module: LightningModule, structure: Structure) -> None:
        """Watch forward passes that are differentiated."""
        self.found_now = self._hooks.enter_context(watch_moments(pl_module, structure, differentiated=True))

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return what the criterion makes of the means."""
        found, criterion = self.found(), CRITERIA[self.criterion]
        assert criterion.of_moments is not None
        scores = {}
        for name in structure.groups:
            means = {what: found[f"{name}/{what}"] for what in _MOMENTS}
            scores[name] = criterion.normalise(criterion.of_moments(**means, count=torch.ones_like(means["total"])))
        return scores

    def before_batch(self) -> None:
        """Forget what was seen outside training."""
        self.found_now.clear()

    def after_batch(self) -> None:
        """Gather from the forward passes of one training step."""
        if self.means is not None:
            for name, moments in self.found_now.items():
                for what in _MOMENTS:
                    self.means.update({f"{name}/{what}": moments[what]}, count=float(moments["count"][0]))
            self.found_now.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what belongs to this process alone."""
        return {**super().__getstate__(), "found_now": {}}


_OVER_THE_RUN: dict[str, Callable[[], Gathering]] = {
    "taylor": TaylorOfWeights,
    "taylor_activations": TaylorOfActivations,
    "activation_mean": partial(Moments, "activation_mean"),
    "activation_std": partial(Moments, "activation_std"),
    "apoz": partial(Moments, "apoz"),
}


def gathering_for(criterion: Criterion, batches: int = 1) -> Gathering:
    """Return what gathers for a criterion: over the run where the run's own passes show it, else when a cut is due."""
    if criterion == "obs":
        gathering: Gathering = ByReaders(batches)
        gathering.adding_up = True
        return gathering
    named = criterion if isinstance(criterion, str) else ""
    gathering = _OVER_THE_RUN[named]() if named in _OVER_THE_RUN else AtTheCut(criterion, batches)
    gathering.adding_up = adds_up(criterion)
    return gathering


def _same(one: Optimizer, other: Optimizer) -> bool:
    return one is other or getattr(other, "optimizer", other) is one


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
