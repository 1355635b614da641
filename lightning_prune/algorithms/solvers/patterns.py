"""N:M patterns: of every M weights in a row N stay; knows neither Hessians nor layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pattern"]


@dataclass(frozen=True)
class Pattern:
    """Of every ``of`` columns of a row that lie ``apart`` from one to the next, ``stay`` stay.

    Attributes:
        stay: How many stay.
        of: Of how many.
        apart: Columns between two of one block, which so are ``of`` channels at one place of a kernel; 1: neighbours.

    Raises:
        ValueError: If not 0 < ``stay`` < ``of``.

    Examples:
        >>> Pattern(1, 2).highest(torch.tensor([[3.0, 1.0, 2.0, 4.0]]))
        tensor([[ True, False, False,  True]])
    """

    stay: int
    of: int
    apart: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.stay < self.of:
            raise ValueError(f'pattern {self.stay}:{self.of}: write "2:4" to keep 2 of every 4 weights of a row.')

    def fits(self, columns: int) -> bool:
        """Tell whether a row parts into whole blocks."""
        return columns % (self.of * self.apart) == 0

    def blocks(self, rows: Tensor) -> Tensor:
        """View rows ``(..., columns)`` block by block, ``(..., blocks, of)``; a copy where it must be."""
        return rows.unflatten(-1, (-1, self.of, self.apart)).transpose(-1, -2).flatten(-3, -2)

    def block_of(self, columns: Tensor) -> Tensor:
        """Return the block of each column, numbered as in :meth:`blocks`."""
        return columns // (self.of * self.apart) * self.apart + columns % self.apart

    def highest(self, scores: Tensor) -> Tensor:
        """Keep the highest scores of every block; of equal ones the later column stays.

        Args:
            scores: ``(rows, columns)``.

        Returns:
            ``(rows, columns)`` bool.
        """
        blocks = self.blocks(scores)
        order = torch.argsort(blocks, dim=-1, stable=True)
        keep = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., self.of - self.stay :], True)
        return keep.unflatten(-2, (-1, self.apart)).transpose(-1, -2).flatten(-3)
