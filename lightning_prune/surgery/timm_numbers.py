"""Finds the numbers on timm's models that only ``reset_classifier`` reads, and what they become after a cut."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from lightning_prune.model.calls import modules_of
from lightning_prune.structure.tensor_names import named_parameters
from lightning_prune.surgery.attributes import AttributeChange

# By timm's definition the first is what the classifier takes. The others are what comes before the head, which is the
# same where the head only pools and normalizes: then they are equal.
_OF_MODEL = ("head_hidden_size", "num_features", "embed_dim")
_OF_HEAD = ("in_features", "num_features", "hidden_size")
_HIDDEN = ("conv_head", "pre_logits.fc1")  # the hidden layer of heads that have one, which takes ``num_features``


def follow_timm(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[tuple[str, str], Any]
) -> list[AttributeChange]:
    """Return the numbers of timm's models inside a model that follow the inputs of their classifiers.

    Args:
        model: The model before the cut.
        shapes: New shape of every tensor that the cut changes, by its first name.
        numbers: ``(module path, attribute)`` of the numbers that the trace saw being read, which are known.
    """
    changes: list[AttributeChange] = []
    modules = dict(modules_of(model))
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}

    def follow(at: str, name: str, weight: nn.Parameter, new: tuple[int, ...]) -> None:
        old = vars(modules[at]).get(name) if at in modules else None
        if type(old) is int and old == weight.shape[1] != new[1] and (at, name) not in numbers:
            changes.append(AttributeChange(at, name, old, new[1]))

    for path, module in modules.items():
        weight = _classifier_weight(module)
        new = shapes.get(names.get(id(weight), "")) if weight is not None else None
        if weight is None or new is None:
            continue
        holder = names[id(weight)].rpartition(".")[0].rpartition(".")[0]  # of the classifier, a head or the model
        followers = [(path, name) for name in _OF_MODEL]
        if holder != path:
            followers += [(holder, name) for name in _OF_HEAD]
        for at, name in followers:
            follow(at, name, weight, new)
        for inner in _HIDDEN:
            hidden = modules.get(f"{path}.{inner}".lstrip("."))
            taken = getattr(hidden, "weight", None)
            new = shapes.get(names.get(id(taken), ""))
            if taken is not None and new is not None:
                follow(path, "num_features", taken, new)
    return changes


@lru_cache(4096)
def _is_of_timm(kind: Any) -> bool:
    return any(base.__module__.startswith("timm.models.") for base in kind.__mro__)


def _classifier_weight(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of the classifier of a model of timm's, ``(classes, inputs, ...)``; None of anything else."""
    kind: Any = type(module)
    if not _is_of_timm(kind):
        return None
    get = getattr(module, "get_classifier", None)
    found = get() if callable(get) else None
    first = found[0] if isinstance(found, tuple | list) and found else found
    weight = getattr(first, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.dim() > 1 else None
