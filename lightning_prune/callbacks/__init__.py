"""Callbacks for Lightning: thin adapters that say when."""

from lightning_prune.callbacks.distill_from_dense import DistillFromDense
from lightning_prune.callbacks.expert_pruning import ExpertPruning
from lightning_prune.callbacks.filter_l1 import FilterL1Pruning
from lightning_prune.callbacks.filter_pruning import FilterPruning
from lightning_prune.callbacks.iterative_magnitude import IterativeMagnitudePruning
from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.callbacks.learning_rate_rewinding import LearningRateRewinding
from lightning_prune.callbacks.metric_guard import MetricGuard
from lightning_prune.callbacks.obs_one_shot import OBSOneShot
from lightning_prune.callbacks.pruning_checkpoint import PruningCheckpoint
from lightning_prune.callbacks.pruning_early_stopping import PruningEarlyStopping
from lightning_prune.callbacks.taylor_filter import TaylorFilterPruning
from lightning_prune.callbacks.weight_sharing import WeightSharing

__all__ = [
    "DistillFromDense",
    "ExpertPruning",
    "FilterL1Pruning",
    "FilterPruning",
    "IterativeMagnitudePruning",
    "LayerPruning",
    "LearningRateRewinding",
    "MetricGuard",
    "OBSOneShot",
    "PruningCheckpoint",
    "PruningEarlyStopping",
    "TaylorFilterPruning",
    "WeightSharing",
]
