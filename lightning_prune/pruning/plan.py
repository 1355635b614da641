"""The one way from scores to a slim model: select units, verify the cut, make it; computes no scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.measure.flops import BY_TRACE
from lightning_prune.measure.footprint import Footprint, measure, saved_by_one_unit
from lightning_prune.measure.latency import CutDoesNotRunError, circumstances, latency_kept, shapes_of
from lightning_prune.model.calls import ExampleInputs, modules_of
from lightning_prune.model.errors import OutOfReachError, PruningError
from lightning_prune.model.progress_bars import counted
from lightning_prune.model.sandbox import remembered_once
from lightning_prune.pruning.amounts import Amount
from lightning_prune.pruning.at_fault import groups_at_fault
from lightning_prune.pruning.budget import Budget, Dense, Scores, per_saving, select_units
from lightning_prune.pruning.outcome import Outcome, kept_whole_by, outcome_of, reasons_in_words, reasons_of
from lightning_prune.pruning.report_types import GroupWidth, Repair, Report
from lightning_prune.structure import Keep, Structure
from lightning_prune.surgery import (
    AttributeChange,
    Cut,
    Proof,
    SlimValues,
    compensated,
    cut_,
    draft,
    follow_configs,
    follow_timm,
    held_number,
    recipe_of,
    verify,
)

__all__ = ["Latency", "Plan", "RefusedError", "count_params", "plan_filters"]

Latency = Callable[[Structure, Keep], float]
"""Measures the share of the dense model's latency that a choice of units keeps."""


class RefusedError(PruningError):
    """A cut that could not be verified, where none was to be refused."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A cut that is verified and not yet made.

    Attributes:
        model: The model, as it stands until :meth:`apply_`.
        example_inputs: What it was traced on.
        amount: What was asked for, relative to ``dense``.
        budget: What ``amount`` is a fraction of, and the limits of each layer.
        dense: The model that amounts are relative to.
        structure: Its channel groups, without those that were refused.
        keep: For every group which units are kept.
        cut: What changes in the model.
        tensors: The slim values of everything that changes.
        refused: Group name -> why its cut could not be verified. It is kept whole.
        widths: Every group that can be pruned, before and after.
        proof: What was verified of the cut.
        latency_kept: Share of the latency that is left, as measured, where that is the target.
        outcome: What was asked and what the cut will reach, as predicted.
        footprint: What the model, or the part of it that is counted, will cost, as predicted.
        repairs: Weights that were refitted.
        skipped: By name, why a weight that sums over pruned units was not refitted.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    amount: Amount
    budget: Budget
    dense: Dense
    structure: Structure
    keep: Keep
    cut: Cut
    tensors: dict[str, Tensor]
    refused: Mapping[str, str]
    widths: tuple[GroupWidth, ...]
    proof: Proof
    latency_kept: float | None
    outcome: Outcome
    footprint: Footprint
    repairs: tuple[Repair, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> float:
        """Share of the target that is to be removed."""
        return self.outcome.asked

    @property
    def reached(self) -> float:
        """Share of the target that the cut will have removed, as predicted."""
        return self.outcome.reached

    @property
    def never_ran(self) -> str:
        """A warning where parameters that never ran may read pruned channels; else empty."""
        readers = _idle_readers(self)
        if not readers:
            return ""
        return (
            f"{_first_three(readers)} never ran on the example inputs and keep their shapes. If they read pruned "
            "channels, they fail when they first run. Pass example_inputs that run them, or name the layers that they "
            "read in ignore."
        )

    def apply_(self, optimizers: Iterable[Optimizer] = ()) -> Report:
        """Make the cut and report what it reached; FLOPs before and after come from the trace.

        Args:
            optimizers: The optimizers that train the model; their state follows.

        Raises:
            PruningError: If an optimizer's state does not fit its parameters. Nothing is written then.
        """
        part = self.budget.part
        params_before = part.params(self.model)
        attributes, inexpressible = self.write_(optimizers)
        params = part.params(self.model)
        now, outcome = self.footprint, self.outcome
        if params != now.params:  # other than predicted
            now = Footprint(params, now.flops)
            outcome = _outcome(self, now)
        return Report(
            params_before=params_before,
            params_after=now.params,
            flops_before=part.flops(self.structure, {}),
            flops_after=now.flops,
            groups=self.widths,
            kept=self.cut.kept,
            attributes=attributes,
            pinned=tuple(self.structure.pinned),
            proved=not self.structure.ledger.untrained and not self.proof.unseen,
            proof=_in_words(self),
            branching=self.structure.branching,
            latency_kept=self.latency_kept,
            measured="" if self.latency_kept is None else circumstances(self.model, self.example_inputs),
            asked=outcome.asked,
            reached=outcome.reached,
            counted=BY_TRACE,
            constants=self.proof.constants,
            scaled=self.proof.scaled,
            repairs=self.repairs,
            skipped=self.skipped,
            config=inexpressible,
        )

    def write_(self, optimizers: Iterable[Optimizer] = ()) -> tuple[tuple[AttributeChange, ...], str]:
        """Make the cut, without a report; weight masks, configs and the metadata in state dicts follow.

        Returns:
            The attributes of modules that changed; and why a config cannot express the pruned model, in words.

        Raises:
            PruningError: If an optimizer's state does not fit its parameters. Nothing is written then.
        """
        if not self.cut.kept:
            return (), ""
        read = {(attribute.module, attribute.name) for attribute in self.structure.ledger.attributes}
        modules = dict(modules_of(self.model))
        numbers = {(path, name): held_number(modules[path], name) for path, name in read}
        numbers |= {(change.module, change.name): change.new for change in self.cut.attributes}
        followed = follow_configs(self.model, self.cut.shapes, numbers, self.cut.kept)
        unread = [*followed.changes, *follow_timm(self.model, self.cut.shapes, numbers)]
        cut = replace(self.cut, attributes=(*self.cut.attributes, *unread))
        # Noted before the cut, so that nothing that can be interrupted follows it.
        recipe_of(self.model).note(read)  # what configs become follows from these and the shapes
        cut_(self.model, cut, self.tensors, optimizers)
        return cut.attributes, followed.inexpressible


def plan_filters(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    scores: Scores,
    amount: Amount,
    budget: Budget | None = None,
    *,
    dense: Dense | None = None,
    latency: Latency | None = None,
    at_most: int | None = None,
    adding_up: bool = False,
    refused: Mapping[str, str] | None = None,
    refuse: bool = True,
    progress: bool = False,
    chosen: Keep | None = None,
) -> Plan:
    """Select the units to prune so that the amount is met, and verify their cut; the model is not changed.

    Groups whose cut cannot be verified are kept whole, and others are selected anew without them.

    Args:
        model: The model that ``structure`` was traced from.
        example_inputs: What it was traced on.
        structure: The channel groups that may be pruned.
        scores: One score per unit of every group.
        amount: Fraction, in [0, 1), of the target, relative to ``dense``; or fractions by group name.
        budget: What ``amount`` is a fraction of, and the limits of each layer. By default filters, without limits.
        dense: The model that amounts are relative to. By default the model as it stands.
        latency: Measures the share of the latency that is kept, for ``target="latency"``. By default against the model
            as it stands.
        at_most: Units that may be gone after the cut, relative to ``dense``, though more were asked for.
        adding_up: Whether scores are losses that add up over units. Under ``scope="global"`` they are then divided by
            what a unit saves of the target.
        refused: Groups of ``dense`` whose cut could not be verified earlier, with the reason; none are in
            ``structure``.
        refuse: Whether groups whose cut cannot be verified are kept whole.
        progress: Whether to show how often a latency was measured.
        chosen: The units of every group that are kept, where they were selected before; scores then count for nothing.

    Raises:
        OutOfReachError: If the amount cannot be reached.
        RefusedError: If the cut cannot be verified, unless ``refuse``.
    """
    budget = budget or Budget()
    if dense is None:
        widths = {name: group.width for name, group in structure.groups.items()}
        dense = Dense(widths, measure(model, structure, {}, budget.part))
    ask = _Ask(model, example_inputs, amount, budget, dense, at_most, adding_up, refuse, chosen)
    earlier = refused or {}
    if budget.target != "latency" or latency is not None:
        return _verified(ask, structure, scores, earlier, latency)
    shapes = shapes_of(model, structure)
    with counted("latency", None, progress) as advance:

        def measured(structure: Structure, keep: Keep) -> float:
            share = latency_kept(model, example_inputs, structure, keep, shapes)
            advance(f"{share:.0%}")
            return share

        return _verified(ask, structure, scores, earlier, measured)


@dataclass(frozen=True, eq=False)
class _Ask:
    """The arguments of :func:`plan_filters` that stay the same while groups are refused."""

    model: nn.Module
    example_inputs: ExampleInputs
    amount: Amount
    budget: Budget
    dense: Dense
    at_most: int | None
    adding_up: bool
    refuse: bool
    chosen: Keep | None


def _verified(
    ask: _Ask, structure: Structure, scores: Scores, earlier: Mapping[str, str], latency: Latency | None
) -> Plan:
    """Select and verify until the cut of all groups that are left is right."""
    with remembered_once(ask.model):
        return _selected_and_verified(ask, structure, scores, earlier, latency)


def _selected_and_verified(
    ask: _Ask, structure: Structure, scores: Scores, earlier: Mapping[str, str], latency: Latency | None
) -> Plan:
    model, first = ask.model, structure
    refused = dict(earlier)
    while True:
        stopped: CutDoesNotRunError | None = None
        try:
            keep = _selected(ask, structure, scores, refused, latency)
        except CutDoesNotRunError as error:  # the verification below says which group is at fault
            keep, stopped = error.keep, error
        except OutOfReachError as error:
            raise OutOfReachError(f"{error}{reasons_in_words(reasons_of(first, structure))}") from None
        cut = draft(model, structure, keep)
        tensors = SlimValues(cut, model)
        proof = verify(model, structure, cut, tensors) if cut.keep else Proof(0, 0)
        if isinstance(proof, Proof):
            break
        if not ask.refuse:
            raise RefusedError(proof.reason)
        structure = structure.without_each(groups_at_fault(model, structure, keep, proof))
        refused = {**earlier, **reasons_of(first, structure)}
    if stopped is not None:
        raise PruningError(f"The latency of {type(model).__name__} cannot be measured: {stopped.__cause__}.")
    if proof.constants:
        cut, proof = compensated(model, structure, cut, proof)
        tensors = SlimValues(cut, model)
    kept = latency(structure, keep) if ask.budget.target == "latency" and latency is not None else None
    widths = tuple(GroupWidth(name, group.width, int(keep[name].sum())) for name, group in structure.groups.items())
    now = measure(model, structure, keep, ask.budget.part)
    plan = Plan(
        model, ask.example_inputs, ask.amount, ask.budget, ask.dense, structure, keep, cut, tensors(),
        refused, widths, proof, kept, Outcome(0.0, 0.0, ""), now,
    )  # fmt: skip
    return replace(plan, outcome=_outcome(plan, now))


def _selected(
    ask: _Ask, structure: Structure, scores: Scores, refused: Mapping[str, str], latency: Latency | None
) -> Keep:
    """Select the units that are kept."""
    if ask.chosen is not None:
        return {name: ask.chosen[name] for name in structure.groups}
    budget = ask.budget
    if ask.adding_up and budget.scope == "global":
        scores = per_saving(scores, saved_by_one_unit(ask.model, structure), budget.target)
    return select_units(
        structure,
        scores,
        ask.amount,
        budget,
        dense=ask.dense.without(refused),
        footprint=partial(measure, ask.model, structure, part=budget.part),
        latency=None if latency is None else partial(latency, structure),
        at_most=ask.at_most,
    )


def _outcome(plan: Plan, now: Footprint) -> Outcome:
    """Compare what was asked with what is reached at a cost of ``now``."""
    widths = {width.name: width.after for width in plan.widths}
    widths |= plan.dense.without(plan.refused).lone(widths)
    free = plan.dense.without(name for name in plan.dense.widths if name not in plan.structure.groups)
    why = {**kept_whole_by(plan.structure, plan.budget, free, widths), **plan.refused}
    return outcome_of(plan.amount, plan.budget.target, plan.dense, widths, now, plan.latency_kept, why)


def count_params(model: nn.Module) -> int:
    """Count the parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _in_words(plan: Plan) -> str:
    """Describe what was verified."""
    if not plan.cut.keep:
        return "nothing was cut"
    proof = plan.proof
    facts = [f"{len(plan.cut.keep)} groups cut"]
    facts.append(f"{proof.operators} operators ran, {proof.compared} outputs compared on {proof.values}")
    if proof.skipped:
        facts.append(f"not compared: {_first_three([f'{what} ({times})' for what, times in proof.skipped.items()])}")
    if proof.scaled:
        facts.append(f"scaled to compensate numbers made from widths: {_first_three(proof.scaled)}")
    if proof.constants:
        changed = _first_three([str(constant) for constant in proof.constants], "; ")
        facts.append(f"numbers made from widths change: {changed}")
    if readers := _idle_readers(plan):
        facts.append(f"never ran, and kept their shapes: {_first_three(readers)}")
    if plan.structure.ledger.guessed:
        facts.append(f"never ran, and pruned like those beside them: {_first_three(plan.structure.ledger.guessed)}")
    if plan.structure.ledger.untrained:
        facts.append(f"train mode does not run on the example inputs ({plan.structure.ledger.untrained})")
    return "; ".join(facts)


def _idle_readers(plan: Plan) -> list[str]:
    """Return parameters that never ran, and that have as many entries along a dimension as a pruned layer had."""
    ledger, kept = plan.structure.ledger, plan.cut.kept
    if not ledger.idle:
        return []
    pruned = {slot.size for slot in ledger.slots if slot.dim in kept.get(slot.tensor, {})}
    dims = {name: parameter.dim() for name, parameter in plan.model.named_parameters()}
    reads: dict[str, None] = {}
    for slot in ledger.slots:
        if slot.tensor not in ledger.idle or slot.size not in pruned:
            continue
        if slot.dim > 0 or (slot.tensor.endswith("weight") and dims[slot.tensor] == 1):  # of a norm
            reads[slot.tensor] = None
    return list(reads)


def _first_three(named: Sequence[str], between: str = ", ") -> str:
    shown = list(named[:3])
    if len(named) > 3:
        shown.append("...")
    return between.join(shown)
