"""Allocation of a number of removed weights to layers so that the sum of their errors is least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "split"]


@dataclass(frozen=True)
class Curve:
    """The error of one layer against the number of its removed weights.

    Attributes:
        counts: Numbers of removed weights, rising from 0.
        errors: The error at each, in a unit that all layers share.
    """

    counts: Sequence[int]
    errors: Sequence[float]


def split(curves: Mapping[str, Curve], total: int) -> dict[str, int]:
    """Choose how many weights each layer loses, so that the marginal error is the same everywhere.

    Between its points, a curve is replaced by the convex hull below it.

    Args:
        curves: Name of a layer -> its curve.
        total: Number of weights to remove in all.

    Returns:
        Name -> count; they add up to ``total``.

    Raises:
        ValueError: If the curves do not cover ``total``.

    Examples:
        >>> split({"robust": Curve([0, 10], [0.0, 1.0]), "frail": Curve([0, 5, 10], [0.0, 0.1, 9.0])}, 15)
        {'robust': 10, 'frail': 5}
    """
    reach = sum(curve.counts[-1] for curve in curves.values())
    if not 0 <= total <= reach:
        raise ValueError(f"total={total}: from 0 to {reach} weights can be removed.")
    steps = []
    for name, curve in curves.items():
        for slope, width in _steps(curve):
            steps.append((slope, name, width))
    counts = dict.fromkeys(curves, 0)
    missing = total
    # Slopes of a convex hull rise, so the sides of one layer come in order.
    for _, name, width in sorted(steps, key=lambda step: step[0]):
        taken = min(width, missing)
        counts[name] += taken
        missing -= taken
    return counts


def _steps(curve: Curve) -> list[tuple[float, int]]:
    """Return slope and width of each side of the convex hull below a curve."""
    hull: list[NDArray[np.float64]] = []
    for point in np.array([curve.counts, curve.errors], dtype=np.float64).T:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), int(b[0] - a[0])) for a, b in pairwise(hull)]


def _slope(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float((b[1] - a[1]) / (b[0] - a[0]))
