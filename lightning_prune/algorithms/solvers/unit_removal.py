r"""Removes whole units, read by several matrices at once, greedily; what is left of each row makes up for them.

The block form of Optimal Brain Surgeon: without the columns u of a unit, a row's error rises by
:math:`\frac{1}{2} w_u ([H^{-1}]_{uu})^{-1} w_u^T` and the row moves by :math:`-w_u ([H^{-1}]_{uu})^{-1} [H^{-1}]_{u:}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import cholesky

__all__ = ["Reader", "unit_rises"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A matrix that reads the units.

    Attributes:
        weights: ``(rows, columns)``.
        inverse: The inverse Hessian of its inputs, ``(columns, columns)``.
        columns: The columns that each unit takes up, ``(units, n)`` int64.
        scale: What its error counts for beside those of other readers.
    """

    weights: Tensor
    inverse: Tensor
    columns: Tensor
    scale: float = 1.0

    def alone(self) -> Tensor:
        """Return what the error rises by without each unit alone, ``(units,)``."""
        return _State(self.weights, self.inverse, self.columns, self.scale).rises(torch.arange(len(self.columns)))


def unit_rises(readers: Sequence[Reader]) -> Tensor:
    """Remove units one by one, each time the one that raises the sum of all readers' errors least.

    Args:
        readers: All that read these units.

    Returns:
        For each unit the highest rise up to its removal, ``(units,)``: to keep the highest is to follow the path. The
        unit that would go last has an infinite one.

    Raises:
        PruningError: If a Hessian is singular on what is left.
    """
    states = [
        _State(reader.weights.clone(), reader.inverse.clone(), reader.columns, reader.scale) for reader in readers
    ]
    count = len(readers[0].columns)
    left = torch.ones(count, dtype=torch.bool, device=readers[0].weights.device)
    rises = torch.full((count,), torch.inf, dtype=readers[0].weights.dtype, device=left.device)
    reached = rises.new_zeros(())
    for _ in range(count - 1):
        alive = left.nonzero()[:, 0]
        added = sum(state.rises(alive) for state in states)
        assert isinstance(added, Tensor)
        which = added.argmin()
        unit = int(alive[which])
        reached = torch.maximum(reached, added[which])
        rises[unit] = reached
        left[unit] = False
        for state in states:
            state.remove_(unit)
    return rises


@dataclass(frozen=True, eq=False)
class _State:
    """A reader on the way; what has left holds numbers that nobody reads any more."""

    weights: Tensor
    inverse: Tensor
    columns: Tensor
    scale: float

    def rises(self, units: Tensor) -> Tensor:
        """Return what the error rises by without each of some units, ``(n,)``."""
        columns = self.columns[units]  # (n, k)
        factor = cholesky(self.inverse[columns[:, :, None], columns[:, None, :]])
        weights = self.weights[:, columns].permute(1, 2, 0)  # (n, k, rows)
        return 0.5 * self.scale * torch.linalg.solve_triangular(factor, weights, upper=False).square().sum(dim=(1, 2))

    def remove_(self, unit: int) -> None:
        """Take one unit out; the weights move to make up for it."""
        columns = self.columns[unit]
        factor = cholesky(self.inverse[columns[:, None], columns])
        scaled = torch.linalg.solve_triangular(factor, self.inverse[columns], upper=False)  # (k, columns)
        moved = torch.linalg.solve_triangular(factor, self.weights[:, columns].T, upper=False)  # (k, rows)
        self.weights.sub_(moved.T @ scaled)
        self.inverse.sub_(scaled.T @ scaled)
