"""Measures, group by group, a metric against the share of units that is gone, without retraining; changes nothing."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import nn

from lightning_prune.analysis.sensitivity_findings import GroupSensitivity, Mode, Sensitivity
from lightning_prune.measure.footprint import Footprint
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import bar_of
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.pruning.arguments import (
    Modules,
    Parts,
    check_arguments,
    check_module,
    check_prunable,
    listed,
    part_of,
)
from lightning_prune.pruning.budget import Budget, Dense, Scores, select_units
from lightning_prune.pruning.left_alone import left_alone, prunable_groups
from lightning_prune.pruning.plan import plan_filters
from lightning_prune.pruning.scoring import Criterion, score_units
from lightning_prune.structure import ChannelGroup, Structure, named_tensors
from lightning_prune.surgery import find_groups, temporarily_cut

__all__ = [
    "TENTHS", "GroupSensitivity", "Mode", "Sensitivity", "begin", "evaluated", "measure_each", "sensitivity",
]  # fmt: skip

TENTHS = tuple(tenth / 10 for tenth in range(1, 10))


@changes_model
def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    evaluate: Callable[[nn.Module], float],
    *,
    shares: Sequence[float] = TENTHS,
    metric: str = "metric",
    mode: Mode = "max",
    criterion: Criterion = "l1",
    module: Parts = None,
    ignore: Modules = (),
    done: Sensitivity | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Cut every channel group by several shares, one at a time, and evaluate the model each time, without retraining.

    Cuts are the real ones, verified as in pruning and taken back: model, gradients, mode and random state are left as
    found. Each evaluation runs in eval mode, without gradients and from the same random state.

    Args:
        model: The model. Anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        evaluate: From the model to the metric. It may change the mode; it leaves the model on its device.
        shares: Fractions, in (0, 1), of a group's units that leave; rounded up to whole units, and one unit stays.
        metric: What the metric is called in files and pictures.
        mode: ``"max"`` where a higher metric is better, ``"min"`` where a lower one is.
        criterion: Name of a criterion, or a function from a weight ``(out, ...)`` to one score per filter ``(out,)``;
            higher is kept longer. It looks at weights alone.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        done: What an earlier call returned or wrote before it was stopped; groups in it are not measured again.
        path: A JSON file, written anew after each group.
        progress: Whether to show progress bars.

    Returns:
        The metric of every group at every share; and what was skipped: groups whose cut could not be verified, and
        networks that are left alone unless ``module`` names them, such as frozen ones beside what is trained.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``evaluate`` returns no number.
        PruningError: If nothing can be cut, the whole model's metric is NaN, or ``done`` answers another question.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> x = torch.ones(1, 4)
        >>> found = sensitivity(model, x, lambda net: net(x).sum(), shares=(0.25, 0.5), progress=False)
        >>> [(group.name, group.width, group.shares) for group in found.groups]
        [('0', 10, (0.3, 0.5))]

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, fig. 2 (arXiv:1608.08710).
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015 (arXiv:1506.02626).
    """
    check_arguments("sensitivity", 0.0, criterion, "filters", "layer", 1, ignore=ignore)
    check_module("sensitivity", module)
    alone = left_alone(model, listed(module))
    structure = prunable_groups(model, find_groups(model, example_inputs), ignore, part_of(model, module), alone)
    check_prunable(model, structure)
    found = begin("sensitivity", model, evaluate, shares, metric, mode, criterion, done, alone)
    scores = score_units(model, structure, criterion)
    counts = {name: _counts(structure, scores, name, found.asked) for name in structure.groups}

    def measure(name: str, advance: Callable[[], Any]) -> GroupSensitivity | str:
        return _measure(model, example_inputs, structure, scores, name, counts[name], evaluate, advance)

    return measure_each(found, {name: len(gone) for name, gone in counts.items()}, measure, path, progress)


def begin(
    where: str,
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    shares: Sequence[float],
    metric: str,
    mode: Mode,
    criterion: str | Callable[..., Any],
    done: Sensitivity | None,
    alone: Mapping[str, str],
) -> Sensitivity:
    """Measure the whole model, and take up what was done before, if it answers the question that is asked now.

    Networks that are left ``alone``, by path, are skipped, with the reason.

    Raises:
        ValueError: If shares or mode are out of range.
        PruningError: If the whole model's metric is NaN, or ``done`` answers another question.
    """
    found = Sensitivity(
        metric,
        mode,
        criterion if isinstance(criterion, str) else getattr(criterion, "__qualname__", repr(criterion)),
        _checked(where, shares, mode),
        _checksum(model),
        evaluated(model, evaluate),
    )
    if math.isnan(found.dense):
        raise PruningError(f"{where}: {metric} of the whole model is NaN; there is nothing to compare with.")
    found = found if done is None else _continued(done, found)
    skipped = {path: f"it is left alone: {reason}" for path, reason in alone.items()}
    return replace(found, skipped={**found.skipped, **skipped})


def measure_each(
    found: Sensitivity,
    counts: Mapping[str, int],
    measure: Callable[[str, Callable[[], Any]], GroupSensitivity | str],
    path: str | Path | None,
    progress: bool,
) -> Sensitivity:
    """Measure what is not in ``found`` yet, and write the file anew after each.

    Args:
        found: What is known.
        counts: Name of what is measured -> how many evaluations it takes.
        measure: From a name, and what it calls after each evaluation, to what was found, or why it was skipped.
        path: The JSON file.
        progress: Whether to show a progress bar.
    """
    known = {group.name for group in found.groups} | found.skipped.keys()
    todo = {name: count for name, count in counts.items() if name not in known}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with bar_of(*columns, shown=progress, transient=False) as bar:
        task = bar.add_task("", total=sum(todo.values()))
        for name in todo:
            bar.update(task, description=escape(name))
            measured = measure(name, partial(bar.advance, task))
            if isinstance(measured, str):
                found = replace(found, skipped={**found.skipped, name: measured})
            else:
                found = replace(found, groups=(*found.groups, measured))
            if path is not None:
                found.to_json(path)
    return found


def _checked(where: str, shares: Sequence[float], mode: Mode) -> tuple[float, ...]:
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"{where}(shares={shares!r}): give fractions that leave, each between 0 and 1.")
    if mode not in get_args(Mode):
        raise ValueError(f"{where}(mode={mode!r}): 'max' where a higher metric is better, 'min' where a lower one is.")
    return tuple(sorted(float(share) for share in set(shares)))


def _continued(done: Sensitivity, now: Sensitivity) -> Sensitivity:
    """Return what was done, if it answers the question that is asked now."""
    for what in ("metric", "mode", "criterion", "asked", "weights"):
        if (was := getattr(done, what)) != (is_now := getattr(now, what)):
            raise PruningError(
                f"sensitivity: what is done was measured with {what}={was!r}, now it is {is_now!r}. "
                "Start anew (remove the file or leave out done=), or ask as before."
            )
    if not math.isclose(done.dense, now.dense, rel_tol=1e-3, abs_tol=1e-6):
        raise PruningError(
            f"sensitivity: the whole model's {now.metric} was {done.dense:.6g} and is now {now.dense:.6g}: the "
            "data changed. Start anew (remove the file or leave out done=), or evaluate as before."
        )
    return done


def _counts(structure: Structure, scores: Scores, name: str, shares: Iterable[float]) -> list[int]:
    """Return how many units of a group leave at the shares asked for, each number once."""
    widths = {group: found.width for group, found in structure.groups.items()}
    gone = set()
    for share in shares:
        keep = select_units(
            structure, scores, {name: share}, Budget(),
            dense=Dense(widths, Footprint(0, 0)), footprint=lambda keep: Footprint(0, 0),
        )  # fmt: skip
        gone.add(int((~keep[name]).sum()))
    return sorted(gone - {0})


def _measure(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    scores: Scores,
    name: str,
    gone: Iterable[int],
    evaluate: Callable[[nn.Module], float],
    advance: Callable[[], Any],
) -> GroupSensitivity | str:
    """Cut one group by several numbers of units; return the metric each time, or why a cut could not be verified."""
    group = structure.groups[name]
    values = {}
    for count in gone:
        plan = plan_filters(model, example_inputs, structure, scores, {name: count / group.width})
        if plan.refused:
            return _reason(group, plan.structure)
        with temporarily_cut(model, plan.cut, plan.tensors):
            values[count / group.width] = evaluated(model, evaluate)
        advance()
    return GroupSensitivity(name, group.producers, group.width, tuple(values), tuple(values.values()))


def evaluated(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    """Return the metric of a model as it stands, which is left as found."""
    with undisturbed(model), _same_chance():
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate returned {type(value).__name__}; it must return the metric, one number.") from error


@contextmanager
def _same_chance() -> Iterator[None]:
    """Restore Python's and NumPy's random state; that of torch is seen to by ``undisturbed``."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _reason(group: ChannelGroup, structure: Structure) -> str:
    own = {slot.tensor for slot in group.slots}
    return [pin.reason for pin in structure.pinned if pin.tensor in own][-1]


def _checksum(model: nn.Module) -> str:
    found = 0
    for tensor in named_tensors(model).values():
        found = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), found)
    return f"{found:08x}"
