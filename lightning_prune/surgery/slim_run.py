"""Runs the slim model along a trace, checks its sizes and counts, and keeps a fingerprint of each output."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from torch import Tensor

from lightning_prune.structure.labels import Ran
from lightning_prune.surgery.expected_outputs import Lefts, OtherOperatorsError
from lightning_prune.surgery.replay import Counted, DifferentError, Exchanges, Facts, Replay, Seen, tensors_of

__all__ = ["Slim", "check_count", "check_sizes", "is_constant"]


class Slim(Replay):
    """The run of the slim model.

    Attributes:
        seen: Index of a traced operator -> what is left of its run.
    """

    slim = True

    def __init__(self, ran: list[Ran], lefts: Lefts, instead: Exchanges, counts: Counted, fewer: bool = False) -> None:
        """Prepare a run; ``fewer`` says that its inputs hold fewer positions than those of the trace."""
        super().__init__(ran, lefts, instead, counts)
        self.seen: dict[int, Seen] = {}
        self.fewer = fewer

    def look(self, at: int, facts: Facts, plain: tuple[Any, ...], out: Any) -> None:
        """Check sizes and counts, and keep fingerprints."""
        ran = self._ran[at]
        seen = self.seen[at] = Seen(plain)
        if at in self._counts:
            check_count(ran, plain, *self._counts[at])
        for which, tensor in enumerate(tensors_of(out)):
            if which < len(ran.made):
                check_sizes(ran, which, tensor, self._lefts, self.fewer)
                seen.prints.append(self.print_of(at, facts, which, tensor))
            seen.shapes.append(tuple(tensor.shape))
        if isinstance(out, Tensor) and is_constant(ran, out):
            seen.value = float(out)


def check_sizes(ran: Ran, which: int, out: Tensor, lefts: Lefts, fewer: bool) -> None:
    """Check that an output of the slim model has the sizes that its labels say.

    Args:
        ran: The operator of the trace.
        which: The output's place among those of the operator.
        out: The output.
        lefts: What is left of tensors.
        fewer: Whether the inputs hold fewer positions than those of the trace.

    Raises:
        DifferentError: If it has others.
        OtherOperatorsError: If so few positions cannot tell.
    """
    labels, full = ran.made[which], ran.leaving[which]
    if out.shape == full and not lefts.of(labels):
        return
    expected = lefts.shape(labels, full)
    if out.shape == expected:
        return
    if len(out.shape) != len(expected) and fewer:
        raise OtherOperatorsError("fewer positions tell less", ran)
    if len(out.shape) != len(expected):
        raise DifferentError(f"an output of shape {tuple(full)} becomes {tuple(out.shape)}", ran)
    for dim, size in enumerate(out.shape):
        carries = dim in labels.dims
        if size == expected[dim] or (labels.blank and not carries):
            continue
        # Of smaller inputs, a dimension may count channels and positions, and one position left alone broadcasts.
        if fewer and (carries or size == 1):
            raise OtherOperatorsError("fewer positions tell less", ran)
        if carries:
            raise DifferentError(f"an output of shape {tuple(full)} becomes {tuple(out.shape)}, not {expected}", ran)


def check_count(ran: Ran, plain: tuple[Any, ...], name: str, count: int) -> None:
    """Check that an argument of an operator in the slim model is the number of units that are left.

    Raises:
        DifferentError: If it is another.
    """
    found = plain[_place(ran.func, name)]
    if found != count:
        raise DifferentError(f"{name} is {found}, not {count}", ran)


@cache
def _place(func: Any, name: str) -> int:
    """Return the place of an argument of an operator."""
    return [argument.name for argument in func._schema.arguments].index(name)


def is_constant(ran: Ran, out: Tensor) -> bool:
    """Return whether an output is one number that was made of constants, or of single numbers and of no data."""
    # One that only the cut has left single is an entry of others, which must be the right one.
    if out.numel() != 1 or math.prod(ran.leaving[0]) != 1 or out.is_complex():
        return False
    labels = ran.made[0]
    if labels.constant:
        return True
    return labels.weight and not labels.blank and all(math.prod(shape) <= 1 for shape in ran.entering)
