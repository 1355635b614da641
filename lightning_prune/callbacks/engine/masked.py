"""What the callbacks share that zero single weights: which weights, their masks in a run, and what is logged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_prune.algorithms.schedules import FewUnits, Schedule
from lightning_prune.callbacks.engine.averaging import averaged_copies
from lightning_prune.callbacks.engine.packages import overrides
from lightning_prune.callbacks.engine.probation import guards
from lightning_prune.callbacks.engine.processes import refuse_apart
from lightning_prune.callbacks.engine.refusals import (
    refuse_foreign,
    refuse_masks,
    refuse_not_finite,
    refuse_unmaskable,
)
from lightning_prune.callbacks.engine.run import Pruning, pruning_callbacks
from lightning_prune.callbacks.engine.structured import structured_callbacks
from lightning_prune.model.bits import pack_bits
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Amount
from lightning_prune.pruning.plan import count_params
from lightning_prune.pruning.weights import (
    ToPrune,
    WeightCount,
    WeightScope,
    check_weight_arguments,
    weight_count,
    weights_to_prune,
)
from lightning_prune.reports import History
from lightning_prune.surgery import Kept, PackedMasks, recipe_of
from lightning_prune.surgery.masks import Masks, unpacked

__all__ = ["MaskedPruning", "masking_callbacks"]

_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, optim.ASGD, optim.Rprop,
)  # fmt: skip


@dataclass
class _InRun:
    """What belongs to one run alone."""

    to_prune: ToPrune
    masks: Masks
    masks_gradients: bool
    counts: tuple[WeightCount, ...] = field(default_factory=tuple)


class MaskedPruning(Pruning):
    """Base of the callbacks that set weights to zero and keep them there while a model trains; each adds its choice."""

    def __init__(
        self,
        amount: float | dict[str, float] | None,
        scope: WeightScope,
        schedule: Schedule | None,
        parameters: Sequence[str] | None,
        ignore: Sequence[str],
        pattern: str | None,
        mask_gradients: bool | Literal["auto"],
    ) -> None:
        """Check the arguments and keep them."""
        where = type(self).__name__
        check_weight_arguments(where, amount, scope, "magnitude", parameters, ignore, pattern)
        if mask_gradients not in (True, False, "auto"):
            raise ValueError(f"{where}(mask_gradients={mask_gradients!r}): choose True, False or 'auto'.")
        super().__init__(schedule)
        if isinstance(schedule, FewUnits):
            raise ValueError(
                f"{type(self).__name__}(schedule={schedule!r}): it counts filters and neurons, and weights leave here. "
                "Use Linear or another with by='steps'."
            )
        self.amount = amount
        self.scope: WeightScope = scope
        self.parameters = None if parameters is None else list(parameters)
        self.ignore = list(ignore)
        self.pattern = pattern
        self.mask_gradients: bool | Literal["auto"] = mask_gradients
        self._masks: PackedMasks = {}  # as checkpoints hold them; in a run, those of _run say the same
        self._params = 0  # of the dense model
        self._run: _InRun | None = None

    @abstractmethod
    def choose(self, pl_module: LightningModule, due: Amount, progress: float) -> dict[str, Tensor]:
        """Return what of every weight stays when ``due`` of it is gone, as bool of its shape, by name."""

    def after_masking(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Do what else belongs to a cut, once its masks have fallen."""

    @property
    def about(self) -> str:
        """Name the class and the weights that this callback is about."""
        named = sorted(self.amount) if isinstance(self.amount, Mapping) else []
        return self._generate_state_key(amount=named, parameters=self.parameters, ignore=self.ignore)

    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run in which masks cannot hold."""
        refuse_masks(type(self).__name__, trainer, pl_module)
        if self.pattern is not None and (others := structured_callbacks(trainer)):
            raise PruningError(
                f"{type(self).__name__}(pattern={self.pattern!r}) and {type(others[0]).__name__} contradict: when "
                "channels leave, what is left of their groups no longer keeps to the pattern. Remove the channels in a "
                "run before."
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> bool:
        """Find the weights, take up the masks that the model carries, and hold them from now on."""
        refuse_unmaskable(type(self).__name__, trainer.optimizers)
        to_prune = weights_to_prune(pl_module, self.amount, self.parameters, self.ignore, self.pattern)
        refuse_not_finite(type(self).__name__, pl_module, to_prune.weights)
        self._run = _InRun(to_prune, Masks(pl_module), self._needs_masked_gradients(trainer, pl_module))
        self._refuse_shared(trainer)
        for name, reason in to_prune.stay.items() if self._course.progress == 0 else ():
            rank_zero_warn(f"{type(self).__name__}: {name} stays dense: {reason}.")
        self._masks = {**self._carried(trainer, pl_module), **self._masks}
        keep = unpacked(self._masks)
        refuse_foreign(type(self).__name__, pl_module, keep)
        self._run.masks.let_fall_(keep)
        self._run.masks.hold(trainer.optimizers)
        self._count()
        self._params = self._params or count_params(pl_module)
        return True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due, and hold the masks after the steps of optimizers that have come since, too."""
        super().on_train_epoch_start(trainer, pl_module)
        self._in_run.masks.hold(trainer.optimizers)

    def reach(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Mask what is due."""
        amount = self._in_run.to_prune.amount
        due: Amount = (
            {name: self.schedule.sparsity(progress, share) for name, share in amount.items()}
            if isinstance(amount, Mapping)
            else self.schedule.sparsity(progress, amount)
        )
        refuse_not_finite(type(self).__name__, pl_module, self._in_run.to_prune.weights)
        keep = _agreed(trainer, self.choose(pl_module, due, progress))
        for guard in guards(trainer):
            guard.before_cut(trainer, pl_module)
        self._in_run.masks.let_fall_(keep, trainer.optimizers)
        self._noted()
        for name in (count.name for count in self._in_run.counts if not count.stays):
            rank_zero_warn(
                f"{type(self).__name__}: nothing is left of {name}, so nothing passes it. Ask for less, keep it "
                "out by ignore=, or take the same share of every layer by scope='layer'."
            )
        self.after_masking(trainer, pl_module, progress)
        for copy in averaged_copies(trainer):
            self._in_run.masks.apply_(copy)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            refuse_apart(type(self).__name__, trainer, pl_module)

    def follow(self, kept: Kept) -> None:
        """Follow a cut that another callback made."""
        if self._run is not None:
            self._run.masks.follow_(kept)
            self._noted()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of masked weights before they are clipped, where that makes a difference to the others."""
        if self._run is not None and self._run.masks_gradients:
            self._run.masks.mask_gradients_(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the sign off zeros, and print what became of the weights."""
        super().on_train_end(trainer, pl_module)
        for model in (pl_module, *averaged_copies(trainer)):
            self._in_run.masks.apply_(model)

    def metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return how many weights and parameters are left."""
        callbacks = masking_callbacks(trainer)
        if callbacks[-1] is not self:
            return {}
        counts = [count for callback in callbacks for count in callback._in_run.counts]
        size, gone = sum(count.size for count in counts), sum(count.size - count.stays for count in counts)
        nonzero = count_params(pl_module) - gone
        values = {
            "prune/weight_sparsity": gone / size,
            "prune/nonzero": float(nonzero),
            "prune/nonzero_kept": nonzero / self._params,
        }
        return values if structured_callbacks(trainer) else {**values, "prune/sparsity": gone / size}

    def describe(self, trainer: Trainer, pl_module: LightningModule, history: History) -> None:
        """Tell what is left of every weight."""
        callbacks = masking_callbacks(trainer)
        if callbacks[-1] is self:
            history.weights = [count for callback in callbacks for count in callback._in_run.counts]
            history.dense = {name: why for c in callbacks for name, why in c._in_run.to_prune.stay.items()}

    def remembered(self) -> dict[str, Any]:
        """Return the masks, packed to bits."""
        return {"masks": dict(self._masks), "params": self._params}

    def take_up(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        self._masks = {name: [packed, list(shape)] for name, (packed, shape) in remembered["masks"].items()}
        self._params = remembered["params"]

    def forget(self) -> None:
        """Start anew: the module is another one."""
        self._masks, self._params = {}, 0

    def undoable(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": dict(self._masks)}

    def undo(self, pl_module: LightningModule, undoable: dict[str, Any]) -> None:
        """Follow a model that was given back what the last masks hid."""
        self._in_run.masks.lift()
        self._in_run.masks.let_fall_(unpacked(undoable["masks"]))
        self._noted()

    def detach(self, pl_module: LightningModule) -> None:
        """Take the hooks off the optimizers."""
        if self._run is not None:
            self._run.masks.release()
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the run, to which the model belongs."""
        return {**super().__getstate__(), "_run": None}

    @property
    def _in_run(self) -> _InRun:
        assert self._run is not None  # set when training begins
        return self._run

    def _noted(self) -> None:
        self._masks = self._in_run.masks.packed()
        self._count()

    def _count(self) -> None:
        """Count what stays of each weight; without a mask all of it does."""
        run = self._in_run
        keep = run.masks.keep
        run.counts = tuple(
            weight_count(name, weight.parameter, keep.get(name)) for name, weight in run.to_prune.weights.items()
        )

    def _carried(self, trainer: Trainer, pl_module: LightningModule) -> PackedMasks:
        """Return the masks that lie on the model already: on our weights, or on what no callback is about."""
        callbacks = masking_callbacks(trainer)
        masks, ours = recipe_of(pl_module).masks, self._in_run.to_prune.weights
        theirs = {name for callback in callbacks if callback._run for name in callback._run.to_prune.weights}
        adopts = callbacks[-1] is self  # all others have begun
        return {name: mask for name, mask in masks.items() if name in ours or (adopts and name not in theirs)}

    def _refuse_shared(self, trainer: Trainer) -> None:
        ours = self._in_run.to_prune.weights
        for other in masking_callbacks(trainer):
            if other is not self and other._run and (shared := ours.keys() & other._run.to_prune.weights.keys()):
                raise PruningError(
                    f"{other!r} and {self!r} both prune {min(shared)}, so the amount of one contradicts the other's. "
                    "Use one callback, or part the weights between them by parameters=, ignore= or amount={pattern: "
                    "...}."
                )

    def _needs_masked_gradients(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Tell whether gradients of masked weights would change steps of the others."""
        if self.mask_gradients != "auto":
            return bool(self.mask_gradients)
        clips = bool(trainer.gradient_clip_val) or overrides(pl_module, "configure_gradient_clipping")
        return clips or any(type(optimizer) not in _ELEMENTWISE for optimizer in trainer.optimizers)


def masking_callbacks(trainer: Trainer) -> list[MaskedPruning]:
    """Return the trainer's callbacks that mask."""
    return [callback for callback in pruning_callbacks(trainer) if isinstance(callback, MaskedPruning)]


def _agreed(trainer: Trainer, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let all processes do as the first does."""
    if trainer.world_size == 1:
        return keep
    packed: PackedMasks = {name: [pack_bits(stays), list(stays.shape)] for name, stays in keep.items()}
    return unpacked(trainer.strategy.broadcast(packed))
