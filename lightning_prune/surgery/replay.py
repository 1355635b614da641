"""Runs the slim model and the full one along a trace and compares every operator; decides nothing.

The slim model runs first and leaves a fingerprint of each output. The full model then runs the same operators on all of
its units. What reduces over units (products, norms, statistics) is given only what is left of its inputs, and what has
gone is filled with numbers of other units: so whatever reads what has gone shows as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.structure.decisions import impose_
from lightning_prune.structure.labels import Ran
from lightning_prune.structure.rules import reduces, tensors_among
from lightning_prune.structure.shape_only import writes
from lightning_prune.structure.tracer import Watch, aliases, plain
from lightning_prune.surgery.expected_outputs import Course, Left, Lefts, OtherOperatorsError
from lightning_prune.surgery.fingerprint import Print, agree, difference, fingerprint, kept_dim

__all__ = [
    "EMPTY",
    "Constant",
    "Counted",
    "DifferentError",
    "Exchanges",
    "Reference",
    "Seen",
    "Slim",
    "Window",
    "is_scaling",
]

Exchanges = Mapping[int, Callable[[], Tensor]]
"""``id`` of a tensor -> what makes the one that operators take in its place."""

EMPTY = "its output is empty"
"""Why an operator was not compared whose numbers nobody saw."""

_PRODUCTS = frozenset({torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm})
Counted = Mapping[int, tuple[str, int]]
"""Index of a traced operator -> name of an argument that counts units, and what it must be."""

_aten = torch.ops.aten
_UNWRITTEN = frozenset({
    _aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided,
})  # fmt: skip
_FILLS = frozenset({
    _aten.bernoulli_, _aten.uniform_, _aten.normal_, _aten.exponential_, _aten.cauchy_, _aten.log_normal_,
    _aten.geometric_,
})  # fmt: skip
_DRAWS = {_aten.rand: "uniform_", _aten.rand_like: "uniform_", _aten.randn: "normal_", _aten.randn_like: "normal_"}
_SCALED = frozenset({_aten.mul, _aten.mul_, _aten.div, _aten.div_})
_COUNTING = frozenset({
    _aten.native_group_norm, _aten.native_layer_norm, _aten._fused_rms_norm, _aten.convolution
})  # fmt: skip
"""Operators that are told how many channels or groups there are."""


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


class DifferentError(Exception):
    """The slim model computes something else, at an operator or in the end.

    Attributes:
        ran: The operator of the trace.
        numeric: Whether numbers are different, rather than sizes: rounding may be why.
    """

    def __init__(self, told: str, ran: Ran | None, numeric: bool = False) -> None:
        """Say what is different, and at which operator of the trace."""
        where = "" if ran is None else f" ({ran.path or 'the model'}, {ran.func.overloadpacket})"
        super().__init__(told + where)
        self.ran = ran
        self.numeric = numeric


@dataclass(eq=False, slots=True)
class Seen:
    """What the slim run leaves of an operator: its plain arguments, and shape and fingerprint of each output."""

    plain: tuple[Any, ...]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    prints: list[Print | None] = field(default_factory=list)
    value: float | None = None


class _Replay(Watch):
    """Runs operators along a trace, on other tensors where there are some instead."""

    def __init__(self, ran: list[Ran], lefts: Lefts, instead: Exchanges, counts: Counted) -> None:
        super().__init__()
        self._ran, self._lefts, self._instead, self._counts = ran, lefts, instead, counts
        self.course = Course(ran)
        self.failure: Exception | None = None
        self._seed: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: self._taken(value) for name, value in kwargs.items()} if kwargs else {}
        args = [self._taken(value) for value in args]
        try:
            at = self.course.next(func)
            return self.run(func, args, kwargs) if at is None else self.replay(at, func, args, kwargs)
        except (DifferentError, OtherOperatorsError) as error:
            self.failure = self.failure or error  # the model's own code may catch it
            raise

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; what it leaves unwritten holds zeros, since code may copy from it before it writes."""
        out = super().run(func, args, kwargs)
        return out.zero_() if func.overloadpacket in _UNWRITTEN else out

    def replay(self, at: int, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _taken(self, value: Any) -> Any:
        make = self._instead.get(id(value))
        if make is not None:
            return make()
        return [self._taken(item) for item in value] if type(value) in (list, tuple) else value

    def print_of(self, ran: Ran, which: int, out: Tensor, slim: bool) -> Print | None:
        """Return the fingerprint of an output on what is left of it, or None where there is nothing to compare."""
        packet, labels = ran.func.overloadpacket, ran.made[which]
        compared = (out.is_floating_point() or out.is_complex()) and not aliases_only(ran.func)
        if not compared or labels.blank or packet in _UNWRITTEN or not out.numel() or out.layout is not torch.strided:
            return None
        left = self._lefts.of(labels)
        out = out.detach()
        if out.is_complex():
            out = torch.view_as_real(out)
        elif out.dtype not in (torch.float32, torch.float64):
            out = out.float()
        along: list[Tensor | None] = [None] * out.dim()
        for dim, own in left.items():
            along[dim] = own.direction(dim, out, slim)
        keep = kept_dim(out.shape, [*left, *[dim for dim in labels.dims if dim not in left]])
        found = fingerprint(out, keep, along)
        if not slim and keep in left:
            values = found.values[left[keep].indices.to(out.device)]
            found = Print(values, float(values.abs().max()) if values.numel() else 0.0)
        return found

    def _drawn(self, at: int, ran: Ran, func: Any, args: list[Any], kwargs: dict[str, Any], slim: bool) -> Any:
        """Run an operator that draws random numbers: those of what is left are the same in both models.

        Where the code brings a generator, or sets the seed, its numbers are constants and stay what they are.
        """
        own_generator = any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
        if self._seed is None:
            self._seed = torch.initial_seed()
        if own_generator or torch.initial_seed() != self._seed:
            return self.run(func, args, kwargs)
        packet = func.overloadpacket
        simple = packet in _FILLS and not tensors_among(args[1:])
        if not simple and packet not in _DRAWS:
            torch.manual_seed(at)
            self._seed = torch.initial_seed()
            return self.run(func, args, kwargs)
        out = self.run(func, args, kwargs)
        left = self._lefts.of(ran.made[0])
        full = [left[dim].size if slim and dim in left else size for dim, size in enumerate(out.shape)]
        generator = torch.Generator(out.device).manual_seed(at)
        drawn = torch.empty(full, dtype=out.dtype, device=out.device)
        fill = getattr(drawn, str(packet).rpartition(".")[2] if simple else _DRAWS[packet])
        fill(*(args[1:] if simple else ()), generator=generator)
        out.copy_(_restricted(drawn, left) if slim else drawn)
        return out


def _same(one: Any, other: Any) -> bool:
    """Return whether plain arguments are equal; what is not a number equals itself."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)


def is_scaling(func: Any) -> bool:
    """Return whether an operator multiplies or divides."""
    return func.overloadpacket in _SCALED


def aliases_only(func: Any) -> bool:
    """Return whether an operator only shows its input in another way: what it shows was compared already."""
    return aliases(func) and not func._schema.is_mutable


def _restricted(tensor: Tensor, left: Mapping[int, Left]) -> Tensor:
    for dim, own in left.items():
        tensor = _selected(tensor, dim, own.indices)
    return tensor


def _selected(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Select indices; dimensions lie in memory in the order they did, by which torch chooses between operators."""
    indices = indices.to(tensor.device)
    if tensor.is_contiguous():
        return tensor.index_select(dim, indices)
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    chosen = tensor.permute(order).index_select(order.index(dim), indices)
    return chosen.permute([order.index(d) for d in range(tensor.dim())])


class Slim(_Replay):
    """Runs the slim model, checks sizes and counts, and keeps fingerprints.

    Attributes:
        seen: Index of a traced operator -> what is left of its run.
    """

    def __init__(self, ran: list[Ran], lefts: Lefts, instead: Exchanges, counts: Counted, fewer: bool = False) -> None:
        """Prepare a run; ``fewer`` says that its inputs hold fewer positions than those of the trace."""
        super().__init__(ran, lefts, instead, counts)
        self.seen: dict[int, Seen] = {}
        self._fewer = fewer

    def replay(self, at: int, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        ran = self._ran[at]
        if torch.Tag.nondeterministic_seeded in func.tags:
            out = self._drawn(at, ran, func, args, kwargs, slim=True)
        else:
            out = self.run(func, args, kwargs)
        impose_(ran.decisions, _tensors(out))
        seen = self.seen[at] = Seen(plain((*args, *kwargs.values()) if kwargs else args))
        if at in self._counts:
            self._check_count(ran, seen, *self._counts[at])
        for which, tensor in enumerate(_tensors(out)):
            if which < len(ran.made):
                self._check_sizes(ran, which, tensor)
                seen.prints.append(self.print_of(ran, which, tensor, slim=True))
            seen.shapes.append(tuple(tensor.shape))
        if isinstance(out, Tensor) and _is_constant(ran, out):
            seen.value = float(out)
        return out

    def _check_sizes(self, ran: Ran, which: int, out: Tensor) -> None:
        labels, full = ran.made[which], ran.leaving[which]
        expected = self._lefts.shape(labels, full)
        if len(out.shape) != len(expected):
            raise DifferentError(f"an output of shape {tuple(full)} becomes {tuple(out.shape)}", ran)
        for dim, size in enumerate(out.shape):
            carries = dim in labels.dims
            if size == expected[dim] or (labels.blank and not carries):
                continue
            # Of smaller inputs, a dimension may count channels and positions, and one position left alone broadcasts.
            if self._fewer and (carries or size == 1):
                raise OtherOperatorsError("fewer positions tell less", ran)
            if carries:
                raise DifferentError(
                    f"an output of shape {tuple(full)} becomes {tuple(out.shape)}, not {expected}", ran
                )

    def _check_count(self, ran: Ran, seen: Seen, name: str, count: int) -> None:
        names = [argument.name for argument in ran.func._schema.arguments]
        found = seen.plain[names.index(name)]
        if found != count:
            raise DifferentError(f"{name} is {found}, not {count}", ran)


class Reference(_Replay):
    """Runs the full model on what is left, and compares each operator with what the slim run left of it.

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
        """
        super().__init__(ran, lefts, instead, counts)
        self._seen, self._tolerance, self._windows, self._free = seen, tolerance, windows, free
        self.compared = 0
        self.skipped: dict[str, int] = {}
        self.constants: list[Constant] = []

    def replay(self, at: int, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operator and compare it."""
        ran, seen = self._ran[at], self._seen.get(at)
        if torch.Tag.nondeterministic_seeded in func.tags:
            out = self._drawn(at, ran, func, args, kwargs, slim=False)
        elif reduces(func):
            out = self._reduced(at, seen, func, args, kwargs)
        else:
            if seen is not None and torch.Tag.pointwise in func.tags:
                args = self._with_constants(at, seen, func, args, kwargs)
            out = self.run(func, args, kwargs)
        impose_(ran.decisions, _tensors(out))
        if seen is not None:
            self._compare(at, seen, out)
        return out

    def _compare(self, at: int, seen: Seen, out: Any) -> None:
        ran = self._ran[at]
        outputs = _tensors(out)
        for which, tensor in enumerate(outputs):
            if which >= len(seen.prints):
                continue
            self._compare_shape(ran, which, tensor, seen.shapes[which])
            found = self.print_of(ran, which, tensor, slim=False)
            slim = seen.prints[which]
            if seen.value is not None and isinstance(out, Tensor):
                self._compare_constant(at, tensor, seen.value)
                continue
            if found is None or slim is None:
                if tensor.numel() or not any(other.numel() for other in outputs):  # norms return empty ones, too
                    self._note_skipped(ran, which, tensor)
                continue
            self.compared += 1
            factors = [window.factor for window in self._windows if window.first <= at < window.last]
            if agree(found, slim, self._tolerance, factors):
                continue
            told = f"its output differs by {difference(found, slim):.1e} of its scale"
            raise DifferentError(told, ran, numeric=True)

    def _compare_shape(self, ran: Ran, which: int, out: Tensor, slim: tuple[int, ...]) -> None:
        labels = ran.made[which]
        left = self._lefts.of(labels)
        if labels.blank:
            return
        expected = tuple([left[dim].count if dim in left else size for dim, size in enumerate(out.shape)])
        if expected != slim:
            raise DifferentError(f"an output of shape {tuple(out.shape)} becomes {slim}, not {expected}", ran)

    def _note_skipped(self, ran: Ran, which: int, out: Tensor) -> None:
        carries = any(self._lefts.of(labels) for labels in ran.taken) or self._lefts.of(ran.made[which])
        told = not aliases_only(ran.func) and ran.func.overloadpacket not in _UNWRITTEN and not ran.made[which].blank
        if carries and told:
            why = "its output is no floating point" if out.numel() else EMPTY
            key = f"{ran.func.overloadpacket} in {ran.path or 'the model'}: {why}"
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

    def _with_constants(self, at: int, seen: Seen, func: Any, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Return the arguments of a pointwise operator with the numbers that the slim model gave it."""
        mine = plain((*args, *kwargs.values()) if kwargs else args)
        if _same(mine, seen.plain) or at in self._free:
            return args
        for before, after in zip(mine, seen.plain, strict=True):
            if _same(before, after):
                continue
            if func.overloadpacket not in _SCALED:
                raise DifferentError(f"a number that it takes becomes {after}, not {before}", self._ran[at])
            self._change_constant(at, before, after)
        return _with_numbers(args, seen.plain)

    def _reduced(self, at: int, seen: Seen | None, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator on what is left of its inputs, and fill in what is gone of its outputs."""
        ran = self._ran[at]
        entering = [self._lefts.of(labels) for labels in ran.taken]
        mine = plain((*args, *kwargs.values()) if kwargs else args)
        if seen is not None:
            self._check_numbers(at, seen, mine)
        if not any(entering) or self._passes(ran, entering, mine):
            return self.run(func, args, kwargs)
        waiting = iter(entering)
        narrowed = [_narrowed_all(value, waiting) for value in args]
        kwargs = {name: _narrowed_all(value, waiting) for name, value in kwargs.items()}
        if seen is not None and func.overloadpacket in _COUNTING:
            narrowed = _with_numbers(narrowed, seen.plain)
        out = self.run(func, narrowed, kwargs)
        pairs = zip(_tensors(out), ran.made, strict=False)
        filled = [_filled(tensor, self._lefts.of(labels)) for tensor, labels in pairs]
        if writes(func):
            return args[0].copy_(filled[0])
        return filled[0] if isinstance(out, Tensor) else tuple(filled)

    def _passes(self, ran: Ran, entering: list[dict[int, Left]], mine: tuple[Any, ...]) -> bool:
        """Return whether nothing is summed over dimensions that lose units, which need not be left out then."""
        packet = ran.func.overloadpacket
        if packet is _aten.native_batch_norm:  # a channel at a time, by the statistics that each has
            return not mine[5]
        if packet not in _PRODUCTS:
            return False
        made = {id(label) for labels in ran.made for own in labels.dims.values() for label in own}
        for labels, left in zip(ran.taken, entering, strict=True):
            if any(id(label) not in made for dim in left for label in labels.dims[dim]):
                return False
        return True

    def _check_numbers(self, at: int, seen: Seen, mine: tuple[Any, ...]) -> None:
        """Check that the slim model gave a reducing operator the numbers that the full one gives it."""
        ran = self._ran[at]
        free = {self._counts[at][0]} if at in self._counts else set()
        if ran.func.overloadpacket in _COUNTING:
            free |= {"N", "C", "HxW", "normalized_shape"}  # which it checks itself
        names = [argument.name for argument in ran.func._schema.arguments]
        for name, before, after in zip(names, mine, seen.plain, strict=False):
            if name not in free and not _same(before, after):
                raise DifferentError(f"{name} becomes {after}, not {before}", ran)


def _with_numbers(args: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
    """Return arguments with their tensors, and other numbers."""
    return [
        value if isinstance(value, Tensor) else other for value, other in zip(args, numbers[: len(args)], strict=True)
    ]


def _narrowed_all(value: Any, waiting: Any) -> Any:
    """Return what is left of the tensors of an argument; ``waiting`` yields what is left of each, in order."""
    if isinstance(value, Tensor):
        return _restricted(value, next(waiting))
    if isinstance(value, list | tuple):
        return type(value)(_narrowed_all(item, waiting) for item in value)
    return value


def _filled(out: Tensor, left: Mapping[int, Left]) -> Tensor:
    """Return an output at its full size: numbers of other units stand where units have gone."""
    for dim, own in left.items():
        if out.shape[dim] != own.count:
            continue  # the comparison of shapes tells
        if own.count:
            out = _selected(out, dim, own.fill)
        else:
            out = out.new_zeros((*out.shape[:dim], own.size, *out.shape[dim + 1 :]))
    return out


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [part for part in out if isinstance(part, Tensor)] if isinstance(out, list | tuple) else []


def _is_constant(ran: Ran, out: Tensor) -> bool:
    """Return whether an output is one number that was made of single numbers, and of no data."""
    single = out.numel() == 1 and not out.is_complex() and ran.made[0].weight and not ran.made[0].blank
    return single and all(math.prod(shape) <= 1 for shape in ran.entering)
