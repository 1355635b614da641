"""Shows how the tensors of a compact file are stored; changes nothing."""

from __future__ import annotations

from rich.table import Table

from lightning_prune.surgery.sparse_files import SparseReport

__all__ = ["stored_table"]


def stored_table(report: SparseReport) -> Table:
    """List every tensor: its form, the entries that are stored, and bytes before and after."""
    share = report.bytes_after / max(report.bytes_before, 1)
    table = Table(title=f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after: {share:.1%}")
    table.add_column("tensor", overflow="fold")
    table.add_column("form")
    for heading in ("entries", "bytes before", "after"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, form, *numbers in report.tensors:
        table.add_row(name, form, *(f"{number:,}" for number in numbers))
    return table
