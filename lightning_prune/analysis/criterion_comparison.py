"""Measures what every unit is worth by silencing it, and how well criteria foretell that; changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from lightning_prune.measure.gradients import Loss
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import seen
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.pruning.accumulators import by_l2
from lightning_prune.pruning.arguments import (
    Modules,
    Parts,
    check_module,
    check_prunable,
    listed,
    part_of,
)
from lightning_prune.pruning.left_alone import left_alone, prunable_groups
from lightning_prune.pruning.scoring import CRITERIA, accumulate, accumulator_for, silenced
from lightning_prune.structure import Structure
from lightning_prune.surgery import find_groups

__all__ = ["Correlation", "compare_criteria", "correlate", "oracle"]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a criterion with the oracle.

    Attributes:
        per_layer: Mean over layers of the correlation within the layer.
        all_layers: Correlation over the units of all layers together, scores as they come.
        all_layers_l2: The same, each layer's scores divided by their l2 norm.
    """

    per_layer: float
    all_layers: float
    all_layers_l2: float


def oracle(
    model: nn.Module, structure: Structure, batches: Iterable[Any], loss: Loss, *, progress: bool = False
) -> dict[str, Tensor]:
    r"""Measure :math:`|L(\text{without the unit}) - L|` for every unit, each silenced alone.

    Costs one forward pass over the batches for every unit. The model is left as found.

    Args:
        model: The model.
        structure: Its channel groups.
        batches: Batches of data; held in memory.
        loss: From model and batch to the mean loss, weighted alike for every batch.
        progress: Whether to show a progress bar.

    Returns:
        Group name -> absolute change of the mean loss, ``(width,)``.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, sec. 2.2 (arXiv:1611.06440):
        oracle-abs.
    """
    batches = list(batches)
    changes = {}
    units = [(group, unit) for group in structure.groups.values() for unit in range(group.width)]
    with undisturbed(model):
        whole = _mean_loss(model, batches, loss)
        losses: dict[str, list[Tensor]] = {name: [] for name in structure.groups}
        for group, unit in track(units, "oracle", disable=not (progress and seen()), transient=True):
            with silenced(model, group, unit):
                losses[group.name].append(_mean_loss(model, batches, loss))
        for name, found in losses.items():
            changes[name] = (torch.stack(found) - whole).abs()
    return changes


def correlate(scores: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Correlation:
    """Compare scores with the oracle's, by rank.

    Args:
        scores: Group name -> one score per unit, as they come from the criterion.
        truth: Group name -> the oracle's, of the same widths.
    """
    names = [name for name in truth if len(truth[name]) > 1]
    layers = [_spearman(scores[name], truth[name]) for name in names]
    raw = torch.cat([scores[name].cpu().double() for name in names])
    normal = torch.cat([by_l2(scores[name].cpu().double()) for name in names])
    real = torch.cat([truth[name].cpu().double() for name in names])
    return Correlation(sum(layers) / len(layers), _spearman(raw, real), _spearman(normal, real))


@changes_model
def compare_criteria(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    criteria: Sequence[str] = tuple(CRITERIA),
    batches: Iterable[Any],
    loss: Loss,
    module: Parts = None,
    ignore: Modules = (),
    progress: bool = True,
) -> dict[str, Correlation]:
    """Find out which criterion foretells best, for this model and these data, what removing its units would do.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        criteria: Names of criteria to compare.
        batches: Batches of data, a list or loader that can be read once.
        loss: A function of model and batch that returns the mean loss.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        progress: Whether to show progress bars.

    Returns:
        Criterion -> its correlation with the oracle. Criteria that do not apply to the model are left out; a warning
        names them before the oracle runs.

    Raises:
        ValueError: If there is no criterion of a name.
        PruningError: If no batch came, or no criterion applies.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, table 1 (arXiv:1611.06440).
    """
    unknown = [name for name in criteria if name not in CRITERIA]
    if unknown:
        raise ValueError(f"compare_criteria(criteria={unknown!r}): choose of {', '.join(map(repr, CRITERIA))}.")
    check_module("compare_criteria", module)
    batches = list(batches)
    if not batches:
        raise PruningError("compare_criteria: no batch came. Pass a list or loader of at least one batch.")
    alone = left_alone(model, listed(module))
    structure = prunable_groups(model, find_groups(model, example_inputs), ignore, part_of(model, module), alone)
    check_prunable(model, structure)
    # The oracle takes longest, so what cannot be compared with it is found before.
    scores = _scores(model, structure, criteria, batches, loss, progress)
    truth = oracle(model, structure, batches, loss, progress=progress)
    return {name: correlate(found, truth) for name, found in scores.items()}


def _scores(
    model: nn.Module, structure: Structure, criteria: Sequence[str], batches: list[Any], loss: Loss, progress: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the scores of every criterion that applies to the model; warn of the others."""
    found, skipped = {}, {}
    for name in track(criteria, "criteria", disable=not (progress and seen()), transient=True):
        try:
            found[name] = accumulate(accumulator_for(name), model, structure, batches, loss)
        except (PruningError, RuntimeError) as error:  # torch raises the latter where a derivative is missing
            skipped[name] = " ".join(str(error).split())
    reasons = "; ".join(f"{name!r} ({why})" for name, why in skipped.items())
    if skipped and not found:
        raise PruningError(f"compare_criteria: no criterion can score this model: {reasons}")
    if skipped:
        warnings.warn(f"compare_criteria: skipped, as it does not apply to this model: {reasons}", stacklevel=4)
    return found


def _mean_loss(model: nn.Module, batches: list[Any], loss: Loss) -> Tensor:
    losses = []
    for batch in batches:
        with unchanged(batch):
            losses.append(loss(model, batch).detach().cpu().double())
    return torch.stack(losses).mean()


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(spearman_corrcoef(a.cpu().double(), b.cpu().double()).nan_to_num())  # nan where all scores tie
