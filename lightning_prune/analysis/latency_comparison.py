"""Measures a pruned model beside the whole one, at several batch sizes, and whether rounder widths would be faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.measure.latency import ROUNDS, Turn, circumstances, rounds
from lightning_prune.model.calls import ExampleInputs, run, tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import bar_of
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.pruning.limits import step_of
from lightning_prune.structure import Keep, Structure, find_structure, named_tensors, trace
from lightning_prune.surgery import draft, find_groups, temporarily_cut

__all__ = ["LatencyReport", "Timing", "compare_latency"]

_MULTIPLES = (8, 16, 32)
_NOTABLE = 0.05  # share of the latency that rounder widths must save to be suggested
_DENSE, _PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Timing:
    """The latency of each version at one batch size.

    Attributes:
        batch_size: Examples in a call.
        seconds: Version -> seconds of the fastest call of a round, the median over rounds.
        kept: Version -> median, over rounds, of the share of the dense model's latency.
    """

    batch_size: int
    seconds: dict[str, float]
    kept: dict[str, float]


@dataclass(frozen=True)
class LatencyReport:
    """What a pruned model saves of the time of a call, beside what it saves of its multiply-adds.

    Versions are ``"dense"``, ``"pruned"``, and the pruned one with all widths rounded up, ``"round_to=8"`` and so on.

    Attributes:
        measured: On which device, with how many threads, on inputs of which shapes.
        flops: Version -> multiply-adds of a call on one batch of the example inputs.
        timings: One for each batch size.
        awkward: Name of a channel group -> its width, of the pruned model, where that is no multiple of 8.
        round_to: The multiple that would make the pruned model faster, or None where none would by 5 %.
        saves: The share of the pruned model's latency that it would save, averaged over batch sizes.
    """

    measured: str
    flops: dict[str, int]
    timings: tuple[Timing, ...]
    awkward: dict[str, int]
    round_to: int | None
    saves: float


def compare_latency(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    progress: bool = True,
) -> LatencyReport:
    """Measure, on this machine, a pruned model beside the whole one, and whether rounder widths would be faster.

    All versions run in turns of a few calls, in eval mode and without gradients, so that what else the machine does
    hits them alike.
    Versions with rounder widths are made for the length of their turn: the whole model, cut to the pruned one's widths
    rounded up to a multiple of 8, 16 and 32. Both models are left as found.

    Args:
        dense: The model as it was, on the device to measure on.
        pruned: The same after pruning, on the same device.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. Their first dimension is the
            batch; examples are repeated for larger ones.
        batch_sizes: Examples in a call.
        progress: Whether to show a progress bar.

    Raises:
        PruningError: If a model does not run on a batch of a size.

    Examples:
        >>> dense, pruned = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 2)) for n in (64, 20))
        >>> report = compare_latency(dense, pruned, torch.ones(1, 8), batch_sizes=[4], progress=False)
        >>> report.awkward, [timing.batch_size for timing in report.timings]
        ({'0': 20}, [4])
    """
    structure = find_groups(dense, example_inputs)
    widths = _widths(structure, pruned)
    rounder = _rounder(structure, widths)
    flops = {_DENSE: structure.flops({}), _PRUNED: find_structure(trace(pruned, example_inputs)).flops({})}
    shapes: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    for multiple, keep in rounder.items():
        cut = draft(dense, structure, keep)
        shape = partial(temporarily_cut, dense, cut, cut.tensors(dense))
        if _runs(dense, example_inputs, shape):
            shapes[f"round_to={multiple}"] = shape
            flops[f"round_to={multiple}"] = structure.flops(keep)
    timings = []
    with (
        bar_of(shown=progress) as bar,
        undisturbed(dense, example_inputs, copied=True),
        undisturbed(pruned, copied=True),
    ):
        task = bar.add_task("latency", total=ROUNDS * len(batch_sizes))
        for size in batch_sizes:
            batch = _resized(example_inputs, size)
            timings.append(_timed(dense, pruned, batch, size, shapes, partial(bar.advance, task)))
    best, saves = _best(timings, shapes)
    wide = {name: width * structure.groups[name].channels for name, width in widths.items()}
    awkward = {name: width for name, width in wide.items() if width % _MULTIPLES[0]}
    return LatencyReport(circumstances(dense, example_inputs), flops, tuple(timings), awkward, best, saves)


def _timed(
    dense: nn.Module,
    pruned: nn.Module,
    batch: ExampleInputs,
    size: int,
    shapes: Mapping[str, Callable[[], AbstractContextManager[None]]],
    advance: Callable[[], None],
) -> Timing:
    turns = {_DENSE: Turn(dense, batch, nullcontext), _PRUNED: Turn(pruned, batch, nullcontext)}
    turns |= {name: Turn(dense, batch, shape) for name, shape in shapes.items()}
    found: list[dict[str, float]] = []
    try:
        for fastest in rounds(list(turns.values())):
            found.append(dict(zip(turns, fastest, strict=True)))
            advance()
    except Exception as error:
        raise PruningError(f"The model does not run on a batch of {size}: {type(error).__name__}: {error}") from error
    seconds, kept = {}, {}
    for name in turns:
        seconds[name] = median([fastest[name] for fastest in found])
        kept[name] = median([fastest[name] / fastest[_DENSE] for fastest in found])
    return Timing(size, seconds, kept)


def _best(timings: Sequence[Timing], names: Iterable[str]) -> tuple[int | None, float]:
    """Return the multiple to suggest and what it saves: a coarser one only if it saves notably more; or None."""
    best: tuple[int | None, float] = None, 0.0
    for name in names:
        saved = 1 - fmean(timing.kept[name] / timing.kept[_PRUNED] for timing in timings)
        if saved > best[1] + _NOTABLE:
            best = int(name.partition("=")[2]), saved
    return best


def _widths(structure: Structure, pruned: nn.Module) -> dict[str, int]:
    """Return how many units of each group of the whole model the pruned one has; groups that hide it are left out."""
    own, found = named_tensors(pruned), {}
    for name, group in structure.groups.items():
        for slot in group.slots:
            if slot.tensor in own and bool((slot.units >= 0).all()):  # all of the dimension is of this group
                each = len(slot.units) / group.width
                found[name] = min(group.width, max(1, round(own[slot.tensor].shape[slot.dim] / each)))
                break
    return found


def _rounder(structure: Structure, widths: Mapping[str, int]) -> dict[int, Keep]:
    """Return choices that leave the same model with its widths rounded up, as far as it was cut, by multiple."""
    found: dict[int, Keep] = {}
    if widths.keys() != structure.groups.keys():
        return found
    for multiple in _MULTIPLES:
        steps = {name: step_of(group, multiple) for name, group in structure.groups.items()}
        stay = {}
        for name, width in widths.items():
            rounded = math.ceil(width / steps[name]) * steps[name]
            stay[name] = min(structure.groups[name].width, rounded)
        if stay != widths and any(stay[name] < group.width for name, group in structure.groups.items()):
            keep = {name: np.arange(group.width) < stay[name] for name, group in structure.groups.items()}
            found[multiple] = keep
    return found


def _runs(model: nn.Module, example_inputs: ExampleInputs, shape: Callable[[], AbstractContextManager[None]]) -> bool:
    """Return whether the model runs in a shape: widths that code ties together may not be rounded one by one."""
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, example_inputs))
        stack.enter_context(shape())
        try:
            run(model, example_inputs)
        except Exception:
            return False
    return True


def _resized(example_inputs: ExampleInputs, size: int) -> ExampleInputs:
    """Repeat examples, or leave some out, until there are so many."""
    own = next((tensor.shape[0] for tensor in tensors_in(example_inputs) if tensor.dim()), 1)

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != own:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % own]

    batch: ExampleInputs = pytree.tree_map_only(Tensor, resized, example_inputs)
    return batch
