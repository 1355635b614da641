"""Removes whole layers while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.layer_arguments import LayerArguments
from lightning_prune.callbacks.engine.layer_removal import LayerRemoval
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.pruning.arguments import Parts
from lightning_prune.pruning.report_types import RemovedLayer, Repair


class LayerPruning(PruningCallback):
    """Remove whole layers while the model trains: blocks, or the attention or feed-forward part of a block.

    Layers leave the model itself, before the first batch of an epoch; their parameters leave the optimizers, and
    checkpoints know which layers are left. Each removal is verified before it is made. Layers are scored on training
    batches, each without those that left before it. See :func:`~lightning_prune.prune_layers` for what can be removed.
    Logged every epoch: ``prune/params``, ``prune/flops``, ``prune/params_kept``, ``prune/flops_kept`` and
    ``prune/sparsity`` (share of the removable layers that were removed).

    Args:
        amount: Fraction, in [0, 1), of ``target`` that is pruned, relative to the dense model; or a whole number of
            layers.
        criterion: Name of a criterion, or a function from the input and the output of a layer to a single number;
            higher is kept longer. ``influence``, ``output_change``, or, by the loss of the training step, ``taylor``,
            ``taylor_second_order`` and ``loss``.
        target: What ``amount`` is a fraction of: the removable ``layers``, or the ``params``, ``flops`` or ``latency``
            of the whole model. Latency is that of one call on the example inputs, in eval mode, measured on the first
            process at each pruning step, and logged as ``prune/latency_kept``.
        schedule: When how much of ``amount`` is pruned. By default everything before the first batch.
        batches: Number of training batches of each process that are read at a pruning step. Layers are scored, and
            with ``repair`` compensated, on them.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
            Amounts and targets are relative to it.
        ignore: Patterns of module paths, or modules, that are not removed, nor anything inside of them.
        min_layers: Layers that are kept at least, those named in ``ignore`` among them.
        repair: Whether weights and biases behind removed layers are refitted on ``batches`` to keep their outputs; the
            last weight of a residual branch compensates for what the layers before it no longer add.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. By default the module's
            ``example_input_array``, else one example of the first training batch.
        recalibrate: Number of training batches over which BatchNorm's statistics are averaged anew after each pruning
            step; 0 averages nothing.
        trace: What of the module is traced, counted and verified: its ``forward``, or, where it trains otherwise, what
            ``training_step`` or ``validation_step`` runs on the first training batch, in eval mode.
        report: Whether tables are printed and a report is written where each logger keeps its files, when the run ends.
            One callback with ``False`` switches both off for the whole run.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.

    Examples:
        >>> from lightning_prune import Linear
        >>> LayerPruning(amount=0.25, target="flops", schedule=Linear(start=1, end=4)).criterion
        'influence'

    References:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv:2403.03853).
    """

    def __init__(
        self,
        amount: int | float = 0.3,
        *,
        criterion: str | Callable[[Tensor, Tensor], Tensor] = "influence",
        target: Literal["layers", "params", "flops", "latency"] = "layers",
        schedule: Schedule | None = None,
        batches: int = 8,
        module: Parts = None,
        ignore: Sequence[str] = (),
        min_layers: int = 1,
        repair: bool = False,
        example_inputs: Any = None,
        recalibrate: int = 0,
        trace: Literal["forward", "training_step", "validation_step"] = "forward",
        report: bool = True,
    ) -> None:
        arguments = LayerArguments(
            amount, criterion, target, batches, module, ignore, min_layers, repair, example_inputs, recalibrate, trace,
            report,
        )  # fmt: skip
        self._removal = LayerRemoval(arguments)
        super().__init__(OneShot() if schedule is None else schedule, self._removal)

    @property
    def removed(self) -> tuple[RemovedLayer, ...]:
        """The layers that were removed so far, in the order in which they left."""
        return tuple(self._removal.state.gone.values())

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """What was refitted at the last pruning step, with ``repair``."""
        return self._removal.repairs
