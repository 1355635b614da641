r"""Gathers the Gram matrices :math:`X X^T` of what weights multiply, over the data of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.measure.calibration import Calibration, Run
from lightning_prune.measure.products import Products, watch_inputs
from lightning_prune.measure.unrolled import Reading
from lightning_prune.model.devices import widest_float
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.structure import named_tensors

__all__ = ["Change", "Gram", "Pair", "fitting", "gather_grams", "gather_pair"]

_AT_ONCE, _ROWS = 2**16, 128  # entries of a Gram matrix that are added at a time, and rows at least

Change = Callable[[], AbstractContextManager[None]]
"""Makes a block in which the model is another."""


@dataclass(eq=False)
class Gram:
    """What a weight's inputs look like.

    Attributes:
        reading: How weight and inputs are laid out.
        hessian: Mean over columns of inputs of their outer products, ``(groups, columns, columns)``: the Hessian of
            half the squared error of an output, its mean over positions.
        mean: Mean column, ``(groups, columns)``.
        count: How many columns were seen.
        centre: While sums are taken, what is subtracted from each column: products of inputs that hardly vary would
            otherwise lose their variance to the rounding of single precision. ``(groups, columns)``.
        waiting: While sums are taken, columns that are not yet in ``hessian``: adding a product for every few of them
            would take longer than the products.
    """

    reading: Reading
    hessian: Tensor
    mean: Tensor
    count: int
    centre: Tensor | None = None
    waiting: list[Tensor] = field(default_factory=list)

    def add(self, columns: Tensor) -> None:
        """Add columns, ``(groups, columns, n)``, to the sums."""
        if not columns.shape[2]:
            return
        if self.centre is None:
            self.centre = columns.mean(dim=2)
        apart = columns - self.centre[:, :, None]
        self.mean += apart.sum(dim=2).to(self.mean)
        self.count += columns.shape[2]
        self.waiting.append(apart)
        if sum(part.shape[2] for part in self.waiting) >= columns.shape[1]:
            self._add_waiting()

    def _add_waiting(self) -> None:
        apart = self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting, dim=2)
        self.waiting = []
        width = apart.shape[1]
        rows = max(_ROWS, _AT_ONCE // width)
        for first in range(0, width, rows):  # what is added weighs no more than a few rows
            part = slice(first, first + rows)
            self.hessian[:, part] += apart[:, part] @ apart.transpose(1, 2)

    def uncentre_(self) -> None:
        """Turn the sums into those of the columns themselves."""
        if self.waiting:
            self._add_waiting()
        if self.centre is None:
            return
        centre = self.centre.to(self.hessian)[:, :, None]
        row = centre.transpose(1, 2)
        self.hessian.baddbmm_(centre, self.mean[:, None])
        self.hessian.baddbmm_(self.mean[:, :, None], row)
        self.hessian.baddbmm_(centre * self.count, row)
        self.mean += self.count * centre[..., 0]
        self.centre = None

    def without(self, groups: Tensor, columns: Tensor) -> Pair:
        """Return this beside what is left of it once only some columns are there.

        Args:
            groups: Groups that are left, ``(slim groups,)``.
            columns: Columns that are left of each, ``(slim groups, slim columns)``.
        """
        before, mean = self.hessian[groups], self.mean[groups]
        cross = before.gather(2, columns[:, None].expand(-1, before.shape[1], -1))
        after = cross.gather(1, columns[:, :, None].expand(-1, -1, columns.shape[1]))
        return Pair(before, cross, after, mean, mean.gather(1, columns))


@dataclass(frozen=True, eq=False)
class Pair:
    """What a weight's inputs look like in two runs of a model, before and after layers in front of it changed.

    Attributes:
        before: Mean over columns of the outer products of the inputs before, ``(groups, columns, columns)``.
        cross: Of the inputs before and those after.
        after: Of the inputs after.
        mean_before: Mean column before, ``(groups, columns)``.
        mean_after: And after.
    """

    before: Tensor
    cross: Tensor
    after: Tensor
    mean_before: Tensor
    mean_after: Tensor

    def centred(self) -> Pair:
        """Return the same of the inputs less their means."""
        x, y = self.mean_before, self.mean_after
        outer = [a[:, :, None] * b[:, None] for a, b in ((x, x), (x, y), (y, y))]
        return Pair(self.before - outer[0], self.cross - outer[1], self.after - outer[2], x, y)


def fitting(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Part names, in order, so that the sizes of each part come to at most so much, or it has one name."""
    part: list[str] = []
    for name, size in sizes.items():
        if part and sum(sizes[other] for other in part) + size > most:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


def gather_grams(
    model: nn.Module, products: Products, names: Collection[str], calibration: Calibration
) -> dict[str, Gram]:
    """Sum the Gram matrices of the named weights' inputs over all batches, in eval mode; the model is left as found.

    Args:
        model: The model.
        products: Which of its weights multiply what.
        names: Some of these.
        calibration: The batches.

    Raises:
        PruningError: If one of them multiplied nothing.
    """
    grams = {name: _nothing(model, products, name, calibration) for name in names}

    def receive(name: str, reading: Reading, inputs: Tensor) -> None:
        grams[name].add(_single(reading.unrolled(inputs.detach())))

    with undisturbed(model), watch_inputs(model, names, receive):
        for batch in calibration.batches:
            with unchanged(batch):
                calibration.forward(model, batch)
    for gram in grams.values():
        gram.uncentre_()
    return {name: _mean(name, gram, calibration) for name, gram in grams.items()}


def gather_pair(
    model: nn.Module,
    products: Products,
    name: str,
    calibration: Calibration,
    change: Change,
    groups: Tensor | None = None,
) -> Pair:
    """Compare the inputs of one weight with what they are once the model has changed; runs stop behind it.

    Args:
        model: The model.
        products: Which of its weights multiply what.
        name: One of these.
        calibration: The batches.
        change: Entered around the second run of every batch, and left again.
        groups: Which groups of the first run belong to those of the second, where not all are left.

    Raises:
        PruningError: If one of the two runs multiplies other numbers of inputs than the other.
    """
    sums: list[Tensor] = []
    count = 0
    for batch in calibration.batches:
        x = _columns(model, products, name, calibration.forward, batch)
        x = x if groups is None else x[groups]
        with change():
            y = _columns(model, products, name, calibration.forward, batch)
        if x.shape[2] != y.shape[2]:
            raise PruningError(
                f"{name}: it multiplies {x.shape[2]} inputs, and {y.shape[2]} once layers before it are pruned, so the "
                "two cannot be compared. Prune with sequential=False."
            )
        found = [_product(x, x), _product(x, y), _product(y, y), x.sum(dim=2), y.sum(dim=2)]
        found = [new.to(calibration.dtype_on(new.device)) for new in found]
        sums = [total + new for total, new in zip(sums, found, strict=True)] if sums else found
        count += x.shape[2]
    everywhere = _count(count, sums[0], calibration)
    return Pair(*(calibration.over_processes(total) / everywhere for total in sums))


class _EnoughError(Exception):
    """Everything was seen that was to be seen."""


def _columns(model: nn.Module, products: Products, name: str, forward: Run, batch: Any) -> Tensor:
    """Return what a weight multiplies in one run, ``(groups, columns, n)``."""
    found: list[Tensor] = []

    def receive(_: str, reading: Reading, inputs: Tensor) -> None:
        found.append(_single(reading.unrolled(inputs.detach())))
        if len(found) == products.calls[name]:
            raise _EnoughError

    with undisturbed(model, batch), suppress(_EnoughError), watch_inputs(model, [name], receive):
        forward(model, batch)
    return torch.cat(found, dim=2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(1, 2)


def _single(columns: Tensor) -> Tensor:
    return columns.to(torch.promote_types(columns.dtype, torch.float32))


def _nothing(model: nn.Module, products: Products, name: str, calibration: Calibration) -> Gram:
    groups, _, columns = products.shapes[name]
    device = named_tensors(model)[name].device
    hessian = torch.zeros(groups, columns, columns, dtype=calibration.dtype_on(device), device=device)
    return Gram(products.readings[name], hessian, hessian.new_zeros(groups, columns), 0)


def _mean(name: str, gram: Gram, calibration: Calibration) -> Gram:
    count = _count(gram.count, gram.mean, calibration)
    if not count:
        raise PruningError(
            f"{name}: no batch came, or nothing was multiplied by it on these batches, so it has no Hessian. "
            "Pass batches that reach it, or leave it out by ignore=."
        )
    hessian, mean = (calibration.over_processes(total).div_(count) for total in (gram.hessian, gram.mean))
    return Gram(gram.reading, hessian, mean, count)


def _count(count: int, like: Tensor, calibration: Calibration) -> int:
    """Return how many columns all processes saw."""
    wide = widest_float(like.device)
    return round(float(calibration.over_processes(torch.tensor(float(count), dtype=wide, device=like.device))))
