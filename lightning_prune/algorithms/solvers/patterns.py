"""N:M patterns: of every M weights in a row, N are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Keep ``stay`` of every ``of`` columns of a row, which lie ``apart`` columns from each other.

    Attributes:
        stay: Columns kept of each block.
        of: Columns of a block.
        apart: Distance of a block's columns: 1 for neighbours, the kernel size for channels at one kernel position.

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
            raise ValueError(
                f'pattern {self.stay}:{self.of}: "2:4" keeps 2 of every 4 weights; N must lie in 0 < N < M.'
            )

    def fits(self, columns: int) -> bool:
        """Return whether a row of so many columns consists of whole blocks."""
        return columns % (self.of * self.apart) == 0

    def blocks(self, rows: Tensor) -> Tensor:
        """Return rows ``(..., columns)`` block by block, ``(..., blocks, of)``; a view where possible."""
        return rows.unflatten(-1, (-1, self.of, self.apart)).transpose(-1, -2).flatten(-3, -2)

    def block_of(self, columns: Tensor) -> Tensor:
        """Return the block of each column, numbered as in :meth:`blocks`."""
        return columns // (self.of * self.apart) * self.apart + columns % self.apart

    def highest(self, scores: Tensor) -> Tensor:
        """Keep the highest scores of every block; of equal ones the later column is kept.

        Args:
            scores: ``(rows, columns)``.

        Returns:
            ``(rows, columns)`` bool.
        """
        blocks = self.blocks(scores)
        order = torch.argsort(blocks, dim=-1, stable=True)
        keep = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., self.of - self.stay :], True)
        return keep.unflatten(-2, (-1, self.apart)).transpose(-1, -2).flatten(-3)
