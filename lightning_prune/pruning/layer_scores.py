"""Scores layers by what is lost without them, on batches of data; removes nothing for good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.criteria.depth import block_influence, first_order, second_order
from lightning_prune.measure.calibration import Run
from lightning_prune.measure.gradients import Loss, differentiable
from lightning_prune.model.calls import numbers_in
from lightning_prune.model.devices import widened
from lightning_prune.model.errors import PruningError
from lightning_prune.model.output_forms import main_output, value_at
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.structure.skippable import Branches, Depth, SkippableLayer
from lightning_prune.structure.tracer import unfused
from lightning_prune.surgery.pass_through import skip_of
from lightning_prune.surgery.skipped import temporarily_skipped

__all__ = ["LAYER_CRITERIA", "LayerCriterion", "LayerData", "compared_outputs", "score_layers"]

LayerCriterion = str | Callable[[Tensor, Tensor], Tensor]
"""A name, or a function from the input and the output of a layer to a single number; higher is kept longer."""

LAYER_CRITERIA = ("influence", "taylor", "taylor_second_order", "output_change", "loss")


class LayerData:
    """The batches that layers are scored on, and how the model runs on them.

    Args:
        batches: The batches, one at least.
        forward: Calls the model on one of them.
        loss: Returns the mean loss of one of them; for criteria that need it.
        over_processes: Averages a score over processes; by default there are none.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        forward: Run,
        loss: Loss | None = None,
        over_processes: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not batches:
            raise PruningError("No batch came. Pass a list or loader of at least one batch.")
        self.batches, self.forward, self.loss = batches, forward, loss
        self.over_processes = over_processes or _alone


def score_layers(
    model: nn.Module,
    depth: Depth,
    candidates: Iterable[str],
    criterion: LayerCriterion,
    data: LayerData,
    skips: Mapping[str, dict[str, Any]],
) -> dict[str, float]:
    """Score layers of a model in eval mode; the lowest score is to be removed first.

    Args:
        model: The model, left as found.
        depth: Its layers.
        candidates: Paths of those to score.
        criterion: One of ``LAYER_CRITERIA``, or a function of a layer's input and output.
        data: The batches.
        skips: Layers that are left out meanwhile: path -> what is returned in their place.

    Raises:
        PruningError: If a layer is not called on the batches, or a score is not finite.
    """
    layers = {path: depth.layers[path] for path in candidates}
    if callable(criterion):
        scores = _by_passing(model, layers, data, skips, criterion)
    elif criterion == "influence":
        scores = _by_passing(model, layers, data, skips, block_influence)
    elif criterion in ("taylor", "taylor_second_order"):
        scores = _by_gradients(model, layers, data, skips, criterion == "taylor_second_order")
    elif criterion == "output_change":
        scores = _by_outputs(model, layers, data, skips)
    else:
        scores = _by_loss(model, layers, data, skips)
    for path, score in scores.items():
        scores[path] = float(data.over_processes(torch.tensor(score, dtype=torch.float64)))
        if not scores[path] == scores[path]:
            raise PruningError(f"{path}: its score by {criterion!r} is not a number. Are losses or outputs NaN?")
    missing = sorted(layers.keys() - scores.keys())
    if missing:
        raise PruningError(
            f"{missing[0]} is not called on the batches. Pass batches that reach it, or name it in ignore=."
        )
    return scores


def _alone(total: Tensor) -> Tensor:
    return total


def _by_passing(
    model: nn.Module,
    layers: Mapping[str, SkippableLayer],
    data: LayerData,
    skips: Mapping[str, dict[str, Any]],
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, float]:
    """Apply a function to the input and output of every call; of a branch, to what it is added to and the sum."""
    found: dict[str, list[float]] = defaultdict(list)
    numbers: dict[int, str] = {}

    def receive(number: int, other: Tensor, total: Tensor) -> None:
        if number in numbers:
            found[numbers[number]].append(float(criterion(other, total)))

    for batch in data.batches:
        branches = Branches(receive)
        with undisturbed(model, batch), temporarily_skipped(model, skips), unfused(), branches:
            for path, layer in layers.items():
                _watch(model.get_submodule(path), layer, partial(_passed, path, branches, numbers, found, criterion))
            data.forward(model, batch)
        numbers.clear()
    return {path: sum(scores) / len(scores) for path, scores in found.items()}


def _passed(
    path: str,
    branches: Branches,
    numbers: dict[int, str],
    found: dict[str, list[float]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    given: Tensor | None,
    main: Tensor,
) -> None:
    """Score one call of a layer; of a branch, note its number, for when it is known what it is added to."""
    if given is None:
        numbers[branches.made(main)] = path
    else:
        found[path].append(float(criterion(given, main)))


def _watch(module: nn.Module, layer: SkippableLayer, receive: Callable[[Tensor | None, Tensor], None]) -> None:
    """Call ``receive`` with the input and the main output of each call of a layer.

    The input is that which would be returned in place of the output, as it was before anything wrote to it; None of a
    branch, in whose place zeros are returned.
    """
    given: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(value_at(layer.source, args, kwargs).detach().clone())

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        own = given.pop() if layer.fill == "input" else None
        main = main_output(output)
        if main is not None:
            receive(own, main)

    if layer.fill == "input":
        module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def _by_gradients(
    model: nn.Module,
    layers: Mapping[str, SkippableLayer],
    data: LayerData,
    skips: Mapping[str, dict[str, Any]],
    second: bool,
) -> dict[str, float]:
    """Expand the loss along input minus output of every layer."""
    assert data.loss is not None  # asked for before
    found: dict[str, list[float]] = defaultdict(list)
    for batch in data.batches:
        with undisturbed(model, batch), temporarily_skipped(model, skips), torch.enable_grad():
            parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
            for path, layer in layers.items():
                _watch(model.get_submodule(path), layer, partial(_expand, found[path], second))
            with differentiable(parameters):
                torch.autograd.grad(data.loss(model, batch), parameters, allow_unused=True)
    return {path: sum(scores) / len(data.batches) for path, scores in found.items() if scores}


def _expand(scores: list[float], second: bool, given: Tensor | None, main: Tensor) -> None:
    """Score one call of a layer once the gradient of its output is known."""
    if not main.requires_grad:
        return
    change = -main.detach() if given is None else given - main.detach()

    def receive(gradient: Tensor) -> None:
        if second:
            scores.append(float(second_order(change, gradient)))
        else:
            scores.append(float(first_order(change, gradient).abs().sum()))

    main.register_hook(receive)


def _by_outputs(
    model: nn.Module, layers: Mapping[str, SkippableLayer], data: LayerData, skips: Mapping[str, dict[str, Any]]
) -> dict[str, float]:
    """Compare the model's outputs with and without each layer: the squared distance per example."""
    found: dict[str, float] = dict.fromkeys(layers, 0.0)
    for batch in data.batches:
        whole = compared_outputs(model, data, batch, skips)
        count = len(whole[0]) if whole and whole[0].dim() else 1
        for path, layer in layers.items():
            other = compared_outputs(model, data, batch, {**skips, path: skip_of(layer)})
            moved = [widened(a - b).square().sum() for a, b in zip(whole, other, strict=True)]
            found[path] += float(sum(moved)) / count / len(data.batches)
    return found


def compared_outputs(
    model: nn.Module, data: LayerData, batch: Any, skips: Mapping[str, dict[str, Any]]
) -> list[Tensor]:
    """Return the numbers that a model returns, to be compared with those of a smaller one.

    Raises:
        PruningError: If it returns none, so that nothing could be compared.
    """
    with undisturbed(model, batch), temporarily_skipped(model, skips):
        found = numbers_in(data.forward(model, batch))
    if not found:
        raise PruningError(
            f"{type(model).__name__} returns no numbers on the batches that could be compared, such as scores. Pass a "
            "loss (loss=), and where a criterion compares outputs another criterion."
        )
    return found


def _by_loss(
    model: nn.Module, layers: Mapping[str, SkippableLayer], data: LayerData, skips: Mapping[str, dict[str, Any]]
) -> dict[str, float]:
    """Return how the mean loss changes without each layer."""
    whole = _loss(model, data, skips)
    return {path: _loss(model, data, {**skips, path: skip_of(layer)}) - whole for path, layer in layers.items()}


def _loss(model: nn.Module, data: LayerData, skips: Mapping[str, dict[str, Any]]) -> float:
    assert data.loss is not None  # asked for before
    losses = []
    with undisturbed(model), temporarily_skipped(model, skips):
        for batch in data.batches:
            with unchanged(batch):
                losses.append(float(data.loss(model, batch)))
    return sum(losses) / len(losses)
