"""Chooses how much of one budget whole layers make up, and how much filters do: by trying on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.footprint import Part, count
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.devices import widened
from lightning_prune.model.errors import OutOfReachError, PruningError
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.pruning.arguments import Modules
from lightning_prune.pruning.layer_plan import LayerBudget, LayerCosts, LayerPlan, LayerTarget, Skips, plan_layers
from lightning_prune.pruning.layer_repair import LayerRepair, repaired_layers
from lightning_prune.pruning.layer_scores import LayerCriterion, LayerData, compared_outputs
from lightning_prune.pruning.layers import apply_layers_, prunable_layers
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.report_types import Report, TriedSplit
from lightning_prune.structure import named_tensors
from lightning_prune.structure.skippable import Depth
from lightning_prune.surgery.pass_through import skip_of
from lightning_prune.surgery.remove_layers import close_gaps_
from lightning_prune.surgery.resize import all_or_nothing

__all__ = ["PlanCut", "Split", "SplitAsk", "apply_split_", "check_with_layers", "choose_split"]

_NOTHING = 1e-6  # of a target: less than any unit
_NEAR = 0.02  # of a latency: a measurement that misses the target by less counts as reached

PlanCut = Callable[[nn.Module, float], Plan]
"""Plans the removal of filters of a model that has lost layers, given a fraction of what it has left of the target."""


@dataclass(frozen=True, eq=False)
class SplitAsk:
    """What is asked of both kinds of units together.

    Attributes:
        amount: Fraction of the target that is pruned, relative to the model as it stands.
        target: What it is a fraction of.
        part: The part of the model that is pruned and counted.
        ignore: Patterns of module paths, or modules, that are not removed.
        alone: Networks that are left alone, and why.
        data: The batches on which layers are scored and candidates compared.
        calibration: What weights behind removed layers are refitted on; None if they are not.
        damping: Share of its mean diagonal entry that is added to the diagonal of every Hessian.
        timing: Measures the share of the latency that is left without some layers, where that is the target.
        copied: Copies the model.
        known: Paths of the layers that may be removed, where the model was pruned before; None for all.
    """

    amount: float
    target: LayerTarget
    part: Part
    ignore: Modules
    alone: dict[str, str]
    data: LayerData
    calibration: Calibration | None
    damping: float
    timing: Callable[[Skips], float] | None = None
    copied: Callable[[nn.Module], nn.Module] = copy.deepcopy
    known: Collection[str] | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """What was chosen.

    Attributes:
        layers: The removal of layers.
        repair: What is refitted behind them.
        filters: The removal of filters that follows, or None if there is none.
        tried: Everything that was tried.
        costs: What the dense model costs.
        kept: Share of the target that is left.
    """

    layers: LayerPlan
    repair: LayerRepair
    filters: Plan | None
    tried: tuple[TriedSplit, ...]
    costs: LayerCosts
    kept: float


def check_with_layers(where: str, target: str) -> None:
    """Refuse a target that layers and filters cannot share."""
    if target == "filters":
        raise ValueError(
            f"{where}(layers=True, target={target!r}): layers and filters share one amount of the params, flops or "
            "latency. Pass a single fraction and one of these targets."
        )


def choose_split(model: nn.Module, example_inputs: ExampleInputs, ask: SplitAsk, plan_cut: PlanCut) -> Split:
    """Try several numbers of layers, let filters make up the rest of the budget, and return what loses least.

    Layers are ordered by how they would be removed one by one. 0, 1, 2, 4, ... of them are tried, and as many as reach
    the target without filters. What is lost is the loss on the batches or, without one, how far outputs move.

    Raises:
        OutOfReachError: If nothing that was tried reaches the target.
    """
    depth, costs, order = _ordered(model, example_inputs, ask)
    tried: list[TriedSplit] = []
    best: Split | None = None
    lowest = float("inf")
    for number in _numbers(len(order.removed)):
        skips = _first_skips(depth, order, number)
        layers = replace(order, skips=skips, removed=order.removed[:number])
        repair = LayerRepair({}, (), {})
        if ask.calibration is not None and skips:
            repair = repaired_layers(model, skips, ask.calibration, ask.damping)
        twin = ask.copied(model)
        apply_layers_(twin, layers, repair)
        left = _left(twin, example_inputs, ask, costs)
        if ask.timing is not None:
            left = ask.timing(skips)
        rest = 1 - (1 - ask.amount) / left
        filters: Plan | None = None
        kept = left
        if rest > (_NEAR if ask.target == "latency" else _NOTHING):
            try:
                filters = plan_cut(twin, rest)
                slim = filters.apply_()
            except PruningError as error:
                tried.append(TriedSplit(number, 1 - left, 0.0, float("nan"), str(error)))
                continue
            kept = _left(twin, example_inputs, ask, costs)
            if ask.timing is not None:
                kept = left * (slim.latency_kept or 1.0)
        lost = _lost(model, twin, ask.data)
        tried.append(TriedSplit(number, 1 - left, left - kept, lost, ""))
        if lost < lowest:
            lowest = lost
            best = Split(layers, repair, filters, (), costs, kept)
    if best is None:
        reasons = "; ".join(f"{each.layers} layers: {each.refused}" for each in tried)
        raise OutOfReachError(
            f"Layers and filters together do not reach {ask.amount:.1%} of the {ask.target}: {reasons} Lower amount."
        )
    return replace(best, tried=tuple(tried))


def apply_split_(
    model: nn.Module, example_inputs: ExampleInputs, split: Split, ask: SplitAsk, optimizers: Iterable[Optimizer]
) -> Report:
    """Remove the layers and the filters that were chosen, both or neither, and report."""
    optimizers = list(optimizers)
    with all_or_nothing(model, optimizers) as undo:
        own = named_tensors(model)
        undo.copy_values([own[name] for name in split.repair.tensors])
        apply_layers_(model, split.layers, split.repair, optimizers)
        filters = split.filters
        cut = None if filters is None else replace(filters, model=model).apply_(optimizers)
        config = close_gaps_(model, example_inputs)
    params, flops = ask.part.params(model), ask.part.counted(count(model, example_inputs))
    proof = split.layers.proof
    modes = " and ".join(proof.modes)
    compared = f"layers: {proof.compared} outputs of {proof.operators} operators compared in {modes} mode"
    report = cut or Report(0, 0, 0, 0, (), {}, (), (), not proof.skipped, "")
    return replace(
        report,
        params_before=split.costs.params, params_after=params, flops_before=split.costs.flops, flops_after=flops,
        proved=report.proved and not proof.skipped,
        proof="; ".join(text for text in (compared if split.layers.removed else "", report.proof) if text),
        latency_kept=split.kept if ask.target == "latency" else None, asked=ask.amount, reached=1 - split.kept,
        repairs=(*split.repair.repairs, *report.repairs),
        skipped={**split.repair.skipped, **report.skipped},
        config=" ".join(text for text in (config, report.config) if text),
        removed=split.layers.removed, tried=split.tried,
    )  # fmt: skip


def _ordered(model: nn.Module, example_inputs: ExampleInputs, ask: SplitAsk) -> tuple[Depth, LayerCosts, LayerPlan]:
    """Return layers in the order in which they would leave if the whole budget were made up of them."""
    depth = prunable_layers(model, example_inputs, ask.part, ask.ignore, ask.alone)
    if ask.known is not None:
        depth = depth.within(ask.known)
    costs = LayerCosts.of(model, depth, count(model, example_inputs), ask.part)
    criterion: LayerCriterion = "influence" if ask.data.loss is None else "loss"
    budget = LayerBudget(ask.amount, ask.target)
    order = plan_layers(model, example_inputs, depth, costs, budget, criterion, ask.data, timing=ask.timing)
    return depth, costs, order


def _numbers(most: int) -> list[int]:
    """Return 0, 1, 2, 4, ... and ``most``."""
    found = [0]
    number = 1
    while number < most:
        found.append(number)
        number *= 2
    return [*found, most] if most else found


def _first_skips(depth: Depth, order: LayerPlan, number: int) -> Skips:
    """Return the first layers that would leave; those inside of another leave with it."""
    skips: Skips = {}
    for layer in order.removed[:number]:
        skips = {path: skip for path, skip in skips.items() if not path.startswith(f"{layer.path}.")}
        skips[layer.path] = order.skips.get(layer.path) or skip_of(depth.layers[layer.path])
    return skips


def _left(twin: nn.Module, example_inputs: ExampleInputs, ask: SplitAsk, costs: LayerCosts) -> float:
    """Return the share of the parameters or FLOPs that is left in a pruned copy."""
    if ask.target == "params":
        return ask.part.params(twin) / max(costs.params, 1)
    return ask.part.counted(count(twin, example_inputs)) / max(costs.flops, 1)


def _lost(model: nn.Module, twin: nn.Module, data: LayerData) -> float:
    """Return the mean loss of a pruned copy or, without a loss, the mean squared distance of its outputs."""
    found: list[float] = []
    for batch in data.batches:
        if data.loss is not None:
            with undisturbed(twin), unchanged(batch), torch.no_grad():
                found.append(float(data.loss(twin, batch)))
            continue
        whole, slim = (compared_outputs(each, data, batch, {}) for each in (model, twin))
        pairs = [(one, other) for one, other in zip(whole, slim, strict=False) if one.shape == other.shape]
        moved = sum(float(widened(one - other).square().sum()) for one, other in pairs)
        found.append(moved / max(sum(one.numel() for one, _ in pairs), 1))
    return float(data.over_processes(torch.tensor(sum(found) / len(found), dtype=torch.float64)))
