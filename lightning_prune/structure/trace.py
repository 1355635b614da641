"""Turns a model and example inputs into a ledger of which channels met; knows no operator."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs, Instead, refuse_empty, refuse_shapeless, undisturbed
from lightning_prune.structure.labels import Labels, Ledger
from lightning_prune.structure.tensors import named_tensors
from lightning_prune.structure.unknowns import add_unknowns_
from lightning_prune.structure.watch import watch

__all__ = ["trace"]


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Ledger:
    """Run the model once on example inputs and write down which channels met.

    Nothing that shapes alone tell is computed, unless the model's code asks for numbers; then it costs about one
    forward pass. Mode, RNG, buffers and module attributes are left as found.

    Raises:
        PruningError: If the model does not run on the example inputs, these hold nothing, or parameters have no shape.
    """
    refuse_shapeless(model)
    refuse_empty(example_inputs)
    for hollow in (True, False):
        with suppress(Exception):  # some code takes plain numbers alone
            return _traced(model, example_inputs, numbers=True, hollow=hollow)
    try:
        return _traced(model, example_inputs, numbers=False, hollow=False)
    except Exception as error:
        where, name = f"({type(error).__name__}: {error})", type(model).__name__
        if isinstance(example_inputs, Instead):
            told = f"{example_inputs.function.__name__} of {name} does not run in eval mode, without gradients {where}."
            raise PruningError(told) from error
        raise PruningError(
            f"{name} does not run on the example inputs in eval mode {where}. Pass example_inputs that its forward "
            "accepts: a tensor, a tuple of positional inputs or a dict of keyword inputs."
        ) from error


def _traced(model: nn.Module, example_inputs: ExampleInputs, numbers: bool, hollow: bool) -> Ledger:
    ledger = Ledger()
    labels = {name: ledger.register(name, tensor) for name, tensor in named_tensors(model).items()}
    ledger.numbers, ledger.hollow = numbers, hollow
    with undisturbed(model):
        watch(model, example_inputs, {}, ledger, labels)
    add_unknowns_(ledger)
    if any(labels[name].dims for name in ledger.unseen):
        followed = _follow_siblings(model, ledger, labels)
        ledger.idle = [n for n, _ in model.named_parameters() if n in ledger.unseen and n not in followed]
    return ledger


def _follow_siblings(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> set[str]:
    """Let modules that did not run, such as experts that no example came to, go with one beside them that did.

    Returns:
        The names of their parameters and buffers.
    """
    followed: set[str] = set()
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    idle = _idle(model, {id(tensor) for tensor in named_tensors(model).values() if names[id(tensor)] in ledger.unseen})
    for parent in model.modules():
        children = list(parent.children())
        if len(children) < 2 or not any(id(child) in idle for child in children):
            continue
        ran: dict[object, list[str]] = {}
        for child in sorted(children, key=lambda child: id(child) in idle):
            own = [(leaf, tuple(tensor.shape), names[id(tensor)]) for leaf, tensor in named_tensors(child).items()]
            kind = (type(child), *((leaf, shape) for leaf, shape, _ in own))
            first = ran.setdefault(kind, [name for _, _, name in own])
            if id(child) in idle and not set(first) <= ledger.unseen:
                followed |= {name for _, _, name in own}
                for name, other in zip((name for _, _, name in own), first, strict=True):
                    for dim, found in labels[name].dims.items():
                        ledger.meet(found[0].atoms, labels[other].dims[dim][0].atoms)
    return followed


def _idle(model: nn.Module, unseen: set[int]) -> set[int]:
    """Find the modules that have tensors of which no operator took any, as they are called by ``id``."""
    idle: set[int] = set()

    def look(module: nn.Module) -> tuple[int, int]:
        own = [id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        held, rest = len(own), sum(tensor in unseen for tensor in own)
        for child in module.children():
            below = look(child)
            held, rest = held + below[0], rest + below[1]
        if held and held == rest:
            idle.add(id(module))
        return held, rest

    look(model)
    return idle
