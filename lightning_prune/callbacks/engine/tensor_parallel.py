"""Checks that a model computes the same whole and split by tensor parallelism, so that it can be pruned whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.engine.example_inputs import batch_as_inputs, on_device_of, step_on
from lightning_prune.callbacks.engine.sharding import refuse_changed_numbers, tensor_parallel_size
from lightning_prune.callbacks.engine.step import copied
from lightning_prune.model.calls import ExampleInputs, numbers_in, run, same_draws
from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import whole, whole_numbers

__all__ = ["Agreement"]

_CLOSE = 1e-3  # of the norm of the outputs: by how much the order of sums may change single precision
_COARSE = 5e-2  # likewise for half precision, and where single precision is rounded on the way
_ENTRIES = 2**16  # of each output that are compared, about
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
        if size == 1 or self._numbers is None or trainer.ckpt_path is not None:  # whose numbers may be of a slim model
            return
        now = whole_numbers(pl_module)
        divided = {at: was for at, was in self._numbers.items() if was and now.get(at, 0) * size == was}
        refuse_changed_numbers(where, pl_module, divided)

    def look(self, where: str, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> None:
        """Remember a training batch to compare on, while the model is whole.

        Raises:
            PruningError: If the whole model does not run on it.
        """
        if batch is None or self._inputs is not None or tensor_parallel_size(trainer) == 1:
            return
        # a step runs when split, too; forward may not on what is no input of it, such as sequences of odd lengths
        inputs = step_on(pl_module, batch) or batch_as_inputs(pl_module, batch)[1]
        inputs = on_device_of(trainer, pl_module, inputs)
        try:
            _outputs(pl_module, inputs)
        except Exception as error:
            failed = f"{type(pl_module).__name__} does not run as a whole ({type(error).__name__}: {error})"
            raise PruningError(f"{where}: {failed}. {_SAME}") from error
        self._inputs = inputs

    def outputs(self, pl_module: LightningModule) -> _Outputs | None:
        """Return what the model computes; None if nothing is to be compared."""
        return None if self._inputs is None else _outputs(pl_module, self._inputs)

    def refuse_others(self, where: str, pl_module: LightningModule, expected: _Outputs | None) -> None:
        """Refuse a model that is split and does not compute what it computes whole.

        Raises:
            PruningError: Saying by how much they differ.
        """
        if expected is None:
            return
        found = self.outputs(pl_module) or {}
        same = [path for path, sample in expected.items() if path in found and found[path].shapes == sample.shapes]
        apart = max((_distance(expected[path].values, found[path].values) for path in same), default=math.inf)
        if apart > _tolerance(pl_module):
            raise PruningError(
                f"{where}: {type(pl_module).__name__} does not compute the same whole and split by tensor parallelism "
                f"(of {len(same)} outputs that can be compared, one differs by {apart:.1%}). {_SAME}"
            )


class _Sample(NamedTuple):
    """The floating-point outputs of a module: all shapes, and values of evenly spaced entries."""

    shapes: list[torch.Size]
    values: Tensor


_Outputs = dict[str, _Sample]
"""What was returned in all (``""``), and by the modules that it is put together from, by their path."""


def _outputs(pl_module: LightningModule, inputs: ExampleInputs) -> _Outputs:
    """Return what a run of the module gives, gathered from all processes, as a validation would compute it."""
    found: _Outputs = {}

    def keep(path: str, module: nn.Module, args: Any, value: Any) -> None:
        found[path] = _sample(value)

    training = [module for module in pl_module.modules() if module.training]
    buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
    parts = [("forward", pl_module), *pl_module.named_children()]
    hooks = [module.register_forward_hook(partial(keep, path)) for path, module in parts]
    try:
        pl_module.eval()
        with torch.no_grad(), same_draws(), generators_restored([pl_module.device]):
            torch.manual_seed(0)
            found[""] = _sample(run(pl_module, copied(inputs)))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)
    return {path: sample for path, sample in found.items() if len(sample.values)}


def _sample(value: Any) -> _Sample:
    tensors = [whole(tensor).detach() for tensor in numbers_in(value)]
    values = [tensor.flatten()[:: max(1, tensor.numel() // _ENTRIES)].double() for tensor in tensors]
    return _Sample([tensor.shape for tensor in tensors], torch.cat(values) if values else torch.empty(0))


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
