"""Writes new shapes into a model while its parameters stay the same objects; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.model.calls import modules_of
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import named_tensors

__all__ = ["Kept", "all_or_nothing", "followed", "narrowed", "replace_tensors_"]

Kept = dict[str, dict[int, Tensor]]
"""Name of a parameter or buffer -> dimension -> indices kept, ascending, ``(size,)`` int64."""


def narrowed(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a copy of the tensor with only the kept indices of each dimension."""
    with torch.no_grad():
        for dim, indices in sorted(kept.items()):  # whole rows first: they lie together
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.detach()


def replace_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers new values of any shape; the parameters stay the same objects, without gradient."""
    own = named_tensors(model)
    aliases: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                aliases.setdefault(id(buffer), []).append((module, leaf))
    with torch.inference_mode(False), torch.no_grad():
        for name, new in tensors.items():
            old = own[name]
            if isinstance(old, nn.Parameter):
                _set_data(old, new)
            else:
                for module, leaf in aliases[id(old)]:
                    module._buffers[leaf] = new.to(old.device)


@contextmanager
def all_or_nothing(
    model: nn.Module, optimizers: Iterable[Optimizer] = (), values: Iterable[str] = ()
) -> Iterator[None]:
    """Take back all that the body wrote if it does not come to its end, be it by Ctrl-C or for want of memory.

    That is tensors in place of others, gradients, attributes, buffers, what optimizers hold, and what hooks keep.

    Args:
        model: The model that the body writes to.
        optimizers: The optimizers whose state it writes to.
        values: Names of tensors into which it writes values; they are copied before.
    """
    own = named_tensors(model)
    modules = [module for _, module in modules_of(model)]
    hooks = [hook for module in modules for hook in module._state_dict_hooks.values() if hasattr(hook, "__dict__")]
    states = [optimizer.state for optimizer in optimizers]
    # Shallow copies are enough: shapes change by putting new objects in the place of old ones.
    tables = [vars(owner) for owner in (*modules, *hooks)] + [module._buffers for module in modules]
    tables += [state[p] for state in states for p in model.parameters() if p in state]
    before = [(table, table.copy()) for table in tables]
    data = [(parameter, parameter.data, parameter.grad) for parameter in model.parameters()]
    written = [(own[name], own[name].detach().clone()) for name in values]
    try:
        yield
    except BaseException:
        for parameter, old, gradient in data:
            if parameter.shape != old.shape or parameter.data_ptr() != old.data_ptr():
                _set_data(parameter, old)
            parameter.grad = gradient
        for table, content in before:
            table.clear()
            table.update(content)
        with torch.inference_mode(False), torch.no_grad():
            for tensor, value in written:
                tensor.copy_(value)
        raise


def followed(optimizer: Optimizer, parameter: nn.Parameter, kept: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return what an optimizer's state of a parameter becomes once the parameter is cut; nothing is written.

    A tensor of the parameter's own rank follows along each dimension in which it has the parameter's size; this covers
    factored state, such as Adafactor's, too. Single numbers stay.

    Raises:
        PruningError: If the state cannot belong to the parameter.
    """
    slim: dict[str, Tensor] = {}
    for key, value in optimizer.state[parameter].items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        fits = value.dim() == parameter.dim() and all(value.shape[dim] in (1, parameter.shape[dim]) for dim in kept)
        if not fits:
            raise PruningError(
                f"{type(optimizer).__name__}: state {key!r} of shape {tuple(value.shape)} does not fit its parameter "
                f"of shape {tuple(parameter.shape)}. Prune before loading a state that belongs to another model."
            )
        slim[key] = narrowed(
            value, {dim: indices for dim, indices in kept.items() if value.shape[dim] > 1}
        ).contiguous()
    return slim


def _set_data(parameter: nn.Parameter, new: Tensor) -> None:
    parameter.grad = None
    # A change of dtype makes autograd forget the gradient accumulator that remembers the old shape.
    other = torch.float64 if new.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = new.to(parameter.device)
