"""Scores of filters: tensor in, scores out, higher is kept longer."""

from collections.abc import Callable

from torch import Tensor

from lightning_prune.criteria.magnitude import filter_l1, filter_l2

__all__ = ["FILTER_CRITERIA", "filter_l1", "filter_l2"]

FILTER_CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"l1": filter_l1, "l2": filter_l2}
"""Names that YAML may use for criteria that look at a filter's weights alone."""
