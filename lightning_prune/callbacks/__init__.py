"""Callbacks for Lightning: thin adapters that say when."""

from lightning_prune.callbacks.filter_l1 import FilterL1Pruning

__all__ = ["FilterL1Pruning"]
