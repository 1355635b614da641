"""Integers that remember their origin through arithmetic, so that the trace sees which numbers a shape depends on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.model.calls import modules_of
from lightning_prune.structure.labels import Label, Labels

__all__ = [
    "Derived", "Held", "Number", "Origin", "Size", "Told", "aligned", "evaluated", "leaves", "numbers_in",
    "remembering",
]  # fmt: skip


@dataclass(frozen=True)
class Held:
    """A number that a module holds as an attribute, or at ``index`` of a tuple or list.

    ``name`` may lead through a config, an object or a dict: ``"config.heads"``.
    """

    module: str
    name: str
    index: int | None = None


@dataclass(frozen=True, eq=False)
class Size:
    """The number of indices along a dimension with these labels."""

    labels: tuple[Label, ...]


@dataclass(frozen=True, eq=False)
class Derived:
    """The result of arithmetic on other numbers."""

    operator: Callable[[int, int], int]
    left: int
    right: int


Origin = Held | Size | Derived

_ABSENT = object()


class Told(NamedTuple):
    """Who is told what code does with numbers.

    Attributes:
        compared: Called with two numbers that turned out to be equal.
        real: Called when a real number is made of one, such as the root of a width.
    """

    compared: Callable[[Number, Number], None]
    real: Callable[[], None]


class Number(int):
    """An integer that remembers its origin through arithmetic; ``told`` is who learns what code does with it."""

    origin: Origin
    told: Told | None

    def __new__(cls, value: int, origin: Origin, told: Told | None = None) -> Number:
        """Create the number with its origin."""
        number = super().__new__(cls, value)
        number.origin = origin
        number.told = told
        return number

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        """Compare by value, and report equality: the code takes its path because of it."""
        same = int.__eq__(self, other)  # type: ignore[operator]
        if same is True and isinstance(other, Number) and self.told is not None:
            self.told.compared(self, other)
        return same

    def __ne__(self, other: object) -> bool:
        """Compare by value."""
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy and pickle as a plain number."""
        return int, (int(self),)

    def evaluate(self, count: Callable[[Held | Size, int], int]) -> int:
        """Return the new value of the number, given the new values of attributes and sizes."""
        if not isinstance(self.origin, Derived):
            return count(self.origin, int(self))
        return self.origin.operator(evaluated(self.origin.left, count), evaluated(self.origin.right, count))


def evaluated(number: int, count: Callable[[Held | Size, int], int]) -> int:
    """Return the new value of a number, which for a plain one is the old value."""
    return number.evaluate(count) if isinstance(number, Number) else number


def _remembering(name: str, swapped: bool) -> Callable[[Any, Any], Any]:
    """Return a method of :class:`Number` that computes ``name`` and remembers its operands."""
    compute = getattr(operator, name)

    def method(self: Number, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        return Number(compute(int(left), int(right)), Derived(compute, left, right), self.told)

    return method


def _as_real(name: str) -> Callable[..., Any]:
    """Return a method of :class:`Number` that computes ``name`` as integers do, and tells of it."""
    compute = getattr(int, name)

    def method(self: Number, *others: Any) -> Any:
        if self.told is not None:
            self.told.real()
        return compute(int(self), *others)

    return method


for _name in ("__pow__", "__rpow__", "__truediv__", "__rtruediv__", "__float__"):
    setattr(Number, _name, _as_real(_name))
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Number, f"__{_name}__", _remembering(_name, swapped=False))
    setattr(Number, f"__r{_name}__", _remembering(_name, swapped=True))


# Modules of torch.nn whose numbers reach an operator; those of the others repeat shapes of their own tensors.
_TELLING = (nn.RNNBase, nn.RNNCellBase, nn.Transformer, nn.Unflatten)
# The widths among these, which code around them reads: the dimension of the weight that each repeats.
_WIDTHS = {
    "out_features": 0, "in_features": 1, "out_channels": 0, "in_channels": 1, "num_features": 0, "embedding_dim": 1,
}  # fmt: skip
_HOLDING = (int, tuple, list, torch.Size)
_INTERNAL = frozenset(vars(nn.Module()))
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy")  # their objects hold no widths
_DEEPEST = 3  # a config in a config in an attribute
_MOST = 1000  # entries of a dict to search: a config, not a vocabulary


@contextmanager
def remembering(model: nn.Module, told: Told, labels: Mapping[str, Labels] = MappingProxyType({})) -> Iterator[None]:
    """Replace every integer that a model holds by a :class:`Number` with its origin, inside the block.

    These are attributes of modules and of their classes, and the entries of configs (plain objects and dicts) in them.
    ``labels`` are those of the model's parameters, by name.
    """
    changes = _Changes(told)
    try:
        for path, module in modules_of(model):
            own = vars(module)
            if type(module).__module__.startswith("torch.nn.") and not isinstance(module, _TELLING):
                changes.look_at_widths(module, labels.get(f"{path}.weight" if path else "weight"))
                continue
            changes.look(own, path, "", 0)
            for name, value in _class_numbers(type(module)).items():
                if name not in own:
                    changes.replace(own, path, name, name, value)
        yield
    finally:
        changes.take_back()


class _Changes:
    """Numbers that replaced integers, and these integers."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._changed: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()

    def replace(self, holder: dict[str, Any], module: str, name: str, key: str, value: Any) -> None:
        number = _held(module, name, value, self._told)
        if number is not value:
            self._changed.append((holder, key, holder.get(key, _ABSENT)))
            holder[key] = number

    def look(self, holder: dict[str, Any], module: str, prefix: str, depth: int) -> None:
        for key, value in list(holder.items()):
            if not isinstance(key, str) or "." in key or (depth == 0 and key in _INTERNAL):
                continue  # "." would be ambiguous in the name of a place
            if type(value) in _HOLDING or isinstance(value, np.integer):
                self.replace(holder, module, prefix + key, key, value)
                continue
            below = _config(value) if depth < _DEEPEST else None
            if below is not None and id(below) not in self._seen:  # modules may share a config
                self._seen.add(id(below))
                self.look(below, module, f"{prefix}{key}.", depth + 1)

    def look_at_widths(self, module: nn.Module, weight: Labels | None) -> None:
        """Make the widths that a layer holds remember that they are sizes of its weight."""
        if weight is None or not weight.dims:
            return
        own = vars(module)
        for name, dim in _WIDTHS.items():
            width = own.get(name)
            if type(width) is not int:
                continue
            if own.get("transposed"):  # these hold their inputs first
                dim = 1 - dim
            found = weight.at(dim)
            if found and len(found[0].atoms) == width:
                self._changed.append((own, name, width))
                own[name] = Number(width, Size(found), self._told)

    def take_back(self) -> None:
        for holder, key, before in reversed(self._changed):  # an entry changed twice ends with its first value
            if before is _ABSENT:
                holder.pop(key, None)
            else:
                holder[key] = before


def _held(path: str, name: str, value: Any, told: Told) -> Any:
    """Return an integer, or a tuple or list of integers, with its origin; anything else, and 0 and 1, unchanged."""
    if _whole(value):
        return Number(int(value), Held(path, name), told) if value > 1 else value
    if not all(_whole(item) for item in value) or not any(item > 1 for item in value):
        return value
    items = []
    for index, item in enumerate(value):
        items.append(Number(int(item), Held(path, name, index), told) if item > 1 else item)
    return type(value)(items)


def _whole(value: Any) -> bool:
    """Return whether a value is a plain integer, of Python (and no bool) or of NumPy."""
    return type(value) is int or isinstance(value, np.integer)


def _config(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, or the entries of a dict, if it may be a config."""
    if isinstance(value, dict):
        return value if len(value) <= _MOST else None
    if isinstance(value, nn.Module | Tensor | type) or callable(value) or not hasattr(value, "__dict__"):
        return None
    if type(value).__module__.partition(".")[0] in _FOREIGN:
        return None
    return vars(value)


def _class_numbers(kind: type) -> dict[str, Any]:
    """Return the integers that the user's classes hold as class attributes."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in (*_FOREIGN, "builtins"):
            continue
        for name, value in vars(base).items():
            if type(value) in _HOLDING and not name.startswith("_"):
                found.setdefault(name, value)
    return found


def numbers_in(values: Any) -> Iterator[int]:
    """Yield the integers in nested sequences and slices, in order; -1 for an integer tensor of one entry."""
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            yield value
        elif isinstance(value, tuple | list):
            yield from numbers_in(value)
        elif isinstance(value, Tensor) and not value.dim() and not value.is_floating_point():
            yield -1
        elif isinstance(value, slice):
            yield from numbers_in((value.start, value.stop, value.step))


def leaves(number: int) -> list[tuple[Held | Size, int]]:
    """Return the origins that a number was computed from, each with its value; none for a plain number."""
    if not isinstance(number, Number):
        return []
    if isinstance(number.origin, Derived):
        return leaves(number.origin.left) + leaves(number.origin.right)
    return [(number.origin, int(number))]


def aligned(asked: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the dimension of ``shape`` that each requested number stands for, along their longest common run.

    ``-1`` stands for any size. A run of one number is ignored among several sizes, since it may agree by chance.

    Examples:
        >>> list(aligned((-1, 3, 4, 4), (2, 7, 3, 4, 4)))  # of ``unflatten(-1, (3, 4, 4))``
        [(1, -1), (2, 3), (3, 4), (4, 4)]
    """
    for length in range(min(len(asked), len(shape)), min(2, len(shape)) - 1, -1):
        for first in range(len(asked) - length + 1):
            for dim in range(len(shape) - length + 1):
                run = asked[first : first + length]
                sizes = shape[dim : dim + length]
                if all(number in (-1, size) for number, size in zip(run, sizes, strict=True)):
                    yield from zip(range(dim, dim + length), run, strict=True)
                    return
