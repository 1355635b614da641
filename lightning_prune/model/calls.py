"""Calling a model on example inputs without side effects, and finding tensors in its inputs and outputs."""

import dataclasses
import gc
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError

__all__ = [
    "ExampleInputs",
    "Instead",
    "as_call",
    "call_on",
    "called",
    "fewer_positions",
    "hold_nothing",
    "mode_of",
    "modules_of",
    "refuse_empty",
    "refuse_shapeless",
    "run",
    "same_draws",
    "tensors_in",
    "uncollected",
    "undisturbed",
    "walked_once",
]


class Instead(NamedTuple):
    """A function to run in place of the model's ``forward``: ``function(model, *inputs)``."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]


ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Instead
"""A tensor (the one positional input), a tuple of positional or a mapping of keyword inputs, or an :class:`Instead`."""

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})
_FUNCTIONS = frozenset({FunctionType, MethodType})
_ORDINARY = frozenset({nn.Parameter, Tensor})  # never without shape


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for one call of the model.

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
    """Run the model on example inputs and return its outputs."""
    args, kwargs = as_call(example_inputs)
    return called(example_inputs)(model, *args, **kwargs)


def called(example_inputs: ExampleInputs) -> Callable[..., Any]:
    """Return the function of model and arguments to run: the model's own call, or that of an :class:`Instead`."""
    if isinstance(example_inputs, Instead):
        return example_inputs.function
    return _call


def _call(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def call_on(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch: a tuple or list of positional inputs, a mapping of keyword inputs, or one input."""
    if isinstance(batch, list):
        batch = tuple(batch)
    if not isinstance(batch, tuple | Mapping):
        batch = (batch,)
    return run(model, batch)


def fewer_positions(example_inputs: ExampleInputs, fewest: int = 32) -> Iterator[ExampleInputs]:
    """Yield example inputs with every fourth, third, then second row and column of each image.

    Images are floating-point tensors ``(N, C, ..., H, W)``. Inputs with a side below ``fewest`` are not yielded.
    """
    sides = [min(tensor.shape[-2:]) for tensor in tensors_in(example_inputs) if _is_image(tensor)]

    def thinned(step: int, tensor: Tensor) -> Tensor:
        return tensor[..., ::step, ::step].contiguous() if _is_image(tensor) else tensor

    for step in (4, 3, 2):
        if sides and min(sides) >= fewest * step:
            yield pytree.tree_map_only(Tensor, partial(thinned, step), example_inputs)


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
    """Return whether inputs, or a batch, hold tensors, all of which are empty."""
    sizes = [tensor.numel() for tensor in tensors_in(inputs)]
    return bool(sizes) and not any(sizes)


def refuse_empty(example_inputs: ExampleInputs) -> None:
    """Refuse inputs without entries, on which no channel groups can be found.

    Raises:
        PruningError: If the inputs hold tensors, all of which are empty.
    """
    if hold_nothing(example_inputs):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(example_inputs))
        raise PruningError(f"The example inputs hold no entries (shapes {shapes}). Pass at least one example.")


def refuse_shapeless(model: nn.Module) -> None:
    """Refuse lazy modules that have not run yet: their first run changes them for good.

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
                        f"{name} gets its shape only at the first forward pass. Run the model once first."
                    )


_walked: ContextVar[tuple[nn.Module, list[tuple[str, nn.Module]]] | None] = ContextVar("walked", default=None)
"""A model whose modules stay what they are, and these."""


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Walk a model once for all calls of :func:`modules_of` in the body, in which its modules stay the same ones."""
    token = _walked.set((model, _walk(model)))
    try:
        yield
    finally:
        _walked.reset(token)


@contextmanager
def uncollected() -> Iterator[None]:
    """Run the body without the cyclic garbage collector.

    A trace makes many objects that all stay alive; a collection would walk through these, and through all else that
    Python holds, several times.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module once, with its path: ``named_modules`` in a fraction of the time."""
    walked = _walked.get()
    return list(walked[1]) if walked is not None and walked[0] is model else _walk(model)


def _walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
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
    """Seed the generators of Python and NumPy for the body, and restore them afterwards.

    Code that skips layers or masks positions at random then takes the same path every time.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def mode_of(model: nn.Module, training: bool, gradients: bool = False) -> Iterator[None]:
    """Run the body in train mode or not, with gradients recorded or not, inside :func:`undisturbed`."""
    if training:
        model.train()
    with torch.set_grad_enabled(gradients):
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients, then restore modes, RNG, buffers and module attributes.

    Modules compiled by torch.compile run their original code, since compiled code cannot be traced. Everything that a
    forward pass writes onto its modules (a cached mask, a step counter, BatchNorm statistics, an entry of a list or
    dict, a hook) is undone.

    Raises:
        PruningError: If a parameter or buffer has no shape yet.
    """
    named = modules_of(model)
    _refuse_shapeless(named)
    before = _ModuleState([module for _, module in named])
    with torch.inference_mode(False), torch.no_grad(), generators_restored(before.devices()):
        try:
            for module in before.modules:
                if module.training:
                    module.training = False
            for module, written in _uncompiled(before.modules):
                vars(module).update(written)
            yield
        finally:
            before.restore_()


class _ModuleState:
    """The modes, attributes, containers and buffers of modules, so that they can be restored."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.training = [module.training for module in modules]
        self.attributes = [vars(module).copy() for module in modules]
        # Containers are changed in place, so their contents are copied one level deep. Among them are each module's
        # parameters, buffers, submodules and hooks; most are empty dicts of hooks, for which None saves the copy.
        containers: list[tuple[Any, Any]] = []
        for found in self.attributes:
            for value in found.values():
                if type(value) in _CONTAINERS:
                    containers.append((value, value.copy() if value else None))
        self.containers = containers
        self.buffers: list[tuple[Tensor, Tensor]] = []
        seen: set[int] = set()
        for module in modules:
            for buffer in module._buffers.values():
                if buffer is None or buffer.is_meta or id(buffer) in seen:
                    continue
                seen.add(id(buffer))
                self.buffers.append((buffer, buffer.detach().clone()))

    def devices(self) -> set[torch.device]:
        """Return the devices that hold parameters or buffers."""
        found: set[torch.device] = set()
        for module in self.modules:
            for tensors in (module._parameters, module._buffers):
                found.update(tensor.device for tensor in tensors.values() if tensor is not None)
        return found

    def restore_(self) -> None:
        """Restore everything, writing only what has changed."""
        for module, mode, found in zip(self.modules, self.training, self.attributes, strict=True):
            vars(module).clear()
            vars(module).update(found)
            if module.training is not mode:  # scripted modules keep it elsewhere
                module.training = mode
        for container, content in self.containers:
            if container:
                container.clear()
            if content is None:
                continue
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        for buffer, value in self.buffers:
            # Compared by value: batch_norm updates its statistics without raising their version counter.
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _uncompiled(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return the attributes that torch.compile replaced on modules, with their original values."""
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    compiled_forward: dict[type, Any] = {}  # class -> its ``forward`` if that was compiled in the class, else None
    for module in modules:
        kind, own = type(module), vars(module)
        if kind not in compiled_forward:
            forward = getattr(kind, "forward", None)
            compiled_forward[kind] = forward if hasattr(forward, "_torchdynamo_orig_callable") else None
        functions = {name: value for name, value in own.items() if type(value) in _FUNCTIONS}
        if compiled_forward[kind] is not None and "forward" not in functions:
            functions["forward"] = MethodType(compiled_forward[kind], module)
        original: dict[str, Any] = {}
        if "_compiled_call_impl" in own:  # set by ``module.compile()``
            original["_compiled_call_impl"] = None
        for name, value in functions.items():
            function = getattr(value, "_torchdynamo_orig_callable", None)
            if function is None:
                continue
            # A method compiled in the class remembers the plain function, which needs its ``self`` back.
            if inspect.ismethod(value) and not inspect.ismethod(function):
                function = MethodType(function, module)
            original[name] = function
        if original:
            found.append((module, original))
    return found
