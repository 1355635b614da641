"""Turns scores into choices: exactly as many as asked, ties by index; knows neither models nor methods."""

import torch
from torch import Tensor

__all__ = ["keep_highest", "ranks"]


def ranks(scores: Tensor) -> Tensor:
    """Return the rank of each score, lowest first and ties by index.

    Args:
        scores: One score per unit, ``(n,)``; higher is kept longer. NaN counts as lowest.

    Returns:
        Ranks from 0 to n - 1, ``(n,)`` int64.

    Example:
        >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0]))
        tensor([2, 0, 3, 1])
    """
    order = torch.argsort(scores.nan_to_num(nan=-torch.inf), stable=True)
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Keep exactly ``count`` units with the highest scores; of equal scores the later index stays.

    Args:
        scores: One score per unit, ``(n,)``.
        count: How many stay, from 0 to n.

    Returns:
        True for each unit that stays, ``(n,)`` bool.

    Raises:
        ValueError: If ``count`` lies outside 0 to n.

    Example:
        >>> keep_highest(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2)
        tensor([ True, False,  True, False])
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"count={count}: of {len(scores)} units, from 0 to {len(scores)} can stay.")
    return ranks(scores) >= len(scores) - count
