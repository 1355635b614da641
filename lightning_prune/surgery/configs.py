"""Finds the fields of a Hugging Face config that give widths, and what they become after a cut; writes nothing.

A config is read by no operator, only by constructors. So models are built from it on the meta device, where that costs
no memory: with one field changed, to see which sizes follow it, and with new values, to see whether they give exactly
the sizes of the pruned model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_prune.model.calls import modules_of
from lightning_prune.structure.tensor_names import lies_in
from lightning_prune.surgery.attributes import ABSENT, AttributeChange, follows_cuts, held_number

__all__ = [
    "ConfigField", "FollowedConfigs", "config_fields", "configs_in", "follow_configs", "pretrained_models", "shapes_of",
    "twin_of", "unsaved",
]  # fmt: skip

# Names under which configs of transformers hold widths and numbers of heads.
_NAMES = frozenset(
    {
        "hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "word_embed_proj_dim",
        "intermediate_size", "d_ff", "hidden_dim", "n_inner", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim",
        "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "pooler_output_size",
        "num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_key_value_heads", "head_dim", "d_kv", "projection_dim", "num_experts", "num_local_experts",
        "n_routed_experts", "moe_num_experts",
    }
)  # fmt: skip
_OPTIONAL = ("head_dim", "n_inner")  # of which a constructor works out a default from others
_DEEPEST = 3  # a config in a config in a config

Shapes = Mapping[str, tuple[int, ...]]
Numbers = Mapping[tuple[str, str], Any]


class ConfigField(NamedTuple):
    """A number in the config of a pretrained model, and the sizes that follow it.

    Attributes:
        module: Path of the model that holds the config.
        name: Where it is held there, such as ``"config.hidden_size"``.
        value: What it is.
        places: ``(tensor, dimension)`` -> by how many entries that grows where the number grows by one.
        numbers: ``(module path, attribute)`` that repeat the number.
        divided: Whether one more is refused: the number is a multiple of another, or has to divide one.
    """

    module: str
    name: str
    value: int
    places: dict[tuple[str, int], float]
    numbers: tuple[tuple[str, str], ...]
    divided: bool


class FollowedConfigs(NamedTuple):
    """What configs become after a cut.

    Attributes:
        changes: Fields that change, and numbers on modules that nothing read in the traced run but that constructors
            make from them.
        inexpressible: Where no config gives the pruned model, which layers are in the way, in words; else empty.
    """

    changes: tuple[AttributeChange, ...] = ()
    inexpressible: str = ""


def config_fields(model: nn.Module) -> list[ConfigField]:
    """Return the fields of all Hugging Face configs in a model that give widths or numbers of heads."""
    found: list[ConfigField] = []
    for path, module in pretrained_models(model):
        dense = twin_of(module, {})
        if dense is not None:
            found += _fields(path, module, dense, _made_explicit(module, dense))
    return found


def follow_configs(
    model: nn.Module,
    shapes: Shapes,
    numbers: Numbers,
    kept: Iterable[str],
    gone: Collection[str] = (),
    remedy: str = "Pass uniform=True",
) -> FollowedConfigs:
    """Work out what the configs of Hugging Face models inside a model become, so that constructors build the slim one.

    Args:
        model: The model before the cut.
        shapes: New shape of every tensor that the cut changes, by its first name.
        numbers: ``(module path, attribute)`` -> value after the cut, of all numbers that the trace saw being read.
        kept: Names of the tensors that lose entries.
        gone: Paths of modules that leave as a whole.
        remedy: What to do where no config gives the pruned model.
    """
    changes: list[AttributeChange] = []
    told = []
    for path, module in pretrained_models(model):
        before = _shapes_after(model, path, module, shapes)
        after = {name: own for name, own in before.items() if not _lies_in_any(_joined(path, name), gone)}
        inside = {place: value for place, value in numbers.items() if lies_in(place[0], path)}
        dense = twin_of(module, {})
        if dense is None or shapes_of(dense).keys() != before.keys():
            continue  # wrapped or extended since it was built: its config does not tell all of it
        if shapes_of(dense) == after and _agrees(dense, path, inside):
            continue
        lost = sorted(unsaved(path, module) & set(kept))
        computed = f"{lost[0]} lost entries, and files do not hold it" if lost else ""
        explicit = _made_explicit(module, dense)
        fields = _fields(path, module, dense, explicit, others=len(after) < len(before))
        values, twin = _solved(path, module, dense, fields, explicit, after, inside)
        constant = "" if twin is None else _constant(module, dense, twin)
        if twin is None or computed or constant:
            reason = computed or constant or _uneven(fields, dense, after, inside)
            told.append(_refusal(path, module, reason, remedy))
            continue
        for name, value in values.items():
            if (path, name) not in inside and held_number(module, name) != value:
                changes.append(AttributeChange(path, name, held_number(module, name), value))
        changes += _unread(path, module, dense, twin, inside)
    return FollowedConfigs(tuple(changes), " ".join(told))


# Models and their twins


def pretrained_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the Hugging Face models in a model, none of which lies in another."""
    found: list[str] = []
    for path, module in modules_of(model):
        kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__}
        if ("transformers", "PreTrainedModel") in kinds and not any(lies_in(path, above) for above in found):
            found.append(path)
            yield path, module


def twin_of(module: nn.Module, values: Mapping[str, Any]) -> nn.Module | None:
    """Return the model that the config gives with some fields changed, on the meta device; None if it gives none."""
    config: Any = copy.deepcopy(module.config)
    for name, value in values.items():
        holder: Any = config
        *path, leaf = name.split(".")[1:]
        for part in path:
            holder = getattr(holder, part)
        setattr(holder, leaf, value)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            type(config).from_dict(config.to_dict())  # as loading does: some refuse what their models could be built of
            return type(module)(config)
    except Exception:  # whatever a constructor makes of such a config
        return None


def _made_explicit(module: nn.Module, dense: nn.Module) -> dict[str, int]:
    """Return the optional fields that a config leaves out, with the values that constructors work out for them."""
    found: dict[str, int] = {}
    before = shapes_of(dense)
    for holder, prefix in configs_in(module.config):
        for leaf in _OPTIONAL:
            name = f"{prefix}.{leaf}"
            probe = twin_of(module, {name: 16}) if type(getattr(holder, leaf, None)) is not int else None
            if probe is None or shapes_of(probe).keys() != before.keys():
                continue
            values = {vars(mine).get(leaf) for _, mine in dense.named_modules()}
            for tensor, shape in shapes_of(probe).items():
                values |= {old for old, new in zip(before[tensor], shape, strict=False) if old != new}
            for value in sorted(value for value in values if type(value) is int and value > 1):
                same, other = twin_of(module, {name: value}), twin_of(module, {name: 2 * value})
                if same is not None and other is not None and shapes_of(same) == before != shapes_of(other):
                    found[name] = value
                    break
    return found


def _fields(
    path: str, module: nn.Module, dense: nn.Module, explicit: Mapping[str, int], others: bool = False
) -> list[ConfigField]:
    """Find what follows each field: change it alone, and compare what is built; with ``others``, of other modules."""
    found = []
    before, known = shapes_of(dense), dict(dense.named_modules())
    for name, value in [*_values(module.config), *explicit.items()]:
        for other in (2 * value, 3 * value, value // 2, value + 1):
            twin = twin_of(module, {**explicit, name: other}) if other >= 1 else None
            shapes = {} if twin is None else shapes_of(twin)
            if twin is None or (shapes.keys() != before.keys() and not others):
                continue
            places = {}
            for tensor, shape in shapes.items():
                for dim, (new, old) in enumerate(zip(shape, before.get(tensor, ()), strict=False)):
                    if new != old:
                        places[_joined(path, tensor), dim] = (new - old) / (other - value)
            numbers = []
            for at, mine in twin.named_modules():
                for attribute, held in vars(mine).items() if at in known else ():
                    was = vars(known[at]).get(attribute)
                    if type(held) is int and held == other and was == value:
                        numbers.append((_joined(path, at), attribute))
            if places or numbers:
                divided = twin_of(module, {**explicit, name: value + 1}) is None
                found.append(ConfigField(path, name, value, places, tuple(numbers), divided))
            break
    return found


def _values(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the fields of a config, and of configs in it, that may give widths."""
    for holder, prefix in configs_in(config):
        for name, value in vars(holder).items():
            if name in _NAMES and type(value) is int and value > 1:
                yield f"{prefix}.{name}", value


def configs_in(config: Any, prefix: str = "config", depth: int = 0) -> Iterator[tuple[Any, str]]:
    """Yield a config and those in it, with the names that lead there."""
    yield config, prefix
    for name, value in list(vars(config).items()) if depth < _DEEPEST else ():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs_in(value, f"{prefix}.{name}", depth + 1)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer, by each of its names."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _shapes_after(model: nn.Module, path: str, module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model inside another once it is cut, by every name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    new = {id(tensor): shapes[name] for name, tensor in named if name in shapes}
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: new.get(id(tensor), tuple(tensor.shape)) for name, tensor in own}


# What fields become


def _solved(
    path: str,
    module: nn.Module,
    dense: nn.Module,
    fields: list[ConfigField],
    explicit: Mapping[str, int],
    after: Shapes,
    numbers: Numbers,
) -> tuple[dict[str, int], nn.Module | None]:
    """Return new values of fields with which exactly the slim model is built, and that model without its weights."""
    read: dict[str, int] = {}
    unread: list[ConfigField] = []
    for field in fields:
        readings = _readings(field, dense, after, numbers)
        value = next(iter(readings)) if len(readings) == 1 else 0.0
        if value != field.value and value >= 1 and value == int(value):
            read[field.name] = int(value)
        if not readings:
            unread.append(field)
    # Numbers of heads may be read nowhere; they shrink by the share of a width that they divide.
    shares = dict.fromkeys(read[field.name] / field.value for field in fields if field.name in read)
    scaled: list[dict[str, int]] = [{}]
    for share in shares if unread else ():
        scaled.append({field.name: round(field.value * share) for field in unread if round(field.value * share) >= 1})
    without = [set(), *({name} for name in read)]
    for out in without:
        for more in scaled:
            values = {**explicit, **{name: value for name, value in read.items() if name not in out}, **more}
            twin = twin_of(module, values)
            if twin is not None and shapes_of(twin) == after and _agrees(twin, path, numbers):
                return values, twin
    return {}, None


def _readings(field: ConfigField, dense: nn.Module, after: Shapes, numbers: Numbers) -> dict[float, list[str]]:
    """Return the values that a field would need, each with the tensors, or else the numbers, that need it."""
    found: dict[float, list[str]] = defaultdict(list)
    before = shapes_of(dense)
    for (tensor, dim), slope in field.places.items():
        own = _within(tensor, field.module)
        if own not in after:
            continue
        found[field.value + (after[own][dim] - before[own][dim]) / slope].append(tensor)
    if not field.places:
        for at, attribute in field.numbers:
            if (at, attribute) in numbers:
                found[numbers[at, attribute]].append(_joined(at, attribute))
    return found


def _agrees(twin: nn.Module, path: str, numbers: Numbers) -> bool:
    """Return whether a model that was built has the numbers that the trace saw being read, as the cut leaves them."""
    for (at, name), value in numbers.items():
        module = dict(twin.named_modules()).get(_within(at, path))
        own = ABSENT if module is None else held_number(module, name)
        if own is not ABSENT and own != value:
            return False
    return True


def _unread(path: str, module: nn.Module, dense: nn.Module, twin: nn.Module, read: Numbers) -> list[AttributeChange]:
    """Return the numbers on modules that nothing read, and that are others where the slim model is built anew."""
    changes = []
    for at, built in twin.named_modules():
        own, was = module.get_submodule(at), dense.get_submodule(at)
        for name, new in vars(built).items():
            old = vars(own).get(name, ABSENT)
            whole = type(new) is int or (type(new) in (tuple, list) and all(type(item) is int for item in new))
            known = (_joined(path, at), name) in read
            if whole and not known and old == vars(was).get(name) and old != new and follows_cuts(own, name):
                changes.append(AttributeChange(_joined(path, at), name, old, new))
    return changes


def _constant(module: nn.Module, dense: nn.Module, twin: nn.Module) -> str:
    """Say which number a constructor works out from widths, and the cut left as it was; nothing if there is none."""
    for at, built in twin.named_modules():
        own, was = vars(module.get_submodule(at)), vars(dense.get_submodule(at))
        for name, new in vars(built).items():
            if type(new) is float and not math.isnan(new) and own.get(name) == was.get(name) != new:
                return f"{_joined(at, name)} is {own[name]:g}, and a model built from the config has {new:g}"
    return ""


def unsaved(path: str, module: nn.Module) -> set[str]:
    """Return the buffers of a Hugging Face model that its files do not hold: a constructor computes them."""
    owners = [(f"{at}." if at else "", owner) for at, owner in module.named_modules(prefix=path)]
    return {at + leaf for at, owner in owners for leaf in owner._non_persistent_buffers_set}


# Words


def _uneven(fields: list[ConfigField], dense: nn.Module, after: Shapes, numbers: Numbers) -> str:
    """Name the fields that would need several values, and where."""
    told = []
    for field in fields:
        readings = _readings(field, dense, after, numbers)
        if len(readings) > 1:
            needs = [f"{value:g} in {places[0]}" for value, places in sorted(readings.items())[:4]]
            told.append(f"{field.name.partition('.')[2]} would be {', '.join(needs)}")
    return "; ".join(told) or "none of its fields gives these widths"


def _refusal(path: str, module: nn.Module, reason: str, remedy: str) -> str:
    kind = type(module.config).__name__
    return (
        f"{kind} of {path or 'the model'} cannot express this cut ({reason}), so from_pretrained will not load what "
        f"save_pretrained writes. {remedy}, or save the state dict and load it by load_state_dict_."
    )


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path and leaf else path or leaf


def _lies_in_any(name: str, paths: Iterable[str]) -> bool:
    return any(lies_in(name, path) for path in paths)


def _within(path: str, above: str) -> str:
    return path[len(above) :].lstrip(".") if above else path
