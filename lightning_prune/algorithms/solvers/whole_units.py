r"""Greedy removal of whole units that several matrices read, while the remaining columns compensate.

The block form of Optimal Brain Surgeon: without the columns u of a unit, a row's error rises by
:math:`\frac{1}{2} w_u ([H^{-1}]_{uu})^{-1} w_u^T`; the row changes by :math:`-w_u ([H^{-1}]_{uu})^{-1} [H^{-1}]_{u:}`.
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
        columns: The columns of each unit, ``(units, n)`` int64.
        scale: Weight of its error in the sum over all readers.
    """

    weights: Tensor
    inverse: Tensor
    columns: Tensor
    scale: float = 1.0

    def alone(self) -> Tensor:
        """Return the rise of the error when each unit is removed alone, ``(units,)``."""
        return _State(self.weights, self.inverse, self.columns, self.scale).rises(torch.arange(len(self.columns)))


def unit_rises(readers: Sequence[Reader]) -> Tensor:
    """Remove units one by one, each time the one that raises the sum of all readers' errors least.

    Args:
        readers: All matrices that read these units.

    Returns:
        For each unit the highest rise up to its removal, ``(units,)``, so that keeping the highest follows the greedy
        path. The last unit has infinity.

    Raises:
        PruningError: If a Hessian is singular on the remaining columns.
    """
    states = []
    for reader in readers:  # copies, which the removals change
        states.append(_State(reader.weights.clone(), reader.inverse.clone(), reader.columns, reader.scale))
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
    """A reader after some removals; entries of removed columns are meaningless and never read."""

    weights: Tensor
    inverse: Tensor
    columns: Tensor
    scale: float

    def rises(self, units: Tensor) -> Tensor:
        """Return the rise of the error when each of some units is removed alone, ``(n,)``."""
        columns = self.columns[units]  # (n, k)
        factor = cholesky(self.inverse[columns[:, :, None], columns[:, None, :]])
        weights = self.weights[:, columns].permute(1, 2, 0)  # (n, k, rows)
        # w A^-1 w^T with A = L L^T is the squared length of L^-1 w^T, summed over rows.
        whitened = torch.linalg.solve_triangular(factor, weights, upper=False)
        return 0.5 * self.scale * whitened.square().sum(dim=(1, 2))

    def remove_(self, unit: int) -> None:
        """Remove one unit; the remaining weights compensate."""
        columns = self.columns[unit]
        factor = cholesky(self.inverse[columns[:, None], columns])
        scaled = torch.linalg.solve_triangular(factor, self.inverse[columns], upper=False)  # (k, columns)
        moved = torch.linalg.solve_triangular(factor, self.weights[:, columns].T, upper=False)  # (k, rows)
        self.weights.sub_(moved.T @ scaled)
        self.inverse.sub_(scaled.T @ scaled)
