"""Scores every unit of a model by a criterion chosen by name, or by a function of the user's; cuts nothing."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.algorithms import criteria
from lightning_prune.measure.expansions import output_changes, second_order_changes
from lightning_prune.measure.gradients import Loss, batch_gradients, empirical_fisher, hutchinson
from lightning_prune.measure.unit_statistics import (
    UnitMeans,
    gather_contributions,
    over_units,
    taylor_over_units,
    watch_contributions,
    watch_moments,
)
from lightning_prune.model.calls import call_on, undisturbed
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import ChannelGroup, Slot, Structure, named_tensors

__all__ = ["CRITERIA", "Criterion", "adds_up", "by_l2", "by_mean", "score_units"]

Criterion = str | Callable[[Tensor], Tensor]
"""The name of a criterion, or a function from a weight ``(out, ...)`` to one score per filter ``(out,)``."""

Scores = dict[str, Tensor]
_Gather = Callable[[nn.Module, Structure, Iterable[Any], Loss], Scores]


def by_mean(scores: Tensor) -> Tensor:
    """Divide a layer's scores by their mean, so that wide and narrow layers can be compared."""
    mean = scores.abs().mean()
    return scores / mean if mean > 0 else scores


def by_l2(scores: Tensor) -> Tensor:
    """Divide a layer's scores by their l2 norm.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, eq. 10 (arXiv:1611.06440).
    """
    norm = torch.linalg.vector_norm(scores)
    return scores / norm if norm > 0 else scores


def _as_is(scores: Tensor) -> Tensor:
    return scores


@dataclass(frozen=True)
class NamedCriterion:
    """A criterion that YAML may name.

    Attributes:
        gather: Scores every unit; gets the model, its structure, batches and loss.
        needs: ``""``, ``"batches"``, or ``"batches and loss"``.
        normalise: What makes the scores of one layer comparable with another's.
        of_moments: For criteria of activations, what makes scores of their moments.
        adds_up: Whether scores are losses, so that those of several units add up.
    """

    gather: _Gather
    needs: str
    normalise: Callable[[Tensor], Tensor]
    of_moments: Callable[..., Tensor] | None = None
    adds_up: bool = False


def adds_up(criterion: Criterion) -> bool:
    """Tell whether the scores of a criterion are losses, so that those of several units add up."""
    return isinstance(criterion, str) and CRITERIA[criterion].adds_up


def score_units(
    model: nn.Module,
    structure: Structure,
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Scores:
    """Score the units of every group, comparably across groups.

    Args:
        model: The model, left as found.
        structure: Its channel groups.
        criterion: A name in :data:`CRITERIA`, or a function from a weight ``(out, ...)`` to scores ``(out,)``.
        batches: Batches of data, for criteria that look at activations or gradients.
        loss: From model and batch to the mean loss, for criteria that look at gradients. Without one, the model is
            called on a batch as on example inputs.

    Returns:
        Group name -> one score per unit, ``(width,)``; higher is kept longer.

    Raises:
        ValueError: If the criterion needs batches or a loss and there are none, or gives scores of a wrong shape.
    """
    named = (
        CRITERIA[criterion]
        if isinstance(criterion, str)
        else NamedCriterion(partial(_of_weights, criterion), "", by_mean)
    )
    if named.needs and batches is None:
        raise ValueError(f"criterion={criterion!r} looks at data: pass {named.needs}.")
    if "loss" in named.needs and loss is None:
        raise ValueError(f"criterion={criterion!r} looks at gradients: pass loss=, a function of model and batch.")
    scores = named.gather(model, structure, batches or (), loss or call_on)
    return {name: named.normalise(score.detach()) for name, score in scores.items()}


def _of_weights(
    score: Callable[[Tensor], Tensor], model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss
) -> Scores:
    """Score units by the filters that make them, summed over the layers of the group."""
    own = named_tensors(model)
    scores: Scores = {}
    for group in structure.groups.values():
        for slot in [slot for slot in group.slots if slot.role == "producer"] or group.slots:
            _add(scores, group, slot, score, own[slot.tensor].detach().transpose(0, slot.dim))
    return scores


def _of_norms(model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss) -> Scores:
    """Score units by the scales of the normalisations behind them, summed over the layers of the group."""
    own = named_tensors(model)
    known = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm
    norms = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, known) or type(module).__name__.endswith("Norm")
    }
    scores: Scores = {}
    for name, group in structure.groups.items():
        for slot in group.slots:
            if slot.tensor in norms and own[slot.tensor].dim() == 1:
                _add(scores, group, slot, criteria.batch_norm_scale, own[slot.tensor])
        if name not in scores:
            raise PruningError(
                f"bn_scale: {name} has no normalisation with a scale. Name it in ignore=, or use another criterion."
            )
    return scores


def _add(scores: Scores, group: ChannelGroup, slot: Slot, score: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    found = score(weight)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"criterion: for {slot.tensor}, it gave {type(found).__name__}; it must give a tensor, one score per "
            "filter."
        )
    if found.shape != weight.shape[:1]:
        raise ValueError(
            f"criterion: for {slot.tensor}, {tuple(weight.shape)}, it gave scores of shape {tuple(found.shape)}; "
            f"it must give one per filter, ({len(weight)},)."
        )
    if group.name not in scores:
        scores[group.name] = torch.zeros(group.width, dtype=found.dtype, device=found.device)
    own = scores[group.name]
    if slot.aligned:
        own += found.to(own)
        return
    inside = slot.units >= 0
    found = found[torch.from_numpy(inside).to(found.device)]
    own.index_add_(0, torch.from_numpy(slot.units[inside]).to(own.device), found.to(own))


def _random(model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss) -> Scores:
    """Draw scores: the same for one seed, and leaving the global generator alone."""

    def draw(name: str, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
        return torch.rand(width, generator=generator)

    return {name: draw(name, group.width) for name, group in structure.groups.items()}


def _of_moments(
    score: Callable[..., Tensor], model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss
) -> Scores:
    with undisturbed(model), watch_moments(model, structure) as found:
        for batch in batches:
            loss(model, batch)
    for name in structure.groups:
        if name not in found:
            raise PruningError(
                f"{name}: no batch came, or nothing that reads its channels ran, so there are no activations to score. "
                f"Pass batches, or name ignore=[{name!r}]."
            )
    return {name: score(**found[name]) for name in structure.groups}


def _taylor_weights(model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss) -> Scores:
    means = UnitMeans({name: group.width for name, group in structure.groups.items()})
    parameters = dict(model.named_parameters())
    with undisturbed(model), torch.enable_grad():
        for batch in batches:
            means.update(taylor_over_units(structure, parameters, batch_gradients(model, batch, loss)))
    return means.compute()


def _taylor_activations(model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss) -> Scores:
    means = UnitMeans({name: group.width for name, group in structure.groups.items()})
    with undisturbed(model), torch.enable_grad(), watch_contributions(model, structure) as found:
        for batch in batches:
            found.clear()
            batch_gradients(model, batch, loss)
            gather_contributions(means, found)
    return means.compute()


def _obd(
    diagonal: Callable[..., dict[str, Tensor]],
    model: nn.Module,
    structure: Structure,
    batches: Iterable[Any],
    loss: Loss,
) -> Scores:
    curvature = diagonal(model, batches, loss)
    parameters = dict(model.named_parameters())
    saliencies = {name: criteria.obd(parameters[name].detach(), h) for name, h in curvature.items()}
    found = {name: over_units(group.slots, group.width, saliencies) for name, group in structure.groups.items()}
    return {name: total for name, total in found.items() if total is not None}  # integers alone have no curvature


def _of_activations(score: Callable[..., Tensor]) -> NamedCriterion:
    return NamedCriterion(partial(_of_moments, score), "batches", by_l2, score)


CRITERIA: dict[str, NamedCriterion] = {
    "l1": NamedCriterion(partial(_of_weights, criteria.filter_l1), "", by_mean),
    "l2": NamedCriterion(partial(_of_weights, criteria.filter_l2), "", by_mean),
    "bn_scale": NamedCriterion(_of_norms, "", _as_is),
    "random": NamedCriterion(_random, "", _as_is),
    "activation_mean": _of_activations(criteria.activation_mean),
    "activation_std": _of_activations(criteria.activation_std),
    "apoz": _of_activations(criteria.apoz),
    "taylor": NamedCriterion(_taylor_weights, "batches and loss", _as_is, adds_up=True),
    "taylor_activations": NamedCriterion(_taylor_activations, "batches and loss", by_l2),
    "obd": NamedCriterion(partial(_obd, empirical_fisher), "batches and loss", _as_is, adds_up=True),
    "taylor_second_order": NamedCriterion(second_order_changes, "batches and loss", _as_is, adds_up=True),
    "output_change": NamedCriterion(output_changes, "batches", _as_is, adds_up=True),
    "obd_hutchinson": NamedCriterion(partial(_obd, hutchinson), "batches and loss", _as_is, adds_up=True),
}
"""Name -> criterion; a new one is a line here and a function in ``criteria``."""
