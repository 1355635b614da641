"""Says how much of the amount shall be gone when; knows nothing of training but a count of epochs or steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Cubic", "FewUnits", "Geometric", "Gradual", "Linear", "Moments", "OneCycle", "OneShot", "Schedule"]

Moments = Literal["epochs", "steps"]
"""What moments count: epochs, or optimizer steps; both from 0."""


class Schedule(ABC):
    """When to prune, and how far.

    A moment is a count of epochs or of optimizer steps, as ``by`` says. What a schedule asks for at a moment is done
    before the first batch of that epoch, or of that step.
    """

    by: Moments

    @abstractmethod
    def progress(self, moment: int) -> float:
        """Return which share of all cuts is due by a moment, in [0, 1]; it never falls."""

    @abstractmethod
    def sparsity(self, progress: float, amount: float) -> float:
        """Return what shall be gone after a share of the cuts, of an amount that is gone after all of them."""

    @property
    @abstractmethod
    def last(self) -> int:
        """The moment at which everything is reached."""

    def over(self, units: int) -> Schedule:
        """Return the schedule for a model of which so many units leave in all."""
        return self

    def at_most(self, progress: float) -> int | None:
        """Return how many units may have left after a share of the cuts, if that is limited."""
        return None

    def __call__(self, moment: int, amount: float) -> float:
        """Return what shall be gone by a moment."""
        return self.sparsity(self.progress(moment), amount)


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once.

    Args:
        at: The epoch or optimizer step (counted from 0) before which everything leaves.
        by: What ``at`` counts.

    Raises:
        ValueError: If ``at`` is negative, or ``by`` unknown.

    Examples:
        >>> [OneShot(at=2)(epoch, amount=0.5) for epoch in range(4)]
        [0.0, 0.0, 0.5, 0.5]
    """

    at: int = 0
    by: Moments = "epochs"

    def __post_init__(self) -> None:
        """Refuse a moment before the first."""
        _check(self, lambda: self.at >= 0, f"{self.by} are counted from 0")

    def progress(self, moment: int) -> float:
        """Return 0 before the moment and 1 from it on."""
        return float(moment >= self.at)

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the share of the amount that the share of the cuts is."""
        return progress * amount

    @property
    def last(self) -> int:
        """The moment at which everything is reached."""
        return self.at


@dataclass(frozen=True)
class Gradual(Schedule):
    """Prune by several cuts, the first at ``start``, the last at ``end``; subclasses say how far each goes.

    Args:
        start: The epoch or optimizer step (counted from 0) of the first cut.
        end: That of the last cut, at which everything is reached.
        every: Epochs or steps between two cuts.
        by: What ``start``, ``end`` and ``every`` count.

    Raises:
        ValueError: If ``start`` is negative, ``end < start``, ``every < 1`` or ``by`` unknown.
    """

    start: int
    end: int
    every: int = 1
    by: Moments = "epochs"

    def __post_init__(self) -> None:
        """Refuse moments that cannot be."""
        _check(
            self,
            lambda: 0 <= self.start <= self.end and self.every >= 1,
            f"{self.by} must satisfy 0 <= start <= end and every >= 1",
        )

    def progress(self, moment: int) -> float:
        """Return the share of the cuts that are due; the one at ``end`` is always the last."""
        cuts = -((self.start - self.end) // self.every) + 1  # at start, start + every, ... and at end
        if moment >= self.end:
            return 1.0
        return max(0, (moment - self.start) // self.every + 1) / cuts

    @property
    def last(self) -> int:
        """The moment at which everything is reached."""
        return self.end


class Linear(Gradual):
    """Prune by equal steps.

    Args:
        start: The epoch or optimizer step (counted from 0) of the first cut.
        end: That of the last cut, at which everything is reached.
        every: Epochs or steps between two cuts.
        by: What ``start``, ``end`` and ``every`` count.

    Raises:
        ValueError: If ``start`` is negative, ``end < start``, ``every < 1`` or ``by`` unknown.

    Examples:
        >>> [Linear(start=1, end=4)(epoch, amount=0.8) for epoch in range(6)]
        [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 0.8]
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the share of the amount that the share of the cuts is."""
        return progress * amount


class Cubic(Gradual):
    r"""Prune fast at first and ever more slowly: :math:`1 - (1 - t)^3` of the amount after the share :math:`t` of cuts.

    Args:
        start: The epoch or optimizer step (counted from 0) of the first cut.
        end: That of the last cut, at which everything is reached.
        every: Epochs or steps between two cuts.
        by: What ``start``, ``end`` and ``every`` count.

    Raises:
        ValueError: If ``start`` is negative, ``end < start``, ``every < 1`` or ``by`` unknown.

    Examples:
        >>> [round(Cubic(start=1, end=4)(epoch, amount=1.0), 4) for epoch in range(6)]
        [0.0, 0.5781, 0.875, 0.9844, 1.0, 1.0]

    References:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, eq. 1 (arXiv:1710.01878).
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the cubic's value."""
        return amount * (1.0 - (1.0 - progress) ** 3)


class Geometric(Gradual):
    r"""Remove the same share of what is left each time: :math:`1 - (1 - s)^t` after the share :math:`t` of the cuts.

    Five cuts to an amount of 0.67232 take 20 % of what is left each: the rounds of the lottery ticket papers.

    Args:
        start: The epoch or optimizer step (counted from 0) of the first cut.
        end: That of the last cut, at which everything is reached.
        every: Epochs or steps between two cuts.
        by: What ``start``, ``end`` and ``every`` count.

    Raises:
        ValueError: If ``start`` is negative, ``end < start``, ``every < 1`` or ``by`` unknown.

    Examples:
        >>> [round(Geometric(start=1, end=5)(epoch, amount=1 - 0.8**5), 4) for epoch in range(7)]
        [0.0, 0.2, 0.36, 0.488, 0.5904, 0.6723, 0.6723]

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019, sec. 1 (arXiv:1803.03635).
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return what repeated equal shares of the rest come to."""
        return amount if progress >= 1.0 else 1.0 - (1.0 - amount) ** progress


class OneCycle(Gradual):
    r"""Prune slowly, then fast, then slowly: :math:`(1 + e^{-\alpha+\beta}) / (1 + e^{-\alpha t+\beta})` of the amount.

    :math:`t` is the share of the cuts made, :math:`\alpha = 14` and :math:`\beta = 6`, as in the authors' own library.

    Args:
        start: The epoch or optimizer step (counted from 0) of the first cut.
        end: That of the last cut, at which everything is reached.
        every: Epochs or steps between two cuts.
        by: What ``start``, ``end`` and ``every`` count.

    Raises:
        ValueError: If ``start`` is negative, ``end < start``, ``every < 1`` or ``by`` unknown.

    Examples:
        >>> [round(OneCycle(start=0, end=3)(epoch, amount=1.0), 4) for epoch in range(4)]
        [0.0759, 0.7313, 0.9893, 1.0]

    References:
        Hubens et al., One-Cycle Pruning, ICIP 2022 (arXiv:2107.02086).
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the sigmoid's value, exactly nothing before the first cut."""
        if progress <= 0.0:
            return 0.0
        return amount * (1.0 + math.exp(-14.0 + 6.0)) / (1.0 + math.exp(-14.0 * progress + 6.0))


@dataclass(frozen=True)
class FewUnits(Schedule):
    """Remove a few units, train for a while, and so on until the amount is gone.

    How many cuts it takes follows from how many units must leave, which a rehearsal before the first step tells. That
    is exact where the amount is one of filters; towards parameters, FLOPs or latency, the last cut takes what is still
    missing.

    Args:
        units: The most that leave at once, filters and neurons of all layers together.
        every: Optimizer steps or epochs between two cuts.
        start: The step or epoch (counted from 0) of the first cut.
        by: What ``every`` and ``start`` count.

    Raises:
        ValueError: If ``units`` or ``every`` is below 1, ``start`` negative, or ``by`` unknown.

    Examples:
        >>> schedule = FewUnits(units=2, every=10, start=10).over(5)  # of a model that loses 5
        >>> schedule.last, [schedule.at_most(schedule.progress(step)) for step in (9, 10, 19, 20, 30)]
        (30, [0, 2, 2, 4, None])

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, sec. 2 (arXiv:1611.06440).
    """

    units: int
    every: int = 1
    start: int = 0
    by: Moments = "steps"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        rule = f"{self.by} must satisfy start >= 0, every >= 1 and units >= 1"
        _check(self, lambda: self.units >= 1 and self.every >= 1 and self.start >= 0, rule)

    def over(self, units: int) -> Schedule:
        """Return the schedule for a model of which so many units leave in all."""
        return FewOf(**vars(self), of=units)

    def progress(self, moment: int) -> float:
        """Return whether cuts are due: which share of all only :meth:`over` knows."""
        return float(moment >= self.start)

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the whole amount: the number of units limits what leaves."""
        return amount if progress > 0 else 0.0

    @property
    def last(self) -> int:
        """The moment of the first cut, which may be the last."""
        return self.start


@dataclass(frozen=True)
class FewOf(Schedule):
    """What :class:`FewUnits` comes to for a model that loses ``of`` units."""

    units: int
    every: int
    start: int
    by: Moments
    of: int

    def __str__(self) -> str:
        """Return what the user wrote, and how many units it is about."""
        written = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "of")
        return f"FewUnits({written}) of {self.of} units that leave"

    @property
    def _number(self) -> int:
        return max(1, math.ceil(self.of / self.units))

    def progress(self, moment: int) -> float:
        """Return the share of the cuts that are due."""
        due = 0 if moment < self.start else (moment - self.start) // self.every + 1
        return min(1.0, due / self._number)

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the whole amount: the number of units limits what leaves."""
        return amount if progress > 0 else 0.0

    def at_most(self, progress: float) -> int | None:
        """Return the units of the cuts made; after the last one, no limit."""
        return None if progress >= 1.0 else math.floor(progress * self._number * self.units + 1e-9)

    @property
    def last(self) -> int:
        """The moment at which everything is reached."""
        return self.start + (self._number - 1) * self.every


def _check(schedule: OneShot | Gradual | FewUnits, possible: Callable[[], bool], rule: str) -> None:
    if schedule.by not in ("epochs", "steps"):
        raise ValueError(f"{schedule}: by={schedule.by!r}; moments are counted by 'epochs' or by 'steps'.")
    for name, value in vars(schedule).items():
        if name == "by":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{schedule}: {name}={value!r}; it is a whole number.")
    if not possible():
        raise ValueError(f"{schedule}: {rule}.")
