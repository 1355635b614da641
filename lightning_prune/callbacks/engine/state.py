"""What changes in the life of a callback that removes units, and what of it a checkpoint remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_prune.callbacks.engine.example_inputs import is_plain
from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import Footprint
from lightning_prune.measure.latency import Shapes
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.pruning.arguments import Amount
from lightning_prune.pruning.budget import Budget, Dense
from lightning_prune.reports import LayerCost
from lightning_prune.structure import Pinned

__all__ = ["Start", "State"]


@dataclass
class Start:
    """What was there when pruning began, of which amounts are fractions, and the amount of every group."""

    widths: dict[str, int]
    params: int
    flops: int
    layers: dict[str, LayerCost]
    amount: Amount
    budget: Budget
    shapes: Shapes | None  # where the latency is a target: of the model that it is measured against
    units: int = 0  # that leave in all, as the rehearsal found

    @property
    def dense(self) -> Dense:
        """The same, as plans want it."""
        return Dense(self.widths, Footprint(self.params, self.flops))


@dataclass
class State:
    """Everything that changes in the life of a callback."""

    start: Start | None = None
    example: ExampleInputs | None = None  # of the first batch, which a resumed run may not see again
    inputs: ExampleInputs | None = None
    flops: FlopCount | None = None  # of the model as it stands; None where it is to be counted
    widths: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # groups whose cut could not be proved, and why
    pinned: list[Pinned] = field(default_factory=list)  # as the last trace found
    branching: list[str] = field(default_factory=list)  # the same
    warned: bool = False  # that less leaves than was asked
    latency: float = 1.0  # share of it that was left after the last cut, where it is a target

    def remembered(self) -> dict[str, Any]:
        """Return what a checkpoint shall remember, as plain numbers and tensors."""
        start = self.start
        return {
            "widths": dict(self.widths),
            "refused": dict(self.refused),
            "latency": self.latency,
            "example": self.example if is_plain(self.example) else None,
            "start": None if start is None else {
                "widths": dict(start.widths),
                "params": start.params,
                "flops": start.flops,
                "layers": {path: list(cost) for path, cost in start.layers.items()},
                "amount": dict(start.amount) if isinstance(start.amount, Mapping) else start.amount,
                "budget": asdict(start.budget),
                "shapes": None if start.shapes is None else asdict(start.shapes),
                "units": start.units,
            },
        }  # fmt: skip

    def take_up(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        start = remembered["start"]
        self.latency = remembered["latency"]
        self.widths, self.refused = dict(remembered["widths"]), dict(remembered["refused"])
        self.example, self.start = remembered["example"], None
        if start is not None:
            layers = {path: LayerCost(*cost) for path, cost in start["layers"].items()}
            shapes = None if start["shapes"] is None else Shapes(**start["shapes"])
            self.start = Start(**{**start, "layers": layers, "budget": Budget(**start["budget"]), "shapes": shapes})
