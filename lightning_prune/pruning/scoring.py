"""Scores every unit of a model by a criterion: a name, a function of a weight or an accumulator; cuts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.algorithms import criteria
from lightning_prune.measure.expansions import loss_change, output_change
from lightning_prune.measure.gradients import Loss, differentiable, hutchinson, squared_gradients
from lightning_prune.model.calls import call_on, tensors_in
from lightning_prune.model.errors import NoGradientError, PruningError
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.model.shards import is_sharded
from lightning_prune.pruning.accumulators import (
    Accumulator,
    Compensation,
    Curvature,
    Expansion,
    Moments,
    NormScales,
    RandomScores,
    TaylorOfActivations,
    TaylorOfWeights,
    Weights,
)
from lightning_prune.structure import ChannelGroup, Structure, named_tensors

__all__ = [
    "CRITERIA", "Criterion", "accumulate", "accumulator_for", "adds_up", "refuse_blocked", "score_units", "silenced",
]  # fmt: skip

Criterion = str | Callable[[Tensor], Tensor] | type[Accumulator]
"""A name, a function from a weight ``(out, ...)`` to one score per filter ``(out,)``, or a class of accumulators."""

CRITERIA: dict[str, Callable[[], Accumulator]] = {
    "l1": partial(Weights, criteria.filter_l1),
    "l2": partial(Weights, criteria.filter_l2),
    "bn_scale": NormScales,
    "random": RandomScores,
    "activation_mean": partial(Moments, criteria.activation_mean),
    "activation_std": partial(Moments, criteria.activation_std),
    "apoz": partial(Moments, criteria.apoz),
    "taylor": TaylorOfWeights,
    "taylor_activations": TaylorOfActivations,
    "obd": partial(Curvature, squared_gradients),
    "obd_hutchinson": partial(Curvature, hutchinson),
    "taylor_second_order": partial(Expansion, loss_change),
    "output_change": partial(Expansion, output_change, needs="batches"),
    "obs": Compensation,
}
"""Name -> what makes its accumulator; a new criterion is a line here."""


def accumulator_for(criterion: Criterion) -> Accumulator:
    """Return a new accumulator for a criterion."""
    if isinstance(criterion, str):
        return CRITERIA[criterion]()
    if isinstance(criterion, type):
        return criterion()
    return Weights(criterion)


def adds_up(criterion: Criterion) -> bool:
    """Return whether the scores of a criterion are losses, so that those of several units add up."""
    return accumulator_for(criterion).adds_up


def score_units(
    model: nn.Module,
    structure: Structure,
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Score the units of every group, comparably across groups.

    Args:
        model: The model, left as found.
        structure: Its channel groups.
        criterion: A name in :data:`CRITERIA`, a function from a weight ``(out, ...)`` to scores ``(out,)``, or a
            subclass of :class:`~lightning_prune.pruning.accumulators.Accumulator`.
        batches: Batches of data, for criteria that look at activations or gradients.
        loss: From model and batch to the mean loss, for criteria that look at gradients. Without one, the model is
            called on a batch as on example inputs.

    Returns:
        Group name -> one score per unit, ``(width,)``; higher is kept longer.

    Raises:
        ValueError: If the criterion needs batches or a loss and there are none, or gives scores of a wrong shape.
    """
    accumulator = accumulator_for(criterion)
    if accumulator.needs and batches is None:
        raise ValueError(f"criterion={criterion!r} looks at data: pass {accumulator.needs}.")
    if "loss" in accumulator.needs and loss is None:
        raise ValueError(f"criterion={criterion!r} looks at gradients: pass loss=, a function of model and batch.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PruningError(
            f"{type(model).__name__} has parameters on the meta device, which hold no values to score. Load its "
            "weights first, as by model.to_empty(device='cpu') and load_state_dict."
        )
    scores = accumulate(accumulator, model, structure, batches or (), loss or call_on)
    return {name: accumulator.normalise(score) for name, score in scores.items()}


def accumulate(
    accumulator: Accumulator, model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss
) -> dict[str, Tensor]:
    """Update an accumulator with batches and return its scores as they come; the model is left as found."""
    with accumulator.watch(model, structure):
        if accumulator.needs:
            _update(accumulator, model, batches, loss)
        return {name: score.detach() for name, score in accumulator.compute().items()}


def _update(accumulator: Accumulator, model: nn.Module, batches: Iterable[Any], loss: Loss) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    count = 0
    with undisturbed(model), torch.enable_grad(), differentiable(parameters), _step_by_step(model):
        for batch in batches:
            with unchanged(batch):
                accumulator.update(batch, loss)
            count += 1
    if not count:
        raise PruningError("There is nothing to score by: no batch came. Pass batches that can be read.")
    refuse_blocked(model, accumulator.structure, accumulator.means.without_gradient, batch, loss)


def refuse_blocked(
    model: nn.Module, structure: Structure, names: Iterable[str], batch: Any, loss: Loss | None = None
) -> None:
    """Refuse to score groups as worth nothing because no gradient reached them, where the loss depends on them.

    Args:
        model: The model, left as found.
        structure: Its channel groups.
        names: Groups that no backward pass has shown.
        batch: A batch of data.
        loss: From model and batch to the loss; without one, outputs are looked at.

    Raises:
        NoGradientError: Naming the first of them.
    """

    def found() -> list[Tensor]:
        with unchanged(batch), undisturbed(model):
            return [tensor.detach().clone() for tensor in tensors_in((loss or call_on)(model, batch))]

    names = [name for name in names if name in structure.groups]
    if not names or any(map(is_sharded, model.parameters())):
        return
    before = found()
    for name in names:
        with silenced(model, structure.groups[name]):
            after = found()
        if not all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(before, after, strict=True)):
            raise NoGradientError(
                f"{name}: no gradient reaches its channels, and what the model computes depends on them: it runs them "
                "in torch.no_grad, or detaches them. A criterion that follows autograd would take them for useless. "
                f"Name ignore=[{name!r}], or use a criterion of weights, such as 'l1'."
            )


@contextmanager
def silenced(model: nn.Module, group: ChannelGroup, unit: int | None = None) -> Iterator[None]:
    """Zero what sums over a unit, or over all of a group, or what makes it where nothing does, inside the block."""
    own = named_tensors(model)
    slots = [slot for slot in group.slots if slot.role == "consumer"] or group.slots
    saved = []
    try:
        for slot in slots:
            tensor = own[slot.tensor].data
            chosen = slot.units >= 0 if unit is None else slot.units == unit
            indices = torch.from_numpy(chosen.nonzero()[0]).to(tensor.device)
            saved.append((tensor, slot.dim, indices, tensor.index_select(slot.dim, indices)))
            tensor.index_fill_(slot.dim, indices, 0)
        yield
    finally:
        for tensor, dim, indices, values in reversed(saved):
            tensor.index_copy_(dim, indices, values)


@contextmanager
def _step_by_step(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers one step after another, as fused kernels show nothing of what happens between steps."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries = (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ()
    enabled = [library.set_flags(_enabled=False)[0] for library in libraries]
    try:
        yield
    finally:
        for library, before in zip(libraries, enabled, strict=True):
            library.set_flags(_enabled=before)
