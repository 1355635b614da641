"""Finds out, for all processes of a run alike, what one of them measures or each sees a part of."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.batch_norm import batch_norms, recalibrate_batch_norm
from lightning_prune.callbacks._batches import training_batches
from lightning_prune.callbacks._inputs import inputs_of
from lightning_prune.inputs import ExampleInputs, run
from lightning_prune.latency import CutDoesNotRunError, Shapes, latency_kept
from lightning_prune.structure import Keep, Structure

__all__ = ["latency_of_first", "recalibrate_"]


def latency_of_first(
    trainer: Trainer,
    pl_module: LightningModule,
    example_inputs: ExampleInputs,
    whole: Shapes | None,
    structure: Structure,
    keep: Keep,
) -> float:
    """Measure on the first process what share of the latency a choice leaves, and tell the others.

    Raises:
        CutDoesNotRunError: On all processes, if the slim model fails.
    """
    found: float | None = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        assert whole is not None  # noted at the start of a run whose target is latency
        try:
            with trainer.precision_plugin.forward_context():
                found = latency_kept(pl_module, example_inputs, structure, keep, whole)
        except CutDoesNotRunError as error:
            failure = error.__cause__  # type: ignore[assignment]
    found = trainer.strategy.broadcast(found)
    if found is None:
        raise CutDoesNotRunError(keep) from failure
    return found


def recalibrate_(trainer: Trainer, pl_module: LightningModule, count: int) -> None:
    """Average BatchNorm's statistics anew, over the first training batches of each process, and over processes."""
    norms = batch_norms(pl_module)
    if not count or not norms:
        return
    with training_batches(trainer, pl_module, count) as batches, trainer.precision_plugin.forward_context():
        recalibrate_batch_norm(pl_module, inputs_of(pl_module, batches), run)
    for norm in norms.values():
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))
