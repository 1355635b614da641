"""Prune networks while they train with PyTorch Lightning: units leave the model between two batches."""

from lightning_prune.batch_norm import recalibrate_batch_norm
from lightning_prune.callbacks import FilterL1Pruning, FilterPruning, MetricGuard, TaylorFilterPruning
from lightning_prune.checkpoints import load_from_checkpoint
from lightning_prune.errors import PruningError
from lightning_prune.findings import Sensitivity
from lightning_prune.flops import count_flops
from lightning_prune.oracle import compare_criteria
from lightning_prune.pruning import Report, prune_filters
from lightning_prune.schedules import Cubic, FewUnits, Geometric, Linear, OneCycle, OneShot, Schedule
from lightning_prune.sensitivity import sensitivity
from lightning_prune.structure import coupling_rule
from lightning_prune.validation import trainer_sensitivity

__all__ = [
    "Cubic",
    "FewUnits",
    "FilterL1Pruning",
    "FilterPruning",
    "Geometric",
    "Linear",
    "MetricGuard",
    "OneCycle",
    "OneShot",
    "PruningError",
    "Report",
    "Schedule",
    "Sensitivity",
    "TaylorFilterPruning",
    "compare_criteria",
    "count_flops",
    "coupling_rule",
    "load_from_checkpoint",
    "prune_filters",
    "recalibrate_batch_norm",
    "sensitivity",
    "trainer_sensitivity",
]
