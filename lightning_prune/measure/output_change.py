"""Measures how far a model's outputs move when other tensors stand in for its parameters; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.measure.calibration import Calibration
from lightning_prune.model.calls import numbers_in
from lightning_prune.model.devices import widest_float
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.structure.tensor_names import exchange_

__all__ = ["Outputs", "replaced"]

_COMPARED = 0.25  # share of the batches that outputs are compared on


class Outputs:
    """What a model gives on a quarter of some batches, to be compared with.

    Args:
        model: The model.
        calibration: The batches.
    """

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        self.model = model
        self.batches = calibration.batches[: max(1, round(_COMPARED * len(calibration.batches)))]
        self.calibration = calibration
        self._whole = list(self._given({}))

    def moved(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the squared distance of all outputs from those before, other tensors standing in for parameters."""
        pairs = zip(self._given(tensors), self._whole, strict=True)
        moved = [(new - old).square().sum(dtype=widest_float(new.device)) for new, old in pairs]
        return float(self.calibration.over_processes(torch.stack(moved).sum())) if moved else 0.0

    def _given(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for batch in self.batches:
            with replaced(self.model, tensors), unchanged(batch):
                found = numbers_in(self.calibration.forward(self.model, batch))
            yield from (tensor.detach() for tensor in found)


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters by other tensors of the same shapes inside the block, in eval mode."""
    with undisturbed(model):  # it takes the exchange back
        exchange_(model, tensors)
        yield
