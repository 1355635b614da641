"""The data that layers shall go on to serve, and how a model is run on it; gathers nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.model.calls import call_on
from lightning_prune.model.devices import supported
from lightning_prune.model.errors import PruningError

__all__ = ["Calibration", "Run"]

Run = Callable[[nn.Module, Any], Any]
"""Calls a model on a batch and returns its outputs."""


def _alone(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of data and how a model is run on them.

    Attributes:
        batches: The batches, one at least.
        forward: Calls the model on one of them; by default as on example inputs.
        dtype: What sums over the data are kept in, and what is solved with them; float32 in place of float64 for a
            device that has no float64.
        over_processes: Adds a sum over these batches to those of other processes, which see other batches and ask in
            the same order; by default there are none.

    Raises:
        PruningError: If there is no batch.
    """

    batches: Sequence[Any]
    forward: Run = call_on
    dtype: torch.dtype = torch.float64
    over_processes: Callable[[Tensor], Tensor] = _alone

    def __post_init__(self) -> None:
        """Refuse to look at nothing."""
        if not self.batches:
            raise PruningError("No batch came. Pass a list or loader of at least one batch.")

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return what sums are kept in on a device."""
        return supported(self.dtype, device)
