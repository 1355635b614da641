"""Prunes filters by the size of their weights while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule

from lightning_prune.budget import Scores
from lightning_prune.callbacks._structured import StructuredPruning
from lightning_prune.schedules import Schedule
from lightning_prune.scoring import score_units
from lightning_prune.structure import Structure

__all__ = ["FilterL1Pruning"]


class FilterL1Pruning(StructuredPruning):
    """Remove the filters, neurons and channels with the smallest L1 norm while the model trains.

    Filters leave the model itself, before the first batch of an epoch; optimizer state follows, checkpoints know their
    shape, and every cut is proved before it is made. Logged every epoch: ``prune/params``, ``prune/flops``
    (multiply-adds, by fvcore, of one call on the example inputs), ``prune/params_kept``, ``prune/flops_kept`` (shares
    of the dense model) and ``prune/sparsity`` (share of the filters that could leave and have left).

    Args:
        amount: Fraction, in [0, 1), of the target that shall be gone at the end, of what was there at the start; or
            fractions by pattern of module paths, ``{"layer1.*.conv1": 0.6}``: of the channels that these modules
            produce (what no pattern names stays whole).
        target: What ``amount`` is a fraction of: the filters that can leave, or the whole model's parameters or FLOPs.
        scope: ``layer`` takes the same share of every layer; ``global`` compares norms, divided by their layer's mean,
            across layers.
        schedule: When how much of it leaves; by default everything before the first batch, as when a trained model is
            pruned and fine-tuned.
        ignore: Patterns of module paths whose channels stay.
        round_to: Widths after a cut are multiples of this, rounded up.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs of ``forward``; by default
            the module's ``example_input_array``, else one example of the first training batch.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of a wrong kind.

    Example:
        >>> from lightning_prune import Cubic
        >>> FilterL1Pruning(amount=0.5, target="flops", schedule=Cubic(start=2, end=10, every=2)).amount
        0.5

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv:1608.08710).
    """

    def __init__(
        self,
        amount: float | dict[str, float] = 0.3,
        target: Literal["filters", "params", "flops"] = "filters",
        scope: Literal["layer", "global"] = "layer",
        schedule: Schedule | None = None,
        ignore: Sequence[str] = (),
        round_to: int = 1,
        example_inputs: Any = None,
    ) -> None:
        super().__init__(amount, target, scope, schedule, ignore, round_to, example_inputs)

    def scores(self, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return the L1 norm of each unit's filters, ``(width,)`` for each group."""
        return score_units(pl_module, structure, "l1")
