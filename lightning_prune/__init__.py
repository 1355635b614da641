"""Prune networks while they train with PyTorch Lightning: units leave the model between two batches."""

from lightning_prune.algorithms.schedules import Cubic, FewUnits, Geometric, Linear, OneCycle, OneShot, Schedule
from lightning_prune.analysis.criterion_comparison import compare_criteria
from lightning_prune.analysis.latency_comparison import LatencyReport, compare_latency
from lightning_prune.analysis.layer_sensitivity import sensitivity
from lightning_prune.analysis.sensitivity_findings import Sensitivity
from lightning_prune.analysis.weight_sensitivity import weight_sensitivity
from lightning_prune.callbacks import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    MetricGuard,
    OBSOneShot,
    TaylorFilterPruning,
)
from lightning_prune.callbacks.engine.loading import load_from_checkpoint
from lightning_prune.callbacks.validation import trainer_sensitivity, trainer_weight_sensitivity
from lightning_prune.measure.flops import count_flops
from lightning_prune.model.batch_norm import recalibrate_batch_norm
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.exact import SurgeonReport, prune_exact
from lightning_prune.pruning.filters import Report, prune_filters
from lightning_prune.pruning.filters_obs import RepairReport, prune_filters_obs
from lightning_prune.pruning.fisher import FisherReport, prune_fisher
from lightning_prune.pruning.obs import ObsReport, prune_obs
from lightning_prune.pruning.weights import WeightReport, prune_weights
from lightning_prune.reports import History
from lightning_prune.structure import coupling_rule
from lightning_prune.surgery.loading import Prunable, load_state_dict_, recipe_json, slim_loading
from lightning_prune.surgery.masks import apply_masks_, hold_masks, masks_on
from lightning_prune.surgery.semi_structured import to_semi_structured_
from lightning_prune.surgery.sparse_files import load_sparse, load_sparse_, save_sparse

__all__ = [
    "Cubic",
    "FewUnits",
    "FilterL1Pruning",
    "FilterPruning",
    "FisherReport",
    "Geometric",
    "History",
    "IterativeMagnitudePruning",
    "LatencyReport",
    "Linear",
    "MetricGuard",
    "OBSOneShot",
    "ObsReport",
    "OneCycle",
    "OneShot",
    "Prunable",
    "PruningError",
    "RepairReport",
    "Report",
    "Schedule",
    "Sensitivity",
    "SurgeonReport",
    "TaylorFilterPruning",
    "WeightReport",
    "apply_masks_",
    "compare_criteria",
    "compare_latency",
    "count_flops",
    "coupling_rule",
    "hold_masks",
    "load_from_checkpoint",
    "load_sparse",
    "load_sparse_",
    "load_state_dict_",
    "masks_on",
    "prune_exact",
    "prune_filters",
    "prune_filters_obs",
    "prune_fisher",
    "prune_obs",
    "prune_weights",
    "recalibrate_batch_norm",
    "recipe_json",
    "save_sparse",
    "sensitivity",
    "slim_loading",
    "to_semi_structured_",
    "trainer_sensitivity",
    "trainer_weight_sensitivity",
    "weight_sensitivity",
]
