"""Prune networks while they train with PyTorch Lightning: units leave the model between two batches."""

from lightning_prune.callbacks import FilterL1Pruning, TaylorFilterPruning
from lightning_prune.checkpoints import load_from_checkpoint
from lightning_prune.errors import PruningError
from lightning_prune.flops import count_flops
from lightning_prune.oracle import compare_criteria
from lightning_prune.pruning import Report, prune_filters
from lightning_prune.schedules import Cubic, Linear, OneShot, Schedule
from lightning_prune.structure import coupling_rule

__all__ = [
    "Cubic",
    "FilterL1Pruning",
    "Linear",
    "OneShot",
    "PruningError",
    "Report",
    "Schedule",
    "TaylorFilterPruning",
    "compare_criteria",
    "count_flops",
    "coupling_rule",
    "load_from_checkpoint",
    "prune_filters",
]
