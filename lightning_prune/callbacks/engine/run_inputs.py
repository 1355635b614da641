"""Knows which example inputs a run's models are traced on; runs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule

from lightning_prune.callbacks.engine.example_inputs import batch_as_inputs, is_plain
from lightning_prune.callbacks.engine.step import Traced, instead_of_forward
from lightning_prune.model.calls import ExampleInputs, hold_nothing

__all__ = ["RunInputs"]


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
