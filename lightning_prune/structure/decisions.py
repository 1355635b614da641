"""Decisions of a model: integers and booleans that operators compute from floating-point values.

Pruning rightly changes the values that choose an expert, or skip a layer. To compare the pruned model with the traced
one on the same path, the recorded decisions are written into its run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lightning_prune.structure.labels import Labels, Ran

__all__ = ["Decisions", "decided_by", "decisions_in_order", "impose_"]

Decisions = Mapping[int, Tensor]
"""Index of an operator's output -> its entries."""


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
        if which < len(made) and made[which].shape == given.shape and made[which].dtype is given.dtype:
            made[which].copy_(given)


def decisions_in_order(ran: Iterable[Ran]) -> dict[tuple[str, int], list[Decisions]]:
    """Return decisions by module path and position of the operator in it, one entry for each run."""
    found: dict[tuple[str, int], list[Decisions]] = {}
    for one in ran:
        if one.decisions:
            found.setdefault((one.path, one.kind[-1]), []).append(one.decisions)
    return found


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
