"""Prunes filters by what the loss would change by without them, from the run's own backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.callbacks.engine.gathered_scores import gathering_for
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval
from lightning_prune.pruning.arguments import Parts
from lightning_prune.pruning.budget import Scores
from lightning_prune.structure import Structure

_CRITERIA = {"weights": "taylor", "activations": "taylor_activations"}


class TaylorFilterPruning(PruningCallback):
    """Remove the filters, neurons and channels that the loss would miss least, to first order, while the model trains.

    The gradients are those of the training itself: no extra passes, no labels. Scores gather from one cut to the next.
    For the rest, what leaves, is logged and is saved, see :class:`~lightning_prune.FilterL1Pruning`.

    Args:
        amount: Fraction, in [0, 1), of ``target`` that is pruned, relative to the dense model; or a whole number of
            units, of each layer or, with ``scope="global"``, of all; or these by pattern of module paths or by module,
            of the units that these produce.
        target: What ``amount`` is a fraction of: the prunable ``filters``, or the ``params``, ``flops`` or ``latency``
            of the whole model.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both.
        schedule: When how much of ``amount`` is pruned. Not before epoch 1, since gradients must be seen first; by
            default everything before epoch 1.
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
            the loss on 8 training batches; all scores are then taken on them. See
            :func:`~lightning_prune.prune_filters`.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. By default the module's
            ``example_input_array``, else one example of the first training batch.
        recalibrate: Number of training batches over which BatchNorm's statistics are averaged anew after each pruning
            step; 0 averages nothing.
        trace: What of the module is traced, counted and verified: its ``forward``, or, where it trains otherwise, what
            ``training_step`` or ``validation_step`` runs on the first training batch, in eval mode.
        form: ``weights`` squares the sum of weight times gradient over the weights that read a unit (Molchanov et al.
            2019); ``activations`` averages over examples the absolute sum of activation times gradient, and divides by
            the layer's l2 norm (2016); it takes the training loss to be the mean over the batch.
        flops_penalty: Score taken off a unit for each million multiply-adds that leave with it; the 2016 paper uses
            0.001. Without one, ``weights`` under a global target of parameters, FLOPs or latency takes first what the
            loss would miss least for what it saves.
        fade_steps: Optimizer steps before each pruning step over which the units that it removes are driven to zero, so
            that the cut changes no output; 0 removes them at once. Units are selected when the fade begins.
        report: Whether tables are printed and a report is written where each logger keeps its files, when the run ends.
            One callback with ``False`` switches both off for the whole run.

    Raises:
        ValueError: If an argument is out of range, or the schedule cuts before epoch 1.
        TypeError: If an argument is of a wrong kind.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017 (arXiv:1611.06440);
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019 (arXiv:1906.10771).
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
        form: Literal["weights", "activations"] = "weights",
        flops_penalty: float = 0.0,
    ) -> None:
        if form not in _CRITERIA:
            raise ValueError(f"TaylorFilterPruning(form={form!r}): choose 'weights' or 'activations'.")
        if not flops_penalty >= 0:
            raise ValueError(f"TaylorFilterPruning(flops_penalty={flops_penalty!r}): it must be 0 or more.")
        arguments = FilterArguments(
            amount, target, scope, module, ignore, round_to, min_width, max_amount, uniform, layers, example_inputs,
            recalibrate, fade_steps, trace, report,
        )  # fmt: skip
        gathering = gathering_for(_CRITERIA[form], layers=layers)
        if flops_penalty:
            gathering.adding_up = False  # else the same would be weighed twice
        strategy = UnitRemoval(arguments, gathering, adjust=partial(_penalized, flops_penalty))
        super().__init__(OneShot(at=1) if schedule is None else schedule, strategy)
        self.form = form
        self.flops_penalty = flops_penalty


def _penalized(flops_penalty: float, structure: Structure, scores: Scores) -> Scores:
    """Return scores less the penalty for the multiply-adds that are removed with a unit."""
    return {name: score - flops_penalty * _mega_flops(structure, name) for name, score in scores.items()}


def _mega_flops(structure: Structure, name: str) -> float:
    """Return the multiply-adds, in millions, that leave with one unit of a group."""
    keep = np.ones(structure.groups[name].width, dtype=bool)
    keep[0] = False
    return (structure.flops({}) - structure.flops({name: keep})) / 1e6
