"""Finds the channel groups of a model and tries them on shapes alone before anything is scored; writes nothing.

A slim model that runs, with half of all units gone, tells which numbers in the code do not follow: an operator whose
inputs have the sizes that their labels say, and whose output has not. Such a number is a literal. With that known the
trace is repeated, since channels may leave in another way: the same share of every head where whole heads cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lightning_prune.inputs import ExampleInputs, undisturbed
from lightning_prune.structure import Keep, Structure, find_structure, named_tensors, trace
from lightning_prune.structure.hollow import NumbersNeededError
from lightning_prune.structure.labels import Labels, Ledger, Literally, Ran
from lightning_prune.structure.watch import watch
from lightning_prune.surgery.attributes import attributes_set
from lightning_prune.surgery.course import Lefts, aligned
from lightning_prune.surgery.cut import Cut, draft
from lightning_prune.surgery.prove import counted

__all__ = ["find_groups"]

_MOST_TRACES = 6
_aten = torch.ops.aten
_MOVING = frozenset({
    _aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.slice, _aten.split, _aten.split_with_sizes,
    _aten.expand,
})  # fmt: skip
"""Operators that are asked for sizes."""


def find_groups(model: nn.Module, example_inputs: ExampleInputs) -> Structure:
    """Trace a model and return its channel groups, without those that cannot shrink, each with the reason.

    Raises:
        PruningError: If the model does not run on the example inputs, these hold nothing, or parameters have no shape.
    """
    literals: frozenset[Literally] = frozenset()
    for _ in range(_MOST_TRACES):
        structure = find_structure(trace(model, example_inputs, literals))
        found = _rehearsed(model, structure)
        if found.literals <= literals:
            break
        literals |= found.literals
    while found.stuck:
        structure = structure.without_each(found.stuck)
        found = _rehearsed(model, structure)
    return structure


@dataclass
class _Found:
    """What a rehearsal found: sizes that are numbers in the code, and groups that cannot shrink, with the reason."""

    literals: frozenset[Literally] = frozenset()
    stuck: dict[str, str] = field(default_factory=dict)


def _rehearsed(model: nn.Module, structure: Structure) -> _Found:
    """Run the model with half of its units gone, on shapes alone where its code allows that, and compare sizes."""
    keep = half_of(structure)
    if not keep:
        return _Found()
    cut = draft(model, structure, keep)
    lefts = Lefts(structure, keep)
    ledger, error = _run_slim(model, structure, cut)
    pairs, other = aligned(structure.ledger.ran, ledger.ran)
    counts = counted(structure, lefts)
    found = _Found()
    for at, ran in pairs:
        full = structure.ledger.ran[at]
        if _as_expected(lefts, full.taken, full.entering, ran.entering):
            _look(found, structure, lefts, at, ran, counts.get(at))
    if found.stuck or not (error or other):
        return found
    # What does not run stops at the operator after the last that did, or where it first runs another.
    stopped = other.ran if other is not None else _after(structure.ledger.ran, pairs)
    reason = f"the slim model does not run: {error or other}"
    if stopped is not None:
        found.stuck.update(_groups_of_kind(structure, lefts, stopped, reason))
    if not found.stuck and error is not None:
        found.stuck.update(dict.fromkeys(_culprits(model, structure, keep), reason))
    return found


def half_of(structure: Structure) -> dict[str, np.ndarray]:
    """Return a choice of half of the units of every group, drawn at random; groups of fewer than three stay whole."""
    generator = np.random.default_rng(0)
    share: dict[str, float] = {}
    for link in structure.links:
        # linked groups keep the same share, in whole steps
        steps = int(np.gcd.reduce([structure.groups[name].width for name in link]))
        narrow = min(structure.groups[name].width * (steps // 2) // max(steps, 1) for name in link) < 2
        share |= dict.fromkeys(link, 1.0 if narrow else 1 - steps // 2 / steps)
    keep = {}
    for name, group in structure.groups.items():
        count = round(group.width * share.get(name, 1 - group.width // 2 / group.width))
        if 2 <= count < group.width:
            keep[name] = np.zeros(group.width, dtype=bool)
            keep[name][generator.permutation(group.width)[:count]] = True
    return keep


def _run_slim(model: nn.Module, structure: Structure, cut: Cut) -> tuple[Ledger, Exception | None]:
    """Trace the slim model without labels, as far as it runs; return the error that stopped it."""
    own = named_tensors(model)
    for hollow in (True, False) if structure.ledger.hollow else (False,):
        if hollow:
            tensors = {name: own[name].new_empty(shape) for name, shape in cut.shapes.items()}
        else:
            tensors = cut.tensors(model)
        labels = {name: Labels(hollow=hollow) for name in tensors}
        ledger = Ledger()
        ledger.numbers, ledger.hollow = False, hollow
        try:
            for training, inputs in structure.ledger.passes:
                with undisturbed(model), attributes_set(model, cut.attributes):
                    watch(model, inputs, tensors, ledger, labels, training)
            return ledger, None
        except NumbersNeededError as error:
            failure: Exception = error
        except Exception as error:
            return ledger, error
    return ledger, failure


def _as_expected(
    lefts: Lefts, labels: Iterable[Labels], full: Iterable[Sequence[int]], found: Iterable[Sequence[int]]
) -> bool:
    """Return whether tensors have the sizes that their labels say, along the dimensions that carry labels."""
    for own, before, after in zip(labels, full, found, strict=False):
        expected = lefts.shape(own, before)
        if len(after) != len(before) or any(after[dim] != expected[dim] for dim in own.dims):
            return False
    return True


def _look(found: _Found, structure: Structure, lefts: Lefts, at: int, ran: Ran, count: tuple[str, int] | None) -> None:
    """Compare the sizes of what an operator returns with what labels say, and its counts."""
    full = structure.ledger.ran[at]
    if count is not None:
        names = [argument.name for argument in full.func._schema.arguments]
        asked = ran.plain[names.index(count[0])]
        if asked != count[1]:
            reason = f"{count[0]} is {asked} in the code, which does not follow ({_where(full)})"
            found.stuck.update(_groups_of_kind(structure, lefts, full, reason))
    for labels, before, after in zip(full.made, full.leaving, ran.leaving, strict=False):
        expected = lefts.shape(labels, before)
        wrong = [dim for dim in labels.dims if len(after) != len(before) or after[dim] != expected[dim]]
        if not wrong:
            continue
        sliced = full.func.overloadpacket is _aten.slice
        literal = [dim for dim in wrong if sliced or (len(after) == len(before) and after[dim] == before[dim])]
        keys = {(full.kind, dim) for dim in literal}
        if full.func.overloadpacket in _MOVING and keys and not keys <= structure.ledger.literals:
            found.literals |= keys
            reason = f"a number in the code fixes its width ({_where(full)})"
        else:
            reason = (
                f"its size does not follow: {tuple(before)} becomes {tuple(after)}, not {expected} ({_where(full)})"
            )
        found.stuck.update(_groups_of_kind(structure, lefts, full, reason))


def _groups_of_kind(structure: Structure, lefts: Lefts, ran: Ran, reason: str) -> dict[str, str]:
    """Return the groups that an operator has to do with, and those at the same place in modules of the same class."""
    found: dict[str, str] = {}
    for other in structure.ledger.ran:
        if other is ran or other.kind == ran.kind:
            found |= dict.fromkeys(sorted(lefts.groups(*other.taken, *other.made)), reason)
    return found


def _where(ran: Ran) -> str:
    return f"{ran.path or 'the model'}, {ran.func.overloadpacket}"


def _after(expected: list[Ran], pairs: list[tuple[int, Ran]]) -> Ran | None:
    last = pairs[-1][0] + 1 if pairs else 0
    return expected[last] if last < len(expected) else None


def _culprits(model: nn.Module, structure: Structure, keep: Keep) -> list[str]:
    """Halve the groups that are cut until those are found without which the slim model runs."""

    def runs(names: list[tuple[str, ...]]) -> bool:
        chosen = {name: keep[name] for link in names for name in link}
        return _run_slim(model, structure, draft(model, structure, chosen))[1] is None

    stuck: list[str] = []

    def search(names: list[tuple[str, ...]], accepted: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        if runs(accepted + names):
            return names
        if len(names) == 1:
            stuck.extend(names[0])
            return []
        half = len(names) // 2
        left = search(names[:half], accepted)
        return left + search(names[half:], accepted + left)

    linked = [link for link in structure.links if all(name in keep for name in link)]
    single = [(name,) for name in keep if not any(name in link for link in linked)]
    search([*single, *linked], [])
    return stuck
