"""Pruning schedules: the fraction of the amount to prune by an epoch or optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = ["Cubic", "FewUnits", "Geometric", "Gradual", "Linear", "Moments", "OneCycle", "OneShot", "Schedule"]

Moments = Literal["epochs", "steps"]
"""What moments count: epochs, or optimizer steps; both from 0."""


class Schedule(ABC):
    """When to prune, and how much.

    A moment is a number of epochs or of optimizer steps, depending on ``by``. The pruning step that is due at a moment
    runs before the first batch of that epoch, or of that step.
    """

    by: Moments

    @abstractmethod
    def progress(self, moment: int) -> float:
        """Return the fraction of all pruning steps that are due by a moment, in [0, 1]; it never decreases."""

    @property
    @abstractmethod
    def last(self) -> int:
        """The moment of the last pruning step."""

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the curve: what is pruned after this fraction of the steps, of an ``amount`` pruned after all."""
        return progress * amount

    def over(self, units: int) -> Schedule:
        """Return the schedule for a model of which ``units`` units are pruned in all."""
        return self

    def at_most(self, progress: float) -> int | None:
        """Return how many units may be pruned after this fraction of the steps; None if there is no limit."""
        return None

    def __call__(self, moment: int, amount: float) -> float:
        """Return what is pruned by a moment."""
        return self.sparsity(self.progress(moment), amount)


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once.

    Args:
        at: Epoch or optimizer step (counted from 0) of the pruning step.
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
        """Check the arguments."""
        _check_numbers(self, self.by, at=self.at)
        if self.at < 0:
            raise ValueError(f"{self}: {self.by} are counted from 0.")

    def progress(self, moment: int) -> float:
        """Return 0 before ``at`` and 1 from there on."""
        return float(moment >= self.at)

    @property
    def last(self) -> int:
        """The moment of the last pruning step."""
        return self.at


@dataclass(frozen=True)
class Gradual(Schedule):
    """Prune in several steps; each subclass adds its curve, :meth:`sparsity`.

    Args:
        start: Epoch or optimizer step (counted from 0) of the first pruning step.
        end: Epoch or optimizer step of the last pruning step, which reaches the amount.
        every: Epochs or optimizer steps between two pruning steps.
        by: What ``start``, ``end`` and ``every`` count.

    Raises:
        ValueError: If ``start`` is negative, ``end < start``, ``every < 1`` or ``by`` unknown.
    """

    start: int
    end: int
    every: int = 1
    by: Moments = "epochs"

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_numbers(self, self.by, start=self.start, end=self.end, every=self.every)
        if not (0 <= self.start <= self.end and self.every >= 1):
            raise ValueError(f"{self}: {self.by} must satisfy 0 <= start <= end and every >= 1.")

    def progress(self, moment: int) -> float:
        """Return the fraction of the pruning steps that are due by a moment."""
        if moment >= self.end:
            return 1.0
        # Steps come at start, start + every, ... and at end, however far that is from the one before.
        steps_before_end = math.ceil((self.end - self.start) / self.every)
        due = max(0, (moment - self.start) // self.every + 1)
        return due / (steps_before_end + 1)

    @property
    def last(self) -> int:
        """The moment of the last pruning step."""
        return self.end


class Linear(Gradual):
    r"""Prune by equal steps: the curve is :math:`t`, the fraction of the steps made. Arguments: see :class:`Gradual`.

    Examples:
        >>> [Linear(start=1, end=4)(epoch, amount=0.8) for epoch in range(6)]
        [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 0.8]
    """


class Cubic(Gradual):
    r"""Prune fast at first, then ever more slowly: :math:`1 - (1 - t)^3`. Arguments: see :class:`Gradual`.

    Examples:
        >>> [round(Cubic(start=1, end=4)(epoch, amount=1.0), 4) for epoch in range(6)]
        [0.0, 0.5781, 0.875, 0.9844, 1.0, 1.0]

    References:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, eq. 1 (arXiv:1710.01878).
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the cubic curve."""
        return amount * (1.0 - (1.0 - progress) ** 3)


class Geometric(Gradual):
    r"""Prune the same fraction of what is left each time: :math:`1 - (1 - s)^t`. Arguments: see :class:`Gradual`.

    Five steps to an amount of :math:`s` = 0.67232 prune 20 % of what is left each: the rounds of the lottery ticket
    papers.

    Examples:
        >>> [round(Geometric(start=1, end=5)(epoch, amount=1 - 0.8**5), 4) for epoch in range(7)]
        [0.0, 0.2, 0.36, 0.488, 0.5904, 0.6723, 0.6723]

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019, sec. 1 (arXiv:1803.03635).
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the geometric curve."""
        if progress >= 1.0:
            return amount  # exactly, where the power would round
        return 1.0 - (1.0 - amount) ** progress


class OneCycle(Gradual):
    r"""Prune slowly, then fast, then slowly: :math:`(1 + e^{-\alpha+\beta}) / (1 + e^{-\alpha t+\beta})`.

    :math:`\alpha = 14` and :math:`\beta = 6`, as in the authors' own library. Arguments: see :class:`Gradual`.

    Examples:
        >>> [round(OneCycle(start=0, end=3)(epoch, amount=1.0), 4) for epoch in range(4)]
        [0.0759, 0.7313, 0.9893, 1.0]

    References:
        Hubens et al., One-Cycle Pruning, ICIP 2022 (arXiv:2107.02086).
    """

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the sigmoid curve, 0 before the first step."""
        if progress <= 0.0:
            return 0.0  # the sigmoid itself is above 0 there
        return amount * (1.0 + math.exp(-14.0 + 6.0)) / (1.0 + math.exp(-14.0 * progress + 6.0))


@dataclass(frozen=True)
class FewUnits(Schedule):
    """Prune a few units at a time, and train in between, until the amount is reached.

    The number of pruning steps follows from the number of units to prune, which a rehearsal before the first step
    finds. It is exact for ``target="filters"``; for other targets, the last step prunes what is still missing.

    Args:
        units: Units (filters and neurons of all layers together) to prune at a time.
        every: Optimizer steps or epochs between two pruning steps.
        start: Optimizer step or epoch (counted from 0) of the first pruning step.
        by: What ``every`` and ``start`` count.

    Raises:
        ValueError: If ``units`` or ``every`` is below 1, ``start`` negative, or ``by`` unknown.

    Examples:
        >>> schedule = FewUnits(units=2, every=10, start=10).over(5)  # for a model that loses 5
        >>> schedule.last, [schedule.at_most(schedule.progress(step)) for step in (9, 10, 19, 20, 30)]
        (30, [0, 2, 2, 4, None])

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, sec. 2 (arXiv:1611.06440).
    """

    units: int
    every: int = 1
    start: int = 0
    by: Moments = "steps"
    _total: int = field(default=0, init=False, repr=False)  # units to prune in all; known to the schedule of over()

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_numbers(self, self.by, units=self.units, every=self.every, start=self.start)
        if not (self.start >= 0 and self.every >= 1 and self.units >= 1):
            raise ValueError(f"{self}: {self.by} must satisfy start >= 0, every >= 1 and units >= 1.")

    def __str__(self) -> str:
        """Return what the user wrote, and the number of units to prune where it is known."""
        return f"{self!r} for {self._total} units to prune" if self._total else repr(self)

    def over(self, units: int) -> Schedule:
        """Return the schedule for a model of which ``units`` units are pruned in all."""
        known = replace(self)
        object.__setattr__(known, "_total", units)  # the one field that is no argument, of a copy nobody has seen
        return known

    def progress(self, moment: int) -> float:
        """Return the fraction of the pruning steps that are due by a moment."""
        due = 0 if moment < self.start else (moment - self.start) // self.every + 1
        return min(1.0, due / self._steps)

    def sparsity(self, progress: float, amount: float) -> float:
        """Return the whole amount from the first step on: :meth:`at_most` limits each step."""
        return amount if progress > 0 else 0.0

    def at_most(self, progress: float) -> int | None:
        """Return the units of the steps made; after the last one there is no limit."""
        if progress >= 1.0:
            return None
        return math.floor(progress * self._steps * self.units + 1e-9)  # progress is a rounded quotient

    @property
    def last(self) -> int:
        """The moment of the last pruning step."""
        return self.start + (self._steps - 1) * self.every

    @property
    def _steps(self) -> int:
        return max(1, math.ceil(self._total / self.units))


def _check_numbers(schedule: Schedule, by: str, **numbers: object) -> None:
    if by not in ("epochs", "steps"):
        raise ValueError(f"{schedule}: by={by!r} must be 'epochs' or 'steps'.")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{schedule}: {name}={value!r} must be a whole number.")
