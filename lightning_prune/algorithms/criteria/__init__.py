"""Pruning criteria: functions from tensors to scores, higher is kept longer; one family per file."""

from lightning_prune.algorithms.criteria.activations import activation_mean, activation_std, apoz
from lightning_prune.algorithms.criteria.magnitude import batch_norm_scale, filter_l1, filter_l2
from lightning_prune.algorithms.criteria.obd import obd
from lightning_prune.algorithms.criteria.single_weights import magnitude
from lightning_prune.algorithms.criteria.taylor import taylor_activations

__all__ = [
    "activation_mean", "activation_std", "apoz", "batch_norm_scale", "filter_l1", "filter_l2", "magnitude", "obd",
    "taylor_activations",
]  # fmt: skip
