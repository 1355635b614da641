"""Removes filters and neurons from a trained model at once and repairs what read them; knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.measure.calibration import Calibration, Run
from lightning_prune.measure.footprint import measure
from lightning_prune.measure.gradients import Loss
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import ExampleInputs, call_on
from lightning_prune.model.inference_mode import changes_model, ordinary
from lightning_prune.model.progress_bars import each
from lightning_prune.pruning.arguments import Amount, amount_by_group, check_arguments, check_prunable, with_ignored
from lightning_prune.pruning.budget import Budget, Dense, Scope, Target
from lightning_prune.pruning.consumers import only_read, score_by_readers
from lightning_prune.pruning.filters import Report, carry_out_, clock, prepare, reported
from lightning_prune.pruning.repair import Repair, repaired
from lightning_prune.pruning.scoring import Criterion, adds_up, score_units
from lightning_prune.surgery import find_groups

__all__ = ["RepairReport", "prune_filters_obs"]


@dataclass(frozen=True, eq=False)
class RepairReport:
    """What a cut with repair did.

    Attributes:
        cut: The cut.
        repairs: What was refitted, in the order in which it runs.
        skipped: By parameter name, why a weight that read units which left was not refitted.
        damping: Share of the inputs' mean variance with which weights held on to what they were.
    """

    cut: Report
    repairs: tuple[Repair, ...]
    skipped: dict[str, str]
    damping: float


@changes_model
def prune_filters_obs(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[Any],
    amount: Amount = 0.3,
    criterion: Criterion = "obs",
    target: Target = "filters",
    scope: Scope = "global",
    sequential: bool = True,
    damping: float = 0.01,
    ignore: Sequence[str] = (),
    round_to: int = 1,
    forward: Run = call_on,
    loss: Loss | None = None,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> RepairReport:
    """Remove filters and neurons from a trained model, in place, and let what read them make up for them.

    No labels and no training: every layer that loses inputs is refitted, its bias too, to give on the batches what it
    gave with them. The cut is proved before it is made, as by :func:`prune_filters`.

    Args:
        model: The model; the batches run in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs, for trace and proof.
        batches: Batches of data: a few hundred examples like those trained on.
        amount: Fraction, in [0, 1), of the target that leaves; or, by pattern of module paths, of the channels that the
            modules produce.
        criterion: ``"obs"`` removes first what its readers can best make up for, so that the model's outputs move least
            for every filter, parameter or FLOP that leaves; or any criterion of :func:`prune_filters`.
        target: What ``amount`` is a fraction of: the filters that can leave, or the whole model's parameters, FLOPs or
            latency.
        scope: ``"layer"`` takes the same share of every layer; ``"global"`` compares scores across layers.
        sequential: Refit each layer to the inputs that the slim and refitted layers before it give, which takes two
            more runs over the batches per layer; otherwise to those of the whole model.
        damping: Share of the inputs' mean variance with which weights hold on to what they were.
        ignore: Patterns of module paths whose channels stay.
        round_to: Widths after the cut, in channels (heads times their width), are multiples of this, rounded up.
        forward: Calls the model on a batch and returns its outputs; by default as on example inputs.
        loss: For criteria that look at gradients, from model and batch to the mean loss.
        dtype: What is summed and solved in.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range or missing, or a pattern names no module.
        PruningError: If the model does not run, nothing can be cut, the target cannot be reached or inputs are linearly
            dependent and not damped. The model is as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> report = prune_filters_obs(model, torch.randn(1, 4), [torch.randn(64, 4)], amount=0.3)
        >>> model[0].out_features, [repair.name for repair in report.repairs]
        (7, ['2.weight'])

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; He et al., Channel Pruning for
        Accelerating Very Deep Neural Networks, ICCV 2017 (arXiv:1707.06168), for the refit.
    """
    check_arguments("prune_filters_obs", amount, "l1" if criterion == "obs" else criterion, target, scope, round_to)
    if not damping >= 0:
        raise ValueError(f"prune_filters_obs(damping={damping!r}): a share of the mean variance, from 0; 0.01 is 1 %.")
    calibration = Calibration(list(ordinary(batches)), forward, dtype)
    structure = with_ignored(model, find_groups(model, example_inputs), ignore)
    check_prunable(model, structure)
    products = find_products(model, calibration.batches[0], forward)
    if criterion == "obs":
        structure = only_read(model, structure, products)
        check_prunable(model, structure)
        scores = score_by_readers(model, structure, products, calibration, damping, progress)
    else:
        with each(calibration.batches, "batches", progress) as seen:
            scores = score_units(model, structure, criterion, seen, loss)
    amount = amount_by_group(structure, amount)
    budget = Budget(target, scope, round_to)
    dense = Dense({name: group.width for name, group in structure.groups.items()}, measure(model, structure, {}))
    with clock(model, example_inputs, structure, progress and target == "latency") as latency:
        prepared = prepare(
            model, example_inputs, structure, scores, amount, budget, dense=dense,
            latency=latency, adding_up=criterion == "obs" or adds_up(criterion),
        )  # fmt: skip
        kept = latency(prepared.structure, prepared.keep) if target == "latency" else None
    tensors, repairs, skipped = repaired(
        model, structure, prepared.cut, prepared.tensors, products, calibration, sequential, damping, progress
    )
    carry_out_(model, prepared, tensors)
    report, outcome = reported(model, example_inputs, structure, prepared, amount, budget, dense, kept)
    outcome.warn("prune_filters_obs")
    return RepairReport(report, repairs, skipped, damping)
