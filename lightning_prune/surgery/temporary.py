"""Makes a cut for the length of a ``with`` block and takes it back to the last bit; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure import named_tensors
from lightning_prune.surgery.attributes import attributes_set
from lightning_prune.surgery.cut import Cut


@contextmanager
def temporarily_cut(model: nn.Module, cut: Cut, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Make the model slim in the body, and what it was afterwards, also when the body raises.

    Other parameters stand in for those that are cut, so the model's own are never written to: values, storage,
    gradients, hooks and what optimizers know of them are as before. Optimizers do not see the stand-ins: evaluate, do
    not train.

    Args:
        model: The model that the cut was drafted for.
        cut: What changes.
        tensors: The slim values of everything that changes, from ``cut.tensors(model)``.
    """
    own = named_tensors(model)
    with torch.inference_mode(False):
        slim = {id(own[name]): _stand_in(own[name], new) for name, new in tensors.items()}
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    places = [(table, leaf, tensor) for table in tables for leaf, tensor in table.items() if id(tensor) in slim]
    with attributes_set(model, cut.attributes):
        try:
            for table, leaf, tensor in places:
                table[leaf] = slim[id(tensor)]
            yield
        finally:
            for table, leaf, tensor in places:
                table[leaf] = tensor


def _stand_in(own: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else new
