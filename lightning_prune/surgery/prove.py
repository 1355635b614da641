"""Proves a cut before it is made: the slim model runs, couples nothing new, computes what was left; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.inputs import ExampleInputs, fewer_positions, run, tensors_in, undisturbed
from lightning_prune.structure import Keep, Structure, named_tensors
from lightning_prune.structure.choices import resolve
from lightning_prune.structure.labels import PINNED, Label, Labels, Ledger, Ran
from lightning_prune.structure.links import left
from lightning_prune.structure.tensors import exchange_
from lightning_prune.structure.watch import alike, exchanged, watch
from lightning_prune.surgery.attributes import set_attributes_
from lightning_prune.surgery.cut import Cut, draft
from lightning_prune.surgery.resize import narrowed

__all__ = ["Disproof", "comparable", "prove", "prove_structure"]


@dataclass(frozen=True)
class Disproof:
    """Why a cut is not right."""

    reason: str


def prove(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    cut: Cut,
    tensors: Callable[[], dict[str, Tensor]],
) -> Disproof | None:
    """Prove that a cut is right, or say why it is not.

    The slim model is traced, its tensors carrying the labels that are left: nothing may meet that had not met before.
    Its outputs must equal, to rounding, those of the full model with the cut units silenced: what sums over them is
    zero, or, where nothing does, what makes them. Groups with a statistic running across their units are cut in both:
    their numbers change, rightly.

    Args:
        model: The full model, not changed.
        example_inputs: What the full and the slim model run on.
        structure: The model's channel groups.
        cut: The cut to prove.
        tensors: Makes the slim values of everything that the cut changes; asked when nothing else is held beside the
            model.
    """
    if not comparable(structure, cut.keep):
        return prove_structure(model, example_inputs, structure, cut)
    silenced = _silenced(model, structure, cut)
    with suppress(Exception):  # a failure counts where nothing was spared
        if structure.ledger.hollow and _proved_sparingly(model, example_inputs, structure, cut, tensors, silenced):
            return None
    try:
        ledger, found = _trace_slim(model, example_inputs, structure, cut, tensors(), hollow=False)
        failure = _same_structure(model, example_inputs, structure, cut, ledger)
        return failure or _same_numbers(silenced(example_inputs), found)
    except Exception as error:
        return Disproof(f"the slim model does not run ({type(error).__name__}: {error})")


def _proved_sparingly(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    cut: Cut,
    tensors: Callable[[], dict[str, Tensor]],
    silenced: _Silenced,
) -> bool:
    """Tell whether a cut was proved with little computed, and little held beside the model.

    Images need not be large for that: where the full model and the slim one run the operators of the trace on smaller
    ones, and none of their feature maps has shrunk to one position that had more, the smaller ones tell as much.
    """
    expected, inputs = _expected(silenced, example_inputs, structure)
    ledger, found = _trace_slim(model, inputs, structure, cut, tensors(), hollow=False)
    ran = structure.ledger.ran
    if inputs is not example_inputs and not (len(ran) == len(ledger.ran) and all(map(alike, ledger.ran, ran))):
        return False
    same = ledger.output_shapes == [tuple(output.shape) for output in expected]
    return same and not (
        _nothing_new(structure, _with_two_left(model, example_inputs, structure, cut) or ledger)
        or _same_numbers(expected, found)
    )


def comparable(structure: Structure, keep: Keep) -> Keep:
    """Return the groups whose units can be silenced instead of cut, and nothing but what they hold changes.

    The others have a statistic running across their units, or must go with one that has.
    """
    mixed = {name for name in keep if structure.groups[name].changes_statistics}
    mixed |= {name for link in structure.links if mixed & set(link) for name in link}
    return {name: stays for name, stays in keep.items() if name not in mixed}


def prove_structure(model: nn.Module, example_inputs: ExampleInputs, structure: Structure, cut: Cut) -> Disproof | None:
    """Prove the first half alone, computing nothing where the model allows it: a cheap way to look for culprits."""
    try:
        ledger = _run_slim(model, example_inputs, structure, cut)
        return _same_structure(model, example_inputs, structure, cut, ledger)
    except Exception as error:
        return Disproof(f"the slim model does not run ({type(error).__name__}: {error})")


def _expected(
    silenced: _Silenced, example_inputs: ExampleInputs, structure: Structure
) -> tuple[list[Tensor], ExampleInputs]:
    """Run the silenced model on the smallest inputs that tell enough; return its outputs, and those inputs."""
    for fewer in fewer_positions(example_inputs):
        with suppress(Exception):  # other operators, or the model takes images of its own size alone
            return silenced(fewer, structure.ledger.ran, late=True), fewer
    return silenced(example_inputs, late=True), example_inputs


def _same_structure(
    model: nn.Module, example_inputs: ExampleInputs, structure: Structure, cut: Cut, slim: Ledger
) -> Disproof | None:
    """Compare what a trace of the slim model found with what one of the full model did."""
    return _same_shapes(structure, slim) or _nothing_new(
        structure, _with_two_left(model, example_inputs, structure, cut) or slim
    )


def _run_slim(model: nn.Module, example_inputs: ExampleInputs, structure: Structure, cut: Cut) -> Ledger:
    """Trace the slim model, computing nothing where the model allows it."""
    if structure.ledger.hollow:
        own = named_tensors(model)
        empty = {name: own[name].new_empty(shape) for name, shape in cut.shapes.items()}
        with suppress(Exception):  # a failure counts where numbers were computed
            return _trace_slim(model, example_inputs, structure, cut, empty, hollow=True)[0]
    return _trace_slim(model, example_inputs, structure, cut, cut.tensors(model), hollow=False)[0]


def _with_two_left(model: nn.Module, example_inputs: ExampleInputs, structure: Structure, cut: Cut) -> Ledger | None:
    """Trace the model with two units left where the cut leaves one: dimensions of size one carry no labels."""
    two = {name: stays | _first_gone(stays, 2 - int(stays.sum())) for name, stays in cut.keep.items()}
    for link in structure.links:  # those that go together come back together
        if any(name in two and cut.keep[name].sum() < 2 for name in link):
            two |= {name: np.ones_like(two[name]) for name in link}
    alive = structure.alive(cut.keep)
    for attribute in structure.ledger.attributes:  # pieces of a group that a number tells the size of
        found = structure.component[attribute.labels[0].atoms]
        if len(found) > 1 and left(attribute.labels, alive) < 2:
            for name, stays in two.items():
                held = np.isin(structure.units[name], found)
                two[name] = stays | held & _first_gone(stays | ~held, 2 - int((stays & held).sum()))
    if all(np.array_equal(two[name], stays) for name, stays in cut.keep.items()):
        return None
    return _run_slim(model, example_inputs, structure, draft(model, structure, two))


def _first_gone(stays: np.ndarray, count: int) -> np.ndarray:
    """Return the first units that go, so many of them."""
    return ~stays & (np.cumsum(~stays) <= count)


def _trace_slim(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    cut: Cut,
    tensors: dict[str, Tensor],
    hollow: bool,
) -> tuple[Ledger, list[Tensor]]:
    ledger = Ledger(first_atom=structure.ledger.size)
    ledger.numbers, ledger.hollow = structure.ledger.numbers, hollow
    alive = structure.alive(cut.keep)
    for place, label in structure.ledger.lengths.items():
        ledger.lengths[place] = Label(label.atoms[alive[label.atoms]])
    labels: dict[str, dict[int, tuple[Label, ...]]] = {name: {} for name in named_tensors(model)}
    for slot in structure.ledger.slots:
        atoms = np.arange(slot.start, slot.start + slot.size)
        left = cut.kept.get(slot.tensor, {}).get(slot.dim)
        atoms = atoms if left is None else atoms[left.numpy()]
        if len(atoms) > 1:
            labels[slot.tensor][slot.dim] = (ledger.own(atoms),)
    with undisturbed(model):
        set_attributes_(model, cut.attributes)
        carried = {name: Labels(dims, hollow=hollow and name in tensors) for name, dims in labels.items()}
        outputs = watch(model, example_inputs, tensors, ledger, carried)
    return ledger, outputs


def _same_shapes(structure: Structure, slim: Ledger) -> Disproof | None:
    full = structure.ledger.output_shapes
    if slim.output_shapes == full:
        return None
    return Disproof(f"the model's outputs changed shape: {full} to {slim.output_shapes}")


def _nothing_new(structure: Structure, slim: Ledger) -> Disproof | None:
    new = _new_meetings(structure, slim)
    return Disproof(f"{new} channels met others that they had not met before") if new else None


def _same_numbers(expected: list[Tensor], found: list[Tensor]) -> Disproof | None:
    for full, slim in zip(expected, found, strict=True):
        if not full.is_floating_point():
            continue
        numbers = full.isfinite()  # a unit that is not a number cannot be silenced
        full, slim = full[numbers], slim[numbers]
        tolerance = min(1e4 * torch.finfo(full.dtype).eps, 0.1)
        scale = max(float(full.abs().max()), 1e-30) if full.numel() else 1.0
        if not torch.allclose(slim, full, rtol=0.0, atol=tolerance * scale):
            return Disproof(f"outputs differ by {float((slim - full).abs().max()) / scale:.1e} of their largest value")
    return None


def _new_meetings(structure: Structure, slim: Ledger) -> int:
    """Count atoms that the slim model couples with others than the full one did."""
    full, now = structure.component, resolve(slim, structure.taken)[: structure.ledger.size]
    real = np.zeros(len(full), dtype=bool)
    for slot in structure.ledger.slots:
        real[slot.start : slot.start + slot.size] = True
    inside = now < len(full)
    stray = full[np.where(inside, now, PINNED)] != full
    stray &= inside
    stray |= (now == now[PINNED]) & (full != full[PINNED])
    stray &= real
    return int(np.count_nonzero(stray))


@dataclass(frozen=True, eq=False)
class _Silenced:
    """The model with what cannot be compared cut, and all else that is cut silenced."""

    model: nn.Module
    base: Cut
    silent: dict[str, dict[int, Tensor]]
    """For each tensor, dimension -> which indices are left as they are, ``(size,)`` bool."""

    def __call__(
        self, example_inputs: ExampleInputs, expected: Sequence[Ran] | None = None, late: bool = False
    ) -> list[Tensor]:
        """Run it and return its outputs, as long as the operators are those expected.

        A silenced tensor is made when an operator takes it, and one that is cut too, if ``late``: till then something
        of its shape stands in for it. So they never all lie beside the model's own.
        """
        own = named_tensors(self.model)
        instead, made = {}, {}
        for name, kept in self.base.kept.items():
            # what has one dimension weighs little, and torch lays it out anew where it is not contiguous
            waits = late and own[name].dim() > 1
            shape = self.base.shapes[name]
            instead[name] = own[name].new_empty(()).expand(shape) if waits else narrowed(own[name], kept)
            if waits:
                made[id(instead[name])] = partial(self._made, name, own[name].detach(), cut=True)
        for name in self.silent:
            held = instead.get(name, own[name])
            made.setdefault(id(held), partial(self._made, name, held.detach(), cut=False))
        with undisturbed(self.model):
            set_attributes_(self.model, self.base.attributes)
            exchange_(self.model, instead)
            with exchanged(made, expected):
                return list(tensors_in(run(self.model, example_inputs)))

    def _made(self, name: str, value: Tensor, cut: bool) -> Tensor:
        kept = self.base.kept.get(name, {})
        if cut:
            value = narrowed(value, kept)
        if name not in self.silent:
            return value
        factor = torch.ones((), dtype=value.dtype, device=value.device)
        for dim, stays in self.silent[name].items():
            ones = (stays[kept[dim]] if dim in kept else stays).to(value)
            factor = factor * ones.view([-1 if other == dim else 1 for other in range(value.dim())])
        return value * factor  # some ten times faster than index_fill


def _silenced(model: nn.Module, structure: Structure, cut: Cut) -> _Silenced:
    plain = comparable(structure, cut.keep)
    silent: dict[str, dict[int, Tensor]] = {}
    for name, stays in plain.items():
        slots = structure.groups[name].slots
        for slot in [slot for slot in slots if slot.role == "consumer"] or slots:
            left = torch.from_numpy((slot.units < 0) | stays[slot.units])
            dims = silent.setdefault(slot.tensor, {})
            dims[slot.dim] = dims[slot.dim] & left if slot.dim in dims else left
    rest = {name: stays for name, stays in cut.keep.items() if name not in plain}
    return _Silenced(model, draft(model, structure, rest), silent)
