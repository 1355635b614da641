"""Shows how long a pruned model takes beside the whole one; measures nothing."""

from __future__ import annotations

from rich.table import Table

from lightning_prune.analysis.latency_comparison import LatencyReport

__all__ = ["latency_advice", "latency_table"]


def latency_table(report: LatencyReport) -> Table:
    """List, batch size by batch size, the time of a call of every version, and the share of the dense model's."""
    table = Table(
        title=f"Latency, measured {report.measured}",
        caption="Fastest call of each round, median over rounds, in eval mode.",
    )
    table.add_column("batch", justify="right")
    for name in report.flops:
        table.add_column(name, justify="right", no_wrap=True)
    for timing in report.timings:
        cells = [
            f"{1e3 * seconds:.3g} ms" + (f" ({timing.kept[name]:.0%})" if name != "dense" else "")
            for name, seconds in timing.seconds.items()
        ]
        table.add_row(str(timing.batch_size), *cells)
    table.add_section()
    dense, *others = report.flops.values()
    table.add_row("FLOPs", f"{dense:,}", *(f"{count:,} ({count / max(dense, 1):.0%})" for count in others))
    return table


def latency_advice(report: LatencyReport) -> str:
    """Say whether the widths are good for the device, and what would be better."""
    if report.flops["pruned"] == report.flops["dense"]:
        return "No unit has left: zeros take the time of other numbers."
    if not report.awkward:
        return "All widths are multiples of 8."
    some = ", ".join(f"{width} ({name})" for name, width in list(report.awkward.items())[:4])
    more = f" and {len(report.awkward) - 4} more" if len(report.awkward) > 4 else ""
    if report.round_to is None:
        return f"Widths such as {some}{more} are no multiples of 8; rounding them up would not be faster here."
    flops = report.flops[f"round_to={report.round_to}"] / max(report.flops["dense"], 1)
    kept = report.flops["pruned"] / max(report.flops["dense"], 1)
    return (
        f"Widths such as {some}{more} are bad for this device: rounded up to multiples of {report.round_to}, the model "
        f"would take {report.saves:.0%} less time, with {flops:.1%} of the FLOPs instead of {kept:.1%}. Prune with "
        f"round_to={report.round_to}."
    )
