"""Holds and checks the arguments of callbacks that remove layers; prunes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.callbacks.engine.step import Traced, check_traced
from lightning_prune.pruning.amounts import check_count
from lightning_prune.pruning.arguments import Parts, as_list, check_module, listed, plain, told_apart
from lightning_prune.pruning.layer_plan import LayerBudget, LayerTarget
from lightning_prune.pruning.layer_scores import LayerCriterion
from lightning_prune.pruning.layers import check_layer_arguments

__all__ = ["LayerArguments"]


@dataclass(frozen=True, eq=False)
class LayerArguments:
    """What, how much and within which limits; :class:`~lightning_prune.LayerPruning` documents each."""

    amount: float
    criterion: LayerCriterion
    target: LayerTarget
    batches: int
    module: Parts
    ignore: Sequence[str]
    min_layers: int
    repair: bool
    example_inputs: Any
    recalibrate: int
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
        check_layer_arguments(where, self.amount, self.criterion, self.target, self.min_layers, self.ignore)
        check_module(where, self.module, self.target)
        check_traced(where, self.trace, self.example_inputs)
        check_count(where, "batches", self.batches, 1, "training batches")
        check_count(where, "recalibrate", self.recalibrate, 0, "training batches")

    @property
    def budget(self) -> LayerBudget:
        """What ``amount`` is a fraction of, and how many layers are kept."""
        return LayerBudget(self.amount, self.target, self.min_layers)

    @property
    def named(self) -> list[Any]:
        """What the user named to be pruned."""
        return listed(self.module)

    def parts(self, model: nn.Module | None) -> dict[str, Any]:
        """Return the arguments that say which layers are pruned, modules by their path once the model is known."""
        return {"ignore": plain(self.ignore, model), **told_apart(self.module, model)}
