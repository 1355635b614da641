"""Prunes the weights of a trained model at once, layer by layer, by second-order surgery; knows no Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.selection import parse_pattern
from lightning_prune.algorithms.solvers import SOLVERS, Pattern, split
from lightning_prune.measure.calibration import Calibration, Run
from lightning_prune.measure.products import Products, find_products
from lightning_prune.measure.unrolled import Reading
from lightning_prune.model.calls import call_on
from lightning_prune.model.errors import PruningError
from lightning_prune.model.inference_mode import changes_model, ordinary
from lightning_prune.pruning.arguments import check_ignored, names_module
from lightning_prune.pruning.layerwise import (
    Leaving,
    Surgery,
    all_together,
    error_curves,
    most_that_leaves,
    one_by_one,
)
from lightning_prune.pruning.weights import check_weight_arguments
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.masks import apply_masks_, masks_on

__all__ = [
    "Asked", "LayerFit", "ObsPlan", "ObsReport", "Solver", "Split", "plan_obs", "prune_obs", "refuse_beyond_reach",
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


@dataclass(frozen=True, eq=False)
class ObsReport:
    """What a second-order pruning did.

    Attributes:
        masks: By parameter name, True for each weight that stays.
        layers: What became of each layer, in the order in which they run.
        skipped: By parameter name, why its weights stay.
        damping: Share of the mean diagonal entry that was added to every Hessian.
    """

    masks: dict[str, Tensor]
    layers: tuple[LayerFit, ...]
    skipped: dict[str, str]
    damping: float

    @property
    def sparsity(self) -> float:
        """Share of the weights of all pruned layers that is gone."""
        return 1 - sum(layer.left for layer in self.layers) / max(1, sum(layer.weights for layer in self.layers))


@changes_model
def prune_obs(
    model: nn.Module,
    batches: Iterable[Any],
    amount: float | Mapping[str, float] | None = None,
    solver: Solver = "admm",
    scope: Split = "global",
    pattern: str | None = None,
    sequential: bool = False,
    damping: float = 0.01,
    ignore: Sequence[str] = (),
    forward: Run = call_on,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> ObsReport:
    """Set the least needed weights of a trained model to zero, in place; the others of each layer make up for it.

    No labels, no loss and no training: every layer keeps its outputs on the batches as well as it can. Weights of
    linear and convolution layers, attention's projections and any other parameter that is multiplied with inputs are
    pruned. What does more than that, such as a weight shared with an embedding, stays; the report says so. What an
    earlier call set to zero stays zero, and counts.

    Args:
        model: The model; the batches run in eval mode.
        batches: Batches of data: a few hundred examples like those trained on.
        amount: Fraction, in [0, 1), of the weights that leaves; or, by pattern of module paths, of each layer's (what
            no pattern names stays whole). By default 0.5, or what ``pattern`` says.
        solver: ``"exact"`` removes greedily, one weight at a time; ``"admm"`` negotiates over a whole layer, most often
            with less error, and in wide layers in less time; ``"blocked"`` sweeps once, for layers thousands wide.
        scope: With one fraction for all, ``"layer"`` takes it of every layer; ``"global"`` splits the weights to be
            removed over the layers so that the model's outputs change least.
        pattern: ``"N:M"``: of every M neighbours along the input dimension, at one place of a kernel, N stay.
        sequential: Let each layer see the inputs that the pruned layers before it give, and aim at the outputs of the
            whole model. Takes one more run over the batches per layer.
        damping: Share of its mean diagonal entry that is added to every Hessian's diagonal.
        ignore: Patterns of module paths whose weights stay.
        forward: Calls the model on a batch and returns its outputs; by default as on example inputs.
        dtype: What Hessians are summed and solved in.
        progress: Whether to show a progress bar.

    Returns:
        What was done, with the masks, which the model carries: :func:`~lightning_prune.hold_masks` holds the zeros in
        further training.

    Raises:
        ValueError: If an argument is out of range, or a pattern names no module.
        PruningError: If nothing can be pruned, or a Hessian is singular. The model is as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> report = prune_obs(model, [torch.randn(64, 8)], amount=0.5, progress=False)
        >>> report.sparsity, int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        (0.5, 80)

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; Frantar and Alistarh, Optimal Brain
        Compression, NeurIPS 2022 (arXiv:2208.11580); Meng et al., ALPS, NeurIPS 2024 (arXiv:2406.07831).
    """
    asked = Asked(amount, solver, scope, pattern, sequential, damping, ignore, progress)
    asked.check("prune_obs")
    plan = plan_obs(model, Calibration(list(ordinary(batches)), forward, dtype), asked)
    write_(model, plan.tensors)
    apply_masks_(model, plan.report.masks)
    return plan.report


@dataclass(frozen=True, eq=False)
class Asked:
    """What :func:`prune_obs` is asked for; ``only``, names of the parameters that may be pruned, by default all."""

    amount: float | Mapping[str, float] | None
    solver: Solver
    scope: Split
    pattern: str | None
    sequential: bool
    damping: float
    ignore: Sequence[str]
    progress: bool
    only: Collection[str] | None = None

    def check(self, where: str) -> None:
        """Refuse what no model could make sense of; ``where`` it was asked."""
        check_weight_arguments(where, self.amount, self.scope, "magnitude", None, self.ignore, self.pattern)
        if self.solver not in SOLVERS:
            raise ValueError(f"{where}(solver={self.solver!r}): choose one of {', '.join(map(repr, SOLVERS))}.")
        if not self.damping >= 0:
            raise ValueError(
                f"{where}(damping={self.damping!r}): a share of the mean diagonal entry, from 0; 0.01 is 1 %."
            )

    @property
    def share(self) -> Share:
        """What leaves, in one."""
        return self.pattern if self.pattern is not None else 0.5 if self.amount is None else self.amount


@dataclass(frozen=True, eq=False)
class ObsPlan:
    """A second-order pruning, worked out and not yet done.

    Attributes:
        tensors: New values of weights, biases and running means, by name.
        report: What it comes to.
    """

    tensors: dict[str, Tensor]
    report: ObsReport


def plan_obs(model: nn.Module, calibration: Calibration, asked: Asked) -> ObsPlan:
    """Work out what :func:`prune_obs` does; the model is left as found."""
    products = find_products(model, calibration.batches[0], calibration.forward)
    names, skipped = _prunable(model, products, asked)
    solver = SOLVERS[asked.solver]
    surgery = Surgery(model, calibration, products, solver, asked.damping, named_tensors(model), masks_on(model))
    leaving = _with_earlier(surgery, _leaving(surgery, names, asked))
    solved = (one_by_one if asked.sequential else all_together)(surgery, leaving, asked.progress)
    tensors = {name: layer.weight for name, layer in solved.items()}
    for layer in solved.values():
        tensors |= layer.others
    report = ObsReport(
        {name: layer.keep for name, layer in solved.items()},
        tuple(LayerFit(n, s.keep.numel(), int(s.keep.sum()), s.error) for n, s in solved.items()),
        skipped,
        asked.damping,
    )
    return ObsPlan(tensors, report)


def write_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers new values of the same shapes, in place."""
    own = named_tensors(model)
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _prunable(model: nn.Module, products: Products, asked: Asked) -> tuple[list[str], dict[str, str]]:
    """Part the weights into those to prune, in the order in which they run, and those that stay, with the reason."""
    ignore, amount, only = asked.ignore, asked.share, asked.only
    check_ignored(model, ignore)
    check_ignored(model, amount if isinstance(amount, Mapping) else (), what="amount")
    skipped = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or (only is not None and name not in only):
            continue
        if any(_names(pattern, name) for pattern in ignore):
            skipped[name] = "named in ignore="
        elif name not in products.readings:
            skipped[name] = products.otherwise.get(name, "nothing was seen to be multiplied by it")
        elif name in products.otherwise:
            skipped[name] = products.otherwise[name]
        elif isinstance(amount, str) and not _pattern(amount, products.readings[name]).fits(products.shapes[name][2]):
            skipped[name] = f"its rows do not part into blocks of {amount}"
        elif isinstance(amount, Mapping) and not any(_names(pattern, name) for pattern in amount):
            skipped[name] = "named in no pattern of amount="
    names = [name for name in products.readings if name not in skipped and (only is None or name in only)]
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
        return {name: round(_share(amount, name) * size) for name, size in sizes.items()}
    total = round(amount * sum(sizes.values()))
    if asked.scope == "layer" or len(names) == 1 or not total:
        done = 0
        counts = {}
        for name, size in sizes.items():
            counts[name] = round(amount * (done + size)) - round(amount * done)
            done += size
        return counts
    refuse_beyond_reach(sizes, asked)
    return split(error_curves(surgery, names, amount, asked.progress), total)


def _with_earlier(surgery: Surgery, leaving: Leaving) -> Leaving:
    """Return how much leaves each layer, at least what earlier calls zeroed, and if possible as much in all."""
    found = dict(leaving)
    asked = sum(count for count in leaving.values() if isinstance(count, int))
    gone = dict.fromkeys(leaving, 0)
    for name in leaving.keys() & surgery.masks.keys():
        mask = surgery.masks[name].expand(surgery.tensors[name].shape)
        gone[name] = mask.numel() - int(mask.sum())
    for name, count in leaving.items():
        found[name] = max(count, gone[name]) if isinstance(count, int) else count
    beyond = sum(count for count in found.values() if isinstance(count, int)) - asked
    for name, count in found.items() if beyond else ():
        if isinstance(count, int):
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
    if round(amount * total) > reach:
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
