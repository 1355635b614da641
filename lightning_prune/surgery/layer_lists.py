"""Removes pass-throughs from the lists of Hugging Face models, so that their configs say how many there are.

``from_pretrained`` builds as many layers as the config says, numbered from 0. So once whole layers are gone the others
move up, and the number of layers and the lists with an entry for each layer follow in the config. That is done where a
model built from the new config, on the meta device, has the same tensors and the same plain attributes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lightning_prune.model.calls import modules_of
from lightning_prune.structure.tensor_names import lies_in
from lightning_prune.surgery.attributes import AttributeChange, held_number, set_attributes_
from lightning_prune.surgery.configs import configs_in, pretrained_models, shapes_of, twin_of
from lightning_prune.surgery.layer_numbers import numbered_layers, renumber_
from lightning_prune.surgery.pass_through import Skipped
from lightning_prune.surgery.resize import all_or_nothing

__all__ = [
    "ClosedList", "FollowedDepth", "Gaps", "close_lists_", "follow_depth", "moved_back", "moved_up", "open_lists_",
]  # fmt: skip

# Names under which configs of transformers hold numbers of layers.
_COUNTS = frozenset(
    {
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_encoder_layers", "depth",
    }
)  # fmt: skip
_PLAIN = (bool, int, float, str, type(None))

Gaps = dict[str, tuple[int, ...]]
"""Path of a list of layers -> the positions in it that are taken out."""


class ClosedList(nn.ModuleList):
    """Stands where a list of layers stood, and holds those that were not removed.

    Args:
        modules: The layers that stay.
        opened: The list that was here, with pass-throughs in the places of removed layers.
        taken: Positions in it of those that were taken out.
        fields: Fields of configs that say how many layers there are: name, value before, value now.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] | None = None,
        opened: nn.ModuleList | None = None,
        taken: Iterable[int] = (),
        fields: Iterable[tuple[str, Any, Any]] = (),
    ) -> None:
        super().__init__(modules)
        vars(self)["_opened"] = opened  # beside the modules, so that nothing finds its tensors
        self.taken = tuple(taken)
        self.fields = list(fields)

    @property
    def opened(self) -> nn.ModuleList:
        """The list that was here, with the layers that stay as they are now; of a slice, the slice itself."""
        found: nn.ModuleList | None = vars(self)["_opened"]
        if found is None:
            return self
        stay = [position for position in range(len(found)) if position not in self.taken]
        for position, layer in zip(stay, self, strict=True):
            found[position] = layer
        return found

    @property
    def gone(self) -> dict[int, dict[str, Any]]:
        """Position in the list that was here -> what is returned in the place of the removed layer."""
        opened = self.opened
        return {position: opened[position].skip for position in self.taken}  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> ClosedList:
        """Follow the model to another device or dtype, with the layers that may be brought back."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for position in self.gone:
            self.opened[position]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class FollowedDepth(NamedTuple):
    """What a model becomes once removed layers are taken out of their lists.

    Attributes:
        gaps: What is taken out.
        changes: Fields of configs that change.
        inexpressible: Why configs cannot say which layers were removed; else empty.
    """

    gaps: Gaps
    changes: tuple[AttributeChange, ...] = ()
    inexpressible: str = ""


def follow_depth(model: nn.Module) -> FollowedDepth:
    """Work out what the configs of Hugging Face models inside a model become without its removed layers.

    Args:
        model: The model, with pass-throughs in the places of removed layers. It is left as found.
    """
    gaps: Gaps = {}
    changes: list[AttributeChange] = []
    told: list[str] = []
    for path, module in pretrained_models(model):
        gone = {at: skipped for at, skipped in modules_of(module) if isinstance(skipped, Skipped)}
        if not gone:
            continue
        own = _whole_layers(module, gone)
        whole = {_joined(name, str(position)) for name, positions in own.items() for position in positions}
        parts = [at for at in gone if at not in whole]
        fields = None if parts else _fields(module, own)
        if fields is None:
            reason = f"{parts[0]} is removed, and what is around it is kept" if parts else "none of its fields gives it"
            told.append(_refusal(path, module, reason))
            continue
        gaps |= {_joined(path, name): positions for name, positions in own.items()}
        changes += [AttributeChange(path, name, held_number(module, name), new) for name, new in fields.items()]
    return FollowedDepth(gaps, tuple(changes), " ".join(told))


def close_lists_(model: nn.Module, gaps: Gaps, changes: Iterable[AttributeChange]) -> None:
    """Remove pass-throughs from the lists of layers, so that the others move up; configs and numbers of layers follow.

    Args:
        model: The model, with pass-throughs in the places of removed layers.
        gaps: What is taken out.
        changes: Fields of configs that change with it.
    """
    changes = list(changes)
    with all_or_nothing(model):
        numbered = numbered_layers(model)
        lists = {path: model.get_submodule(path) for path in gaps}
        made: dict[int, ClosedList] = {}
        for path, opened in lists.items():
            assert isinstance(opened, nn.ModuleList)
            fields = [(change.name, change.old, change.new) for change in changes if lies_in(path, change.module)]
            stay = [layer for position, layer in enumerate(opened) if position not in gaps[path]]
            made[id(opened)] = ClosedList(stay, opened, gaps[path], fields).train(opened.training)
        _exchange_lists_(model, made)
        set_attributes_(model, changes)
        renumber_(model, [replace(own, layers=made.get(id(own.layers), own.layers)) for own in numbered])


def open_lists_(model: nn.Module, paths: Iterable[str]) -> None:
    """Put lists back in which pass-throughs stand in the places of removed layers.

    Args:
        model: The model.
        paths: Paths of closed lists.
    """
    with all_or_nothing(model):
        numbered = numbered_layers(model)
        made: dict[int, nn.ModuleList] = {}
        changes: dict[tuple[str, str], AttributeChange] = {}
        for path in paths:
            closed = model.get_submodule(path)
            assert isinstance(closed, ClosedList)
            made[id(closed)] = closed.opened
            for position in closed.gone:
                closed.opened[position].train(closed.training)
            for above, module in pretrained_models(model):
                for name, old, new in closed.fields if lies_in(path, above) else ():
                    if held_number(module, name) == new:
                        changes[above, name] = AttributeChange(above, name, new, old)
        _exchange_lists_(model, made)
        set_attributes_(model, changes.values())
        renumber_(model, [replace(own, layers=made.get(id(own.layers), own.layers)) for own in numbered])


def _exchange_lists_(model: nn.Module, made: Mapping[int, nn.ModuleList]) -> None:
    for _, module in modules_of(model):
        for name, child in module._modules.items():
            if id(child) in made:
                module._modules[name] = made[id(child)]


def moved_back(name: str, gaps: Mapping[str, Iterable[int]]) -> str:
    """Return the name that a module or tensor had before layers were taken out of lists.

    Args:
        name: Its name now.
        gaps: Path of a list, as it is now -> the positions that were taken out of it.
    """
    found: list[str] = []
    parts = name.split(".")
    for place, part in enumerate(parts):
        gone = gaps.get(".".join(parts[:place]))
        if gone is None or not part.isdigit():
            found.append(part)
            continue
        position = int(part)
        for taken in sorted(gone):
            position += taken <= position
        found.append(str(position))
    return ".".join(found)


def moved_up(name: str, gaps: Mapping[str, Iterable[int]]) -> str:
    """Return the name of a module or tensor once layers are taken out of lists; empty if it is taken out itself."""
    found: list[str] = []
    parts = name.split(".")
    for place, part in enumerate(parts):
        gone = gaps.get(".".join(parts[:place]))
        if gone is None or not part.isdigit():
            found.append(part)
            continue
        if int(part) in gone:
            return ""
        found.append(str(int(part) - sum(position < int(part) for position in gone)))
    return ".".join(found)


def _whole_layers(module: nn.Module, gone: Mapping[str, Skipped]) -> Gaps:
    """Return the removed layers that are entries of a list in which others stay."""
    found: dict[str, list[int]] = {}
    for path, skipped in gone.items():
        above, _, name = path.rpartition(".")
        holder = module.get_submodule(above)
        passes = skipped.skip["fill"] == "input" and skipped.skip["renumber"]
        if passes and name.isdigit() and isinstance(holder, nn.ModuleList):
            found.setdefault(above, []).append(int(name))
    stay = {path: len(module.get_submodule(path)._modules) - len(all_) for path, all_ in found.items()}
    return {path: tuple(sorted(all_)) for path, all_ in found.items() if stay[path]}


def _fields(module: nn.Module, gaps: Gaps) -> dict[str, Any] | None:
    """Return the new fields of a config from which exactly the model without the gaps is built; None if none do."""
    dense = twin_of(module, {})
    if dense is None:
        return None
    choices = [list(_candidates(module, path, gone)) for path, gone in gaps.items()]
    for chosen in itertools.product(*choices):
        values: dict[str, Any] = {}
        for fields in chosen:
            values |= fields
        twin = twin_of(module, values)
        if twin is not None and _is_built(module, dense, twin, gaps):
            return values
    return None


def _candidates(module: nn.Module, path: str, gone: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield new values of a field that may count the layers of a list, with lists that have an entry for each."""
    count = len(module.get_submodule(path)._modules)
    for holder, prefix in configs_in(module.config):
        for name, value in vars(holder).items():
            if name not in _COUNTS or value != count:
                continue
            fields: dict[str, Any] = {f"{prefix}.{name}": count - len(gone)}
            for other, entries in vars(holder).items():
                if isinstance(entries, list | tuple) and len(entries) == count:
                    left = [entry for position, entry in enumerate(entries) if position not in gone]
                    fields[f"{prefix}.{other}"] = type(entries)(left)
            yield fields


def _is_built(module: nn.Module, dense: nn.Module, twin: nn.Module, gaps: Gaps) -> bool:
    """Return whether a model that was built has the tensors and plain attributes of one without the gaps."""
    moved = {moved_up(name, gaps): shape for name, shape in shapes_of(module).items()}
    moved.pop("", None)
    built_shapes = shapes_of(twin)
    # Constructors may compute a table for each kind of layer, which files do not hold; of a kind all may be gone.
    beyond = moved.keys() - built_shapes.keys()
    if beyond & {moved_up(name, gaps) for name in module.state_dict()}:
        return False
    if {name: shape for name, shape in moved.items() if name not in beyond} != built_shapes:
        return False
    lists = tuple(f"{path}." for path in gaps)
    built = dict(twin.named_modules())
    for path, was in dense.named_modules():
        after = moved_up(path, gaps)
        if not path.startswith(lists) or not after:
            continue
        own = vars(module.get_submodule(path))
        numbers = {str(part) for part in path.split(".") if part.isdigit()}
        for name, value in vars(was).items():
            if name.startswith("_") or type(value) not in _PLAIN or name not in own:
                continue
            is_position = type(value) is int and str(value) in numbers
            if not is_position and own[name] == value != vars(built[after]).get(name):
                return False
    return True


def _refusal(path: str, module: nn.Module, reason: str) -> str:
    kind = type(module.config).__name__
    return (
        f"{kind} of {path or 'the model'} cannot express this removal ({reason}), so from_pretrained would make what "
        "was removed anew, with random values. Save the state dict by torch.save, build the model from its config and "
        "load it by load_state_dict_."
    )


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path and leaf else path or leaf
