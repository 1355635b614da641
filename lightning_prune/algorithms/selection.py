"""Selection: from scores to boolean masks of what is kept, of an exact size; ties go by index."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Scored", "keep_best_of_all", "keep_highest", "keep_n_of_m", "number_to_prune", "parse_pattern"]

_AT_ONCE = 2**18  # scores looked at together: few enough for what is computed of them to fit into a processor's cache
_SORTED = 2**12  # scores that sorting takes less time for than looking for a threshold
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # of the same size


def number_to_prune(amount: float, size: int) -> int:
    """Return how many of ``size`` units, weights, parameters or multiply-adds an amount means.

    The fewest that are at least the fraction. A fraction below 1 never means all.

    Args:
        amount: Fraction, in [0, 1].
        size: How many there are.

    Examples:
        >>> number_to_prune(0.5, 35), number_to_prune(0.07, 100), number_to_prune(0.99, 10)
        (18, 7, 9)
    """
    asked = amount * size
    slack = max(1e-9, 1e-12 * asked)  # 0.07 * 100 is a little more than 7 in binary fractions
    most = size if amount >= 1 else max(size - 1, 0)
    return min(math.ceil(asked - slack), most)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a tensor's entries, computed a part at a time, so that no copy of the tensor is needed.

    Attributes:
        values: What scores are computed from, of any shape and floating-point type.
        score: From some of the values to their scores, entry by entry; by default the values are the scores.
        alive: Entries that may be kept, as bool that broadcasts to the shape; the others rank below all scores.
    """

    values: Tensor
    score: Callable[[Tensor], Tensor] | None = None
    alive: Tensor | None = None

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the scores of a few entries at a time.

        Yields:
            Where the entries lie in the flattened tensor, their scores, and which are alive as bool (None: all are).
        """
        values = self.values.detach()
        alive = None if self.alive is None else self.alive.to(values.device).expand(values.shape)
        if values.is_contiguous() and (alive is None or alive.is_contiguous()):
            size, values = _AT_ONCE, values.view(-1)
            alive = None if alive is None else alive.view(-1)
        else:
            size = _rows(values)
        start = 0
        for first in range(0, len(values), size):
            part = values[first : first + size]
            place = slice(start, start + part.numel())
            start = place.stop
            scores = part if self.score is None else self.score(part)
            yield place, scores, None if alive is None else alive[first : first + size]


def _rows(values: Tensor) -> int:
    """Return how many entries of the first dimension are looked at together."""
    return max(1, _AT_ONCE // max(1, math.prod(values.shape[1:])))


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Keep exactly ``count`` units with the highest scores; of equal scores the later index is kept.

    Args:
        scores: One score per unit or weight, of any shape. NaN counts as lowest.
        count: How many to keep, from 0 to all.

    Returns:
        True for each that is kept, bool of the same shape.

    Raises:
        ValueError: If ``count`` is below 0 or more than there are.

    Examples:
        >>> keep_highest(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2)
        tensor([ True, False,  True, False])
    """
    if scores.numel() > _AT_ONCE and scores.is_floating_point():
        return keep_best_of_all({"": Scored(scores)}, count)[""]
    _check_count(count, scores.numel())
    pruned = scores.numel() - count
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.detach().reshape(-1)
    if flat.is_cpu and flat.is_floating_point() and flat.numel() <= _SORTED:
        values = flat.double().numpy()
        stays = np.ones(len(values), dtype=bool)
        stays[np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")[:pruned]] = False
        return torch.from_numpy(stays).view(scores.shape)
    flat = flat.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    threshold = flat.kthvalue(pruned).values  # linear time, where sorting is not
    keep = flat > threshold
    # Several scores may equal the threshold. The last of them are kept, as many as are still missing.
    tied = (flat == threshold).nonzero().squeeze(1)
    missing = count - int(keep.count_nonzero())
    keep[tied[len(tied) - missing :]] = True
    return keep.view(scores.shape)


def keep_best_of_all(scores: Mapping[str, Tensor | Scored], count: int) -> dict[str, Tensor]:
    """Keep exactly ``count`` entries of all tensors together; of equal scores the later name and index is kept.

    The threshold is found digit by digit from histograms of the scores' bits. Time is linear in the number of scores;
    memory, beyond the scores and the result, is that of a million entries.

    Args:
        scores: Scores by name, of any shapes. NaN counts as lowest. They are looked at several times.
        count: How many to keep, from 0 to all.

    Returns:
        True for each entry that is kept, bool of the same shapes.

    Raises:
        ValueError: If ``count`` is below 0 or more than there are.

    Examples:
        >>> keep_best_of_all({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[3.0], [2.0]])}, 2)
        {'a': tensor([False,  True]), 'b': tensor([[ True], [False]])}
    """
    dtype, total = torch.float32, 0
    for name in scores:
        found = _scored(scores[name])
        dtype = torch.promote_types(dtype, found.values.dtype)
        total += found.values.numel()
    _check_count(count, total)

    def keys() -> Iterator[Tensor]:
        for name in scores:
            for _, part, alive in _scored(scores[name]).parts():
                yield _keys(part, alive, dtype)

    pruned = total - count
    if not pruned:
        shapes = {name: _scored(scores[name]).values for name in scores}
        return {name: torch.ones_like(values, dtype=torch.bool) for name, values in shapes.items()}
    threshold, below = _of_rank(keys, pruned - 1, 8 * dtype.itemsize)
    ties = pruned - below  # entries at the threshold that are pruned: the first of them
    kept = {}
    for name in scores:
        own = _scored(scores[name])
        keep = torch.empty(own.values.numel(), dtype=torch.bool, device=own.values.device)
        for place, part, alive in own.parts():
            ranks = _keys(part, alive, dtype)
            stays = torch.gt(ranks, threshold, out=keep[place])
            tied = (ranks == threshold).nonzero().squeeze(1)
            stays[tied[ties:]] = True
            ties = max(0, ties - len(tied))
        kept[name] = keep.view(own.values.shape)
    return kept


def _scored(scores: Tensor | Scored) -> Scored:
    return scores if isinstance(scores, Scored) else Scored(scores)


def _check_count(count: int, total: int) -> None:
    if not 0 <= count <= total:
        raise ValueError(f"count={count}: of {total} units, from 0 to {total} can be kept.")


def _keys(scores: Tensor, alive: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return integers in the order of the scores, ``(n,)``; of scores that are equal, equal ones."""
    scores = scores.detach().to(dtype) + 0.0  # turns -0 into 0, which equals it and has other bits
    scores.masked_fill_(scores.isnan(), -torch.inf)
    bits = scores.reshape(-1).view(_INTEGERS[dtype])
    most = torch.iinfo(bits.dtype).max
    # Of positive floats, larger ones have larger bits. Of negative ones it is the other way round.
    bits ^= (bits >> (8 * bits.itemsize - 1)) & most
    return bits if alive is None else bits.masked_fill_(~alive.reshape(-1), -most - 1)


def _of_rank(keys: Callable[[], Iterator[Tensor]], rank: int, bits: int) -> tuple[int, int]:
    """Return the key of a rank, counted from 0, and how many keys are lower: a radix selection, 16 bits at a time."""
    first, lower = -(2**15), 0  # the lowest key with the digits that are known, without those that are not
    found = None
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64)
        for part in keys():
            if found is not None:
                part = part[(part >> (shift + 16)) == found]
            counts += torch.bincount((part >> shift) - first, minlength=2**16).cpu()
        upto = lower + counts.cumsum(0)
        digit = int((upto <= rank).sum())
        lower = int(upto[digit] - counts[digit])
        found = first + digit
        first = found << 16
    assert found is not None
    return found, lower


def keep_n_of_m(scores: Tensor | Scored, n: int, m: int, dim: int = 1) -> Tensor:
    """Keep the ``n`` highest of every ``m`` neighbours along a dimension; of equal scores the later index is kept.

    Args:
        scores: Scores of a weight's entries; the size of ``dim`` is a multiple of ``m``. NaN counts as lowest.
        n: How many of each group to keep.
        m: Size of a group.
        dim: The dimension along which neighbours lie: of linear and convolution weights 1, the input channels.

    Returns:
        True for each entry that is kept, bool of the same shape. Entries that are not alive are not kept.

    Raises:
        ValueError: If the size of the dimension is no multiple of ``m``.

    Examples:
        >>> keep_n_of_m(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2, 4).int()
        tensor([[0, 1, 1, 0]], dtype=torch.int32)

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, sec. 3 (arXiv:2104.08378).
    """
    own = _scored(scores)
    values = own.values.detach()
    if values.shape[dim] % m:
        raise ValueError(f"dimension {dim} of size {values.shape[dim]}: groups of {m} need a multiple of {m}.")
    alive = torch.ones((), dtype=torch.bool) if own.alive is None else own.alive
    alive = alive.to(values.device).expand(values.shape)
    rows = _rows(values)
    rows = max(m, rows - rows % m) if dim == 0 else rows  # a group lies in one part
    kept = []
    for part, alive_part in zip(values.split(rows), alive.split(rows), strict=True):
        found = part if own.score is None else own.score(part)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        lowest = torch.finfo(found.dtype).min
        ranked = found.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf).masked_fill_(~alive_part, -torch.inf)
        kept.append(_n_of_m(ranked, n, m, dim) & alive_part)
    return torch.cat(kept)


def _n_of_m(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    groups = scores.unflatten(dim, (-1, m)).movedim(dim + 1, -1)  # the members of a group come last
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., m - n :], True)
    return keep.movedim(-1, dim + 1).flatten(dim, dim + 1)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return N and M of a pattern such as ``"2:4"``, by which two of every four neighbours are kept.

    Raises:
        ValueError: If ``pattern`` is not such a pattern, or if not 0 < N < M.

    Examples:
        >>> parse_pattern("2:4")
        (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise ValueError(f"pattern={pattern!r}: write N:M with 0 < N < M; '2:4' keeps two of every four neighbours.")
    return n, m
