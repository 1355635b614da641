"""Checks what a user asks for: arguments, optimizers, patterns of module paths; changes nothing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_args

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.measure.footprint import WHOLE, Part
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.amounts import Amount, check_amount, is_count, is_number, quoted
from lightning_prune.pruning.budget import Budget, Scope, Target
from lightning_prune.pruning.scoring import CRITERIA, Criterion
from lightning_prune.structure import Structure
from lightning_prune.surgery.resize import with_wrapped
from lightning_prune.surgery.skipped import paths_removed

__all__ = [
    "MaxAmount", "MinWidth", "Modules", "Parameters", "Parts", "amount_by_group", "as_list", "budget_by_group",
    "by_path", "check_arguments", "check_choice", "check_criterion", "check_damping", "check_ignored", "check_list",
    "check_module", "check_optimizers", "check_prunable", "listed", "names_module", "near", "optimizers_of",
    "told_apart", "part_of", "path_of", "plain", "shown", "with_ignored", "within_part",
]  # fmt: skip

Modules = Sequence[str | nn.Module]
"""Patterns of module paths, or modules of the model."""
Parameters = Sequence[str | nn.Module | tuple[nn.Module, str]]
"""Patterns of paths of modules or parameters, modules of the model, or modules with the name of a parameter."""
Parts = str | nn.Module | Sequence[str | nn.Module] | None
"""The path of a module, or the module, or several: the part of a model that is pruned and counted."""
MinWidth = int | Mapping[Any, int]
"""Channels that are kept of every layer at least, or by pattern of module paths or by module."""
MaxAmount = float | Mapping[Any, float]
"""Largest fraction, in [0, 1], of any layer that is pruned, or by pattern of module paths or by module."""

_Value = TypeVar("_Value", int, float)


def check_arguments(
    where: str,
    amount: Amount,
    criterion: Criterion,
    target: Target,
    scope: Scope,
    round_to: int,
    min_width: MinWidth = 1,
    max_amount: MaxAmount = 1.0,
    ignore: Modules = (),
) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.
    """
    check_amount(where, amount)
    check_choice(where, "target", target, get_args(Target))
    check_choice(where, "scope", scope, get_args(Scope))
    if isinstance(amount, Mapping) and target != "filters":
        raise ValueError(
            f"{where}(target={target!r}): amounts by pattern are of each layer's filters. Use target='filters', or one "
            "amount for the whole model."
        )
    if is_count(amount) and target != "filters":
        raise ValueError(
            f"{where}(amount={amount!r}, target={target!r}): a whole number counts filters. Write a fraction of the "
            f"{target}, or use target='filters'."
        )
    check_criterion(where, criterion, CRITERIA)
    if not _is_whole(round_to):
        raise ValueError(f"{where}(round_to={round_to!r}): widths are rounded to multiples of a whole number from 1.")
    if not all(_is_whole(number) for number in _values(min_width)):
        raise ValueError(
            f"{where}(min_width={min_width!r}): it is the number of channels that stay of a layer at least, a "
            "whole number from 1, or such numbers by pattern of module paths."
        )
    if not all(is_number(share) and 0 <= share <= 1 for share in _values(max_amount)):
        raise ValueError(
            f"{where}(max_amount={max_amount!r}): it is the largest fraction of a layer that may leave, in "
            "[0, 1], or such fractions by pattern of module paths."
        )
    check_list(where, "ignore", ignore)


def check_criterion(where: str, criterion: Any, known: Collection[str]) -> None:
    """Refuse the name of a criterion that there is not.

    Raises:
        ValueError: Naming those that there are.
    """
    if isinstance(criterion, str) and criterion not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{where}(criterion={criterion!r}): choose one of {names}, or pass a function.")


def check_choice(where: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is not among those allowed.

    Raises:
        ValueError: Naming them.
    """
    known = list(allowed)
    if value not in known:
        raise ValueError(f"{where}({name}={value!r}): choose one of {', '.join(map(repr, known))}.")


def check_damping(where: str, damping: float, of: str) -> None:
    """Refuse a damping below 0; ``of`` what it is a share.

    Raises:
        ValueError: Saying so.
    """
    if not damping >= 0:
        raise ValueError(f"{where}(damping={damping!r}): a share of the {of}, from 0; 0.01 is 1 %.")


def check_list(where: str, name: str, given: Any) -> None:
    """Refuse one pattern or module where a list is expected: iterating over it would give letters or its children.

    Raises:
        TypeError: Saying so.
    """
    if isinstance(given, str | nn.Module):
        raise TypeError(f"{where}({name}={quoted(given)}): pass a list of patterns, [{quoted(given)}].")


def as_list(given: Any) -> Any:
    """Return patterns as a list, as YAML gives them; one alone is returned as it is, for ``check_list`` to refuse."""
    return given if isinstance(given, str) else list(given)


def optimizers_of(where: str, model: nn.Module, optimizer: Any) -> list[Optimizer]:
    """Return the optimizers that were passed: one, several or none.

    Raises:
        TypeError: If something else was passed.
        ValueError: If they train another model, as after building one anew.
    """
    found: list[Any] = [optimizer] if isinstance(optimizer, Optimizer | str) else list(optimizer or ())
    own = set(map(id, model.parameters())) if found else set()
    if not all(isinstance(one, Optimizer) for one in found):
        raise TypeError(f"{where}(optimizer={optimizer!r}): pass an optimizer of torch, or a list of them.")
    if found and not any(id(p) in own for one in found for group in one.param_groups for p in group["params"]):
        raise ValueError(
            f"{where}: {type(found[0]).__name__} trains no parameter of {type(model).__name__}, so it cannot follow. "
            "Pass the optimizer of this model, or none."
        )
    return found


def check_optimizers(where: str, optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose state cannot follow a cut.

    Raises:
        PruningError: For LBFGS, which keeps one flat history of all parameters.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in with_wrapped(optimizers)):
        raise PruningError(
            f"{where}: LBFGS keeps one history for all parameters together, which cannot be cut. "
            "Train with a first-order optimizer, such as SGD or AdamW, while pruning."
        )


def check_prunable(model: nn.Module, structure: Structure) -> None:
    """Refuse a model of which nothing can be cut.

    Raises:
        PruningError: With the first few reasons.
    """
    if not structure.groups:
        ran = [pin for pin in structure.pinned if pin.tensor not in structure.ledger.idle]
        why = "; ".join(f"{pin.tensor}: {pin.reason}" for pin in (ran or structure.pinned)[:5])
        told = f"Nothing is left to prune in {type(model).__name__}: every channel stays ({why})."
        if ran and structure.ledger.idle:
            idle = ", ".join(structure.ledger.idle[:3])
            told += f" {idle} never ran: pass example_inputs that run them or, in a run, trace a step that does."
        raise PruningError(told)


# From what the user names to paths of modules


def path_of(model: nn.Module, given: str | nn.Module | tuple[nn.Module, str], what: str) -> str:
    """Return the path of a module, or of a parameter given as module and name; patterns are returned as they are.

    Args:
        model: The model.
        given: A pattern, a module, or a module and the name of one of its parameters.
        what: The argument it was given by, for errors.

    Raises:
        ValueError: If the module is not part of the model, or is the whole model.
        TypeError: If it is none of these.
    """
    if isinstance(given, str):
        return given
    module, name = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    if not isinstance(module, nn.Module) or not isinstance(name, str):
        raise TypeError(f"{what}: {given!r} is no pattern and no module of the model.")
    for path, own in model.named_modules():
        if own is module and name:
            return f"{path}.{name}".lstrip(".")
        if own is module and path:
            return path
    if module is model:
        raise ValueError(f"{what}: {shown(given)} is the whole model. Name parts of it.")
    raise ValueError(
        f"{what}: {shown(given)} is not part of the {type(model).__name__}. Pass one of its own modules (a copy is "
        "another module), or a path."
    )


def by_path(model: nn.Module, values: Mapping[Any, _Value], what: str) -> dict[str, _Value]:
    """Return values by pattern of paths, given those by pattern or by module.

    Raises:
        ValueError: If a module is not part of the model.
    """
    return {path_of(model, key, what): value for key, value in values.items()}


def names_module(pattern: str, path: str) -> bool:
    """Return whether a pattern names a module, or one above it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def near(pattern: str, paths: Iterable[str]) -> str:
    """Name the paths that a mistaken pattern may have meant, as a sentence."""
    meant = difflib.get_close_matches(pattern, list(paths), n=3, cutoff=0.4)
    return f" Near it: {', '.join(meant)}." if meant else ""


def check_ignored(model: nn.Module, ignore: Iterable[Any], what: str = "ignore") -> list[str]:
    """Return patterns of paths, given patterns and modules; ``what`` argument they were given by.

    Raises:
        ValueError: If a pattern names nothing, or a module is not part of the model.
    """
    patterns = [path_of(model, given, what) for given in ignore]
    if not patterns:
        return []
    paths = [name for name, _ in model.named_modules() if name]
    paths += [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(names_module(pattern, path) for path in paths):
            raise ValueError(f"{what}={pattern!r} names no module of {type(model).__name__}.{near(pattern, paths)}")
    return patterns


# From paths of modules to channel groups


def with_ignored(model: nn.Module, structure: Structure, ignore: Modules) -> Structure:
    """Return the structure with the channels that the named modules produce pinned.

    Raises:
        ValueError: If a pattern names no module, or a module is not part of the model.
    """
    patterns = check_ignored(model, ignore)
    ignored = []
    for pattern in patterns:
        ignored += _groups_named(structure, pattern)
    return structure.without(dict.fromkeys(ignored), "named in ignore=")


def check_module(where: str, module: Parts, target: str = "filters") -> None:
    """Refuse parts of a model that cannot be parts, or cannot be counted.

    Raises:
        ValueError: For the latency, which only the whole model has.
        TypeError: If it is neither a path nor a module, nor a list of them.
    """
    parts = listed(module)
    if not all(isinstance(part, str | nn.Module) for part in parts):
        raise TypeError(f"{where}(module={module!r}): pass the path of a module, the module, or a list of them.")
    if module is not None and not parts:
        raise ValueError(f"{where}(module={module!r}): it names no part. Leave it out to prune the whole model.")
    if parts and target == "latency":
        raise ValueError(
            f"{where}(module={', '.join(map(quoted, parts))}, target='latency'): a latency is measured of the whole "
            "model. Use target='flops', or leave module= out."
        )


def part_of(model: nn.Module, module: Parts, outside: Iterable[str] = ()) -> Part:
    """Return the part of a model that is named, without what lies ``outside``.

    Raises:
        ValueError: If a path or module is none of the model.
    """
    outside = tuple(outside)
    if not listed(module) and not outside:
        return WHOLE
    paths: list[str] = []
    for given in listed(module):
        pattern = path_of(model, given, "module")
        found = [path for path, _ in model.named_modules() if path and fnmatchcase(path, pattern)]
        if not found:
            known = [path for path, _ in model.named_modules() if path]
            raise ValueError(f"module={pattern!r} names no module of {type(model).__name__}.{near(pattern, known)}")
        paths += found
    tops = [path for path in dict.fromkeys(paths) if not Part(tuple({*paths} - {path})).holds(path)]
    return Part(tuple(tops) if paths else ("",), outside)


def within_part(structure: Structure, part: Part) -> Structure:
    """Return the structure with the channels pinned that lie outside of a part, or are tied to what does."""
    if part is WHOLE:
        return structure
    why: dict[str, str] = {}
    for name, group in structure.groups.items():
        outside = [slot.tensor for slot in group.slots if not part.holds(slot.tensor)]
        if outside and any(part.holds(slot.tensor) for slot in group.slots):
            why[name] = f"it is tied to {outside[0]}, which is outside of module="
        elif outside:
            why[name] = "it is outside of module="
    return structure.without_each(why)


def listed(module: Parts) -> list[Any]:
    """Return the parts as a list; a module may be iterable, and is one part."""
    if module is None:
        return []
    return list(module) if isinstance(module, list | tuple | set) else [module]


def told_apart(module: Parts, model: nn.Module | None) -> dict[str, list[str]]:
    """Return the named parts for the key of a callback's state, which has none where the whole model is meant."""
    return {} if module is None else {"module": sorted(shown(part, model) for part in listed(module))}


def amount_by_group(model: nn.Module, structure: Structure, amount: Amount) -> Amount:
    """Turn amounts by pattern of module paths into amounts by group name; one amount passes.

    Raises:
        ValueError: If a pattern names no module that produces channels, or two give one group different amounts.
        PruningError: If every channel that a pattern names is pinned.
    """
    if not isinstance(amount, Mapping):
        return amount
    amounts: dict[str, float] = {}
    chosen_by: dict[str, str] = {}
    for pattern, fraction in by_path(model, amount, "amount").items():
        for name in _groups_to_prune(structure, pattern):
            if amounts.setdefault(name, fraction) != fraction:
                raise ValueError(
                    f"amount: {chosen_by[name]!r} asks for {amounts[name]:g} and {pattern!r} for {fraction:g} of the "
                    f"same channels, those of {name} (made by {', '.join(structure.groups[name].producers)}). "
                    "Give them one amount."
                )
            chosen_by.setdefault(name, pattern)
    return amounts


def budget_by_group(model: nn.Module, structure: Structure, budget: Budget) -> Budget:
    """Turn limits by pattern of module paths into limits by group name; where several name a group, the strictest.

    Raises:
        ValueError: If a pattern names no module that produces channels.
    """
    min_width, max_amount = budget.min_width, budget.max_amount
    gone = paths_removed(model)
    if isinstance(min_width, Mapping):
        min_width = _strictest(structure, "min_width", by_path(model, min_width, "min_width"), max, gone)
    if isinstance(max_amount, Mapping):
        max_amount = _strictest(structure, "max_amount", by_path(model, max_amount, "max_amount"), min, gone)
    return replace(budget, min_width=min_width, max_amount=max_amount)


def _strictest(
    structure: Structure, what: str, limits: Mapping[str, _Value], strictest: Callable[[_Value, _Value], _Value],
    gone: Sequence[str],
) -> dict[str, _Value]:  # fmt: skip
    found: dict[str, _Value] = {}
    for pattern, limit in limits.items():
        named = _groups_named(structure, pattern)
        if not any(names_module(pattern, path) for path in gone):  # else it may have named removed layers alone
            _check_produces(structure, what, pattern, named)
        for name in named:
            found[name] = strictest(found.get(name, limit), limit)
    return found


def _groups_to_prune(structure: Structure, pattern: str) -> list[str]:
    """Return the groups of which an amount's pattern names a producer, one at least."""
    named = _groups_named(structure, pattern)
    _check_produces(structure, "amount", pattern, named)
    if named:
        return named
    for pin in structure.pinned:
        path = _owner(pin.tensor)
        if names_module(pattern, path):
            raise PruningError(
                f"amount[{pattern!r}]: all the channels it names stay ({path}: {pin.reason}). Leave the pattern out."
            )
    raise AssertionError("checked above: a pattern that names no group names a pinned tensor")


def _groups_named(structure: Structure, pattern: str) -> list[str]:
    """Return the groups of which a pattern names a producer."""
    named = []
    for name, group in structure.groups.items():
        if any(names_module(pattern, producer) for producer in group.producers):
            named.append(name)
    return named


def _check_produces(structure: Structure, what: str, pattern: str, named: Sequence[str]) -> None:
    """Refuse a pattern that names neither a group nor channels that are pinned."""
    pinned = [_owner(pin.tensor) for pin in structure.pinned]
    if named or any(names_module(pattern, path) for path in pinned):
        return
    paths: list[str] = []
    for group in structure.groups.values():
        paths += group.producers
    paths = [*dict.fromkeys(paths), *pinned]
    raise ValueError(f"{what}[{pattern!r}] names no module that produces channels.{near(pattern, paths)}")


# Kinds of values


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _values(limit: Any) -> list[Any]:
    return list(limit.values()) if isinstance(limit, Mapping) else [limit]


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def plain(given: Any, model: nn.Module | None = None) -> Any:
    """Return an argument as a number, a string, or a list or dict of these: modules as :func:`shown` names them."""
    if isinstance(given, Mapping):
        return {shown(name, model): value for name, value in given.items()}
    if isinstance(given, nn.Module):
        return shown(given, model)
    return [shown(each, model) for each in given] if isinstance(given, list) else given


def shown(given: Any, model: nn.Module | None = None) -> str:
    """Name what a user gave: a pattern as it is, a module of a known model by its path, another by its class.

    Printed as it is, a module can be pages long.
    """
    if isinstance(given, nn.Module):
        paths = [path for path, module in model.named_modules() if module is given and path] if model else []
        return paths[0] if paths else f"this {type(given).__name__}"
    if isinstance(given, tuple):
        parts = [shown(part, model) for part in given]
        return ".".join(parts) if model is not None else f"({', '.join(parts)})"
    return given if isinstance(given, str) else repr(given)
