"""What numbers frozen in code follow: the labels along the dimension that an operator was asked to make so long."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_prune.structure.labels import Attribute, Equation, Label, Labels, Ledger
from lightning_prune.structure.rules.pointwise import pointwise
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule
from lightning_prune.structure.traced_ints import Held, Number, Size, aligned

__all__ = [
    "compared",
    "counted_by",
    "follow",
    "follow_argument",
    "follow_number",
    "hands_on",
    "made_anew",
    "random_fill",
]


def follow(call: Call, dims: Dims) -> Dims:
    """Let the numbers that code asked for follow the labels that the output carries, and return those."""
    if isinstance(call.module[1], nn.MultiheadAttention):
        _follow_heads(call, dims)
        return dims
    for dim, number in aligned(call.asked, call.out.shape):
        if found := dims.get(dim):
            follow_number(call, found, number)
    return dims


def follow_number(call: Call, found: tuple[Label, ...], number: int) -> None:
    """Let a number follow labels: an attribute will be set, anything else must come out right."""
    if not isinstance(number, Number):
        return
    origin = number.origin
    if isinstance(origin, Held):
        call.ledger.attributes.append(Attribute(origin.module, origin.name, found, origin.index, call.ledger.where))
    elif not (isinstance(origin, Size) and _same(origin.labels, found)):
        call.ledger.equations.append(Equation(found, number, call.ledger.where))


def follow_argument(call: Call, found: tuple[Label, ...], given: Any, value: int, attribute: str) -> None:
    """Let a number that an operator takes, and that no shape shows, follow labels.

    Args:
        call: The operator at hand.
        found: The labels of which so many must be left.
        given: The number as the Python function was given it, or None where that is not known.
        value: The number that the operator took.
        attribute: Where modules of ``torch.nn`` hold it; they hand it on without memory.
    """
    path, module = call.module
    if isinstance(given, Number) and int(given) == value:
        follow_number(call, found, given)
    elif hands_on(call, module) and int(getattr(module, attribute, -1)) == value:
        call.ledger.attributes.append(Attribute(path, attribute, found, where=call.ledger.where))
    else:  # nothing tells where it comes from, so that it stays
        call.ledger.equations.append(Equation(found, value, call.ledger.where))


def hands_on(call: Call, module: nn.Module | None) -> bool:
    """Return whether a module's numbers do not remember where they are held."""
    return not call.ledger.numbers or type(module).__module__.startswith("torch.nn.")


def compared(ledger: Ledger, number: Number, other: Number) -> None:
    """Two numbers turned out equal, and the code goes on because they are: let one that is held follow a size."""
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
    """Attention of torch works its numbers out of sight: its width is the width of its inputs, in so many heads."""
    path, module = call.module
    source, ledger = call.args[0], call.ledger
    assert isinstance(module, nn.MultiheadAttention)
    heads, width = int(module.num_heads), int(module.embed_dim) // int(module.num_heads)
    if call.out.dim() != 3 or source.shape[-1] != heads * width or call.out.shape[-1] != width:
        return
    projected = [module.in_proj_weight] if module.in_proj_weight is not None else [
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    ]  # fmt: skip
    entering = [call.labels(weight).at(1) for weight in projected] * (4 - len(projected))
    inner = call.labels(source).at(source.dim() - 1)
    one_batch = tuple(Label(label.atoms[:heads], label.conditional) for label in dims.get(1, ()))
    for name, labels in (
        ("embed_dim", entering[0]), ("kdim", entering[1]), ("vdim", entering[2]), ("embed_dim", inner),
        ("num_heads", one_batch), ("head_dim", dims.get(2, ())),
    ):  # fmt: skip
        if labels:
            ledger.attributes.append(Attribute(path, name, labels, where=ledger.where))


@coupling_rule(
    "aten.zeros", "aten.ones", "aten.empty", "aten.full", "aten.rand", "aten.randn", "aten.new_zeros",
    "aten.new_ones", "aten.new_empty", "aten.new_full",
)  # fmt: skip
def made_anew(call: Call) -> Dims:
    """A tensor of one value carries the labels that the sizes it was asked for remember."""
    dims: Dims = {}
    for like in call.tensors()[:1]:
        if [*like.shape[:2]] == [*call.out.shape[:2]]:  # padding makes room for positions, not for channels
            dims = {dim: found for dim, found in call.labels(like).dims.items() if dim < 2}
    for dim, number in aligned(call.asked, call.out.shape):
        if found := counted_by(number):
            dims[dim] = found
        elif isinstance(number, Number) and isinstance(number.origin, Held):
            dims[dim] = (call.ledger.held(number.origin, int(number)),)
    return dims


def counted_by(number: int) -> tuple[Label, ...]:
    """Return the labels that a number counts, if it is the size of a tensor."""
    return number.origin.labels if isinstance(number, Number) and isinstance(number.origin, Size) else ()


@coupling_rule(
    "aten.bernoulli_", "aten.uniform_", "aten.normal_", "aten.random_", "aten.exponential_", "aten.geometric_",
    "aten.log_normal_", "aten.cauchy_", "aten.rand_like", "aten.randn_like", "aten.randint_like", "aten.normal",
)  # fmt: skip
def random_fill(call: Call) -> Dims | list[Dims]:
    """Random numbers, each on its own, in the shape of a tensor: made anew, as long as that is."""
    return pointwise(call)


@coupling_rule("aten.copy_")
def copied(call: Call) -> Dims | list[Dims]:
    """Element by element; what is copied into a part of a blank tensor labels the whole of it."""
    target, source = call.args[:2]
    blank = target if target._base is None else target._base
    labels = call.labels(blank)
    if labels.dims or call.labels(target).dims or not labels.blank:
        return pointwise(call)
    shift = target.dim() - source.dim()
    dims = {dim + shift: found for dim, found in call.labels(source).dims.items()}
    whole = {_along(blank, target, dim): found for dim, found in dims.items()}
    call.ledger.pin(whole.pop(None, ()), "copied into a part of a tensor")
    call.lay(blank, Labels({dim: found for dim, found in whole.items() if dim is not None}, weight=False))
    return dims


def _along(base: Tensor, view: Tensor, dim: int) -> int | None:
    """Return which dimension of a tensor a dimension of a view of it runs along from end to end."""
    stride, size = view.stride(dim), view.shape[dim]
    return next((d for d in range(base.dim()) if (base.stride(d), base.shape[d]) == (stride, size)), None)
