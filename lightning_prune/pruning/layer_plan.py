"""Selects the layers to remove, one by one, each scored without those before it and verified; removes none itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import WHOLE, Part
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.layer_scores import LayerCriterion, LayerData, score_layers
from lightning_prune.pruning.report_types import RemovedLayer
from lightning_prune.structure.skippable import Depth, is_inside, outermost_of, parts_of
from lightning_prune.surgery.layer_numbers import numbered_layers
from lightning_prune.surgery.pass_through import skip_of
from lightning_prune.surgery.verify_skips import SkipProof, verify_skips

__all__ = ["LayerBudget", "LayerCosts", "LayerPlan", "LayerTarget", "plan_layers"]

LayerTarget = Literal["layers", "params", "flops", "latency"]

_ROUNDING = 1e-9
_NEAR = 0.02  # of a latency: a measurement that misses the target by less counts as reached

Skips = dict[str, dict[str, Any]]
Timing = Callable[[Skips], float]
"""Returns the share of the dense model's latency that is left without some layers."""


@dataclass(frozen=True)
class LayerCosts:
    """What the dense model costs, and each of its layers.

    Attributes:
        params: Parameters of the model, or of the part that is pruned.
        flops: Multiply-adds of one run of it.
        by_layer: Path of a layer -> parameters and multiply-adds that leave with it.
        shares: Path of a layer -> what it counts as, of the outermost layer that it is part of.
    """

    params: int
    flops: int
    by_layer: dict[str, tuple[int, int]]
    shares: dict[str, float]

    @classmethod
    def of(cls, model: nn.Module, depth: Depth, flops: FlopCount, part: Part = WHOLE) -> LayerCosts:
        """Count the model as it stands."""
        by_layer = {path: (layer.params, flops.by_module.get(path, 0)) for path, layer in depth.layers.items()}
        shares: dict[str, float] = {}
        for path in depth.outermost:
            shares[path] = 1.0
            for inside in parts_of(depth, path):
                shares[inside] = depth.layers[inside].params / max(depth.layers[path].params, 1)
        return cls(part.params(model), part.counted(flops), by_layer, shares)

    def gone(self, target: LayerTarget, path: str) -> float:
        """Return what leaves with a layer, as a number of the target; of latency, its multiply-adds."""
        if target == "layers":
            return self.shares[path]
        return float(self.by_layer[path][0 if target == "params" else 1])

    def whole(self, target: LayerTarget) -> float:
        """Return what is there at the start, as a number of the target."""
        if target == "layers":
            return float(sum(1 for share in self.shares.values() if share == 1.0))
        return float(self.params if target == "params" else self.flops)

    def share_gone(self, target: LayerTarget, paths: Iterable[str]) -> float:
        """Return the share of a target that is gone without some layers."""
        gone = sum(self.gone(target, path) for path in outermost_of(paths))
        return gone / max(self.whole(target), 1)


@dataclass(frozen=True)
class LayerBudget:
    """How much is to be removed.

    Attributes:
        amount: Fraction of the target, relative to the dense model.
        target: What it is a fraction of.
        min_layers: Layers that are kept at least.
    """

    amount: float
    target: LayerTarget = "layers"
    min_layers: int = 1

    def check_reach(self, where: str, depth: Depth, costs: LayerCosts, gone: Iterable[str] = ()) -> None:
        """Refuse an amount that is not reached if all but ``min_layers`` layers leave; ``gone`` left before.

        Raises:
            PruningError: Saying how much can be removed at most. Of a latency, only a measurement tells.
        """
        if self.target == "latency":
            return
        left = sorted(costs.gone(self.target, path) for path in depth.outermost)
        before = outermost_of(gone)
        inside = [path for path in before if is_inside(path, depth.outermost)]
        most = sum(left[self.min_layers :]) + sum(costs.gone(self.target, path) for path in before)
        most -= sum(costs.gone(self.target, path) for path in inside)  # they count with the layers around them
        share = most / max(costs.whole(self.target), 1)
        asked = self.amount
        if self.target == "layers":
            asked = math.ceil(asked * costs.whole("layers") - _ROUNDING) / max(costs.whole("layers"), 1)
        if asked > share + _ROUNDING:
            raise PruningError(
                f"{where}(amount={self.amount:g}, target={self.target!r}): at most {share:.1%} of the {self.target} "
                "can be removed with the layers that must be kept. Lower amount, or min_layers, or the list of ignore."
            )


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The layers to remove.

    Attributes:
        skips: Path of a layer -> what is returned in its place; those of before, too.
        removed: The layers that this plan adds, in the order in which they were chosen.
        proof: What was verified of the last removal.
        refused: Path of a layer -> why its removal could not be verified.
        reached: Share of the target that is then removed.
        short: Why that is less than asked; else empty.
        latency_kept: Share of the latency that is left, where that is the target.
    """

    skips: Skips
    removed: tuple[RemovedLayer, ...]
    proof: SkipProof
    refused: dict[str, str]
    reached: float
    short: str
    latency_kept: float | None = None


def plan_layers(
    model: nn.Module,
    example_inputs: ExampleInputs,
    depth: Depth,
    costs: LayerCosts,
    budget: LayerBudget,
    criterion: LayerCriterion,
    data: LayerData,
    gone: Mapping[str, RemovedLayer] | None = None,
    timing: Timing | None = None,
    refused: Mapping[str, str] | None = None,
) -> LayerPlan:
    """Select layers until so much of the target is gone.

    Each step scores all layers of the model without those chosen before, and takes the one that loses least for what it
    saves. Its removal is verified. A layer whose removal cannot be verified is kept.

    Args:
        model: The model as it stands, left as found.
        example_inputs: What removals are verified on.
        depth: The layers that are still there.
        costs: What the dense model and its layers cost.
        budget: How much is to be removed.
        criterion: How layers are scored.
        data: The batches on which they are.
        gone: Layers of the dense model that were removed before.
        timing: Measures the latency that is left, where that is the target.
        refused: Path of a layer -> why it could not be verified before.
    """
    before = dict(gone or {})
    state = _State(depth, costs, budget, before)
    skips: Skips = {}
    removed: list[RemovedLayer] = []
    reasons = dict(refused or {})
    proof = SkipProof()
    kept = timing({}) if timing is not None and budget.target == "latency" else None
    while not state.enough(kept):
        candidates = state.candidates(skips, reasons)
        if not candidates:
            break
        scores = score_layers(model, depth, candidates, criterion, data, skips)
        best = min(candidates, key=lambda path: state.loss_per_saving(path, scores[path], skips))
        wider = _with(skips, best, skip_of(depth.layers[best]))
        found = verify_skips(model, example_inputs, wider)
        if found.wrong and numbered_layers(model):
            # Some code does more with the number of a layer than to find its cache: then the others keep theirs.
            numbers_kept = _with(skips, best, skip_of(depth.layers[best], renumber=False))
            other = verify_skips(model, example_inputs, numbers_kept)
            if not other.wrong:
                wider, found = numbers_kept, other
        if found.wrong:
            reasons[best] = found.wrong
            continue
        params, flops = state.saved(best, skips)
        skips, proof = wider, found
        removed.append(RemovedLayer(best, scores[best], params, flops))
        state.note(skips)
        if kept is not None and timing is not None:
            kept = timing(skips)
    short = "" if state.enough(kept) else _short(state, budget, kept, reasons)
    return LayerPlan(skips, tuple(removed), proof, reasons, state.reached(kept), short, kept)


class _State:
    """How far a plan has come."""

    def __init__(
        self, depth: Depth, costs: LayerCosts, budget: LayerBudget, before: Mapping[str, RemovedLayer]
    ) -> None:
        self._depth, self._costs, self._budget = depth, costs, budget
        self._target = budget.target
        self._before = list(before)
        self._gone = self._layers = 0.0
        self.note({})

    def enough(self, latency_kept: float | None) -> bool:
        """Return whether so much is gone as was asked."""
        if latency_kept is not None:
            return latency_kept <= (1 - self._budget.amount) * (1 + _NEAR)
        return self._gone >= self._asked - _ROUNDING * max(self._asked, 1)

    @property
    def _asked(self) -> float:
        asked = self._budget.amount * self._costs.whole(self._target)
        return math.ceil(asked - _ROUNDING) if self._target == "layers" else asked

    def reached(self, latency_kept: float | None) -> float:
        """Return the share of the target that is gone."""
        if latency_kept is not None:
            return 1 - latency_kept
        return self._gone / max(self._costs.whole(self._target), 1)

    def candidates(self, skips: Skips, reasons: Mapping[str, str]) -> list[str]:
        """Return the layers that may go next."""
        found = []
        left = self._costs.whole("layers") - self._layers
        for path in self._depth.layers:
            if path in skips or path in reasons or is_inside(path, skips):
                continue
            share = self._costs.shares[path] - sum(self._costs.shares[part] for part in self._inside(path, skips))
            if left - share >= self._budget.min_layers - _ROUNDING:
                found.append(path)
        return found

    def loss_per_saving(self, path: str, score: float, skips: Skips) -> float:
        """Return the score per unit of the target that the layer saves."""
        inside = self._inside(path, skips)
        saved = self._costs.gone(self._target, path) - sum(self._costs.gone(self._target, part) for part in inside)
        # What gains by being removed gains more for less; the order among losses is by loss per saving.
        return score / max(saved, _ROUNDING) if score > 0 else score * max(saved, _ROUNDING)

    def saved(self, path: str, skips: Skips) -> tuple[int, int]:
        """Return the parameters and multiply-adds that leave with a layer, parts of which may have left before."""
        params, flops = self._costs.by_layer[path]
        for part in self._inside(path, skips):
            params -= self._costs.by_layer[part][0]
            flops -= self._costs.by_layer[part][1]
        return params, flops

    def note(self, skips: Skips) -> None:
        """Count what is gone without these layers and those of before; a part counts as one with its layer."""
        gone = outermost_of([*self._before, *skips])
        self._gone = sum(self._costs.gone(self._target, path) for path in gone)
        self._layers = sum(self._costs.shares[path] for path in gone)

    def _inside(self, path: str, skips: Skips) -> list[str]:
        gone = outermost_of([*self._before, *skips])
        return [part for part in gone if is_inside(part, [path])]


def _with(skips: Skips, path: str, skip: dict[str, Any]) -> Skips:
    """Add a layer; those inside of it leave with it."""
    left = {other: own for other, own in skips.items() if not other.startswith(f"{path}.")}
    return {**left, path: skip}


def _short(state: _State, budget: LayerBudget, latency_kept: float | None, reasons: Mapping[str, str]) -> str:
    message = f"asked to prune {budget.amount:.1%} of the {budget.target}, pruned {state.reached(latency_kept):.1%}: "
    if not reasons:
        return f"{message}min_layers={budget.min_layers} keeps the other layers."
    listed = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
    return f"{message}layers whose removal could not be verified are kept ({listed})."
