"""Plants errors in a right cut: other indices, stale attributes, scaled rows, heads at the wrong width."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.planted.subjects import Kept, Planted, Subject, Tensors
from lightning_prune.surgery import AttributeChange, Cut, held_number


def planted(subject: Subject, model: nn.Module, structure: Any, cut: Cut, r: random.Random) -> Iterator[Planted]:
    """Yield wrong cuts of every kind that this cut has a place for."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = [(name, dim) for name, dims in cut.kept.items() for dim in dims if visible(structure, cut, name, dim)]
    buffers = {name for name, _ in model.named_buffers()}
    kinds = {
        "another index": lambda kept, size: another(kept, size, r),
        "shifted indices": lambda kept, size: ((kept + 1) % size).sort().values,
        "other rows": lambda kept, size: torch.tensor(sorted(r.sample(range(size), len(kept)))),
        "rows in another order": lambda kept, size: reordered(kept, r),
        "one slot not cut": lambda kept, size: torch.arange(size),
    }
    for kind, change in kinds.items():
        # torch reads beyond its memory where the two parts of a weight norm differ in size
        free = [p for p in places if "parametrizations" not in p[0]] if kind == "one slot not cut" else places
        for name, dim in r.sample(free, min(2, len(free))):
            yield from replaced(kind, cut, own, name, dim, change(cut.kept[name][dim], own[name].shape[dim]), r)
    for kind, some in (
        ("buffer cut elsewhere", [p for p in places if p[0] in buffers]),
        ("bias cut elsewhere", [p for p in places if own[p[0]].dim() == 1 and p[0] not in buffers]),
    ):
        for name, dim in r.sample(some, min(2, len(some))):
            kept = cut.kept[name][dim]
            yield from replaced(kind, cut, own, name, dim, another(kept, own[name].shape[dim], r), r)
    for name in r.sample(sorted(cut.kept), min(2, len(cut.kept))):
        if own[name].is_floating_point():
            yield Planted("a row scaled by 1.1", name, cut, row_scaled(name, next(iter(cut.kept[name])), r))
    changes = list(cut.attributes)
    for change in r.sample(changes, min(3, len(changes))):
        rest = tuple(c for c in changes if c is not change)
        yield Planted("stale attribute", named(change), dataclasses.replace(cut, attributes=rest))
    for change in counts(model, changes, r):
        rest = tuple(c for c in changes if (c.module, c.name) != (change.module, change.name))
        yield Planted(
            "wrong count", f"{named(change)}={change.new}", dataclasses.replace(cut, attributes=(*rest, change))
        )
    yield from heads_misread(model, cut)
    if subject.program is not None:
        yield from regrouped(structure, cut, own, r)


def visible(structure: Any, cut: Cut, name: str, dim: int) -> bool:
    """Say whether an error there is one: groups that live in a single place may keep any of their units."""
    groups = [structure.groups[group] for group in cut.keep]
    touching = [g for g in groups if any((slot.tensor, slot.dim) == (name, dim) for slot in g.slots)]
    return all(len({(slot.tensor, slot.dim) for slot in g.slots}) > 1 for g in touching)


def another(kept: Tensor, size: int, r: random.Random) -> Tensor:
    """Swap one index that is kept for one that is not, in place of the other."""
    gone = sorted(set(range(size)) - set(kept.tolist()))
    wrong = kept.clone()
    if gone:
        wrong[r.randrange(len(kept))] = r.choice(gone)
    return wrong


def reordered(kept: Tensor, r: random.Random) -> Tensor:
    if len(kept) < 2:
        return kept
    i, j = r.sample(range(len(kept)), 2)
    wrong = kept.clone()
    wrong[i], wrong[j] = kept[j], kept[i]
    return wrong


def replaced(
    kind: str, cut: Cut, own: Tensors, name: str, dim: int, index: Tensor, r: random.Random
) -> Iterator[Planted]:
    """Yield the cut with other indices in one slot: in what is planned, or only in what is written."""
    if torch.equal(index, cut.kept[name][dim]):
        return
    dims = {**cut.kept[name], dim: index}
    where = f"{name} dim {dim}"
    if r.random() < 0.5:
        shape = tuple(dims[d].numel() if d in dims else size for d, size in enumerate(own[name].shape))
        kept, shapes = {**cut.kept, name: dims}, {**cut.shapes, name: shape}
        yield Planted(kind, f"{where}, planned", dataclasses.replace(cut, kept=kept, shapes=shapes))
        return

    def edit(tensors: Tensors) -> None:
        tensors[name] = narrowed(own[name].detach(), dims)

    yield Planted(kind, f"{where}, written", cut, Written(edit, {name: dims}))


@dataclass(frozen=True, eq=False)
class Written:
    """An edit of slim values that are selections of the full ones, which can be done to other weights as well."""

    edit: Callable[[Tensors], None]
    dims: Kept

    def __call__(self, tensors: Tensors) -> None:
        self.edit(tensors)


def row_scaled(name: str, dim: int, r: random.Random) -> Callable[[Tensors], None]:
    share = r.random()

    def edit(tensors: Tensors) -> None:
        value = tensors[name] = tensors[name].detach().clone()
        value.select(dim, int(share * value.shape[dim])).mul_(1.1)

    return edit


def counts(model: nn.Module, changes: list[AttributeChange], r: random.Random) -> list[AttributeChange]:
    """Return wrong values of whole numbers that modules hold: those that change, and others."""
    now = {(change.module, change.name): change.new for change in changes}
    old = {(change.module, change.name): change.old for change in changes}  # some stand in objects that modules hold
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and not name.startswith("_"):
                now.setdefault((path, name), value)
    now = {place: value for place, value in now.items() if type(value) is int and value > 0}
    found = []
    for path, name in r.sample(sorted(now), min(3, len(now))):
        value = now[path, name]
        wrong = r.choice([v for v in (value - 1, value + 1, value // 2, 2 * value) if v > 0 and v != value])
        found.append(AttributeChange(path, name, old.get((path, name), value), wrong))
    return found


def named(change: AttributeChange) -> str:
    return f"{change.module}.{change.name}".lstrip(".")


HEADS = ("num_heads", "heads", "n_head")
SIZES = ("head_dim",)


def heads_misread(model: nn.Module, cut: Cut) -> Iterator[Planted]:
    """Where whole heads left, keep their number and make each narrower; where each lost a share, the other way."""
    for change in cut.attributes:
        holder, _, last = change.name.rpartition(".")  # of a number in an object that the module holds
        if last not in (*HEADS, *SIZES) or not isinstance(change.old, int):
            continue
        rest = [c for c in cut.attributes if c is not change]
        module = model.get_submodule(change.module)
        for other in SIZES if last in HEADS else HEADS:
            name = f"{holder}.{other}".lstrip(".")
            size = held_number(module, name)
            if isinstance(size, int) and not any((c.module, c.name) == (change.module, name) for c in rest):
                wrong = size * change.new // change.old
                if wrong and wrong != size:
                    other = AttributeChange(change.module, name, size, wrong)
                    where = f"{named(change)} stays {change.old}, {name} becomes {wrong}"
                    yield Planted(
                        "heads at the wrong width", where, dataclasses.replace(cut, attributes=(*rest, other))
                    )


def regrouped(structure: Any, cut: Cut, own: Tensors, r: random.Random) -> Iterator[Planted]:
    """Keep other units of a group, in all its slots alike, without heeding which of them belong together."""
    for name in r.sample(sorted(cut.keep), min(2, len(cut.keep))):
        slots = structure.groups[name].slots
        dims = {(slot.tensor, slot.dim): slot for slot in slots}
        sizes = {own[tensor].shape[dim] for tensor, dim in dims}
        if len(sizes) != 1 or any((slot.units < 0).any() for slot in slots):
            continue  # part of other groups too
        size = sizes.pop()
        counted = {len(cut.kept[tensor][dim]) for tensor, dim in dims}
        if len(counted) != 1:
            continue
        index = torch.arange(counted.pop()) if r.random() < 0.5 else None
        if index is None:
            index = torch.tensor(sorted(r.sample(range(size), len(cut.kept[slots[0].tensor][slots[0].dim]))))
        kept = {tensor: dict(held) for tensor, held in cut.kept.items()}
        for tensor, dim in dims:
            kept[tensor][dim] = index
        if not all(torch.equal(kept[t][d], cut.kept[t][d]) for t, d in dims):
            yield Planted("units taken apart", f"{name} keeps {index.tolist()}", dataclasses.replace(cut, kept=kept))


def narrowed(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index)
    return tensor
