"""Tells from the name of a metric whether a higher or a lower value is better."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["Mode", "mode_by_name"]

Mode = Literal["min", "max"]

_LOWER_IS_BETTER = re.compile(
    r"loss|error|perplexity|entropy|divergence|distance|latency|brier"
    r"|(?<![a-z])(err|ppl|r?msl?e|s?mape|mae|mase|nll|bce|ce|ece|kld?|wer|cer|fid|kid|lpips|bp[cd]|crps|cost)(?![a-z])"
)


def mode_by_name(metric: str) -> Mode:
    """Return ``"min"`` for names of losses, errors and distances, ``"max"`` for all others."""
    return "min" if _LOWER_IS_BETTER.search(metric.lower()) else "max"
