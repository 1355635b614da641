"""Undoing what a block has changed, also when Ctrl-C arrives while it is undone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Deferral", "undone_by"]

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
_ENTER_AND_EXIT = frozenset({"__enter__", "__exit__"})


class Deferral:
    """Makes Ctrl-C wait while a context manager of this package opens or closes, from now on until :meth:`end`.

    At all other times Ctrl-C raises as before. Signals reach the main thread alone, so other threads need nothing.
    """

    def __init__(self) -> None:
        self._pending = False
        self._previous: Any = None
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        if callable(previous):  # neither ignored, nor handled by code that is not Python
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)

    def end(self) -> None:
        """Restore the handler, and hand on a Ctrl-C that waited."""
        if self._previous is None:
            return
        # Another handler that the body has set stays.
        if getattr(signal.getsignal(signal.SIGINT), "__self__", None) is self:
            signal.signal(signal.SIGINT, self._previous)
        if self._pending:
            self._pending = False
            self._previous(signal.SIGINT, sys._getframe())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _opens_or_closes(frame):
            self._pending = True
        else:
            self._previous(number, frame)


@contextmanager
def undone_by(undo: Callable[[], None]) -> Iterator[None]:
    """Run the body, then ``undo``, whatever the body raises.

    Args:
        undo: Is called again if it does not come to its end, so it must be able to complete what it has begun.
    """
    deferral = Deferral()
    undone = False
    try:
        try:
            yield
        finally:
            undo()
            undone = True
    finally:
        if not undone:
            undo()
        deferral.end()


def _opens_or_closes(frame: FrameType | None) -> bool:
    """Return whether a frame runs inside ``__enter__`` or ``__exit__`` of a context manager of this package."""
    while frame is not None:
        if frame.f_code.co_name in _ENTER_AND_EXIT:
            file = frame.f_code.co_filename
            if file == _CONTEXTLIB:
                # What ``contextmanager`` decorated runs below, or is just about to.
                generator = getattr(frame.f_locals.get("self"), "gen", None)
                file = getattr(getattr(generator, "gi_code", None), "co_filename", "")
            if file.startswith(_PACKAGE):
                return True
        frame = frame.f_back
    return False
