"""The base of strategies that remove modules as a whole: layers, or experts of mixtures; chooses nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_prune.algorithms.schedules import FewUnits, Schedule
from lightning_prune.callbacks.engine.example_inputs import on_device_of
from lightning_prune.callbacks.engine.expert_arguments import ExpertArguments
from lightning_prune.callbacks.engine.layer_arguments import LayerArguments
from lightning_prune.callbacks.engine.networks import networks_left_alone
from lightning_prune.callbacks.engine.refusals import refuse_removal
from lightning_prune.callbacks.engine.sharding import is_model_parallel, refuse_tensor_parallel
from lightning_prune.callbacks.engine.step import refuse_step
from lightning_prune.callbacks.engine.strategy import Run, Strategy
from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import Part, count
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import check_optimizers, part_of
from lightning_prune.reports import LayerCost, layer_costs

__all__ = ["WholeRemoval"]


class WholeRemoval(Strategy):
    """What removing layers and removing experts have in common.

    Args:
        arguments: What the user asked for.

    Attributes:
        state: Everything that changes.
    """

    arguments: LayerArguments | ExpertArguments
    kind: str
    """What is removed, for messages."""
    state_class: type[Any]
    or_together: str = ""
    """What else can be done in place of two callbacks in one run, for messages."""
    refused_split: str = ""
    """Why a model that FSDP2 splits is refused, and what to do; empty if it can be put together for a pruning step."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.example_inputs = arguments.example_inputs
        self.traces = arguments.trace
        self.state = self.state_class()
        self._alone: dict[str, str] = {}
        self._inputs: ExampleInputs | None = None
        self._flops: FlopCount | None = None  # of the model as it stands, once counted

    @property
    @abstractmethod
    def before(self) -> tuple[int, int]:
        """Parameters and multiply-adds of the dense model."""

    @abstractmethod
    def kept(self) -> dict[str, float]:
        """Return what is kept of what is removed here, by the names under which it is logged."""

    @property
    def inputs(self) -> ExampleInputs:
        """What the model is looked at on."""
        assert self._inputs is not None  # found before anything is looked at
        return self._inputs

    def part(self, pl_module: LightningModule) -> Part:
        """Return the part of the model that is counted."""
        return part_of(pl_module, self.arguments.module, self._alone)

    def flops(self, pl_module: LightningModule) -> FlopCount:
        """Return the multiply-adds of the model as it stands."""
        if self._flops is None:
            self._flops = count(pl_module, self.inputs)
        return self._flops

    def costs(self, pl_module: LightningModule) -> dict[str, LayerCost]:
        """Return what each module with weights costs, for the report."""
        return layer_costs(pl_module, self.flops(pl_module))

    def check_schedule(self, where: str, schedule: Schedule) -> None:
        """Refuse schedules that count filters."""
        if isinstance(schedule, FewUnits):
            raise ValueError(
                f"{where}(schedule={schedule!r}): it counts filters, and {self.kind} leave here. Use Linear."
            )

    def refuse(self, run: Run) -> None:
        """Refuse a run in which nothing can be removed as a whole."""
        refuse_removal(run.where, run.trainer, run.module)
        refuse_step(run.where, self.arguments.trace, run.module)
        refuse_tensor_parallel(run.where, run.trainer, f"plans name {self.kind} that would be gone")
        if self.refused_split and is_model_parallel(run.trainer):
            raise PruningError(f"{run.where}: {self.refused_split}")
        others = [member for member in run.members if member is not run.own]
        if others:
            raise PruningError(
                f"{run.where} and {others[0].where}: what removes {self.kind} prunes alone in its run. Fit again with "
                f"the other callback{self.or_together}."
            )

    def look(self, run: Run, batch: Any | None) -> bool:
        """Find what the model is looked at on, and what is left alone; return whether inputs are known."""
        check_optimizers(run.where, run.trainer.optimizers)
        inputs = run.inputs.find(run.module, self.traces, [self.example_inputs], batch)
        if inputs is None:
            return False
        self._alone = networks_left_alone(run, self.arguments.named)
        self._inputs, self._flops = on_device_of(run.trainer, run.module, inputs), None
        return True

    def before_split(self, pl_module: LightningModule) -> None:
        """Count a model that is whole for a pruning step: one that is split cannot be counted."""
        self.flops(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the dense model and what was removed."""
        plain: dict[str, Any] = self.state.to_plain()
        return plain

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.state = self.state_class.from_plain(state)

    def reset(self) -> None:
        """Start anew, for another model."""
        self.state = self.state_class()

    def release(self) -> None:
        """Forget the counts of the model; no hook was set."""
        self._flops = None
