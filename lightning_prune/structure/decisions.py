"""Decisions of a model: integers and booleans that operators compute from floating-point values.

Pruning rightly changes the values that choose an expert, or skip a layer. To compare the pruned model with the traced
one on the same path, the recorded decisions are written into its run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.structure.labels import Labels, Ran

__all__ = ["EXPLORED", "Decisions", "Ways", "decided_by", "decisions_in_order", "drawn_by", "explore_", "impose_"]

Decisions = Mapping[int, Tensor]
"""Index of an operator's output -> its entries."""

_MOST_DRAWN = 4096
_aten = torch.ops.aten
_CHOOSING = {_aten.argmax: 1, _aten.argmin: 1, _aten.topk: 2, _aten.max: 1, _aten.min: 1, _aten.multinomial: None}
"""Operators that choose indices along a dimension, and at which argument that is; None for the last one."""


class Ways(NamedTuple):
    """What to decide in place of what was computed: other choices, so far ``along``, or the ``contrary`` of a bool."""

    along: int | None
    contrary: bool


EXPLORED = (Ways(0, False), Ways(1, False), Ways(2, False), Ways(None, True), Ways(0, True))
"""Ways to decide, one after another, until every expert has run."""


def decided_by(taken: Iterable[Tensor], made: Sequence[Tensor], labels: Sequence[Labels]) -> dict[int, Tensor]:
    """Return copies of the integer and boolean outputs that an operator computed from floating-point inputs.

    Outputs with channels are left out.
    """
    if all(_is_floating(tensor) for tensor in made) or not any(map(_is_floating, taken)):
        return {}
    decisions = {}
    for which, (tensor, own) in enumerate(zip(made, labels, strict=True)):
        if not _is_floating(tensor) and not own.dims and not own.blank:
            decisions[which] = tensor.clone()
    return decisions


def impose_(decisions: Decisions, made: Sequence[Tensor]) -> None:
    """Write decisions into the outputs of an operator, where shape and type agree."""
    for which, given in decisions.items():
        if which < len(made) and made[which].shape == given.shape and _alike(made[which], given):
            made[which].copy_(given)


def drawn_by(made: Sequence[Tensor], labels: Sequence[Labels]) -> dict[int, Tensor]:
    """Return copies of random numbers without channels: code may go on by them, to skip a layer say."""
    decisions = {}
    for which, (tensor, own) in enumerate(zip(made, labels, strict=True)):
        if not own.dims and tensor.numel() <= _MOST_DRAWN:
            decisions[which] = tensor.clone()
    return decisions


def explore_(func: Any, plain: Sequence[Any], entering: Sequence[int], made: Sequence[Tensor], ways: Ways) -> None:
    """Write other decisions into the outputs of an operator.

    Args:
        func: The operator.
        plain: Its arguments that are no tensors, with None where a tensor stood.
        entering: Shape of the first tensor that it took.
        made: Its outputs.
        ways: Which decisions to write.
    """
    for tensor in made:
        if tensor.dtype is torch.bool and ways.contrary:
            tensor.logical_not_()
        elif not _is_floating(tensor) and tensor.dtype is not torch.bool and ways.along is not None:
            count = _choices(func, plain, entering)
            if count > 1:
                others = torch.arange(tensor.numel(), device=tensor.device) + ways.along * tensor.numel()
                tensor.copy_((others % count).reshape(tensor.shape))


def _choices(func: Any, plain: Sequence[Any], entering: Sequence[int]) -> int:
    """Return among how many indices an operator chooses, 0 if it does not."""
    if func.overloadpacket not in _CHOOSING or not entering:
        return 0
    at = _CHOOSING[func.overloadpacket]
    dim = plain[at] if at is not None and at < len(plain) else -1
    return entering[dim] if isinstance(dim, int) else 0


def decisions_in_order(ran: Iterable[Ran]) -> dict[tuple[str, int], list[Decisions]]:
    """Return decisions by module path and position of the operator in it, one entry for each run."""
    found: dict[tuple[str, int], list[Decisions]] = {}
    for one in ran:
        if one.decisions:
            found.setdefault((one.path, one.kind[-1]), []).append(one.decisions)
    return found


def _alike(tensor: Tensor, other: Tensor) -> bool:
    """Return whether tensors are of one type, or of two floating-point types."""
    return tensor.dtype is other.dtype or (tensor.is_floating_point() and other.is_floating_point())


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
