"""Prunes the weights of a trained model at once, layer by layer, by second-order surgery; knows no Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.selection import number_to_prune, parse_pattern
from lightning_prune.algorithms.solvers import SOLVERS, Pattern, split
from lightning_prune.measure.calibration import Calibration, Run
from lightning_prune.measure.footprint import WHOLE, Part
from lightning_prune.measure.products import Products, find_products
from lightning_prune.measure.unrolled import Reading
from lightning_prune.model.calls import call_on
from lightning_prune.model.errors import PruningError
from lightning_prune.model.spool import Spool
from lightning_prune.model.torch_modes import changes_model, ordinary
from lightning_prune.pruning.amounts import Amount, in_fractions
from lightning_prune.pruning.arguments import (
    Parameters,
    Parts,
    by_path,
    check_choice,
    check_damping,
    check_ignored,
    check_module,
    listed,
    names_module,
    part_of,
)
from lightning_prune.pruning.blockwise import by_blocks, stages_of
from lightning_prune.pruning.layerwise import (
    Leaving,
    Solved,
    Surgery,
    all_together,
    error_curves,
    most_that_leaves,
    one_by_one,
)
from lightning_prune.pruning.left_alone import left_alone, weights_left_alone
from lightning_prune.pruning.report_types import WeightReport
from lightning_prune.pruning.weights import check_weight_arguments, count_unmasked, weight_report
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.masks import apply_masks_, carried_masks

__all__ = [
    "Asked", "LayerFit", "ObsPlan", "Solver", "Split", "plan_obs", "prune_obs", "refuse_beyond_reach",
    "write_",
]  # fmt: skip

Solver = Literal["exact", "admm", "blocked"]
Split = Literal["layer", "global"]
Share = float | str | Mapping[str, float]


class LayerFit(NamedTuple):
    """What became of one layer: its weights, how many are left, and the share of its output's energy that was lost."""

    name: str
    weights: int
    left: int
    error: float


@changes_model
def prune_obs(
    model: nn.Module,
    amount: Amount | None = None,
    *,
    scope: Split = "layer",
    batches: Iterable[Any],
    module: Parts = None,
    ignore: Parameters = (),
    parameters: Parameters | None = None,
    pattern: str | None = None,
    solver: Solver = "admm",
    sequential: bool = False,
    damping: float = 0.01,
    forward: Run = call_on,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> WeightReport:
    """Set the least needed weights of a trained model to zero, in place; the others of each layer compensate for it.

    No labels, no loss and no training: every layer keeps its outputs on the batches as well as it can. Weights of
    linear and convolution layers, attention's projections and any other parameter that is multiplied with inputs are
    pruned. What does more than that, such as a weight shared with an embedding, stays; the report says so. What an
    earlier call set to zero stays zero, and counts.

    Args:
        model: The model. The batches run in eval mode.
        amount: Fraction, in [0, 1), of the weights that are set to zero, relative to the dense model; or a whole number
            of them, of each layer or, with ``scope="global"``, of all; or these by pattern of paths of modules or
            parameters, or by module, of their weights. What no pattern names stays dense. By default 0.5, or what
            ``pattern`` says.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both. Across layers, the weights are split so that the model's outputs
            change least.
        batches: Batches of data, a list or loader that can be read once. A few hundred examples like those trained on.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers. Here also whatever else is
            multiplied with inputs.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N are kept.
        solver: ``exact`` removes greedily, one weight at a time; ``admm`` negotiates over a whole layer, most often
            with less error, and in wide layers in less time; ``blocked`` sweeps once, for layers thousands wide.
        sequential: Whether each layer is fitted to the inputs that the pruned layers before it give. They aim at the
            outputs of the whole model. Takes one more run over the batches per layer.
        damping: Share of its mean diagonal entry that is added to the diagonal of every Hessian.
        forward: Calls the model on a batch and returns its outputs; by default as on example inputs.
        dtype: What Hessians are summed and solved in; float32 in place of float64 for a device that has no float64.
        progress: Whether to show progress bars.

    Returns:
        What was done, with the masks, which the model carries: :func:`~lightning_prune.hold_masks` holds the zeros in
        further training.

    Raises:
        ValueError: If an argument is out of range, or a pattern names no module.
        PruningError: If nothing can be pruned, or a Hessian is singular. The model is as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> report = prune_obs(model, 0.5, batches=[torch.randn(64, 8)], progress=False)
        >>> report.reached, int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        (0.5, 80)

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; Frantar and Alistarh, Optimal Brain
        Compression, NeurIPS 2022 (arXiv:2208.11580); Meng et al., ALPS, NeurIPS 2024 (arXiv:2406.07831).
    """
    check_module("prune_obs", module)
    named = [*(amount if isinstance(amount, Mapping) else ()), *(parameters or ()), *listed(module)]
    asked = Asked(
        amount,
        solver,
        scope,
        pattern,
        sequential,
        damping,
        ignore,
        progress,
        parameters=parameters,
        part=part_of(model, module),
        alone=left_alone(model, named),
    )
    asked.check("prune_obs")
    plan = plan_obs(model, Calibration(list(ordinary(batches)), forward, dtype), asked)
    before = count_unmasked(model)
    write_(model, plan.tensors)
    apply_masks_(model, plan.masks)
    return weight_report(model, before, plan.masks, plan.skipped, plan.asked, plan.layers)


@dataclass(frozen=True, eq=False)
class Asked:
    """What :func:`prune_obs` is asked for; ``only``, names of the parameters that may be pruned, by default all."""

    amount: Amount | None
    solver: Solver
    scope: Split
    pattern: str | None
    sequential: bool
    damping: float
    ignore: Parameters
    progress: bool
    only: Collection[str] | None = None
    parameters: Parameters | None = None
    part: Part = WHOLE
    alone: Mapping[str, str] = field(default_factory=dict)  # networks that are not pruned, by path, and why

    def check(self, where: str) -> None:
        """Refuse what no model could make sense of; ``where`` it was asked."""
        check_weight_arguments(where, self.amount, self.scope, "magnitude", self.parameters, self.ignore, self.pattern)
        check_choice(where, "solver", self.solver, SOLVERS)
        check_damping(where, self.damping, "mean diagonal entry")

    @property
    def share(self) -> Share:
        """What is pruned: a pattern, one fraction or fractions by pattern."""
        if self.pattern is not None:
            return self.pattern
        return 0.5 if self.amount is None else self.amount


@dataclass(frozen=True, eq=False)
class ObsPlan:
    """A second-order pruning, worked out and not yet done.

    Attributes:
        tensors: New values of weights, biases and running means, by name; those of a model of blocks wait in a
            temporary file.
        masks: Name of a parameter -> which weights are kept.
        layers: How well each layer's outputs are kept, in the order in which they run.
        skipped: Name of a parameter -> why all of its weights are kept.
        asked: Fraction of each parameter that was to be zero.
    """

    tensors: Mapping[str, Tensor]
    masks: dict[str, Tensor]
    layers: tuple[LayerFit, ...]
    skipped: dict[str, str]
    asked: Amount


def plan_obs(model: nn.Module, calibration: Calibration, asked: Asked) -> ObsPlan:
    """Work out what :func:`prune_obs` does; the model is left as found."""
    if isinstance(asked.amount, Mapping):
        asked = replace(asked, amount=by_path(model, asked.amount, "amount"))
    products = find_products(model, calibration.batches[0], calibration.forward)
    names, skipped = _prunable(model, products, asked)
    asked = _in_fractions(asked, {name: named_tensors(model)[name].numel() for name in names})
    solver = SOLVERS[asked.solver]
    surgery = Surgery(model, calibration, products, solver, asked.damping, named_tensors(model), carried_masks(model))
    leaving = _with_earlier(surgery, _leaving(surgery, names, asked))
    stages = stages_of(surgery, names)
    tensors: dict[str, Tensor] | Spool = {}
    if stages is None:
        solve = one_by_one if asked.sequential else all_together
        solved: Iterable[tuple[str, Solved]] = solve(surgery, leaving, asked.progress).items()
    else:
        solved = by_blocks(surgery, stages, leaving, asked.sequential, asked.progress)
        tensors = Spool()  # a model of many blocks may fill the memory
    masks, fits = {}, {}
    for name, layer in solved:
        for other, tensor in {name: layer.weight, **layer.others}.items():
            tensors[other] = tensor
        masks[name] = layer.keep
        fits[name] = LayerFit(name, layer.keep.numel(), int(layer.keep.count_nonzero()), layer.error)
    masks = {name: masks[name] for name in names}  # in the order in which they run
    return ObsPlan(tensors, masks, tuple(fits[name] for name in names), skipped, _amount_of_each(asked.share))


def _in_fractions(asked: Asked, sizes: Mapping[str, int]) -> Asked:
    """Return the same with amounts as fractions: of all, or by name of a weight in place of patterns."""
    amount = asked.share
    if isinstance(amount, str):
        return asked
    if isinstance(amount, Mapping):
        amount = {name: _share(amount, name) for name in sizes}
    return replace(asked, amount=in_fractions(amount, sizes, asked.scope, "weights"))


def _amount_of_each(share: Share) -> Amount:
    if isinstance(share, str):
        n, m = parse_pattern(share)
        return 1 - n / m
    return share


def write_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write new values of the same shapes into parameters and buffers."""
    own = named_tensors(model)
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _prunable(model: nn.Module, products: Products, asked: Asked) -> tuple[list[str], dict[str, str]]:
    """Part the weights into those to prune, in the order in which they run, and those that stay, with the reason."""
    amount, only = asked.share, asked.only
    ignore = check_ignored(model, asked.ignore)
    check_ignored(model, amount if isinstance(amount, Mapping) else (), what="amount")
    wanted = None if asked.parameters is None else check_ignored(model, asked.parameters, what="parameters")
    skipped = {}
    alone = weights_left_alone(model, asked.alone)

    def considered(name: str) -> bool:
        return asked.part.holds(name) and (only is None or name in only)

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not considered(name):
            continue
        if name in alone:
            skipped[name] = alone[name]
        elif any(_names(pattern, name) for pattern in ignore):
            skipped[name] = "named in ignore="
        elif wanted is not None and not any(_names(pattern, name) for pattern in wanted):
            skipped[name] = "not named in parameters="
        elif name not in products.readings:
            skipped[name] = products.otherwise.get(name, "nothing was seen to be multiplied by it")
        elif name in products.otherwise:
            skipped[name] = products.otherwise[name]
        elif isinstance(amount, str) and not _pattern(amount, products.readings[name]).fits(products.shapes[name][2]):
            skipped[name] = f"its rows do not part into blocks of {amount}"
        elif isinstance(amount, Mapping) and not any(_names(pattern, name) for pattern in amount):
            skipped[name] = "named in no pattern of amount="
    names = [name for name in products.readings if name not in skipped and considered(name)]
    if not names:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise PruningError(f"Nothing is left to prune in {type(model).__name__}: every weight stays ({why}).")
    return names, skipped


def _leaving(surgery: Surgery, names: Sequence[str], asked: Asked) -> Leaving:
    """Work out how much leaves each layer."""
    amount = asked.share
    if isinstance(amount, str):
        return {name: _pattern(amount, surgery.products.readings[name]) for name in names}
    sizes = {name: surgery.tensors[name].numel() for name in names}
    if isinstance(amount, Mapping):
        return {name: number_to_prune(amount[name], size) for name, size in sizes.items()}
    total = number_to_prune(amount, sum(sizes.values()))
    if asked.scope == "layer" or len(names) == 1 or not total:
        return {name: number_to_prune(amount, size) for name, size in sizes.items()}
    refuse_beyond_reach(sizes, asked)
    return split(error_curves(surgery, names, amount, asked.progress), total)


def _with_earlier(surgery: Surgery, leaving: Leaving) -> Leaving:
    """Return how much leaves each layer, at least what earlier calls zeroed, and if possible as much in all."""
    found = dict(leaving)
    asked = sum(count for count in leaving.values() if isinstance(count, int))
    gone = dict.fromkeys(leaving, 0)
    for name in leaving.keys() & surgery.masks.keys():
        mask = surgery.masks[name].expand(surgery.tensors[name].shape)
        gone[name] = mask.numel() - int(mask.count_nonzero())
    for name, count in leaving.items():
        found[name] = max(count, gone[name]) if isinstance(count, int) else count
    beyond = sum(count for count in found.values() if isinstance(count, int)) - asked
    for name, count in found.items():
        if beyond and isinstance(count, int):
            fewer = min(beyond, count - gone[name])
            found[name], beyond = count - fewer, beyond - fewer
    return found


def refuse_beyond_reach(sizes: Mapping[str, int], asked: Asked) -> None:
    """Refuse one share of all weights that no split over the layers gives.

    Args:
        sizes: Name of a weight -> how many entries it has.
        asked: What is asked for.

    Raises:
        PruningError: Saying how much can leave.
    """
    amount = asked.share
    if isinstance(amount, str | Mapping) or asked.scope == "layer" or len(sizes) == 1:
        return
    total, reach = sum(sizes.values()), sum(map(most_that_leaves, sizes.values()))
    if number_to_prune(amount, total) > reach:
        raise PruningError(
            f"amount={amount:g}: split over the layers, at most {reach / total:.1%} can leave. Ask for less, or for "
            "the same share of every layer by scope='layer'."
        )


def _pattern(amount: str, reading: Reading) -> Pattern:
    return Pattern(*parse_pattern(amount), apart=reading.taps)


def _share(amount: Mapping[str, float], name: str) -> float:
    """Return what the patterns that name a weight ask for, which must be one thing."""
    asked = {pattern: fraction for pattern, fraction in amount.items() if _names(pattern, name)}
    if len(set(asked.values())) > 1:
        raise ValueError(f"prune_obs(amount={amount!r}): {name} is named with {asked}. Give it one amount.")
    return next(iter(asked.values()))


def _names(pattern: str, parameter: str) -> bool:
    return names_module(pattern, parameter) or names_module(pattern, parameter.rpartition(".")[0])
