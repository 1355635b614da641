"""Packing of boolean masks into bits, for checkpoints and files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(keep: Tensor) -> Tensor:
    """Pack booleans into bytes.

    Args:
        keep: Booleans of any shape.

    Returns:
        Bytes, ``(ceil(n / 8),)`` uint8 on the CPU; the first entry is the highest bit of the first byte.

    Examples:
        >>> pack_bits(torch.tensor([[True, False], [True, True]]))
        tensor([176], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(keep.detach().cpu().contiguous().view(-1).numpy()))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_bits`.

    Args:
        packed: Bytes, ``(ceil(n / 8),)`` uint8.
        shape: Shape of what was packed, with n entries.

    Returns:
        Booleans of that shape, on the CPU.

    Examples:
        >>> unpack_bits(torch.tensor([176], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [ True,  True]])
    """
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count).view(bool)).view(tuple(shape))
