"""Refits what reads units that are to leave, so that it gives what it gave with them; leaves the model as found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.solvers.least_squares import refit
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import Pair, gather_pair
from lightning_prune.measure.products import Products, find_products
from lightning_prune.measure.unrolled import Reading
from lightning_prune.model.progress_bars import each
from lightning_prune.pruning.layerwise import naming_weight
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.report_types import Repair
from lightning_prune.structure import named_tensors
from lightning_prune.surgery import Cut, temporarily_cut
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.resize import narrowed

__all__ = ["DAMPING", "repaired"]

DAMPING = 0.01  # share of the inputs' mean variance


def repaired(
    plan: Plan,
    products: Products,
    calibration: Calibration,
    damping: float = DAMPING,
    progress: bool = False,
) -> Plan:
    """Refit all weights that sum over pruned units, and their biases, to the outputs of the whole model.

    Each is fitted to the inputs that the slim model gives it, its earlier layers refitted. This takes two runs over the
    data for each weight.

    Args:
        plan: The verified cut. Its model is left as found.
        products: Which weights multiply what.
        calibration: The data on which outputs are kept.
        damping: Share of the inputs' mean variance with which weights hold on to what they were.
        progress: Whether to show a progress bar.

    Returns:
        The plan with refitted weights and biases; what was refitted, in the order in which it runs; and by name, why
        other weights that sum over pruned units were not.
    """
    model, cut = plan.model, plan.cut
    slots = [slot for name in cut.keep for slot in plan.structure.groups[name].slots]
    readers = {slot.tensor for slot in slots if slot.role == "consumer"}
    with temporarily_cut(model, cut, plan.tensors):
        slim = find_products(model, calibration.batches[0], calibration.forward)
    skipped = {name: products.otherwise.get(name, "its inputs are not seen") for name in sorted(readers)}
    tensors, repairs = dict(plan.tensors), []
    fitting = [name for name in products.readings if name in readers and name not in products.otherwise]
    with each(fitting, "layers refitted", progress) as names:
        for name in names:
            place = _place(model, cut, name, products.readings[name], slim.readings.get(name))
            if place is None:
                skipped[name] = "its groups are not those of before"
                continue
            skipped.pop(name)
            change = partial(temporarily_cut, model, cut, dict(tensors))
            pair = gather_pair(model, products, name, calibration, change, place.groups)
            with naming_weight(name):
                new, repair = _refitted(model, cut, tensors, name, place, pair, slim.readings[name], products, damping)
            tensors |= new
            repairs.append(repair)
    return replace(plan, tensors=tensors, repairs=tuple(repairs), skipped=skipped)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a slim weight's groups, rows and columns lie in the whole one.

    Attributes:
        groups: ``(slim groups,)``.
        rows: ``(slim groups, slim rows)``.
        columns: ``(slim groups, slim columns)``.
    """

    groups: Tensor
    rows: Tensor
    columns: Tensor


def _place(model: nn.Module, cut: Cut, name: str, whole: Reading, slim: Reading | None) -> _Place | None:
    """Find a slim weight in the whole one by laying out its entries' numbers; None where rows mix groups."""
    weight = named_tensors(model)[name]
    numbers = torch.arange(weight.numel()).view(weight.shape)
    laid = whole.rows(numbers)  # (groups, rows, columns)
    at = torch.empty(weight.numel(), dtype=torch.int64)
    at[laid.flatten()] = torch.arange(weight.numel())
    if slim is None:
        return None
    left = at[slim.rows(narrowed(numbers, cut.kept[name]))]
    rows, columns = laid.shape[1:]
    place = _Place(left[:, 0, 0] // (rows * columns), left[:, :, 0] // columns % rows, left[:, 0] % columns)
    same = (place.groups[:, None, None] * rows + place.rows[:, :, None]) * columns + place.columns[:, None]
    if not torch.equal(same, left):
        return None
    return _Place(*(index.to(weight.device) for index in (place.groups, place.rows, place.columns)))


def _refitted(
    model: nn.Module,
    cut: Cut,
    tensors: dict[str, Tensor],
    name: str,
    place: _Place,
    pair: Pair,
    slim: Reading,
    products: Products,
    damping: float,
) -> tuple[dict[str, Tensor], Repair]:
    """Return the new weight, and what is added behind it where that can shift, and what they are worth."""
    own = named_tensors(model)
    rows = products.readings[name].rows(own[name].detach()).to(pair.before)[place.groups]
    rows = rows.gather(1, place.rows[:, :, None].expand(-1, -1, rows.shape[2]))
    start = slim.rows(tensors[name]).to(rows)
    added = products.shifts.get(name)
    moments = pair if added is not None else _uncentred(pair)
    masks = masks_on(model)
    keep = None
    if name in masks:  # what was zeroed before stays zero
        keep = slim.rows(narrowed(masks[name].expand(own[name].shape), cut.kept[name])).to(start.device)
    weights, shift = refit(
        rows, start, moments.cross, moments.after, moments.mean_before, moments.mean_after, damping, keep
    )
    new = {name: slim.weight(weights).to(tensors[name])}
    if added is not None:
        held = tensors.get(added.name, own[added.name].detach())
        new[added.name] = held + added.sign * shift.flatten().to(held)
        if added.name in masks:
            stays = narrowed(masks[added.name], cut.kept.get(added.name, {}))
            new[added.name] = new[added.name] * stays.to(held)
    return new, Repair(name, _lost(rows, start, pair, torch.zeros_like(shift)), _lost(rows, weights, pair, shift))


def _lost(rows: Tensor, new: Tensor, pair: Pair, shift: Tensor) -> float:
    """Return the mean squared change of the outputs, beside their mean square without biases."""
    whole = ((rows @ pair.before) * rows).sum()
    moved = ((new @ pair.after) * new).sum() - 2 * ((rows @ pair.cross) * new).sum()
    means = (new @ pair.mean_after[..., None] - rows @ pair.mean_before[..., None])[..., 0]  # of the change
    change = whole + moved + shift.square().sum() + 2 * (shift * means).sum()
    return float(change / whole) if whole > 0 else 0.0


def _uncentred(pair: Pair) -> Pair:
    """Return the moments that a layer without a bias is fitted by."""
    return replace(pair, mean_before=torch.zeros_like(pair.mean_before), mean_after=torch.zeros_like(pair.mean_after))
