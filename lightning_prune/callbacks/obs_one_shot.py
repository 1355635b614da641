"""Prunes weights once, by second-order surgery, after training or before one of its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_prune.algorithms.schedules import Moments, OneShot, Schedule
from lightning_prune.callbacks.engine.masked import MaskedPruning
from lightning_prune.callbacks.engine.processes import calibration_of, recalibrate_
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Amount
from lightning_prune.pruning.obs import Asked, LayerFit, Solver, plan_obs, refuse_beyond_reach, write_

__all__ = ["OBSOneShot"]


@dataclass(frozen=True)
class _AfterTraining(Schedule):
    """No moment of the training itself."""

    by: Moments = "epochs"

    def progress(self, moment: int) -> float:
        """Return that nothing is due."""
        return 0.0

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the share of the amount that the share of the cuts is."""
        return progress * amount

    @property
    def last(self) -> int:
        """No training is too short."""
        return 0


class OBSOneShot(MaskedPruning):
    """Set weights to zero once, and let the others of each layer make up for them, so that no retraining is needed.

    Every layer goes on to give, on some batches of the training data, what it gave before, as well as it can with what
    is left (:func:`~lightning_prune.prune_obs`): no labels are looked at. After training, or before a named epoch; what
    follows trains on with the zeros held. Checkpoints that were written before are dense: save one after ``fit`` by
    ``trainer.save_checkpoint``. To prune a checkpoint alone, give its path to ``fit`` with as many ``max_epochs`` as it
    has had.

    Logged as by :class:`IterativeMagnitudePruning`.

    Args:
        amount: Fraction, in [0, 1), of the weights that shall be zero; or, by pattern of names of modules or
            parameters, of these (what no pattern names stays dense). By default 0.5, or what ``pattern`` says.
        epoch: The epoch, counted from 0, before which it happens; by default after the training.
        scope: With one amount for all, ``global`` splits it over the layers so that the model's outputs change least;
            ``layer`` takes the same share of every layer.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N stay.
        solver: ``exact``, ``admm`` or ``blocked`` (see :func:`~lightning_prune.prune_obs`).
        sequential: Let each layer see what the pruned layers before it give.
        batches: Training batches of each process on which layers keep their outputs.
        damping: Share of its mean diagonal entry that is added to every Hessian's diagonal.
        parameters: Patterns of modules, whose linear and convolution weights are meant, or of parameters; by default
            all weights of linear and convolutional layers.
        ignore: Patterns of modules or parameters that stay dense.
        recalibrate: Whether BatchNorm's statistics are averaged anew on these batches afterwards. Their means follow
            what the weights behind them lose in any case.
        mask_gradients: See :class:`IterativeMagnitudePruning`.

    Raises:
        ValueError: If an argument is out of range, or two contradict.
        TypeError: If an argument is of a wrong kind.

    Examples:
        >>> OBSOneShot(amount=0.7, batches=16).epoch is None
        True

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; Frantar and Alistarh, Optimal Brain
        Compression, NeurIPS 2022 (arXiv:2208.11580).
    """

    def __init__(
        self,
        amount: float | dict[str, float] | None = None,
        epoch: int | None = None,
        scope: Literal["global", "layer"] = "global",
        pattern: str | None = None,
        solver: Literal["exact", "admm", "blocked"] = "admm",
        sequential: bool = False,
        batches: int = 8,
        damping: float = 0.01,
        parameters: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        recalibrate: bool = False,
        mask_gradients: bool | Literal["auto"] = "auto",
    ) -> None:
        schedule = _AfterTraining() if epoch is None else OneShot(at=epoch)
        super().__init__(amount, scope, schedule, parameters, ignore, pattern, mask_gradients)
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(f"OBSOneShot(batches={batches!r}): it is a number of training batches, from 1.")
        self.epoch = epoch
        self.solver: Solver = solver
        self.sequential = sequential
        self.batches = batches
        self.damping = damping
        self.recalibrate = recalibrate
        self.fits: tuple[LayerFit, ...] = ()
        self._asked(amount).check("OBSOneShot")
        self._planned: dict[str, Tensor] = {}  # between the choice of what stays and its writing

    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> bool:
        """Begin to mask; refuse shares that no split over the layers gives."""
        super().begin(trainer, pl_module, batch)
        if self.due:
            weights = self._in_run.to_prune.weights
            refuse_beyond_reach({name: w.parameter.numel() for name, w in weights.items()}, self._asked(self.amount))
        return True

    def will_run_on_batches(self, pl_module: LightningModule) -> bool:
        """Tell that layers will be looked at on training batches."""
        return True

    def choose(self, pl_module: LightningModule, due: Amount, progress: float) -> dict[str, Tensor]:
        """Return what stays, and work out what it becomes."""
        to_prune = self._in_run.to_prune
        if self._masks:
            raise PruningError(
                "OBSOneShot: some of the weights are masked already, and what is masked would move. Prune once, or "
                "name other weights by parameters= or ignore=."
            )
        asked = self._asked(to_prune.amount, list(to_prune.weights), pl_module.trainer)
        with calibration_of(pl_module.trainer, pl_module, self.batches) as calibration:
            plan = plan_obs(pl_module, calibration, asked)
        self.fits = plan.report.layers
        self._planned = pl_module.trainer.strategy.broadcast(plan.tensors)
        return plan.report.masks

    def after_masking(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Let the weights that stay make up for the others."""
        write_(pl_module, self._planned)
        self._planned = {}
        recalibrate_(trainer, pl_module, self.batches if self.recalibrate else 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if it is to be after the training, and print what became of the weights."""
        if self.epoch is None and self._course.begun:
            self._finish(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune where there was nothing left to train: a checkpoint that has had all its epochs."""
        if self.epoch is None and not self._course.begun:
            self._course.begun = self.begin(trainer, pl_module, None)
            self._finish(trainer, pl_module)
            super().on_train_end(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.due:
            self.reach(trainer, pl_module, 1.0)
            self._course.progress = 1.0

    def _asked(self, amount: Any, only: Sequence[str] | None = None, trainer: Trainer | None = None) -> Asked:
        shows = trainer is not None and trainer.is_global_zero and trainer.progress_bar_callback is not None
        amount = None if self.pattern is not None else amount
        # what ignore= names has been taken out of what may be pruned
        return Asked(
            amount, self.solver, self.scope, self.pattern, self.sequential, self.damping, (), shows, only,
        )  # fmt: skip
