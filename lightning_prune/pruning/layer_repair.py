"""Refits what is left of a model without some layers, so that it gives what it gave with them; leaves it as found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.solvers.least_squares import refit
from lightning_prune.measure.branches import Made, made_by
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.products import Products, find_products, watch_inputs
from lightning_prune.measure.unrolled import Reading
from lightning_prune.model.devices import widened, widest_float
from lightning_prune.model.progress_bars import each
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.pruning.layerwise import naming_weight
from lightning_prune.pruning.report_types import Repair
from lightning_prune.structure import named_tensors
from lightning_prune.structure.tensor_names import exchange_
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.skipped import temporarily_skipped

__all__ = ["LayerRepair", "repaired_layers"]

Skips = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class LayerRepair:
    """What a repair changes.

    Attributes:
        tensors: Name of a parameter or buffer -> its new value.
        repairs: What was refitted, in the order in which it runs.
        skipped: Name of a weight whose inputs have changed -> why it was not refitted.
    """

    tensors: dict[str, Tensor]
    repairs: tuple[Repair, ...]
    skipped: dict[str, str]


def repaired_layers(
    model: nn.Module, skips: Skips, calibration: Calibration, damping: float, progress: bool = False
) -> LayerRepair:
    r"""Refit the weights behind removed layers, one after the other, to what the whole model computes.

    A weight W with inputs x in the whole model, and y without the layers, is fitted to
    :math:`\hat W y + s \approx W x`. Where what it makes is added to a stream, as at the end of a residual branch, it
    is fitted to compensate for the stream as well, :math:`W x + (r_x - r_y) / a`, with the streams r and the gain a of
    what lies between (BatchNorm, a scale): so a branch takes over from the layers in front of it that were removed.

    Args:
        model: The whole model.
        skips: Path of a layer -> what is returned in its place.
        calibration: The data on which outputs are kept.
        damping: Share of the inputs' mean variance with which weights hold on to what they were.
        progress: Whether to show a progress bar.

    References:
        He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017 (arXiv:1707.06168), sec. 3.2,
        for branches that compensate for the stream.
    """
    products = find_products(model, calibration.batches[0], calibration.forward)
    with temporarily_skipped(model, skips):
        slim = find_products(model, calibration.batches[0], calibration.forward)
    changed = _changed_inputs(model, skips, calibration, slim)
    tensors: dict[str, Tensor] = {}
    repairs: list[Repair] = []
    skipped: dict[str, str] = {}
    with each(changed, "layers refitted", progress) as names:
        for name in names:
            reason = slim.otherwise.get(name, "")
            if products.readings.get(name) != slim.readings[name] or products.calls[name] != slim.calls[name]:
                reason = reason or "it is used another number of times"
            if reason:
                skipped[name] = reason
                continue
            moments = _gathered(model, skips, tensors, name, products, calibration)
            if moments is None:
                skipped[name] = "it multiplies another number of inputs"
                continue
            with naming_weight(name):
                new, repair = _refitted(model, tensors, name, moments, slim, damping)
            tensors |= new
            repairs.append(repair)
    return LayerRepair(tensors, tuple(repairs), skipped)


@contextmanager
def _without(model: nn.Module, skips: Skips, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the body on the model without the layers, with other tensors, in eval mode."""
    with temporarily_skipped(model, skips), undisturbed(model):
        exchange_(model, {name: tensor.detach() for name, tensor in tensors.items()})
        yield


def _changed_inputs(model: nn.Module, skips: Skips, calibration: Calibration, slim: Products) -> list[str]:
    """Return the weights that multiply other inputs once the layers are gone, in the order in which they run."""
    sums: list[dict[str, list[float]]] = [{}, {}]
    for found, without in zip(sums, ({}, skips), strict=True):

        def receive(name: str, reading: Reading, inputs: Tensor, found: dict[str, list[float]] = found) -> None:
            found.setdefault(name, []).append(float(widened(inputs.detach()).square().sum()))

        with _without(model, without, {}), watch_inputs(model, list(slim.readings), receive):
            calibration.forward(model, calibration.batches[0])
    return [name for name in slim.readings if sums[0].get(name) != sums[1].get(name)]


@dataclass(eq=False)
class _Moments:
    """Means over all positions of what a weight shall make, d, and what it multiplies, y.

    Attributes:
        cross: Of the products d y, ``(groups, rows, columns)``.
        after: Of the products y y, ``(groups, columns, columns)``.
        mean_wanted: Of d, ``(groups, rows)``.
        mean_after: Of y, ``(groups, columns)``.
        energy: Of the squares of d, ``(groups, rows)``.
    """

    cross: Tensor
    after: Tensor
    mean_wanted: Tensor
    mean_after: Tensor
    energy: Tensor


def _gathered(
    model: nn.Module,
    skips: Skips,
    tensors: Mapping[str, Tensor],
    name: str,
    products: Products,
    calibration: Calibration,
) -> _Moments | None:
    """Sum over all batches; None where the model without the layers multiplies other numbers of inputs."""
    sums: list[Tensor] = []
    count = 0
    gain: Tensor | None = None
    for number, batch in enumerate(calibration.batches):
        with undisturbed(model, batch):
            whole = made_by(model, products, name, calibration.forward, batch)
        with _without(model, skips, tensors):
            slim = made_by(model, products, name, calibration.forward, batch)
        if whole.product.shape != slim.product.shape:
            return None
        if number == 0:
            gain = whole.gain() if slim.stream is not None else None
        wide = calibration.dtype_on(slim.columns.device)
        wanted = _wanted(model, name, whole, slim, gain, products).to(wide)
        y = slim.columns.to(wide)
        d = wanted.reshape(y.shape[0], -1, y.shape[2])
        found = [d @ y.transpose(1, 2), y @ y.transpose(1, 2), d.sum(dim=2), y.sum(dim=2), d.square().sum(dim=2)]
        sums = [total + new for total, new in zip(sums, found, strict=True)] if sums else found
        count += y.shape[2]
    everywhere = calibration.over_processes(sums[0].new_tensor(float(count), dtype=widest_float(sums[0].device)))
    return _Moments(*(calibration.over_processes(total) / float(everywhere) for total in sums))


def _wanted(model: nn.Module, name: str, whole: Made, slim: Made, gain: Tensor | None, products: Products) -> Tensor:
    """Return what a weight shall make, without its bias, ``(channels, n)``."""
    wanted = widened(whole.product)
    shift = products.shifts.get(name)
    if shift is not None and shift.sign > 0:  # a bias, which both models add
        wanted = wanted - widened(named_tensors(model)[shift.name].detach()).reshape(-1, 1)
    if gain is None or whole.stream is None or slim.stream is None:
        return wanted
    missing = widened(whole.stream) - widened(slim.stream)
    return wanted + torch.where(gain != 0, missing / torch.where(gain != 0, gain, 1.0), 0.0)


def _refitted(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    moments: _Moments,
    slim: Products,
    damping: float,
) -> tuple[dict[str, Tensor], Repair]:
    """Return the new weight, and what is added behind it where that can shift, and what they are worth."""
    own = named_tensors(model)
    reading, added = slim.readings[name], slim.shifts.get(name)
    start = reading.rows(own[name].detach()).to(moments.after)
    if added is None:  # what cannot shift is fitted as it is
        means = torch.zeros_like(moments.mean_wanted), torch.zeros_like(moments.mean_after)
    else:
        means = moments.mean_wanted, moments.mean_after
    masks = masks_on(model)
    keep = reading.rows(masks[name].expand(own[name].shape)).to(start.device) if name in masks else None
    same = torch.eye(start.shape[1], dtype=start.dtype, device=start.device).expand(len(start), -1, -1)
    weights, shift = refit(same, start, moments.cross, moments.after, *means, damping, keep)
    new = {name: reading.weight(weights).to(own[name])}
    if added is not None:
        held = tensors.get(added.name, own[added.name].detach())
        new[added.name] = held + added.sign * shift.flatten().to(held)
        if added.name in masks:
            new[added.name] = new[added.name] * masks[added.name].to(held)
    return new, Repair(name, _lost(start, moments, torch.zeros_like(shift)), _lost(weights, moments, shift))


def _lost(weights: Tensor, moments: _Moments, shift: Tensor) -> float:
    """Return the mean squared distance from what is wanted, as a share of the mean square of that."""
    whole = moments.energy.sum()
    mixed = (weights * moments.cross).sum() + (shift * moments.mean_wanted).sum()
    made = ((weights @ moments.after) * weights).sum() + shift.square().sum()
    made = made + 2 * (shift * (weights @ moments.mean_after[..., None])[..., 0]).sum()
    return float((whole - 2 * mixed + made) / whole) if whole > 0 else 0.0
