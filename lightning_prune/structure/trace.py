"""Turns a model and example inputs into a ledger of which channels met; knows no operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
)
from lightning_prune.model.errors import PruningError, failures_suppressed, reraise_out_of_memory
from lightning_prune.model.sandbox import remembered_once, undisturbed
from lightning_prune.structure.decisions import EXPLORED, Ways
from lightning_prune.structure.labels import Labels, Ledger, Literally, Pass, Ran
from lightning_prune.structure.rules import is_pointwise
from lightning_prune.structure.siblings import follow_siblings
from lightning_prune.structure.solve_ints import add_unknowns_
from lightning_prune.structure.tensor_names import named_tensors
from lightning_prune.structure.tracer import watch
from lightning_prune.structure.train_code import looks_at_gradients, looks_at_mode

__all__ = ["trace"]

_LARGER_BATCH = 4


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
    with remembered_once(model):
        return _traced(model, example_inputs, literals)


def _traced(model: nn.Module, example_inputs: ExampleInputs, literals: frozenset[Literally]) -> Ledger:
    """Trace without numbers where that tells all, else with them."""
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
        _pin_compiled(model, ledger, labels)
        _run_pass(model, Pass(False, example_inputs), ledger, labels)
        return ledger, labels

    ledger, labels = eval_mode()
    unseen = {name for name in ledger.unseen if labels[name].dims}
    gradients = looks_at_gradients(model, example_inputs)
    if gradients or _idle_parameters(model, ledger, labels) or looks_at_mode(model, example_inputs):
        for inputs, doubled in _for_training(example_inputs):
            first, reals = len(ledger.ran), ledger.reals
            try:
                _run_pass(model, Pass(True, inputs, gradients), ledger, labels)
                ledger.untrained = ""
                # one that makes more real numbers of widths than the other may multiply by them
                if unseen <= ledger.unseen and ledger.reals == 2 * reals:
                    _drop_if_alike(ledger, first, doubled)
                break
            except Exception as error:
                reraise_out_of_memory(error)
                failure = f"{type(error).__name__}: {error}"
                ledger, labels = eval_mode()  # what half of a pass wrote down does not count
                ledger.untrained = ledger.untrained or failure
    explored = _explore(model, example_inputs, ledger, labels)
    if not (ledger.decided or explored):
        for ran in ledger.ran:
            ran.decisions = {}
    add_unknowns_(ledger)
    idle = _idle_parameters(model, ledger, labels)
    if idle:
        followed = follow_siblings(model, ledger, labels)
        ledger.idle = [name for name in idle if name not in followed]
        ledger.guessed = sorted(followed)
    return ledger


def _pin_compiled(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> None:
    """Pin what TorchScript holds: it hands out another tensor each time it is asked, so that none can be exchanged."""
    for path, module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule):
            for leaf, _ in (*module._parameters.items(), *module._buffers.items()):
                name = f"{path}.{leaf}" if path else leaf
                for found in labels[name].dims.values():
                    ledger.pin(found, "held by TorchScript (torch.jit.script or torch.jit.trace)")


def _explore(model: nn.Module, example_inputs: ExampleInputs, ledger: Ledger, labels: Mapping[str, Labels]) -> bool:
    """Trace eval mode again with other decisions, so that parameters run which the decisions of the example left out.

    Experts that no token was sent to, and exits that were not taken, read what they would read.

    Returns:
        Whether that made any more parameters run.
    """
    explored = False
    for ways in EXPLORED if not ledger.hollow else ():
        idle = {name for name in _idle_parameters(model, ledger, labels) if labels[name].dims}
        if not idle or not any(ran.decisions for ran in ledger.ran):
            break
        before = ledger.state()
        try:
            _run_pass(model, Pass(False, example_inputs), ledger, labels, ways)
        except Exception as error:  # a decision that the code could not come to
            reraise_out_of_memory(error)
            ledger.restore_(before)
            continue
        if idle <= ledger.unseen:
            ledger.restore_(before)
        else:
            explored = True
    return explored


def _drop_if_alike(ledger: Ledger, first: int, doubled: bool) -> None:
    """Drop what ran in train mode if it is what ran in eval mode, with random numbers added or multiplied.

    Then one mode tells as much as both, and only one need be run again to verify a cut. What met in it still counts.
    """
    usual = [ran for ran in ledger.ran[:first] if not _only_perturbs(ran.func)]
    other = [ran for ran in ledger.ran[first:] if not _only_perturbs(ran.func)]
    if len(usual) == len(other) and all(_alike(*pair, doubled) for pair in zip(usual, other, strict=True)):
        del ledger.ran[first:]
        ledger.passes.pop()
        ledger.counts = [count for count in ledger.counts if count[0] < first]


def _alike(usual: Ran, other: Ran, doubled: bool) -> bool:
    """Return whether the same operator ran in the same module with the same numbers; one may count a doubled batch.

    BatchNorm is told in which mode it runs.
    """
    if (usual.path, usual.func) != (other.path, other.func):
        return False
    if usual.func.overloadpacket is torch.ops.aten.native_batch_norm:
        return True
    found = _doubled_numbers(usual.plain, other.plain)
    return found is not None and found <= (1 if doubled else 0)


def _doubled_numbers(usual: Any, other: Any) -> int | None:
    """Return how many numbers of ``other`` are twice those of ``usual``; None if any is another one."""
    if isinstance(usual, tuple) and isinstance(other, tuple):
        if len(usual) != len(other):
            return None
        found = [_doubled_numbers(*pair) for pair in zip(usual, other, strict=True)]
        known = [count for count in found if count is not None]
        return sum(known) if len(known) == len(found) else None
    if usual == other:
        return 0
    return 1 if type(usual) is type(other) is int and other == 2 * usual else None


def _only_perturbs(func: Any) -> bool:
    """Return whether an operator makes random numbers, or works element by element."""
    aten = torch.ops.aten
    blank = func.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty)
    return blank or torch.Tag.nondeterministic_seeded in func.tags or is_pointwise(func)


def _run_pass(
    model: nn.Module, one: Pass, ledger: Ledger, labels: Mapping[str, Labels], ways: Ways | None = None
) -> None:
    costs = len(ledger.costs)
    with undisturbed(model, one.inputs, watched=True), same_draws():
        calls = watch(model, one, {}, ledger, labels, ways)
    if ledger.passes:
        del ledger.costs[costs:]  # what a model costs is what one call in eval mode does
    ledger.passes.append(one._replace(calls=calls))


def _idle_parameters(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> list[str]:
    """Return the parameters that no operator took, if any tensor with channels is among what none took."""
    if not any(labels[name].dims for name in ledger.unseen):
        return []
    return [name for name, _ in model.named_parameters() if name in ledger.unseen]


def _for_training(example_inputs: ExampleInputs) -> Iterator[tuple[ExampleInputs, bool]]:
    """Yield what to run on in train mode, and whether that is a batch of one, doubled.

    A batch of one is doubled first, since BatchNorm takes no single example. Losses between examples may need more.
    """
    tensors = [tensor for tensor in tensors_in(example_inputs) if tensor.dim()]
    if tensors and all(tensor.shape[0] == 1 for tensor in tensors):
        yield _repeated(example_inputs, 2), True
    yield example_inputs, False
    sizes = {tensor.shape[0] for tensor in tensors}
    if len(sizes) == 1 and max(sizes) < _LARGER_BATCH:
        yield _repeated(example_inputs, _LARGER_BATCH), False


def _repeated(example_inputs: ExampleInputs, times: int) -> ExampleInputs:
    return pytree.tree_map_only(
        Tensor, lambda tensor: torch.cat([tensor] * times) if tensor.dim() else tensor, example_inputs
    )
