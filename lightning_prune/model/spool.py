"""Tensors that wait in a temporary file, one after the other, and not in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Spool(Mapping[str, Tensor]):
    """Tensors by name in a temporary file, which is removed with this object; each is read when it is looked at.

    Examples:
        >>> spool = Spool()
        >>> spool["weight"] = torch.ones(2)
        >>> spool["weight"]
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
        self._places: dict[str, _Place] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        """Write a tensor behind those that are there; a later one of the same name takes its place."""
        start = self._file.seek(0, 2)
        flat = tensor.detach().cpu().contiguous().view(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._places[name] = _Place(start, flat.nbytes, tensor.dtype, tensor.shape, tensor.device)

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        place = self._places[name]
        self._file.seek(place.start)
        found = torch.frombuffer(bytearray(self._file.read(place.size)), dtype=place.dtype)
        return found.view(place.shape).to(place.device)

    def __iter__(self) -> Iterator[str]:
        """Return the names, in the order in which they came."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._places)


class _Place(NamedTuple):
    """Where a tensor lies in the file, in bytes, and what it is."""

    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
