"""Finds the weights of a model that masks may zero, and how much of each is asked for; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_prune.measure.footprint import WHOLE, Part
from lightning_prune.model.calls import refuse_shapeless
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Parameters, names_module, near, path_of

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
    model: nn.Module,
    parameters: Parameters | None = None,
    ignore: Parameters = (),
    what: str = "parameters",
    part: Part = WHOLE,
) -> Weights:
    """Find the weights that masks may zero.

    Args:
        model: The model.
        parameters: Patterns; those that name modules stand for the weights of linear and convolutional layers in them,
            others for the parameters that they name. By default all weights of linear and convolutional layers:
            biases, norms and embeddings stay, and so do weights that are tied to an embedding.
        ignore: Patterns of modules or parameters that stay.
        what: The argument that the patterns were given by, as errors shall name it.
        part: The part of the model whose weights are meant.

    Raises:
        ValueError: If a pattern names nothing.
        PruningError: If there is nothing to prune, or a weight has no shape yet.
    """
    refuse_shapeless(model)
    usual = _usual(model)
    ignored = _patterns(model, ignore, "ignore")
    found = dict(usual.found)
    if parameters is not None:
        found = {}
        for pattern in _patterns(model, parameters, what):
            found |= _weights_named(model, pattern, usual)
    found = {name: weight for name, weight in found.items() if part.holds(name) and not _is_named(name, ignored)}
    if not found:
        why = (
            "; ".join(f"{name}: {reason}" for name, reason in usual.stay.items())
            or "ignore= or module= leave out all there are"
        )
        raise PruningError(
            f"Nothing is left to prune in {type(model).__name__}: none of the weights of its linear and convolutional "
            f"layers ({why}). Name others by parameters=."
        )
    stay = {name: reason for name, reason in usual.stay.items() if name not in found and part.holds(name)}
    return Weights(found, stay)


def _patterns(model: nn.Module, named: Parameters, what: str) -> list[str]:
    """Return patterns, given patterns, modules and parameters; each names something."""
    paths = [path for path, _ in model.named_modules() if path]
    paths += [name for name, _ in model.named_parameters()]
    patterns = [path_of(model, given, what) for given in named]
    for pattern in patterns:
        if not any(names_module(pattern, path) for path in paths):
            raise ValueError(f"{what}: {pattern!r} names no module or parameter.{near(pattern, paths)}")
    return patterns


def _weights_named(model: nn.Module, pattern: str, usual: Weights) -> dict[str, Weight]:
    """Return the usual weights of modules that a pattern names, or else the parameters that it names."""
    if any(names_module(pattern, path) for path, _ in model.named_modules() if path):
        return {name: weight for name, weight in usual.found.items() if names_module(pattern, name)}
    found = {}
    for name, parameter in model.named_parameters():
        if names_module(pattern, name):
            found[name] = usual.found.get(name, Weight(parameter, 1))
    return found


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(names_module(pattern, name) for pattern in patterns)


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
        own_paths = name, name.rpartition(".")[0]
        exact = [pattern for pattern in naming if pattern in own_paths]
        patterns = exact or naming
        if not patterns:
            continue
        for other in patterns[1:]:
            if amount[other] != amount[patterns[0]]:
                raise ValueError(
                    f"amount: {patterns[0]!r} asks for {amount[patterns[0]]:g} and {other!r} for {amount[other]:g} of "
                    f"{name}. Give it one amount, by its own name."
                )
        found[name] = amount[patterns[0]]
    return found


def _usual(model: nn.Module) -> Weights:
    """Sort the weights of linear and convolutional layers into those that masks may zero and those that stay."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = Weights({}, {})
    for path, module in model.named_modules():
        input_dim = 0 if getattr(module, "transposed", False) else 1
        for leaf in _leaves(module):
            name = f"{path}.{leaf}".lstrip(".")
            if leaf not in module._parameters:
                weights.stay[name] = "it is made of other parameters"
                continue
            parameter = module._parameters[leaf]
            if parameter is None:  # attention has either one input projection or three
                continue
            if id(parameter) in embeddings:
                weights.stay[name] = "it is tied to an embedding"
            else:
                weights.found[names[id(parameter)]] = Weight(parameter, input_dim)
    return weights


def _leaves(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights that a module of this kind has."""
    for kind, leaves in _LEAVES.items():
        if isinstance(module, kind):
            return leaves
    return ()
