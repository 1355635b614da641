"""Says what share of the amount shall be reached when; knows nothing of training but the count of epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["Cubic", "Linear", "OneShot", "Schedule"]


class Schedule(ABC):
    """When to prune, and how far: a function of the epoch that rises from 0 to 1."""

    @abstractmethod
    def __call__(self, epoch: int) -> float:
        """Return the share of the amount that shall be gone before the first batch of ``epoch``, in [0, 1]."""

    @property
    @abstractmethod
    def last_epoch(self) -> int:
        """The epoch before whose first batch everything is reached."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once.

    Args:
        epoch: The epoch (counted from 0) before whose first batch everything leaves.

    Raises:
        ValueError: If ``epoch`` is negative.

    Example:
        >>> [OneShot(epoch=2)(epoch) for epoch in range(4)]
        [0.0, 0.0, 1.0, 1.0]
    """

    epoch: int = 0

    def __post_init__(self) -> None:
        """Refuse an epoch before the first."""
        if self.epoch < 0:
            raise ValueError(f"OneShot(epoch={self.epoch}): epochs are counted from 0.")

    def __call__(self, epoch: int) -> float:
        """Return 0 before the epoch and 1 from it on."""
        return float(epoch >= self.epoch)

    @property
    def last_epoch(self) -> int:
        """The epoch before whose first batch everything is reached."""
        return self.epoch


@dataclass(frozen=True)
class Linear(Schedule):
    """Prune by equal steps.

    Args:
        start: The epoch (counted from 0) of the first cut.
        end: The epoch of the last cut, at which everything is reached.
        every: Epochs between two cuts.

    Raises:
        ValueError: If ``start`` is negative, ``end < start`` or ``every < 1``.

    Example:
        >>> [Linear(start=1, end=4)(epoch) for epoch in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    start: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse epochs that cannot be."""
        _check_span(self)

    def __call__(self, epoch: int) -> float:
        """Return the share of cuts made."""
        return _progress(self, epoch)

    @property
    def last_epoch(self) -> int:
        """The epoch before whose first batch everything is reached."""
        return self.end


@dataclass(frozen=True)
class Cubic(Schedule):
    r"""Prune fast at first and ever more slowly: :math:`1 - (1 - t)^3` after the share :math:`t` of the cuts.

    Args:
        start: The epoch (counted from 0) of the first cut.
        end: The epoch of the last cut, at which everything is reached.
        every: Epochs between two cuts.

    Raises:
        ValueError: If ``start`` is negative, ``end < start`` or ``every < 1``.

    Example:
        >>> [round(Cubic(start=1, end=4)(epoch), 4) for epoch in range(6)]
        [0.0, 0.5781, 0.875, 0.9844, 1.0, 1.0]

    References:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, eq. 1 (arXiv:1710.01878).
    """

    start: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse epochs that cannot be."""
        _check_span(self)

    def __call__(self, epoch: int) -> float:
        """Return the share reached after the cuts made so far."""
        return 1.0 - (1.0 - _progress(self, epoch)) ** 3

    @property
    def last_epoch(self) -> int:
        """The epoch before whose first batch everything is reached."""
        return self.end


def _check_span(schedule: Linear | Cubic) -> None:
    if not 0 <= schedule.start <= schedule.end or schedule.every < 1:
        raise ValueError(f"{schedule}: epochs must satisfy 0 <= start <= end and every >= 1.")


def _progress(schedule: Linear | Cubic, epoch: int) -> float:
    """Return the share of the cuts that are due, in [0, 1]; the one at ``end`` is always the last."""
    cuts = -((schedule.start - schedule.end) // schedule.every) + 1  # at start, start + every, ... and at end
    if epoch >= schedule.end:
        return 1.0
    return max(0, (epoch - schedule.start) // schedule.every + 1) / cuts
