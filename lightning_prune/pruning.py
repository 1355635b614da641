"""Prunes a model in plain PyTorch: score, plan, prove, cut; knows no Trainer."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.budget import Dense, Footprint, Scope, Scores, Target, measure, plan
from lightning_prune.criteria import FILTER_CRITERIA
from lightning_prune.errors import PruningError
from lightning_prune.flops import count_flops
from lightning_prune.inputs import ExampleInputs
from lightning_prune.structure import Keep, Pinned, Structure, find_structure, named_tensors, trace
from lightning_prune.surgery import AttributeChange, Cut, Disproof, Kept, cut_, draft, prove_numbers, prove_structure

__all__ = [
    "Amount", "Criterion", "GroupWidth", "Outcome", "Report", "amount_by_group", "check_arguments", "check_optimizers", "cut_to_",
    "filter_scores", "prune_filters", "with_ignored",
]  # fmt: skip

Criterion = str | Callable[[Tensor], Tensor]
"""The name of a criterion, or a function from a weight ``(out, ...)`` to one score per filter ``(out,)``."""

Amount = float | Mapping[str, float]


@dataclass(frozen=True)
class GroupWidth:
    """The width of a channel group before and after a cut."""

    name: str
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class Report:
    """What a pruning did.

    Attributes:
        params_before: Parameters of the model before.
        params_after: Parameters after.
        flops_before: Multiply-adds of one forward pass on the example inputs before, as fvcore counts.
        flops_after: Multiply-adds after.
        groups: Name and widths of every channel group.
        kept: For every parameter or buffer that changed, dimension -> indices kept.
        attributes: Attributes of modules that changed.
        pinned: What stayed, and why.
        proved: Whether the cut was proved. A cut that cannot be proved is not made, so this is False only where nothing was
            cut.
        proof: What was proved, in words.
    """

    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    groups: tuple[GroupWidth, ...]
    kept: Kept
    attributes: tuple[AttributeChange, ...]
    pinned: tuple[Pinned, ...]
    proved: bool
    proof: str


def prune_filters(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: Amount = 0.3,
    criterion: Criterion = "l1",
    target: Target = "filters",
    scope: Scope = "layer",
    ignore: Sequence[str] = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    round_to: int = 1,
) -> Report:
    """Remove filters and neurons from a model, in place.

    Parameters stay the same objects, their gradients are dropped, and the optimizer's state follows. The cut is proved
    before it is made; channels whose cut cannot be proved stay, and the report says so.

    Args:
        model: The model; anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        amount: Fraction, in [0, 1), of the target that leaves; or, by pattern of module paths, of the channels that the modules
            produce (what no pattern names stays whole).
        criterion: ``"l1"``, ``"l2"``, ``"random"`` or a function from a weight ``(out, ...)`` to scores ``(out,)``.
        target: What ``amount`` is a fraction of: the filters that can leave, or the whole model's parameters or FLOPs.
        scope: ``"layer"`` takes the same share of every layer; ``"global"`` compares scores, divided by their layer's mean,
            across layers.
        ignore: Patterns of module paths whose channels stay.
        optimizer: The optimizer or optimizers that train the model.
        round_to: Widths after the cut are multiples of this, rounded up.

    Raises:
        ValueError: If an argument is out of range, or a pattern names no module.
        PruningError: If the model does not run, nothing can be cut or the target cannot be reached. The model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> report = prune_filters(model, torch.randn(1, 4), amount=0.3)
        >>> model[0].out_features, report.params_before, report.params_after
        (7, 72, 51)

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv:1608.08710).
    """
    check_arguments("prune_filters", amount, criterion, target, scope, round_to)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    check_optimizers("prune_filters", optimizers)
    structure = with_ignored(model, find_structure(trace(model, example_inputs)), ignore)
    amount = amount_by_group(structure, amount)
    dense = Dense(
        {name: group.width for name, group in structure.groups.items()},
        Footprint(sum(p.numel() for p in model.parameters()), count_flops(model, example_inputs).total),
    )
    outcome = cut_to_(
        model, example_inputs, structure, filter_scores(model, structure, criterion), amount,
        target=target, scope=scope, round_to=round_to, dense=dense, flops=dense.footprint.flops, optimizers=optimizers,
    )  # fmt: skip
    return Report(
        params_before=dense.footprint.params,
        params_after=sum(p.numel() for p in model.parameters()),
        flops_before=dense.footprint.flops,
        flops_after=count_flops(model, example_inputs).total,
        groups=outcome.widths,
        kept=outcome.cut.kept,
        attributes=outcome.cut.attributes,
        pinned=tuple(outcome.structure.pinned),
        proved=True,
        proof=outcome.proof,
    )


@dataclass(frozen=True, eq=False)
class Outcome:
    """A cut that was made, the structure it was planned on, the groups refused on the way, and how it was proved."""

    cut: Cut
    structure: Structure
    refused: tuple[str, ...]
    widths: tuple[GroupWidth, ...]
    proof: str


def cut_to_(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    scores: Scores,
    amount: Amount,
    *,
    target: Target,
    scope: Scope,
    round_to: int,
    dense: Dense,
    flops: int,
    optimizers: Iterable[Optimizer] = (),
) -> Outcome:
    """Plan a cut that reaches the amount, prove it and make it; groups whose cut cannot be proved stay whole.

    Args:
        model: The model that ``structure`` was traced from.
        example_inputs: What the proof runs on.
        structure: Its channel groups.
        scores: One score per unit of every group.
        amount: Fraction of what ``dense`` says was there, or one fraction per group.
        target: What ``amount`` is a fraction of.
        scope: ``"layer"`` or ``"global"``.
        round_to: Widths after the cut are multiples of this.
        dense: What was there at the start.
        flops: Multiply-adds of the model as it stands, as counted.
        optimizers: Optimizers whose state follows.

    Raises:
        PruningError: If the amount cannot be reached. The model is as it was.
    """
    uncounted = flops - structure.flops({})  # what only the counter knows of, taken as fixed
    refused: list[str] = []
    while True:
        keep = plan(
            structure, scores, amount, target=target, scope=scope, round_to=round_to, dense=dense.without(refused),
            footprint=partial(measure, model, structure, uncounted=uncounted),
        )  # fmt: skip
        unproved = _unproved(model, example_inputs, structure, keep)
        if not unproved:
            break
        for name, reason in unproved.items():
            structure = structure.without([name], reason)
        refused += unproved
    cut = draft(model, structure, keep)
    cut_(model, cut, cut.tensors(model), optimizers)
    widths = tuple(GroupWidth(name, group.width, int(keep[name].sum())) for name, group in structure.groups.items())
    return Outcome(cut, structure, tuple(refused), widths, _words(structure, cut))


def with_ignored(model: nn.Module, structure: Structure, ignore: Sequence[str]) -> Structure:
    """Return the structure with the channels that the named modules produce pinned.

    Raises:
        ValueError: If a pattern names no module.
        PruningError: If nothing is left to prune.
    """
    paths = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    for pattern in ignore:
        if not any(_names(pattern, path) for path in paths):
            raise ValueError(f"ignore={pattern!r} names no module of {type(model).__name__}.{_near(pattern, paths)}")
    ignored = [
        name
        for name, group in structure.groups.items()
        if any(_names(pattern, producer) for pattern in ignore for producer in group.producers)
    ]
    structure = structure.without(ignored, "named in ignore=")
    if not structure.groups:
        why = "; ".join(f"{pin.tensor}: {pin.reason}" for pin in structure.pinned[:5])
        raise PruningError(f"Nothing is left to prune in {type(model).__name__}: every channel stays ({why}).")
    return structure


def amount_by_group(structure: Structure, amount: Amount) -> Amount:
    """Turn amounts by pattern of module paths into amounts by group name; a plain fraction passes.

    Raises:
        ValueError: If a pattern names no module that produces channels, or two give one group different amounts.
        PruningError: If every channel that a pattern names is pinned.
    """
    if not isinstance(amount, Mapping):
        return amount
    amounts: dict[str, float] = {}
    chosen_by: dict[str, str] = {}
    pinned = {pin.tensor.rpartition(".")[0]: pin.reason for pin in structure.pinned}
    paths = [*dict.fromkeys(p for group in structure.groups.values() for p in group.producers), *pinned]
    for pattern, fraction in amount.items():
        named = [n for n, group in structure.groups.items() if any(_names(pattern, p) for p in group.producers)]
        stays = next((f"{path}: {reason}" for path, reason in pinned.items() if _names(pattern, path)), None)
        if not named and stays:
            raise PruningError(f"amount[{pattern!r}]: all the channels it names stay ({stays}). Leave the pattern out.")
        if not named:
            raise ValueError(f"amount[{pattern!r}] names no module that produces channels.{_near(pattern, paths)}")
        for name in named:
            if amounts.setdefault(name, fraction) != fraction:
                raise ValueError(
                    f"amount: {chosen_by[name]!r} asks for {amounts[name]:g} and {pattern!r} for {fraction:g} of the same "
                    f"channels, those of {name} (made by {', '.join(structure.groups[name].producers)}). Give them one amount."
                )
            chosen_by.setdefault(name, pattern)
    return amounts


def filter_scores(model: nn.Module, structure: Structure, criterion: Criterion) -> dict[str, Tensor]:
    """Score the units of every group by the filters that make them, summed over the layers of the group.

    Returns:
        Group name -> one score per unit, ``(width,)``; higher is kept longer.

    Raises:
        ValueError: If a criterion of the user's does not give one score per filter.
    """
    own = named_tensors(model)
    scores = {}
    for name, group in structure.groups.items():
        if criterion == "random":
            generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
            scores[name] = torch.rand(group.width, generator=generator)
            continue
        score = FILTER_CRITERIA[criterion] if isinstance(criterion, str) else criterion
        made = [slot for slot in group.slots if slot.role == "producer"] or group.slots
        for slot in made:
            weight = own[slot.tensor].detach().transpose(0, slot.dim)
            found = score(weight)
            if found.shape != weight.shape[:1]:
                raise ValueError(
                    f"criterion: for {slot.tensor}, {tuple(weight.shape)}, it gave scores of shape {tuple(found.shape)}; "
                    f"it must give one per filter, ({len(weight)},)."
                )
            units = torch.from_numpy(slot.units).to(found.device)
            total = scores.setdefault(name, torch.zeros(group.width, dtype=found.dtype, device=found.device))
            total.index_add_(0, units[units >= 0], found[units >= 0].to(total))
    return scores


def check_arguments(
    where: str, amount: Amount, criterion: Criterion, target: Target, scope: Scope, round_to: int
) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.
    """
    for name, fraction in amount.items() if isinstance(amount, Mapping) else [("", amount)]:
        told = f"{where}(amount={{{name!r}: {fraction!r}}})" if name else f"{where}(amount={fraction!r})"
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise TypeError(f"{told}: amount is a fraction, or fractions by pattern of module paths.")
        if not 0 <= fraction < 1:
            hint = f" Write {fraction / 100:g} to remove {fraction:g} %." if 1 < fraction < 100 else ""
            raise ValueError(f"{told}: amount is the fraction that leaves and must lie in [0, 1).{hint}")
    if isinstance(amount, Mapping) and (target != "filters" or scope != "layer"):
        raise ValueError(
            f"{where}(target={target!r}, scope={scope!r}): amounts by pattern are fractions of each layer's filters; "
            "use target='filters', scope='layer', or one amount for the whole model."
        )
    for name, value, allowed in (("target", target, get_args(Target)), ("scope", scope, get_args(Scope))):
        if value not in allowed:
            raise ValueError(f"{where}({name}={value!r}): choose one of {', '.join(map(repr, allowed))}.")
    known = [*FILTER_CRITERIA, "random"]
    if isinstance(criterion, str) and criterion not in known:
        raise ValueError(f"{where}(criterion={criterion!r}): choose one of {', '.join(map(repr, known))}, or pass a function.")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"{where}(round_to={round_to!r}): widths are rounded to multiples of a whole number from 1.")


def check_optimizers(where: str, optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose state cannot follow a cut.

    Raises:
        PruningError: For LBFGS, which keeps one flat history of all parameters.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise PruningError(
            f"{where}: LBFGS keeps one history for all parameters together, which cannot be cut. "
            "Train with a first-order optimizer, such as SGD or AdamW, while pruning."
        )


def _unproved(model: nn.Module, example_inputs: ExampleInputs, structure: Structure, keep: Keep) -> dict[str, str]:
    """Return the groups whose cut cannot be proved together with the others', with the reason."""
    cutting = [name for name, stays in keep.items() if not stays.all()]
    reasons: dict[str, str] = {}

    def prove(names: list[str]) -> Disproof | None:
        cut = draft(model, structure, {name: keep[name] for name in names})
        return prove_structure(model, example_inputs, structure, cut) or prove_numbers(model, example_inputs, structure, cut)

    def provable(names: list[str], accepted: list[str]) -> list[str]:
        failure = prove(accepted + names) if names else None
        if failure is None:
            return names
        if len(names) == 1:
            reasons[names[0]] = failure.reason
            return []
        left = provable(names[: len(names) // 2], accepted)
        return left + provable(names[len(names) // 2 :], accepted + left)

    provable(cutting, [])
    return reasons


def _words(structure: Structure, cut: Cut) -> str:
    if not cut.keep:
        return "nothing was cut"
    numbers = sum(not structure.groups[name].changes_statistics for name in cut.keep)
    return f"structure of all {len(cut.keep)} groups cut, numbers of {numbers}"


def _names(pattern: str, path: str) -> bool:
    """Tell whether a pattern names a module, or one above it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def _near(pattern: str, paths: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, list(paths), n=3, cutoff=0.4)
    return f" Near it: {', '.join(near)}." if near else ""
