"""Parameters that are split over processes: this process's part, and the whole; knows no strategy.

The only file that uses private names of FSDP2 and of tensor parallelism: nothing public undoes ``fully_shard`` or
``parallelize_module``, or says which parameter a tensor is that FSDP2 has gathered.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "as_sharded", "gathered_names", "gradient_part", "hook_counts", "is_sharded", "missing_of_torch", "own_part",
    "over_processes", "part_like", "settle_", "split_like", "undo_fully_shard_", "undo_parallelize_module_", "whole",
    "whole_numbers",
]  # fmt: skip

_DEPTH, _MOST = 3, 1000  # containers in which numbers are looked for: how deep, and of how many entries
_OF_TORCH = frozenset(vars(nn.Module()))
_BIG = ("torch", "lightning", "pytorch_lightning", "torchmetrics")  # packages whose objects are no configs

Hooks = OrderedDict[int, Any]
"""Hooks of a module, by their key."""


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


def gradient_part(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a gradient that belongs to this process's part of its parameter.

    Under sequence parallelism the gradient of a parameter that every process holds is a sum that is still to be taken.
    All processes must call this together.
    """
    split: Any = gradient.detach()
    like: Any = parameter
    if not is_sharded(split) or not is_sharded(like) or split.placements == like.placements:
        return own_part(split)
    return own_part(split.redistribute(like.device_mesh, like.placements))


def split_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Split a value that is whole, if it is of the shape of a tensor that is split; else return it."""
    alike = value.dim() > 0 and value.shape == tensor.shape and is_sharded(tensor)
    return as_sharded(value, tensor) if alike and not is_sharded(value) else value


def settle_(model: nn.Module) -> None:
    """Free what FSDP2 has gathered, as it may after a validation, so that the parameters are the parts again."""
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)) and hasattr(module, "_get_fsdp_state"):
            reshard()


def over_processes(sums: Sequence[Tensor], tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Add up over processes what each has summed over its part of tensors, in one message for all.

    Args:
        sums: For each tensor, one number for each index of a dimension of this process's part.
        tensors: What was summed over; of one that is not split, the sum stays as it is.
        dims: The dimension that each sum was not taken over.

    Returns:
        One number for each index of that dimension of the whole tensor.
    """
    found = list(sums)
    split = [place for place, tensor in enumerate(tensors) if is_sharded(tensor)]
    meshes: dict[Any, list[int]] = {}
    for place in split:
        tensor: Any = tensors[place]
        found[place] = _laid_out(sums[place], tensor, dims[place])
        meshes.setdefault(tensor.device_mesh, []).append(place)
    for mesh, places in meshes.items():
        total = torch.cat([found[place] for place in places])
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        parts = total.split([len(found[place]) for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part
    return found


def _laid_out(rows: Tensor, tensor: Any, dim: int) -> Tensor:
    """Put this process's numbers where they belong in those of the whole dimension; zeros where another has them."""
    everywhere = rows.new_zeros(tensor.shape[dim])
    own = torch.arange(tensor.shape[dim], device=rows.device)
    mesh = tensor.device_mesh
    splits = list(zip(mesh.get_coordinate(), tensor.placements, mesh.shape, strict=True))
    splits.sort(key=lambda split: hasattr(split[1], "split_factor"))  # FSDP2 splits what tensor parallelism has split
    for at, placement, size in splits:
        if placement.is_replicate() and at > 0:
            return everywhere  # the first of those that hold the same counts it
        if getattr(placement, "dim", None) == dim:
            chunks = own.chunk(size)
            own = chunks[at] if at < len(chunks) else own[:0]
    return everywhere.index_copy(0, own, rows)


def missing_of_torch() -> str:
    """Return what this version of torch lacks to prune what is split over processes, or an empty string."""
    try:
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY  # noqa: F401
        from torch.distributed._composable_state import _module_state_mapping  # noqa: F401
        from torch.distributed.fsdp import FSDPModule  # noqa: F401
        from torch.distributed.tensor import distribute_tensor
    except ImportError as error:
        return str(error)
    known = inspect.signature(distribute_tensor).parameters  # torch 2.6 distributes by messages alone
    return "" if "src_data_rank" in known else "distribute_tensor without messages"


def undo_fully_shard_(model: nn.Module) -> None:
    """Turn every module back into its own class, without the hooks that gather and free its parameters."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    for module in list(_fsdp_modules(model)):
        state = module._get_fsdp_state()
        for name in ("_pre_forward_hook_handle", "_post_forward_hook_handle"):
            getattr(state, name).remove()
        for group in _groups(state):
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
            for parameter in group.fsdp_params:
                parameter._post_load_hook_handle.remove()
        module.__class__ = type(module).__bases__[1]  # behind FSDPModule
        _module_state_mapping.pop(module, None)
        for key in (STATE_KEY, REGISTRY_KEY):
            vars(module).pop(key, None)


def undo_parallelize_module_(model: nn.Module) -> list[tuple[Hooks, int]]:
    """Remove from every module the hooks by which torch splits and gathers activations; make buffers whole.

    These hooks are functions of torch's own files, also where ``distribute_module`` sets them for others.

    Returns:
        The other hooks that ran after one of them, as ``(dict, key)``: move them to the end once they are set again.
    """
    later: list[tuple[Hooks, int]] = []
    for module in model.modules():
        vars(module).pop("_distribute_module_applied", None)  # which refuses a second call
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = whole(buffer)
        for hooks, *flags in _hooks_of(module):
            behind = False
            for key, hook in list(hooks.items()):
                if _splits_activations(hook):
                    behind = True
                    for told in (hooks, *flags):
                        told.pop(key, None)
                elif behind:
                    later.append((hooks, key))
    return later


def whole_numbers(model: nn.Module) -> dict[tuple[str, str], int]:
    """Return the whole numbers that modules hold as attributes, in containers and configs too, by path and name."""
    found: dict[tuple[str, str], int] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                found |= {(path, place): number for place, number in _numbers_in(name, value, _DEPTH)}
    return found


def _numbers_in(place: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in a value, each with the expression that leads to it."""
    if type(value) is int:
        yield place, value
    elif not depth or isinstance(value, nn.Module | Tensor):
        return
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items if len(value) <= _MOST else ():  # longer ones are data
            yield from _numbers_in(f"{place}[{key!r}]", one, depth - 1)
    elif type(value).__module__.partition(".")[0] not in _BIG:  # such as a config
        for name, one in getattr(value, "__dict__", {}).items():
            yield from _numbers_in(f"{place}.{name}", one, depth - 1)


def hook_counts(model: nn.Module) -> dict[int, int]:
    """Return how many hooks run around the forward pass of every module, by its ``id``."""
    return {id(module): sum(len(hooks) for hooks, *_ in _hooks_of(module)) for module in model.modules()}


def _hooks_of(module: nn.Module) -> Iterator[tuple[Hooks, ...]]:
    """Yield the hooks before and behind the forward pass, each followed by what else is noted of them, by their key."""
    known: Any = module
    yield known._forward_pre_hooks, known._forward_pre_hooks_with_kwargs
    yield known._forward_hooks, known._forward_hooks_with_kwargs, known._forward_hooks_always_called


def _splits_activations(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor.")


def gathered_names(model: nn.Module) -> dict[int, str]:
    """Return the names of the parameters that FSDP2 gathers for forward and backward passes, by ``id``.

    These are other objects than the model's parameters between two passes, and what autograd graphs end in.
    """
    paths = {id(module): f"{path}." if path else "" for path, module in model.named_modules()}
    names: dict[int, str] = {}
    for module in _fsdp_modules(model):
        for group in _groups(module._get_fsdp_state()):
            for parameter in group.fsdp_params:
                gathered = getattr(parameter, "_unsharded_param", None)  # None before the first pass
                at = parameter._module_info
                if gathered is not None and id(at.module) in paths:
                    names[id(gathered)] = f"{paths[id(at.module)]}{at.param_name}"
    return names


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    if "torch.distributed.fsdp" not in sys.modules:  # slow to import, and there if any such module is
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def _groups(state: Any) -> Iterator[Any]:
    """Yield the groups of parameters that FSDP2 gathers together; newer versions of torch allow several."""
    yield from filter(None, getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])
