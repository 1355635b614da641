"""Knows how example inputs reach a model and how tensors are found in what comes back; changes nothing."""

import dataclasses
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_prune.model.errors import PruningError

__all__ = [
    "ExampleInputs",
    "Instead",
    "as_call",
    "call_on",
    "called",
    "fewer_positions",
    "hold_nothing",
    "modules_of",
    "refuse_empty",
    "refuse_shapeless",
    "run",
    "same_draws",
    "tensors_in",
    "undisturbed",
]


class Instead(NamedTuple):
    """What runs in place of a model's ``forward``: ``function(model, *inputs)``."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]


ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Instead
"""A tensor (the one positional input), a tuple of positional or a mapping of keyword inputs, or what runs instead."""

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})
_FUNCTIONS = frozenset({FunctionType, MethodType})
_ORDINARY = frozenset({nn.Parameter, Tensor})  # never without shape


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn example inputs into the positional and keyword arguments of one call of the model.

    Raises:
        TypeError: If ``example_inputs`` is neither a tensor, a tuple (or list) nor a mapping.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Instead):
        return example_inputs.inputs, {}
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
    return called(example_inputs)(model, *args, **kwargs)


def called(example_inputs: ExampleInputs) -> Callable[..., Any]:
    """Return the function of model and arguments that example inputs are for: the model's own call, or another."""
    return example_inputs.function if isinstance(example_inputs, Instead) else _call


def _call(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def call_on(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a tuple or list of positional inputs, a mapping of keyword inputs, or one input."""
    return run(
        model, batch if isinstance(batch, tuple | Mapping) else tuple(batch) if isinstance(batch, list) else (batch,)
    )


def fewer_positions(example_inputs: ExampleInputs, fewest: int = 32) -> Iterator[ExampleInputs]:
    """Yield example inputs with every fourth, third, then second row and column of each image, the smallest first.

    Images are tensors of floating point ``(N, C, ..., H, W)``; their sides stay at ``fewest`` or more, else there is
    nothing to yield.
    """
    sides = [min(tensor.shape[-2:]) for tensor in tensors_in(example_inputs) if _is_image(tensor)]
    for step in (4, 3, 2):
        if sides and min(sides) >= fewest * step:
            yield pytree.tree_map_only(
                Tensor,
                lambda tensor, step=step: tensor[..., ::step, ::step].contiguous() if _is_image(tensor) else tensor,
                example_inputs,
            )


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() >= 4 and tensor.is_floating_point()


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


def hold_nothing(inputs: Any) -> bool:
    """Tell whether inputs, or a batch, hold tensors and none of them an entry."""
    sizes = [tensor.numel() for tensor in tensors_in(inputs)]
    return bool(sizes) and not any(sizes)


def refuse_empty(example_inputs: ExampleInputs) -> None:
    """Refuse inputs on which nothing is computed, so that nothing that must leave together would meet.

    Raises:
        PruningError: If they hold tensors, and none of them an entry.
    """
    if hold_nothing(example_inputs):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(example_inputs))
        raise PruningError(f"The example inputs hold no entries (shapes {shapes}). Pass one example at least.")


def refuse_shapeless(model: nn.Module) -> None:
    """Refuse lazy modules before their first run, which changes them for good.

    Raises:
        PruningError: If a parameter or buffer has no shape yet.
    """
    _refuse_shapeless(modules_of(model))


def _refuse_shapeless(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for path, module in modules:
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if type(tensor) not in _ORDINARY and tensor is not None and is_lazy(tensor):
                    name = f"{path}.{leaf}".lstrip(".")
                    raise PruningError(
                        f"{name} gets its shape only at the first forward pass. Run the model once before."
                    )


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module once, with its path, as ``named_modules`` does, in a fraction of the time."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting = [("", model)]  # the next one comes last
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the same from the generators of Python and numpy each time, and leave these as found.

    Code that skips layers or masks positions at random takes the same path whenever it is looked at.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients and leave mode, RNG, buffers and module attributes as found.

    What torch.compile has compiled runs as it was written, since no compiled code can be traced. What a forward pass
    writes onto its modules (a cached mask, a step counter, BatchNorm statistics, an entry of a list or dict, a hook) is
    taken back.

    Raises:
        PruningError: If a parameter or buffer has no shape yet.
    """
    named = modules_of(model)
    _refuse_shapeless(named)
    modules = [module for _, module in named]
    training = [module.training for module in modules]
    own = {id(buffer): buffer for module in modules for buffer in module._buffers.values() if buffer is not None}
    attributes = [vars(module).copy() for module in modules]
    # Among the containers are each module's parameters, buffers, submodules and hooks; most are hooks that it lacks.
    containers = [value for found in attributes for value in found.values() if type(value) in _CONTAINERS]
    contents = [container.copy() if container else None for container in containers]
    compiled = _uncompiled(modules)
    buffers = [(buffer, buffer.detach().clone()) for buffer in own.values() if not buffer.is_meta]
    devices = {
        tensor.device.index or 0
        for module in modules
        for tensor in module._parameters.values()
        if tensor is not None and tensor.is_cuda
    }
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        try:
            for module in modules:
                if module.training:
                    module.training = False
            for module, written in compiled:
                vars(module).update(written)
            yield
        finally:
            for module, mode, found in zip(modules, training, attributes, strict=True):
                vars(module).clear()
                vars(module).update(found)
                if module.training is not mode:  # scripted modules keep it elsewhere
                    module.training = mode
            for container, content in zip(containers, contents, strict=True):
                if container:
                    container.clear()
                if content is not None:
                    (container.extend if isinstance(container, list) else container.update)(content)
            for buffer, value in buffers:
                # Versions do not tell: batch_norm updates its statistics without a new one.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _uncompiled(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return the attributes of modules that torch.compile has changed, with the values they had before."""
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    classes: dict[type, Any] = {}  # whose ``forward`` was compiled
    for module in modules:
        kind, own = type(module), vars(module)
        if kind not in classes:
            forward = getattr(kind, "forward", None)
            classes[kind] = forward if hasattr(forward, "_torchdynamo_orig_callable") else None
        functions = {name: value for name, value in own.items() if type(value) in _FUNCTIONS}
        if classes[kind] is not None and "forward" not in functions:
            functions["forward"] = MethodType(classes[kind], module)
        written: dict[str, Any] = {"_compiled_call_impl": None} if "_compiled_call_impl" in own else {}
        for name, value in functions.items():
            function = getattr(value, "_torchdynamo_orig_callable", None)
            if function is not None:
                bound = inspect.ismethod(value) and not inspect.ismethod(function)  # compiled in the class
                written[name] = MethodType(function, module) if bound else function
        if written:
            found.append((module, written))
    return found
