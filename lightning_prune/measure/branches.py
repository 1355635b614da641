"""Follows what a weight makes to where it is added to a stream, over the data of a calibration; changes no model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.measure.calibration import Run
from lightning_prune.measure.products import Products, watch_inputs
from lightning_prune.measure.unrolled import Matmul, Reading
from lightning_prune.model.devices import widened

__all__ = ["Made", "made_by"]

_aten = torch.ops.aten
_ADDS = frozenset({_aten.add, _aten.add_})
# What passes each channel on times a number, or in another shape.
_CARRIES = frozenset({
    _aten.mul, _aten.mul_, _aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias, _aten.clone,
    _aten.alias, _aten.detach, _aten.native_dropout,
})  # fmt: skip
_SAME = 1 - 1e-6  # correlation of what an affine function gives with what it was given


@dataclass(frozen=True, eq=False)
class Made:
    """What a weight makes of a batch, laid out as rows of channels over all output positions.

    Attributes:
        columns: What it multiplies, ``(groups, columns, n)``.
        product: What it makes, with its bias, ``(channels, n)``.
        term: What becomes of that where it is added to something of its shape, ``(channels, n)``; None where it is not.
        stream: What it is added to, ``(channels, n)``; None likewise.
    """

    columns: Tensor
    product: Tensor
    term: Tensor | None
    stream: Tensor | None

    def gain(self) -> Tensor | None:
        """Return by what the term of each channel rises with the product, ``(channels, 1)``.

        None where there is no term, or where it is no affine function of the product; 0 where a channel is silent.
        """
        if self.term is None:
            return None
        x = widened(self.product) - widened(self.product).mean(dim=1, keepdim=True)
        y = widened(self.term) - widened(self.term).mean(dim=1, keepdim=True)
        xx, xy, yy = x.square().sum(dim=1), (x * y).sum(dim=1), y.square().sum(dim=1)
        loud = (xx > 0) & (yy > 1e-12 * yy.max())
        correlation = xy.abs() / (xx * yy).sqrt().clamp_min(torch.finfo(xx.dtype).tiny)
        if not loud.any() or bool((correlation[loud] < _SAME).any()):
            return None
        return torch.where(loud, xy / xx.clamp_min(torch.finfo(xx.dtype).tiny), 0.0)[:, None]


def made_by(model: nn.Module, products: Products, name: str, forward: Run, batch: Any) -> Made:
    """Run a model on a batch, and return what a weight makes of it; the run stops where that is known.

    Args:
        model: The model, in the mode that it is to run in.
        products: Which of its weights multiply what.
        name: One of these.
        forward: Calls the model on the batch.
        batch: The batch.
    """
    columns: list[Tensor] = []

    def receive(_: str, reading: Reading, inputs: Tensor) -> None:
        columns.append(reading.unrolled(inputs.detach()).float())

    follow = _Follow(model.get_parameter(name), products.readings[name], products.calls[name])
    with suppress(_EnoughError), watch_inputs(model, [name], receive), follow:
        forward(model, batch)
    products_made = torch.cat(follow.made, dim=1)
    if len(follow.terms) < len(follow.made):
        return Made(torch.cat(columns, dim=2), products_made, None, None)
    terms = torch.cat([term for term, _ in follow.terms], dim=1)
    return Made(torch.cat(columns, dim=2), products_made, terms, torch.cat([s for _, s in follow.terms], dim=1))


class _EnoughError(Exception):
    """Everything was seen that was to be seen."""


class _Follow(TorchDispatchMode):
    """Follows the products with one weight, one after the other."""

    def __init__(self, weight: Tensor, reading: Reading, calls: int) -> None:
        super().__init__()
        self._address, self._reading, self._calls = weight.data_ptr(), reading, calls
        self._channels = reading.rows(weight.detach()).shape[0] * reading.rows(weight.detach()).shape[1]
        self._now: Tensor | None = None
        self.made: list[Tensor] = []
        self.terms: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        at = [i for i, value in enumerate(args) if value is self._now and value is not None]
        if at and packet in _ADDS and _both_whole(args):
            self.terms.append((self._laid_out(args[at[0]]), self._laid_out(args[1 - at[0]])))
            self._now = None
            self._stop_after_last()
        out = func(*args, **(kwargs or {}))
        weighs = any(isinstance(value, Tensor) and value.data_ptr() == self._address for value in args)
        if weighs and not func.is_view and packet is not _aten.detach and isinstance(out, Tensor):
            self._now = out
            self.made.append(self._laid_out(out))
        elif at:
            carries = packet in _CARRIES or packet in _ADDS or "batch_norm" in str(packet)
            carried = out[0] if isinstance(out, tuple | list) else out
            self._now = carried if carries and carried.numel() == args[at[0]].numel() else None
            if self._now is None:
                self._stop_after_last()
        return out

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """Return ``(channels, n)``, in the order of the columns of what is multiplied."""
        tensor = tensor.detach().float()
        if isinstance(self._reading, Matmul):
            return tensor.reshape(-1, self._channels).T.clone()
        if tensor.dim() == len(self._reading.kernel) + 1:  # type: ignore[attr-defined]
            tensor = tensor[None]
        return tensor.transpose(0, 1).reshape(self._channels, -1).clone()

    def _stop_after_last(self) -> None:
        if len(self.made) == self._calls:
            raise _EnoughError


def _both_whole(args: Any) -> bool:
    """Return whether an addition is of two tensors of one shape, rather than of a bias."""
    one, other = args[:2]
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
