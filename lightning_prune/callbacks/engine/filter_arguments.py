"""Holds and checks the arguments that all callbacks share that remove units; prunes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_prune.callbacks.engine.layer_arguments import LayerArguments
from lightning_prune.callbacks.engine.step import Traced, check_traced
from lightning_prune.pruning.amounts import check_count
from lightning_prune.pruning.arguments import (
    MaxAmount,
    MinWidth,
    Parts,
    amount_by_group,
    as_list,
    check_arguments,
    check_module,
    listed,
    part_of,
    plain,
    told_apart,
    with_ignored,
    within_part,
)
from lightning_prune.pruning.budget import Budget, Scope, Target
from lightning_prune.pruning.layers_and_filters import check_with_layers
from lightning_prune.structure import Structure


@dataclass(frozen=True, eq=False)
class FilterArguments:
    """What, how much and within which limits; :class:`~lightning_prune.FilterL1Pruning` documents each."""

    amount: int | float | dict[str, int | float]
    target: Target
    scope: Scope
    module: Parts
    ignore: Sequence[str]
    round_to: int
    min_width: MinWidth
    max_amount: MaxAmount
    uniform: bool
    layers: bool
    example_inputs: Any
    recalibrate: int
    fade_steps: int
    trace: Traced
    report: bool

    def __post_init__(self) -> None:
        """Hold sequences as lists, as YAML gives them."""
        object.__setattr__(self, "ignore", as_list(self.ignore))

    def check(self, where: str) -> None:
        """Refuse arguments that no model could make sense of.

        Raises:
            ValueError: If an argument is out of range or unknown.
            TypeError: If an argument is of a wrong kind.
        """
        limits = self.round_to, self.min_width, self.max_amount
        check_arguments(where, self.amount, "l1", self.target, self.scope, *limits, self.ignore)
        check_module(where, self.module, self.target)
        check_traced(where, self.trace, self.example_inputs)
        check_count(where, "recalibrate", self.recalibrate, 0, "training batches")
        check_count(where, "fade_steps", self.fade_steps, 0, "optimizer steps")
        if self.layers:
            check_with_layers(where, self.target)
        if self.layers and self.fade_steps:
            raise ValueError(
                f"{where}(layers=True, fade_steps={self.fade_steps}): layers do not fade. Drop one of them."
            )

    def of_layers(self, batches: int, repair: bool) -> LayerArguments | None:
        """Return the arguments of what removes layers, if asked for; how much they make up is found out in the run."""
        if not self.layers or self.target == "filters":  # which is refused
            return None
        return LayerArguments(
            amount=0.0, criterion="loss", target=self.target, batches=batches, module=self.module, ignore=self.ignore,
            min_layers=1, repair=repair, example_inputs=self.example_inputs, recalibrate=self.recalibrate,
            trace=self.trace, report=self.report,
        )  # fmt: skip

    @property
    def budget(self) -> Budget:
        """What ``amount`` is a fraction of, and the limits of each layer."""
        return Budget(self.target, self.scope, self.round_to, self.min_width, self.max_amount)

    @property
    def named(self) -> list[Any]:
        """What the user named to be pruned."""
        return [*(self.amount if isinstance(self.amount, Mapping) else ()), *listed(self.module)]

    def parts(self, model: nn.Module | None) -> dict[str, Any]:
        """Return the arguments that say which channels are pruned, modules by their path once the model is known."""
        amount = sorted(plain(self.amount, model)) if isinstance(self.amount, Mapping) else []
        return {"amount": amount, "ignore": plain(self.ignore, model), **told_apart(self.module, model)}

    def claims(self, pl_module: LightningModule, structure: Structure) -> set[str]:
        """Return the groups whose widths these arguments set."""
        structure = with_ignored(pl_module, structure, self.ignore)
        structure = within_part(structure, part_of(pl_module, self.module))
        amount = amount_by_group(pl_module, structure, self.amount)
        if isinstance(amount, Mapping):
            return {name for name, share in amount.items() if share}
        return set(structure.groups)
