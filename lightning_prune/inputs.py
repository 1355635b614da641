"""Knows how example inputs reach a model and how tensors are found in what comes back; changes nothing."""

import dataclasses
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import PruningError

__all__ = ["ExampleInputs", "as_call", "call_on", "refuse_shapeless", "run", "tensors_in", "undisturbed"]

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor (the one positional input), a tuple of positional inputs or a mapping of keyword inputs."""

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn example inputs into the positional and keyword arguments of one call of the model.

    Raises:
        TypeError: If ``example_inputs`` is neither a tensor, a tuple (or list) nor a mapping.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        f"example_inputs: got {type(example_inputs).__name__}; pass a tensor, a tuple of positional inputs "
        "or a dict of keyword inputs."
    )


def run(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call the model on example inputs and return whatever it returns."""
    args, kwargs = as_call(example_inputs)
    return model(*args, **kwargs)


def call_on(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a tuple or list of positional inputs, a mapping of keyword inputs, or one input."""
    return run(
        model, batch if isinstance(batch, tuple | Mapping) else tuple(batch) if isinstance(batch, list) else (batch,)
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors held by nested tuples, lists, mappings, dataclasses and plain objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list | set | frozenset):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        yield from tensors_in(vars(value))


def refuse_shapeless(model: nn.Module) -> None:
    """Refuse lazy modules before their first run, which changes them for good.

    Raises:
        PruningError: If a parameter or buffer has no shape yet.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise PruningError(f"{name} gets its shape only at the first forward pass. Run the model once before.")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients and leave mode, RNG, buffers and module attributes as found.

    What torch.compile has compiled runs as it was written, since no compiled code can be traced. What a forward pass
    writes onto its modules (a cached mask, a step counter, BatchNorm statistics, an entry of a list or dict, a hook) is
    taken back.

    Raises:
        PruningError: If a parameter or buffer has no shape yet.
    """
    refuse_shapeless(model)
    modules = list(model.modules())
    training = [module.training for module in modules]
    attributes = [dict(vars(module)) for module in modules]
    # Among the dicts are each module's parameters, buffers, submodules and hooks.
    found_in = [value for found in attributes for value in found.values() if type(value) in _CONTAINERS]
    contents = [
        (container, list(container.items() if isinstance(container, dict) else container) if container else [])
        for container in found_in
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        try:
            for module in modules:
                module.training = False
                vars(module).update(_uncompiled(module))
            yield
        finally:
            for module, mode, found in zip(modules, training, attributes, strict=True):
                vars(module).clear()
                vars(module).update(found)
                module.training = mode
            for container, content in contents:
                if not (container or content):  # most are hooks that no module has
                    continue
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            for buffer, value in buffers:
                # Versions do not tell: batch_norm updates its statistics without a new one.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _uncompiled(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that torch.compile has changed, with the values they had before."""
    written: dict[str, Any] = {"_compiled_call_impl": None} if "_compiled_call_impl" in vars(module) else {}
    own: dict[str, Any] = {
        name: value for name, value in vars(module).items() if isinstance(value, FunctionType | MethodType)
    }
    forward = getattr(type(module), "forward", None)
    if forward is not None:
        own = {"forward": MethodType(forward, module), **own}
    for name, value in own.items():
        function = getattr(value, "_torchdynamo_orig_callable", None)
        if function is not None:
            bound = inspect.ismethod(value) and not inspect.ismethod(function)  # compiled in the class
            written[name] = MethodType(function, module) if bound else function
    return written
