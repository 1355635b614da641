"""Checks what a user asks for: arguments, optimizers, patterns of module paths; changes nothing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar, get_args

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.budget import Budget, Scope, Target
from lightning_prune.pruning.scoring import CRITERIA, Criterion
from lightning_prune.structure import Structure

__all__ = [
    "Amount",
    "MaxAmount",
    "MinWidth",
    "amount_by_group",
    "budget_by_group",
    "check_amount",
    "check_arguments",
    "check_damping",
    "check_fraction",
    "check_ignored",
    "check_optimizers",
    "check_prunable",
    "names_module",
    "near",
    "with_ignored",
]

Amount = float | Mapping[str, float]
"""A fraction in [0, 1), or fractions by pattern of module paths."""
MinWidth = int | Mapping[str, int]
"""Channels that stay at least of every layer, or by pattern of module paths."""
MaxAmount = float | Mapping[str, float]
"""Largest fraction, in [0, 1], of any layer that may leave, or by pattern of module paths."""

_Limit = TypeVar("_Limit", int, float)


def check_arguments(
    where: str,
    amount: Amount,
    criterion: Criterion,
    target: Target,
    scope: Scope,
    round_to: int,
    min_width: MinWidth = 1,
    max_amount: MaxAmount = 1.0,
) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.
    """
    check_amount(where, amount)
    if isinstance(amount, Mapping) and (target != "filters" or scope != "layer"):
        raise ValueError(
            f"{where}(target={target!r}, scope={scope!r}): amounts by pattern are fractions of each layer's filters; "
            "use target='filters', scope='layer', or one amount for the whole model."
        )
    for name, value, allowed in (("target", target, get_args(Target)), ("scope", scope, get_args(Scope))):
        if value not in allowed:
            raise ValueError(f"{where}({name}={value!r}): choose one of {', '.join(map(repr, allowed))}.")
    known = list(CRITERIA)
    if isinstance(criterion, str) and criterion not in known:
        raise ValueError(
            f"{where}(criterion={criterion!r}): choose one of {', '.join(map(repr, known))}, or pass a function."
        )
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"{where}(round_to={round_to!r}): widths are rounded to multiples of a whole number from 1.")
    for number in min_width.values() if isinstance(min_width, Mapping) else [min_width]:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"{where}(min_width={min_width!r}): it is the number of channels that stay of a layer at least, a "
                "whole number from 1, or such numbers by pattern of module paths."
            )
    for fraction in max_amount.values() if isinstance(max_amount, Mapping) else [max_amount]:
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise ValueError(
                f"{where}(max_amount={max_amount!r}): it is the largest fraction of a layer that may leave, in "
                "[0, 1], or such fractions by pattern of module paths."
            )


def check_amount(where: str, amount: Amount) -> None:
    """Refuse amounts that are no fractions.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one is no number.
    """
    if isinstance(amount, Mapping) and not amount:
        raise ValueError(
            f"{where}(amount={{}}): it names nothing, so nothing would leave. Give patterns, or a fraction."
        )
    for name, fraction in amount.items() if isinstance(amount, Mapping) else [("", amount)]:
        told = f"{where}(amount={{{name!r}: {fraction!r}}})" if name else f"{where}(amount={fraction!r})"
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise TypeError(f"{told}: amount is a fraction, or fractions by pattern of module paths.")
        if not 0 <= fraction < 1:
            hint = f" Write {fraction / 100:g} to remove {fraction:g} %." if 1 < fraction < 100 else ""
            raise ValueError(f"{told}: amount is the fraction that leaves and must lie in [0, 1).{hint}")


def check_fraction(where: str, amount: float) -> None:
    """Refuse what is no number, where amounts by pattern are none that can be met.

    Raises:
        TypeError: Saying so.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"{where}(amount={amount!r}): it is one fraction of all weights. Keep layers out by ignore=.")


def check_damping(where: str, damping: float, of: str) -> None:
    """Refuse a damping below 0; ``of`` what it is a share.

    Raises:
        ValueError: Saying so.
    """
    if not damping >= 0:
        raise ValueError(f"{where}(damping={damping!r}): a share of the {of}, from 0; 0.01 is 1 %.")


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


def with_ignored(model: nn.Module, structure: Structure, ignore: Sequence[str]) -> Structure:
    """Return the structure with the channels that the named modules produce pinned.

    Raises:
        ValueError: If a pattern names no module.
    """
    check_ignored(model, ignore)
    ignored = [
        name
        for name, group in structure.groups.items()
        if any(names_module(pattern, producer) for pattern in ignore for producer in group.producers)
    ]
    return structure.without(ignored, "named in ignore=")


def check_ignored(model: nn.Module, ignore: Iterable[str], what: str = "ignore") -> None:
    """Refuse patterns that name no module; ``what`` argument they were given by.

    Raises:
        ValueError: If a pattern names no module.
    """
    paths = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    for pattern in ignore:
        if not any(names_module(pattern, path) for path in paths):
            raise ValueError(f"{what}={pattern!r} names no module of {type(model).__name__}.{near(pattern, paths)}")


def check_prunable(model: nn.Module, structure: Structure) -> None:
    """Refuse a model of which nothing can be cut.

    Raises:
        PruningError: With the first few reasons.
    """
    if not structure.groups:
        why = "; ".join(f"{pin.tensor}: {pin.reason}" for pin in structure.pinned[:5])
        raise PruningError(f"Nothing is left to prune in {type(model).__name__}: every channel stays ({why}).")


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
    for pattern, fraction in amount.items():
        named = _named(structure, "amount", pattern)
        if not named:
            stays = next(f"{path}: {reason}" for path, reason in pinned.items() if names_module(pattern, path))
            raise PruningError(f"amount[{pattern!r}]: all the channels it names stay ({stays}). Leave the pattern out.")
        for name in named:
            if amounts.setdefault(name, fraction) != fraction:
                raise ValueError(
                    f"amount: {chosen_by[name]!r} asks for {amounts[name]:g} and {pattern!r} for {fraction:g} of the "
                    f"same channels, those of {name} (made by {', '.join(structure.groups[name].producers)}). "
                    "Give them one amount."
                )
            chosen_by.setdefault(name, pattern)
    return amounts


def budget_by_group(structure: Structure, budget: Budget) -> Budget:
    """Turn limits by pattern of module paths into limits by group name; where several name a group, the strictest.

    Raises:
        ValueError: If a pattern names no module that produces channels.
    """
    min_width, max_amount = budget.min_width, budget.max_amount
    if isinstance(min_width, Mapping):
        min_width = _strictest(structure, "min_width", min_width, max)
    if isinstance(max_amount, Mapping):
        max_amount = _strictest(structure, "max_amount", max_amount, min)
    return replace(budget, min_width=min_width, max_amount=max_amount)


def _strictest(
    structure: Structure, what: str, limits: Mapping[str, _Limit], strictest: Callable[[_Limit, _Limit], _Limit]
) -> dict[str, _Limit]:
    found: dict[str, _Limit] = {}
    for pattern, limit in limits.items():
        for name in _named(structure, what, pattern):
            found[name] = strictest(found.get(name, limit), limit)
    return found


def _named(structure: Structure, what: str, pattern: str) -> list[str]:
    """Return the groups of which a pattern names a producer: none, where all channels that it names stay anyway."""
    named = [n for n, group in structure.groups.items() if any(names_module(pattern, p) for p in group.producers)]
    paths = [p for group in structure.groups.values() for p in group.producers]
    pinned = [pin.tensor.rpartition(".")[0] for pin in structure.pinned]
    if not named and not any(names_module(pattern, path) for path in pinned):
        paths = [*dict.fromkeys(paths), *pinned]
        raise ValueError(f"{what}[{pattern!r}] names no module that produces channels.{near(pattern, paths)}")
    return named


def names_module(pattern: str, path: str) -> bool:
    """Tell whether a pattern names a module, or one above it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def near(pattern: str, paths: Iterable[str]) -> str:
    """Name the paths that a mistaken pattern may have meant, as a sentence."""
    meant = difflib.get_close_matches(pattern, list(paths), n=3, cutoff=0.4)
    return f" Near it: {', '.join(meant)}." if meant else ""
