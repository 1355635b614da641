"""Measures how far a model's outputs move when other tensors stand in for its parameters; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_prune.inputs import tensors_in, undisturbed
from lightning_prune.structure.tensors import exchange_

__all__ = ["Outputs", "replaced"]

_COMPARED = 0.25  # share of the batches that outputs are compared on


class Outputs:
    """What a model gives on a quarter of some batches, to be compared with.

    Args:
        model: The model.
        batches: Batches of data, one at least.
        forward: Calls the model on a batch and returns its outputs.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
        self.model = model
        self.batches = batches[: max(1, round(_COMPARED * len(batches)))]
        self.forward = forward
        self._whole = list(self._given({}))

    def moved(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the squared distance of all outputs from those before, other tensors standing in for parameters."""
        pairs = zip(self._given(tensors), self._whole, strict=True)
        return sum(float((new - old).square().sum()) for new, old in pairs)

    def _given(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for batch in self.batches:
            with replaced(self.model, tensors):
                found = list(tensors_in(self.forward(self.model, batch)))
            yield from (tensor.detach() for tensor in found if tensor.is_floating_point())


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let other tensors of the same shapes stand in for parameters inside the block, in eval mode."""
    with undisturbed(model):  # it takes the exchange back
        exchange_(model, tensors)
        yield
