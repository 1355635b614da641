"""Second-order pruning of matrices: which weights to remove, and how the others compensate."""

from lightning_prune.algorithms.solvers.choice import SOLVERS, Admm, Blocked, Exact, RowSolver
from lightning_prune.algorithms.solvers.damping import damped, inverse
from lightning_prune.algorithms.solvers.least_squares import (
    best_on_columns,
    best_on_support,
    nearer_on_support,
    refit,
    rise,
    share_lost,
)
from lightning_prune.algorithms.solvers.patterns import Pattern
from lightning_prune.algorithms.solvers.rows import Paths, greedy_paths, keep_along, rises_along
from lightning_prune.algorithms.solvers.split import Curve, split

__all__ = [
    "SOLVERS", "Admm", "Blocked", "Curve", "Exact", "Paths", "Pattern", "RowSolver", "best_on_columns",
    "best_on_support", "damped", "greedy_paths", "inverse", "keep_along", "nearer_on_support", "refit", "rise",
    "rises_along", "share_lost", "split",
]  # fmt: skip
