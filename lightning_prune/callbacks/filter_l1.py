"""Prunes filters by the size of their weights while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.callbacks.engine.gathered_scores import gathering_for
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval
from lightning_prune.pruning.arguments import Parts


class FilterL1Pruning(PruningCallback):
    """Remove the filters, neurons and channels with the smallest L1 norm while the model trains.

    Filters leave the model itself, before the first batch of an epoch; optimizer state follows, checkpoints know their
    shape, and every cut is verified before it is made. Logged every epoch: ``prune/params``, ``prune/flops``
    (multiply-adds, by fvcore, of one call on the example inputs), ``prune/params_kept``, ``prune/flops_kept`` (shares
    of the dense model) and ``prune/sparsity`` (fraction of the prunable filters that were removed).

    Args:
        amount: Fraction, in [0, 1), of ``target`` that is pruned, relative to the dense model; or a whole number of
            units, of each layer or, with ``scope="global"``, of all; or these by pattern of module paths or by module,
            of the units that these produce. What no pattern names is kept whole.
        target: What ``amount`` is a fraction of: the prunable ``filters``, or the ``params``, ``flops`` or ``latency``
            of the whole model. Latency is the time of one call on the example inputs, in eval mode, measured on
            this machine (on the first process) whenever a cut is due, and reached within 5 % where single units weigh
            less; it is logged as ``prune/latency_kept``. Pass ``example_inputs`` of the batch that counts; widths often
            run fastest in multiples of 8 or so, see ``round_to``.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both. Norms are divided by their layer's mean.
        schedule: When how much of ``amount`` is pruned. By default everything before the first batch, as when a trained
            model is pruned and fine-tuned.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
            Amounts, targets and limits are relative to it; what is tied to the rest is kept.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        round_to: Widths are rounded up to multiples of this, in channels (heads times their width).
        min_width: Channels that are kept of every layer at least; or by pattern of module paths or by module, the
            largest that names a layer.
        max_amount: Largest fraction, in [0, 1], of any layer that is pruned; or by pattern of module paths or by
            module, the smallest that names a layer. A target of the whole model is met by other layers.
        uniform: Whether layers of a kind get one width, such as those of all blocks of a transformer, so that a config
            can express it. Where one of them is not prunable, none is.
        layers: Whether whole layers may be removed, too, towards the same ``amount`` of params, FLOPs or latency, by
            the loss on 8 training batches. See :func:`~lightning_prune.prune_filters`.
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
        ValueError: If an argument is out of range.
        TypeError: If an argument is of a wrong kind.

    Examples:
        >>> from lightning_prune import Cubic
        >>> FilterL1Pruning(amount=0.5, target="flops", schedule=Cubic(start=2, end=10, every=2)).amount
        0.5

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv:1608.08710).
    """

    def __init__(
        self,
        amount: int | float | dict[str, int | float] = 0.3,
        *,
        target: Literal["filters", "params", "flops", "latency"] = "filters",
        scope: Literal["layer", "global"] = "layer",
        schedule: Schedule | None = None,
        module: Parts = None,
        ignore: Sequence[str] = (),
        round_to: int = 1,
        min_width: int | dict[str, int] = 1,
        max_amount: float | dict[str, float] = 1.0,
        uniform: bool = False,
        layers: bool = False,
        example_inputs: Any = None,
        recalibrate: int = 0,
        fade_steps: int = 0,
        trace: Literal["forward", "training_step", "validation_step"] = "forward",
        report: bool = True,
    ) -> None:
        arguments = FilterArguments(
            amount, target, scope, module, ignore, round_to, min_width, max_amount, uniform, layers, example_inputs,
            recalibrate, fade_steps, trace, report,
        )  # fmt: skip
        strategy = UnitRemoval(arguments, gathering_for("l1", layers=layers))
        super().__init__(OneShot() if schedule is None else schedule, strategy)
