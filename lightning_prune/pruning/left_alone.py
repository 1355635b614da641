"""Finds the networks inside a model that training does not change, such as frozen teachers; changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.measure.footprint import Part
from lightning_prune.model.calls import ExampleInputs, mode_of, modules_of, run
from lightning_prune.model.errors import failures_suppressed
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.pruning.arguments import Modules, path_of, with_ignored, within_part
from lightning_prune.structure import Structure
from lightning_prune.structure.tensor_names import named_parameters

__all__ = ["left_alone", "network_of", "prunable_groups", "weights_left_alone", "without_written"]

_AVERAGED = "it is an averaged copy"
_FROZEN, _UNTRAINED = "it is frozen (requires_grad=False)", "no optimizer trains it"


def left_alone(
    model: nn.Module, named: Iterable[Any] = (), frozen: bool = True, trained: Collection[int] = ()
) -> dict[str, str]:
    """Return the path of every network that is pruned only where it is named, and why.

    These are frozen networks beside what is trained, networks that no optimizer trains, networks inside a
    ``torchmetrics.Metric``, and averaged copies. A single frozen layer is none, nor is anything where nothing is
    trained.

    Args:
        model: The model.
        named: Patterns or modules that the user named. A pattern names a network where it matches it, or parts of it,
            and nothing of what is trained.
        frozen: Whether parameters that are frozen now stay so.
        trained: Ids of the parameters that optimizers step, where these are known.
    """
    parameters = named_parameters(model).values()
    frozen = frozen and any(parameter.requires_grad for parameter in parameters)
    unfrozen = not frozen or (not trained and all(parameter.requires_grad for parameter in parameters))
    if unfrozen and not any(map(_reason_of_kind, {type(module) for _, module in modules_of(model)})):
        return {}
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    found: dict[str, str] = {}
    for path, module in modules_of(model):  # a module comes before its parts
        if not path or network_of(path, found):
            continue
        reason = _reason(module, frozen, trained)
        own = [name for parameter in module.parameters() for name in names[id(parameter)]]
        if reason and own and all(name.startswith(f"{path}.") for name in own):  # what is shared is trained elsewhere
            found[path] = reason
    return _without_named(model, found, named) if found else found


def without_written(model: nn.Module, example_inputs: ExampleInputs, alone: Mapping[str, str]) -> dict[str, str]:
    """Return the networks left alone without those that the model writes when it trains, as it does moving averages.

    What has other weights than training would ever give it shows that, where a first average equals what is averaged.

    Args:
        model: The model.
        example_inputs: What to run it on, in train mode.
        alone: Paths of networks that are left alone, and why.
    """
    frozen = {path for path, why in alone.items() if why in (_FROZEN, _UNTRAINED, _AVERAGED)}
    if not frozen:
        return dict(alone)
    written: set[str] = set()
    with undisturbed(model, example_inputs), mode_of(model, training=True):
        moved: dict[str, list[Tensor]] = {}
        with failures_suppressed():
            for path in frozen:
                weights = list(model.get_submodule(path).parameters())
                moved[path] = [weight + 1 for weight in weights]
                for weight, other in zip(weights, moved[path], strict=True):
                    weight.copy_(other)
            run(model, example_inputs)
            for path, others in moved.items():
                pairs = zip(model.get_submodule(path).parameters(), others, strict=True)
                if not all(torch.equal(weight, other) for weight, other in pairs):
                    written.add(path)
    return {path: why for path, why in alone.items() if path not in written}


def _without_named(model: nn.Module, found: dict[str, str], named: Iterable[Any]) -> dict[str, str]:
    """Return the networks that no pattern names: a pattern that matches something else as well names none."""
    paths = [path for path, _ in modules_of(model)] + [name for name, _ in model.named_parameters()]
    for given in named:
        pattern = path_of(model, given, "amount, parameters or module")
        owners = {network_of(path, found) for path in paths if fnmatchcase(path, pattern)}
        if "" not in owners:
            found = {path: reason for path, reason in found.items() if path not in owners}
    return found


def weights_left_alone(model: nn.Module, alone: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of two or more dimensions of these networks, and why they are not pruned."""
    found = {}
    for path, reason in alone.items():
        for name, parameter in model.get_submodule(path).named_parameters(path):
            if is_lazy(parameter) or parameter.dim() > 1:
                found[name] = f"{path} is left alone: {reason}"
    return found


def prunable_groups(
    model: nn.Module, structure: Structure, ignore: Modules, part: Part, alone: Mapping[str, str]
) -> Structure:
    """Return the structure with all groups pinned that are ignored, outside of a part, or of networks left alone.

    Args:
        model: The model.
        structure: Its channel groups.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        part: The part of the model that is pruned.
        alone: Paths of networks that are left alone, and why.
    """
    structure = within_part(with_ignored(model, structure, ignore), part)
    if not alone:
        return structure
    why: dict[str, str] = {}
    for name, group in structure.groups.items():
        for slot in group.slots:
            path = network_of(slot.tensor, alone)
            if path:
                why.setdefault(name, f"{path} is left alone: {alone[path]}")
    return structure.without_each(why)


def _reason_of_kind(kind: type) -> str:
    """Return why modules of a class are left alone, or nothing."""
    kinds = {(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__}
    if ("torchmetrics", "Metric") in kinds:
        return "it belongs to a metric"
    return _AVERAGED if ("torch", "AveragedModel") in kinds else ""


def _reason(module: nn.Module, frozen: bool, trained: Collection[int]) -> str:
    """Return why a module is left alone, or nothing."""
    if reason := _reason_of_kind(type(module)):
        return reason
    parameters = list(module.parameters())
    weights = [parameter for parameter in parameters if not is_lazy(parameter) and parameter.dim() > 1]
    if not frozen or len(weights) < 2:
        return ""
    if not any(parameter.requires_grad for parameter in parameters):
        return _FROZEN
    if trained and not any(id(parameter) in trained for parameter in parameters):
        return _UNTRAINED
    return ""


def network_of(path: str, networks: Iterable[str]) -> str:
    """Return the network that a module or tensor lies in, or is; empty if it lies in none."""
    return next((network for network in networks if path == network or path.startswith(f"{network}.")), "")
