"""Ties experts that no example came to to those beside them that ran; reads what a trace wrote down."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from torch import nn

from lightning_prune.model.calls import modules_of
from lightning_prune.structure.labels import Label, Labels, Ledger
from lightning_prune.structure.tensor_names import named_tensors


def follow_siblings(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> set[str]:
    """Tie experts that no example came to to those beside them that ran, and return the names of their tensors.

    Only entries of one ``ModuleList`` or ``ModuleDict`` count as experts, of which all that ran read the same channels:
    two or more did, or the code around them chooses by numbers of its input. What else did not run stays as it is:
    nothing tells which channels it would read.
    """
    followed: set[str] = set()
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    for path, parent in modules_of(model):
        if not isinstance(parent, nn.ModuleList | nn.ModuleDict):
            continue
        by_shape: dict[object, list[list[str]]] = {}
        for child in parent.children():
            own = [(leaf, tuple(tensor.shape), names[id(tensor)]) for leaf, tensor in named_tensors(child).items()]
            kind = (type(child), *((leaf, shape) for leaf, shape, _ in own))
            by_shape.setdefault(kind, []).append([name for _, _, name in own])
        for experts in by_shape.values():
            ran = [own for own in experts if own and not set(own) & ledger.unseen]
            idle = [own for own in experts if own and set(own) <= ledger.unseen]
            chosen_by_data = path.rpartition(".")[0] in ledger.decided
            if not idle or len(ran) < (1 if chosen_by_data else 2) or not _read_the_same(ledger, labels, ran):
                continue
            for names_of_one in idle:
                followed.update(names_of_one)
                for name, other in zip(names_of_one, ran[0], strict=True):
                    for dim, found in labels[name].dims.items():
                        ledger.meet(found[0].atoms, labels[other].dims[dim][0].atoms)
    return followed


def _read_the_same(ledger: Ledger, labels: Mapping[str, Labels], experts: list[list[str]]) -> bool:
    """Return whether the first operator that takes anything of each expert takes the same channels beside it."""
    entering = []
    for own in experts:
        mine = {id(label) for name in own for found in labels[name].dims.values() for label in found}
        entering.append(_first_beside(ledger, mine))
    first = entering[0]
    return first is not None and all(other == first for other in entering[1:])


def _first_beside(ledger: Ledger, mine: set[int]) -> set[bytes] | None:
    """Return the atoms along the dimensions of the data at the first operator that takes it with labels of ``mine``."""
    for ran in ledger.ran:
        data: list[list[Label]] = []
        takes_mine = False
        for labels in ran.taken:
            carried = list(chain.from_iterable(labels.dims.values()))
            if not mine.isdisjoint(map(id, carried)):
                takes_mine = True
            elif not labels.weight:
                data.append(carried)
        if data and takes_mine:
            return {label.atoms.tobytes() for found in data for label in found}
    return None
