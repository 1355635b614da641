"""Prunes filters and neurons of a model in plain PyTorch: score, plan, repair, cut; knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.measure.calibration import Calibration, Run
from lightning_prune.measure.footprint import count
from lightning_prune.measure.gradients import Loss
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import ExampleInputs, call_on
from lightning_prune.model.inference_mode import changes_model, ordinary
from lightning_prune.model.progress_bars import each
from lightning_prune.pruning.arguments import (
    Amount,
    MaxAmount,
    MinWidth,
    amount_by_group,
    budget_by_group,
    check_arguments,
    check_damping,
    check_optimizers,
    check_prunable,
    with_ignored,
)
from lightning_prune.pruning.budget import Budget, Scope, Target
from lightning_prune.pruning.consumers import only_read, score_by_readers
from lightning_prune.pruning.plan import plan_filters
from lightning_prune.pruning.repair import DAMPING, repaired
from lightning_prune.pruning.report import Report
from lightning_prune.pruning.scoring import Criterion, adds_up, score_units
from lightning_prune.surgery import find_groups

__all__ = ["prune_filters"]


@changes_model
def prune_filters(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: Amount = 0.3,
    *,
    criterion: Criterion = "l1",
    target: Target = "filters",
    scope: Scope = "layer",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    ignore: Sequence[str] = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    round_to: int = 1,
    min_width: MinWidth = 1,
    max_amount: MaxAmount = 1.0,
    repair: bool | None = None,
    damping: float = DAMPING,
    forward: Run = call_on,
    progress: bool = True,
) -> Report:
    """Remove filters and neurons from a model, in place.

    Parameters stay the same objects; their gradients and the optimizer's state follow. The cut is verified before it is
    made; channels whose cut cannot be verified are kept, and the report says so. The state dict of the pruned model
    loads into a model of the original class by :func:`~lightning_prune.load_state_dict_`.

    Args:
        model: The model; anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        amount: Fraction, in [0, 1), of the target that leaves; or, by pattern of module paths, of the channels that the
            modules produce (what no pattern names stays whole).
        criterion: ``"l1"``, ``"l2"``, ``"bn_scale"`` or ``"random"``; with ``batches`` ``"activation_mean"``,
            ``"activation_std"``, ``"apoz"`` or ``"obs"`` (prunes first what its consumer layers can best compensate);
            with ``batches`` and ``loss`` ``"taylor"``, ``"taylor_activations"``, ``"taylor_second_order"``,
            ``"output_change"`` (needs no loss where the model takes batches as they are), ``"obd"`` or
            ``"obd_hutchinson"``; or a function from a weight ``(out, ...)`` to scores ``(out,)``.
        target: What ``amount`` is a fraction of: the filters that can leave, or the whole model's parameters, FLOPs or
            latency: of one call on the example inputs, in eval mode, measured on this machine and reached within 5 %
            where single units weigh less.
        scope: ``"layer"`` takes the same share of every layer; ``"global"`` compares scores across layers; those of
            ``taylor``, ``taylor_second_order``, ``output_change``, ``obd`` and ``obs`` are losses, and for a target
            other than filters they are divided by what the unit saves of it (of latency: by its multiply-adds).
        batches: Batches of data, for criteria that look at activations or gradients and for ``repair``: a list or
            loader that can be read once.
        loss: A function of model and batch that returns the mean loss, for criteria that look at gradients.
        ignore: Patterns of module paths whose channels stay.
        optimizer: The optimizer or optimizers that train the model.
        round_to: Widths after the cut, in channels (heads times their width), are multiples of this, rounded up.
        min_width: Channels that stay of every layer at least; or by pattern of module paths, the largest that names a
            layer.
        max_amount: Largest fraction, in [0, 1], of any layer that may leave; or by pattern of module paths, the
            smallest that names a layer. Budgets of the whole model are made up for by other layers.
        repair: Whether weights and biases that sum over pruned units are refitted to give on ``batches`` the outputs
            that they gave with them. By default where ``criterion="obs"``, which assumes it: without it, "obs" prunes
            worse than "random" can.
        damping: With ``repair`` or ``"obs"``: share of the inputs' mean variance with which weights hold on to what
            they were.
        forward: With ``repair`` or ``"obs"``: calls the model on a batch and returns its outputs; by default as on
            example inputs.
        progress: Whether to show progress bars: of the batches, and of measuring where latency is the target.

    Raises:
        ValueError: If an argument is out of range or missing, or a pattern names no module.
        PruningError: If the model does not run, nothing can be pruned, the target cannot be reached or inputs are
            linearly dependent and not damped. The model is as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> report = prune_filters(model, torch.randn(1, 4), amount=0.3)
        >>> model[0].out_features, report.params_before, report.params_after
        (7, 72, 51)
        >>> report = prune_filters(model, torch.randn(1, 4), 0.5, batches=[torch.randn(64, 4)], repair=True)
        >>> model[0].out_features, [repair.name for repair in report.repairs]
        (3, ['2.weight'])

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv:1608.08710); Hassibi and Stork, Second Order
        Derivatives for Network Pruning, NIPS 1992, for "obs"; He et al., Channel Pruning for Accelerating Very Deep
        Neural Networks, ICCV 2017 (arXiv:1707.06168), for the repair.
    """
    where = "prune_filters"
    by_obs = criterion == "obs"
    repair = by_obs if repair is None else repair
    check_arguments(where, amount, "l1" if by_obs else criterion, target, scope, round_to, min_width, max_amount)
    check_damping(where, damping, "inputs' mean variance")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    check_optimizers(where, optimizers)
    structure = with_ignored(model, find_groups(model, example_inputs), ignore)
    check_prunable(model, structure)
    flops = count(model, example_inputs, structure)
    if repair or by_obs:
        if batches is None:
            raise ValueError(f"{where}(criterion={criterion!r}, repair={repair}): pass batches, to compensate on them.")
        calibration = Calibration(list(ordinary(batches)), forward)
        batches = calibration.batches
        products = find_products(model, calibration.batches[0], forward)
    if by_obs:
        structure = only_read(model, structure, products)
        check_prunable(model, structure)
        scores = score_by_readers(model, structure, products, calibration, damping, progress)
    else:
        with each(batches or (), "batches", progress and batches is not None) as seen:
            scores = score_units(model, structure, criterion, None if batches is None else ordinary(seen), loss)
    plan = plan_filters(
        model,
        example_inputs,
        structure,
        scores,
        amount_by_group(structure, amount),
        budget_by_group(structure, Budget(target, scope, round_to, min_width, max_amount)),
        flops=flops,
        adding_up=by_obs or adds_up(criterion),
        progress=progress,
    )
    if repair:
        plan = repaired(plan, products, calibration, damping, progress)
    report = plan.apply_(optimizers)
    plan.outcome.warn(where)
    return report
