"""Takes layers out of a model, and brings them back: pass-throughs stand where they stood; decides nothing."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.model.calls import modules_of
from lightning_prune.structure import named_tensors
from lightning_prune.structure.skippable import outermost_of
from lightning_prune.structure.tensor_names import lies_in
from lightning_prune.surgery.layer_numbers import numbered_layers, renumber_
from lightning_prune.surgery.pass_through import Skipped
from lightning_prune.surgery.resize import all_or_nothing, with_wrapped

__all__ = [
    "bring_back_", "drop_state_", "follow_layers_", "groups_of", "has_all_layers", "paths_removed", "put_in_",
    "removed_layers", "set_groups_", "take_out_", "temporarily_skipped", "temporarily_whole",
]  # fmt: skip


def removed_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the layers that were removed from a model: path -> what is returned in their place."""
    return {path: module.skip for path, module in modules_of(model) if isinstance(module, Skipped)}


def paths_removed(model: nn.Module) -> list[str]:
    """Return the paths that the modules of removed layers had."""
    found = []
    for path, module in modules_of(model):
        if isinstance(module, Skipped):
            found += [path, *(f"{path}.{inner}" for inner, _ in modules_of(module.layer) if inner)]
    return found


@contextmanager
def temporarily_skipped(model: nn.Module, skips: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Leave layers out inside the block; nothing else of the model is touched.

    Args:
        model: The model.
        skips: Path of a layer -> what to return in its place. Layers inside of others need not be named.
    """
    before = [(module, dict(module._modules)) for _, module in modules_of(model) if module._modules]
    numbered = numbered_layers(model)
    try:
        put_in_(model, skips)
        renumber_(model, numbered)
        yield
    finally:
        for module, children in before:
            if dict(module._modules) != children:
                module._modules.clear()
                module._modules.update(children)
        renumber_(model, numbered)


@contextmanager
def temporarily_whole(model: nn.Module, names: Container[str] | None = None) -> Iterator[None]:
    """Put removed layers back inside the block, with zeros for their values: to time the whole model, not to use it.

    With ``names`` of tensors, only layers that held some of these are put back.
    """
    own = []
    for path, module in modules_of(model):
        if isinstance(module, Skipped) and (names is None or any(f"{path}.{leaf}" in names for leaf in module.sizes)):
            own.append(module)
    here = {id(tensor) for tensor in named_tensors(model).values()}
    numbered = numbered_layers(model)
    try:
        for skipped in own:
            _resize_own_(skipped, here, empty=False)
            _exchange(model, skipped, skipped.layer)
        renumber_(model, numbered)
        yield
    finally:
        for skipped in own:
            _exchange(model, skipped.layer, skipped)
            _resize_own_(skipped, here, empty=True)
        renumber_(model, numbered)


def put_in_(model: nn.Module, skips: Mapping[str, dict[str, Any]]) -> dict[str, Skipped]:
    """Put pass-throughs in the places of layers, under all their names, and return them by path."""
    made: dict[str, Skipped] = {}
    for path in outermost_of(skips):  # what lies inside of one is gone with it
        layer = model.get_submodule(path)
        made[path] = Skipped(layer, skips[path])
        _exchange(model, layer, made[path])
    return made


def take_out_(model: nn.Module, skips: Mapping[str, dict[str, Any]], optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove layers for good: their parameters, buffers and what optimizers hold of them.

    What other modules hold, too, stays. If it is interrupted, everything is as before.

    Args:
        model: The model.
        skips: Path of a layer -> what to return in its place.
        optimizers: The optimizers that train the model; their parameter groups stay, also where they end up empty.
    """
    optimizers = with_wrapped(optimizers)
    with all_or_nothing(model, optimizers):
        before = {id(parameter) for parameter in model.parameters()}
        numbered = numbered_layers(model)
        made = put_in_(model, skips)
        renumber_(model, numbered)
        here = {id(tensor) for tensor in named_tensors(model).values()}
        drop_state_(optimizers, before - here)
        for skipped in made.values():
            skipped.sizes = {name: list(tensor.shape) for name, tensor in named_tensors(skipped.layer).items()}
            _resize_own_(skipped, here, empty=True)


def bring_back_(model: nn.Module, paths: Collection[str]) -> None:
    """Put removed layers back in their places; their values are to be loaded next, and optimizers do not know them.

    Args:
        model: The model.
        paths: Paths of removed layers.
    """
    with all_or_nothing(model):
        numbered = numbered_layers(model)
        for path in paths:
            skipped = model.get_submodule(path)
            assert isinstance(skipped, Skipped)
            here = {id(tensor) for tensor in named_tensors(model).values()}
            _resize_own_(skipped, here, empty=False)
            for module in skipped.layer.modules():
                module.training = skipped.training
            _exchange(model, skipped, skipped.layer)
        renumber_(model, numbered)


def groups_of(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """Return which parameters an optimizer's groups hold, by name; None stands for one that is not of the model."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def set_groups_(model: nn.Module, optimizer: Optimizer, groups: Iterable[Iterable[str | None]]) -> None:
    """Set which parameters an optimizer's groups hold, as :func:`groups_of` returned it."""
    named = named_tensors(model)
    own = {id(tensor) for tensor in named.values()}
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        foreign = iter([parameter for parameter in group["params"] if id(parameter) not in own])
        group["params"] = [next(foreign) if name is None else named[name] for name in names]


def follow_layers_(model: nn.Module, names: Iterable[str], skips: Mapping[str, dict[str, Any]]) -> bool:
    """Make a model have the layers of which there are tensors, and lack those that are told to be removed.

    Args:
        model: The model, with more or fewer layers.
        names: Names of the tensors that are to be loaded into it.
        skips: Path of a removed layer -> what is returned in its place.

    Returns:
        Whether anything changed.
    """
    own = removed_layers(model)
    prefixes = {name.rpartition(".")[0] for name in names} if own else set()
    back = [path for path in own if path not in skips and any(lies_in(prefix, path) for prefix in prefixes)]
    away = {path: skip for path, skip in skips.items() if own.get(path) != skip and _has(model, path)}
    if not back and not away:
        return False
    with all_or_nothing(model):
        bring_back_(model, back)
        bring_back_(model, [path for path in away if path in own])  # of another form
        take_out_(model, away)
    return True


def has_all_layers(model: nn.Module, names: Container[str]) -> bool:
    """Return whether there are names of all tensors that the layers removed from a model had, and so of one."""
    expected = []
    for path in removed_layers(model):
        skipped = model.get_submodule(path)
        assert isinstance(skipped, Skipped)
        passing = {
            f"{inner}.{leaf}" if inner else leaf
            for inner, module in modules_of(skipped.layer)
            for leaf in module._non_persistent_buffers_set
        }
        expected += [f"{path}.{name}" for name in skipped.sizes if name not in passing]
    return bool(expected) and all(name in names for name in expected)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return bool(path)


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for _, module in modules_of(model):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def drop_state_(optimizers: Iterable[Optimizer], gone: Collection[int]) -> None:
    """Remove parameters from optimizers, with their state; ``gone`` holds their ``id``."""
    for optimizer in optimizers:
        for parameter in [known for known in optimizer.state if id(known) in gone]:
            del optimizer.state[parameter]
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]


@torch.inference_mode(False)
@torch.no_grad()
def _resize_own_(skipped: Skipped, here: Collection[int], empty: bool) -> None:
    """Empty the tensors of a removed layer that the model does not hold, or make room for their values again."""
    for path, module in modules_of(skipped.layer):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{leaf}" if path else leaf
            if tensor is None or id(tensor) in here or name not in skipped.sizes:
                continue
            new = tensor.new_zeros(0) if empty else tensor.new_zeros(skipped.sizes[name])
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
                tensor.data = new
            else:
                module._buffers[leaf] = new
