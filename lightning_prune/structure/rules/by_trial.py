"""Finds what an operator without a rule does to labels, by trying it on random numbers; knows no operator.

An operator works on the indices along a dimension one by one if selecting some of them before it gives what selecting
them after it does: ``op(x.index_select(d, i)) == op(x).index_select(e, i)``. Then labels pass from ``d`` to ``e``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_prune.structure.rules.table import Call, Dims, tensors_among

__all__ = ["tested"]

Place = tuple[int, int]
"""A tensor among those that go into an operator, or come out of it, and one of its dimensions."""

_UNTESTABLE = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)
_MOST_PAIRS = 6  # of dimensions that are tried as two that correspond


@dataclass(frozen=True)
class _Passing:
    """Dimensions of inputs that correspond, and those of outputs along which the same indices come out."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]


class _Question:
    """An operator, what it is called with, and the dimensions of its tensors that carry labels.

    Two questions are equal if they have the same answer; ``call`` is dropped once there is one.
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
    """Pass labels along the dimensions on which the operator turns out to work one by one, and pin the others."""
    if not call.func._schema.returns and not call.func._schema.is_mutable:
        return {}  # it looks at numbers, and refuses some
    operands = call.tensors()
    asked = [(which, dim) for which, tensor in enumerate(operands) for dim in sorted(call.labels(tensor).dims)]
    passings: tuple[_Passing, ...] | None = None
    outputs = tensors_among((call.out,))
    if outputs and all(out.numel() for out in (*outputs[:1], *operands)) and _testable(call.func):
        question = _Question(call, asked)
        passings = _answer(question)
        question.call = None  # the answer is kept, the tensors are not
    name = call.func.overloadpacket
    teach = "teach one with @coupling_rule"
    dims: list[Dims] = [{} for _ in outputs]
    passed: set[Place] = set()
    for passing in passings or ():
        passed.update(passing.inputs)
        sides = [call.labels(operands[which]).at(dim) for which, dim in passing.inputs]
        found = sides[0] if len(sides) == 1 else call.ledger.tie(sides, f"meets a tensor of fixed size in {name}")
        for which, dim in passing.outputs:
            if dim in dims[which]:  # no operator that works one by one does that
                call.ledger.pin((*found, *dims[which].pop(dim)), f"{name} has no coupling rule")
            else:
                dims[which][dim] = found
    for which, dim in asked:
        if (which, dim) not in passed:
            mixes = f"it mixes entries along dimension {dim} of shape {tuple(operands[which].shape)}; "
            reason = f"{name} has no coupling rule; {'' if passings is None else mixes}{teach}"
            call.ledger.pin(call.labels(operands[which]).at(dim), reason)
    return _arranged(call.out, dims)


def _arranged(out: Any, dims: list[Dims]) -> Dims | list[Dims]:
    """Return the labels of the tensors of an output, in the places that these have there."""
    if isinstance(out, Tensor):
        return dims[0]
    found = iter(dims)
    return [next(found) if isinstance(part, Tensor) else {} for part in out] if isinstance(out, list | tuple) else {}


def _testable(func: Any) -> bool:
    """Return whether an operator gives the same each time, and writes into its first argument at most."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    return not any(tag in func.tags for tag in _UNTESTABLE) and not any(written[1:])


@lru_cache(maxsize=512)
def _answer(question: _Question) -> tuple[_Passing, ...] | None:
    """Try an operator out; return None if it does not take random numbers of any kind."""
    assert question.call is not None
    for double in (True, False):
        for fill in (_normal, _inside, _definite):
            trial = _Trial.of(question.call, fill, double)
            if trial is not None:
                return tuple(trial.passings(question.asked))
    return None


@dataclass(frozen=True)
class _Trial:
    """An operator on random numbers.

    Attributes:
        apply: Computes the operator's outputs from its tensors, which it does not change.
        operands: Its tensors.
        outputs: What it makes of them.
    """

    apply: Callable[[Sequence[Tensor]], list[Tensor]]
    operands: list[Tensor]
    outputs: list[Tensor]

    @staticmethod
    def of(call: Call, fill: Callable[[Tensor, torch.Generator], Tensor], double: bool) -> _Trial | None:
        """Run an operator on random numbers of some kind, or return None if it does not take those."""
        random = torch.Generator().manual_seed(0)
        operands = []
        for tensor in call.tensors():
            numbers = tensor.is_floating_point() or tensor.is_complex()
            unknown = _is_mask(tensor) and call.labels(tensor).hollow
            drawn = (numbers or unknown) and tensor.layout is torch.strided
            operands.append(_random(tensor, fill, double, random) if drawn else tensor)

        def apply(tensors: Sequence[Tensor]) -> list[Tensor]:
            remaining = iter(tensors)
            args = _with(call.args, remaining)
            kwargs = {name: _with((value,), remaining)[0] for name, value in call.kwargs.items()}
            if call.func._schema.is_mutable:
                args = [args[0].clone(), *args[1:]]
            return tensors_among((call.func(*args, **kwargs),))

        try:
            outputs = apply(operands)
        except Exception:
            return None
        expected = [out.shape for out in tensors_among((call.out,))]
        if [out.shape for out in outputs] != expected or not any(map(_tells, outputs)):
            return None
        return _Trial(apply, operands, outputs)

    def passings(self, asked: Sequence[Place]) -> Iterator[_Passing]:
        """Yield what passes of the dimensions asked about, and together with which others."""
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
        """Yield dimensions that may have to shrink together: one alone, those in the same place, any two as long."""
        which, dim = place
        rank, size = self.operands[which].dim(), self.operands[which].shape[dim]
        others = [
            (other, along)
            for other, tensor in enumerate(self.operands)
            for along in range(tensor.dim())
            if tensor.layout is torch.strided and tensor.shape[along] == size and other != which
        ]
        ranks = [tensor.dim() for tensor in self.operands]
        alike = [(other, along) for other, along in others if ranks[other] == rank and along == dim]
        back = [(other, along) for other, along in others if along - ranks[other] == dim - rank]
        front = [(other, along) for other, along in others if along == dim]
        sets = [[], alike, back, front, *([other] for other in others[:_MOST_PAIRS])]
        yield from dict.fromkeys(tuple(sorted([place, *more])) for more in sets)

    def _outputs(self, together: tuple[Place, ...]) -> tuple[Place, ...] | None:
        """Return the dimensions of outputs along which indices come out that are selected, or None if they mix."""
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

    One index alone would stretch over anything, so it comes twice.
    """
    if size == 2:
        yield from (torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]))
        return
    random = torch.Generator().manual_seed(size)
    some = torch.randperm(size, generator=random)[: max(2, (2 * size) // 3)].sort().values
    for chosen in (torch.arange(size // 2, size), torch.arange(1, size, 2), some):
        yield chosen if len(chosen) > 1 else chosen.repeat(2)


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
            return None  # whole numbers may well be the same by chance
        if not _close(whole, some):
            return None
    return tuple(places)


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return bool((one == other).all())
    tolerance = 1e3 * torch.finfo(one.dtype).eps
    one, other = (side.to(torch.complex128 if side.is_complex() else torch.float64) for side in (one, other))
    finite = one[one.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * max(scale, 1e-30), equal_nan=True)


def _tells(out: Tensor) -> bool:
    """Return whether numbers differ, so that mixing them up would show."""
    if not out.numel():
        return False
    if not (out.is_floating_point() or out.is_complex()):
        return bool((out != out.reshape(-1)[0]).any())
    finite = out[out.isfinite()]
    return 2 * finite.numel() > out.numel() and bool((finite != finite[0]).any())


def _random(
    tensor: Tensor, fill: Callable[[Tensor, torch.Generator], Tensor], double: bool, random: torch.Generator
) -> Tensor:
    """Return random numbers of a tensor's shape, of double precision if asked."""
    if _is_mask(tensor):
        return (torch.rand(tensor.shape, generator=random) < 0.5).to(tensor.device)
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    made = torch.empty(tensor.shape, dtype=dtype)
    return fill(made, random).to(device=tensor.device, dtype=dtype if double else tensor.dtype)


def _normal(made: Tensor, random: torch.Generator) -> Tensor:
    return made.normal_(generator=random) if made.dim() else _inside(made, random)


def _inside(made: Tensor, random: torch.Generator) -> Tensor:
    """Fill with numbers between 0.1 and 0.9, which are probabilities, scales, and lie inside most domains."""
    real = torch.rand(made.shape, generator=random, dtype=torch.float64) * 0.8 + 0.1
    return made.copy_(real)


def _definite(made: Tensor, random: torch.Generator) -> Tensor:
    """Fill with positive definite matrices where there can be some."""
    made = _normal(made, random)
    if made.dim() < 2 or made.shape[-1] != made.shape[-2]:
        return made
    return made @ made.mH + torch.eye(made.shape[-1], dtype=made.dtype)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bool


def _with(values: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """Return arguments with other tensors in place of those they hold."""
    return [
        next(tensors)
        if isinstance(value, Tensor)
        else _with(value, tensors)
        if isinstance(value, list | tuple)
        else value
        for value in values
    ]


def _described(call: Call, value: Any) -> Any:
    """Describe an argument by all that an answer depends on."""
    if isinstance(value, list | tuple):
        return tuple([_described(call, item) for item in value])
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, int) else repr(value)  # numbers that remember would note a comparison
    entries: object = None
    if value.layout is not torch.strided or value.is_quantized:
        entries = object()  # taken as it is, and slow to compare: equal to no other
    elif not (value.is_floating_point() or value.is_complex()) and not call.labels(value).hollow:
        entries = hashlib.sha1(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    return tuple(value.shape), value.dtype, value.layout, str(value.device), entries
