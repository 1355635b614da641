"""Reports: tables, pictures and files of models and pruning runs."""

from lightning_prune.analysis.latency_table import latency_advice, latency_table
from lightning_prune.analysis.sensitivity_figure import draw_sensitivity, import_matplotlib, sensitivity_table
from lightning_prune.reports.history import Decision, Goal, History, LayerChange, Moment
from lightning_prune.reports.model_tables import (
    GroupCost,
    LayerCost,
    group_costs,
    group_table,
    layer_costs,
    layer_table,
    pinned_table,
    room_table,
    stored_table,
    weight_table,
)
from lightning_prune.reports.run_files import HISTORY_FILE, files_of_run, write_run
from lightning_prune.reports.run_picture import draw_run
from lightning_prune.reports.run_summary import headline
from lightning_prune.reports.run_tables import run_tables

__all__ = [
    "Decision", "Goal", "GroupCost", "HISTORY_FILE", "History", "LayerChange", "LayerCost", "Moment", "draw_run",
    "draw_sensitivity", "files_of_run", "group_costs", "group_table", "headline", "import_matplotlib",
    "latency_advice", "latency_table", "layer_costs", "layer_table", "pinned_table", "room_table", "run_tables",
    "sensitivity_table", "stored_table", "weight_table", "write_run",
]  # fmt: skip
