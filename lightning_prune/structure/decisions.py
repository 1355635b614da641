"""What code may go on by: whole numbers and truth values that operators make of numbers; knows no operator.

Which expert an example goes to, or whether a layer is skipped this time, turns on numbers that change, rightly, when
channels leave. So that a slim model takes the path that was traced, it is given what was decided then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lightning_prune.structure.labels import Labels, Ran

__all__ = ["Decisions", "decided_by", "decisions_in_order", "impose_"]

Decisions = Mapping[int, Tensor]
"""Which output of an operator -> its entries."""


def decided_by(taken: Iterable[Tensor], made: Sequence[Tensor], labels: Sequence[Labels]) -> dict[int, Tensor]:
    """Return copies of the whole numbers and truth values that an operator made of other numbers.

    What carries channels is none of them.
    """
    if all(_counts(tensor) for tensor in made) or not any(map(_counts, taken)):
        return {}
    return {
        which: tensor.clone()
        for which, (tensor, own) in enumerate(zip(made, labels, strict=True))
        if not _counts(tensor) and not own.dims and not own.blank
    }


def impose_(decisions: Decisions, made: Sequence[Tensor]) -> None:
    """Write decisions into the outputs of an operator that have their shape."""
    for which, given in decisions.items():
        if which < len(made) and made[which].shape == given.shape and made[which].dtype is given.dtype:
            made[which].copy_(given)


def decisions_in_order(ran: Iterable[Ran]) -> dict[tuple[str, int], list[Decisions]]:
    """Return what was decided by the path of a module and the operator's place in it, one entry for each run."""
    found: dict[tuple[str, int], list[Decisions]] = {}
    for one in ran:
        if one.decisions:
            found.setdefault((one.path, one.kind[-1]), []).append(one.decisions)
    return found


def _counts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
