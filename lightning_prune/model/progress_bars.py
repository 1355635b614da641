"""Progress bars in terminals and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any, TypeVar

from rich import get_console
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["bar_of", "counted", "each", "seen"]

_Item = TypeVar("_Item")


@contextmanager
def each(items: Iterable[_Item], what: str, shown: bool) -> Iterator[Iterator[_Item]]:
    """Yield an iterator over the items, and show while the body runs how many are done."""
    with counted(what, length_hint(items) or None, shown) as advance:

        def one_by_one() -> Iterator[_Item]:
            for item in items:
                yield item
                advance()

        yield one_by_one()


def seen() -> bool:
    """Return whether output goes to a terminal or notebook: in a file or pipe, a bar would leave an empty line."""
    return get_console().is_terminal or get_console().is_jupyter


def bar_of(*columns: Any, shown: bool, transient: bool = True) -> Progress:
    """Return a progress bar, which shows nothing unless output goes to a terminal or notebook."""
    if not (shown and seen()):
        # Rich 14.1 ends a bar in a file or pipe with an empty line, even one that is disabled.
        return Progress(*columns, disable=True, console=Console(quiet=True))
    return Progress(*columns, transient=transient)


def _tell_nobody(note: str = "") -> None:
    del note  # Nothing is shown.


@contextmanager
def counted(what: str, total: int | None, shown: bool) -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs, and remove it afterwards.

    Args:
        what: Text before the bar.
        total: Number of steps, if known.
        shown: Whether to show the bar; in a file or pipe it is never shown.

    Yields:
        A function to call after each step, optionally with a note to show.
    """
    if not shown:
        yield _tell_nobody
        return
    done = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), done
    with bar_of(*columns, shown=shown) as bar:
        task = bar.add_task(escape(what), total=total)  # names of modules may hold brackets

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, description=escape(f"{what} {note}".rstrip()))

        yield advance
