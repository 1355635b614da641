"""Removes whole layers of a model in plain PyTorch: score, verify, remove, repair; knows no Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import median
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.measure.calibration import Calibration, Run
from lightning_prune.measure.expansions import outputs_of
from lightning_prune.measure.footprint import Part, count
from lightning_prune.measure.gradients import Loss
from lightning_prune.measure.latency import Turn, circumstances, rounds
from lightning_prune.model.calls import ExampleInputs, call_on, modules_of, refuse_empty, refuse_shapeless, run
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.model.torch_modes import changes_model, ordinary
from lightning_prune.pruning.amounts import check_amount, check_count, fraction_of, is_count
from lightning_prune.pruning.arguments import (
    Modules,
    Parts,
    check_choice,
    check_damping,
    check_ignored,
    check_list,
    check_module,
    check_optimizers,
    listed,
    names_module,
    optimizers_of,
    part_of,
)
from lightning_prune.pruning.layer_plan import LayerBudget, LayerCosts, LayerPlan, LayerTarget, Skips, plan_layers
from lightning_prune.pruning.layer_repair import LayerRepair, repaired_layers
from lightning_prune.pruning.layer_scores import LAYER_CRITERIA, LayerCriterion, LayerData
from lightning_prune.pruning.left_alone import left_alone, network_of
from lightning_prune.pruning.repair import DAMPING
from lightning_prune.pruning.report_types import LayerReport
from lightning_prune.structure import named_tensors
from lightning_prune.structure.skippable import Depth, find_skippable, is_inside, outermost_of
from lightning_prune.surgery.remove_layers import close_gaps_, remove_layers_
from lightning_prune.surgery.resize import all_or_nothing
from lightning_prune.surgery.skipped import removed_layers, temporarily_skipped, temporarily_whole

__all__ = [
    "apply_layers_", "check_layer_arguments", "data_of", "ignored_layers", "outputs_within", "prunable_layers",
    "prune_layers", "time_without",
]  # fmt: skip

_IGNORED = "named in ignore="


@changes_model
def prune_layers(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: int | float = 0.3,
    *,
    criterion: LayerCriterion = "influence",
    target: LayerTarget = "layers",
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    module: Parts = None,
    ignore: Modules = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    min_layers: int = 1,
    repair: bool = False,
    damping: float = DAMPING,
    progress: bool = True,
) -> LayerReport:
    """Remove whole layers from a model, in place: blocks, or only the attention or feed-forward part of some.

    A layer can be removed where its input has the shape of its output, or where its output is only added to something
    else; nothing need be said about the model. In its place stands a module without weights that returns what the layer
    was given, so that all other names stay. Every removal is verified before it is made. Layers leave one by one, each
    scored without those before it. The state dict of the pruned model loads into a model of the original class by
    :func:`~lightning_prune.load_state_dict_`.

    Args:
        model: The model. Anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        amount: Fraction, in [0, 1), of ``target`` that is pruned, relative to the dense model; or a whole number of
            layers.
        criterion: Name of a criterion, or a function from the input and the output of a layer to a single number;
            higher is kept longer. ``influence`` (how little the layer turns what passes through it); with ``loss``:
            ``taylor`` and ``taylor_second_order`` (the estimated change of the loss), ``loss`` (the change itself, by
            one run for each layer); ``output_change`` (how far the model's outputs move, by one run for each layer).
        target: What ``amount`` is a fraction of: the removable ``layers``, or the ``params``, ``flops`` or ``latency``
            of the whole model. For a target other than layers, scores are divided by what the layer saves of it (of
            latency: by its multiply-adds).
        batches: Batches of data, a list or loader that can be read once. By default the example inputs.
        loss: A function of model and batch that returns the mean loss. For criteria that look at it; the others run the
            model by it, too, if it is given.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
            Amounts and targets are relative to it.
        ignore: Patterns of module paths, or modules, that are not removed, nor anything inside of them.
        optimizer: The optimizer or optimizers that train the model; their state follows. Parameters that were removed
            leave their groups.
        min_layers: Layers that are kept at least, those named in ``ignore`` among them.
        repair: Whether weights and biases behind removed layers are refitted on ``batches`` to keep their outputs; the
            last weight of a residual branch compensates for what the layers before it no longer add.
        damping: Share of its mean diagonal entry that is added to the diagonal of every Hessian. For ``repair``.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range or missing, or a pattern names no module.
        PruningError: If the model does not run or no layer can be removed. The model is as it was.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.out(self.hidden(x).relu())
        >>> model = nn.Sequential(nn.Linear(3, 4), Block(), Block(), Block(), nn.Linear(4, 2))
        >>> report = prune_layers(model, torch.randn(8, 3), amount=0.5)
        >>> len(report.removed), report.params_before, report.params_after, report.proved
        (2, 254, 102, True)

    References:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv:2403.03853), for
        "influence"; Kim et al., Shortened LLaMA: Depth Pruning for Large Language Models (arXiv:2402.02834).
    """
    where = "prune_layers"
    check_layer_arguments(where, amount, criterion, target, min_layers, ignore)
    check_module(where, module, target)
    check_damping(where, damping, "inputs' mean variance")
    if repair and batches is None:
        raise ValueError(f"{where}(repair=True): pass batches, to compensate on them.")
    optimizers = optimizers_of(where, model, optimizer)
    check_optimizers(where, optimizers)
    refuse_empty(example_inputs)
    refuse_shapeless(model)
    part = part_of(model, module)
    depth = prunable_layers(model, example_inputs, part, ignore, left_alone(model, listed(module)))
    data = data_of(where, criterion, example_inputs, batches, loss)
    flops = count(model, example_inputs)
    costs = LayerCosts.of(model, depth, flops, part)
    amount = fraction_of(amount, int(costs.whole("layers")), "layers")
    budget = LayerBudget(amount, target, max(0, min_layers - ignored_layers(depth)))
    budget.check_reach(where, depth, costs)
    timing = partial(time_without, model, example_inputs) if target == "latency" else None
    plan = plan_layers(model, example_inputs, depth, costs, budget, criterion, data, timing=timing)
    fixed = LayerRepair({}, (), {})
    if repair and plan.removed:
        fixed = repaired_layers(model, plan.skips, Calibration(data.batches, data.forward), damping, progress)
    apply_layers_(model, plan, fixed, optimizers)
    config = close_gaps_(model, example_inputs)
    if config and plan.removed:
        warnings.warn(f"{where}: {config}", stacklevel=3)  # behind this, its decorator
    after = count(model, example_inputs)
    if plan.short:
        warnings.warn(f"{where}: {plan.short}", stacklevel=3)  # behind this, its decorator
    return LayerReport(
        params_before=costs.params, params_after=part.params(model),
        flops_before=costs.flops, flops_after=part.counted(after), removed=plan.removed,
        kept=tuple(path for path in depth.layers if not _went(path, plan)),
        pinned={**depth.others, **plan.refused},
        proved=not plan.proof.skipped,
        proof=_in_words(plan),
        latency_kept=plan.latency_kept,
        measured=circumstances(model, example_inputs),
        asked=amount, reached=plan.reached, counted=after.counted,
        repairs=fixed.repairs, skipped=fixed.skipped, config=config,
    )  # fmt: skip


def apply_layers_(model: nn.Module, plan: LayerPlan, repair: LayerRepair, optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove the layers of a plan, and write what was refitted; interrupted, nothing changes."""
    optimizers = list(optimizers)
    with all_or_nothing(model, optimizers) as undo:
        own = named_tensors(model)
        undo.copy_values([own[name] for name in repair.tensors])
        remove_layers_(model, plan.skips, optimizers)
        own = named_tensors(model)
        with torch.no_grad():
            for name, value in repair.tensors.items():
                own[name].copy_(value)


def check_layer_arguments(
    where: str, amount: Any, criterion: LayerCriterion, target: str, min_layers: int, ignore: Modules
) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.
    """
    if isinstance(amount, Mapping):
        raise TypeError(
            f"{where}(amount={amount!r}): it is a fraction or a whole number of layers. Keep layers by ignore=."
        )
    check_amount(where, amount)
    if is_count(amount) and target != "layers":
        raise ValueError(
            f"{where}(amount={amount!r}, target={target!r}): a whole number counts layers. Write a fraction of the "
            f"{target}, or use target='layers'."
        )
    check_choice(where, "target", target, get_args(LayerTarget))
    if not callable(criterion):
        check_choice(where, "criterion", criterion, LAYER_CRITERIA)
    check_count(where, "min_layers", min_layers, 1, "layers that are kept")
    check_list(where, "ignore", ignore)


def prunable_layers(
    model: nn.Module, example_inputs: ExampleInputs, part: Part, ignore: Modules, alone: Mapping[str, str]
) -> Depth:
    """Return the layers that may be removed: within the part, not ignored, not of networks left alone.

    Raises:
        ValueError: If a pattern names no module.
        PruningError: If the model does not run, or no layer can be removed.
    """
    patterns = check_ignored(model, ignore)
    try:
        depth = find_skippable(model, example_inputs)
    except PruningError:
        raise
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs ({type(error).__name__}: {error})."
        ) from error
    why: dict[str, str] = {}
    for path in depth.layers:
        if not part.holds(path) or path in part.inside:
            why[path] = "it is outside of module="
        if any(names_module(pattern, path) for pattern in patterns):
            why[path] = _IGNORED
        network = network_of(path, alone)
        if network:
            why[path] = f"{network} is left alone: {alone[network]}"
    # A layer of which a part is to stay cannot leave either.
    named = [path for path, _ in modules_of(model) if any(names_module(pattern, path) for pattern in patterns)]
    for path in depth.layers:
        inside = next((part for part in named if part.startswith(f"{path}.")), None)
        if inside is not None and path not in why:
            why[path] = f"{inside} inside of it is named in ignore="
    depth = depth.without(why)
    if not depth.layers:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(depth.others.items())[:5])
        raise PruningError(f"No layer of {type(model).__name__} can be removed ({reasons}).")
    return depth


def ignored_layers(depth: Depth) -> int:
    """Return how many layers ``ignore`` keeps, those inside of others not counted."""
    return len(outermost_of(path for path, reason in depth.others.items() if reason == _IGNORED))


def time_without(model: nn.Module, example_inputs: ExampleInputs, skips: Skips, whole: bool = True) -> float:
    """Return the latency of a model without some layers, as a share of what it has with all of them, or now.

    Both run here and now in turns; see :func:`~lightning_prune.measure.latency.latency_kept`.
    """
    if not skips and not (whole and removed_layers(model)):
        return 1.0
    slim: Any = partial(temporarily_skipped, model, skips)
    dense: Any = partial(temporarily_whole, model, None if whole else ())
    with undisturbed(model, example_inputs, copied=True):
        turns = [Turn(model, example_inputs, shape) for shape in (dense, slim)]
        return median([without / whole for whole, without in rounds(turns)])


def data_of(
    where: str,
    criterion: LayerCriterion | None,
    example_inputs: ExampleInputs,
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> LayerData:
    """Return the batches on which layers are scored, by default the example inputs.

    Raises:
        ValueError: If the criterion needs batches and a loss that were not given.
    """
    if criterion in ("taylor", "taylor_second_order", "loss") and (batches is None or loss is None):
        raise ValueError(f"{where}(criterion={criterion!r}): pass batches and loss=, which it is scored by.")
    if batches is None:
        return LayerData([example_inputs], run, loss)
    forward: Run = call_on if loss is None else partial(outputs_within, loss)
    return LayerData(list(ordinary(batches)), forward, loss)


def outputs_within(loss: Loss, model: nn.Module, batch: Any) -> Any:
    """Return what a model returns within its loss: batches may hold labels beside its inputs."""
    with outputs_of(model) as seen:
        loss(model, batch)
    return tuple(seen)


def _went(path: str, plan: LayerPlan) -> bool:
    return path in plan.skips or is_inside(path, plan.skips)


def _in_words(plan: LayerPlan) -> str:
    if not plan.removed:
        return "nothing was removed"
    proof = plan.proof
    compared = f"{proof.compared} outputs of {proof.operators} operators compared in {' and '.join(proof.modes)} mode"
    return "; ".join([compared, *proof.skipped])
