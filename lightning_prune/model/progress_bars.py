"""Shows in a terminal or notebook how far something has come; decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["counted", "each", "seen"]

_Item = TypeVar("_Item")


@contextmanager
def each(items: Iterable[_Item], what: str, shown: bool) -> Iterator[Iterator[_Item]]:
    """Yield what yields the items, and show, while the body runs, how many have been dealt with."""
    with counted(what, length_hint(items) or None, shown) as advance:

        def one_by_one() -> Iterator[_Item]:
            for item in items:
                yield item
                advance()

        yield one_by_one()


def seen() -> bool:
    """Tell whether somebody may look: into a file or a pipe a bar would write an empty line."""
    return get_console().is_terminal or get_console().is_jupyter


@contextmanager
def counted(what: str, total: int | None, shown: bool) -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs, and take it away in the end.

    Args:
        what: Stands before the bar.
        total: Steps to come, if that is known.
        shown: Whether anything is shown; in a file or a pipe nothing is.

    Yields:
        What is to be called after each step, with what is to be said of it if there is something to say.
    """
    done = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), done
    with Progress(*columns, transient=True, disable=not (shown and seen())) as bar:
        task = bar.add_task(what, total=total)

        def advance(told: str = "") -> None:
            bar.update(task, advance=1, description=f"{what} {told}".rstrip())

        yield advance
