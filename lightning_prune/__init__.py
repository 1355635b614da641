"""Prune networks while they train with PyTorch Lightning: units leave the model between two batches."""

from lightning_prune.errors import PruningError
from lightning_prune.pruning import Report, prune_filters
from lightning_prune.structure import coupling_rule

__all__ = ["PruningError", "Report", "coupling_rule", "prune_filters"]
