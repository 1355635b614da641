"""Prunes a model in plain PyTorch: score, plan, prove, cut; knows no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.measure.flops import FlopCount, count_flops
from lightning_prune.measure.footprint import Footprint, count, measure, saved_by_one_unit
from lightning_prune.measure.gradients import Loss
from lightning_prune.measure.latency import CutDoesNotRunError, circumstances, latency_kept, shapes_of
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.model.inference_mode import changes_model, ordinary
from lightning_prune.model.progress_bars import counted, each
from lightning_prune.pruning.arguments import (
    Amount,
    MaxAmount,
    MinWidth,
    amount_by_group,
    budget_by_group,
    check_arguments,
    check_optimizers,
    check_prunable,
    with_ignored,
)
from lightning_prune.pruning.budget import Budget, Dense, Scope, Scores, Target, per_saving, plan
from lightning_prune.pruning.outcome import Outcome, kept_whole_by, outcome_of, reasons_of, told_of
from lightning_prune.pruning.scoring import Criterion, adds_up, score_units
from lightning_prune.structure import Keep, Pinned, Structure
from lightning_prune.surgery import (
    AttributeChange,
    Constant,
    Cut,
    Disproof,
    Kept,
    Proof,
    compensated,
    cut_,
    draft,
    find_groups,
    recipe_of,
    verify,
)
from lightning_prune.surgery.expected_outputs import Lefts

__all__ = [
    "GroupWidth", "Prepared", "Report", "carry_out_", "clock", "count_params", "prepare", "prune_filters", "reported",
]  # fmt: skip


class GroupWidth(NamedTuple):
    """The width of a channel group before and after a cut."""

    name: str
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class Report:
    """What a pruning did.

    Attributes:
        params_before: Parameters of the model before.
        params_after: Parameters after.
        flops_before: Multiply-adds of one forward pass on the example inputs before, as fvcore counts.
        flops_after: Multiply-adds after.
        groups: Name and widths of every channel group.
        kept: For every parameter or buffer that changed, dimension -> indices kept.
        attributes: Attributes of modules that changed.
        pinned: What stayed, and why.
        proved: Whether all of the cut was verified: in each mode that the model's code looks at, every operator that
            carries pruned channels. What turns out wrong is not pruned, but listed under ``pinned``.
        proof: What was verified, and what was not, in words.
        branching: Modules whose code goes by numbers of its input: only the path that the example inputs took was seen.
        latency_kept: Share of the latency that is left, as measured, where that was the target.
        measured: What the latency was measured on.
        asked: Share of the target that was to leave; for amounts by pattern, of the filters of all layers named.
        reached: The share of it that left. Where that is less than asked, a warning has said why.
        counted: What counted the multiply-adds, in words.
        constants: Numbers that code works out from widths, such as 1/sqrt(head width), and that changed with them.
        scaled: Parameters that were scaled so that such numbers change nothing.
    """

    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    groups: tuple[GroupWidth, ...]
    kept: Kept
    attributes: tuple[AttributeChange, ...]
    pinned: tuple[Pinned, ...]
    proved: bool
    proof: str
    branching: tuple[str, ...] = ()
    latency_kept: float | None = None
    measured: str = ""
    asked: float = 0.0
    reached: float = 0.0
    counted: str = "by fvcore"
    constants: tuple[Constant, ...] = ()
    scaled: tuple[str, ...] = ()


@changes_model
def prune_filters(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: Amount = 0.3,
    criterion: Criterion = "l1",
    target: Target = "filters",
    scope: Scope = "layer",
    ignore: Sequence[str] = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    round_to: int = 1,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    min_width: MinWidth = 1,
    max_amount: MaxAmount = 1.0,
    progress: bool = True,
) -> Report:
    """Remove filters and neurons from a model, in place.

    Parameters stay the same objects; their gradients and the optimizer's state follow. The cut is proved
    before it is made; channels whose cut cannot be proved stay, and the report says so. The state dict of what is left
    loads into a model of the original class by :func:`~lightning_prune.load_state_dict_`.

    Args:
        model: The model; anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        amount: Fraction, in [0, 1), of the target that leaves; or, by pattern of module paths, of the channels that the
            modules produce (what no pattern names stays whole).
        criterion: ``"l1"``, ``"l2"``, ``"bn_scale"`` or ``"random"``; with ``batches`` ``"activation_mean"``,
            ``"activation_std"`` or ``"apoz"``; with ``batches`` and ``loss`` ``"taylor"``, ``"taylor_activations"``,
            ``"taylor_second_order"``, ``"output_change"`` (needs no loss where the model takes batches as they are),
            ``"obd"`` or ``"obd_hutchinson"``; or a function from a weight ``(out, ...)`` to scores ``(out,)``.
        target: What ``amount`` is a fraction of: the filters that can leave, or the whole model's parameters, FLOPs or
            latency: of one call on the example inputs, in eval mode, measured on this machine and reached within 5 %
            where single units weigh less.
        scope: ``"layer"`` takes the same share of every layer; ``"global"`` compares scores across layers; those of
            ``taylor``, ``taylor_second_order``, ``output_change`` and ``obd`` are losses, and for a target other than
            filters they are divided by what the unit saves of it (of latency: by its multiply-adds).
        ignore: Patterns of module paths whose channels stay.
        optimizer: The optimizer or optimizers that train the model.
        round_to: Widths after the cut, in channels (heads times their width), are multiples of this, rounded up.
        batches: Batches of data for criteria that look at activations or gradients; a list or loader that can be read
            once.
        loss: A function of model and batch that returns the mean loss, for criteria that look at gradients.
        min_width: Channels that stay of every layer at least; or by pattern of module paths, the largest that names a
            layer.
        max_amount: Largest fraction, in [0, 1], of any layer that may leave; or by pattern of module paths, the
            smallest that names a layer. Budgets of the whole model are made up for by other layers.
        progress: Whether to show progress bars: of the batches, and of measuring where latency is the target.

    Raises:
        ValueError: If an argument is out of range or missing, or a pattern names no module.
        PruningError: If the model does not run, nothing can be cut or the target cannot be reached. The model is as it
            was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> report = prune_filters(model, torch.randn(1, 4), amount=0.3)
        >>> model[0].out_features, report.params_before, report.params_after
        (7, 72, 51)

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (arXiv:1608.08710).
    """
    check_arguments("prune_filters", amount, criterion, target, scope, round_to, min_width, max_amount)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    check_optimizers("prune_filters", optimizers)
    structure = with_ignored(model, find_groups(model, example_inputs), ignore)
    check_prunable(model, structure)
    counted = count(model, example_inputs, structure)
    dense = Dense(
        {name: group.width for name, group in structure.groups.items()},
        Footprint(count_params(model), counted.total),
    )
    amount = amount_by_group(structure, amount)
    budget = budget_by_group(structure, Budget(target, scope, round_to, min_width, max_amount))
    with each(batches or (), "batches", progress and batches is not None) as seen:
        scores = score_units(model, structure, criterion, None if batches is None else ordinary(seen), loss)
    with clock(model, example_inputs, structure, progress and target == "latency") as latency:
        prepared = prepare(
            model,
            example_inputs,
            structure,
            scores,
            amount,
            budget,
            dense=dense,
            flops=dense.footprint.flops,
            latency=latency,
            adding_up=adds_up(criterion),
        )
        kept = latency(prepared.structure, prepared.keep) if target == "latency" else None
    carry_out_(model, prepared, prepared.tensors, optimizers)
    report, outcome = reported(model, example_inputs, structure, prepared, amount, budget, dense, counted, kept)
    outcome.warn("prune_filters")
    return report


@dataclass(frozen=True, eq=False)
class Prepared:
    """A cut that was planned and proved, and not yet made.

    Attributes:
        cut: What it changes.
        tensors: The slim values of everything it changes.
        structure: The structure it was planned on, without the groups that were refused.
        keep: For every group which units stay.
        refused: Groups that stay whole because their cut could not be proved; the reason stands under
            ``structure.pinned``.
        widths: Every group that can be cut, before and after.
        proof: What was verified of the cut.
    """

    cut: Cut
    tensors: dict[str, Tensor]
    structure: Structure
    keep: Keep
    refused: tuple[str, ...]
    widths: tuple[GroupWidth, ...]
    proof: Proof


def prepare(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    scores: Scores,
    amount: Amount,
    budget: Budget,
    *,
    dense: Dense,
    flops: int,
    latency: Callable[[Structure, Keep], float] | None = None,
    at_most: int | None = None,
    adding_up: bool = False,
) -> Prepared:
    """Plan a cut that reaches the amount and prove it; groups whose cut cannot be proved stay whole.

    The model is not changed. To make the cut, pass ``cut`` and ``tensors`` to :func:`~lightning_prune.surgery.cut_`.

    Args:
        model: The model that ``structure`` was traced from.
        example_inputs: What the proof runs on.
        structure: Its channel groups.
        scores: One score per unit of every group.
        amount: Fraction of what ``dense`` says was there, or one fraction per group.
        budget: What ``amount`` is a fraction of, and what every group keeps.
        dense: What was there at the start.
        flops: Multiply-adds of the model as it stands, as counted.
        latency: Measures the share of the latency at the start that a choice leaves.
        at_most: Units that may be gone after the cut, of all that were there at the start, though more were asked for.
        adding_up: Whether scores are losses that add up over units, so that a budget for the whole model takes first
            those that lose least for what they save.

    Raises:
        PruningError: If the amount cannot be reached.
    """
    uncounted = flops - structure.flops({})  # what only the counter knows of, taken as fixed
    refused: list[str] = []
    first = structure
    while True:
        stopped: CutDoesNotRunError | None = None
        footprint = partial(measure, model, structure, uncounted=uncounted)
        priced = adding_up and budget.scope == "global"
        try:
            keep = plan(
                structure, per_saving(scores, saved_by_one_unit(model, structure), budget.target) if priced else scores,
                amount, budget, dense=dense.without(refused), footprint=footprint,
                latency=None if latency is None else partial(latency, structure), at_most=at_most,
            )  # fmt: skip
        except CutDoesNotRunError as error:
            keep, stopped = error.keep, error
        except PruningError as error:
            raise PruningError(f"{error}{told_of(reasons_of(first, structure))}") from None
        cut = draft(model, structure, keep)
        tensors = cache(partial(cut.tensors, model))
        proof = verify(model, structure, cut, tensors) if cut.keep else Proof(0, 0)
        if isinstance(proof, Proof):
            if stopped is not None:
                raise PruningError(f"The latency of {type(model).__name__} cannot be measured: {stopped.__cause__}.")
            break
        whole = list(structure.groups)
        structure = structure.without_each(_at_fault(model, structure, keep, proof))
        refused += [name for name in whole if name not in structure.groups]
    if proof.constants:
        cut, proof = compensated(model, structure, cut, proof)
        tensors = cache(partial(cut.tensors, model))
    widths = tuple(GroupWidth(name, group.width, int(keep[name].sum())) for name, group in structure.groups.items())
    return Prepared(cut, tensors(), structure, keep, tuple(refused), widths, proof)


@contextmanager
def clock(
    model: nn.Module, example_inputs: ExampleInputs, structure: Structure, shown: bool
) -> Iterator[Callable[[Structure, Keep], float]]:
    """Yield what measures the share of the latency that a choice leaves, and show, if asked to, how often it did."""
    whole = shapes_of(model, structure)
    with counted("latency", None, shown) as advance:

        def measured(structure: Structure, keep: Keep) -> float:
            share = latency_kept(model, example_inputs, structure, keep, whole)
            advance(f"{share:.0%}")
            return share

        yield measured


def carry_out_(
    model: nn.Module, made: Prepared, tensors: dict[str, Tensor], optimizers: Iterable[Optimizer] = ()
) -> None:
    """Make a cut that was prepared, and let the model's state dicts tell of it from then on."""
    if not made.cut.kept:
        return
    # Noted before the cut, so that nothing that can be interrupted follows it.
    recipe_of(model).note((attribute.module, attribute.name) for attribute in made.structure.ledger.attributes)
    cut_(model, made.cut, tensors, optimizers)


def reported(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    made: Prepared,
    amount: Amount,
    budget: Budget,
    dense: Dense,
    counted: FlopCount,
    latency_kept: float | None,
) -> tuple[Report, Outcome]:
    """Report a cut that has been made, and set it against what was asked. Nothing in it fails: the model is cut.

    Args:
        model: The slim model.
        example_inputs: What it runs on.
        structure: The structure before any group was refused.
        made: The cut.
        amount: What was asked, a fraction or fractions by group name.
        budget: What it is a fraction of, and the limits.
        dense: What was there before.
        counted: What was counted before.
        latency_kept: Share of the latency that is left, where that was the target.
    """
    flops, by = _flops_after(model, example_inputs, made, counted)
    now = Footprint(count_params(model), flops)
    widths = {width.name: width.after for width in made.widths}
    left = dense.without(name for name in dense.widths if name not in made.structure.groups)
    why = {**kept_whole_by(made.structure, budget, left, widths), **reasons_of(structure, made.structure)}
    outcome = outcome_of(amount, budget.target, dense, widths, now, latency_kept, why)
    return Report(
        params_before=dense.footprint.params,
        params_after=now.params,
        flops_before=dense.footprint.flops,
        flops_after=now.flops,
        groups=made.widths,
        kept=made.cut.kept,
        attributes=made.cut.attributes,
        pinned=tuple(made.structure.pinned),
        proved=not made.structure.ledger.untrained and not made.proof.unseen,
        proof=_words(made),
        branching=made.structure.branching,
        latency_kept=latency_kept,
        measured="" if latency_kept is None else circumstances(model, example_inputs),
        asked=outcome.asked,
        reached=outcome.reached,
        counted=by,
        constants=made.proof.constants,
        scaled=made.proof.scaled,
    ), outcome


def _flops_after(model: nn.Module, example_inputs: ExampleInputs, made: Prepared, before: FlopCount) -> tuple[int, str]:
    """Count the slim model as the whole one was counted; what the plan predicted stands in where that fails."""
    predicted = before.total - made.structure.flops({}) + made.structure.flops(made.keep)
    if before.counted != FlopCount.counted:
        return predicted, before.counted
    try:
        return count_flops(model, example_inputs).total, before.counted
    except Exception as error:  # the cut is made and proved, so a count that fails must not say otherwise
        return predicted, f"{before.counted} before the cut, and after it as planned, since the count failed: {error!r}"


def count_params(model: nn.Module) -> int:
    """Count the parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _at_fault(model: nn.Module, structure: Structure, keep: Keep, failure: Disproof) -> dict[str, str]:
    """Return the groups that must stay whole so that the cut of the others can be verified, with the reason.

    Blocks of a network that repeat fail alike: groups at the same place in modules of the same class are judged
    together.
    """
    groups = set(failure.groups)
    if failure.kind is not None:
        lefts = Lefts(structure, keep)
        for ran in structure.ledger.ran:
            if ran.kind == failure.kind:
                groups |= lefts.groups(*ran.taken, *ran.made)
    if groups:
        return dict.fromkeys(sorted(groups), failure.reason)
    return _culprits(model, structure, keep)


def _culprits(model: nn.Module, structure: Structure, keep: Keep) -> dict[str, str]:
    """Halve the groups that are cut until those are found that cannot be, beside the others that can."""
    reasons: dict[str, str] = {}

    def search(links: list[tuple[str, ...]], accepted: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        cut = draft(model, structure, {name: keep[name] for link in accepted + links for name in link})
        failure = verify(model, structure, cut, cache(partial(cut.tensors, model)))
        if isinstance(failure, Proof):
            return links
        if len(links) == 1:
            reasons.update(dict.fromkeys(links[0], failure.reason))
            return []
        half = len(links) // 2
        left = search(links[:half], accepted)
        return left + search(links[half:], accepted + left)

    linked = [link for link in structure.links if not keep[link[0]].all()]
    single = [(name,) for name, stays in keep.items() if not stays.all() and not any(name in link for link in linked)]
    search([*single, *linked], [])
    return reasons


def _words(prepared: Prepared) -> str:
    """Say what was verified."""
    if not prepared.cut.keep:
        return "nothing was cut"
    proof = prepared.proof
    told = f"{len(prepared.cut.keep)} groups cut; {proof.operators} operators ran, {proof.compared} outputs compared"
    told += f" on {proof.values}"
    if proof.skipped:
        some = ", ".join([f"{what} ({times})" for what, times in list(proof.skipped.items())[:3]])
        told += f"; not compared: {some}" + (", ..." if len(proof.skipped) > 3 else "")
    if proof.scaled:
        told += f"; scaled to compensate numbers made from widths: {', '.join(proof.scaled[:3])}"
        told += ", ..." if len(proof.scaled) > 3 else ""
    if proof.constants:
        told += f"; numbers made from widths change: {'; '.join(map(str, proof.constants[:3]))}"
        told += "; ..." if len(proof.constants) > 3 else ""
    if prepared.structure.ledger.untrained:
        told += f"; train mode does not run on the example inputs ({prepared.structure.ledger.untrained})"
    return told
