"""Measures what is left of a model, for the log and the history of a run; changes nothing."""

from __future__ import annotations

from dataclasses import replace

from lightning.pytorch import LightningModule

from lightning_prune.callbacks.engine.layer_removal import LayerRemoval
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval
from lightning_prune.callbacks.engine.weight_masking import WeightMasking
from lightning_prune.callbacks.engine.whole_removal import WholeRemoval
from lightning_prune.measure.latency import circumstances
from lightning_prune.pruning.arguments import part_of
from lightning_prune.pruning.plan import count_params
from lightning_prune.reports import History, LayerChange, LayerCost, layer_costs

__all__ = ["describe", "measure", "weights_bytes"]


def measure(run: Run) -> dict[str, float]:
    """Return what is left of the model, of all callbacks together, by the names under which it is logged."""
    values: dict[str, float] = {}
    maskings, removals = run.strategies(WeightMasking), run.strategies(UnitRemoval)
    if maskings:
        values |= _left_of_weights(run, maskings)
    if removals:
        values |= _left_of_units(run, removals)  # whose sparsity is logged where both are at work
    for whole in run.strategies(WholeRemoval):  # type: ignore[type-abstract]
        values |= _left_of_modules(run, whole)
    return values


def describe(run: Run, history: History) -> None:
    """Write into a history how every layer and weight stands, and what was asked and reached."""
    goals = [member.strategy.goal(replace(run, own=member)) for member in run.members]
    history.goals = [goal for goal in goals if goal is not None]
    history.note_bytes(weights_bytes(run.module))
    maskings, removals = run.strategies(WeightMasking), run.strategies(UnitRemoval)
    history.weights = [count for masking in maskings for count in masking.own.counts]
    history.dense = {}
    for masking in maskings:
        history.dense |= {**masking.own.to_prune.stay, **masking.own.to_prune.others}
    if removals:
        removal = removals[-1]
        flops = removal.traced.flops(run.module)
        now, dense = layer_costs(run.module, flops), removal.start.layers
        history.layers = {path: LayerChange(was, now.get(path, was)) for path, was in dense.items()}
        if removal.layers is not None:
            history.layers = {path: LayerChange(was, now.get(path, LayerCost(0, 0, 0))) for path, was in dense.items()}
            _describe_depth(removal.layers, history)
        history.measured = circumstances(run.module, removal.traced.inputs)
        history.counted = flops.counted
        history.pinned, history.branching = list(removal.state.pinned), list(removal.state.branching)
    for whole in run.strategies(WholeRemoval):  # type: ignore[type-abstract]
        now, dense = whole.costs(run.module), whole.state.dense.layers
        history.layers = {path: LayerChange(was, now.get(path, LayerCost(0, 0, 0))) for path, was in dense.items()}
        history.measured = circumstances(run.module, whole.inputs)
        history.counted = whole.flops(run.module).counted
        history.dense = dict(whole.state.pinned)
    for of_layers in run.strategies(LayerRemoval):
        _describe_depth(of_layers, history)


def _describe_depth(removal: LayerRemoval, history: History) -> None:
    when = {path: moment for path, (_, moment) in removal.state.removed.items()}
    history.depth = {path: when.get(path, "") for path in removal.dense.costs.by_layer}


def _left_of_modules(run: Run, removal: WholeRemoval) -> dict[str, float]:
    part, (dense_params, dense_flops) = removal.part(run.module), removal.before
    params, flops = part.params(run.module), part.counted(removal.flops(run.module))
    return {
        "prune/params": float(params),
        "prune/flops": float(flops),
        "prune/params_kept": params / max(dense_params, 1),
        "prune/flops_kept": flops / max(dense_flops, 1),
        **removal.kept(),
    }


def weights_bytes(pl_module: LightningModule) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*pl_module.parameters(), *pl_module.buffers()))


def _left_of_weights(run: Run, maskings: list[WeightMasking]) -> dict[str, float]:
    counts = [count for masking in maskings for count in masking.own.counts]
    size = sum(count.size for count in counts)
    pruned = sum(count.size - count.stays for count in counts)
    nonzero = count_params(run.module) - pruned
    values: dict[str, float] = {}
    names = [_name(run, masking) for masking in maskings]
    if len(set(names)) > 1:  # else the value of all is that of the one part
        for name, masking in zip(names, maskings, strict=True):
            own = masking.own.counts
            if name:
                stays, all_of_it = sum(count.stays for count in own), sum(count.size for count in own)
                values[f"prune/weight_sparsity/{name}"] = 1 - stays / max(all_of_it, 1)
    return {
        **values,
        "prune/weight_sparsity": pruned / size,
        "prune/nonzero": float(nonzero),
        "prune/nonzero_kept": nonzero / maskings[-1].params,
        "prune/sparsity": pruned / size,
    }


def _left_of_units(run: Run, removals: list[UnitRemoval]) -> dict[str, float]:
    dense: dict[str, int] = {}
    left: dict[str, int] = {}
    values: dict[str, float] = {}
    parts = {_name(run, removal): removal for removal in removals}
    if len(parts) > 1:
        for name, removal in parts.items():
            if name:
                each = _left_of_parts(run, [removal])
                values |= {f"{key}/{name}": value for key, value in each.items()}
    for removal in removals:
        widths = removal.state.widths
        for name, width in removal.start.widths.items():
            dense[name] = max(dense.get(name, 0), width)
            left[name] = min(left.get(name, width), widths.get(name, width))
        if removal.start.shapes is not None:
            values["prune/latency_kept"] = removal.state.latency
    return {
        **_left_of_parts(run, _outermost(list(parts.values()))),
        "prune/sparsity": 1 - sum(left.values()) / max(sum(dense.values()), 1),
        **values,
    }


def _left_of_parts(run: Run, removals: list[UnitRemoval]) -> dict[str, float]:
    """Return what is left of the parts of some callbacks, which do not overlap, together."""
    params = flops = dense_params = dense_flops = 0
    for removal in removals:
        part = removal.start.budget.part
        params += part.params(run.module)
        flops += part.counted(removal.traced.flops(run.module))
        dense_params += removal.start.params
        dense_flops += removal.start.flops
    return {
        "prune/params": float(params),
        "prune/flops": float(flops),
        "prune/params_kept": params / max(dense_params, 1),
        "prune/flops_kept": flops / max(dense_flops, 1),
    }


def _outermost(removals: list[UnitRemoval]) -> list[UnitRemoval]:
    """Return the callbacks whose parts lie in no other's."""
    found: list[UnitRemoval] = []
    for removal in removals:
        part = removal.start.budget.part
        others = [other.start.budget.part for other in removals if other is not removal]
        if not any(all(map(other.holds, part.inside)) for other in others):
            found.append(removal)
    return found


def _name(run: Run, strategy: WeightMasking | UnitRemoval) -> str:
    """Return the paths of the part that a callback prunes; nothing for the whole model."""
    return "+".join(part_of(run.module, strategy.arguments.module).inside)
