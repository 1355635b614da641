"""Shows a sensitivity analysis as a picture and as a table; measures nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from lightning_prune.findings import GroupSensitivity, Sensitivity

__all__ = ["draw_sensitivity", "figure_class", "sensitivity_table"]

_MARKERS = "osD^vP*X"
_BARS = "▁▂▃▄▅▆▇█"


def draw_sensitivity(found: Sensitivity, path: str | Path, title: str | None = None) -> None:
    """Draw the metric against the share of units removed, one curve per group, and save it as a picture.

    Colours run with depth, from the first group to the last. The groups are listed beside the curves, those that lose most at half
    of their units first.

    Args:
        found: The analysis.
        path: The picture; its ending chooses the format.
        title: What stands above it.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, fig. 2 (arXiv:1608.08710).
    """
    import matplotlib as mpl

    columns = max(1, math.ceil(len(found.groups) / 30))
    figure = figure_class()(figsize=(6.6 + 2.4 * columns, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(found.dense, color="0.5", linewidth=1, linestyle=(0, (5, 3)), label="_nolegend_", zorder=1)
    colours = mpl.colormaps["turbo"]
    for depth, group in enumerate(found.groups):
        axes.plot(
            [0.0, *(100 * share for share in group.shares)],
            [found.dense, *group.values],
            color=colours(0.04 + 0.92 * depth / max(1, len(found.groups) - 1)),
            marker=_MARKERS[depth % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.1,
            label=f"{group.name} ({group.width})",
        )
    axes.set(xlabel="units removed of one group, %", ylabel=found.metric, xlim=(0, 100))
    axes.set_title(title or f"Each group cut alone, smallest {found.criterion} first, not retrained", fontsize=10)
    axes.grid(color="0.9", linewidth=0.6)
    if found.mode == "min" and found.dense > 0 and max(max(g.values, default=0.0) for g in found.groups) > 50 * found.dense:
        axes.set_yscale("log")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", ncols=columns, fontsize=7, title="group (units)",
        title_fontsize=8, frameon=False,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
