"""Holds and checks the arguments of the callback that removes experts; prunes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.callbacks.engine.step import Traced, check_traced
from lightning_prune.pruning.amounts import check_count
from lightning_prune.pruning.arguments import Parts, as_list, listed, plain, told_apart
from lightning_prune.pruning.expert_scores import ExpertCriterion
from lightning_prune.pruning.experts import check_expert_arguments

__all__ = ["ExpertArguments"]


@dataclass(frozen=True, eq=False)
class ExpertArguments:
    """How much and within which limits; :class:`~lightning_prune.callbacks.ExpertPruning` documents each."""

    amount: int | float
    criterion: ExpertCriterion
    batches: int
    module: Parts
    ignore: Sequence[str]
    min_experts: int
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
        check_expert_arguments(where, self.amount, self.criterion, self.module, self.ignore, self.min_experts)
        check_traced(where, self.trace, self.example_inputs)
        check_count(where, "batches", self.batches, 1, "training batches")
        check_count(where, "recalibrate", self.recalibrate, 0, "training batches")

    @property
    def named(self) -> list[Any]:
        """What the user named to be pruned."""
        return listed(self.module)

    def parts(self, model: nn.Module | None) -> dict[str, Any]:
        """Return the arguments that say which experts are pruned, modules by their path once the model is known."""
        return {"ignore": plain(self.ignore, model), **told_apart(self.module, model)}
