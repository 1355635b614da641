"""Shows a sensitivity analysis as a picture and as a table; measures nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_prune.analysis.sensitivity_findings import GroupSensitivity, Sensitivity

__all__ = ["draw_sensitivity", "import_matplotlib", "sensitivity_table"]

_MARKERS = "osD^vP*X"
_BARS = "▁▂▃▄▅▆▇█"


def import_matplotlib() -> Any:
    """Import matplotlib, which only pictures need.

    Raises:
        ModuleNotFoundError: If it is not installed, saying how to get it.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pictures need matplotlib: pip install 'lightning-prune[plots]'.") from error
    return matplotlib


def draw_sensitivity(found: Sensitivity, path: str | Path, title: str | None = None) -> None:
    """Draw the metric against the share of units removed, one curve per group, and save it as a picture.

    Colours run with depth, from the first group to the last; the broken line is the whole model.

    Args:
        found: The analysis.
        path: The picture; its ending chooses the format.
        title: What stands above it.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, fig. 2 (arXiv:1608.08710).
    """
    matplotlib = import_matplotlib()
    close = _close_up(found)
    columns = max(1, math.ceil(len(found.groups) / 30))
    figure = matplotlib.figure.Figure(figsize=(6.6 + 2.0 * columns, 6.2 if close else 5.0), layout="constrained")
    panels = figure.subplots(
        2 if close else 1, sharex=True, squeeze=False, height_ratios=(3, 2) if close else None
    ).flat
    for axes in panels:
        axes.axhline(found.dense, color="0.5", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        for depth, group in enumerate(found.groups):
            axes.plot(
                [0.0, *(100 * share for share in group.shares)],
                [found.dense, *group.values],
                color=matplotlib.colormaps["turbo"](0.04 + 0.92 * depth / max(1, len(found.groups) - 1)),
                marker=_MARKERS[depth % len(_MARKERS)],
                markersize=3.5,
                linewidth=1.1,
                label=f"{group.name} ({group.width})",
            )
        axes.set(ylabel=found.metric, xlim=(0, 112), xticks=range(0, 101, 20))
        axes.grid(color="0.9", linewidth=0.6)
    if close:
        panels[0].set(ylim=close)
    low, high = panels[0].get_ylim()
    seen = [group for group in found.groups if group.values and low <= group.values[-1] <= high]
    for group in sorted(seen, key=lambda group: abs(group.values[-1] - found.dense))[-3:]:
        end = 100 * group.shares[-1], group.values[-1]
        panels[0].annotate(group.name, end, (5, 0), textcoords="offset points", va="center", fontsize=7)
    worst = max((value for group in found.groups for value in group.values), default=0.0)
    if found.mode == "min" and worst > 50 * found.dense > 0:
        panels[-1].set_yscale("log")
    panels[0].set_title(title or f"Each group cut alone, by {found.criterion}, without retraining", fontsize=10)
    panels[-1].set_xlabel("units removed of one group, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", ncols=columns, fontsize=7,
        title="group (units)", title_fontsize=8, frameon=False,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _close_up(found: Sensitivity) -> tuple[float, float] | None:
    """Return the range of the metric in which most curves lie, where a few that fall far would squeeze them flat."""
    sign = 1 if found.mode == "max" else -1
    falls = [max((sign * (found.dense - value) for value in group.values), default=0.0) for group in found.groups]
    usual = [fall for fall in falls if fall < 0.25 * max(falls)]
    if len(usual) < 3 or 2 * len(usual) < len(falls) or max(usual) <= 0:
        return None
    rise = max(sign * (value - found.dense) for group in found.groups for value in group.values)
    ends = found.dense - sign * 1.1 * max(usual), found.dense + sign * (max(rise, 0.0) + 0.1 * max(usual))
    return min(ends), max(ends)


def sensitivity_table(found: Sensitivity, drop: float) -> Table:
    """List for every group how its metric falls and what may leave while it stays within ``drop``."""
    better = "higher" if found.mode == "max" else "lower"
    table = Table(
        title=f"{found.metric} of the whole model: {found.dense:.6g} ({better} is better)",
        caption="Each group cut alone, without retraining; all together lose more.",
    )
    table.add_column("group", overflow="fold")
    for heading in ("units", "as more leave", "worst", f"may leave for {drop:g}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in found.groups:
        share, worst = found.within(group, drop), min if found.mode == "max" else max
        cells = f"{worst(group.values, default=found.dense):.4g}", f"{share:.0%}"
        table.add_row(group.name, str(group.width), _curve(found, group), *cells)
    for name, reason in found.skipped.items():
        table.add_row(name, "", "", "", f"skipped: {reason}", style="dim")
    return table


def _curve(found: Sensitivity, group: GroupSensitivity) -> str:
    """Draw a group's metric in characters, from the whole model's down to the worst of all groups."""
    sign = 1 if found.mode == "max" else -1
    lows = [sign * value for each in found.groups for value in each.values if not math.isnan(value)]
    low, high = min(lows, default=0.0), sign * found.dense
    heights = [(sign * value - low) / (high - low) if high > low else 1.0 for value in group.values]
    return "".join(" " if math.isnan(h) else _BARS[round(min(max(h, 0), 1) * (len(_BARS) - 1))] for h in heights)
