"""Shows a run to the accumulator of a criterion, and returns its scores when a pruning step is due; cuts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.engine.batches import losses_of, training_batches
from lightning_prune.callbacks.engine.example_inputs import inputs_of
from lightning_prune.callbacks.engine.gathering import Gathering
from lightning_prune.callbacks.engine.step import copied
from lightning_prune.model.calls import run
from lightning_prune.model.errors import NoGradientError, failures_suppressed
from lightning_prune.pruning.accumulators import Accumulator
from lightning_prune.pruning.budget import Scores
from lightning_prune.pruning.scoring import Criterion, accumulator_for, refuse_blocked, score_units
from lightning_prune.structure import Structure

__all__ = ["gathering_for"]


class AtTheCut(Gathering):
    """Scores the model when a pruning step is due, on some training batches if its criterion needs any."""

    def __init__(self, criterion: Criterion, batches: int) -> None:
        """Keep the criterion, and how many batches it is to see."""
        self.criterion = criterion
        self.batches = batches

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Score the model as it is, on the batches of all processes."""
        if not accumulator_for(self.criterion).needs:
            return score_units(pl_module, structure, self.criterion)
        with training_batches(trainer, pl_module, self.batches) as batches:
            found = self._scored_on(batches, pl_module, structure)
        return {name: trainer.strategy.reduce(score, reduce_op="mean") for name, score in found.items()}  # type: ignore[misc]

    def rehearse(self, pl_module: LightningModule, structure: Structure, batch: Any) -> None:
        """Score the model on one batch."""
        if accumulator_for(self.criterion).needs:
            self._scored_on([copied(batch)], pl_module, structure)

    def _scored_on(self, batches: Iterable[Any], pl_module: LightningModule, structure: Structure) -> Scores:
        if accumulator_for(self.criterion).calls_forward:  # not in autocast, which hides parameters
            inputs = list(inputs_of(pl_module, batches, self.traces))
            return score_units(pl_module, structure, self.criterion, inputs, run)
        with losses_of(pl_module) as loss:
            return score_units(pl_module, structure, self.criterion, batches, loss)


class OverTheRun(Gathering):
    """Scores by what training steps show, on all processes, from one pruning step to the next.

    Where an operator that reads units is hidden in them, as by a fused kernel, scores are taken as :class:`AtTheCut`.
    """

    def __init__(self, criterion: Criterion, batches: int) -> None:
        """Keep the criterion; nothing is watched yet."""
        self.criterion = criterion
        self.otherwise = AtTheCut(criterion, batches)
        self.looks_at_training = accumulator_for(criterion).looks_at
        self.reads_parts = accumulator_for(criterion).reads_parts
        self._accumulator: Accumulator | None = None
        self._hooks = ExitStack()
        self._brought: dict[str, list[Any]] | None = None  # by a checkpoint, until the model is traced
        self._versions: list[int] | None = None  # of the parameters when watching began: every step makes new ones

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return what the accumulator makes of all training steps."""
        accumulator = self._accumulator
        assert accumulator is not None  # ready was asked first
        hidden = bool(trainer.strategy.reduce(accumulator.means.unseen.sum(), reduce_op="sum"))
        if hidden:
            self.rest()
            self.otherwise.traces = self.traces
            return self.otherwise.scores(trainer, pl_module, structure)
        blocked = accumulator.means.without_gradient
        if blocked and pl_module.automatic_optimization:
            with training_batches(trainer, pl_module, 1) as batches, losses_of(pl_module) as loss:
                for batch in batches:
                    refuse_blocked(pl_module, structure, blocked, batch, loss)
        found = accumulator.compute()
        return {name: accumulator.normalise(found[name]) for name in structure.groups}

    def rehearse(self, pl_module: LightningModule, structure: Structure, batch: Any) -> None:
        """Warn of what no gradient reaches on one batch: other steps may show it, or the pruning step refuses it."""
        if not pl_module.automatic_optimization:
            return
        self.otherwise.traces = self.traces
        with failures_suppressed():  # of a way of scoring that may not be taken
            try:
                self.otherwise.rehearse(pl_module, structure, batch)
            except NoGradientError as error:
                rank_zero_warn(
                    f"On the first training batch: {error} The pruning step will be refused unless a later batch shows "
                    "them to it."
                )

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Start from nothing, or from what a checkpoint brought."""
        self.rest()
        accumulator = accumulator_for(self.criterion)
        self._hooks.enter_context(accumulator.watch(pl_module, structure))
        if self._brought is not None:
            accumulator.means.take_up(self._brought)
            self._brought = None
        self._versions = _versions(pl_module)
        self._accumulator = accumulator

    def rest(self) -> None:
        """Stop gathering."""
        self._hooks.close()
        self._accumulator = None

    @property
    def ready(self) -> bool:
        """Whether anything was seen since the last pruning step."""
        return self._accumulator is not None and self._accumulator.means.has_seen

    def unseen(self) -> list[str]:
        """Return the groups that only a loss on batches of their own could show."""
        means = None if self._accumulator is None else self._accumulator.means
        if means is None:
            return []
        names = [name for name, unseen in zip(means.names, means.unseen.tolist(), strict=True) if unseen]
        return list(dict.fromkeys(name.partition("/")[0] for name in names))

    def blind(self, pl_module: LightningModule) -> bool:
        """Return whether weights have changed and nothing of it was seen."""
        if self._versions is None:
            self._versions = _versions(pl_module)
        return self._accumulator is not None and not self.ready and self._versions != _versions(pl_module)

    def after_split(self) -> None:
        """Count the versions of the new parameters from the next look on."""
        self._versions = None

    def gathered(self) -> dict[str, list[Any]] | None:
        """Return the sums of this process."""
        return None if self._accumulator is None else self._accumulator.means.gathered()

    def take_up(self, gathered: dict[str, list[Any]] | None) -> None:
        """Keep what a checkpoint brought until the model is traced."""
        self._brought = gathered

    def before_backward(self, loss: Tensor) -> None:
        """Show the graph of a loss."""
        if self._accumulator is not None:
            self._accumulator.before_backward(loss)

    def after_backward(self, trainer: Trainer) -> None:
        """Show the gradients of one backward pass."""
        if self._accumulator is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._accumulator.after_backward(1.0 if scaler is None else scaler.get_scale())

    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show gradients accumulated, averaged over processes and unscaled, of what this optimizer trains."""
        if self._accumulator is None:
            return
        mine: set[int] = set()
        others: set[int] = set()
        for other in trainer.optimizers:
            (mine if _same(other, optimizer) else others).update(map(id, _trained(other)))
        # what other optimizers train may hold gradients of an earlier pass
        parameters = dict(pl_module.named_parameters())
        gradients = {name: parameter.grad for name, parameter in parameters.items() if id(parameter) in mine}
        elsewhere = {name for name, parameter in parameters.items() if id(parameter) in others - mine}
        self._accumulator.before_step(gradients, elsewhere)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what belongs to this process alone."""
        return {**self.__dict__, "_accumulator": None, "_hooks": ExitStack()}


def gathering_for(criterion: Criterion, batches: int = 8, layers: bool = False) -> Gathering:
    """Return what gathers for a criterion: over the run where training steps show it, else when a cut is due.

    With ``layers`` always when a cut is due: what the whole model showed does not hold for copies without some layers.
    """
    accumulator = accumulator_for(criterion)
    over_the_run = accumulator.looks_at and not layers
    gathering = OverTheRun(criterion, batches) if over_the_run else AtTheCut(criterion, batches)
    gathering.adding_up = accumulator.adds_up
    return gathering


def _versions(pl_module: LightningModule) -> list[int]:
    return [parameter._version for parameter in pl_module.parameters()]


def _same(one: Optimizer, other: Optimizer) -> bool:
    return one is other or getattr(other, "optimizer", other) is one


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
