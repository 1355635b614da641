"""Measures, weight by weight, a metric against the share of entries that is zero, without retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.selection import keep_best_of_all, number_to_prune
from lightning_prune.analysis.layer_sensitivity import TENTHS, begin, evaluated, measure_each
from lightning_prune.analysis.sensitivity_findings import GroupSensitivity, Mode, Sensitivity
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.pruning.arguments import Parameters, Parts, check_module, listed, part_of
from lightning_prune.pruning.find_weights import find_weights
from lightning_prune.pruning.left_alone import left_alone
from lightning_prune.pruning.weights import WeightCriterion, check_weight_arguments, score_weights


@changes_model
def weight_sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    shares: Sequence[float] = TENTHS,
    metric: str = "metric",
    mode: Mode = "max",
    criterion: WeightCriterion = "magnitude",
    module: Parts = None,
    ignore: Parameters = (),
    parameters: Parameters | None = None,
    done: Sensitivity | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Zero several shares of every weight, one weight at a time, and evaluate the model each time, without retraining.

    The model is left as found, to the last bit. ``amounts(drop)`` of what is returned are rates for each layer, as
    ``IterativeMagnitudePruning`` and ``prune_weights`` take them.

    Args:
        model: The model.
        evaluate: From the model to the metric. It may change the mode; it leaves the model on its device.
        shares: Fractions, in (0, 1), of a weight's entries that are zeroed; rounded up, and one stays.
        metric: What the metric is called in files and pictures.
        mode: ``"max"`` where a higher metric is better, ``"min"`` where a lower one is.
        criterion: Name of a criterion, or a function from a weight to one score for each of its entries; higher is kept
            longer. ``magnitude`` or ``random``.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers.
        done: What an earlier call returned or wrote before it was stopped; weights in it are not measured again.
        path: A JSON file, written anew after each weight.
        progress: Whether to show progress bars.

    Returns:
        The metric of every weight at every share; its groups are weights, and its units their entries. Networks that
        are left alone unless they are named, such as frozen ones beside what is trained, are skipped.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``evaluate`` returns no number.
        PruningError: If nothing can be zeroed, the whole model's metric is NaN, or ``done`` answers another question.

    Examples:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> nn.init.constant_(model.weight, 1.0).shape
        torch.Size([1, 4])
        >>> found = weight_sensitivity(model, lambda net: net.weight.sum(), shares=(0.25, 0.5), progress=False)
        >>> found.groups[0].values, found.amounts(drop=1.0)
        ((3.0, 2.0), {'weight': 0.25})

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015, sec. 3 and fig. 6
        (arXiv:1506.02626).
    """
    check_weight_arguments("weight_sensitivity", None, "layer", criterion, parameters, ignore, None)
    check_module("weight_sensitivity", module)
    alone = left_alone(model, [*(parameters or ()), *listed(module)])
    weights = find_weights(model, parameters, [*ignore, *alone], part=part_of(model, module)).found
    found = begin("weight_sensitivity", model, evaluate, shares, metric, mode, criterion, done, alone)
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    gone = {}
    for name, size in sizes.items():
        gone[name] = sorted({number_to_prune(share, size) for share in found.asked} - {0})

    def measure(name: str, advance: Callable[[], Any]) -> GroupSensitivity:
        scores, values = score_weights({name: weights[name]}, criterion), []
        for count in gone[name]:
            with _zeroed(weights[name].parameter, keep_best_of_all(scores, sizes[name] - count)[name]):
                values.append(evaluated(model, evaluate))
            advance()
        return GroupSensitivity(
            name, (name,), sizes[name], tuple(count / sizes[name] for count in gone[name]), tuple(values)
        )

    return measure_each(found, {name: len(counts) for name, counts in gone.items()}, measure, path, progress)


@contextmanager
def _zeroed(parameter: nn.Parameter, keep: Tensor) -> Iterator[None]:
    """Zero what is not kept, in the body."""
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.masked_fill_(~keep, 0)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)
