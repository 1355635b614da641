"""Follows a run along the operators that a trace wrote down, and tells what is left of each; runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.structure import Keep, Structure
from lightning_prune.structure.labels import Label, Labels, Ran
from lightning_prune.surgery.fingerprint import directions

__all__ = ["Course", "Left", "Lefts", "OtherOperatorsError", "aligned", "same_operator"]

_aten = torch.ops.aten
_RESHAPES = frozenset({_aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default})
_LAYOUT = _RESHAPES | {
    _aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.expand.default, _aten._to_copy.default,
    _aten.as_strided_.default,
}  # fmt: skip
"""Operators that come and go with how tensors lie in memory, or their type; what they do shows in what reads them."""


_GONE = b"\0"  # a False, as it lies in memory


class OtherOperatorsError(Exception):
    """A run came to other operators than the trace."""

    def __init__(self, told: str, ran: Ran | None = None) -> None:
        """Say what ran, and at which operator of the trace."""
        super().__init__(told)
        self.ran = ran


def same_operator(func: Any, other: Any) -> bool:
    """Return whether two operators do the same; reshapes that copy and reshapes that do not are the same."""
    return func is other or (func in _RESHAPES and other in _RESHAPES)


class Course:
    """The operators of a trace, in order, and how far a run along them has come.

    Attributes:
        at: Index of the operator of the trace that comes next.
    """

    def __init__(self, expected: Sequence[Ran]) -> None:
        """Start before the first operator."""
        self._expected = expected
        self.at = 0

    def next(self, func: Any) -> int | None:
        """Return the index of the traced operator that this one is; None for one that only lays out memory.

        Raises:
            OtherOperatorsError: If another one was to run.
        """
        at = self.at
        if at < len(self._expected) and func is self._expected[at].func:  # as most often
            self.at = at + 1
            return at
        while at < len(self._expected):
            if same_operator(func, self._expected[at].func):
                self.at = at + 1
                return at
            if self._expected[at].func not in _LAYOUT:
                break
            at += 1
        if func in _LAYOUT:
            return None
        here = self._expected[at] if at < len(self._expected) else None
        told = "ends there" if here is None else f"runs {here.func.overloadpacket} in {here.path or 'the model'}"
        raise OtherOperatorsError(f"it runs {func.overloadpacket} where the full model {told}", here)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            OtherOperatorsError: If operators of the trace did not run.
        """
        for ran in self._expected[self.at :]:
            if ran.func not in _LAYOUT:
                raise OtherOperatorsError(
                    f"it does not run {ran.func.overloadpacket} in {ran.path or 'the model'}", ran
                )


def aligned(expected: Sequence[Ran], found: Iterable[Ran]) -> tuple[list[tuple[int, Ran]], OtherOperatorsError | None]:
    """Pair the operators of a run with those of a trace, as far as they are the same ones."""
    course = Course(expected)
    pairs: list[tuple[int, Ran]] = []
    for ran in found:
        try:
            at = course.next(ran.func)
        except OtherOperatorsError as error:
            return pairs, error
        if at is not None:
            pairs.append((at, ran))
    return pairs, None


class Left:
    """What is left of one dimension of a tensor once some units have gone.

    Attributes:
        size: Its size before.
        count: Its size after.
    """

    def __init__(self, alive: NDArray[np.bool_]) -> None:
        """Keep which indices are left, ``(size,)``."""
        self._alive = alive
        self.size = len(alive)
        self.count = int(np.count_nonzero(alive))
        self._directions: dict[tuple[int, torch.dtype, bool], Tensor] = {}

    @cached_property
    def indices(self) -> Tensor:
        """Return the indices that are left, ascending, ``(count,)``."""
        return torch.from_numpy(np.flatnonzero(self._alive))

    @cached_property
    def gone(self) -> Tensor:
        """Return the indices that are gone, ascending, ``(size - count,)``."""
        return torch.from_numpy(np.flatnonzero(~self._alive))

    @cached_property
    def fill(self) -> Tensor:
        """Return for each index before one after: its own where it is left, any other where not, ``(size,)``.

        What is gone gets the numbers of an index that is left: others than its own, of ordinary size.
        """
        own = np.cumsum(self._alive) - 1
        other = np.arange(self.size) % max(self.count, 1)
        return torch.from_numpy(np.where(self._alive, own, other))

    def direction(self, dim: int, like: Tensor, slim: bool) -> Tensor:
        """Return what this dimension of a tensor is projected on, so that slim and full tensors come to the same.

        Returns:
            Random numbers, ``(count,)`` if ``slim``, else ``(size,)`` with zeros where indices are gone.
        """
        key = dim, like.dtype, slim
        if key not in self._directions:
            full = directions(self.size, dim, like)
            mask = torch.from_numpy(self._alive).to(full.device)
            self._directions[key] = full[mask] if slim else full * mask
        return self._directions[key]


class Lefts:
    """Tells what is left of the tensors of a trace under a choice."""

    def __init__(self, structure: Structure, keep: Keep) -> None:
        """Work out which atoms are left."""
        self._structure, self._keep = structure, keep
        self._alive = structure.alive(keep)
        self._known: dict[int | tuple[int, ...], Left | None] = {}  # by ``id`` of atoms
        self._shared: dict[bytes, Left] = {}
        self._group_of: NDArray[np.int64] | None = None
        self._of: dict[int, tuple[Labels, dict[int, Left]]] = {}  # by ``id`` of the labels, which are kept beside it

    def along(self, labels: tuple[Label, ...]) -> Left | None:
        """Return what is left along a dimension with these labels, None where all is."""
        key = id(labels[0].atoms) if len(labels) == 1 else tuple([id(label.atoms) for label in labels])
        if key not in self._known:
            self._known[key] = self._left(labels)
        return self._known[key]

    def of(self, labels: Labels) -> dict[int, Left]:
        """Return, for each dimension of a tensor that something is gone of, what is left."""
        known = self._of.get(id(labels))
        if known is not None:
            return known[1]
        found: dict[int, Left] = {}
        for dim, own in labels.dims.items():
            left = self.along(own)
            if left is not None:
                found[dim] = left
        self._of[id(labels)] = labels, found
        return found

    def shape(self, labels: Labels, full: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that a tensor of this shape should have."""
        left = self.of(labels)
        if not left:
            return tuple(full)
        return tuple([left[dim].count if dim in left else size for dim, size in enumerate(full)])

    def groups(self, *labels: Labels) -> frozenset[str]:
        """Return the names of the groups that lose units and whose units these labels carry."""
        if self._group_of is None:
            self._group_of = np.full(self._structure.ledger.size, -1)
            for which, units in enumerate(self._structure.units.values()):
                self._group_of[units] = which
        names = list(self._structure.units)
        found: set[str] = set()
        for own in labels:
            for along in own.dims.values():
                for label in along:
                    indices = np.unique(self._group_of[self._structure.component[label.atoms]])
                    found.update(names[int(index)] for index in indices if index >= 0)
        return frozenset(name for name in found if name in self._keep and not self._keep[name].all())

    def _left(self, labels: tuple[Label, ...]) -> Left | None:
        alive = self._alive[labels[0].atoms]
        for label in labels[1:]:
            alive = alive & self._alive[label.atoms]
        same = alive.tobytes()  # most dimensions of a network lose the same indices as others
        if _GONE not in same:
            return None
        if same not in self._shared:
            self._shared[same] = Left(alive)
        return self._shared[same]
