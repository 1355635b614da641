"""Removes whole experts of mixtures in plain PyTorch: find, score, verify, remove; knows no Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.algorithms.selection import keep_highest, number_to_prune
from lightning_prune.measure.footprint import Part, count
from lightning_prune.model.calls import ExampleInputs, refuse_empty, refuse_shapeless
from lightning_prune.model.errors import PruningError, reraise_out_of_memory
from lightning_prune.model.torch_modes import changes_model, ordinary
from lightning_prune.pruning import arguments
from lightning_prune.pruning.amounts import check_amount, check_count, check_single, fraction_of
from lightning_prune.pruning.expert_scores import ExpertCriterion, score_experts
from lightning_prune.pruning.left_alone import left_alone
from lightning_prune.pruning.report_types import GroupWidth, Report
from lightning_prune.structure import Pinned
from lightning_prune.structure.mixtures import Mixture, find_mixtures
from lightning_prune.surgery.remove_experts import ExpertCut, remove_experts_, verify_experts

__all__ = [
    "ExpertBudget", "Mixtures", "check_expert_arguments", "in_words", "prunable_mixtures", "prune_experts",
    "refuse_none", "verified_cuts",
]  # fmt: skip

_PROOF = (
    "In eval mode: copies of the mixtures with random weights return, on random inputs, what they do if the removed "
    "experts cannot be chosen; and so does the rest of the model behind them."
)


@changes_model
def prune_experts(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amount: int | float = 0.25,
    *,
    criterion: ExpertCriterion = "reap",
    batches: Iterable[Any] | None = None,
    module: arguments.Parts = None,
    ignore: arguments.Modules = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    min_experts: int = 1,
) -> Report:
    """Remove whole experts from the mixtures of experts in a model, in place, with their entries of the routers.

    Mixtures are found by shapes: a matrix with a row for each expert, and experts that are alike modules in a list, or
    fused weights. Each removal is verified against the dense mixture in which the removed experts cannot be chosen. The
    state dict then loads into a model of the original class by :func:`~lightning_prune.load_state_dict_`.

    Args:
        model: The model. Anything that runs on ``example_inputs`` in eval mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        amount: Fraction, in [0, 1), of the experts of every mixture that is removed; or a whole number of them.
        criterion: How experts are scored; higher is kept longer. ``reap``: mean, over the tokens that an expert gets,
            of its gate times the norm of its output. ``frequency``: number of tokens that it gets. ``magnitude``: l2
            norm of its weights. ``random``.
        batches: Batches of data, a list or loader that can be read once. By default the example inputs.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of module paths, or modules, whose mixtures are not pruned, nor those inside of them.
        optimizer: The optimizer or optimizers that train the model; their state follows. Parameters that were removed
            leave their groups.
        min_experts: Experts that are kept of every mixture at least.

    Returns:
        A report whose ``groups`` are the mixtures, with their numbers of experts.

    Raises:
        PruningError: If no mixture can be pruned, or each token needs more experts. The model is as it was.

    References:
        Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (arXiv:2510.13999), eq. 9.
    """
    where = "prune_experts"
    check_expert_arguments(where, amount, criterion, module, ignore, min_experts)
    optimizers = arguments.optimizers_of(where, model, optimizer)
    arguments.check_optimizers(where, optimizers)
    refuse_empty(example_inputs)
    refuse_shapeless(model)
    alone = left_alone(model, arguments.listed(module))
    part = arguments.part_of(model, module)
    mixtures = prunable_mixtures(model, example_inputs, part, ignore, alone)
    refuse_none(model, mixtures)
    budget = ExpertBudget(where, amount, min_experts)
    left = {path: budget.kept(mixture) for path, mixture in mixtures.likeliest.items()}
    data = [example_inputs] if batches is None else ordinary(batches)
    scores = score_experts(model, mixtures.likeliest.values(), criterion, data)
    cuts, refused = verified_cuts(model, mixtures, left, scores)
    if not cuts:
        raise PruningError(
            f"No experts of {type(model).__name__} can be removed. {in_words(refused | mixtures.others)}"
        )
    dense, params = count(model, example_inputs), part.params(model)
    made, config = remove_experts_(model, example_inputs, cuts, optimizers)
    for told in filter(None, [config, in_words(refused)]):
        warnings.warn(f"{where}: {told}", stacklevel=3)  # behind this, its decorator
    slim, experts = count(model, example_inputs), {path: one.experts for path, one in mixtures.likeliest.items()}
    missed = [f"Not compared, {one.mixture.path or 'the model'}: {one.missed}." for one in cuts if one.missed]
    return Report(
        params_before=params, params_after=part.params(model),
        flops_before=part.counted(dense), flops_after=part.counted(slim),
        groups=tuple(GroupWidth(one.mixture.path, one.mixture.experts, len(one.kept)) for one in cuts),
        kept=made.kept, attributes=made.attributes,
        pinned=tuple(Pinned(path, 0, 0, 0, reason) for path, reason in (refused | mixtures.others).items()),
        proved=not missed, proof=" ".join([_PROOF, *missed]), asked=1 - sum(left.values()) / sum(experts.values()),
        reached=sum(one.mixture.experts - len(one.kept) for one in cuts) / sum(experts.values()), counted=slim.counted,
        config=config,
    )  # fmt: skip


def check_expert_arguments(
    where: str, amount: Any, criterion: str, module: arguments.Parts, ignore: arguments.Modules, min_experts: int
) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.
    """
    check_single(where, amount, "the experts of every mixture")
    check_amount(where, amount)
    arguments.check_choice(where, "criterion", criterion, get_args(ExpertCriterion))
    arguments.check_module(where, module)
    arguments.check_list(where, "ignore", ignore)
    check_count(where, "min_experts", min_experts, 1, "experts that are kept")


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of a model whose experts may be removed.

    Attributes:
        found: By path: what it may be, likeliest first.
        calls: By path: the arguments of a call.
        others: By path: why a mixture is not pruned.
    """

    found: dict[str, list[Mixture]]
    calls: dict[str, Any]
    others: dict[str, str]

    @property
    def likeliest(self) -> dict[str, Mixture]:
        """What each mixture most likely is, by path."""
        return {path: candidates[0] for path, candidates in self.found.items()}


@dataclass(frozen=True)
class ExpertBudget:
    """How many experts of every mixture are kept.

    Attributes:
        where: The function or callback, for errors.
        amount: Fraction, in [0, 1), of the experts of every mixture that is removed; or a whole number of them.
        min_experts: Experts that are kept of every mixture at least.
    """

    where: str
    amount: int | float
    min_experts: int

    def fraction(self, mixture: Mixture, dense: int) -> float:
        """Return the fraction that is removed of a mixture that had ``dense`` experts."""
        return fraction_of(self.amount, dense, f"experts of {mixture.path or 'the model'}")

    def kept(self, mixture: Mixture, dense: int | None = None, share: float | None = None) -> int:
        """Return how many experts are kept; groups stay equal, and each token gets as many as it needs.

        Args:
            mixture: The mixture as it is now.
            dense: Experts that it had before anything was removed; by default as many as now.
            share: Fraction of these that is removed; by default what ``amount`` says.

        Raises:
            PruningError: If each token needs more.
        """
        dense, groups = dense or mixture.experts, mixture.groups
        share = self.fraction(mixture, dense) if share is None else share
        left = dense // groups - number_to_prune(share, dense // groups)
        least = -(-self.min_experts // groups)
        left = min(groups * max(left, least), mixture.experts)
        if left < mixture.routed:
            name, most = f"experts of {mixture.path or 'the model'}", (dense - mixture.routed) // groups * groups
            raise PruningError(
                f"{self.where}(amount={self.amount!r}): each token needs {mixture.routed} {name}, so at most "
                f"{most} of {dense} can be removed. Lower amount, pass min_experts={mixture.routed}, or ignore it."
            )
        return left


def prunable_mixtures(
    model: nn.Module, example_inputs: ExampleInputs, part: Part, ignore: arguments.Modules, alone: Mapping[str, str]
) -> Mixtures:
    """Return the mixtures whose experts may be removed: within the part, not ignored, not of networks left alone.

    Raises:
        ValueError: If a pattern names no module.
        PruningError: If the model does not run.
    """
    why = dict.fromkeys(arguments.check_ignored(model, ignore), "named in ignore=")
    why |= {path: f"it is left alone: {reason}" for path, reason in alone.items()}
    kind = type(model).__name__
    try:
        mixtures, calls, others = find_mixtures(model, example_inputs)
    except Exception as error:
        reraise_out_of_memory(error)
        raise PruningError(f"{kind} does not run on the example inputs ({type(error).__name__}: {error}).") from error
    others |= {path: "it is outside of module=" for path in mixtures if not part.holds(path)}
    for pattern, reason in why.items():
        others |= {path: reason for path in mixtures if arguments.names_module(pattern, path)}
    mixtures = {path: candidates for path, candidates in mixtures.items() if path not in others}
    return Mixtures(mixtures, calls, others)


def refuse_none(model: nn.Module, mixtures: Mixtures) -> None:
    """Refuse a model without mixtures.

    Raises:
        PruningError: Saying why each is kept.
    """
    if not mixtures.found:
        kind = type(model).__name__
        raise PruningError(f"No mixture of experts can be pruned in {kind}. {in_words(mixtures.others)}")


def verified_cuts(
    model: nn.Module, mixtures: Mixtures, left: Mapping[str, int], scores: Mapping[str, Tensor]
) -> tuple[list[ExpertCut], dict[str, str]]:
    """Choose the experts with the highest scores, and verify each mixture with these alone; the model stays whole.

    Args:
        model: The model.
        mixtures: Its mixtures.
        left: By path: how many experts are kept. Mixtures that are not named are passed over.
        scores: By path: one score per expert, ``(experts,)``.

    Returns:
        Verified cuts; and by path, why a mixture is kept.
    """
    cuts, refused = [], dict[str, str]()
    for path, kept in left.items():
        candidates = mixtures.found[path]
        rows = scores[path].reshape(candidates[0].groups, -1)
        keep = torch.cat([keep_highest(row, kept // len(rows)) for row in rows])
        cut = verify_experts(model, candidates, keep.nonzero().flatten(), mixtures.calls[path])
        if isinstance(cut, ExpertCut):
            cuts.append(cut)
        else:
            refused[path] = cut
    return cuts, refused


def in_words(reasons: Mapping[str, str]) -> str:
    """Return the first reasons, with the paths of the mixtures."""
    return "; ".join(f"{path or 'the model'}: {reason}" for path, reason in list(reasons.items())[:5])
