"""Makes values of ordinary size for tensors on which nothing shows: zeros, ones, a scale of 1e-6; changes no model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import ExampleInputs
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.cut import Cut

__all__ = ["StandIns", "inputs_of_ordinary_size"]

Rows = Mapping[str, tuple[int, Tensor]]
"""Name of a parameter -> dimension and factors along it, ``(size,)``."""

_SAMPLED = 1024
_SMALL = 1e-3
_DRAWN = 1 << 16
_HALVES = (torch.float16, torch.bfloat16)


class StandIns:
    """What the slim and the full model run on instead of their own tensors.

    Tensors of more than one dimension are made when an operator takes them, so that they never all lie beside the
    model's own.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, ordinary: bool) -> None:
        """Prepare.

        Args:
            model: The full model.
            dtype: What floating-point tensors are turned to; None for what they are.
            ordinary: Whether tensors of equal or tiny numbers get ordinary ones.
        """
        self._own = named_tensors(model)
        self._dtype = dtype
        self._noises: dict[str, Tensor] = {}  # of vectors, which both models need
        self._little = {
            name
            for name, tensor in self._own.items()
            if ordinary and tensor.is_floating_point() and _tells_little(tensor)
        }

    def full(self) -> tuple[dict[str, Tensor], dict[int, Callable[[], Tensor]]]:
        """Return tensors to exchange in the full model, and what operators take instead of them, by ``id``."""
        return self._exchanged({name: tensor for name, tensor in self._own.items() if self._changes(name)}, {}, {})

    def slim(
        self, cut: Cut, tensors: Mapping[str, Tensor], rows: Rows = MappingProxyType({})
    ) -> tuple[dict[str, Tensor], dict[int, Callable[[], Tensor]]]:
        """Return the same for the slim model, whose tensors that are cut are given, and factors along dimensions."""
        changed = {
            name: tensors.get(name, own)
            for name, own in self._own.items()
            if name in tensors or name in rows or self._changes(name)
        }
        return self._exchanged(changed, cut.kept, rows)

    def pairs(self, slim: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor, bool]]:
        """Return tensors of the slim model, those of the full one, and whether they are the model's own values.

        Args:
            slim: Tensors to exchange in the slim model, by name.
            full: The same in the full one.
        """
        found = []
        for name, own in self._own.items():
            one, other = slim.get(name, own), full.get(name, own)
            if one is other and not isinstance(own, nn.Parameter) and own.numel() <= _SAMPLED:
                other = own.detach().clone()  # operators may write into small buffers, such as counters
            found.append((one, other, not self._changes(name)))
        return found

    def _exchanged(
        self, values: Mapping[str, Tensor], kept: Mapping[str, Mapping[int, Tensor]], rows: Rows
    ) -> tuple[dict[str, Tensor], dict[int, Callable[[], Tensor]]]:
        exchanged: dict[str, Tensor] = {}
        made: dict[int, Callable[[], Tensor]] = {}
        for name, value in values.items():
            value = value.detach()
            make = partial(self._made, name, value, kept.get(name, {}), rows.get(name))
            if value.dim() < 2 or not self._changes(name):  # weighs little, or is there already
                made_now = make()
                # statistics of BatchNorm are updated in train mode, and no operator says so
                exchanged[name] = made_now.clone() if made_now is value and value.dim() < 2 else made_now
            else:
                stand_in = value.new_empty((), dtype=self._type(value)).expand(value.shape)
                exchanged[name] = stand_in
                made[id(stand_in)] = make
        return exchanged, made

    def _changes(self, name: str) -> bool:
        if name in self._little:
            return True
        return self._dtype is not None and self._type(self._own[name]) is not self._own[name].dtype

    def _type(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if self._dtype is None or not tensor.is_floating_point() else self._dtype

    def _made(self, name: str, value: Tensor, kept: Mapping[int, Tensor], factors: tuple[int, Tensor] | None) -> Tensor:
        own = self._own[name]
        if name in self._little:
            more = self._noises.get(name)
            if more is None:
                more = _noise(name, own)
                if own.dim() < 2:
                    self._noises[name] = more
            for dim, indices in kept.items():
                more = more.index_select(dim, indices if more.is_cpu else indices.to(more.device))
            value = value.to(more.dtype) + more
        value = value.to(self._type(own))
        if factors is not None:
            dim, by = factors
            value = value * by.to(value).view([-1 if other == dim else 1 for other in range(value.dim())])
        return value


def _tells_little(tensor: Tensor) -> bool:
    """Return whether entries of a tensor are all alike or tiny, as far as a sample shows."""
    flat = tensor.detach()
    if flat.dim() != 1:
        flat = flat.reshape(-1)
    step = flat.numel() // _SAMPLED
    sample = flat[::step] if step > 1 else flat
    if not sample.numel():
        return False
    low, high = [float(value) for value in torch.aminmax(sample)]
    if not math.isfinite(high - low):  # what is no number shows in both
        return False
    if flat.numel() == 1:
        return abs(high) < _SMALL
    return high - low <= _SMALL * max(abs(high), abs(low)) or max(abs(high), abs(low)) < _SMALL * 0.1


@cache
def _drawn() -> Tensor:
    """Return random numbers of which vectors take a part each."""
    return torch.rand(_DRAWN, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5


def _noise(name: str, like: Tensor) -> Tensor:
    """Return random numbers that make a tensor of equal or tiny ones ordinary, the same at every call.

    A vector of ones, such as the scale of a norm, ranges over 0.5 to 1.5 then, and one of zeros over -0.5 to 0.5;
    matrices get what keeps the size of what they multiply.
    """
    seed = zlib.crc32(name.encode())
    size = like.numel()
    shared = like.dim() == 1 and size <= _DRAWN // 2
    if shared:  # most by far, and a generator of its own costs more than it draws
        start = seed % (_DRAWN - size)
        drawn = _drawn()[start : start + size]
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
    first = float(like.detach()[(0,) * like.dim()])
    if abs(first) >= _SMALL:
        drawn = drawn * abs(first) if shared else drawn.mul_(abs(first))
    elif like.dim() > 1:
        drawn.mul_(3.0 / (like.numel() / like.shape[0]) ** 0.5)
    elif like.numel() == 1:
        drawn = drawn + torch.sign(drawn) * 0.25
    dtype = torch.float32 if like.dtype in _HALVES else like.dtype
    return drawn.to(device=like.device, dtype=dtype)


def inputs_of_ordinary_size(example_inputs: ExampleInputs, dtype: torch.dtype | None, ordinary: bool) -> ExampleInputs:
    """Return example inputs of another type; those of equal numbers get positive random ones added."""

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if ordinary and tensor.numel() > 1 and _tells_little(tensor):
            generator = torch.Generator().manual_seed(tensor.numel())
            more = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor = tensor + more.to(device=tensor.device, dtype=torch.float32).to(tensor.dtype)
        return tensor if dtype is None else tensor.to(dtype)

    return pytree.tree_map_only(Tensor, changed, example_inputs)
