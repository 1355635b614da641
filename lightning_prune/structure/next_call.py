"""What a forward pass leaves on its modules for the next one: hidden states, memories, caches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_prune.model.calls import modules_of

__all__ = ["Held", "held_tensors", "left_for_next_call"]

Held = dict[tuple[int, str], list[Tensor]]
"""``id`` of a module and name of an attribute or buffer -> the tensors that are held there."""

_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})


def held_tensors(model: nn.Module) -> Held:
    """Return the tensors that modules hold in buffers and attributes, also those within lists, tuples and dicts."""
    found: Held = {}
    for _, module in modules_of(model):
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if type(value) not in _PLAIN and name not in _INTERNAL and (held := _within(value, 4)):
                found[id(module), name] = held
    return found


def left_for_next_call(before: Held, after: Held, read: Collection[int]) -> Iterator[Tensor]:
    """Yield the tensors that a call left where the next one may read them; ``read`` are ids of what this one read.

    The next call replaces what this one replaced without having read it.
    """
    for place, tensors in after.items():
        old = {id(tensor) for tensor in before.get(place, ())}
        if not old or not old.isdisjoint(read):
            yield from (tensor for tensor in tensors if id(tensor) not in old)


def _within(value: Any, depth: int) -> list[Tensor]:
    """Return the tensors in a value and in containers within it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    found: list[Tensor] = []
    if isinstance(value, list | tuple) and depth:
        for item in value:
            if type(item) not in _PLAIN:
                found += _within(item, depth - 1)
    return found
