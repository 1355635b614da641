"""Runs the full model along a trace and compares each output, on what is left of it, with that of the slim model.

The full model runs on all of its units. What reduces over units (products, norms, statistics) is given only what is
left of its inputs, and what has gone is filled with numbers of other units: so whatever reads what has gone shows as a
difference.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.structure.labels import Ran
from lightning_prune.structure.tracer import plain
from lightning_prune.surgery.expected_outputs import Left, Lefts
from lightning_prune.surgery.fingerprint import agree, difference
from lightning_prune.surgery.replay import (
    Counted,
    DifferentError,
    Exchanges,
    Facts,
    Replay,
    Seen,
    is_scaling,
    restricted,
    selected,
    tensors_of,
)

__all__ = ["EMPTY", "Constant", "Reference", "Window", "filled", "is_grouped", "silenced"]

EMPTY = "its output is empty"
"""Why an operator was not compared whose numbers nobody saw."""

_aten = torch.ops.aten
_TURNS = frozenset({_aten.t, _aten.transpose, _aten.permute, _aten.detach, _aten.alias})
"""Operators that show what is left of a weight as they show the whole weight: no argument of theirs is a size."""


_SUMMED = {_aten.mm: {0: 1, 1: 0}, _aten.bmm: {0: 2, 1: 1}, _aten.addmm: {1: 1, 2: 0}}
"""Matrix product -> for each tensor that it takes, by position, the dimension that it sums over."""


@dataclass(frozen=True)
class Constant:
    """A number that the code works out from a width, so that it changes when units leave.

    Attributes:
        where: Path of the module, and the operator.
        before: The number in the full model.
        after: The number in the slim one.
        at: Index of the operator in the trace.
    """

    where: str
    before: float
    after: float
    at: int = field(repr=False)

    def __str__(self) -> str:
        """Say what becomes of the number."""
        return f"{self.where}: {self.before:.6g} becomes {self.after:.6g}"


class Window(NamedTuple):
    """Operators of a trace, ``first`` to before ``last``, whose outputs may carry a factor in the slim model."""

    first: int
    last: int
    factor: float


class Reference(Replay):
    """The run of the full model on what is left of it.

    Attributes:
        compared: How many operators were compared by numbers.
        skipped: Why operators with channels that lose some were not, and how many.
        constants: Numbers that changed with widths.
    """

    def __init__(
        self,
        ran: list[Ran],
        lefts: Lefts,
        instead: Exchanges,
        counts: Counted,
        seen: Mapping[int, Seen],
        tolerance: float,
        windows: Sequence[Window] = (),
        free: Container[int] = (),
        slim: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Prepare a run.

        Args:
            ran: The operators of the trace.
            lefts: What is left of their tensors.
            instead: Tensors to take in place of others.
            counts: Arguments that count units.
            seen: What the slim run left.
            tolerance: Of a difference, relative to each output's scale.
            windows: Where outputs of the slim model may carry a factor.
            free: Operators whose numbers are made up for by that, so that both models keep theirs.
            slim: Weights of the full model, each beside what is known to be left of it.
        """
        super().__init__(ran, lefts, instead, counts)
        self._seen, self._tolerance, self._windows, self._free = seen, tolerance, windows, free
        self._slim_of = {id(full): (full, left) for full, left in slim}
        self.compared = 0
        self.skipped: dict[str, int] = {}
        self.constants: list[Constant] = []

    def replay(self, at: int, facts: Facts, args: Any, kwargs: Any) -> Any:
        """Run one operator, on what is left of its inputs where it reduces."""
        seen = self._seen.get(at)
        if facts.reduces:
            return self._reduced(at, facts, seen, args, kwargs)
        if seen is not None and facts.pointwise:
            args = self._with_constants(at, facts, seen, args, kwargs)
        out = self.plain_run(facts, args, kwargs)
        if facts.packet in _TURNS and id(args[0]) in self._slim_of:
            left = facts.func(self._slim_of[id(args[0])][1], *args[1:], **kwargs)
            self._slim_of[id(out)] = out, left
        return out

    def look(self, at: int, facts: Facts, plain: tuple[Any, ...], out: Any) -> None:
        """Compare what an operator returned."""
        seen = self._seen.get(at)
        if seen is None:
            return
        ran = self._ran[at]
        outputs = tensors_of(out)
        for which, tensor in enumerate(outputs[: len(seen.prints)]):
            self._compare_shape(ran, which, tensor, seen.shapes[which])
            if seen.value is not None and isinstance(out, Tensor):
                self._compare_constant(at, tensor, seen.value)
                continue
            slim = seen.prints[which]
            found = None if slim is None else self.print_of(at, facts, which, tensor)
            if found is None or slim is None:
                if tensor.numel() or not any(other.numel() for other in outputs):  # norms return empty ones, too
                    self._note_skipped(ran, facts, which, tensor)
                continue
            self.compared += 1
            factors = [window.factor for window in self._windows if window.first <= at < window.last]
            if not agree(found, slim, self._tolerance, factors):
                told = f"its output differs by {difference(found, slim):.1e} of its scale"
                raise DifferentError(told, ran, numeric=True)

    def _compare_shape(self, ran: Ran, which: int, out: Tensor, slim: tuple[int, ...]) -> None:
        labels = ran.made[which]
        if labels.blank:
            return
        expected = self._lefts.shape(labels, out.shape)
        if expected != slim:
            raise DifferentError(f"an output of shape {tuple(out.shape)} becomes {slim}, not {expected}", ran)

    def _note_skipped(self, ran: Ran, facts: Facts, which: int, out: Tensor) -> None:
        made = ran.made[which]
        if facts.shows_only or facts.unwritten or made.blank:
            return
        if self._lefts.of(made) or any(self._lefts.of(labels) for labels in ran.taken):
            why = EMPTY if not out.numel() else "its output is no floating point"
            if out.numel() and (out.is_floating_point() or out.is_complex()):
                why = "one of both models makes no output of its own there"
            key = f"{facts.packet} in {ran.path or 'the model'}: {why}"
            self.skipped[key] = self.skipped.get(key, 0) + 1

    def _compare_constant(self, at: int, constant: Tensor, slim: float) -> None:
        """Note a constant that changed, and go on with that of the slim model."""
        before = float(constant)
        if at not in self._free and abs(before - slim) > self._tolerance * max(abs(before), abs(slim)):
            self._change_constant(at, before, slim)
            constant.fill_(slim)

    def _change_constant(self, at: int, before: float, after: float) -> None:
        where = f"{self._ran[at].path or 'the model'}, {self._ran[at].func.overloadpacket}"
        self.constants.append(Constant(where, before, after, at))

    def _with_constants(self, at: int, facts: Facts, seen: Seen, args: Any, kwargs: Any) -> Any:
        """Return the arguments of a pointwise operator with the numbers that the slim model gave it."""
        mine = plain((*args, *kwargs.values()) if kwargs else args)
        if _same(mine, seen.plain) or at in self._free:
            return args
        for before, after in zip(mine, seen.plain, strict=True):
            if _same(before, after):
                continue
            if not is_scaling(facts.func):
                raise DifferentError(f"a number that it takes becomes {after}, not {before}", self._ran[at])
            self._change_constant(at, before, after)
        return _with_numbers(args, seen.plain)

    def _reduced(self, at: int, facts: Facts, seen: Seen | None, args: Any, kwargs: Any) -> Any:
        """Run an operator on what is left of its inputs, and fill in what is gone of its outputs."""
        ran = self._ran[at]
        if all(labels.constant for labels in ran.taken):  # a sum of ones is a number made from a width
            return self.plain_run(facts, args, kwargs)
        entering = [self._lefts.of(labels) for labels in ran.taken]
        mine = plain((*args, *kwargs.values()) if kwargs else args)
        if seen is not None:
            self._check_numbers(at, facts, seen, mine)
        if not any(entering) or self._passes(ran, facts, entering, mine):
            return self.plain_run(facts, args, kwargs)
        if is_grouped(facts, mine):
            return self.plain_run(facts, [silenced(args[0], entering[0]), *args[1:]], kwargs)
        waiting = iter(entering)
        narrowed = [self._narrowed(value, waiting) for value in args]
        kwargs = {name: self._narrowed(value, waiting) for name, value in kwargs.items()}
        if seen is not None and facts.counts:
            narrowed = _with_numbers(narrowed, seen.plain)
        out = self.plain_run(facts, narrowed, kwargs)
        pairs = zip(tensors_of(out), ran.made, strict=False)
        fulls = [filled(tensor, self._lefts.of(labels)) for tensor, labels in pairs]
        if facts.writes:
            self.keep(args[0])
            return args[0].copy_(fulls[0])
        return fulls[0] if isinstance(out, Tensor) else tuple(fulls)

    def _narrowed(self, value: Any, waiting: Iterator[dict[int, Left]]) -> Any:
        """Return what is left of the tensors of an argument; ``waiting`` yields what is left of each, in order."""
        if isinstance(value, Tensor):
            left = next(waiting)
            known = self._slim_of.get(id(value)) if left and not self._before else None
            return restricted(value, left) if known is None else known[1]
        if isinstance(value, list | tuple):
            return type(value)([self._narrowed(item, waiting) for item in value])
        return value

    def _passes(self, ran: Ran, facts: Facts, entering: list[dict[int, Left]], mine: tuple[Any, ...]) -> bool:
        """Return whether nothing is summed over dimensions that lose units, which need not be left out then."""
        if facts.packet is _aten.native_batch_norm:  # a channel at a time, by the statistics that each has
            return not mine[5]
        if not facts.product:
            return False
        summed = _summed(facts, mine)
        if any(summed[which] in left for which, left in enumerate(entering) if which in summed):
            return False  # though the output may carry the same labels
        made = {id(label) for labels in ran.made for own in labels.dims.values() for label in own}
        for labels, left in zip(ran.taken, entering, strict=True):
            if any(id(label) not in made for dim in left for label in labels.dims[dim]):
                return False
        return True

    def _check_numbers(self, at: int, facts: Facts, seen: Seen, mine: tuple[Any, ...]) -> None:
        """Check that the slim model gave a reducing operator the numbers that the full one gives it."""
        if mine == seen.plain:
            return
        ran = self._ran[at]
        free = {self._counts[at][0]} if at in self._counts else set()
        if facts.counts:
            free |= {"N", "C", "HxW", "normalized_shape"}  # which it checks itself
        names = [argument.name for argument in ran.func._schema.arguments]
        for name, before, after in zip(names, mine, seen.plain, strict=False):
            if name not in free and not _same(before, after):
                raise DifferentError(f"{name} becomes {after}, not {before}", ran)


def is_grouped(facts: Facts, numbers: tuple[Any, ...]) -> bool:
    """Return whether an operator is a convolution of several groups, whose outputs read some of its inputs alone.

    On what is left of its inputs, it would read what the slim model does, be that right or wrong.
    """
    return facts.packet is _aten.convolution and numbers[8] > 1


def silenced(tensor: Tensor, left: Mapping[int, Left]) -> Tensor:
    """Return a tensor with zeros where units are gone."""
    for dim, own in left.items():
        tensor = tensor.index_fill(dim, own.gone.to(tensor.device), 0)
    return tensor


def _summed(facts: Facts, mine: tuple[Any, ...]) -> Mapping[int, int]:
    """Return for the tensors that a product takes, by position, the dimension that it sums over; none if unknown."""
    if facts.packet is not _aten.convolution:
        return _SUMMED[facts.packet]
    transposed, groups = mine[6], mine[8]
    return {0: 1, 1: 0 if transposed else 1} if groups == 1 else {}


def _same(one: Any, other: Any) -> bool:
    """Return whether plain arguments are equal; what is not a number equals itself."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)


def _with_numbers(args: Sequence[Any], numbers: tuple[Any, ...]) -> list[Any]:
    """Return arguments with their tensors, and other numbers."""
    return [
        value if isinstance(value, Tensor) else other for value, other in zip(args, numbers[: len(args)], strict=True)
    ]


def filled(out: Tensor, left: Mapping[int, Left]) -> Tensor:
    """Return an output at its full size: numbers of other units stand where units have gone."""
    for dim, own in left.items():
        if out.shape[dim] != own.count:
            continue  # the comparison of shapes tells
        if own.count:
            out = selected(out, dim, own.fill)
        else:
            out = out.new_zeros((*out.shape[:dim], own.size, *out.shape[dim + 1 :]))
    return out
