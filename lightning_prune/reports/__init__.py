"""Tables and pictures of what a pruning did, or would do."""

from lightning_prune.analysis.latency_table import latency_advice, latency_table
from lightning_prune.analysis.sensitivity_figure import draw_sensitivity, import_matplotlib, sensitivity_table
from lightning_prune.reports.channel_table import GroupCost, group_costs, group_table, pinned_table, room_table
from lightning_prune.reports.history import History, LayerChange, Moment
from lightning_prune.reports.layer_table import LayerCost, layer_costs, layer_table
from lightning_prune.reports.run_files import HISTORY_FILE, write_run
from lightning_prune.reports.run_picture import draw_run
from lightning_prune.reports.run_tables import run_tables
from lightning_prune.reports.stored_tensors import stored_table
from lightning_prune.reports.weight_table import weight_table

__all__ = [
    "GroupCost",
    "HISTORY_FILE",
    "History",
    "LayerChange",
    "LayerCost",
    "Moment",
    "draw_run",
    "draw_sensitivity",
    "group_costs",
    "group_table",
    "import_matplotlib",
    "latency_advice",
    "latency_table",
    "layer_costs",
    "layer_table",
    "pinned_table",
    "room_table",
    "run_tables",
    "sensitivity_table",
    "stored_table",
    "weight_table",
    "write_run",
]
