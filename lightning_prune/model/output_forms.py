"""Output forms: how a module's output is put together again around one of its inputs; plain data."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.model.errors import PruningError

__all__ = ["Place", "check_form", "filled", "form_of", "main_output", "places_of", "value_at"]

Place = list[Any]
"""Where a call holds a tensor: ``[position or None, name or None, *keys]``; keys lead into tuples, lists and dicts."""

_PLAIN = (bool, int, float, str)


class _Held(NamedTuple):
    place: Place
    tensor: Tensor


def places_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Held]:
    """Return every tensor that a call is given, with its place.

    The place has the position and the name of the parameter of ``forward``, so that calls which pass it the other way
    find it, too.
    """
    names = _parameter_names(module)
    held: list[_Held] = []
    for position, value in enumerate(args):
        name = names[position] if position < len(names) else None
        held += _within([position, name], value)
    for name, value in kwargs.items():
        held += _within([names.index(name) if name in names else None, name], value)
    return held


def value_at(place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a call holds at a place.

    Raises:
        PruningError: If the call holds nothing there.
    """
    position, name, *keys = place
    if name in kwargs:
        value = kwargs[name]
    elif position is not None and position < len(args):
        value = args[position]
    else:
        raise PruningError(f"A removed layer was called without its input {name or position!r}. Pass it.")
    for key in keys:
        value = value[key]
    return value


def main_output(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of an output, which goes on through the network."""
    return next((tensor for tensor in _leaves(output) if tensor.is_floating_point()), None)


def form_of(output: Any, held: list[_Held]) -> list[Any]:
    """Return the form of a module's output, in plain lists.

    ``["main"]`` stands for the main output, ``["input", place]`` for a tensor that the call was given, ``["none"]`` for
    any other tensor or object, ``["plain", value]`` for a number or string; around them lie ``tuple``, ``list``,
    ``dict`` and ``object`` (a dataclass or named tuple, by ``module:name``).

    Args:
        output: What the module returned.
        held: The tensors that it was given.
    """
    return _form(output, main_output(output), held)


def filled(form: list[Any], main: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return an output of a form, around a main output.

    Raises:
        PruningError: If the form names a class that is not imported, or an input that the call does not have.
    """
    kind, *content = form
    if kind == "main":
        return main
    if kind == "none":
        return None
    if kind == "plain":
        return content[0]
    if kind == "input":
        return value_at(content[0], args, kwargs)
    if kind == "dict":
        return {key: filled(part, main, args, kwargs) for key, part in content[0]}
    if kind in ("tuple", "list"):
        parts = [filled(part, main, args, kwargs) for part in content[0]]
        return tuple(parts) if kind == "tuple" else parts
    parts_by_name = {name: filled(part, main, args, kwargs) for name, part in content[1]}
    return _class_named(content[0])(**parts_by_name)


def check_form(form: Any) -> None:
    """Refuse a form that :func:`form_of` did not make.

    Raises:
        ValueError: Saying what is wrong.
    """
    if not isinstance(form, list) or not form:
        raise ValueError(f"{form!r} is no form of an output")
    kind, *content = form
    inner = {"main": 0, "none": 0, "plain": 1, "input": 1, "tuple": 1, "list": 1, "dict": 1, "object": 2}
    if kind not in inner or len(content) != inner[kind]:
        raise ValueError(f"{form!r} is no form of an output")
    if kind == "plain" and not isinstance(content[0], _PLAIN):
        raise ValueError(f"{content[0]!r} is no plain value")
    if kind in ("tuple", "list"):
        for part in content[0]:
            check_form(part)
    if kind in ("dict", "object"):
        for _, part in content[-1]:
            check_form(part)


def _form(value: Any, main: Tensor | None, held: list[_Held]) -> list[Any]:
    if value is main and main is not None:
        return ["main"]
    if isinstance(value, Tensor):
        place = next((own.place for own in held if own.tensor is value), None)
        return ["none"] if place is None else ["input", place]
    if isinstance(value, _PLAIN):
        return ["plain", value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = [[name, _form(part, main, held)] for name, part in zip(value._fields, value, strict=True)]
        return ["object", _name_of(type(value)), parts]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return ["object", _name_of(type(value)), [[n, _form(getattr(value, n), main, held)] for n in names]]
    if isinstance(value, Mapping):
        return ["dict", [[key, _form(part, main, held)] for key, part in value.items()]]
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_form(part, main, held) for part in value]]
    return ["none"]


def _within(place: Place, value: Any) -> Iterator[_Held]:
    if isinstance(value, Tensor):
        yield _Held(place, value)
    elif isinstance(value, tuple | list):
        for key, part in enumerate(value):
            yield from _within([*place, key], part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if isinstance(key, str | int):
                yield from _within([*place, key], part)


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _leaves(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _leaves(part)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _leaves(getattr(output, field.name))


def _parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the positional parameters of ``forward``, as far as they are known."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in positional]


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class_named(name: str) -> type:
    """Return a dataclass or named tuple of a module that is imported already: a file must not import code."""
    home, _, path = name.partition(":")
    found: Any = sys.modules.get(home)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
        raise PruningError(f"A removed layer returned a {name}, which is not imported. Import {home} before it runs.")
    return found
