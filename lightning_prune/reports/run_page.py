"""Shows the history of a run as one HTML page that needs nothing else; changes nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from lightning_prune.reports.history import History
from lightning_prune.reports.layer_table import count_change
from lightning_prune.reports.summary import metric_change, shares, shown_metrics, stages, staying, totals

__all__ = ["run_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1040px; margin: 2em auto;
  padding: 0 1.2em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.1em; margin: 2.2em 0 .5em; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
p, figcaption { color: #5a6672; margin: .3em 0; }
.totals { display: flex; flex-wrap: wrap; gap: 1em; margin: 1.4em 0; }
.totals div { border: 1px solid #dfe4e9; border-radius: 8px; padding: .6em 1.1em; min-width: 9em; }
.totals b { display: block; font-size: 1.6em; } .totals span { color: #5a6672; font-size: .9em; }
img { max-width: 100%; }
.table { overflow-x: auto; max-height: 36em; overflow-y: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #dfe4e9; position: sticky; top: 0; background: #fff; }
td, th { padding: .25em .8em .25em 0; vertical-align: top; } td { border-bottom: 1px solid #eef1f4; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { background: #d9dee3; height: .8em; border-radius: 2px; margin-top: .35em; }
.bar div { background: #2e6f95; height: 100%; border-radius: 2px; }
.bars { min-width: 9em; } .same { color: #93a0ac; }
"""


def run_page(history: History, picture: bytes | None) -> str:
    """Return the page.

    Args:
        history: What happened.
        picture: The same as a PNG, or None where it could not be drawn.
    """
    title = f"Pruning of {history.model or 'a model'}"
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p><code>{escape(callback)}</code></p>" for callback in history.callbacks),
        f"<p>Stopped by {escape(history.stopped)}.</p>" if history.stopped else "",
        _totals(history),
        _image(picture),
        _stages(history),
        _layers(history),
        _weights(history),
        _staying(history),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _totals(history: History) -> str:
    counted = {total.name: f"{total.before:,} → {total.now:,}" for total in totals(history)}
    tiles = [
        (f"{history.left[key]:.1%}", f"{name} left", counted.get(name, "")) for key, name in shares(history).items()
    ]
    last = stages(history)[-1].last if history.moments else {}
    tiles += [(f"{last[name]:.4g}", name, "at the last validation") for name in shown_metrics(history) if name in last]
    shown = "".join(f"<div>{escape(name)}<b>{value}</b><span>{more}</span></div>" for value, name, more in tiles)
    measured = f"<p>FLOPs are multiply-adds of one call, {escape(history.measured)}.</p>" if history.measured else ""
    return f'<div class="totals">{shown}</div>{measured}'


def _image(picture: bytes | None) -> str:
    if picture is None:
        return "<p>For pictures install matplotlib: <code>pip install 'lightning-prune[plots]'</code>.</p>"
    data = base64.b64encode(picture).decode()
    return f'<figure style="margin:0"><img alt="The run as a picture" src="data:image/png;base64,{data}"></figure>'


def _stages(history: History) -> str:
    kept, metrics = shares(history), shown_metrics(history)
    rows = [
        [
            _number(stage.epoch),
            _number(stage.step),
            *(_number(f"{stage.left[key]:.1%}" if key in stage.left else "") for key in kept),
            *(_number(metric_change(stage.first.get(name), stage.last.get(name))) for name in metrics),
        ]
        for stage in stages(history)
    ]
    headings = ["epoch", "step", *(f"{name} left" for name in kept.values()), *metrics]
    told = "Metrics: right after the cut → before the next one." if metrics else "Validation logged no metrics."
    return _section("From cut to cut", told, [_heading(name) for name in headings], rows)


def _layers(history: History) -> str:
    widest = max((change.before.width for change in history.layers.values()), default=1)
    rows = []
    for path, (before, now) in history.layers.items():
        numbers = [_number(count_change(was, is_), was == is_) for was, is_ in zip(before, now, strict=True)]
        rows.append([f"<td><code>{escape(path)}</code></td>", _bar(now.width, before.width, widest), *numbers])
    headings = [_heading("layer", False), _heading("", False), *map(_heading, ("width", "params", "FLOPs"))]
    return _section("Layers, before and now", "", headings, rows)


def _weights(history: History) -> str:
    rows = [
        [
            f"<td><code>{escape(weight.name)}</code></td>",
            _bar(weight.stays, weight.size, weight.size),
            *map(_number, (f"{weight.size:,}", f"{weight.stays:,}", f"{weight.stays / max(weight.size, 1):.1%}")),
        ]
        for weight in history.weights
    ]
    headings = [_heading("weight", False), _heading("", False), *map(_heading, ("entries", "left", "share"))]
    return _section("Weights that are left", "", headings, rows)


def _staying(history: History) -> str:
    rows = [
        [f"<td>{escape(reason)}</td>", f"<td>{', '.join(f'<code>{escape(name)}</code>' for name in names)}</td>"]
        for reason, names in staying(history).items()
    ]
    return _section("What stays", "", [_heading("because", False), _heading("of", False)], rows)


def _section(title: str, told: str, headings: Iterable[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    told = f"<p>{escape(told)}</p>" if told else ""
    table = f'<div class="table"><table><tr>{"".join(headings)}</tr>\n{lines}</table></div>'
    return f"<h2>{escape(title)}</h2>{told}\n{table}"


def _heading(name: str, number: bool = True) -> str:
    return f"<th{' class=number' if number else ''}>{escape(name)}</th>"


def _number(value: object, same: bool = False) -> str:
    return f'<td class="number{" same" if same else ""}">{escape(str(value))}</td>'


def _bar(now: int, before: int, widest: int) -> str:
    """Return a bar as long as ``before`` is beside the widest, filled as far as ``now`` goes."""
    whole, filled = 100 * before / max(widest, 1), 100 * now / max(before, 1)
    bar = f'<div class="bar" style="width:{whole:.1f}%"><div style="width:{filled:.1f}%"></div></div>'
    return f'<td class="bars">{bar}</td>'
