"""Selection: from scores to boolean masks of what is kept, of an exact size; ties go by index."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

__all__ = ["keep_best_of_all", "keep_highest", "keep_n_of_m", "number_to_prune", "parse_pattern"]


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
    flat = scores.detach().reshape(-1).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if not 0 <= count <= len(flat):
        raise ValueError(f"count={count}: of {len(flat)} units, from 0 to {len(flat)} can be kept.")
    pruned = len(flat) - count
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(pruned).values  # linear time, where sorting is not
    keep = flat > threshold
    # Several scores may equal the threshold. The last of them are kept, as many as are still missing.
    tied = (flat == threshold).nonzero().squeeze(1)
    missing = count - int(keep.sum())
    keep[tied[len(tied) - missing :]] = True
    return keep.view(scores.shape)


def keep_best_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Keep exactly ``count`` entries of all tensors together; of equal scores the later name and index is kept.

    Args:
        scores: Scores by name, of any shapes.
        count: How many to keep, from 0 to all.

    Returns:
        True for each entry that is kept, bool of the same shapes.

    Examples:
        >>> keep_best_of_all({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[3.0], [2.0]])}, 2)
        {'a': tensor([False,  True]), 'b': tensor([[ True], [False]])}
    """
    if not scores:
        return {}
    device = next(iter(scores.values())).device
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()), torch.float32)
    flat = [score.detach().reshape(-1).to(device, dtype) for score in scores.values()]
    keep = keep_highest(torch.cat(flat), count)
    kept = {}
    start = 0
    for name, score in scores.items():
        part = keep[start : start + score.numel()]
        kept[name] = part.view(score.shape).to(score.device)
        start += score.numel()
    return kept


def keep_n_of_m(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """Keep the ``n`` highest of every ``m`` neighbours along a dimension; of equal scores the later index is kept.

    Args:
        scores: Scores of a weight's entries; the size of ``dim`` is a multiple of ``m``.
        n: How many of each group to keep.
        m: Size of a group.
        dim: The dimension along which neighbours lie: of linear and convolution weights 1, the input channels.

    Returns:
        True for each entry that is kept, bool of the same shape.

    Raises:
        ValueError: If the size of the dimension is no multiple of ``m``.

    Examples:
        >>> keep_n_of_m(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2, 4).int()
        tensor([[0, 1, 1, 0]], dtype=torch.int32)

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, sec. 3 (arXiv:2104.08378).
    """
    if scores.shape[dim] % m:
        raise ValueError(f"dimension {dim} of size {scores.shape[dim]}: groups of {m} need a multiple of {m}.")
    finite = scores.detach().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    groups = finite.unflatten(dim, (-1, m)).movedim(dim + 1, -1)  # the members of a group come last
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
