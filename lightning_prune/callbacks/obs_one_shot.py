"""Prunes weights once, by second-order surgery, after training or before one of its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.algorithms.schedules import OneShot
from lightning_prune.callbacks.engine.clock import AfterTraining
from lightning_prune.callbacks.engine.obs_choice import BrainSurgeon
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.callbacks.engine.weight_arguments import WeightArguments
from lightning_prune.callbacks.engine.weight_masking import WeightMasking
from lightning_prune.pruning.amounts import check_count
from lightning_prune.pruning.arguments import Parts
from lightning_prune.pruning.obs import Asked, LayerFit, Solver


class OBSOneShot(PruningCallback):
    """Set weights to zero once, and let the others of each layer compensate for them, so that no retraining is needed.

    Every layer goes on to give, on some batches of the training data, what it gave before, as well as it can with what
    is left (:func:`~lightning_prune.prune_obs`): no labels are looked at. After training, or before a named epoch; what
    follows trains on with the zeros held. Checkpoints that were written before are dense: save one after ``fit`` by
    ``trainer.save_checkpoint``. To prune a checkpoint alone, give its path to ``fit`` with as many ``max_epochs`` as it
    has had.

    What the model's masks hold at zero already stays zero, and counts. Logged as by
    :class:`IterativeMagnitudePruning`.

    Args:
        amount: Fraction, in [0, 1), of the weights that are set to zero, relative to the dense model; or a whole number
            of them, of each layer or, with ``scope="global"``, of all; or these by pattern of paths of modules or
            parameters, or by module, of their weights. What no pattern names stays dense. By default 0.5, or what
            ``pattern`` says.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both. Across layers, the weights are split so that the model's outputs
            change least.
        batches: Number of training batches of each process that are read at a pruning step. Layers keep their outputs
            on these.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N are kept.
        epoch: The epoch, counted from 0, before which it happens; by default after the training.
        solver: ``exact``, ``admm`` or ``blocked`` (see :func:`~lightning_prune.prune_obs`).
        sequential: Whether each layer is fitted to the inputs that the pruned layers before it give.
        damping: Share of its mean diagonal entry that is added to the diagonal of every Hessian.
        recalibrate: Number of training batches over which BatchNorm's statistics are averaged anew after each pruning
            step; 0 averages nothing.
        mask_gradients: Whether gradients of masked weights are zeroed before a step, too.
        report: Whether tables are printed and a report is written where each logger keeps its files, when the run ends.
            One callback with ``False`` switches both off for the whole run.

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
        amount: int | float | dict[str, int | float] | None = None,
        *,
        scope: Literal["layer", "global"] = "layer",
        batches: int = 8,
        module: Parts = None,
        ignore: Sequence[str] = (),
        parameters: Sequence[str] | None = None,
        pattern: str | None = None,
        epoch: int | None = None,
        solver: Literal["exact", "admm", "blocked"] = "admm",
        sequential: bool = False,
        damping: float = 0.01,
        recalibrate: int = 0,
        mask_gradients: bool | Literal["auto"] = "auto",
        report: bool = True,
    ) -> None:
        arguments = WeightArguments(amount, scope, module, ignore, parameters, pattern, mask_gradients, report)
        # what ignore= names has been taken out of what may be pruned
        asked = Asked(
            None if pattern is not None else amount, solver, scope, pattern, sequential, damping, (), False, None
        )
        self._surgeon = BrainSurgeon(asked, batches, recalibrate)
        schedule = AfterTraining() if epoch is None else OneShot(at=epoch)
        super().__init__(schedule, WeightMasking(arguments, self._surgeon))
        check_count("OBSOneShot", "batches", batches, 1, "training batches")
        check_count("OBSOneShot", "recalibrate", recalibrate, 0, "training batches")
        asked.check("OBSOneShot")
        self.epoch = epoch
        self.solver: Solver = solver
        self.sequential = sequential
        self.batches = batches
        self.damping = damping
        self.recalibrate = recalibrate

    @property
    def fits(self) -> tuple[LayerFit, ...]:
        """How well each layer's outputs were kept."""
        return self._surgeon.fits

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune where there was nothing left to train: a checkpoint that has had all its epochs."""
        self.engine.end_fit(self.member, trainer, pl_module)
