"""Finds out whether a higher or a lower value of a metric is better, from other callbacks."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

from lightning_prune.model.errors import PruningError
from lightning_prune.reports.metric_mode import Mode


def mode_by_callbacks(where: str, metric: str, callbacks: Iterable[Callback]) -> tuple[Mode, str] | None:
    """Return the mode under which ModelCheckpoint or EarlyStopping monitor a metric, and the name of the callback.

    Raises:
        PruningError: If they contradict each other.
    """
    found: dict[Mode, str] = {}
    for callback in callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}  # each package of Lightning has classes of its own
        if kinds & {"ModelCheckpoint", "EarlyStopping"} and getattr(callback, "monitor", None) == metric:
            found.setdefault(callback.mode, type(callback).__name__)  # type: ignore[attr-defined]
    if len(found) > 1:
        modes = " and ".join(f"{name}(mode={mode!r})" for mode, name in found.items())
        raise PruningError(f"{where}: {modes} contradict. Set mode= of one of them right.")
    return next(iter(found.items()), None)
