"""Finds the weights of a model that masks may zero, and how much of each is asked for; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_prune.model.calls import refuse_shapeless
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import names_module, near

__all__ = ["Weight", "Weights", "amount_by_weight", "find_weights"]

_LEAVES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag


class Weight(NamedTuple):
    """A parameter that may be masked.

    Attributes:
        parameter: The parameter.
        input_dim: The dimension along which its inputs lie.
    """

    parameter: nn.Parameter
    input_dim: int

    @property
    def inputs(self) -> int:
        """How many inputs it has; a vector has one."""
        return self.parameter.shape[self.input_dim] if self.parameter.dim() > self.input_dim else 1


class Weights(NamedTuple):
    """The weights that masks may zero, and those that one might look for among them.

    Attributes:
        found: Weights by the first of their names.
        stay: Name of a weight that stays dense -> why.
    """

    found: dict[str, Weight]
    stay: dict[str, str]


def find_weights(
    model: nn.Module, parameters: Parameters | None = None, ignore: Parameters = (), what: str = "parameters"
) -> Weights:
    """Find the weights that masks may zero.

    Args:
        model: The model.
        parameters: Patterns; those that name modules stand for the weights of linear and convolutional layers in them,
            others for the parameters that they name. By default all weights of linear and convolutional layers:
            biases, norms and embeddings stay, and so do weights that are tied to an embedding.
        ignore: Patterns of modules or parameters that stay.
        what: The argument that the patterns were given by, as errors shall name it.

    Raises:
        ValueError: If a pattern names nothing.
        PruningError: If there is nothing to prune, or a weight has no shape yet.
    """
    refuse_shapeless(model)
    usual, own = _usual(model), dict(model.named_parameters())
    paths = [path for path, _ in model.named_modules() if path]
    found = dict(usual.found) if parameters is None else {}
    for pattern in parameters or ():
        if any(names_module(pattern, path) for path in paths):
            found |= {name: weight for name, weight in usual.found.items() if names_module(pattern, name)}
        elif chosen := {name: Weight(own[name], 1) for name in own if names_module(pattern, name)}:
            found |= {name: usual.found.get(name, weight) for name, weight in chosen.items()}
        else:
            raise ValueError(f"{what}: {pattern!r} names no module or parameter.{near(pattern, (*paths, *own))}")
    for pattern in ignore:
        if not any(names_module(pattern, path) for path in (*paths, *own)):
            raise ValueError(f"ignore={pattern!r} names no module or parameter.{near(pattern, (*paths, *own))}")
    found = {name: weight for name, weight in found.items() if not any(names_module(p, name) for p in ignore)}
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in usual.stay.items()) or "ignore= names all there are"
        raise PruningError(
            f"Nothing is left to prune in {type(model).__name__}: none of the weights of its linear and convolutional "
            f"layers ({why}). Name others by parameters=."
        )
    return Weights(found, {name: reason for name, reason in usual.stay.items() if name not in found})


def amount_by_weight(weights: Iterable[str], amount: Mapping[str, float]) -> dict[str, float]:
    """Turn amounts by pattern into amounts by name of parameter; what no pattern names is left out.

    A pattern that is a parameter's name, or that of its module, goes before others.

    Raises:
        ValueError: If a pattern names no weight, or two patterns give one weight different amounts.
    """
    names = list(weights)
    for pattern in amount:
        if not any(names_module(pattern, name) for name in names):
            raise ValueError(f"amount[{pattern!r}] names no weight that can be pruned.{near(pattern, names)}")
    found = {}
    for name in names:
        naming = [pattern for pattern in amount if names_module(pattern, name)]
        exact = [pattern for pattern in naming if pattern in (name, name.rpartition(".")[0])] or naming
        if len({amount[pattern] for pattern in exact}) > 1:
            raise ValueError(
                f"amount: {exact[0]!r} asks for {amount[exact[0]]:g} and {exact[1]!r} for {amount[exact[1]]:g} of "
                f"{name}. Give it one amount, by its own name."
            )
        if exact:
            found[name] = amount[exact[0]]
    return found


def _usual(model: nn.Module) -> Weights:
    """Sort the weights of linear and convolutional layers into those that masks may zero and those that stay."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = Weights({}, {})
    for path, module in model.named_modules():
        for leaf in next((leaves for kind, leaves in _LEAVES.items() if isinstance(module, kind)), ()):
            parameter, name = module._parameters.get(leaf), f"{path}.{leaf}".lstrip(".")
            if leaf not in module._parameters:
                weights.stay[name] = "it is made of other parameters"
            elif parameter is not None and id(parameter) in embeddings:
                weights.stay[name] = "it is tied to an embedding"
            elif parameter is not None:
                transposed = getattr(module, "transposed", False)
                weights.found[names[id(parameter)]] = Weight(parameter, 0 if transposed else 1)
    return weights
