"""Files of a pruning run: its history as JSON, and a report as an HTML page and a picture."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightning_prune.reports.history import History
from lightning_prune.reports.run_picture import Picture, picture_of
from lightning_prune.reports.run_summary import headline, stages
from lightning_prune.reports.run_tables import run_tables, stages_as_csv, stages_as_latex

__all__ = ["HISTORY_FILE", "files_of_run", "run_page", "write_run"]

HISTORY_FILE = "pruning.json"
_WIDTH = 200  # characters; longer names fold

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ --text: #1f2328; --back: #ffffff; --faint: #57606a; --line: #d0d7de; --block: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6edf3; --back: #0d1117; --faint: #9198a1; --line: #3d444d; --block: #161b22; }}
}}
body {{ max-width: 1300px; margin: 2em auto; padding: 0 1.2em; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }}
pre {{ overflow-x: auto; padding: .8em; background: var(--block); border: 1px solid var(--line); border-radius: 6px;
  font: 13px/1.25 ui-monospace, Menlo, Consolas, monospace; }}
pre.calls {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
ul {{ padding-left: 1.2em; }}
dl {{ display: flex; flex-wrap: wrap; gap: .2em 1.6em; color: var(--faint); font-size: 14px; }}
dl div {{ display: flex; gap: .4em; }}
dd {{ margin: 0; color: var(--text); }}
img {{ display: block; width: 100%; background: #ffffff; border-radius: 6px; }}
.picture {{ position: relative; max-width: 1000px; }}
.picture i {{ position: absolute; width: 14px; height: 14px; margin: -7px; border-radius: 50%; }}
.picture i:hover {{ background: #d1495b66; }}
@media (max-width: 600px) {{ body {{ margin: 1em auto; padding: 0 .7em; }} pre {{ font-size: 11px; }} }}
@media print {{ body {{ max-width: none; margin: 0; }} pre {{ overflow: visible; font-size: 8px; border: 0; }}
  img {{ break-inside: avoid; }} }}
</style></head>
<body>
<h1>{title}</h1>
<ul>{headline}</ul>
<pre class="calls">{calls}</pre>
<dl>{facts}</dl>
{picture}
<pre>{tables}</pre>
</body>
</html>
"""


def files_of_run(history: History) -> dict[str, bytes]:
    """Return the files of a run by name: the history, the page, and the picture where matplotlib is installed.

    Of a run with pruning steps also the table of these, as CSV and LaTeX.
    """
    try:
        picture = picture_of(history)
    except ModuleNotFoundError:  # the page says so
        picture = None
    files = {HISTORY_FILE: history.to_text().encode(), "pruning.html": run_page(history, picture).encode()}
    if picture is not None:
        files["pruning.png"] = picture.png
    if len(stages(history)) > 1:
        files["pruning.csv"] = stages_as_csv(history).encode()
        files["pruning.tex"] = stages_as_latex(history).encode()
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


def run_page(history: History, picture: Picture | None) -> str:
    """Return an HTML page that needs no other file: the tables of the terminal, unabridged, and the picture.

    Args:
        history: The history of the run.
        picture: The picture, or None if it could not be drawn. A point shows its values under the mouse.
    """
    shown = "<p>For pictures install matplotlib: <code>pip install 'lightning-prune[plots]'</code>.</p>"
    if picture is not None:
        data = base64.b64encode(picture.png).decode()
        shown = f'<img alt="What was kept and validation metrics, over time" src="data:image/png;base64,{data}">'
        for left, top, words in picture.points:
            shown += f'\n<i style="left:{left:.2%};top:{top:.2%}" title="{escape(words)}"></i>'
        shown = f'<div class="picture">{shown}</div>'
    return _PAGE.format(
        title=escape(f"Pruning of {history.model or 'a model'}"),
        headline="".join(f"<li>{escape(line)}</li>" for line in headline(history)),
        calls=escape("\n".join(history.callbacks)),
        facts="".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in history.facts.items()),
        picture=shown,
        tables=_tables(history),
    )


def _tables(history: History) -> str:
    """Return the tables as HTML."""
    console = Console(record=True, file=io.StringIO(), width=_WIDTH, force_jupyter=False)
    if history.stopped:
        console.print(Text(f"Stopped by {history.stopped}.\n"))
    if history.measured:
        console.print(Text(f"FLOPs are multiply-adds of one call, {history.measured}.\n"))
    for table in run_tables(history, whole=True):
        console.print(table, "")
    return console.export_html(code_format="{code}", inline_styles=True)
