"""Integers in code and on modules that must change with a width: each follows the labels that it counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_prune.structure.labels import Attribute, Equation, Label, Labels, Ledger
from lightning_prune.structure.rules.pointwise import pointwise
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule
from lightning_prune.structure.traced_ints import Held, Number, Size, aligned

__all__ = [
    "compared", "counted_by", "eye", "follow", "follow_argument", "follow_number", "hands_on", "made_anew",
    "random_fill",
]  # fmt: skip


def follow(call: Call, dims: Dims) -> Dims:
    """Record that the sizes that code requested follow the labels of the output, and return those."""
    if isinstance(call.module[1], nn.MultiheadAttention):
        _follow_heads(call, dims)
        return dims
    for dim, number in aligned(call.asked, call.out.shape):
        if found := dims.get(dim):
            follow_number(call, found, number)
    return dims


def follow_number(call: Call, found: tuple[Label, ...], number: int) -> None:
    """Record that a number follows labels: an attribute will be set, any other number must agree by itself."""
    if not isinstance(number, Number):
        return
    origin = number.origin
    if isinstance(origin, Held):
        call.ledger.attributes.append(Attribute(origin.module, origin.name, found, origin.index, call.ledger.where))
    elif not (isinstance(origin, Size) and _same(origin.labels, found)):
        call.ledger.equations.append(Equation(found, number, call.ledger.where))


def follow_argument(call: Call, found: tuple[Label, ...], given: Any, value: int, attribute: str) -> None:
    """Record that a number that an operator takes, and that appears in no shape, follows labels.

    Args:
        call: The operator.
        found: The labels that the number counts.
        given: The number as Python gave it, or None if unknown.
        value: The number as the operator took it.
        attribute: Attribute by which modules of ``torch.nn`` hold it, whose numbers do not remember their origin.
    """
    path, module = call.module
    if isinstance(given, Number) and int(given) == value:
        follow_number(call, found, given)
    elif hands_on(call, module) and int(getattr(module, attribute, -1)) == value:
        call.ledger.attributes.append(Attribute(path, attribute, found, where=call.ledger.where))
    else:  # of unknown origin, so it keeps its value
        call.ledger.equations.append(Equation(found, value, call.ledger.where))


def hands_on(call: Call, module: nn.Module | None) -> bool:
    """Return whether a module's numbers do not remember their origin."""
    return not call.ledger.numbers or type(module).__module__.startswith("torch.nn.")


def compared(ledger: Ledger, number: Number, other: Number) -> None:
    """Record that a number held by a module follows the size that it equalled when code compared them."""
    sides = [number, other]
    for held, size in (sides, sides[::-1]):
        if isinstance(held.origin, Held) and isinstance(size.origin, Size):
            place = held.origin
            ledger.attributes.append(
                Attribute(place.module, place.name, size.origin.labels, place.index, "a comparison of sizes")
            )


def _same(some: tuple[Label, ...], others: tuple[Label, ...]) -> bool:
    return len(some) == len(others) and all(a.atoms is b.atoms for a, b in zip(some, others, strict=True))


def _follow_heads(call: Call, dims: Dims) -> None:
    """Record what the numbers of ``nn.MultiheadAttention`` follow: torch computes with them out of sight."""
    path, module = call.module
    source, ledger = call.args[0], call.ledger
    assert isinstance(module, nn.MultiheadAttention)
    heads, width = int(module.num_heads), int(module.embed_dim) // int(module.num_heads)
    if call.out.dim() != 3 or source.shape[-1] != heads * width or call.out.shape[-1] != width:
        return
    if module.in_proj_weight is not None:
        projected = [module.in_proj_weight] * 3
    else:
        projected = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    query, key, value = (call.labels(weight).at(1) for weight in projected)
    inner = call.labels(source).at(source.dim() - 1)
    # Dimension 1 of the output holds the heads of one example after those of another.
    one_example = tuple(Label(label.atoms[:heads], label.conditional) for label in dims.get(1, ()))
    for name, labels in (
        ("embed_dim", query), ("kdim", key), ("vdim", value), ("embed_dim", inner),
        ("num_heads", one_example), ("head_dim", dims.get(2, ())),
    ):  # fmt: skip
        if labels:
            ledger.attributes.append(Attribute(path, name, labels, where=ledger.where))


@coupling_rule(
    "aten.zeros", "aten.ones", "aten.empty", "aten.full", "aten.rand", "aten.randn", "aten.new_zeros",
    "aten.new_ones", "aten.new_empty", "aten.new_full",
)  # fmt: skip
def made_anew(call: Call) -> Dims:
    """A new tensor carries the labels of the numbers that set its sizes."""
    dims: Dims = {}
    for like in call.tensors()[:1]:
        if [*like.shape[:2]] == [*call.out.shape[:2]]:  # a padded copy: batch and channels are as before
            dims = {dim: found for dim, found in call.labels(like).dims.items() if dim < 2}
    for dim, number in aligned(call.asked, call.out.shape):
        if found := _made_by(call, number):
            dims[dim] = found
    return dims


@coupling_rule("aten.eye")
def eye(call: Call) -> Dims:
    """Rows and columns of a square one are the same indices: of those that are left, it is the unit matrix, too."""
    rows, columns = call.out.shape
    if rows != columns or rows < 2 or call.asked[:1] != (rows,):
        return {}
    found = _made_by(call, call.asked[0])
    return {0: found, 1: found}


def _made_by(call: Call, number: int) -> tuple[Label, ...]:
    """Return the labels of a new dimension of as many indices as a number says; none for a number in the code."""
    if found := counted_by(number):
        return found
    if not isinstance(number, Number):
        return ()
    if isinstance(number.origin, Held):
        return (call.ledger.held(number.origin, int(number)),)
    if number < 2:
        return ()
    found = (call.ledger.fresh(int(number)),)  # worked out from others: what is written there tells
    follow_number(call, found, number)
    return found


def counted_by(number: int) -> tuple[Label, ...]:
    """Return the labels that a number counts, if it is the size of a tensor."""
    if isinstance(number, Number) and isinstance(number.origin, Size):
        return number.origin.labels
    return ()


@coupling_rule(
    "aten.bernoulli_", "aten.uniform_", "aten.normal_", "aten.random_", "aten.exponential_", "aten.geometric_",
    "aten.log_normal_", "aten.cauchy_", "aten.rand_like", "aten.randn_like", "aten.randint_like", "aten.normal",
)  # fmt: skip
def random_fill(call: Call) -> Dims | list[Dims]:
    """Independent random numbers in the shape of a tensor, whose labels they carry."""
    return pointwise(call)


@coupling_rule("aten.copy_")
def copied(call: Call) -> Dims | list[Dims]:
    """Element-wise; a copy into a part of a blank tensor labels the whole tensor."""
    target, source = call.args[:2]
    blank = target if target._base is None else target._base
    labels = call.labels(blank)
    if labels.dims or call.labels(target).dims or not labels.blank:
        return pointwise(call)
    shift = target.dim() - source.dim()
    dims = {dim + shift: found for dim, found in call.labels(source).dims.items()}
    whole: Dims = {}
    for dim, found in dims.items():
        along = _along(blank, target, dim)
        if along is None:  # the part covers this dimension of the tensor only in part
            call.ledger.pin(found, "copied into a part of a tensor")
        else:
            whole[along] = found
    call.lay(blank, Labels(whole, weight=False))
    return dims


def _along(base: Tensor, view: Tensor, dim: int) -> int | None:
    """Return the dimension of a tensor that a dimension of a view covers from end to end, if there is one."""
    for own in range(base.dim()):
        if (base.stride(own), base.shape[own]) == (view.stride(dim), view.shape[dim]):
            return own
    return None
