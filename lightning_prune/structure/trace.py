"""Turns a model and example inputs into a ledger of which channels met; knows no operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import (
    ExampleInputs,
    Instead,
    modules_of,
    refuse_empty,
    refuse_shapeless,
    same_draws,
    tensors_in,
    uncollected,
    undisturbed,
)
from lightning_prune.model.errors import PruningError, failures_suppressed, reraise_out_of_memory
from lightning_prune.structure.labels import Label, Labels, Ledger, Literally, Ran
from lightning_prune.structure.solve_ints import add_unknowns_
from lightning_prune.structure.tensor_names import named_tensors
from lightning_prune.structure.tracer import watch

__all__ = ["trace"]


@uncollected()
def trace(model: nn.Module, example_inputs: ExampleInputs, literals: frozenset[Literally] = frozenset()) -> Ledger:
    """Run the model on example inputs and write down which channels met.

    Nothing that shapes alone tell is computed, unless the model's code asks for numbers; then it costs about one
    forward pass. Where the model's code looks at ``training``, or parameters did not run, train mode is traced too.
    Mode, RNG, buffers and module attributes are left as found.

    Args:
        model: The model.
        example_inputs: What to run it on.
        literals: Sizes that are known to be numbers in the code, which do not follow the channels that leave.

    Raises:
        PruningError: If the model does not run on the example inputs, these hold nothing, or parameters have no shape.
    """
    refuse_shapeless(model)
    refuse_empty(example_inputs)
    for hollow in (True, False):
        with failures_suppressed():  # some code takes plain numbers alone
            return _in_both_modes(model, example_inputs, literals, numbers=True, hollow=hollow)
    try:
        return _in_both_modes(model, example_inputs, literals, numbers=False, hollow=False)
    except Exception as error:
        reraise_out_of_memory(error)
        where, name = f"({type(error).__name__}: {error})", type(model).__name__
        if isinstance(example_inputs, Instead):
            told = f"{example_inputs.function.__name__} of {name} does not run in eval mode, without gradients {where}."
            raise PruningError(told) from error
        raise PruningError(
            f"{name} does not run on the example inputs in eval mode {where}. Pass example_inputs that its forward "
            "accepts: a tensor, a tuple of positional inputs or a dict of keyword inputs."
        ) from error


def _in_both_modes(
    model: nn.Module, example_inputs: ExampleInputs, literals: frozenset[Literally], numbers: bool, hollow: bool
) -> Ledger:
    """Trace eval mode, and train mode where it may run other code."""

    def eval_mode() -> tuple[Ledger, dict[str, Labels]]:
        ledger = Ledger()
        ledger.literals = literals
        labels = {name: ledger.register(name, tensor) for name, tensor in named_tensors(model).items()}
        ledger.numbers, ledger.hollow = numbers, hollow
        _run_pass(model, example_inputs, ledger, labels, training=False)
        return ledger, labels

    ledger, labels = eval_mode()
    unseen = {name for name in ledger.unseen if labels[name].dims}
    if _idle_parameters(model, ledger, labels) or _looks_at_mode(model, example_inputs):
        for inputs in _for_training(example_inputs):
            first = len(ledger.ran)
            try:
                _run_pass(model, inputs, ledger, labels, training=True)
                ledger.untrained = ""
                if unseen <= ledger.unseen:
                    _drop_if_alike(ledger, first)
                break
            except Exception as error:
                reraise_out_of_memory(error)
                failure = f"{type(error).__name__}: {error}"
                ledger, labels = eval_mode()  # what half of a pass wrote down does not count
                ledger.untrained = failure
    if not ledger.decided:
        for ran in ledger.ran:
            ran.decisions = {}
    add_unknowns_(ledger)
    idle = _idle_parameters(model, ledger, labels)
    if idle:
        followed = _follow_siblings(model, ledger, labels)
        ledger.idle = [name for name in idle if name not in followed]
    return ledger


def _drop_if_alike(ledger: Ledger, first: int) -> None:
    """Drop what ran in train mode if it is what ran in eval mode, with random numbers added or multiplied.

    Then one mode tells as much as both, and only one need be run again to verify a cut. What met in it still counts.
    """
    usual = [ran for ran in ledger.ran[:first] if not _only_perturbs(ran.func)]
    other = [ran for ran in ledger.ran[first:] if not _only_perturbs(ran.func)]
    if len(usual) == len(other) and all(map(_alike, usual, other)):
        del ledger.ran[first:]
        ledger.passes.pop()
        ledger.counts = [count for count in ledger.counts if count[0] < first]


def _alike(usual: Ran, other: Ran) -> bool:
    """Return whether the same operator ran in the same module with the same numbers, or twice those of a batch of one.

    BatchNorm is told in which mode it runs.
    """
    if (usual.path, usual.func) != (other.path, other.func):
        return False
    return usual.func.overloadpacket is torch.ops.aten.native_batch_norm or _same_numbers(usual.plain, other.plain)


def _same_numbers(usual: Any, other: Any) -> bool:
    if isinstance(usual, tuple) and isinstance(other, tuple):
        return len(usual) == len(other) and all(map(_same_numbers, usual, other))
    return bool(usual == other) or (type(usual) is type(other) is int and other == 2 * usual)


def _only_perturbs(func: Any) -> bool:
    """Return whether an operator makes random numbers, or works element by element."""
    aten = torch.ops.aten
    blank = func.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty)
    return blank or torch.Tag.nondeterministic_seeded in func.tags or torch.Tag.pointwise in func.tags


def _run_pass(
    model: nn.Module, inputs: ExampleInputs, ledger: Ledger, labels: Mapping[str, Labels], training: bool
) -> None:
    costs = len(ledger.costs)
    with undisturbed(model), same_draws():
        watch(model, inputs, {}, ledger, labels, training)
    if training:
        del ledger.costs[costs:]  # what a model costs is what one call in eval mode does
    ledger.passes.append((training, inputs))


def _idle_parameters(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> list[str]:
    """Return the parameters that no operator took, if any tensor with channels is among what none took."""
    if not any(labels[name].dims for name in ledger.unseen):
        return []
    return [name for name, _ in model.named_parameters() if name in ledger.unseen]


def _for_training(example_inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Yield what to run on in train mode: a batch of one twice over first, since BatchNorm takes no single example."""
    tensors = [tensor for tensor in tensors_in(example_inputs) if tensor.dim()]
    if tensors and all(tensor.shape[0] == 1 for tensor in tensors):
        yield pytree.tree_map_only(
            Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, example_inputs
        )
    yield example_inputs


def _looks_at_mode(model: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Return whether code of the model that may run reads ``training``; that of ``torch.nn`` computes alike in both."""
    start = {"forward"}
    if isinstance(example_inputs, Instead):
        start.add(example_inputs.function.__name__)
    kinds = {type(module) for _, module in modules_of(model)}
    return any(_reads_training(kind, start) for kind in kinds if not kind.__module__.startswith("torch.nn."))


def _reads_training(kind: type, start: set[str]) -> bool:
    """Return whether methods of a class read ``training``, from the named ones on to those that they call."""
    waiting, seen = list(start), set(start)
    while waiting:
        method = getattr(kind, waiting.pop(), None)
        if not isinstance(method, FunctionType):
            continue
        names = _names_in(method.__code__)
        if "training" in names:
            return True
        waiting.extend(names - seen)
        seen |= names
    return False


def _names_in(code: CodeType) -> set[str]:
    """Return the names that code uses, functions defined inside it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def _follow_siblings(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> set[str]:
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
