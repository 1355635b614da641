"""Writes new shapes into a model while its parameters stay the same objects; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.model.calls import modules_of
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import named_tensors
from lightning_prune.structure.tensor_names import named_parameters

__all__ = [
    "Kept", "all_or_nothing", "followed", "narrowed", "refuse_state_aside", "refuse_unfitting",
    "replace_tensors_", "taken", "with_wrapped",
]  # fmt: skip

Kept = dict[str, dict[int, Tensor]]
"""Name of a parameter or buffer -> dimension -> indices kept, ascending, ``(size,)`` int64."""


def narrowed(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a copy of the tensor with only the kept indices of each dimension, channels last in memory if it was."""
    tensor = tensor.detach()
    memory_format = _memory_format(tensor)
    for dim, indices in sorted(kept.items()):  # whole rows first: they lie together
        tensor = taken(tensor, dim, indices)
    return tensor.contiguous(memory_format=memory_format) if tensor.layout == torch.strided else tensor


def taken(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Return ``tensor.index_select(dim, indices)``, whatever device the indices are on, by the faster operator."""
    if not tensor.is_cpu:
        return tensor.index_select(dim, indices.to(tensor.device))
    last = tensor.dim() - 1
    narrow = dim == 1 and tensor.dtype is torch.float32  # which torch has a loop of its own for
    if dim == 0 or dim != last or narrow or tensor.layout is not torch.strided or not tensor.is_floating_point():
        return tensor.index_select(dim, indices)
    # Along the last dimension, torch's index_select takes three to twenty times as long.
    return tensor.gather(dim, indices.expand(*tensor.shape[:-1], indices.numel()))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return ``channels_last`` or ``channels_last_3d`` for a tensor that is only contiguous so."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None or tensor.layout != torch.strided or tensor.is_contiguous():
        return torch.contiguous_format
    return last if tensor.is_contiguous(memory_format=last) else torch.contiguous_format


# Decorators rather than blocks: Ctrl-C on the last line of a block leaves torch without gradients.
@torch.inference_mode(False)
@torch.no_grad()
def replace_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write new values of any shape into parameters and buffers; parameters stay the same objects, without gradient."""
    own = named_tensors(model)
    aliases: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in modules_of(model):
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                aliases.setdefault(id(buffer), []).append((module, leaf))
    for name, new in tensors.items():
        old = own[name]
        if isinstance(old, nn.Parameter):
            _set_data(old, new)
        else:
            for module, leaf in aliases[id(old)]:
                module._buffers[leaf] = new.to(old.device)


class all_or_nothing:  # noqa: N801, it is used like a function
    """Undo all that the body wrote if it does not come to its end, be it by Ctrl-C or for want of memory.

    That is tensors in place of others, gradients, attributes, buffers, submodules, what optimizers hold, and what hooks
    keep.
    A class, since a generator that is never resumed would take things back when it is collected.

    Args:
        model: The model that the body writes to.
        optimizers: The optimizers whose state it writes to.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        modules = [module for _, module in modules_of(model)]
        hooks = [hook for module in modules for hook in module._state_dict_hooks.values() if hasattr(hook, "__dict__")]
        optimizers = list(optimizers)
        states = [optimizer.state for optimizer in optimizers]
        # Shallow copies are enough: shapes change by putting new objects in the place of old ones.
        tables: list[dict[Any, Any]] = [vars(owner) for owner in (*modules, *hooks)]
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                tables += [module._buffers, module._modules]
        tables += states
        tables += [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = list(named_parameters(model).values())
        tables += [state[p] for state in states for p in parameters if p in state]
        self._tables = [(table, table.copy()) for table in tables]
        self._data = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
        self._values: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> all_or_nothing:
        """Begin; everything but values is remembered already."""
        return self

    def copy_values(self, tensors: Iterable[Tensor]) -> None:
        """Copy tensors into which the body is about to write values."""
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Undo everything if the body failed."""
        if kind is not None:
            self._take_back()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_back(self) -> None:
        for parameter, data, gradient in self._data:
            if parameter.shape != data.shape or parameter.data_ptr() != data.data_ptr():
                _set_data(parameter, data)
            parameter.grad = gradient
        for table, content in self._tables:
            table.clear()
            table.update(content)
        for tensor, value in self._values:
            tensor.copy_(value)


def followed(optimizer: Optimizer, parameter: nn.Parameter, kept: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return what an optimizer's state of a parameter becomes once the parameter is cut; nothing is written.

    A tensor of the parameter's own rank follows along each dimension in which it has the parameter's size; this covers
    factored state, such as Adafactor's, too. Lists, tuples and dicts follow tensor by tensor. Single numbers stay.

    Raises:
        PruningError: If the state cannot belong to the parameter.
    """
    slim: dict[str, Any] = {}
    for key, value in optimizer.state[parameter].items():
        if not any(isinstance(leaf, Tensor) and leaf.numel() != 1 for leaf in tree_leaves(value)):
            continue
        slim[key] = tree_map_only(Tensor, partial(_followed, type(optimizer).__name__, key, parameter, kept), value)
    return slim


def _followed(optimizer: str, key: str, parameter: nn.Parameter, kept: Mapping[int, Tensor], value: Tensor) -> Tensor:
    """Return one tensor of a parameter's state as it is after a cut."""
    if value.numel() == 1:
        return value
    dims = list(range(parameter.dim()))  # of the parameter, that the tensor has
    # means over the last dimension, or the one before it, without a dimension of size 1 in its place
    if value.dim() == parameter.dim() - 1 and str(key).endswith(("_row", "_col")):
        dims.remove(parameter.dim() - (1 if str(key).endswith("_row") else 2))
    if len(dims) != value.dim() or any(value.shape[i] not in (1, parameter.shape[d]) for i, d in enumerate(dims)):
        raise PruningError(
            f"{optimizer}: state {key!r} of shape {tuple(value.shape)} does not fit its parameter "
            f"of shape {tuple(parameter.shape)}, so it cannot be cut like it. Train with an optimizer whose state has "
            "the shapes of its parameters, such as AdamW; or, if it was loaded, load that of this model."
        )
    return narrowed(value, {i: kept[d] for i, d in enumerate(dims) if d in kept and value.shape[i] > 1})


def refuse_unfitting(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers whose state of these parameters, as far as they have any, cannot be cut; nothing is written.

    Raises:
        PruningError: Naming the state.
    """
    parameters = list(parameters)
    for optimizer in with_wrapped(optimizers):
        refuse_state_aside(optimizer)
        for parameter in parameters:
            if parameter in optimizer.state:
                followed(optimizer, parameter, {})


def refuse_state_aside(optimizer: Optimizer) -> None:
    """Refuse an optimizer that keeps tensors for its parameters elsewhere than in ``state``, where they cannot follow.

    Raises:
        PruningError: Naming the place.
    """
    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    for group in optimizer.param_groups:
        shapes = {id(parameter): parameter.shape for parameter in group["params"] if parameter.numel() > 1}
        for name, value in (own | {key: value for key, value in group.items() if key != "params"}).items():
            pairs = chain.from_iterable(_pairs(table, group["params"]) for table in (value, *_inner(value)))
            if any(isinstance(t, Tensor) and id(t) not in shapes and shapes.get(key) == t.shape for key, t in pairs):
                raise PruningError(
                    f"{type(optimizer).__name__} keeps tensors for its parameters in {name!r}, where they cannot be "
                    "cut. Keep them in optimizer.state[parameter], or prune before the optimizer is made."
                )


def _pairs(table: Any, parameters: list[nn.Parameter]) -> list[tuple[int, Any]]:
    """Return what a container holds, each beside the id of the parameter that it may belong to."""
    if isinstance(table, dict):
        return [(key if isinstance(key, int) else id(key), tensor) for key, tensor in table.items()]
    if isinstance(table, list | tuple) and len(table) == len(parameters):
        return list(zip(map(id, parameters), table, strict=True))
    return []


def _inner(table: Any) -> list[Any]:
    """Return the containers in a container, such as those of each group."""
    values = table.values() if isinstance(table, dict) else table if isinstance(table, list | tuple) else ()
    return [value for value in values if isinstance(value, dict | list | tuple)]


def _set_data(parameter: nn.Parameter, new: Tensor) -> None:
    parameter.grad = None
    # A change of dtype makes autograd forget the gradient accumulator that remembers the old shape.
    other = torch.float16 if new.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = new.to(parameter.device)


def with_wrapped(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Return optimizers and those that they hold as attributes, such as the base of SAM: each state once."""
    found: list[Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if all(optimizer.state is not other.state for other in found):
            found.append(optimizer)
            waiting += [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return found
