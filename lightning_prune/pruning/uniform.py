"""Links the channel groups that must have one width: those of equal blocks, and those that a config gives one size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from lightning_prune.structure import Structure, named_tensors
from lightning_prune.surgery import config_fields
from lightning_prune.surgery.configs import ConfigField, pretrained_models, unsaved


def with_one_width(model: nn.Module, structure: Structure) -> Structure:
    """Return the structure with the groups of a kind linked, so that they keep the same number of units.

    Of a kind are the groups that the same layer makes in every one of equal blocks, and those whose widths are one
    field of a Hugging Face config. Where one of a kind is not prunable, none is.
    """
    why: dict[str, str] = {}
    sets: list[set[str]] = []
    for names, missing in (*_by_config(model, structure), *_by_block(model, structure)):
        sets.append(names)
        if missing:
            why |= dict.fromkeys(names, f"uniform=True, and {missing}, which must have the same width, is not prunable")
    computed = set().union(*(unsaved(path, module) for path, module in pretrained_models(model)))
    for name, group in structure.groups.items():
        if lost := computed & {slot.tensor for slot in group.slots}:
            why[name] = f"uniform=True, and {min(lost)} would lose entries, which no config tells and no file holds"
    return structure.linked(sets).without_each(why)


def _by_config(model: nn.Module, structure: Structure) -> Iterator[tuple[set[str], str]]:
    """Yield the groups that share each field of a config, and a tensor that shares it and belongs to no group."""
    firsts = {id(tensor): name for name, tensor in named_tensors(model).items()}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first_of = {name: firsts[id(tensor)] for name, tensor in every if id(tensor) in firsts}
    at: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name, group in structure.groups.items():
        for slot in group.slots:
            at[slot.tensor, slot.dim].add(name)
    given: list[tuple[ConfigField, dict[tuple[str, int], set[str]], str]] = []
    for field in config_fields(model):
        places = {(first_of.get(tensor, tensor), dim): tensor for tensor, dim in field.places}
        missing = next((tensor for place, tensor in places.items() if place not in at), "")
        given.append((field, {place: at[place] for place in places if place in at}, missing))
    free = {place for _, own, missing in given if not missing for place in own}
    divided: dict[str, set[str]] = defaultdict(set)
    for field, own, missing in given:
        # A number that cannot change holds no width that another one gives, too: heads times the width of one, which
        # rotary embeddings keep.
        names = set().union(*(of for place, of in own.items() if not missing or place not in free))
        yield names, missing
        if field.divided and not missing:
            divided[field.module] |= names
    for names in divided.values():  # a width and a number of heads shrink by the same share
        yield names, ""


def _by_block(model: nn.Module, structure: Structure) -> Iterator[tuple[set[str], str]]:
    """Yield the groups that the same layers make in equal blocks, and such a layer that makes no group."""
    modules = dict(model.named_modules())
    made = {producer for group in structure.groups.values() for producer in group.producers}
    kinds: dict[tuple[frozenset[str], int], set[str]] = defaultdict(set)
    for name, group in structure.groups.items():
        kinds[frozenset(_kind(modules, producer) for producer in group.producers), group.width].add(name)
    alike: dict[str, list[str]] = defaultdict(list)
    for path in modules:
        alike[_kind(modules, path)].append(path)
    for (kind, _), names in kinds.items():
        others = [path for each in kind if "*" in each for path in alike[each] if path not in made]
        yield names, others[0] if others else ""


def _kind(modules: dict[str, nn.Module], path: str) -> str:
    """Return a path with ``*`` for the number of every block that has siblings of its class."""
    parts = path.split(".")
    shown = list(parts)
    for which, part in enumerate(parts):
        block = modules.get(".".join(parts[: which + 1]))
        holder = modules.get(".".join(parts[:which]))
        if not part.isdigit() or block is None or holder is None or not any(True for _ in block.children()):
            continue
        if sum(type(other) is type(block) for other in holder.children()) > 1:
            shown[which] = "*"
    return ".".join(shown)
