"""Prunes filters and neurons of a model in plain PyTorch: score, plan, repair, cut; knows no Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.gradients import Loss
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import (
    ExampleInputs,
    call_on,
    refuse_empty,
    refuse_shapeless,
    uncollected,
    walked_once,
)
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import each
from lightning_prune.model.sandbox import remembered_once
from lightning_prune.model.torch_modes import changes_model, ordinary
from lightning_prune.pruning.amounts import Amount, in_fractions
from lightning_prune.pruning.arguments import (
    MaxAmount,
    MinWidth,
    Modules,
    Parts,
    amount_by_group,
    budget_by_group,
    check_arguments,
    check_damping,
    check_module,
    check_optimizers,
    check_prunable,
    listed,
    optimizers_of,
    part_of,
    plain,
)
from lightning_prune.pruning.budget import Budget, Scope, Target
from lightning_prune.pruning.consumers import only_read, score_by_readers
from lightning_prune.pruning.layers import data_of, outputs_within, time_without
from lightning_prune.pruning.layers_and_filters import SplitAsk, apply_split_, check_with_layers, choose_split
from lightning_prune.pruning.left_alone import left_alone, prunable_groups, without_written
from lightning_prune.pruning.outcome import Outcome
from lightning_prune.pruning.plan import Plan, plan_filters
from lightning_prune.pruning.repair import DAMPING, repaired
from lightning_prune.pruning.report_types import Report
from lightning_prune.pruning.scoring import Criterion, adds_up, score_units
from lightning_prune.pruning.uniform import with_one_width
from lightning_prune.structure import Structure, find_structure, trace
from lightning_prune.surgery import rehearsed

_CHEAP = ("l1", "l2", "bn_scale")
"""Criteria whose scores can be computed twice."""


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
    module: Parts = None,
    ignore: Modules = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    round_to: int = 1,
    min_width: MinWidth = 1,
    max_amount: MaxAmount = 1.0,
    uniform: bool = False,
    layers: bool = False,
    repair: bool | None = None,
    damping: float = DAMPING,
    progress: bool = True,
) -> Report:
    """Remove filters and neurons from a model, in place.

    Parameters stay the same objects; their gradients and the optimizer's state follow. The cut is verified before it is
    made; channels whose cut cannot be verified are kept, and the report says so. The state dict of the pruned model
    loads into a model of the original class by :func:`~lightning_prune.load_state_dict_`.

    Args:
        model: The model. Anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        amount: Fraction, in [0, 1), of ``target`` that is pruned, relative to the dense model; or a whole number of
            units, of each layer or, with ``scope="global"``, of all; or these by pattern of module paths or by module,
            of the units that these produce. What no pattern names is kept whole.
        criterion: Name of a criterion, or a function from a weight ``(out, ...)`` to one score per filter ``(out,)``;
            higher is kept longer. Of weights: ``l1``, ``l2``, ``bn_scale``, ``random``; with ``batches``:
            ``activation_mean``, ``activation_std``, ``apoz``, ``obs`` (prunes first what its consumer layers can best
            compensate) and ``output_change``; with ``batches`` and ``loss``: ``taylor``, ``taylor_activations``,
            ``taylor_second_order``, ``obd``, ``obd_hutchinson``. Or a subclass of
            :class:`~lightning_prune.pruning.accumulators.Accumulator`.
        target: What ``amount`` is a fraction of: the prunable ``filters``, or the ``params``, ``flops`` or ``latency``
            of the whole model. Latency is that of one call on the example inputs, in eval mode, measured on this
            machine and reached within 5 % where single units weigh less.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both. Scores that are losses (``taylor``, ``taylor_second_order``,
            ``output_change``, ``obd``, ``obs``) are, for a target other than filters, divided by what the unit saves of
            it (of latency: by its multiply-adds).
        batches: Batches of data, a list or loader that can be read once. For criteria that look at activations or
            gradients, and for ``repair``.
        loss: A function of model and batch that returns the mean loss. For criteria that look at gradients; ``obs`` and
            ``repair`` run the model by it, too, if it is given.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
            Amounts, targets and limits are relative to it; what is tied to the rest is kept.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        optimizer: The optimizer or optimizers that train the model; their state follows.
        round_to: Widths are rounded up to multiples of this, in channels (heads times their width).
        min_width: Channels that are kept of every layer at least; or by pattern of module paths or by module, the
            largest that names a layer.
        max_amount: Largest fraction, in [0, 1], of any layer that is pruned; or by pattern of module paths or by
            module, the smallest that names a layer. A target of the whole model is met by other layers.
        uniform: Whether layers of a kind get one width, such as those of all blocks of a transformer, so that a config
            can express it. Where one of them is not prunable, none is.
        layers: Whether whole layers may be removed, too, towards the same ``amount`` of params, FLOPs or latency:
            0, 1, 2, 4, ... layers are tried, each with filters for the rest, and what loses least is made. Losses are
            those of ``loss`` on ``batches`` or, without them, how far outputs move. ``report.tried`` lists them.
        repair: Whether weights and biases that sum over pruned units are refitted on ``batches`` to keep their outputs;
            by default where ``criterion="obs"``. That criterion assumes it: without it, the outputs can move more than
            if units were pruned at random.
        damping: Share of its mean diagonal entry that is added to the diagonal of every Hessian. For ``obs`` and
            ``repair``.
        progress: Whether to show progress bars.

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
    check_arguments(where, amount, criterion, target, scope, round_to, min_width, max_amount, ignore)
    check_module(where, module, target)
    check_damping(where, damping, "inputs' mean variance")
    optimizers = optimizers_of(where, model, optimizer)
    check_optimizers(where, optimizers)
    asked = _Asked(
        criterion, target, scope, loss, module, ignore, round_to, min_width, max_amount, uniform, bool(repair), damping,
        progress,
    )  # fmt: skip
    if (repair or by_obs) and batches is None:
        raise ValueError(f"{where}(criterion={criterion!r}, repair={repair}): pass batches, to compensate on them.")
    if layers:
        return _with_layers(where, model, example_inputs, amount, asked, batches, optimizers)
    # What a plan holds is gone before a collection could walk through it: no name here may hold one.
    with uncollected() if batches is None else nullcontext():
        report, outcome, never_ran = _pruned(model, example_inputs, amount, asked, batches, optimizers)
    outcome.warn(where)
    if never_ran:
        warnings.warn(f"{where}: {never_ran}", stacklevel=3)  # behind this, the decorator
    if report.config:
        warnings.warn(f"{where}: {report.config}", stacklevel=3)  # behind this, the function and its decorator
    return report


@dataclass(frozen=True, eq=False)
class _Asked:
    """The arguments of :func:`prune_filters` that say what is pruned, beside the amount."""

    criterion: Criterion
    target: Target
    scope: Scope
    loss: Loss | None
    module: Parts
    ignore: Modules
    round_to: int
    min_width: MinWidth
    max_amount: MaxAmount
    uniform: bool
    repair: bool
    damping: float
    progress: bool


def _pruned(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: Amount,
    asked: _Asked,
    batches: Iterable[Any] | None,
    optimizers: list[Optimizer],
) -> tuple[Report, Outcome, str]:
    """Prune filters; return the report, what was asked and reached, and a warning about what never ran."""
    with ExitStack() as stack:
        stack.enter_context(walked_once(model))
        if batches is None and asked.criterion in _CHEAP:  # criteria of users may change what they like
            stack.enter_context(remembered_once(model))
        plan = _planned(model, example_inputs, amount, asked, batches)
        report = plan.apply_(optimizers)
        return report, plan.outcome, plan.never_ran


def _planned(
    model: nn.Module, example_inputs: ExampleInputs, amount: Amount, asked: _Asked, batches: Iterable[Any] | None
) -> Plan:
    """Score units and plan their removal; the model is not changed."""
    criterion, by_obs = asked.criterion, asked.criterion == "obs"
    part = part_of(model, asked.module)
    traced = find_structure(trace(model, example_inputs))
    named = [*(amount if isinstance(amount, Mapping) else ()), *listed(asked.module)]
    alone = without_written(model, example_inputs, left_alone(model, named))
    calibration = None
    if asked.repair or by_obs:
        assert batches is not None  # refused before
        forward = call_on if asked.loss is None else partial(outputs_within, asked.loss)
        calibration = Calibration(list(ordinary(batches)), forward)
        batches = calibration.batches
    limits = Budget(asked.target, asked.scope, asked.round_to, asked.min_width, asked.max_amount, part)

    def planned(structure: Structure, refuse: bool) -> Plan:
        structure = prunable_groups(model, structure, asked.ignore, part, alone)
        structure = with_one_width(model, structure) if asked.uniform else structure
        check_prunable(model, structure)
        if calibration is not None:
            products = find_products(model, calibration.batches[0], calibration.forward)
        if by_obs and calibration is not None:
            structure = only_read(model, structure, products)
            check_prunable(model, structure)
            scores = score_by_readers(model, structure, products, calibration, asked.damping, asked.progress)
        else:
            with each(batches or (), "batches", asked.progress and batches is not None) as seen:
                given = None if batches is None else ordinary(seen)
                scores = score_units(model, structure, criterion, given, asked.loss)
        widths = {name: group.width for name, group in structure.groups.items()}
        fractions = in_fractions(amount_by_group(model, structure, amount), widths, asked.scope, "units")
        plan = plan_filters(
            model, example_inputs, structure, scores, fractions, budget_by_group(model, structure, limits),
            adding_up=adds_up(criterion), refuse=refuse, progress=asked.progress,
        )  # fmt: skip
        if calibration is None or not asked.repair:
            return plan
        return repaired(plan, products, calibration, asked.damping, asked.progress)

    # Where scores cost little, whether every group can shrink is asked only if less can be cut than was asked.
    plan = None
    if batches is None and criterion in _CHEAP and asked.target != "latency":
        with suppress(PruningError):
            plan = planned(traced, refuse=False)
    if plan is None or plan.outcome.short:
        plan = planned(rehearsed(model, example_inputs, traced), refuse=True)
    return plan


def _with_layers(
    where: str,
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: Amount,
    asked: _Asked,
    batches: Iterable[Any] | None,
    optimizers: list[Optimizer],
) -> Report:
    """Remove layers and filters under one budget."""
    check_with_layers(where, asked.target)
    assert not isinstance(amount, Mapping) and asked.target != "filters"
    refuse_empty(example_inputs)
    refuse_shapeless(model)
    data = data_of(where, None, example_inputs, batches, asked.loss)
    by_path = {"module": plain(listed(asked.module), model) or None, "ignore": plain(list(asked.ignore), model)}
    for name in ("min_width", "max_amount"):
        by_path[name] = plain(getattr(asked, name), model)
    on_copies = replace(asked, **by_path, progress=False)

    def plan_cut(twin: nn.Module, rest: float) -> Plan:
        return _planned(twin, example_inputs, rest, on_copies, None if batches is None else data.batches)

    part, alone = part_of(model, asked.module), left_alone(model, listed(asked.module))
    calibration = Calibration(data.batches, data.forward) if asked.repair else None
    timing = None
    if asked.target == "latency":
        timing = partial(time_without, model, example_inputs, whole=False)
    ignored, damping = by_path["ignore"], asked.damping
    ask = SplitAsk(amount, asked.target, part, ignored, alone, data, calibration, damping, timing)
    split = choose_split(model, example_inputs, ask, plan_cut)
    report = apply_split_(model, example_inputs, split, ask, optimizers)
    if report.config:
        warnings.warn(f"{where}: {report.config}", stacklevel=4)  # behind this, the function and its decorator
    return report
