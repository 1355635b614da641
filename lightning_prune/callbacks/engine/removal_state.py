"""Holds the state of a callback that removes units, and its form in checkpoints; changes no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning.pytorch import LightningModule

from lightning_prune.callbacks.engine.fade import Fade
from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import Footprint, Part
from lightning_prune.measure.latency import Shapes, shapes_of
from lightning_prune.pruning.amounts import Amount, in_fractions
from lightning_prune.pruning.arguments import amount_by_group, budget_by_group
from lightning_prune.pruning.budget import Budget, Dense
from lightning_prune.reports import LayerCost, layer_costs
from lightning_prune.structure import Pinned, Structure

__all__ = ["RemovalState", "Start"]


@dataclass
class Start:
    """The model when pruning began, which amounts are relative to, and the amount of every group."""

    widths: dict[str, int]
    params: int
    flops: int
    layers: dict[str, LayerCost]
    amount: Amount
    budget: Budget
    shapes: Shapes | None  # where the latency is a target: of the model that it is measured against
    units: int = 0  # that are removed in all, as the rehearsal found

    @classmethod
    def of(
        cls,
        pl_module: LightningModule,
        structure: Structure,
        arguments: FilterArguments,
        flops: FlopCount,
        part: Part,
    ) -> Start:
        """Return what is there now of a part of the model."""
        widths = {name: group.width for name, group in structure.groups.items()}
        amount = amount_by_group(pl_module, structure, arguments.amount)
        return cls(
            widths=widths,
            params=part.params(pl_module),
            flops=part.counted(flops),
            layers=layer_costs(pl_module, flops),
            amount=in_fractions(amount, widths, arguments.scope, "units"),
            budget=replace(budget_by_group(pl_module, structure, arguments.budget), part=part),
            shapes=shapes_of(pl_module, structure) if arguments.target == "latency" else None,
        )

    def without_layers(self, pl_module: LightningModule, structure: Structure, arguments: FilterArguments) -> Start:
        """Return the same for the groups of a model that has lost layers."""
        found = replace(self, widths=dict(self.widths))
        found.follow(pl_module, structure, arguments)
        return found

    def follow(self, pl_module: LightningModule, structure: Structure, arguments: FilterArguments) -> None:
        """Follow other arguments than those under which pruning began; the dense model stays the reference."""
        for name, group in structure.groups.items():
            self.widths.setdefault(name, group.width)  # ignored until now, so it is whole
        amount = amount_by_group(pl_module, structure, arguments.amount)
        sizes = self.widths if arguments.scope == "global" else {name: self.widths[name] for name in structure.groups}
        self.amount = in_fractions(amount, sizes, arguments.scope, "units")
        self.budget = replace(budget_by_group(pl_module, structure, arguments.budget), part=self.budget.part)
        self.units = 0

    @property
    def dense(self) -> Dense:
        """The same, as plans want it."""
        return Dense(self.widths, Footprint(self.params, self.flops))

    def to_plain(self) -> dict[str, Any]:
        """Return the same as dicts, lists, strings and numbers."""
        part = self.budget.part
        budget = {**asdict(self.budget), "part": [list(part.inside), list(part.outside)]}
        return {**asdict(self), "budget": budget, "layers": {path: list(cost) for path, cost in self.layers.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Start:
        """Return what :meth:`to_plain` made plain."""
        layers = {path: LayerCost(*cost) for path, cost in plain["layers"].items()}
        part = Part(*map(tuple, plain["budget"]["part"]))
        budget = Budget(**{**plain["budget"], "part": part})
        shapes = None if plain["shapes"] is None else Shapes(**plain["shapes"])
        return cls(**{**plain, "layers": layers, "budget": budget, "shapes": shapes})


@dataclass
class RemovalState:
    """Everything that changes in the life of a callback that removes units.

    Attributes:
        start: The dense model, once it was traced.
        widths: Group name -> units left after the last pruning step.
        latency: Share of the latency that was left then, where it is a target.
        refused: Groups whose cut could not be verified, and why.
        pinned: Channels that are not prunable, as the last trace found.
        branching: Modules whose code goes by numbers of its input, likewise.
        warned: Whether it was said that less is removed than was asked.
        fade: The units that are being driven to zero for the next pruning step.
    """

    start: Start | None = None
    widths: dict[str, int] = field(default_factory=dict)
    latency: float = 1.0
    refused: dict[str, str] = field(default_factory=dict)
    pinned: list[Pinned] = field(default_factory=list)
    branching: list[str] = field(default_factory=list)
    warned: bool = False
    fade: Fade | None = None

    def regrouped(self, structure: Structure) -> dict[str, str]:
        """Return the groups that the dense model did not have, or not so many units of, and why they stay.

        Of a group that an earlier pruning step left one unit of, say the last of the groups of a convolution, or the
        last attention head, the channels inside of that unit may be told apart now. Where two widths have become equal,
        channels may look tied that are not. Amounts do not speak of these.
        """
        assert self.start is not None  # a dense model was traced
        stay = {}
        for name, group in structure.groups.items():
            left = self.widths.get(name, self.start.widths.get(name, 0))
            if group.width > left:
                stay[name] = "pruning steps left its channels tied in other ways than in the dense model"
        return stay

    def to_plain(self) -> dict[str, Any]:
        """Return the state to save."""
        return {
            "widths": dict(self.widths),
            "refused": dict(self.refused),
            "latency": self.latency,
            "start": None if self.start is None else self.start.to_plain(),
            "fade": None if self.fade is None else self.fade.to_plain(),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RemovalState:
        """Return a saved state."""
        start = None if plain["start"] is None else Start.from_plain(plain["start"])
        fade = None if plain["fade"] is None else Fade.from_plain(plain["fade"])
        return cls(start, dict(plain["widths"]), plain["latency"], dict(plain["refused"]), fade=fade)
