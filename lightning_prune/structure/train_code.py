"""Says whether a model's code may compute something else in train mode; reads code, and runs nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from inspect import unwrap
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from lightning_prune.model.calls import ExampleInputs, Instead, modules_of

__all__ = ["looks_at_gradients", "looks_at_mode"]

_MODE = frozenset({"training"})
_GRADIENTS = frozenset({"is_grad_enabled", "requires_grad"})
_PLAIN = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set, list, tuple})
_STOCHASTIC_DEPTH = frozenset(
    {("torchvision.ops.stochastic_depth", "StochasticDepth"), ("timm.layers.drop", "DropPath")}
)
"""Classes that return their input times one random number for each example, or in eval mode their input."""
_LIBRARIES = ("torch", "numpy", "lightning_prune", "builtins", "einops", "math", "functools", "typing")
"""Packages whose functions are not read: what they compute in either mode is known, or does not hang on it."""


def looks_at_mode(model: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Return whether code of the model that may run reads ``training``, or sets something else by its mode.

    Modules of ``torch.nn`` compute alike in both, and stochastic depth scales examples at random.
    """
    kinds = {type(module) for _, module in modules_of(model)}
    if any(kind.train is not nn.Module.train or kind.eval is not nn.Module.eval for kind in kinds):
        return True  # a flag of its own
    return _reads(model, example_inputs, _MODE)


def looks_at_gradients(model: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Return whether code of the model that may run asks whether gradients are recorded."""
    return _reads(model, example_inputs, _GRADIENTS)


def _reads(model: nn.Module, example_inputs: ExampleInputs, wanted: frozenset[str]) -> bool:
    """Return whether code that a call of the model may run uses one of some names."""
    start = {"forward"}
    if isinstance(example_inputs, Instead):
        start.add(example_inputs.function.__name__)
    seen: set[CodeType] = set()
    kinds: set[type] = set()
    for _, module in modules_of(model):
        kind = type(module)
        generic = kind.__module__.startswith("torch.nn.")
        if not generic and kind not in kinds:
            kinds.add(kind)
            known = wanted is _MODE and _scales_examples(kind)
            if not known and _class_reads(kind, start, wanted, seen):
                return True
        if any(_reads_in(function, wanted, seen) for function in _functions_on(module, generic)):
            return True
    return False


def _scales_examples(kind: type) -> bool:
    """Return whether modules of a class do no more in train mode than to scale whole examples by random numbers."""
    known = (kind.__module__, kind.__qualname__) in _STOCHASTIC_DEPTH
    forward = getattr(kind, "forward", None)
    return known and isinstance(forward, FunctionType) and forward.__module__ == kind.__module__


def _class_reads(kind: type, start: set[str], wanted: frozenset[str], seen: set[CodeType]) -> bool:
    """Return whether methods of a class use a name, from the named ones on to those that they call."""
    waiting, known = list(start), set(start)
    while waiting:
        found = getattr(kind, waiting.pop(), None)
        if isinstance(found, property):
            found = found.fget
        for function in _unwrapped(found):
            names = _names_in(function.__code__)
            if wanted & names or _reads_in(function, wanted, seen):
                return True
            waiting.extend(names - known)
            known |= names
    return False


def _functions_on(module: nn.Module, generic: bool) -> Iterator[FunctionType]:
    """Yield the functions that users put on a module: its hooks, and its attributes."""
    values: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if not generic:
        values += [value for value in vars(module).values() if type(value) not in _PLAIN]
    for value in values:
        yield from _unwrapped(value)


def _reads_in(function: FunctionType, wanted: frozenset[str], seen: set[CodeType]) -> bool:
    """Return whether a function uses a name, or another one does that it calls by name."""
    if function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = _names_in(function.__code__)
    if wanted & names:
        return True
    for name in names:
        for called in _unwrapped(function.__globals__.get(name)):
            if _reads_in(called, wanted, seen):
                return True
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return any(_reads_in(called, wanted, seen) for value in cells for called in _unwrapped(value))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell has none
    except ValueError:
        return False
    return True


def _unwrapped(value: Any) -> Iterator[FunctionType]:
    """Yield the function behind decorators, bound methods and partial calls, if it is one of a user."""
    while isinstance(value, partial):
        value = value.func
    if isinstance(value, MethodType):
        value = value.__func__
    if not isinstance(value, FunctionType):
        return
    value = unwrap(value)
    if isinstance(value, FunctionType) and (value.__module__ or "").partition(".")[0] not in _LIBRARIES:
        yield value


def _names_in(code: CodeType) -> set[str]:
    """Return the names that code uses, and its short strings, functions defined inside it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # of ``getattr(self, "training")``
            names.add(constant)
    return names
