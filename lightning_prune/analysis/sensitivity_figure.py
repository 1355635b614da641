"""The picture and the table of a sensitivity analysis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_prune.analysis.sensitivity_findings import GroupSensitivity, Sensitivity

__all__ = ["draw_sensitivity", "import_matplotlib", "literal", "sensitivity_table"]

_MARKERS = "osD^vP*X"
_BARS = "▁▂▃▄▅▆▇█"


def import_matplotlib() -> Any:
    """Import matplotlib, an optional dependency.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pictures need matplotlib: pip install 'lightning-prune[plots]'.") from error
    return matplotlib


def literal(text: str) -> str:
    """Escape a name for matplotlib, which would typeset what lies between dollar signs."""
    return text.replace("$", r"\$")


def draw_sensitivity(found: Sensitivity, path: str | Path, title: str | None = None) -> None:
    """Draw the metric against the fraction of units pruned, one curve per group, and save the picture.

    Colours follow depth, from the first group to the last; the broken line is the dense model.

    Args:
        found: The analysis.
        path: File of the picture; its suffix determines the format.
        title: Title of the picture.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, fig. 2 (arXiv:1608.08710).
    """
    matplotlib = import_matplotlib()
    close = _close_up(found)
    legend_columns = max(1, math.ceil(len(found.groups) / 30))
    width = 6.6 + 2.0 * legend_columns
    if close is None:
        figure = matplotlib.figure.Figure(figsize=(width, 5.0), layout="constrained")
        panels = [figure.subplots()]
    else:
        figure = matplotlib.figure.Figure(figsize=(width, 6.2), layout="constrained")
        panels = list(figure.subplots(2, sharex=True, height_ratios=(3, 2)))
    for axes in panels:
        _draw_curves(axes, found, matplotlib.colormaps["turbo"])
    if close is not None:
        panels[0].set(ylim=close)
    _name_worst(panels[0], found)
    worst = max((max(group.values, default=0.0) for group in found.groups), default=0.0)
    if found.mode == "min" and worst > 50 * found.dense > 0:
        panels[-1].set_yscale("log")
    panels[0].set_title(title or f"Each group pruned alone, by {found.criterion}, without retraining", fontsize=10)
    panels[-1].set_xlabel("units pruned of one group, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", ncols=legend_columns, fontsize=7,
        title="group (units)", title_fontsize=8, frameon=False,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_curves(axes: Any, found: Sensitivity, colours: Any) -> None:
    """Draw the metric of the dense model, and one curve for each group."""
    axes.axhline(found.dense, color="0.5", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    for depth, group in enumerate(found.groups):
        axes.plot(
            [0.0] + [100 * share for share in group.shares],
            [found.dense, *group.values],
            color=colours(0.04 + 0.92 * depth / max(1, len(found.groups) - 1)),
            marker=_MARKERS[depth % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.1,
            label=literal(f"{group.name} ({group.width})"),
        )
    axes.set(ylabel=literal(found.metric), xlim=(0, 112), xticks=range(0, 101, 20))
    axes.grid(color="0.9", linewidth=0.6)


def _name_worst(axes: Any, found: Sensitivity) -> None:
    """Write the names of the three groups that end farthest from the dense model beside their curves."""
    low, high = axes.get_ylim()
    visible = [group for group in found.groups if group.values and low <= group.values[-1] <= high]
    visible.sort(key=lambda group: abs(group.values[-1] - found.dense))
    for group in visible[-3:]:
        end = 100 * group.shares[-1], group.values[-1]
        axes.annotate(literal(group.name), end, (5, 0), textcoords="offset points", va="center", fontsize=7)


def _close_up(found: Sensitivity) -> tuple[float, float] | None:
    """Return the range of the metric for a close-up of most curves, if a few that fall far would flatten them."""
    sign = 1 if found.mode == "max" else -1
    falls, rise = [], 0.0
    for group in found.groups:
        changes = [sign * (value - found.dense) for value in group.values]
        falls.append(-min(changes, default=0.0))
        rise = max(rise, max(changes, default=0.0))
    usual = [fall for fall in falls if fall < 0.25 * max(falls)]
    if len(usual) < 3 or 2 * len(usual) < len(falls) or max(usual) <= 0:
        return None
    worst, best = found.dense - sign * 1.1 * max(usual), found.dense + sign * (rise + 0.1 * max(usual))
    return min(worst, best), max(worst, best)


def sensitivity_table(found: Sensitivity, drop: float) -> Table:
    """Return a table of how each group's metric falls, and the fraction prunable within ``drop``."""
    better = "higher" if found.mode == "max" else "lower"
    table = Table(
        title=Text(f"{found.metric} of the dense model: {found.dense:.6g} ({better} is better)"),
        caption="Each group pruned alone, without retraining; all together lose more.",
    )
    table.add_column("group", overflow="fold")
    for heading in ("units", "metric as more are pruned", "worst", f"prunable for {drop:g}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in found.groups:
        worst = min if found.mode == "max" else max
        lowest = f"{worst(group.values, default=found.dense):.4g}"
        share = f"{found.within(group, drop):.0%}"
        table.add_row(Text(group.name), str(group.width), _curve(found, group), lowest, share)
    for name, reason in found.skipped.items():
        table.add_row(Text(name), "", "", "", Text(f"skipped: {reason}"), style="dim")
    return table


def _curve(found: Sensitivity, group: GroupSensitivity) -> str:
    """Return a group's metric as a line of block characters, from the dense model's to the worst of all groups."""
    sign = 1 if found.mode == "max" else -1
    seen: list[float] = []
    for each in found.groups:
        seen += [sign * value for value in each.values if not math.isnan(value)]
    low, high = min(seen, default=0.0), sign * found.dense
    bars = ""
    for value in group.values:
        height = (sign * value - low) / (high - low) if high > low else 1.0
        if math.isnan(height):
            bars += " "
        else:
            bars += _BARS[round(min(max(height, 0), 1) * (len(_BARS) - 1))]
    return bars
