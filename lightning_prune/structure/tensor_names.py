"""Finds the parameters and buffers of a model by name, and puts others in their place; knows no labels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_prune.model.calls import modules_of

__all__ = ["exchange_", "named_tensors"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under the first of its names."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in modules_of(model):  # one walk where named_parameters and named_buffers take two
        for found, own in ((parameters, module._parameters), (buffers, module._buffers)):
            if not own:  # most modules of a network hold neither
                continue
            for leaf, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{leaf}" if path else leaf] = tensor
    return parameters | buffers


def exchange_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put other tensors where parameters and buffers are, under all their names; ``undisturbed`` takes this back."""
    if not tensors:
        return
    own = named_tensors(model)
    for name, tensor in tensors.items():
        if own[name].requires_grad and tensor.is_leaf and tensor.is_floating_point():
            tensor.requires_grad_()  # by which torch chooses between operators, also where no gradient is asked for
    other = {id(own[name]): tensor for name, tensor in tensors.items()}
    for _, module in modules_of(model):
        for held in (module._parameters, module._buffers):
            for leaf, present in held.items():
                if id(present) in other:
                    held[leaf] = other[id(present)]  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
