"""Masks weights of a model in a run, and keeps them at zero; which, another object chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_prune.algorithms.schedules import FewUnits, Schedule
from lightning_prune.callbacks.engine.averaging import averaged_copies
from lightning_prune.callbacks.engine.clock import share_due
from lightning_prune.callbacks.engine.networks import networks_left_alone
from lightning_prune.callbacks.engine.processes import refuse_apart
from lightning_prune.callbacks.engine.refusals import (
    refuse_foreign,
    refuse_masks,
    refuse_not_finite,
    refuse_shared,
    refuse_unmaskable,
)
from lightning_prune.callbacks.engine.strategy import Run, Strategy
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval
from lightning_prune.callbacks.engine.weight_arguments import WeightArguments
from lightning_prune.callbacks.engine.weight_choice import MaskedWeights, WeightChoice
from lightning_prune.model.bits import pack_bits
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import part_of
from lightning_prune.pruning.find_weights import warning_of
from lightning_prune.pruning.plan import Plan, count_params
from lightning_prune.pruning.weights import weight_count, weights_to_prune
from lightning_prune.reports import Goal
from lightning_prune.surgery import PackedMasks, recipe_of
from lightning_prune.surgery.masks import Masks, unpacked


class WeightMasking(Strategy):
    """The strategy of the callbacks that set weights to zero and keep them there.

    Args:
        arguments: What the user asked for.
        choice: Chooses the weights, and does what else belongs to a pruning step.
    """

    def __init__(self, arguments: WeightArguments, choice: WeightChoice) -> None:
        self.arguments: WeightArguments = arguments
        self.choice = choice
        self.params = 0  # of the dense model
        self.in_run: MaskedWeights | None = None
        self._packed: PackedMasks = {}  # as checkpoints hold them; in a run, its masks say the same

    @property
    def own(self) -> MaskedWeights:
        """The weights in this run."""
        assert self.in_run is not None  # set when training begins
        return self.in_run

    def check_schedule(self, where: str, schedule: Schedule) -> None:
        """Refuse schedules that count units."""
        if isinstance(schedule, FewUnits):
            raise ValueError(
                f"{where}(schedule={schedule!r}): it counts filters and neurons, and weights leave here. "
                "Use Linear or another with by='steps'."
            )

    def refuse(self, run: Run) -> None:
        """Refuse a run in which masks cannot hold."""
        refuse_masks(run.where, run.trainer, run.module)
        removing = [member for member in run.members if isinstance(member.strategy, UnitRemoval)]
        if self.arguments.pattern is not None and removing:
            raise PruningError(
                f"{run.where}(pattern={self.arguments.pattern!r}) and {removing[0].where} contradict: when "
                "channels leave, what is left of their groups no longer keeps to the pattern. Remove the channels in a "
                "run before."
            )
        self.choice.refuse(run)

    @property
    def needs_whole_model(self) -> bool:  # type: ignore[override]
        """Whether weights are chosen by what the model computes, or drawn."""
        return self.choice.needs_whole_model

    def after_split(self) -> None:
        """Hold the masks on the parameters that are there now."""
        if self.in_run is not None:
            self.in_run.masks.renew()

    def reads_batches(self, pl_module: LightningModule) -> bool:
        """Return whether weights are chosen on training batches."""
        return self.choice.reads_batches

    def prepare(self, run: Run, batch: Any | None) -> bool:
        """Find the weights, restore the masks that the model carries, and hold them from now on."""
        arguments, module, optimizers = self.arguments, run.module, run.trainer.optimizers
        refuse_unmaskable(run.where, optimizers)
        alone = networks_left_alone(run, arguments.named)
        part = part_of(module, arguments.module)
        to_prune = weights_to_prune(
            module, arguments.amount, arguments.parameters, arguments.ignore, arguments.pattern, arguments.scope, part,
            alone,
        )  # fmt: skip
        refuse_not_finite(run.where, module, to_prune.weights)
        self.in_run = MaskedWeights(to_prune, Masks(module), arguments.masks_gradients(run.trainer, module))
        self._refuse_overlap(run)
        if run.own.clock.progress == 0:  # a run that is resumed has said so
            for name, reason in to_prune.stay.items():
                rank_zero_warn(f"{run.where}: {name} stays dense: {reason}.")
            warning = warning_of(module, to_prune.others)
            if warning:
                rank_zero_warn(f"{run.where}: {warning}")
        self._packed = {**self._carried(run), **self._packed}
        keep = unpacked(self._packed)
        refuse_foreign(run.where, module, keep)
        self.own.masks.set_masks_(keep)
        self.own.masks.hold(optimizers)
        self._count()
        self.params = self.params or count_params(module)
        self.choice.prepare(run, self.own)
        return True

    def prune_to(self, run: Run, progress: float) -> None:
        """Mask weights up to the sparsity that the schedule asks for at ``progress``."""
        own = self.own
        own.to_prune = own.to_prune.found_anew(run.module)
        refuse_not_finite(run.where, run.module, own.to_prune.weights)
        due = share_due(own.to_prune.amount, run.own.clock.schedule, progress)
        keep = _agreed(run.trainer, self.choice.choose(run, own, due, progress))
        run.before_step()
        own.masks.set_masks_(keep, run.trainer.optimizers)
        self._changed()
        for name in (count.name for count in own.counts if not count.stays):
            rank_zero_warn(
                f"{run.where}: nothing is left of {name}, so nothing passes it. Ask for less, keep it "
                "out by ignore=, or take the same share of every layer by scope='layer'."
            )
        self.choice.after_masking(run, progress)
        for copy in averaged_copies(run.trainer):
            own.masks.apply_(copy)
        if isinstance(run.trainer.strategy.model, DistributedDataParallel):
            refuse_apart(run.where, run.trainer, run.module)

    def after_cut(self, run: Run, plan: Plan) -> None:
        """Follow a cut that another callback made."""
        if self.in_run is not None:
            self.in_run.to_prune = self.in_run.to_prune.found_anew(run.module)
            self.in_run.masks.follow_(plan.cut.kept)
            self._changed()

    def after_epoch_start(self, run: Run) -> None:
        """Hold the masks after the steps of optimizers that were added since, too."""
        if self.in_run is not None:
            self.in_run.masks.hold(run.trainer.optimizers)

    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of masked weights, where that makes a difference to the others."""
        if self.in_run is not None and self.in_run.masks_gradients:
            self.in_run.masks.mask_gradients_(optimizer)

    def after_batch(self, run: Run) -> None:
        """Pass the end of a training batch on to the choice."""
        self.choice.after_batch(run)

    def after_training(self, run: Run) -> None:
        """Remove the sign of zeros."""
        for model in (run.module, *averaged_copies(run.trainer)):
            self.own.masks.apply_(model)

    def goal(self, run: Run) -> Goal:
        """Return what was asked and what is reached now, of the weights that the amounts name."""
        amount = self.own.to_prune.amount
        asked, pruned, size = 0.0, 0, 0
        for count in self.own.counts:
            share = amount.get(count.name, 0.0) if isinstance(amount, Mapping) else amount
            asked += share * count.size
            pruned += count.size - count.stays
            size += count.size
        return Goal(run.where, "weights", asked / max(size, 1), pruned / max(size, 1))

    def rollback_state(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": dict(self._packed)}

    def rollback(self, run: Run, state: dict[str, Any]) -> None:
        """Follow a model that is as it was before the last pruning step."""
        self.own.to_prune = self.own.to_prune.found_anew(run.module)
        self.own.masks.lift()
        self.own.masks.set_masks_(unpacked(state["masks"]))
        self._changed()

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, packed to bits, and what the choice saves."""
        return {"masks": dict(self._packed), "params": self.params, **self.choice.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._packed = {name: [packed, list(shape)] for name, (packed, shape) in state["masks"].items()}
        self.params = state["params"]
        self.choice.load_state_dict(state)

    def reset(self) -> None:
        """Start anew, for another model."""
        self._packed, self.params = {}, 0
        self.choice.reset()

    def release(self) -> None:
        """Remove the hooks from the optimizers."""
        if self.in_run is not None:
            self.in_run.masks.release()
        self.in_run = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the run, to which the model belongs."""
        return {**self.__dict__, "in_run": None}

    def _changed(self) -> None:
        self._packed = self.own.masks.packed()
        self._count()

    def _count(self) -> None:
        """Count what is kept of each weight; without a mask all of it is."""
        keep, weights = self.own.masks.keep, self.own.to_prune.weights
        counts = [weight_count(name, weight.parameter, keep.get(name)) for name, weight in weights.items()]
        self.own.counts = tuple(counts)

    def _carried(self, run: Run) -> PackedMasks:
        """Return the masks that the model carries: on our weights, or on those of no callback."""
        ours = self.own.to_prune.weights
        theirs: set[str] = set()
        maskings = run.strategies(WeightMasking)
        for masking in maskings:
            if masking.in_run is not None:
                theirs |= masking.in_run.to_prune.weights.keys()
        adopts = maskings[-1] is self  # all others have begun
        masks = recipe_of(run.module).masks
        return {name: mask for name, mask in masks.items() if name in ours or (adopts and name not in theirs)}

    def _refuse_overlap(self, run: Run) -> None:
        ours = self.own.to_prune.weights.keys()
        for other in run.members:
            if other is run.own or not isinstance(other.strategy, WeightMasking) or other.strategy.in_run is None:
                continue
            shared = ours & other.strategy.in_run.to_prune.weights.keys()
            refuse_shared(other.callback, run.own.callback, shared, "the weights between them by parameters=, ignore=")


def _agreed(trainer: Trainer, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the first process's choice on all processes."""
    if trainer.world_size == 1:
        return keep
    packed: PackedMasks = {name: [pack_bits(kept), list(kept.shape)] for name, kept in keep.items()}
    return unpacked(trainer.strategy.broadcast(packed))
