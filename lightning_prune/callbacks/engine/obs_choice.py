"""Chooses the weights that the others of their layer can best compensate, and updates these; sets no mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.engine.processes import calibration_of, recalibrate_
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.callbacks.engine.weight_choice import MaskedWeights, WeightChoice
from lightning_prune.pruning.amounts import Amount
from lightning_prune.pruning.obs import Asked, LayerFit, plan_obs, refuse_beyond_reach, write_

_MOST = 5  # weights that a warning names


class BrainSurgeon(WeightChoice):
    """The choice of :class:`~lightning_prune.OBSOneShot`, which documents the arguments.

    Attributes:
        fits: How well each layer's outputs were kept.
    """

    reads_batches = True

    def __init__(self, asked: Asked, batches: int, recalibrate: int) -> None:
        self.asked = asked
        self.batches = batches
        self.recalibrate = recalibrate
        self.fits: tuple[LayerFit, ...] = ()
        self._planned: Mapping[str, Tensor] = {}  # between the choice of what is kept and its writing

    def prepare(self, run: Run, own: MaskedWeights) -> None:
        """Refuse shares that no split over the layers gives."""
        if run.own.clock.unfinished:
            sizes = {name: weight.parameter.numel() for name, weight in own.to_prune.weights.items()}
            refuse_beyond_reach(sizes, self._asked(own))

    def choose(self, run: Run, own: MaskedWeights, due: Amount, progress: float) -> dict[str, Tensor]:
        """Return what is kept, and work out what it becomes; what the model's masks hold at zero stays zero."""
        trainer, to_prune = run.trainer, own.to_prune
        asked = replace(
            self._asked(own),
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            only=list(to_prune.weights),
        )
        with calibration_of(trainer, run.module, self.batches) as calibration:
            plan = plan_obs(run.module, calibration, asked)
        self.fits = plan.layers
        _warn_of_skipped(run.where, {name: why for name, why in plan.skipped.items() if name in to_prune.weights})
        if trainer.world_size > 1:
            self._planned = trainer.strategy.broadcast(dict(plan.tensors))
        else:
            self._planned = plan.tensors
        return plan.masks

    def _asked(self, own: MaskedWeights) -> Asked:
        """Return what is asked for, in fractions of the weights in this run."""
        return replace(self.asked, amount=None if self.asked.pattern is not None else own.to_prune.amount)

    def after_masking(self, run: Run, progress: float) -> None:
        """Write the weights that compensate for the others."""
        write_(run.module, self._planned)
        self._planned = {}
        recalibrate_(run.trainer, run.module, self.recalibrate)


def _warn_of_skipped(where: str, skipped: Mapping[str, str]) -> None:
    """Warn of weights that stay dense, so that less is pruned than was asked."""
    if skipped:
        reasons = [f"{name}: {why}" for name, why in list(skipped.items())[:_MOST]]
        more = f"; and {len(skipped) - _MOST} more" if len(skipped) > _MOST else ""
        rank_zero_warn(
            f"{where}: less than amount is pruned, as weights stay dense ({'; '.join(reasons)}{more}). Name them by "
            "ignore= to count without them."
        )
