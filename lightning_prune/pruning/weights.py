"""Zeros single weights of a model in plain PyTorch: score, choose, mask; knows no Trainer."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_prune.algorithms.criteria import magnitude
from lightning_prune.algorithms.selection import (
    Scored,
    keep_best_of_all,
    keep_n_of_m,
    number_to_prune,
    parse_pattern,
)
from lightning_prune.measure.footprint import WHOLE, Part
from lightning_prune.model.errors import PruningError
from lightning_prune.model.lazy import Lazily
from lightning_prune.model.shards import whole
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.pruning.amounts import Amount, check_amount, in_fractions
from lightning_prune.pruning.arguments import (
    Parameters,
    Parts,
    by_path,
    check_choice,
    check_criterion,
    check_list,
    check_module,
    listed,
    optimizers_of,
    part_of,
)
from lightning_prune.pruning.find_weights import Weight, amount_by_weight, find_weights, warning_of
from lightning_prune.pruning.left_alone import left_alone, weights_left_alone
from lightning_prune.pruning.report_types import GroupWidth, WeightReport
from lightning_prune.structure import Pinned
from lightning_prune.surgery.masks import Masks, carried_masks

__all__ = [
    "WEIGHT_CRITERIA", "ToPrune", "WeightCount", "WeightCriterion", "WeightScope", "check_weight_arguments",
    "choose_weights", "count_unmasked", "prune_weights", "score_weights", "shuffled", "weight_count",
    "weight_report", "weights_to_prune",
]  # fmt: skip

WeightCriterion = str | Callable[[Tensor], Tensor]
"""The name of a criterion, or a function from a weight to one score for each of its entries."""

WeightScope = Literal["layer", "global"]
"""Whether scores are compared across weights, or every weight loses the same share."""


class WeightCount(NamedTuple):
    """A weight: its name, how many entries it has, and how many of them stay."""

    name: str
    size: int
    stays: int


@changes_model
def prune_weights(
    model: nn.Module,
    amount: Amount | None = None,
    *,
    criterion: WeightCriterion = "magnitude",
    scope: WeightScope = "layer",
    module: Parts = None,
    ignore: Parameters = (),
    parameters: Parameters | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    pattern: str | None = None,
) -> WeightReport:
    """Set weights of a model to zero, in place.

    Nothing is wrapped or renamed, and optimizers forget what they remembered of the weights that are gone. The model's
    state dicts tell which these are. To train on without them, do it within :func:`~lightning_prune.hold_masks`. What
    an earlier call set to zero stays zero, and counts.

    Args:
        model: The model.
        amount: Fraction, in [0, 1), of the weights that are set to zero, relative to the dense model; or a whole number
            of them, of each layer or, with ``scope="global"``, of all; or these by pattern of paths of modules or
            parameters, or by module, of their weights. What no pattern names stays dense. By default 0.5, or what
            ``pattern`` says.
        criterion: Name of a criterion, or a function from a weight to one score for each of its entries; higher is kept
            longer. ``magnitude`` or ``random``.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers.
        optimizer: The optimizer or optimizers that train the model; their state follows.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N are kept. Weights whose input dimension is
            no multiple of M stay dense, and the report says so. Each position of a convolution's kernel has its own
            groups of input channels, as NVIDIA's sparse tensor cores read a convolution: (out, height, width, in).

    Raises:
        ValueError: If an argument is out of range, or a pattern names nothing.
        TypeError: If an argument is of a wrong kind.
        PruningError: If there is nothing to prune.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> report = prune_weights(model, amount=0.9)
        >>> int(model[0].weight.count_nonzero() + model[2].weight.count_nonzero()), round(report.reached, 3)
        (6, 0.9)

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015 (arXiv:1506.02626);
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021 (arXiv:2104.08378).
    """
    check_weight_arguments("prune_weights", amount, scope, criterion, parameters, ignore, pattern)
    check_module("prune_weights", module)
    named = [*(amount if isinstance(amount, Mapping) else ()), *(parameters or ()), *listed(module)]
    alone = left_alone(model, named)
    found = weights_to_prune(model, amount, parameters, ignore, pattern, scope, part_of(model, module), alone)
    scores = score_weights(found.weights, criterion)
    keep = choose_weights(found.weights, scores, carried_masks(model), found.amount, scope, pattern)
    optimizers = optimizers_of("prune_weights", model, optimizer)
    before = count_unmasked(model)
    Masks(model).set_masks_(keep, optimizers)
    warning = warning_of(model, found.others)
    if warning:
        warnings.warn(f"prune_weights: {warning}", stacklevel=3)  # behind this, the function and its decorator
    return weight_report(model, before, keep, {**found.stay, **found.others}, found.amount)


def weight_report(
    model: nn.Module,
    before: int,
    keep: Mapping[str, Tensor],
    stay: Mapping[str, str],
    amount: Amount,
    details: Any = None,
) -> WeightReport:
    """Report a pruning of weights that was done.

    Args:
        model: The pruned model.
        before: Parameters that were not masked before.
        keep: Name of a parameter that could be pruned -> which weights are kept, of its shape.
        stay: Name of a parameter that could not be pruned -> why.
        amount: Fraction of all that ``keep`` names that was asked for, or fractions by name.
        details: What the method knows besides.
    """
    groups = tuple(GroupWidth(name, stays.numel(), int(stays.count_nonzero())) for name, stays in keep.items())
    shares = amount if isinstance(amount, Mapping) else {group.name: amount for group in groups}
    size = sum(group.before for group in groups)
    asked = sum(shares[group.name] * group.before for group in groups)
    kept = sum(group.after for group in groups)
    pinned = tuple(_pinned(model, name, why) for name, why in stay.items())
    return WeightReport(
        before,
        count_unmasked(model),
        groups,
        dict(keep),
        pinned,
        asked / max(size, 1),
        1 - kept / max(size, 1),
        details,
    )


def _pinned(model: nn.Module, name: str, why: str) -> Pinned:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)  # it may be made of other parameters
    rows = 0 if is_lazy(tensor) else len(tensor)
    return Pinned(name, 0, rows, rows, why)


def count_unmasked(model: nn.Module) -> int:
    """Count the parameters of a model that its masks do not hold at zero."""
    masks = carried_masks(model)
    total = 0
    for name, parameter in model.named_parameters():
        total += weight_count(name, parameter, masks.get(name)).stays
    return total


class ToPrune(NamedTuple):
    """What is to be pruned: the weights, how much of all or of each by name, which stay dense and why; and others.

    Others are parameters of two or more dimensions that were not considered, and what they are.
    """

    weights: dict[str, Weight]
    amount: Amount
    stay: dict[str, str]
    others: dict[str, str]

    def found_anew(self, model: nn.Module) -> ToPrune:
        """Return the same with the parameters that a model has now: whole for a pruning step they are other objects."""
        own = dict(model.named_parameters())
        weights = {name: weight._replace(parameter=own[name]) for name, weight in self.weights.items() if name in own}
        return self._replace(weights=weights)


def weights_to_prune(
    model: nn.Module,
    amount: Amount | None,
    parameters: Parameters | None,
    ignore: Parameters,
    pattern: str | None,
    scope: WeightScope,
    part: Part = WHOLE,
    alone: Mapping[str, str] = MappingProxyType({}),
) -> ToPrune:
    """Find the weights that the arguments of :func:`prune_weights` mean, and the fractions asked for.

    ``alone`` are the networks that are not pruned, by path, and why.

    Raises:
        ValueError: If a pattern names nothing.
        PruningError: If nothing is left to prune, or a whole number is as large as a weight.
    """
    ignore = [*ignore, *alone]
    if isinstance(amount, Mapping):
        amount = by_path(model, amount, "amount")
        weights, stay, others = find_weights(model, list(amount), ignore, what="amount", part=part)
    else:
        weights, stay, others = find_weights(model, parameters, ignore, part=part)
    others = others | weights_left_alone(model, alone)
    if pattern is not None:
        n, m = parse_pattern(pattern)
        unknown = [name for name, weight in weights.items() if weight.input_dim is None]
        stay |= dict.fromkeys(
            unknown, "its module does not tell along which dimension its inputs lie; prune_obs sees it"
        )
        inputs = {name: weight.inputs for name, weight in weights.items() if name not in stay}
        stay |= {name: f"its {size} inputs are no multiple of {m}" for name, size in inputs.items() if size % m}
        weights = {name: weight for name, weight in weights.items() if name not in stay}
        if not weights:
            raise PruningError(f"pattern={pattern!r}: no weight has a number of inputs that is a multiple of {m}.")
        return ToPrune(weights, 1 - n / m, stay, others)
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    if not isinstance(amount, Mapping):
        asked = in_fractions(0.5 if amount is None else amount, sizes, scope, "weights")
        return ToPrune(weights, asked, stay, others)
    amounts = in_fractions(amount_by_weight(weights, amount), sizes, scope, "weights")
    assert isinstance(amounts, Mapping)  # as it was given
    return ToPrune({name: weights[name] for name in amounts}, amounts, stay, others)


def score_weights(
    weights: Mapping[str, Weight], criterion: WeightCriterion, seed: int | None = None
) -> Mapping[str, Scored]:
    """Score every entry of every weight; higher is kept longer.

    Scores of a criterion that has a name are computed when they are looked at, and not held. ``random`` draws by
    ``seed``, by default that of torch.

    Raises:
        ValueError: If a function of the user's gives scores of another shape.
        PruningError: If a weight has been converted, such as to a sparse layout.
    """
    for name, weight in weights.items():
        tensor = weight.parameter
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.itemsize == 1:
            raise PruningError(
                f"{name} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}: only dense weights of 16 "
                "bits or more can be scored. Prune before weights are converted."
            )
    if isinstance(criterion, str):
        score, drawn = WEIGHT_CRITERIA[criterion], torch.initial_seed() if seed is None else seed
        return Lazily(weights, lambda name: score(name, whole(weights[name].parameter.detach()), drawn))
    found = {}
    for name, weight in weights.items():
        scores = criterion(whole(weight.parameter.detach()))
        if scores.shape != weight.parameter.shape:
            raise ValueError(
                f"criterion: {name} of shape {tuple(weight.parameter.shape)} got scores of shape "
                f"{tuple(scores.shape)}. Return one score for each entry."
            )
        found[name] = Scored(scores)
    return found


def choose_weights(
    weights: Mapping[str, Weight],
    scores: Mapping[str, Scored],
    alive: Mapping[str, Tensor],
    amount: Amount,
    scope: WeightScope,
    pattern: str | None = None,
) -> dict[str, Tensor]:
    """Choose which entries stay: as many as asked to the last one, and none that has gone before.

    Args:
        weights: The weights.
        scores: One score per entry, by name.
        alive: What earlier masks have left, as bool that broadcasts to the weight; all of a weight that is not there.
        amount: Fraction that shall be zero, of all entries there are, or by name of each weight's.
        scope: ``"global"`` or ``"layer"``; amounts by name are of each weight.
        pattern: ``"N:M"`` where neighbours leave; of each M stay as many as ``amount`` leaves, rounded up.

    Returns:
        What stays, as bool of each weight's shape, by name.
    """
    ranked = Lazily(weights, lambda name: replace(scores[name], alive=alive.get(name)))
    if pattern is not None:
        assert not isinstance(amount, Mapping)
        m = parse_pattern(pattern)[1]
        stays = _stays(m, amount)
        chosen = {}
        for name, weight in weights.items():
            assert weight.input_dim is not None  # where it is not known, the weight stays
            chosen[name] = keep_n_of_m(ranked[name], stays, m, weight.input_dim)
        return chosen
    left = {name: weight_count(name, weight.parameter, alive.get(name)).stays for name, weight in weights.items()}
    sizes = {name: weight.parameter.numel() for name, weight in weights.items()}
    if scope == "global" and not isinstance(amount, Mapping):
        return keep_best_of_all(ranked, min(_stays(sum(sizes.values()), amount), sum(left.values())))
    shares = amount if isinstance(amount, Mapping) else dict.fromkeys(weights, amount)
    chosen = {}
    for name in weights:
        count = min(_stays(sizes[name], shares[name]), left[name])
        chosen |= keep_best_of_all({name: ranked[name]}, count)
    return chosen


def shuffled(keep: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Put what stays of each weight at random places of it; no random number of the global generator is used up."""
    order = {name: _random(name, stays, seed).reshape(-1).argsort() for name, stays in keep.items()}
    return {name: stays.reshape(-1)[order[name]].view(stays.shape) for name, stays in keep.items()}


def weight_count(name: str, weight: Tensor, keep: Tensor | None) -> WeightCount:
    """Count what stays of a weight; without a mask all of it does."""
    size = weight.numel()
    return WeightCount(name, size, size if keep is None else int(keep.count_nonzero()) * size // keep.numel())


def check_weight_arguments(
    where: str,
    amount: Amount | None,
    scope: str,
    criterion: WeightCriterion,
    parameters: Parameters | None,
    ignore: Parameters,
    pattern: str | None,
) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If an argument is out of range or unknown, or two contradict.
        TypeError: If an argument is of a wrong kind.
    """
    if amount is not None:
        check_amount(where, amount)
    if pattern is not None:
        try:
            parse_pattern(pattern)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if amount is not None:
            raise ValueError(
                f"{where}(amount={amount!r}, pattern={pattern!r}): the pattern says how much leaves. Give one of both."
            )
    for name, given in (("parameters", parameters), ("ignore", ignore)):
        check_list(where, name, given)
    if isinstance(amount, Mapping) and parameters is not None:
        raise ValueError(f"{where}(parameters={parameters!r}): amounts by pattern name the parameters. Leave it out.")
    check_choice(where, "scope", scope, get_args(WeightScope))
    check_criterion(where, criterion, WEIGHT_CRITERIA)


def _stays(size: int, amount: float) -> int:
    return size - number_to_prune(amount, size)


def _random(name: str, weight: Tensor, seed: int) -> Tensor:
    """Draw scores: the same for one seed, and leaving the global generator alone."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)


WEIGHT_CRITERIA: dict[str, Callable[[str, Tensor, int], Scored]] = {
    "magnitude": lambda name, weight, seed: Scored(weight, magnitude),
    "random": lambda name, weight, seed: Scored(_random(name, weight, seed)),
}
