"""Labels through an operator without a rule, found by running it on random inputs.

An operator treats the indices along a dimension one by one if selecting some of them commutes with it:
``op(x.index_select(d, i)) == op(x).index_select(e, i)``. Then labels pass from dimension ``d`` to ``e``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_prune.model.devices import widest_float
from lightning_prune.structure.rules.table import Call, Dims, tensors_among

__all__ = ["tested"]

Place = tuple[int, int]
"""Index of a tensor among the inputs or outputs of an operator, and one of its dimensions."""

_UNTESTABLE = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)
_MOST_PAIRS = 6  # pairs of dimensions to try


@dataclass(frozen=True)
class _Passing:
    """Dimensions of inputs that shrink together, and the dimensions of outputs that shrink with them."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]


class _Question:
    """The cache key of a trial: an operator, its arguments, and the dimensions of its tensors that carry labels.

    Two questions are equal if they have the same answer. ``call`` is dropped once the answer is known.
    """

    def __init__(self, call: Call, asked: Sequence[Place]) -> None:
        self.func = call.func
        self.asked = tuple(asked)
        self.call: Call | None = call
        self._key = (call.func, self.asked, _described(call, call.args), _described(call, sorted(call.kwargs.items())))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self._key == other._key


def tested(call: Call) -> Dims | list[Dims]:
    """Pass labels along the dimensions that the operator treats one by one, and pin all others."""
    if not call.func._schema.returns and not call.func._schema.is_mutable:
        return {}  # it only checks its arguments
    operands = call.tensors()
    asked: list[Place] = []
    for which, tensor in enumerate(operands):
        asked += [(which, dim) for dim in sorted(call.labels(tensor).dims)]
    passings = _passings(call, asked)
    name = call.func.overloadpacket
    dims: list[Dims] = [{} for _ in tensors_among((call.out,))]
    passed: set[Place] = set()
    for passing in passings or ():
        passed.update(passing.inputs)
        sides = [call.labels(operands[which]).at(dim) for which, dim in passing.inputs]
        found = sides[0]
        if len(sides) > 1:
            found = call.ledger.tie(sides, f"meets a tensor of fixed size in {name}")
        for which, dim in passing.outputs:
            if dim in dims[which]:  # two dimensions cannot pass to the same one
                call.ledger.pin((*found, *dims[which].pop(dim)), f"{name} has no coupling rule")
            else:
                dims[which][dim] = found
    for which, dim in asked:
        if (which, dim) in passed:
            continue
        reason = f"{name} has no coupling rule; "
        if passings is not None:
            reason += f"it mixes entries along dimension {dim} of shape {tuple(operands[which].shape)}; "
        call.ledger.pin(call.labels(operands[which]).at(dim), f"{reason}add one with @coupling_rule")
    return _arranged(call.out, dims)


def _passings(call: Call, asked: Sequence[Place]) -> tuple[_Passing, ...] | None:
    """Return what passes through an operator, or None if it cannot be tried."""
    outputs = tensors_among((call.out,))
    if not outputs or not _testable(call.func):
        return None
    if not all(tensor.numel() for tensor in (outputs[0], *call.tensors())):
        return None
    question = _Question(call, asked)
    passings = _answer(question)
    question.call = None  # the cache keeps the question, but need not keep the tensors
    return passings


def _arranged(out: Any, dims: list[Dims]) -> Dims | list[Dims]:
    """Return the labels of an output's tensors in the structure of the output."""
    if isinstance(out, Tensor):
        return dims[0]
    if not isinstance(out, list | tuple):
        return {}
    found = iter(dims)
    return [next(found) if isinstance(part, Tensor) else {} for part in out]


def _testable(func: Any) -> bool:
    """Return whether an operator is deterministic and writes into no argument but the first."""
    if any(tag in func.tags for tag in _UNTESTABLE):
        return False
    later = func._schema.arguments[1:]
    return not any(argument.alias_info is not None and argument.alias_info.is_write for argument in later)


@lru_cache(maxsize=512)
def _answer(question: _Question) -> tuple[_Passing, ...] | None:
    """Try an operator on random inputs; return None if it accepts no kind of them."""
    assert question.call is not None
    for double in (True, False):
        for fill in (_normal, _inside, _definite):
            trial = _Trial.of(question.call, fill, double)
            if trial is not None:
                return tuple(trial.passings(question.asked))
    return None


@dataclass(frozen=True)
class _Trial:
    """An operator and its outputs on random inputs.

    Attributes:
        apply: Computes the operator's outputs from its tensors, which it does not change.
        operands: The random inputs, and index tensors as given.
        outputs: The outputs.
    """

    apply: Callable[[Sequence[Tensor]], list[Tensor]]
    operands: list[Tensor]
    outputs: list[Tensor]

    @staticmethod
    def of(call: Call, fill: Callable[[Tensor, torch.Generator], Tensor], double: bool) -> _Trial | None:
        """Run an operator on random inputs of some kind, or return None if it does not accept those."""
        random = torch.Generator().manual_seed(0)
        operands = []
        for tensor in call.tensors():
            values = tensor.is_floating_point() or tensor.is_complex()
            unknown_mask = _is_mask(tensor) and call.labels(tensor).hollow
            if (values or unknown_mask) and tensor.layout is torch.strided:
                tensor = _random(tensor, fill, double, random)
            operands.append(tensor)

        def apply(tensors: Sequence[Tensor]) -> list[Tensor]:
            remaining = iter(tensors)
            args = _with(call.args, remaining)
            kwargs = {name: _with((value,), remaining)[0] for name, value in call.kwargs.items()}
            if call.func._schema.is_mutable:
                args[0] = args[0].clone()
            return tensors_among((call.func(*args, **kwargs),))

        try:
            outputs = apply(operands)
        except Exception:
            return None
        expected = [out.shape for out in tensors_among((call.out,))]
        if [out.shape for out in outputs] != expected or not any(map(_varies, outputs)):
            return None
        return _Trial(apply, operands, outputs)

    def passings(self, asked: Sequence[Place]) -> Iterator[_Passing]:
        """Yield which of the dimensions asked about pass, and with which others together."""
        done: set[Place] = set()
        for place in asked:
            if place in done:
                continue
            for together in self._candidates(place):
                if done & set(together):
                    continue
                outputs = self._outputs(together)
                if outputs is not None:
                    done.update(together)
                    yield _Passing(together, outputs)
                    break

    def _candidates(self, place: Place) -> Iterator[tuple[Place, ...]]:
        """Yield sets of dimensions that may shrink together: one alone, those at one place, pairs of one size."""
        which, dim = place
        rank, size = self.operands[which].dim(), self.operands[which].shape[dim]
        others: list[Place] = []
        alike: list[Place] = []  # the same dimension of tensors of the same rank
        back: list[Place] = []  # the same dimension, counted from the last
        front: list[Place] = []  # the same dimension, counted from the first
        for other, tensor in enumerate(self.operands):
            if other == which or tensor.layout is not torch.strided:
                continue
            for along in range(tensor.dim()):
                if tensor.shape[along] != size:
                    continue
                others.append((other, along))
                if along == dim:
                    front.append((other, along))
                if along - tensor.dim() == dim - rank:
                    back.append((other, along))
                if along == dim and tensor.dim() == rank:
                    alike.append((other, along))
        sets = [[], alike, back, front]
        sets += [[other] for other in others[:_MOST_PAIRS]]
        yield from dict.fromkeys(tuple(sorted([place, *more])) for more in sets)

    def _outputs(self, together: tuple[Place, ...]) -> tuple[Place, ...] | None:
        """Return the output dimensions that shrink with the given ones, or None if the operator mixes indices."""
        first, along = together[0]
        found: tuple[Place, ...] | None = None
        for chosen in _selections(self.operands[first].shape[along]):
            operands = list(self.operands)
            for which, dim in together:
                operands[which] = operands[which].index_select(dim, chosen.to(operands[which].device))
            try:
                outputs = self.apply(operands)
            except Exception:
                return None
            places = _same(self.outputs, outputs, chosen, self.operands[first].shape[along])
            if places is None or (found is not None and places != found):
                return None
            found = places
        return found


def _selections(size: int) -> Iterator[Tensor]:
    """Yield indices to select: the second half, every other one, and random ones.

    A single index is selected twice, since a dimension of size one would be broadcast.
    """
    if size == 2:
        yield from (torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]))
        return
    random = torch.Generator().manual_seed(size)
    some = torch.randperm(size, generator=random)[: max(2, (2 * size) // 3)].sort().values
    for chosen in (torch.arange(size // 2, size), torch.arange(1, size, 2), some):
        if len(chosen) == 1:
            chosen = chosen.repeat(2)
        yield chosen


def _same(full: list[Tensor], part: list[Tensor], chosen: Tensor, size: int) -> tuple[Place, ...] | None:
    """Return along which dimensions ``part`` is a selection of ``full``, or None if it is not."""
    places: list[Place] = []
    if len(full) != len(part):
        return None
    for which, (whole, some) in enumerate(zip(full, part, strict=True)):
        if whole.dim() != some.dim():
            return None
        differing = [dim for dim in range(whole.dim()) if whole.shape[dim] != some.shape[dim]]
        if len(differing) > 1:
            return None
        if differing:
            dim = differing[0]
            if whole.shape[dim] != size or some.shape[dim] != len(chosen):
                return None
            whole = whole.index_select(dim, chosen.to(whole.device))
            places.append((which, dim))
        elif not (whole.is_floating_point() or whole.is_complex()):
            return None  # integers may agree by chance
        if not _close(whole, some):
            return None
    return tuple(places)


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return bool((one == other).all())
    tolerance = 1e3 * torch.finfo(one.dtype).eps
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.cpu().to(wide), other.cpu().to(wide)
    finite = one[one.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * max(scale, 1e-30), equal_nan=True)


def _varies(out: Tensor) -> bool:
    """Return whether entries differ, so that mixing them would show."""
    if not out.numel():
        return False
    if not (out.is_floating_point() or out.is_complex()):
        return bool((out != out.reshape(-1)[0]).any())
    finite = out[out.isfinite()]
    return 2 * finite.numel() > out.numel() and bool((finite != finite[0]).any())


def _random(
    tensor: Tensor, fill: Callable[[Tensor, torch.Generator], Tensor], double: bool, random: torch.Generator
) -> Tensor:
    """Return a random tensor like another one, in double precision if asked."""
    if _is_mask(tensor):
        return (torch.rand(tensor.shape, generator=random) < 0.5).to(tensor.device)
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    made = torch.empty(tensor.shape, dtype=dtype)
    if not double:
        dtype = tensor.dtype
    elif not tensor.is_complex():
        dtype = widest_float(tensor.device)
    return fill(made, random).to(dtype).to(tensor.device)


def _normal(made: Tensor, random: torch.Generator) -> Tensor:
    return made.normal_(generator=random) if made.dim() else _inside(made, random)


def _inside(made: Tensor, random: torch.Generator) -> Tensor:
    """Fill with numbers between 0.1 and 0.9, which are valid as probabilities and scales, and in most domains."""
    real = torch.rand(made.shape, generator=random, dtype=torch.float64) * 0.8 + 0.1
    return made.copy_(real)


def _definite(made: Tensor, random: torch.Generator) -> Tensor:
    """Fill with positive definite matrices, if the last two dimensions are square."""
    made = _normal(made, random)
    if made.dim() < 2 or made.shape[-1] != made.shape[-2]:
        return made
    return made @ made.mH + torch.eye(made.shape[-1], dtype=made.dtype)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bool


def _with(values: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """Return arguments with their tensors replaced."""
    replaced: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            replaced.append(next(tensors))
        elif isinstance(value, list | tuple):
            replaced.append(_with(value, tensors))
        else:
            replaced.append(value)
    return replaced


def _described(call: Call, value: Any) -> Any:
    """Return a hashable description of an argument, of all that the answer depends on."""
    if isinstance(value, list | tuple):
        return tuple([_described(call, item) for item in value])
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, int) else repr(value)  # comparing a traced Number would be recorded
    entries: object = None
    if value.layout is not torch.strided or value.is_quantized:
        entries = object()  # used as it is, and slow to compare: equal to no other
    elif not (value.is_floating_point() or value.is_complex()) and not call.labels(value).hollow:
        entries = hashlib.sha1(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    return tuple(value.shape), value.dtype, value.layout, str(value.device), entries
