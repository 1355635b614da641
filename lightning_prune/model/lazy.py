"""A mapping whose values are computed when they are looked at; holds none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

__all__ = ["Lazily"]

Value = TypeVar("Value")


class Lazily(Mapping[str, Value]):
    """Values by name, computed anew each time one is looked at, so that at most one is held in memory.

    Args:
        names: The names, in order.
        value: From a name to its value.

    Examples:
        >>> squares = Lazily(["a", "bb"], lambda name: len(name) ** 2)
        >>> squares["bb"], len(squares)
        (4, 2)
    """

    def __init__(self, names: Iterable[str], value: Callable[[str], Value]) -> None:
        self._names = dict.fromkeys(names)
        self._value = value

    def __getitem__(self, name: str) -> Value:
        """Compute the value of a name."""
        if name not in self._names:
            raise KeyError(name)
        return self._value(name)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a name, without computing its value."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """Return the names in order."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many names there are."""
        return len(self._names)
