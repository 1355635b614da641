"""Tables and pictures of what a pruning did, or would do."""

from lightning_prune.reports.groups import GroupCost, group_costs, group_table, pinned_table, room_table
from lightning_prune.reports.layers import LayerCost, layer_costs, layer_table
from lightning_prune.reports.sensitivity import draw_sensitivity, import_matplotlib, sensitivity_table
from lightning_prune.reports.stored import stored_table
from lightning_prune.reports.weights import weight_table

__all__ = [
    "GroupCost",
    "LayerCost",
    "draw_sensitivity",
    "group_costs",
    "group_table",
    "import_matplotlib",
    "layer_costs",
    "layer_table",
    "pinned_table",
    "room_table",
    "sensitivity_table",
    "stored_table",
    "weight_table",
]
