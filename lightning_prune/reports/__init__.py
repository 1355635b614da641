"""Tables of what a pruning did."""

from lightning_prune.reports.layers import LayerCost, layer_costs, layer_table

__all__ = ["LayerCost", "layer_costs", "layer_table"]
