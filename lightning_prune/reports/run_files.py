"""Writes the history of a run to a folder, to be looked at and to be read again."""

from __future__ import annotations

from pathlib import Path

from lightning_prune.reports.history import History
from lightning_prune.reports.run_page import run_page
from lightning_prune.reports.run_picture import picture_of

__all__ = ["HISTORY_FILE", "write_run"]

HISTORY_FILE = "pruning.json"


def write_run(history: History, folder: str | Path) -> list[Path]:
    """Write ``pruning.json``, ``pruning.html`` and, where matplotlib is installed, ``pruning.png``.

    Args:
        history: What happened.
        folder: Where to; made if need be.

    Returns:
        The files.
    """
    folder = Path(folder)
    history.to_json(folder / HISTORY_FILE)
    try:
        picture = picture_of(history)
    except ModuleNotFoundError:  # the page says so
        picture = None
    page = folder / "pruning.html"
    page.write_text(run_page(history, picture), encoding="utf-8")
    files = [folder / HISTORY_FILE, page]
    if picture is not None:
        files.append(folder / "pruning.png")
        files[-1].write_bytes(picture)
    return files
