"""Files of a pruning run: its history as JSON, and a report as an HTML page and a picture."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightning_prune.reports.history import History
from lightning_prune.reports.run_picture import picture_of
from lightning_prune.reports.run_summary import headline
from lightning_prune.reports.run_tables import run_tables

__all__ = ["HISTORY_FILE", "files_of_run", "run_page", "write_run"]

HISTORY_FILE = "pruning.json"
_WIDTH = 200  # characters; longer names fold

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>
body {{ max-width: 1300px; margin: 2em auto; padding: 0 1.2em; font-family: system-ui, sans-serif; }}
pre {{ overflow-x: auto; font: 13px/1.25 ui-monospace, Menlo, Consolas, monospace; }}
img {{ max-width: 1000px; width: 100%; }}
</style></head>
<body>
<h1>{title}</h1>
<pre>{calls}</pre>
{picture}
<pre>{tables}</pre>
</body>
</html>
"""


def files_of_run(history: History) -> dict[str, bytes]:
    """Return the files of a run by name: the history, the page and, where matplotlib is installed, the picture."""
    try:
        picture = picture_of(history)
    except ModuleNotFoundError:  # the page says so
        picture = None
    files = {HISTORY_FILE: history.to_text().encode(), "pruning.html": run_page(history, picture).encode()}
    if picture is not None:
        files["pruning.png"] = picture
    return files


def write_run(history: History, folder: str | Path) -> list[Path]:
    """Write the files of a run, see :func:`files_of_run`, and return their paths.

    Args:
        history: The history of the run.
        folder: The folder, created if needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in files_of_run(history).items():
        written.append(folder / name)
        written[-1].write_bytes(content)
    return written


def run_page(history: History, picture: bytes | None) -> str:
    """Return an HTML page that needs no other file: the tables of the terminal, unabridged, and the picture.

    Args:
        history: The history of the run.
        picture: The picture as a PNG, or None if it could not be drawn.
    """
    shown = "<p>For pictures install matplotlib: <code>pip install 'lightning-prune[plots]'</code>.</p>"
    if picture is not None:
        data = base64.b64encode(picture).decode()
        shown = f'<img alt="What was kept and validation metrics, over time" src="data:image/png;base64,{data}">'
    return _PAGE.format(
        title=escape(f"Pruning of {history.model or 'a model'}"),
        calls=escape("\n".join(history.callbacks)),
        picture=shown,
        tables=_tables(history),
    )


def _tables(history: History) -> str:
    """Return the tables as HTML."""
    console = Console(record=True, file=io.StringIO(), width=_WIDTH, force_jupyter=False)
    for line in headline(history):
        console.print(Text(line))
    console.print()
    if history.stopped:
        console.print(Text(f"Stopped by {history.stopped}.\n"))
    if history.measured:
        console.print(Text(f"FLOPs are multiply-adds of one call, {history.measured}.\n"))
    for table in run_tables(history, whole=True):
        console.print(table, "")
    return console.export_html(code_format="{code}", inline_styles=True)
