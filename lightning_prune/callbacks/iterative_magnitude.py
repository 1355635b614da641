"""Prunes single weights by their size while a model trains, gradually, in rounds, or with rewinding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.averaging import restart_averages_
from lightning_prune.callbacks.engine.masked import MaskedPruning, masking_callbacks
from lightning_prune.callbacks.engine.probation import guards
from lightning_prune.callbacks.engine.rewind import draw_anew_, remember, rewind_
from lightning_prune.callbacks.engine.structured import structured_callbacks
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Amount
from lightning_prune.pruning.weights import choose_weights, score_weights, shuffled

__all__ = ["IterativeMagnitudePruning"]

_Control = Literal["reinitialize", "shuffle"]


class IterativeMagnitudePruning(MaskedPruning):
    """Set the weights that are smallest in absolute value to zero while the model trains, and keep them there.

    Sparsity is absolute: ``amount`` is what is zero in the end, of all weights there are. Nothing is wrapped or
    renamed: after each step of the optimizer the weights are multiplied by their masks, so that they are exactly zero
    in every forward pass, in validation, in checkpoints and in averages of the weights. At each cut the optimizer
    forgets what it remembered of the weights that go.

    With ``rewind_to`` each cut of the schedule ends a round: the weights that are left, all other parameters and
    buffers, optimizer, learning rates and their schedulers go back to where they were then, so let ``every`` be as long
    as a training. ``Geometric`` takes the same share of what is left in every round.

    Logged every epoch: ``prune/weight_sparsity`` (share of these weights that is zero), ``prune/nonzero`` and
    ``prune/nonzero_kept`` (parameters of the whole model that are not masked, as number and as share); and
    ``prune/sparsity``, which is the first of these unless a callback of the run removes units and speaks of them.

    Args:
        amount: Fraction, in [0, 1), of the weights that shall be zero in the end; or, by pattern of names of modules or
            parameters, of these: ``{"fc1": 0.92, "fc3": 0.74}`` (what no pattern names stays dense). By default 0.5, or
            what ``pattern`` says.
        scope: ``global`` compares weights across layers; ``layer`` takes the same share of every layer.
        schedule: When how much of it leaves; by default everything before the first batch, as when a trained model is
            pruned and fine-tuned.
        parameters: Patterns of modules, whose linear and convolution weights are meant, or of parameters; by default
            all weights of linear and convolutional layers. Biases, norms and embeddings stay.
        ignore: Patterns of modules or parameters that stay dense.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N stay in the end (see
            :func:`~lightning_prune.prune_weights`).
        rewind_to: Optimizer steps after which training stood where each cut takes it back to; 0 is the initialisation.
            By default training goes on with the weights as they are. Checkpoints hold what was there.
        control: What the last round does instead, to compare: ``reinitialize`` draws the weights anew (with
            ``reset_parameters`` of their modules), ``shuffle`` puts the masks at random places of each weight.
        mask_gradients: Whether gradients of masked weights are zeroed before a step, too. ``auto`` does so where it
            makes a difference to the weights that are left: if gradients are clipped, or for optimizers that look at
            more than each weight by itself.

    Raises:
        ValueError: If an argument is out of range, or two contradict.
        TypeError: If an argument is of a wrong kind.

    Examples:
        >>> from lightning_prune import Geometric
        >>> rounds = Geometric(start=10, end=40, every=10)  # four rounds after the first ten epochs
        >>> IterativeMagnitudePruning(amount=1 - 0.8**4, schedule=rounds, rewind_to=0).rewind_to
        0

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015 (arXiv:1506.02626);
        Zhu and Gupta, To Prune, or Not to Prune, 2017 (arXiv:1710.01878);
        Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019 (arXiv:1803.03635);
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (arXiv:1912.05671).
    """

    def __init__(
        self,
        amount: float | dict[str, float] | None = None,
        scope: Literal["global", "layer"] = "global",
        schedule: Schedule | None = None,
        parameters: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        pattern: str | None = None,
        rewind_to: int | None = None,
        control: Literal["reinitialize", "shuffle"] | None = None,
        mask_gradients: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(amount, scope, schedule, parameters, ignore, pattern, mask_gradients)
        where = type(self).__name__
        if rewind_to is not None and (isinstance(rewind_to, bool) or not isinstance(rewind_to, int) or rewind_to < 0):
            raise ValueError(f"{where}(rewind_to={rewind_to!r}): it is a number of optimizer steps, from 0.")
        if control not in (None, "reinitialize", "shuffle"):
            raise ValueError(f"{where}(control={control!r}): choose 'reinitialize', 'shuffle' or None.")
        if control is not None and rewind_to is None:
            raise ValueError(f"{where}(control={control!r}): controls are for runs that rewind. Give rewind_to, too.")
        if rewind_to is not None and self.schedule.by == "steps" and _first_cut(self.schedule) < rewind_to:
            raise ValueError(
                f"{where}(schedule={schedule!r}, rewind_to={rewind_to}): the first cut, at step "
                f"{_first_cut(self.schedule)}, comes before the step that it rewinds to. Rewind to an earlier one."
            )
        self.rewind_to = rewind_to
        self.control: _Control | None = control
        self._early: dict[str, Any] | None = None  # the run as it stood at rewind_to
        self._seed: int | None = None  # of the run that began, which one that resumes it may not have

    def choose(self, pl_module: LightningModule, due: Amount, progress: float) -> dict[str, Tensor]:
        """Return what stays when the smallest leave; what has gone stays so."""
        weights = self._in_run.to_prune.weights
        alive = self._in_run.masks.keep
        keep = choose_weights(weights, score_weights(weights, "magnitude"), alive, due, self.scope, self.pattern)
        return shuffled(keep, self._known_seed) if self.control == "shuffle" and progress >= 1.0 else keep

    def after_masking(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Go back to where the round began."""
        if self._early is None:
            return
        rewind_(trainer, pl_module, self._early)
        if self.control == "reinitialize" and progress >= 1.0:
            draw_anew_(pl_module, self._known_seed)
        for callback in masking_callbacks(trainer):
            callback._in_run.masks.clear_(trainer.optimizers)
        restart_averages_(trainer, pl_module)

    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run in which masks cannot hold, or which cannot go back."""
        super().refuse(trainer, pl_module)
        if self.rewind_to is None:
            return
        others = [*guards(trainer), *structured_callbacks(trainer), *_averaging_late(trainer)]
        if others:
            raise PruningError(
                f"IterativeMagnitudePruning(rewind_to={self.rewind_to}) and {type(others[0]).__name__} contradict: one "
                "takes the whole run back to where it was, and the other goes by how far it has come. Use one of them."
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> bool:
        """Begin to mask; remember the run as it stands, if this is where rounds start."""
        super().begin(trainer, pl_module, batch)
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
        if self.rewind_to is None or self._early is not None:
            return True
        if trainer.global_step > self.rewind_to:
            raise PruningError(
                f"IterativeMagnitudePruning(rewind_to={self.rewind_to}): training starts at step "
                f"{trainer.global_step}, so what was there is not known. Start anew, or rewind to a step to come."
            )
        first = _first_cut(self.schedule)
        if self.schedule.by == "epochs":
            first *= math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if first < self.rewind_to:
            raise PruningError(
                f"IterativeMagnitudePruning(rewind_to={self.rewind_to}): the first cut of {self.schedule}, at step "
                f"{first}, comes before. Rewind to an earlier step, or let it come later."
            )
        self._remember(trainer, pl_module)
        return True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember the run as it stands, if this is where rounds start."""
        super().on_train_batch_end(trainer, pl_module)
        self._remember(trainer, pl_module)

    def remembered(self) -> dict[str, Any]:
        """Return masks, and the run as it stood where rounds start."""
        return {**super().remembered(), "early": self._early, "seed": self._seed}

    def take_up(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        super().take_up(remembered)
        self._early, self._seed = remembered["early"], remembered["seed"]

    def forget(self) -> None:
        """Start anew: the module is another one."""
        super().forget()
        self._early = self._seed = None

    @property
    def _known_seed(self) -> int:
        assert self._seed is not None  # set when training begins
        return self._seed

    def _remember(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rewind_to is not None and self._early is None and trainer.global_step >= self.rewind_to:
            self._early = remember(trainer, pl_module)


def _first_cut(schedule: Schedule) -> int:
    """Return the moment before which the first cut falls."""
    return next(moment for moment in range(schedule.last + 1) if schedule.progress(moment) > 0)


def _averaging_late(trainer: Trainer) -> list[Callback]:
    """Return the callbacks that average weights of a late part of the training, with a schedule of their own."""
    names = ("StochasticWeightAveraging",)
    return [callback for callback in trainer.callbacks if type(callback).__name__ in names]  # type: ignore[attr-defined]
