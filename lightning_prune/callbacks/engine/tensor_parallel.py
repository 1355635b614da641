"""Checks that a model computes the same whole and split by tensor parallelism, so that it can be pruned whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.engine.example_inputs import on_device_of
from lightning_prune.callbacks.engine.sharding import refuse_changed_numbers, tensor_parallel_size
from lightning_prune.callbacks.engine.step import copied
from lightning_prune.model.calls import ExampleInputs, numbers_in, run, same_draws
from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import whole, whole_numbers

__all__ = ["Agreement"]

_CLOSE = 1e-3  # of the norm of the outputs: by how much the order of sums may change single precision
_COARSE = 5e-2  # likewise for half precision, and where single precision is rounded on the way
_SAME = (
    "A pruning step looks at the whole model, put together from the parts of all processes. Let forward compute the "
    "same with whole parameters: take numbers of heads from shapes, as in view(..., -1, head_dim), call no collective "
    "operations, and return DTensors or whole tensors, as with output_layouts=Replicate()."
)


class Agreement:
    """What a model computes whole, to be compared with what it computes once it is split again.

    Nothing is looked at unless tensor parallelism splits the model over several processes.
    """

    def __init__(self) -> None:
        self._numbers: Mapping[tuple[str, str], int] | None = None  # as they were before configure_model was called
        self._inputs: ExampleInputs | None = None

    def note_numbers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the numbers that modules hold, before ``configure_model`` is called."""
        self._inputs = None
        self._numbers = whole_numbers(pl_module) if tensor_parallel_size(trainer) > 1 else None

    def refuse_local_numbers(self, where: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules whose numbers are those of one process's part, with which no whole model runs."""
        size = tensor_parallel_size(trainer)
        if size > 1 and self._numbers is not None:
            now = whole_numbers(pl_module)
            divided = {at: was for at, was in self._numbers.items() if now.get(at) not in (None, was)}
            divided = {at: was for at, was in divided.items() if now[at] * size == was}
            refuse_changed_numbers(where, pl_module, divided)

    def look(self, where: str, trainer: Trainer, pl_module: LightningModule, find: Any) -> None:
        """Find inputs to compare outputs on, while the model is whole, unless they are known.

        Args:
            where: The callback, for errors.
            trainer: The Trainer.
            pl_module: The module.
            find: Returns inputs, or None as long as none are known.

        Raises:
            PruningError: If the whole model runs on none.
        """
        if tensor_parallel_size(trainer) == 1 or self._inputs is not None:
            return
        try:
            inputs = find()
            if inputs is None:
                return
            inputs = on_device_of(trainer, pl_module, inputs)
            _outputs(pl_module, inputs)
        except Exception as error:
            raise PruningError(f"{where}: {type(pl_module).__name__} does not run as a whole ({error}). {_SAME}") from error
        self._inputs = inputs

    def outputs(self, pl_module: LightningModule) -> list[Tensor] | None:
        """Return what the model computes; None if nothing is to be compared."""
        return None if self._inputs is None else _outputs(pl_module, self._inputs)

    def refuse_others(self, where: str, pl_module: LightningModule, expected: list[Tensor] | None) -> None:
        """Refuse a model that is split and does not compute what it computes whole.

        Raises:
            PruningError: Saying by how much they differ.
        """
        if expected is None:
            return
        found = self.outputs(pl_module) or []
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
        if not expected or shapes[0] != shapes[1]:
            differ = f"outputs of shapes {shapes[0]} and {shapes[1]}"
        else:
            apart = max(_distance(*pair) for pair in zip(expected, found, strict=True))
            if apart <= _tolerance(pl_module):
                return
            differ = f"outputs differ by {apart:.1%}"
        raise PruningError(
            f"{where}: {type(pl_module).__name__} does not compute the same whole and split by tensor parallelism "
            f"({differ}). {_SAME}"
        )


def _outputs(pl_module: LightningModule, inputs: ExampleInputs) -> list[Tensor]:
    """Return all floating-point outputs, gathered from all processes, as a validation would compute them."""
    training = [module for module in pl_module.modules() if module.training]
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    try:
        pl_module.eval()
        with torch.no_grad(), same_draws(), generators_restored([pl_module.device]):
            torch.manual_seed(0)
            found = run(pl_module, copied(inputs))
            return [whole(tensor).detach().double() for tensor in numbers_in(found)]
    finally:
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)


def _distance(expected: Tensor, found: Tensor) -> float:
    """Return the norm of the difference, relative to that of what is expected; masked entries may be infinite."""
    alike = expected.isfinite() == found.isfinite()
    if not alike.all():
        return float("inf")
    expected, found = expected.nan_to_num(0, 0, 0), found.nan_to_num(0, 0, 0)
    norm = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(expected - found) / norm.clamp(min=torch.finfo(norm.dtype).tiny))


def _tolerance(model: nn.Module) -> float:
    single = all(parameter.dtype.itemsize >= 4 for parameter in model.parameters() if parameter.is_floating_point())
    return _CLOSE if single and torch.get_float32_matmul_precision() == "highest" else _COARSE
