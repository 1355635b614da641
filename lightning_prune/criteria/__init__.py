"""Scores: tensor in, scores out, higher is kept longer; one family per file."""

from lightning_prune.criteria.activations import activation_mean, activation_std, apoz
from lightning_prune.criteria.magnitude import batch_norm_scale, filter_l1, filter_l2
from lightning_prune.criteria.obd import obd
from lightning_prune.criteria.taylor import taylor_activations
from lightning_prune.criteria.weights import magnitude

__all__ = [
    "activation_mean",
    "activation_std",
    "apoz",
    "batch_norm_scale",
    "filter_l1",
    "filter_l2",
    "magnitude",
    "obd",
    "taylor_activations",
]
