"""Prune networks while they train with PyTorch Lightning: units leave the model between two batches."""

from lightning_prune.callbacks import FilterL1Pruning, MetricGuard, TaylorFilterPruning
from lightning_prune.checkpoints import load_from_checkpoint
from lightning_prune.errors import PruningError
from lightning_prune.findings import Sensitivity
from lightning_prune.flops import count_flops
from lightning_prune.obs_filters import RepairReport, prune_filters_obs
from lightning_prune.obs_pruning import ObsReport, prune_obs
from lightning_prune.oracle import compare_criteria
from lightning_prune.pruning import Report, prune_filters
from lightning_prune.schedules import Cubic, Linear, OneShot, Schedule
from lightning_prune.sensitivity import sensitivity
from lightning_prune.structure import coupling_rule
from lightning_prune.surgeon import SurgeonReport, prune_exact
from lightning_prune.validation import trainer_sensitivity

__all__ = [
    "Cubic",
    "FilterL1Pruning",
    "Linear",
    "MetricGuard",
    "ObsReport",
    "OneShot",
    "PruningError",
    "RepairReport",
    "Report",
    "Schedule",
    "Sensitivity",
    "SurgeonReport",
    "TaylorFilterPruning",
    "compare_criteria",
    "count_flops",
    "coupling_rule",
    "load_from_checkpoint",
    "prune_exact",
    "prune_filters",
    "prune_filters_obs",
    "prune_obs",
    "sensitivity",
    "trainer_sensitivity",
]
