"""Hands weights that keep to 2:4 to the sparse tensor cores of a GPU that has them; decides on no weight."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

__all__ = ["SemiStructured", "to_semi_structured_"]


class SemiStructured(NamedTuple):
    """What became of the weights that keep to 2:4.

    Attributes:
        faster: Names of the weights that are multiplied sparsely from now on.
        dense: Name of a weight that is multiplied as before, zeros and all -> why.
    """

    faster: tuple[str, ...]
    dense: dict[str, str]


def to_semi_structured_(model: nn.Module) -> SemiStructured:
    """Convert linear layers whose weights keep to 2:4 for a GPU's sparse tensor cores; others stay, with a warning.

    For inference: the weights become parameters of another kind, which no optimizer can train.

    Args:
        model: A model, on the device on which it is to run and in the precision in which it is to run, as
            ``prune_weights(model, pattern="2:4")`` or a training with ``pattern="2:4"`` left it.

    Returns:
        Which weights are faster, and why others are not.

    Examples:
        >>> from lightning_prune import prune_weights
        >>> model = nn.Linear(64, 64)
        >>> _ = prune_weights(model, pattern="2:4")
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     found = to_semi_structured_(model)
        >>> found.faster, found.dense
        ((), {'weight': 'it lies on cpu, not on an NVIDIA GPU of compute capability 8.0 or higher'})
    """
    faster, dense = [], {}
    for path, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or not _keeps_to_2_4(weight):
            continue
        name = f"{path}.weight".lstrip(".")
        reason = _hindrance(module, weight)
        if reason is None:
            try:
                sparse = to_sparse_semi_structured(weight.detach().contiguous())
                module.weight = nn.Parameter(sparse, requires_grad=False)
            except (RuntimeError, ValueError) as error:  # shapes and dtypes that the kernels do not take
                reason = str(error).partition("\n")[0]
        if reason is None:
            faster.append(name)
        else:
            dense[name] = reason
    if dense:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:5])
        warnings.warn(
            f"{len(dense)} weights that keep to 2:4 stay dense and run no faster here than without zeros ({listed}).",
            stacklevel=2,
        )
    return SemiStructured(tuple(faster), dense)


def _keeps_to_2_4(weight: Tensor) -> bool:
    """Return whether of every four neighbours along the inputs at most two are not zero."""
    if weight.layout != torch.strided or weight.is_meta or not weight.is_floating_point():
        return False
    if weight.dim() < 2 or weight.shape[1] % 4:
        return False
    return bool((weight.detach().unflatten(1, (-1, 4)).count_nonzero(dim=2) <= 2).all())


def _hindrance(module: nn.Module, weight: Tensor) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"PyTorch multiplies weights of {type(module).__name__} densely"
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return f"it lies on {weight.device}, not on an NVIDIA GPU of compute capability 8.0 or higher"
    return None
