"""Parameters that are split over processes: this process's part, and the whole; knows no strategy."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["as_sharded", "is_sharded", "own_part", "part_like", "settle_", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is split over processes (FSDP2, tensor parallelism)."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and there if any such tensor is
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory; of a tensor that is not split, itself."""
    if not is_sharded(tensor):
        return tensor
    split: Any = tensor.detach()
    return split.to_local()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from the processes, which must call this together; or itself."""
    if not is_sharded(tensor):
        return tensor
    split: Any = tensor.detach()
    return split.full_tensor()


def part_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a value that belongs to this process's part of a tensor; no message is sent.

    Args:
        value: All of it, the same on every process, of the tensor's shape or one that broadcasts to it.
        tensor: What it belongs to.
    """
    return own_part(as_sharded(value.expand(tensor.shape), tensor)) if is_sharded(tensor) else value


def as_sharded(value: Tensor, tensor: Tensor) -> Tensor:
    """Split a value, the same on every process, as a tensor of the same shape is split; no message is sent."""
    from torch.distributed.tensor import distribute_tensor

    split: Any = tensor
    return distribute_tensor(value.to(split.device), split.device_mesh, split.placements, src_data_rank=None)


def settle_(model: nn.Module) -> None:
    """Free what FSDP2 has gathered, as it may after a validation, so that the parameters are the parts again."""
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)) and hasattr(module, "_get_fsdp_state"):
            reshard()
