"""Holds and checks the arguments that all callbacks share that remove units; prunes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_prune.callbacks.engine.step import Traced, check_traced
from lightning_prune.pruning.arguments import (
    MaxAmount,
    MinWidth,
    Parts,
    amount_by_group,
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
from lightning_prune.structure import Structure

__all__ = ["FilterArguments"]


@dataclass(frozen=True, eq=False)
class FilterArguments:
    """What, how much and within which limits; :class:`~lightning_prune.FilterL1Pruning` documents each."""

    amount: int | float | dict[str, int | float]
    target: Target
    scope: Scope
    ignore: Sequence[str]
    round_to: int
    example_inputs: Any
    min_width: MinWidth
    max_amount: MaxAmount
    recalibrate: int
    trace: Traced
    module: Parts = None
    report: bool = True
    uniform: bool = False

    def __post_init__(self) -> None:
        """Hold sequences as lists, as YAML gives them."""
        if not isinstance(self.ignore, str):  # one pattern, which ``check`` refuses
            object.__setattr__(self, "ignore", list(self.ignore))

    def check(self, where: str) -> None:
        """Refuse arguments that no model could make sense of.

        Raises:
            ValueError: If an argument is out of range or unknown.
            TypeError: If an argument is of a wrong kind.
        """
        limits = self.round_to, self.min_width, self.max_amount
        check_arguments(where, self.amount, "l1", self.target, self.scope, *limits, self.ignore)
        if not isinstance(self.report, bool):
            raise TypeError(f"{where}(report={self.report!r}): pass True or False.")
        check_module(where, self.module, self.target)
        check_traced(where, self.trace, self.example_inputs)
        recalibrate = self.recalibrate
        if isinstance(recalibrate, bool) or not isinstance(recalibrate, int) or recalibrate < 0:
            raise ValueError(f"{where}(recalibrate={recalibrate!r}): it is a number of training batches, from 0.")

    @property
    def budget(self) -> Budget:
        """What ``amount`` is a fraction of, and the limits of each layer."""
        return Budget(self.target, self.scope, self.round_to, self.min_width, self.max_amount)

    @property
    def named(self) -> list[Any]:
        """What the user named to be pruned."""
        return [*(self.amount if isinstance(self.amount, Mapping) else ()), *listed(self.module)]

    def asked(self, model: nn.Module | None) -> dict[str, Any]:
        """Return the arguments that say how much of what is pruned, as plain values: a resumed run may have others."""
        names = ("amount", "target", "scope", "round_to", "min_width", "max_amount", "uniform", "ignore")
        asked = {name: plain(getattr(self, name), model) for name in names}
        return {**asked, "module": told_apart(self.module, model).get("module")}

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
