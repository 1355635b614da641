"""Finds the weights of a model that masks may zero, and how much of each is asked for; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_prune.measure.footprint import WHOLE, Part
from lightning_prune.model.calls import refuse_shapeless
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Parameters, names_module, near, path_of

__all__ = ["Weight", "Weights", "amount_by_weight", "find_weights", "warning_of"]

_LEAVES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag
# Linear layers of other projects: the dimension of their weight along which inputs lie.
_FOREIGN = {("transformers", "Conv1D"): 0, ("torch_geometric", "Linear"): 1}
_MANY = 0.1  # share of a model's parameters that is worth a warning
_OTHER = "it is no weight of a linear or convolutional layer"


class Weight(NamedTuple):
    """A parameter that may be masked.

    Attributes:
        parameter: The parameter.
        input_dim: The dimension along which its inputs lie, or None where the model's code alone tells.
    """

    parameter: nn.Parameter
    input_dim: int | None

    @property
    def inputs(self) -> int:
        """How many inputs it has; a vector has one."""
        dim = self.input_dim
        return self.parameter.shape[dim] if dim is not None and self.parameter.dim() > dim else 1


class Weights(NamedTuple):
    """The weights that masks may zero, and those that one might look for among them.

    Attributes:
        found: Weights by the first of their names.
        stay: Name of a weight that stays dense -> why.
        others: Names of parameters of two or more dimensions that nobody named and that are no weights of such layers
            -> what they are.
    """

    found: dict[str, Weight]
    stay: dict[str, str]
    others: dict[str, str] = {}  # noqa: RUF012  # never written to


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
    others = _others(model, usual, ignored, part) if parameters is None else {}
    return Weights(found, stay, others)


def warning_of(model: nn.Module, others: Mapping[str, str]) -> str:
    """Say which parameters were not considered, embeddings aside, where they hold much of a model; else nothing."""
    own = dict(model.named_parameters())
    names = [name for name, reason in others.items() if reason == _OTHER]
    held = sum(own[name].numel() for name in names) / max(sum(parameter.numel() for parameter in own.values()), 1)
    if held <= _MANY:
        return ""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"{held:.0%} of the parameters are no weights of linear or convolutional layers and stay dense: {shown}. Name "
        "them by parameters= to prune them, or by ignore= to say that they stay."
    )


def _others(model: nn.Module, usual: Weights, ignored: Sequence[str], part: Part) -> dict[str, str]:
    """Return the parameters of two or more dimensions that are not considered, and what they are."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)}
    dense = {*usual.stay}
    owners = tuple([f"{name.rpartition('.')[0]}." for name in usual.stay if "." in name])
    tied = {id(model.get_parameter(name)) for name in dense & {name for name, _ in _all_names(model)}}
    found = {}
    for name, parameter in model.named_parameters():
        known = name in usual.found or id(parameter) in tied or (owners and name.startswith(owners))
        if parameter.dim() > 1 and not known and part.holds(name) and not _is_named(name, ignored):
            found[name] = "it is an embedding" if id(parameter) in embeddings else _OTHER
    return found


def _all_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


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
    names_modules = any(names_module(pattern, path) for path, _ in model.named_modules() if path)
    if names_modules:
        found = {name: weight for name, weight in usual.found.items() if names_module(pattern, name)}
        if found:
            return found
    found = {}
    for name, parameter in model.named_parameters():
        # A module's name does not stand for its biases; a name of a bias does.
        if names_module(pattern, name) and (parameter.dim() > 1 or not names_modules):
            found[name] = usual.found.get(name, Weight(parameter, _input_dim(model, name, parameter)))
    return found


def _input_dim(model: nn.Module, name: str, parameter: nn.Parameter) -> int | None:
    """Return the dimension of a parameter along which its inputs lie, as its module tells, or None."""
    module = model.get_submodule(name.rpartition(".")[0])
    if parameter.dim() < 2 or isinstance(module, (nn.RNNBase, nn.RNNCellBase, *_EMBEDDINGS)):
        return 1
    for inputs, outputs in (("in_features", "out_features"), ("in_channels", "out_channels")):
        sizes = getattr(module, inputs, None), getattr(module, outputs, None)
        if tuple(parameter.shape[:2]) == sizes and sizes[0] != sizes[1]:
            return 0
        if tuple(parameter.shape[:2]) == sizes[::-1]:
            return 1
    return None


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
        foreign = _foreign(module)
        usual_dim = 0 if getattr(module, "transposed", False) else 1
        input_dim = usual_dim if foreign is None else foreign
        for leaf in ("weight",) if foreign is not None else _leaves(module):
            name = f"{path}.{leaf}".lstrip(".")
            if leaf not in module._parameters:
                if hasattr(module, leaf):
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


def _foreign(module: nn.Module) -> int | None:
    """Return the dimension of the inputs of another project's linear layer, or None for any other module."""
    kinds = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__]
    return next((_FOREIGN[kind] for kind in kinds if kind in _FOREIGN), None)


def _leaves(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights that a module of this kind has."""
    for kind, leaves in _LEAVES.items():
        if isinstance(module, kind):
            return leaves
    return ()
