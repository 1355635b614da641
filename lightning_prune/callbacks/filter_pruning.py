"""Prunes filters by any criterion while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.consumer_repair import ConsumerRepair
from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.callbacks.engine.gathered_scores import gathering_for
from lightning_prune.callbacks.engine.named_criterion import found_criterion
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import ExampleInputs, run
from lightning_prune.pruning.amounts import check_count
from lightning_prune.pruning.arguments import Parts
from lightning_prune.pruning.consumers import only_read
from lightning_prune.pruning.report_types import Repair
from lightning_prune.pruning.scoring import CRITERIA
from lightning_prune.structure import Structure


class FilterPruning(PruningCallback):
    """Remove the filters, neurons and channels that a criterion of your choice scores lowest while the model trains.

    What a criterion looks at comes from the run itself: weights when a cut is due; gradients and activations of the
    training steps since the last cut, at no extra pass; for second derivatives, some training batches, read beside the
    training. For what leaves, is logged and is saved, see :class:`~lightning_prune.FilterL1Pruning`.

    Args:
        amount: Fraction, in [0, 1), of ``target`` that is pruned, relative to the dense model; or a whole number of
            units, of each layer or, with ``scope="global"``, of all; or these by pattern of module paths or by module,
            of the units that these produce.
        criterion: Name of a criterion, or a function from a weight ``(out, ...)`` to one score per filter ``(out,)``;
            higher is kept longer. ``l1``, ``l2``, ``bn_scale``, ``random``, ``taylor``, ``taylor_activations``,
            ``activation_mean``, ``activation_std``, ``apoz``, ``taylor_second_order``, ``output_change`` (needs no
            labels), ``obd`` (by per-example gradients), ``obd_hutchinson``, ``obs`` (prunes first what ``repair`` can
            best compensate), or the import path of a function, ``my_package.my_module.my_criterion``.
        target: What ``amount`` is a fraction of: the prunable ``filters``, or the ``params``, ``flops`` or ``latency``
            of the whole model.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both. Scores that are losses (``taylor``, ``taylor_second_order``,
            ``output_change``, ``obd``, ``obs``) are, for a target other than filters, divided by what the unit saves of
            it.
        schedule: When how much of ``amount`` is pruned. By default everything before the first batch, or before epoch 1
            where training must be seen first.
        batches: Number of training batches of each process that are read at a pruning step. For criteria of second
            derivatives, ``output_change``, ``obs`` and ``repair``.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
            Amounts, targets and limits are relative to it; what is tied to the rest is kept.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        round_to: Widths are rounded up to multiples of this, in channels (heads times their width).
        min_width: Channels that are kept of every layer at least; or by pattern of module paths or by module, the
            largest that names a layer.
        max_amount: Largest fraction, in [0, 1], of any layer that is pruned; or by pattern of module paths or by
            module, the smallest that names a layer.
        uniform: Whether layers of a kind get one width, such as those of all blocks of a transformer, so that a config
            can express it. Where one of them is not prunable, none is.
        layers: Whether whole layers may be removed, too, towards the same ``amount`` of params, FLOPs or latency, by
            the loss on ``batches``; all scores are then taken on them. See :func:`~lightning_prune.prune_filters`.
        repair: Whether weights and biases that sum over pruned units are refitted on ``batches`` to keep their outputs;
            by default where ``criterion="obs"``.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. By default the module's
            ``example_input_array``, else one example of the first training batch.
        recalibrate: Number of training batches over which BatchNorm's statistics are averaged anew after each pruning
            step; 0 averages nothing.
        trace: What of the module is traced, counted and verified: its ``forward``, or, where it trains otherwise, what
            ``training_step`` or ``validation_step`` runs on the first training batch, in eval mode.
        fade_steps: Optimizer steps before each pruning step over which the units that it removes are driven to zero, so
            that the cut changes no output; 0 removes them at once. Units are selected when the fade begins.
        report: Whether tables are printed and a report is written where each logger keeps its files, when the run ends.
            One callback with ``False`` switches both off for the whole run.

    Raises:
        ValueError: If an argument is out of range or unknown, or the schedule cuts before training was seen.
        TypeError: If an argument is of a wrong kind.

    Examples:
        >>> FilterPruning(amount=0.5, criterion="bn_scale", scope="global").criterion
        'bn_scale'
        >>> FilterPruning(criterion=lambda weight: weight.abs().amax(dim=(1, 2, 3))).amount
        0.3
    """

    def __init__(
        self,
        amount: int | float | dict[str, int | float] = 0.3,
        *,
        criterion: str | Callable[[Tensor], Tensor] = "l1",
        target: Literal["filters", "params", "flops", "latency"] = "filters",
        scope: Literal["layer", "global"] = "layer",
        schedule: Schedule | None = None,
        batches: int = 8,
        module: Parts = None,
        ignore: Sequence[str] = (),
        round_to: int = 1,
        min_width: int | dict[str, int] = 1,
        max_amount: float | dict[str, float] = 1.0,
        uniform: bool = False,
        layers: bool = False,
        repair: bool | None = None,
        example_inputs: Any = None,
        recalibrate: int = 0,
        fade_steps: int = 0,
        trace: Literal["forward", "training_step", "validation_step"] = "forward",
        report: bool = True,
    ) -> None:
        check_count("FilterPruning", "batches", batches, 1, "training batches")
        gathering = gathering_for(found_criterion("FilterPruning", criterion, CRITERIA), batches, layers)
        if schedule is None and gathering.looks_at_training:
            schedule = OneShot(at=1)
        arguments = FilterArguments(
            amount, target, scope, module, ignore, round_to, min_width, max_amount, uniform, layers, example_inputs,
            recalibrate, fade_steps, trace, report,
        )  # fmt: skip
        by_obs = criterion == "obs"
        repairs = by_obs if repair is None else repair
        self._repair = ConsumerRepair(batches) if repairs else None
        strategy = UnitRemoval(
            arguments, gathering, self._repair, None, _scored_by_consumers if by_obs else None, batches
        )
        super().__init__(OneShot() if schedule is None else schedule, strategy)
        self.criterion = criterion
        self.batches = batches
        self.repair = repair

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """What was refitted at the last pruning step, with ``repair``."""
        return () if self._repair is None else self._repair.repairs


def _scored_by_consumers(pl_module: LightningModule, structure: Structure, inputs: ExampleInputs) -> Structure:
    """Return the structure without groups that no weight sums over."""
    return only_read(pl_module, structure, find_products(pl_module, inputs, run))
