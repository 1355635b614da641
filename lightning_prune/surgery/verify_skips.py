"""Verifies the removal of layers before it is made: operator by operator, against hooks that return the layers' inputs.

The full model runs with a hook on every layer that is to leave. The hook returns what the layer was given. What runs
inside of the layer is not looked at, and its random numbers are given back. All other operators must be those of the
model without the layers, in the same order, with the same outputs.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.model.calls import ExampleInputs, run, same_draws, tensors_in
from lightning_prune.model.errors import reraise_out_of_memory
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure.tracer import unfused
from lightning_prune.surgery.cached_decoding import cache_is_wrong
from lightning_prune.surgery.fingerprint import Print, agree, fingerprint
from lightning_prune.surgery.pass_through import passed
from lightning_prune.surgery.skipped import temporarily_skipped
from lightning_prune.surgery.stand_ins import inputs_of_ordinary_size

__all__ = ["SkipProof", "verify_skips"]

_TOLERANCE = 1e-5  # the same operators on the same numbers; parallel sums may round otherwise
_OUTPUTS = 1e-3  # of a run with fused kernels in one of the two


@dataclass(frozen=True)
class SkipProof:
    """What was verified of a removal, or why it is not right.

    Attributes:
        operators: Operators that ran in both models.
        compared: Outputs of theirs that were compared by numbers.
        modes: The modes in which that was done.
        skipped: Mode -> why it was not looked at.
        wrong: What is different; empty if nothing is.
    """

    operators: int = 0
    compared: int = 0
    modes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    wrong: str = ""


class _Step(NamedTuple):
    """An operator that ran: its name, and the shapes and fingerprints of its outputs."""

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    prints: tuple[Print | None, ...]


class _Record(TorchDispatchMode):
    """Writes down which operators run, and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.inside = 0  # how many layers that are to leave are under way
        self._leaving: dict[int, weakref.ref[Tensor]] = {}  # what these layers made, by identity

    def stays(self, tensor: Tensor) -> bool:
        """Return whether a tensor was made outside of the layers that are to leave."""
        made = self._leaving.get(id(tensor))
        return made is None or made() is not tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [tensor for tensor in (out if isinstance(out, tuple | list) else [out]) if isinstance(tensor, Tensor)]
        if self.inside:
            self._leaving |= {id(tensor): weakref.ref(tensor) for tensor in found}
        else:
            prints = tuple(None if _is_unwritten(func) else _print_of(tensor) for tensor in found)
            self.steps.append(_Step(str(func), tuple(tuple(tensor.shape) for tensor in found), prints))
        return out


def verify_skips(model: nn.Module, example_inputs: ExampleInputs, skips: Mapping[str, dict[str, Any]]) -> SkipProof:
    """Verify that the model without some layers computes what it computes with their outputs replaced by their inputs.

    Both run in eval mode and, where that runs on the example inputs, in train mode, with the same random numbers.

    Args:
        model: The full model; it is left as found.
        example_inputs: What both run on.
        skips: Path of a layer -> what is returned in its place.
    """
    example_inputs = inputs_of_ordinary_size(example_inputs, None, True)
    operators = compared = 0
    stays: list[bool] = []
    modes: list[str] = []
    skipped: list[str] = []
    for training in (False, True):
        mode = "train" if training else "eval"
        try:
            expected = _full(model, example_inputs, skips, training)
        except Exception as error:
            reraise_out_of_memory(error)
            told = f"{mode} mode does not run with hooks in the layers' places ({type(error).__name__}: {error})"
            if not training:
                return SkipProof(wrong=told)
            skipped.append(told)
            continue
        try:
            found = _slim(model, example_inputs, skips, training)
        except Exception as error:
            reraise_out_of_memory(error)
            return SkipProof(
                wrong=f"the model does not run without it in {mode} mode ({type(error).__name__}: {error})"
            )
        stays = stays or expected.stays
        wrong = _difference(expected, found)
        if wrong:
            return SkipProof(wrong=f"in {mode} mode, {wrong}")
        operators += len(found.steps)
        compared += sum(each is not None for step in found.steps for each in step.prints)
        modes.append(mode)
    wrong = _as_users_run_it(model, example_inputs, skips, stays) or cache_is_wrong(model, example_inputs, skips)
    return SkipProof(operators, compared, tuple(modes), tuple(skipped), wrong)


class _Found(NamedTuple):
    """What a run did: its operators, its outputs, and whether each of these was made outside of the layers."""

    steps: list[_Step]
    outputs: list[Tensor]
    stays: list[bool]


def _full(
    model: nn.Module, example_inputs: ExampleInputs, skips: Mapping[str, dict[str, Any]], training: bool
) -> _Found:
    """Run the full model, with hooks that return what the layers were given."""
    record = _Record()
    with undisturbed(model, example_inputs), same_draws(), unfused():
        if training:
            model.train()
        _replace_outputs(model, skips, record)
        torch.manual_seed(0)
        with record:
            outputs = list(tensors_in(run(model, example_inputs)))
    return _Found(record.steps, outputs, [record.stays(tensor) for tensor in outputs])


def _slim(
    model: nn.Module, example_inputs: ExampleInputs, skips: Mapping[str, dict[str, Any]], training: bool
) -> _Found:
    record = _Record()
    with undisturbed(model, example_inputs), temporarily_skipped(model, skips), same_draws(), unfused():
        if training:
            model.train()
        torch.manual_seed(0)
        with record:
            outputs = list(tensors_in(run(model, example_inputs)))
    return _Found(record.steps, outputs, [True] * len(outputs))


def _replace_outputs(model: nn.Module, skips: Mapping[str, dict[str, Any]], record: _Record) -> None:
    """Have layers return what they are given, as if they had not run: inside of ``undisturbed``, which undoes this."""
    for path, skip in skips.items():
        states: list[Any] = []
        module = model.get_submodule(path)
        module.register_forward_pre_hook(partial(_enter, record, states), with_kwargs=True)
        module.register_forward_hook(partial(_leave, record, states, skip), with_kwargs=True)


def _enter(record: _Record, states: list[Any], module: Any, args: Any, kwargs: Any) -> None:
    record.inside += 1
    given = [(tensor, tensor.clone()) for tensor in tensors_in((args, kwargs))]
    states.append((given, torch.get_rng_state(), random.getstate(), np.random.get_state()))


def _leave(
    record: _Record, states: list[Any], skip: dict[str, Any], module: Any, args: Any, kwargs: Any, _: Any
) -> Any:
    given, of_torch, of_python, of_numpy = states.pop()
    for tensor, value in given:  # the layer may have written into what it was given
        if not torch.equal(tensor, value):
            tensor.copy_(value)
    torch.set_rng_state(of_torch)
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    record.inside -= 1
    return passed(skip, args, kwargs)


def _difference(expected: _Found, found: _Found) -> str:
    """Say what two runs differ in, if anything."""
    for number, (one, other) in enumerate(zip(expected.steps, found.steps, strict=False)):
        if one.operator != other.operator or one.shapes != other.shapes:
            return f"operator {number} is {other.operator} on {other.shapes}, not {one.operator} on {one.shapes}"
        for before, after in zip(one.prints, other.prints, strict=True):
            if before is not None and after is not None and not agree(before, after, _TOLERANCE):
                return f"operator {number}, {one.operator}, gives other numbers"
    if len(expected.steps) != len(found.steps):
        return f"{len(found.steps)} operators run instead of {len(expected.steps)}"
    return _outputs_differ(expected.outputs, found.outputs, expected.stays, _TOLERANCE)


def _outputs_differ(expected: list[Tensor], found: list[Tensor], stays: list[bool], tolerance: float) -> str:
    """Say how outputs differ; what a layer keeps for later, such as its keys in a cache, leaves with it."""
    if not all(stays) and len(stays) == len(expected):
        return _entries_differ([tensor for tensor, stay in zip(expected, stays, strict=True) if stay], found, tolerance)
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return "the model's outputs have other shapes"
    for one, other in zip(expected, found, strict=True):
        before, after = _print_of(one), _print_of(other)
        if before is not None and after is not None and not agree(before, after, tolerance):
            return "the model's outputs differ"
    return ""


def _entries_differ(expected: list[Tensor], found: list[Tensor], tolerance: float) -> str:
    """Say how outputs differ, whose order may be another: the layers that stay may have other entries in a cache."""
    if len(expected) != len(found):
        return f"the model returns {len(found)} tensors instead of {len(expected)}"
    left = list(found)
    for one in expected:
        place = next((at for at, other in enumerate(left) if _are_alike(one, other, tolerance)), None)
        if place is None:
            return "the model's outputs differ"
        del left[place]
    return ""


def _are_alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    before, after = _print_of(one), _print_of(other)
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and (before is None or after is None or agree(before, after, tolerance))


def _as_users_run_it(
    model: nn.Module, example_inputs: ExampleInputs, skips: Mapping[str, dict[str, Any]], stays: list[bool]
) -> str:
    """Say what is different with the fused kernels that an ordinary call takes, if anything."""
    with undisturbed(model, example_inputs), same_draws():
        _replace_outputs(model, skips, _Record())
        torch.manual_seed(0)
        expected = list(tensors_in(run(model, example_inputs)))
    try:
        with undisturbed(model, example_inputs), temporarily_skipped(model, skips), same_draws():
            torch.manual_seed(0)
            found = list(tensors_in(run(model, example_inputs)))
    except Exception as error:
        reraise_out_of_memory(error)
        return f"the model does not run without it as users call it ({type(error).__name__}: {error})"
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in expected if tensor.is_floating_point()):
        return _outputs_differ(expected, found, stays, _OUTPUTS)
    return ""


def _print_of(tensor: Tensor) -> Print | None:
    floats = tensor.is_floating_point() or tensor.is_complex()
    if not floats or not tensor.numel() or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    return fingerprint(tensor, None, [None] * (tensor.dim()))


def _is_unwritten(func: Any) -> bool:
    return "empty" in func.overloadpacket.__name__
