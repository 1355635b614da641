"""Calling a model on example inputs without side effects, and finding tensors in its inputs and outputs."""

import dataclasses
import gc
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_prune.model.errors import PruningError

__all__ = [
    "ExampleInputs", "Instead", "as_call", "call_on", "called", "fewer_positions", "hold_nothing", "mode_of",
    "modules_of", "modules_with_tensors", "numbers_in", "refuse_empty", "refuse_shapeless", "run", "same_draws",
    "tensors_in", "uncollected", "walked_once",
]  # fmt: skip


class Instead(NamedTuple):
    """A function to run in place of the model's ``forward``: ``function(model, *inputs)``."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]


ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Instead
"""A tensor (the one positional input), a tuple of positional or a mapping of keyword inputs, or an :class:`Instead`."""

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


def numbers_in(value: Any) -> list[Tensor]:
    """Return the tensors of numbers that can be compared by distance, of those held by nested containers.

    Complex numbers are returned as pairs of real ones; whole numbers, such as choices, are left out.

    Examples:
        >>> [tuple(tensor.shape) for tensor in numbers_in([torch.ones(2), torch.ones(3, dtype=torch.complex64).conj()])]
        [(2,), (3, 2)]
        >>> numbers_in({"chosen": torch.tensor([3])})
        []
    """
    found = (torch.view_as_real(own.resolve_conj()) if own.is_complex() else own for own in tensors_in(value))
    return [tensor for tensor in found if tensor.is_floating_point()]


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
    for path, module in modules_of(model):
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if type(tensor) not in _ORDINARY and tensor is not None and is_lazy(tensor):
                    name = f"{path}.{leaf}".lstrip(".")
                    raise PruningError(
                        f"{name} gets its shape only at the first forward pass. Run the model once first."
                    )


_Named = list[tuple[nn.Module, list[str], list[str]]]
"""Modules, with the names of their parameters and of their buffers."""


class _Walked:
    """The modules of a model, which stay what they are, and the names of the tensors that they hold."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = _walk(model)
        self._named = _named(self.modules)

    def named(self) -> _Named:
        """Return the names, found anew where modules hold another number of tensors by now."""
        for module, parameters, buffers in self._named:
            if len(module._parameters) != len(parameters) or len(module._buffers) != len(buffers):
                self._named = _named(self.modules)
                break
        return self._named


_walked: ContextVar[_Walked | None] = ContextVar("walked", default=None)


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Walk a model once for all calls of :func:`modules_of` in the body.

    Its modules stay the same ones there, and those that hold no tensors get none.
    """
    token = _walked.set(_Walked(model))
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
    return list(walked.modules) if walked is not None and walked.model is model else _walk(model)


def modules_with_tensors(model: nn.Module) -> _Named:
    """Return every module that holds parameters or buffers once, with their names in the model, in order."""
    walked = _walked.get()
    return walked.named() if walked is not None and walked.model is model else _named(_walk(model))


def _named(modules: Iterable[tuple[str, nn.Module]]) -> _Named:
    found = []
    for path, module in modules:
        if module._parameters or module._buffers:  # most modules of a network hold neither
            prefix = f"{path}." if path else ""
            # By items alone: what TorchScript has in place of dicts knows no other way.
            parameters = [prefix + leaf for leaf, _ in module._parameters.items()]
            found.append((module, parameters, [prefix + leaf for leaf, _ in module._buffers.items()]))
    return found


def _walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r}; pass a torch.nn.Module, made of its class.")
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
