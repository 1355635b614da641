"""Scores units by what their loss costs all that read them, once these have made up for it; changes nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.algorithms.solvers import best_on_columns, damped, inverse, rise
from lightning_prune.algorithms.solvers.whole_units import Reader, unit_rises
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import Gram, fitting, gather_grams
from lightning_prune.measure.output_change import Outputs
from lightning_prune.measure.products import Products
from lightning_prune.model.progress_bars import counted
from lightning_prune.pruning.layerwise import naming_weight
from lightning_prune.structure import ChannelGroup, Slot, Structure, named_tensors

__all__ = ["DAMPING", "only_read", "readers_of", "score_by_readers"]

DAMPING = 0.01
"""Share of its mean diagonal entry that is added to a Hessian's diagonal."""

_MEMORY = 2 * 2**30  # bytes of Hessians held at a time
_SHARE = 0.3  # of the units, without which readers are compared


def readers_of(model: nn.Module, group: ChannelGroup, products: Products) -> list[Slot]:
    """Return where the units of a group are summed over by products whose inputs can be seen."""
    own = named_tensors(model)
    found = []
    for slot in group.slots:
        if slot.role != "consumer" or slot.tensor in products.otherwise:
            continue
        reading = products.readings.get(slot.tensor)
        if reading is not None and reading.channel_dim(own[slot.tensor]) == slot.dim:
            found.append(slot)
    return found


def only_read(model: nn.Module, structure: Structure, products: Products) -> Structure:
    """Leave out the groups of which no reader's inputs can be seen."""
    unseen = {}
    for name, group in structure.groups.items():
        if not readers_of(model, group, products):
            told = {products.otherwise[slot.tensor] for slot in group.slots if slot.tensor in products.otherwise}
            reason = "what reads these channels cannot be seen, so it cannot make up for them"
            unseen[name] = f"{reason} ({', '.join(sorted(told))})" if told else reason
    return structure.without_each(unseen)


def score_by_readers(
    model: nn.Module,
    structure: Structure,
    products: Products,
    calibration: Calibration,
    damping: float,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Score the units of every group by how far, squared, the model's outputs move without them.

    Units leave one by one, and after each all weights that read the group move to make up for it. What a reader's error
    means for the model is measured once, without three tenths of the units.

    Returns:
        Group name -> one score per unit, ``(width,)``: a group's lowest are those to remove first, and each stands for
        the rise then. Groups of which no reader's inputs can be seen are left out.
    """
    slots: dict[str, list[Slot]] = {}
    sizes: dict[str, int] = {}
    for name, group in structure.groups.items():
        found = readers_of(model, group, products)
        if found:
            slots[name] = found
            sizes[name] = 2 * sum(products.bytes(slot.tensor, calibration.dtype) for slot in found)
    outputs = Outputs(model, calibration)
    scores = {}
    with counted("groups scored", len(sizes), progress) as advance:
        for part in fitting(sizes, _MEMORY):
            tensors = dict.fromkeys(slot.tensor for name in part for slot in slots[name])
            grams = gather_grams(model, products, list(tensors), calibration)
            for name in part:
                width, own = structure.groups[name].width, slots[name]
                with naming_weight(name):
                    readers: list[Reader] = []
                    for slot in own:
                        readers += _readers(model, outputs, slot, width, grams[slot.tensor], damping)
                    scores[name] = unit_rises(readers)
                advance()
    return scores


def _readers(model: nn.Module, outputs: Outputs, slot: Slot, width: int, gram: Gram, damping: float) -> list[Reader]:
    """Return one reader for each group of a product, its error counted by what it does to the model's outputs."""
    weight = named_tensors(model)[slot.tensor].detach()
    rows, hessian = gram.reading.rows(weight).to(gram.hessian), damped(gram.hessian, damping)
    columns = _columns(slot, width, gram.reading.taps).to(rows.device)
    inverses = inverse(hessian)
    alone = sum(Reader(w, h, columns).alone() for w, h in zip(rows, inverses, strict=True))
    assert isinstance(alone, Tensor)
    gone = columns[alone.argsort()[: max(1, round(_SHARE * width))]].flatten()
    keep = torch.ones(rows.shape[2], dtype=torch.bool, device=rows.device).index_fill(0, gone, False)
    without = torch.zeros_like(rows)
    without[:, :, keep] = torch.stack([best_on_columns(w, h, keep) for w, h in zip(rows, hessian, strict=True)])
    error = float(rise(without - rows, gram.hessian).sum())
    moved = outputs.moved({slot.tensor: gram.reading.weight(without).to(weight)})
    scale = moved / error if error > 0 else 0.0
    return [Reader(w, h, columns, scale) for w, h in zip(rows, inverses, strict=True)]


def _columns(slot: Slot, width: int, taps: int) -> Tensor:
    """Return the columns that each unit takes up, ``(width, n)``; units of one group take up equally many."""
    channels = np.argsort(slot.units, kind="stable")[np.count_nonzero(slot.units < 0) :].reshape(width, -1)
    return torch.from_numpy((channels[:, :, None] * taps + np.arange(taps)).reshape(width, -1))
