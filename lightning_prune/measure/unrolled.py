"""Reads a product with a weight as plain matrices: rows of weights times columns of inputs; changes no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolution", "Matmul", "Reading"]


class Reading(ABC):
    """How a weight multiplies its input: as ``rows @ columns``, group by group.

    Each channel of the input within a group takes up ``taps`` neighbouring columns of the rows.
    """

    groups: int
    taps: int

    @abstractmethod
    def rows(self, weight: Tensor) -> Tensor:
        """Lay a weight out as ``(groups, rows, columns)``."""

    @abstractmethod
    def weight(self, rows: Tensor) -> Tensor:
        """Undo :meth:`rows`; the number of rows and channels may have changed."""

    @abstractmethod
    def unrolled(self, inputs: Tensor) -> Tensor:
        """Lay an input out as ``(groups, columns, n)``: one column of inputs for every output position."""

    @abstractmethod
    def channel_dim(self, weight: Tensor) -> int:
        """Return the dimension of the weight along which the input's channels lie."""


@dataclass(frozen=True)
class Matmul(Reading):
    """A matrix product: of a weight ``(out, in)`` as in ``nn.Linear``, or one that lies ``(in, out)``."""

    outputs_first: bool
    groups: int = 1
    taps: int = 1

    def rows(self, weight: Tensor) -> Tensor:
        """Lay the weight out as ``(1, out, in)``."""
        return (weight if self.outputs_first else weight.T)[None]

    def weight(self, rows: Tensor) -> Tensor:
        """Undo :meth:`rows`."""
        return rows[0] if self.outputs_first else rows[0].T

    def unrolled(self, inputs: Tensor) -> Tensor:
        """Lay inputs ``(n, in)`` out as ``(1, in, n)``."""
        return inputs.T[None]

    def channel_dim(self, weight: Tensor) -> int:
        """Return where ``in`` lies."""
        return 1 if self.outputs_first else 0


@dataclass(frozen=True)
class Convolution(Reading):
    """A convolution in any number of dimensions, grouped or not, transposed or not.

    A transposed one is the plain one, its kernel mirrored, over an input with zeros between its entries.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def taps(self) -> int:  # type: ignore[override]
        """Entries of the kernel."""
        return int(torch.Size(self.kernel).numel())

    def rows(self, weight: Tensor) -> Tensor:
        """Lay the weight out as ``(groups, out / groups, in / groups * taps)``."""
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        if self.transposed:  # (groups, in / groups, out / groups, *kernel)
            grouped = grouped.transpose(1, 2).flip(self._spatial(3))
        return grouped.flatten(2 if weight.dim() > 1 else 1)

    def weight(self, rows: Tensor) -> Tensor:
        """Undo :meth:`rows`."""
        grouped = rows.reshape(*rows.shape[:2], -1, *self.kernel)
        if self.transposed:
            grouped = grouped.flip(self._spatial(3)).transpose(1, 2)
        return grouped.flatten(0, 1)

    def unrolled(self, inputs: Tensor) -> Tensor:
        """Lay inputs ``(N, in, *positions)`` out as ``(groups, in / groups * taps, N * output positions)``."""
        if inputs.dim() == len(self.kernel) + 1:
            inputs = inputs[None]
        if self.transposed:
            inputs = self._spread(inputs)
        steps = [1] * len(self.kernel) if self.transposed else self.stride
        patches = F.pad(inputs, [margin for both in reversed(self._margins()) for margin in both])
        for i, (size, step, gap) in enumerate(zip(self.kernel, steps, self.dilation, strict=True)):
            patches = patches.unfold(2 + i, (size - 1) * gap + 1, step)[..., ::gap]
        n, channels = patches.shape[:2]
        ndim = len(self.kernel)
        patches = patches.reshape(n, self.groups, channels // self.groups, *patches.shape[2:])
        positions, kernel = range(3, 3 + ndim), range(3 + ndim, 3 + 2 * ndim)
        return patches.permute(1, 2, *kernel, 0, *positions).reshape(
            self.groups, channels // self.groups * self.taps, -1
        )

    def channel_dim(self, weight: Tensor) -> int:
        """Return where the input's channels lie."""
        return 0 if self.transposed else 1

    def _spatial(self, first: int) -> list[int]:
        return list(range(first, first + len(self.kernel)))

    def _spread(self, inputs: Tensor) -> Tensor:
        sizes = [(size - 1) * step + 1 for size, step in zip(inputs.shape[2:], self.stride, strict=True)]
        spread = inputs.new_zeros(*inputs.shape[:2], *sizes)
        between: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        spread[between] = inputs
        return spread

    def _margins(self) -> list[tuple[int, int]]:
        """Return the zeros laid before and after each dimension."""
        if not self.transposed:
            return [(pad, pad) for pad in self.padding]
        reach = [gap * (size - 1) for size, gap in zip(self.kernel, self.dilation, strict=True)]
        return [
            (r - pad, r - pad + extra) for r, pad, extra in zip(reach, self.padding, self.output_padding, strict=True)
        ]
