"""Runs operators along a trace, on other tensors where there are some instead; compares nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.model.devices import seed_generators_
from lightning_prune.model.tensor_state import places_written
from lightning_prune.structure.decisions import impose_
from lightning_prune.structure.labels import Ran
from lightning_prune.structure.rules import is_pointwise, reduces, tensors_among
from lightning_prune.structure.shape_only import writes
from lightning_prune.structure.tracer import Watch, aliases, plain
from lightning_prune.surgery.expected_outputs import Course, Left, Lefts, OtherOperatorsError
from lightning_prune.surgery.fingerprint import Print, fingerprint, kept_dim
from lightning_prune.surgery.resize import taken

__all__ = [
    "Counted", "DifferentError", "Exchanges", "Facts", "Replay", "Seen", "is_scaling", "restricted", "selected",
    "tensors_of",
]  # fmt: skip

Exchanges = Mapping[int, Callable[[], Tensor]]
"""``id`` of a tensor -> what makes the one that operators take in its place."""

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
    _aten.native_group_norm, _aten.native_layer_norm, _aten.convolution, getattr(_aten, "_fused_rms_norm", None)
})  # fmt: skip
_FIRST_SEED = 0x5EED_0F_7E57_0000
_PRODUCTS = frozenset({_aten.convolution, _aten.mm, _aten.addmm, _aten.bmm})


class Facts(NamedTuple):
    """What is known of an operator, looked up once: an operator is slow to hash."""

    func: Any
    packet: Any
    draws: bool  # random numbers
    reduces: bool  # over dimensions that may carry channels
    pointwise: bool
    shows_only: bool  # its input in another way, which was compared already
    writes: bool  # into an argument
    unwritten: bool  # whether nothing is written to its output yet
    counts: bool  # whether it is told how many channels or groups there are
    product: bool  # whether it is a matrix product or a convolution
    written: tuple[int, ...]  # positions of the arguments that it may write into


def _facts(func: Any) -> Facts:
    packet = func.overloadpacket
    return Facts(
        func,
        packet,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        reduces=reduces(func),
        pointwise=is_pointwise(func),
        shows_only=aliases(func) and not func._schema.is_mutable,
        writes=writes(func),
        unwritten=packet in _UNWRITTEN,
        counts=packet in _COUNTING,
        product=packet in _PRODUCTS,
        written=tuple([place for place, _ in places_written(func)]),
    )


def is_scaling(func: Any) -> bool:
    """Return whether an operator multiplies or divides."""
    return func.overloadpacket in _SCALED


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


class Replay(Watch):
    """Base of the two runs that are compared.

    Attributes:
        slim: Whether the slim model runs.
        fewer: Whether its inputs hold fewer positions than those of the trace.
        course: How far the run has come along the trace.
        failure: The first error of ours that was raised; the model's own code may have caught it.
    """

    slim = False
    fewer = False

    def __init__(self, ran: list[Ran], lefts: Lefts, instead: Exchanges, counts: Counted) -> None:
        """Prepare a run.

        Args:
            ran: The operators of the trace.
            lefts: What is left of their tensors.
            instead: Tensors to take in place of others.
            counts: Arguments that count units.
        """
        super().__init__()
        self._ran, self._lefts, self._instead, self._counts = ran, lefts, instead, counts
        self.course = Course(ran)
        self.failure: Exception | None = None
        self._seed = 0
        self._facts: dict[int, Facts] = {}  # by ``id`` of an operator

    def __enter__(self) -> Any:
        """Start from a seed of our own, so that code which sets one is noticed, whatever it sets."""
        self._seed = _own_seed(0)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = self.in_parts(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        if self._instead:
            kwargs = {name: self._taken(value) for name, value in kwargs.items()}
            args = [self._taken(value) for value in args]
        facts = self.facts_of(func)
        try:
            at = self.next(facts, args)
            if at is None:
                return self.plain_run(facts, args, kwargs)
            out = self._drawn(at, facts, args, kwargs) if facts.draws else self.replay(at, facts, args, kwargs)
            decisions = self._ran[at].decisions
            if decisions:
                impose_(decisions, tensors_of(out))
            self.look(at, facts, plain((*args, *kwargs.values()) if kwargs else args), out)
            return out
        except (DifferentError, OtherOperatorsError) as error:
            self.failure = self.failure or error
            raise

    def facts_of(self, func: Any) -> Facts:
        """Return what is known of an operator."""
        facts = self._facts.get(id(func))
        if facts is None:
            facts = self._facts[id(func)] = _facts(func)
        return facts

    def next(self, facts: Facts, args: Any) -> int | None:
        """Return the index of the traced operator that this one is; None for one that only lays out memory.

        Raises:
            OtherOperatorsError: If another one was to run.
        """
        before = self.course.at
        at = self.course.next(facts.func)
        if at is not None and facts.packet is _aten.clone and not self.takes(at, args[0]):
            self.course.at = before  # a copy of another tensor, which lies in memory otherwise here
            return None
        return at

    def replay(self, at: int, facts: Facts, args: Any, kwargs: Any) -> Any:
        """Run the operator at an index of the trace."""
        return self.plain_run(facts, args, kwargs)

    def takes(self, at: int, given: Tensor) -> bool:
        """Return whether a tensor has the size of the one that the operator at an index of the trace took."""
        ran = self._ran[at]
        full = ran.entering[0]
        expected = self._lefts.shape(ran.taken[0], full) if self.slim else tuple(full)
        return self.fewer or tuple(given.shape) == expected

    def look(self, at: int, facts: Facts, plain: tuple[Any, ...], out: Any) -> None:
        """Look at what an operator returned."""
        raise NotImplementedError

    def plain_run(self, facts: Facts, args: Any, kwargs: Any) -> Any:
        """Run an operator; what it leaves unwritten holds zeros, since code may copy from it before it writes."""
        out = self.run(facts.func, args, kwargs)
        return out.zero_() if facts.unwritten else out

    def print_of(self, at: int, facts: Facts, which: int, out: Tensor) -> Print | None:
        """Return the fingerprint of an output on what is left of it, or None where there is nothing to compare."""
        labels = self._ran[at].made[which]
        if facts.shows_only or facts.unwritten or labels.blank or not out.numel():
            return None
        floats = out.is_floating_point()
        if not (floats or out.is_complex()) or out.layout is not torch.strided:
            return None
        out = out.detach()
        if not floats:
            out = torch.view_as_real(out.resolve_conj())
        if out.dtype is not torch.float32 and out.dtype is not torch.float64:
            out = out.float()
        left = self._lefts.of(labels)
        along: list[Tensor | None] = [None] * out.dim()
        full = list(out.shape)
        for dim, own in left.items():
            along[dim] = own.direction(dim, out, self.slim)
            full[dim] = own.size
        keep = kept_dim(full, [*left, *labels.dims])  # the same in both models, whatever is left
        found = fingerprint(out, keep, along)
        if self.slim or keep not in left:
            return found
        values = found.values[left[keep].indices.to(out.device)]
        return Print(values, float(values.abs().max()) if values.numel() else 0.0)

    def _taken(self, value: Any) -> Any:
        make = self._instead.get(id(value))
        if make is not None:
            return make()
        return [self._taken(item) for item in value] if type(value) in (list, tuple) else value

    def _drawn(self, at: int, facts: Facts, args: Any, kwargs: Any) -> Any:
        """Run an operator that draws random numbers: those of what is left are the same in both models.

        Where the code brings a generator, or sets the seed, its numbers are constants and stay what they are.
        """
        own_generator = any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
        if own_generator or torch.initial_seed() != self._seed:
            return self.plain_run(facts, args, kwargs)
        fills = facts.packet in _FILLS and not tensors_among(args[1:])
        if not fills and facts.packet not in _DRAWS:
            self._seed = _own_seed(at)
            return self.plain_run(facts, args, kwargs)
        out = self.plain_run(facts, args, kwargs)
        left = self._lefts.of(self._ran[at].made[0])
        full = list(out.shape)
        for dim, own in left.items() if self.slim else ():
            full[dim] = own.size
        generator = torch.Generator(out.device).manual_seed(at)
        drawn = torch.empty(full, dtype=out.dtype, device=out.device)
        fill = getattr(drawn, str(facts.packet).rpartition(".")[2] if fills else _DRAWS[facts.packet])
        fill(*(args[1:] if fills else ()), generator=generator)
        out.copy_(restricted(drawn, left) if self.slim else drawn)
        return out


def _own_seed(at: int) -> int:
    """Seed torch for the operator at an index of the trace, with a number that no code chooses; return that."""
    seed = _FIRST_SEED + at
    seed_generators_(seed)
    return seed


def restricted(tensor: Tensor, left: Mapping[int, Left]) -> Tensor:
    """Return what is left of a tensor."""
    for dim, own in left.items():
        tensor = selected(tensor, dim, own.indices)
    return tensor


def selected(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Select indices; dimensions lie in memory in the order they did, by which torch chooses between operators."""
    if tensor.is_contiguous():
        return taken(tensor, dim, indices)
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    chosen = taken(tensor.permute(order), order.index(dim), indices)
    return chosen.permute([order.index(d) for d in range(tensor.dim())])


def tensors_of(out: Any) -> list[Tensor]:
    """Return the tensors that an operator returned."""
    if isinstance(out, Tensor):
        return [out]
    return [part for part in out if isinstance(part, Tensor)] if isinstance(out, list | tuple) else []
