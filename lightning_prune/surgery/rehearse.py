"""Finds the channel groups of a model and tries them on shapes alone before anything is scored; writes nothing.

A slim model that runs, with half of all units gone, tells which numbers in the code do not follow: an operator whose
inputs have the sizes that their labels say, and whose output has not. Such a number is a literal. With that known the
trace is repeated, since channels may leave in another way: the same share of every head where whole heads cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import nn

from lightning_prune.model.calls import ExampleInputs, same_draws
from lightning_prune.model.errors import reraise_out_of_memory
from lightning_prune.model.sandbox import remembered_once, undisturbed
from lightning_prune.structure import Keep, Structure, find_structure, named_tensors, trace
from lightning_prune.structure.decisions import decisions_in_order
from lightning_prune.structure.labels import Labels, Ledger, Literally, Ran
from lightning_prune.structure.shape_only import NumbersNeededError
from lightning_prune.structure.tracer import watch
from lightning_prune.surgery.attributes import attributes_set
from lightning_prune.surgery.cut import Cut, draft
from lightning_prune.surgery.expected_outputs import Lefts, aligned
from lightning_prune.surgery.verify import counted

__all__ = ["find_groups", "rehearsed"]

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
    with remembered_once(model):
        return rehearsed(model, example_inputs, find_structure(trace(model, example_inputs)))


def rehearsed(model: nn.Module, example_inputs: ExampleInputs, structure: Structure) -> Structure:
    """Return the channel groups of a model without those that cannot shrink, each with the reason.

    Args:
        model: The model.
        example_inputs: What it was traced on.
        structure: What the trace found.
    """
    with remembered_once(model):
        return _rehearsed(model, example_inputs, structure)


def _rehearsed(model: nn.Module, example_inputs: ExampleInputs, structure: Structure) -> Structure:
    literals: frozenset[Literally] = frozenset()
    for left in reversed(range(_MOST_TRACES)):
        found = _try_widths(model, structure)
        if found.literals <= literals or not left:
            break
        literals |= found.literals
        structure = find_structure(trace(model, example_inputs, literals))
    if found.stuck and not _runs(model, structure, {}):  # its code, run once, keeps results, such as in a lru_cache
        structure = find_structure(trace(model, example_inputs, literals))
        found = _try_widths(model, structure)
    while found.stuck:
        structure = structure.without_each(found.stuck)
        found = _try_widths(model, structure)
    return structure


@dataclass
class _Found:
    """What a rehearsal found: sizes that are numbers in the code, and groups that cannot shrink, with the reason."""

    literals: frozenset[Literally] = frozenset()
    stuck: dict[str, str] = field(default_factory=dict)


def _try_widths(model: nn.Module, structure: Structure) -> _Found:
    """Run the model with half of its units gone and compare sizes; where that does not run, with one unit gone."""
    found, stopped = _tried(model, structure, units_left(structure))
    if found.stuck or stopped is None:
        return found
    # Some code runs down to a width only; how far the cut at hand may go is for its verification to find.
    keep = units_left(structure, all_but_one=True)
    found, stopped = _tried(model, structure, keep)
    if found.stuck or stopped is None:
        return found
    found.stuck.update(_blamed(model, structure, keep, stopped))
    return found


@dataclass(frozen=True)
class _Stop:
    """Where a slim model stopped, or ran another operator than the full one, and why."""

    ran: Ran | None
    reason: str


def _tried(model: nn.Module, structure: Structure, keep: Keep) -> tuple[_Found, _Stop | None]:
    """Run a slim model, on shapes alone where its code allows that, and compare sizes as far as it runs."""
    found = _Found()
    if not keep:
        return found, None
    lefts = Lefts(structure, keep)
    ledger, error = _run_slim(model, structure, draft(model, structure, keep))
    pairs, other = aligned(structure.ledger.ran, ledger.ran)
    counts = counted(structure, lefts)
    for at, ran in pairs:
        full = structure.ledger.ran[at]
        if _as_expected(lefts, full.taken, full.entering, ran.entering):
            _look(found, structure, lefts, at, ran, counts.get(at))
    if error is None and other is None:
        return found, None
    # What does not run stops at the operator after the last that did, or where it first runs another.
    stopped = other.ran if other is not None else _after(structure.ledger.ran, pairs)
    return found, _Stop(stopped, f"the slim model does not run: {error or other}")


def _blamed(model: nn.Module, structure: Structure, keep: Keep, stop: _Stop) -> dict[str, str]:
    """Return the groups that stop a slim model, with the reason.

    They are those of the operator where it stops, if they alone stop it too: code may refuse a width long before, or
    after, an operator takes it.
    """
    if stop.ran is not None:
        lefts = Lefts(structure, keep)
        own = _with_linked(structure, lefts.groups(*stop.ran.taken, *stop.ran.made))
        if own and not _runs(model, structure, {name: stays for name, stays in keep.items() if name in own}):
            return _groups_of_kind(structure, lefts, stop.ran, stop.reason)
    return dict.fromkeys(_culprits(model, structure, keep), stop.reason)


def _with_linked(structure: Structure, names: Iterable[str]) -> set[str]:
    found = set(names)
    return found.union(*[link for link in structure.links if found & set(link)])


def _runs(model: nn.Module, structure: Structure, keep: Keep) -> bool:
    """Return whether a slim model runs the operators that the full one runs."""
    ledger, error = _run_slim(model, structure, draft(model, structure, keep))
    return error is None and aligned(structure.ledger.ran, ledger.ran)[1] is None


def units_left(structure: Structure, all_but_one: bool = False) -> dict[str, np.ndarray]:
    """Return a choice of half of the units of every group, or of all but one, drawn at random.

    Linked groups keep the same share. Groups that would keep fewer than two units stay whole.
    """
    generator = np.random.default_rng(0)
    counts: dict[str, int] = {}
    for link in structure.links:
        # a step takes the same share of each group
        steps = int(np.gcd.reduce([structure.groups[name].width for name in link]))
        left = steps - (1 if all_but_one else steps // 2)
        link_counts = {name: structure.groups[name].width // steps * left for name in link}
        narrow = min(link_counts.values()) < 2
        counts |= {name: structure.groups[name].width for name in link} if narrow else link_counts
    keep = {}
    for name, group in structure.groups.items():
        count = counts.get(name, group.width - (1 if all_but_one else group.width // 2))
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
        ledger.given = decisions_in_order(structure.ledger.ran)
        try:
            for one in structure.ledger.passes:
                with undisturbed(model, one.inputs, watched=True), same_draws(), attributes_set(model, cut.attributes):
                    watch(model, one, tensors, ledger, labels)
                ledger.passes.append(one)
            return ledger, None
        except NumbersNeededError as error:
            failure: Exception = error
        except Exception as error:
            reraise_out_of_memory(error)
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
    stuck: list[str] = []

    def search(links: list[tuple[str, ...]], accepted: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        if _runs(model, structure, {name: keep[name] for link in accepted + links for name in link}):
            return links
        if len(links) == 1:
            stuck.extend(links[0])
            return []
        half = len(links) // 2
        left = search(links[:half], accepted)
        return left + search(links[half:], accepted + left)

    linked = [link for link in structure.links if keep.keys() >= set(link)]
    in_links = set(chain.from_iterable(linked))
    single = [(name,) for name in keep if name not in in_links]
    search([*single, *linked], [])
    return stuck
