"""Finds the numbers on modules that repeat the shapes of their tensors, and what they become after a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_prune.model.calls import modules_of

__all__ = [
    "ABSENT", "HYPERPARAMETERS", "AttributeChange", "attributes_set", "constructor_numbers", "follows_cuts",
    "held_number", "set_attributes_", "set_number_", "shape_attributes",
]  # fmt: skip

ABSENT = object()
"""What :func:`held_number` returns where there is nothing."""

HYPERPARAMETERS = "_hparams"
"""The attribute in which a LightningModule holds its hyperparameters; those of its constructor lie beside it."""


class AttributeChange(NamedTuple):
    """A number on a module that a cut changes: path of the module, name of the attribute, value before and after.

    The name may lead through a config that the module holds, an object or a dict: ``"config.heads"``.
    """

    module: str
    name: str
    old: Any
    new: Any


# module type -> attribute -> (parameters that tell it, the first that exists counts; dimension; times which attribute)
_SIZES: dict[type[nn.Module], dict[str, tuple[tuple[str, ...], int, str | None]]] = {
    nn.Linear: {"in_features": (("weight",), 1, None), "out_features": (("weight",), 0, None)},
    nn.Bilinear: {
        "in1_features": (("weight",), 1, None),
        "in2_features": (("weight",), 2, None),
        "out_features": (("weight",), 0, None),
    },
    nn.Embedding: {"embedding_dim": (("weight",), 1, None)},
    nn.EmbeddingBag: {"embedding_dim": (("weight",), 1, None)},
    nn.RNNBase: {
        "input_size": (("weight_ih_l0",), 1, None),
        "hidden_size": (("weight_hr_l0", "weight_hh_l0"), 1, None),
        "proj_size": (("weight_hr_l0",), 0, None),
    },
    nn.RNNCellBase: {"input_size": (("weight_ih",), 1, None), "hidden_size": (("weight_hh",), 1, None)},
    nn.PReLU: {"num_parameters": (("weight",), 0, None)},
    nn.GroupNorm: {"num_channels": (("weight",), 0, None)},
    nn.modules.batchnorm._NormBase: {"num_features": (("weight", "running_mean"), 0, None)},
    nn.modules.conv._ConvTransposeNd: {
        "in_channels": (("weight",), 0, None),
        "out_channels": (("weight",), 1, "groups"),
    },
    nn.modules.conv._ConvNd: {"in_channels": (("weight",), 1, "groups"), "out_channels": (("weight",), 0, None)},
}

_COUNTS = frozenset({"groups", "num_groups", "normalized_shape"})  # on modules of torch.nn, beside those above
_TELLING = (nn.MultiheadAttention, nn.RNNBase, nn.Transformer, nn.Unflatten)  # of them, those whose numbers follow
_INTERNAL = frozenset(vars(nn.Module()))


def follows_cuts(module: nn.Module, name: str) -> bool:
    """Return whether a cut may change an attribute: a whole number, or several, that a module or its class holds."""
    root = name.partition(".")[0]
    held = held_number(module, name)
    items = held if isinstance(held, tuple | list) else [held]
    whole = all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in items)
    if not whole or root in _INTERNAL or root.startswith("__"):
        return False
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, _TELLING):
        sizes = next((table for kind, table in _SIZES.items() if isinstance(module, kind)), {})
        return name in _COUNTS or name in sizes
    return root in vars(module) or isinstance(getattr(type(module), root, None), int | tuple | list)


def shape_attributes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], known: Iterable[AttributeChange] = ()
) -> list[AttributeChange]:
    """Find which attributes of ``torch.nn`` modules must change so that they agree with new shapes of their tensors.

    Args:
        model: The model, not changed.
        shapes: New shape by name of parameter or buffer.
        known: Changes that shapes cannot tell, such as ``groups``; they are part of the result.
    """
    modules = dict(modules_of(model))
    shapes = _by_every_name(modules, shapes)
    changes = {(change.module, change.name): change for change in known}
    tables: dict[type, dict[str, tuple[tuple[str, ...], int, str | None]]] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        if path not in modules:  # another name of a module
            continue
        module = modules[path]
        if type(module) not in tables:
            tables[type(module)] = next((table for kind, table in _SIZES.items() if isinstance(module, kind)), {})
        table = tables[type(module)]
        for name, (leaves, dim, factor) in table.items():
            shape = next((shapes[full] for leaf in leaves if (full := f"{path}.{leaf}".lstrip(".")) in shapes), None)
            if shape is None or len(shape) <= dim:
                continue
            new = shape[dim]
            if factor is not None:
                follows = changes.get((path, factor))
                new *= follows.new if follows else getattr(module, factor)
            changes[path, name] = AttributeChange(path, name, getattr(module, name, None), new)
        if (
            isinstance(getattr(module, "normalized_shape", None), tuple)
            and (full := f"{path}.weight".lstrip(".")) in shapes
        ):
            changes[path, "normalized_shape"] = AttributeChange(
                path, "normalized_shape", module.normalized_shape, tuple(shapes[full])
            )
    return [change for change in changes.values() if change.old != change.new]


def _by_every_name(
    modules: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Spread the shapes of tensors, known by their first names, to all the names that modules call them by."""
    tied: dict[int, tuple[int, ...]] = {}
    found = {}
    for path, module in modules.items():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                name = f"{path}.{leaf}" if path else leaf
                if name in shapes:
                    tied[id(tensor)] = shapes[name]
                if id(tensor) in tied:
                    found[_parametrized(name, module)] = tied[id(tensor)]
    return found


def _parametrized(name: str, module: nn.Module) -> str:
    """Return the name of the tensor that ``weight_norm`` and the like make of the named one of a module."""
    if "parametrizations." not in name:
        base = next((name.removesuffix(end) for end in ("_orig", "_v") if name.endswith(end)), name)
        made_of = {"_orig", "_v"} if f"{base.rpartition('.')[2]}_g" in module._parameters else {"_orig"}
        return base if name.removeprefix(base) in made_of else name
    path, _, rest = name.rpartition("parametrizations.")
    leaf, _, original = rest.partition(".")
    return f"{path}{leaf}" if original in ("original", "original1") else name


def set_attributes_(model: nn.Module, changes: Iterable[AttributeChange]) -> None:
    """Set the attributes of the model's modules to their new values.

    A config that holds one is replaced by a copy in all modules of the model: other models may have been built from it.
    """
    modules = dict(modules_of(model))
    changes = list(changes)
    _own_configs_(modules, changes)
    for change in changes:
        module = modules.get(change.module) or model.get_submodule(change.module)  # a path may be another name
        set_number_(module, change.name, _of_the_kind(held_number(module, change.name), change.new))


def _own_configs_(modules: Mapping[str, nn.Module], changes: Iterable[AttributeChange]) -> None:
    """Replace the configs that changes lead through by copies, wherever modules hold them."""
    copies: dict[int, tuple[Any, Any]] = {}
    for change in changes:
        root, _, below = change.name.partition(".")
        if not below or change.module not in modules:
            continue
        config = held_number(modules[change.module], root)
        if id(config) not in copies:
            copies[id(config)] = config, copy.deepcopy(config)
    for module in modules.values() if copies else ():
        own = vars(module)
        for name, value in list(own.items()):
            if id(value) in copies:
                own[name] = copies[id(value)][1]


def _of_the_kind(old: Any, new: Any) -> Any:
    """Return a value of the type that the module holds, such as numpy's; checkpoints hold plain ones."""
    if isinstance(old, np.integer):
        return type(old)(new)
    if type(old) in (tuple, list, torch.Size) and isinstance(new, tuple | list) and len(old) == len(new):
        return type(old)([_of_the_kind(before, after) for before, after in zip(old, new, strict=True)])
    return new


@contextmanager
def attributes_set(model: nn.Module, changes: Iterable[AttributeChange]) -> Iterator[None]:
    """Set attributes inside the block, and take that back afterwards."""
    changes = list(changes)
    modules = [module for _, module in modules_of(model)] if changes else []
    before = [vars(module).copy() for module in modules]
    try:
        set_attributes_(model, changes)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            now = vars(module)
            if now.keys() != own.keys():
                for name in now.keys() - own.keys():
                    del now[name]
            now.update(own)


def held_number(module: nn.Module | dict[str, Any] | None, name: str) -> Any:
    """Return what a module holds under a name that may lead through configs, or ``ABSENT``."""
    holder: Any = module
    for part in name.split("."):
        holder = holder.get(part, ABSENT) if isinstance(holder, dict) else getattr(holder, part, ABSENT)
        if holder is ABSENT:
            return ABSENT
    return holder


def constructor_numbers(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return what hyperparameters were when the module was built, without the name of the attribute that holds them.

    Args:
        module: The module.
        names: Names of attributes, hyperparameters or others, which are passed over.
    """
    found = {}
    for name in names:
        holder, _, leaf = name.partition(".")
        if holder == HYPERPARAMETERS:
            value = held_number(module, f"{HYPERPARAMETERS}_initial.{leaf}")
            if isinstance(value, int | np.integer):
                found[leaf] = int(value)
    return found


def set_number_(module: nn.Module | dict[str, Any], name: str, value: Any) -> None:
    """Set what a module holds under a name that may lead through configs."""
    path, _, leaf = name.rpartition(".")
    holder = held_number(module, path) if path else module
    if isinstance(holder, nn.Module):
        setattr(holder, leaf, value)
    elif isinstance(holder, dict):
        holder[leaf] = value
    else:
        vars(holder)[leaf] = value  # a config may be frozen
