"""Finds, in a run, inputs that the model's forward accepts: from the user, the module or the first training batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.callbacks.engine.step import Traced, instead_of_forward
from lightning_prune.model.calls import ExampleInputs, hold_nothing, refuse_shapeless, run, tensors_in, undisturbed
from lightning_prune.model.errors import PruningError

__all__ = ["RunInputs", "batch_as_inputs", "inputs_of", "is_plain", "on_device_of"]


def on_device_of(trainer: Trainer, pl_module: LightningModule, inputs: ExampleInputs) -> ExampleInputs:
    """Bring the first process's inputs to the module's device and to the precision that its forward gets."""
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach(), inputs)
    inputs = trainer.strategy.broadcast(move_data_to_device(inputs, torch.device("cpu")))  # all decide on the same
    inputs = move_data_to_device(inputs, pl_module.device)
    return trainer.precision_plugin.convert_input(inputs)  # type: ignore[no-any-return]


def batch_as_inputs(pl_module: LightningModule, batch: Any) -> ExampleInputs:
    """Find what part of a training batch the module's forward takes; of the batch one example, where that works.

    Raises:
        PruningError: If forward accepts none of the parts tried.
    """
    refuse_shapeless(pl_module)
    failures = []
    for told, inputs in _candidates(pl_module, batch):
        for found in (_one_example(inputs), inputs):
            if found is None:
                continue
            failure = _failure(pl_module, found)
            if failure is None:
                return found
        failures.append(f"{told}: {failure}")
    raise PruningError(
        f"{type(pl_module).__name__}.forward accepts nothing of the first training batch ("
        + "; ".join(failures)
        + "). "
        "Pass example_inputs=, or set the module's example_input_array, to what forward takes."
    )


def inputs_of(pl_module: LightningModule, batches: Iterable[Any]) -> Iterator[ExampleInputs]:
    """Yield of each batch, whole, what the module's forward takes.

    Raises:
        PruningError: If forward accepts none of the parts tried.
    """
    place: int | None = None
    for batch in batches:
        candidates = list(_candidates(pl_module, batch))
        if place is None:
            failures = [_failure(pl_module, inputs) for _, inputs in candidates]
            if None not in failures:
                tried = "; ".join(f"{told}: {why}" for (told, _), why in zip(candidates, failures, strict=True))
                raise PruningError(
                    f"{type(pl_module).__name__}.forward accepts nothing of the training batches ({tried}), on which "
                    "the pruning callback runs it. Let forward take the batch, its first part or its keys."
                )
            place = failures.index(None)
        yield candidates[place][1]


def is_plain(inputs: ExampleInputs | None) -> bool:
    """Tell whether a checkpoint that is loaded with ``weights_only=True`` may hold the inputs."""
    leaves = pytree.tree_leaves(inputs)
    return all(type(leaf) in (Tensor, bool, int, float, complex, str, bytes, type(None)) for leaf in leaves)


class RunInputs:
    """The example inputs of a run. One example of the first training batch is kept, which a resumed run may not see."""

    def __init__(self) -> None:
        """Start without an example."""
        self.example: ExampleInputs | None = None

    def find(
        self, pl_module: LightningModule, traced: Traced, given: Iterable[Any], batch: Any | None
    ) -> ExampleInputs | None:
        """Return what the model is to be traced on, or None if that is not known before the next batch.

        Args:
            pl_module: The module.
            traced: What of it is traced.
            given: What callbacks were given as ``example_inputs``, or None; the first counts.
            batch: The first training batch, once it is here.
        """
        if batch is not None and hold_nothing(batch):
            batch = None
        if traced != "forward":  # a whole batch is too much for a checkpoint: a resumed run takes its own first one
            return None if batch is None else instead_of_forward(traced, batch)
        if batch is not None:
            self.example = batch_as_inputs(pl_module, batch)
        known = [*given, pl_module.example_input_array, self.example]
        return next((inputs for inputs in known if inputs is not None), None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: the example, where a checkpoint may hold it."""
        return {"example": self.example if is_plain(self.example) else None}


def _failure(pl_module: LightningModule, inputs: ExampleInputs) -> str | None:
    try:
        with undisturbed(pl_module):
            run(pl_module, pytree.tree_map_only(Tensor, torch.clone, inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _candidates(pl_module: LightningModule, batch: Any) -> Iterator[tuple[str, ExampleInputs]]:
    """Yield what forward may take, most usual first: the first part of the batch, named parts, all of it."""
    if isinstance(batch, tuple | list) and batch:
        yield from _candidates(pl_module, batch[0]) if not isinstance(batch[0], Tensor) else [("batch[0]", batch[0])]
        yield "*batch", tuple(batch)
    if isinstance(batch, Mapping):
        parameters = inspect.signature(pl_module.forward).parameters.values()
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        named = {str(key): value for key, value in batch.items() if takes_any or key in names}
        if named:
            yield "**batch", named
    yield "batch", (batch,)


def _one_example(inputs: ExampleInputs) -> ExampleInputs | None:
    """Return the first example alone, where all tensors agree on how many there are."""
    sizes = {tensor.shape[0] if tensor.dim() else -1 for tensor in tensors_in(inputs)}
    if len(sizes) != 1 or sizes <= {-1, 0, 1}:
        return None
    # a copy: a slice would keep the whole batch in memory
    one: ExampleInputs = pytree.tree_map_only(Tensor, lambda tensor: tensor[:1].detach().clone(), inputs)
    return one
