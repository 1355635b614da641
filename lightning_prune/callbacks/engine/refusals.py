"""Says which runs cannot be pruned, before they start."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.clock import first_moment
from lightning_prune.callbacks.engine.gathering import Gathering
from lightning_prune.callbacks.engine.packages import callbacks_named, is_a
from lightning_prune.callbacks.engine.sharding import is_model_parallel, refuse_tensor_parallel
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import whole
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.loading import Prunable

__all__ = [
    "first_pruning_step", "refuse_blind", "refuse_foreign", "refuse_masks", "refuse_misfits", "refuse_not_finite",
    "refuse_other_part", "refuse_removal", "refuse_run", "refuse_shared", "refuse_short", "refuse_twins",
    "refuse_unmaskable", "refuse_unseen", "steps_in_epoch",
]  # fmt: skip

_COPYING = "WeightAveraging", "StochasticWeightAveraging", "DistillFromDense"


def refuse_removal(where: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse strategies and other callbacks beside which no unit can leave.

    Raises:
        PruningError: Saying what to use instead.
    """
    if not is_model_parallel(trainer):
        _refuse_shards(where, trainer, "from which no unit can be cut", ", then shard the slim model")
    for copying in callbacks_named(trainer, *_COPYING):
        refuse_tensor_parallel(where, trainer, f"{type(copying).__name__} keeps a copy that no cut follows")
    _refuse_spawned(where, trainer, pl_module, "a model that was cut there does not fit into the one that waits here")
    _refuse_model_pruning(where, trainer, "cuts")
    if is_a(trainer.strategy.checkpoint_io, "AsyncCheckpointIO"):
        raise PruningError(
            f"{where}: the copies that AsyncCheckpointIO writes lose what a state dict says of itself, so no "
            "checkpoint of the slim model could be loaded. Leave the plugin out."
        )


def refuse_masks(where: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse strategies and other callbacks beside which masks cannot hold.

    Raises:
        PruningError: Saying what to use instead.
    """
    if not is_model_parallel(trainer):
        _refuse_shards(where, trainer, "on which no mask of the whole fits")
    _refuse_spawned(where, trainer, pl_module, "what is known of the masks ends with them")
    _refuse_model_pruning(where, trainer, "masks")


def refuse_twins(mine: Callback, others: Iterable[Callback]) -> None:
    """Refuse two callbacks of one class that prune the same parts of a model: a checkpoint knows one of them.

    Raises:
        PruningError: Naming both.
    """
    for other in others:
        if other is not mine and other.state_key == mine.state_key:
            raise PruningError(
                f"{other!r} and {mine!r} are about the same parts of the model, so the amount of one contradicts the "
                "other's. Use one callback, with one schedule, or part the model between them by ignore= or "
                "amount={pattern: ...}."
            )


def refuse_not_finite(where: str, pl_module: LightningModule, names: Iterable[str]) -> None:
    """Refuse to decide by weights that are no numbers: they would count as the least important, and never recover.

    Raises:
        PruningError: Naming the first of them.
    """
    own = named_tensors(pl_module)
    for name in dict.fromkeys(names):
        if not isinstance(own[name], nn.Parameter) or own[name].is_meta:
            continue
        weight = whole(own[name])
        if not weight.isfinite().all():
            count = int((~weight.isfinite()).sum())
            raise PruningError(
                f"{where}: {count} of {weight.numel()} entries of {name} are NaN or infinite, so no choice among them "
                "means anything. Start from weights that are finite, or from the last checkpoint that was, and lower "
                "the learning rate or clip gradients."
            )


def refuse_unmaskable(where: str, optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that look at the model within a step, where no mask holds.

    Raises:
        PruningError: For LBFGS.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise PruningError(
            f"{where}: LBFGS runs the model several times within a step, with weights that no mask has seen. "
            "Train with a first-order optimizer, such as SGD or AdamW, while pruning."
        )


def refuse_run(where: str, schedule: Schedule, trainer: Trainer) -> None:
    """Refuse a training whose stated length ends before the schedule.

    Raises:
        PruningError: Saying how long it takes.
    """
    stated = trainer.max_epochs if schedule.by == "epochs" else trainer.max_steps
    if not trainer.fast_dev_run and stated is not None and 0 < stated <= schedule.last:  # type: ignore[attr-defined]
        raise PruningError(
            f"{where}: {schedule} is complete only before {schedule.by[:-1]} {schedule.last} (counted from 0), but "
            f"training ends after max_{schedule.by}={stated}. End the schedule at {schedule.by[:-1]} {stated - 1} or "
            "before, or train for longer."
        )


def refuse_short(where: str, schedule: Schedule, trainer: Trainer) -> None:
    """Refuse a training that ends before the schedule, now that the length of an epoch is known.

    Raises:
        PruningError: Saying in which epoch or step it ends.
    """
    each = steps_in_epoch(trainer)
    if trainer.fast_dev_run or each is None:  # type: ignore[attr-defined]
        return
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if schedule.by == "epochs" and 0 < steps <= schedule.last * each:
        ends = f"max_steps={steps}, in epoch {math.ceil(steps / each) - 1}"
    elif schedule.by == "steps" and epochs is not None and 0 < epochs * each <= schedule.last:
        ends = f"max_epochs={epochs} of {each} steps, before step {epochs * each}"
    else:
        return
    raise PruningError(
        f"{where}: {schedule} is complete only before {schedule.by[:-1]} {schedule.last} (counted from 0), but "
        f"training ends after {ends}. End the schedule earlier, or train for longer."
    )


def first_pruning_step(schedule: Schedule, trainer: Trainer) -> int | None:
    """Return how many optimizer steps come before the first pruning step; None if the length of epochs is unknown."""
    moment = first_moment(schedule)
    if moment == 0 or schedule.by == "steps":
        return moment
    each = steps_in_epoch(trainer)
    return None if each is None else moment * each


def steps_in_epoch(trainer: Trainer) -> int | None:
    """Return the optimizer steps of an epoch, or None where these are known only once it is over.

    A training step that optimizes manually may step several optimizers, or none; loaders need not know their length;
    and a callback may change how many batches make a step.
    """
    manual = not trainer.lightning_module.automatic_optimization
    varies = bool(callbacks_named(trainer, "GradientAccumulationScheduler"))
    if manual or varies or not math.isfinite(trainer.num_training_batches):
        return None
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)  # the last window may be short


def refuse_foreign(where: str, pl_module: LightningModule, keep: Mapping[str, Tensor]) -> None:
    """Refuse masks that came with a checkpoint and are another model's.

    Raises:
        PruningError: Naming the first of them.
    """
    own = dict(pl_module.named_parameters())
    for name, stays in keep.items():
        shape = tuple(own[name].shape) if name in own else ()
        if stays.dim() != len(shape) or any(size not in (1, of) for size, of in zip(stays.shape, shape, strict=True)):
            here = f"of shape {shape}" if name in own else f"not there in {type(pl_module).__name__}"
            raise PruningError(
                f"{where}: the checkpoint holds a mask of shape {tuple(stays.shape)} for {name}, which is {here}: "
                "weights and masks are not of one model. Take up another checkpoint, or load the weights alone."
            )


def refuse_misfits(where: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse optimizers whose state belongs to other shapes: a fused one steps with it, and says nothing.

    Raises:
        PruningError: Naming the first parameter and its state.
    """
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    torchs = [optimizer for optimizer in trainer.optimizers if type(optimizer).__module__.startswith("torch.optim")]
    for optimizer in torchs:  # what others keep of a parameter may be of any shape
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                alike = isinstance(value, Tensor) and value.dim() == parameter.dim()
                if alike and any(size not in (1, own) for size, own in zip(value.shape, parameter.shape, strict=True)):
                    raise PruningError(
                        f"{where}: {type(optimizer).__name__} holds {key} of shape {tuple(value.shape)} for "
                        f"{names.get(id(parameter), 'a parameter')} of shape {tuple(parameter.shape)}: its state is "
                        "another model's. Take up a checkpoint whose weights and optimizer were saved together, or "
                        "load its weights alone, by load_from_checkpoint."
                    )


def refuse_blind(where: str, gathering: Gathering, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to wait for what steps that went by did not show.

    Raises:
        PruningError: Saying how a training step that optimizes manually lets its gradients be seen.
    """
    if not pl_module.automatic_optimization and gathering.blind(pl_module):
        raise PruningError(
            f"{where}: weights have moved, and of their {gathering.looks_at_training} nothing was seen. "
            f"{type(pl_module).__name__} optimizes manually: call self.manual_backward(loss) and step what "
            "self.optimizers() returns, not optimizers of torch, so that callbacks are told."
        )


def refuse_unseen(where: str, gathering: Gathering, pl_module: LightningModule) -> None:
    """Refuse to go on gathering what batches did not show, where no loss on other batches could show it.

    Raises:
        PruningError: Naming the groups.
    """
    unseen = [] if pl_module.automatic_optimization else gathering.unseen()
    if unseen:
        raise PruningError(
            f"{where}: the {gathering.looks_at_training} of {', '.join(unseen)} are not seen in the training step of "
            f"{type(pl_module).__name__}, which optimizes manually: what reads these channels is frozen while what "
            "makes them is trained, as by toggle_optimizer, or autograd does not show it. Use a criterion of weights, "
            f"such as TaylorFilterPruning(form='weights'), or name ignore={unseen!r}."
        )


def refuse_other_part(where: str, was: Any, now: Any) -> None:
    """Refuse to resume with another ``module=``, whose size before pruning is not known.

    Raises:
        PruningError: Naming both.
    """
    if was != now:
        raise PruningError(
            f"{where}: the checkpoint was pruned with module={was!r}, and this run has module={now!r}. Amounts are "
            "relative to the dense size of that part, which the checkpoint does not tell of another. Resume with the "
            "same module=, or load the weights alone, by load_from_checkpoint, and start a run from them."
        )


def refuse_shared(mine: Callback, other: Callback, shared: Collection[str], parted: str) -> None:
    """Refuse two callbacks that would each prune the same parts of a model.

    Raises:
        PruningError: Naming both, and the first part.
    """
    if shared:
        raise PruningError(
            f"{mine!r} and {other!r} both prune {min(shared)}, so the amount of one contradicts the other's. "
            f"Use one callback, or part {parted} or amount={{pattern: ...}}."
        )


def _refuse_shards(where: str, trainer: Trainer, why: str, then: str = "") -> None:
    if trainer.strategy.restore_checkpoint_after_setup:
        raise PruningError(
            f"{where}: {type(trainer.strategy).__name__} splits parameters into shards, {why}. Move to FSDP2 "
            f"(ModelParallelStrategy), or prune on one device or with strategy='ddp'{then}."
        )


def _refuse_model_pruning(where: str, trainer: Trainer, does: str) -> None:
    if callbacks_named(trainer, "ModelPruning"):
        raise PruningError(f"{where} and ModelPruning contradict: one {does} what the other wraps. Use one of them.")


def _refuse_spawned(where: str, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
    if hasattr(trainer.strategy.launcher, "_start_method") and not isinstance(pl_module, Prunable):
        kind = type(pl_module).__name__
        raise PruningError(
            f"{where}: {type(trainer.strategy).__name__} trains in processes that this one starts, and {why}. Use "
            f"strategy='ddp', from a script, or let {kind} take back what was cut: class {kind}(Prunable, "
            "LightningModule), with lightning_prune.Prunable."
        )
