"""Holds, in a run, the channel groups of the model as it stands and what it costs; prunes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightning.pytorch import LightningModule

from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import Part, count
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.pruning.arguments import part_of
from lightning_prune.pruning.left_alone import prunable_groups
from lightning_prune.pruning.uniform import with_one_width
from lightning_prune.structure import Keep, Structure
from lightning_prune.surgery import find_groups, recipe_of

__all__ = ["Narrow", "TracedModel", "written_with"]

Narrow = Callable[[LightningModule, Structure, ExampleInputs], Structure]
"""Leaves out groups that a criterion cannot score."""


class TracedModel:
    """The inputs that a run's model is traced on, and what was found on them.

    Args:
        arguments: What the user asked for.
        narrow: Leaves out groups that the criterion cannot score.
    """

    def __init__(self, arguments: FilterArguments, narrow: Narrow | None) -> None:
        self._arguments = arguments
        self._narrow = narrow
        self.alone: dict[str, str] = {}  # networks that are not pruned, and why
        self._inputs: ExampleInputs | None = None
        self._flops: FlopCount | None = None  # of the model as it stands, once counted

    @property
    def inputs(self) -> ExampleInputs:
        """What the model is traced on."""
        assert self._inputs is not None  # found before anything is traced
        return self._inputs

    def part(self, pl_module: LightningModule) -> Part:
        """Return the part of the model that is counted."""
        return part_of(pl_module, self._arguments.module, self.alone)

    def trace_on(self, inputs: ExampleInputs) -> None:
        """Trace the model on these inputs from now on."""
        self._inputs, self._flops = inputs, None

    def changed(self) -> None:
        """Count anew: the model is another one."""
        self._flops = None

    def groups(self, pl_module: LightningModule) -> Structure:
        """Return all channel groups of the model as it stands."""
        return find_groups(pl_module, self.inputs)

    def prunable(
        self, pl_module: LightningModule, refused: Mapping[str, str], structure: Structure | None = None
    ) -> Structure:
        """Return the groups that may be pruned: not ignored, nor refused earlier; the recipe notes what may change."""
        structure = self.groups(pl_module) if structure is None else structure
        recipe_of(pl_module).note((a.module, a.name) for a in structure.ledger.attributes)
        part = part_of(pl_module, self._arguments.module)
        structure = prunable_groups(pl_module, structure, self._arguments.ignore, part, self.alone)
        structure = structure.without_each({name: why for name, why in refused.items() if name in structure.groups})
        structure = with_one_width(pl_module, structure) if self._arguments.uniform else structure
        return structure if self._narrow is None else self._narrow(pl_module, structure, self.inputs)

    def count(self, pl_module: LightningModule, structure: Structure, keep: Keep = MappingProxyType({})) -> None:
        """Count the multiply-adds of the model as it stands.

        Args:
            pl_module: The model.
            structure: Its channel groups, before the last cut if there was one.
            keep: The units of every group that this cut kept.
        """
        self._flops = count(pl_module, self.inputs, structure, keep)

    def flops(self, pl_module: LightningModule) -> FlopCount:
        """Return the multiply-adds of the model as it stands, as last counted."""
        if self._flops is None:
            self._flops = count(pl_module, self.inputs)
        return self._flops


def written_with(structure: Structure) -> list[str]:
    """Return the tensors that a cut of all groups would write."""
    return [slot.tensor for group in structure.groups.values() for slot in group.slots]
