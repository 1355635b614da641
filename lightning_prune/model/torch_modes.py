"""Modes of torch that a call may come in: ``torch.inference_mode``, whose tensors cannot be trained, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import modules_of
from lightning_prune.model.errors import PruningError

__all__ = ["changes_model", "ordinary", "refuse_inference_tensors", "trainable_afterwards"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def changes_model(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that traces and changes its first argument, the model.

    As :func:`trainable_afterwards`, and inside ``torch.autocast`` the function runs as if outside, too: the casts there
    hide parameters from a trace, and are less exact than what is verified.
    """

    @wraps(function)
    def outside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        model = args[0] if args else kwargs.get("model")
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        kinds = {"cpu", *(parameter.device.type for parameter in parameters)} - {"meta"}
        casting = [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]
        if not casting:
            return function(*args, **kwargs)
        with ExitStack() as modes:
            for kind in casting:
                modes.enter_context(torch.autocast(kind, enabled=False))
            modes.callback(torch.clear_autocast_cache)  # it holds casts of the weights as they were
            return function(*args, **kwargs)

    return trainable_afterwards(outside)


def trainable_afterwards(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that changes its first argument, the model, so that the model remains trainable.

    Inside ``torch.inference_mode``, the function runs as if outside. A model made in inference mode is refused before
    anything changes.
    """

    @wraps(function)
    def outside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, nn.Module):
            refuse_inference_tensors(function.__name__, model)
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return outside


def refuse_inference_tensors(where: str, model: nn.Module) -> None:
    """Refuse a model that holds tensors made in inference mode.

    Raises:
        PruningError: If it does, with the way to make ordinary tensors of them.
    """
    made: dict[int, str] = {}
    for path, module in modules_of(model):
        for own in (module._parameters, module._buffers):
            for leaf, tensor in own.items():
                # A lazy parameter has no shape yet and cannot be asked; it is refused elsewhere.
                if tensor is not None and not is_lazy(tensor) and tensor.is_inference():
                    made.setdefault(id(tensor), f"{path}.{leaf}" if path else leaf)
    if made:
        first = next(iter(made.values()))
        raise PruningError(
            f"{where}: {len(made)} parameters and buffers of {type(model).__name__} (the first is {first}) were made "
            "inside torch.inference_mode, so they can be neither pruned nor trained. Make the model outside of it, "
            "or give it ordinary tensors: model.load_state_dict({name: tensor.clone() for name, tensor in "
            "model.state_dict().items()}, assign=True)."
        )


def ordinary(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches with tensors made in inference mode copied, since gradients need ordinary tensors."""
    for batch in batches:
        yield pytree.tree_map_only(Tensor, _trainable, batch)


def _trainable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
