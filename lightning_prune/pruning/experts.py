"""Removes whole experts of mixtures in plain PyTorch: find, score, verify, remove; knows no Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_prune.algorithms.selection import keep_highest, number_to_prune
from lightning_prune.measure.footprint import WHOLE, count
from lightning_prune.model.calls import ExampleInputs, call_on, refuse_empty, refuse_shapeless, tensors_in
from lightning_prune.model.devices import widened
from lightning_prune.model.errors import PruningError, reraise_out_of_memory
from lightning_prune.model.inference_mode import changes_model, ordinary
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.pruning import arguments
from lightning_prune.pruning.amounts import check_amount, check_single, fraction_of
from lightning_prune.pruning.left_alone import left_alone
from lightning_prune.pruning.report import GroupWidth, Report
from lightning_prune.structure import Pinned, named_tensors
from lightning_prune.structure.mixtures import Mixture, find_mixtures
from lightning_prune.surgery.experts import ExpertCut, remove_experts_, verify_experts

__all__ = ["prune_experts"]

ExpertCriterion = Literal["reap", "frequency", "random"]
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
    ignore: arguments.Modules = (),
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
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
            of its gate times the norm of its output. ``frequency``: number of tokens that it gets. ``random``.
        batches: Batches of data, a list or loader that can be read once. By default the example inputs.
        ignore: Patterns of module paths, or modules, whose mixtures are not pruned, nor those inside of them.
        optimizer: The optimizer or optimizers that train the model; their state follows. Parameters that were removed
            leave their groups.

    Returns:
        A report whose ``groups`` are the mixtures, with their numbers of experts.

    Raises:
        PruningError: If no mixture can be pruned, or each token needs more experts. The model is as it was.

    References:
        Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (arXiv:2510.13999), eq. 9.
    """
    where = "prune_experts"
    check_single(where, amount)
    check_amount(where, amount)
    arguments.check_choice(where, "criterion", criterion, get_args(ExpertCriterion))
    arguments.check_list(where, "ignore", ignore)
    optimizers = arguments.optimizers_of(where, model, optimizer)
    arguments.check_optimizers(where, optimizers)
    refuse_empty(example_inputs)
    refuse_shapeless(model)
    why = dict.fromkeys(arguments.check_ignored(model, ignore), "named in ignore=")
    why |= {path: f"it is left alone: {reason}" for path, reason in left_alone(model).items()}
    kind = type(model).__name__
    try:
        mixtures, calls, others = find_mixtures(model, example_inputs)
    except Exception as error:
        reraise_out_of_memory(error)
        raise PruningError(f"{kind} does not run on the example inputs ({type(error).__name__}: {error}).") from error
    for pattern, reason in why.items():
        others |= {path: reason for path in mixtures if arguments.names_module(pattern, path)}
    mixtures = {path: candidates for path, candidates in mixtures.items() if path not in others}
    if not mixtures:
        raise PruningError(f"No mixture of experts can be pruned in {kind}. {_in_words(others)}")
    likeliest = [mixture for mixture, *_ in mixtures.values()]
    leave = {mixture.path: _number_to_remove(mixture, amount) for mixture in likeliest}
    scores = _scores(model, likeliest, criterion, [example_inputs] if batches is None else ordinary(batches))
    cuts, refused = [], dict[str, str]()
    for path, candidates in mixtures.items():
        rows = scores[path].reshape(candidates[0].groups, -1)
        keep = torch.cat([keep_highest(row, len(row) - leave[path] // len(rows)) for row in rows])
        cut = verify_experts(model, candidates, keep.nonzero().flatten(), calls[path])
        if isinstance(cut, ExpertCut):
            cuts.append(cut)
        else:
            refused[path] = cut
    if not cuts:
        raise PruningError(f"No experts of {kind} can be removed. {_in_words(refused | others)}")
    dense, params = count(model, example_inputs), WHOLE.params(model)
    made, config = remove_experts_(model, example_inputs, cuts, optimizers)
    for told in filter(None, [config, _in_words(refused)]):
        warnings.warn(f"{where}: {told}", stacklevel=3)  # behind this, its decorator
    slim, experts = count(model, example_inputs), sum(mixture.experts for mixture in likeliest)
    missed = [f"Not compared, {one.mixture.path or 'the model'}: {one.missed}." for one in cuts if one.missed]
    return Report(
        params_before=params, params_after=WHOLE.params(model), flops_before=dense.total, flops_after=slim.total,
        groups=tuple(GroupWidth(one.mixture.path, one.mixture.experts, len(one.kept)) for one in cuts),
        kept=made.kept, attributes=made.attributes,
        pinned=tuple(Pinned(path, 0, 0, 0, reason) for path, reason in (refused | others).items()),
        proved=not missed, proof=" ".join([_PROOF, *missed]), asked=sum(leave.values()) / experts,
        reached=sum(one.mixture.experts - len(one.kept) for one in cuts) / experts, counted=slim.counted, config=config,
    )  # fmt: skip


def _number_to_remove(mixture: Mixture, amount: int | float) -> int:
    """Return how many experts of a mixture are removed; groups stay equal, and each token gets as many as it needs."""
    experts, groups, name = mixture.experts, mixture.groups, f"experts of {mixture.path or 'the model'}"
    leave = groups * number_to_prune(fraction_of(amount, experts, name), experts // groups)
    if experts - leave < mixture.routed:
        raise PruningError(
            f"prune_experts(amount={amount!r}): each token needs {mixture.routed} {name}, so at most "
            f"{(experts - mixture.routed) // groups * groups} of {experts} can be removed. Lower amount, or ignore it."
        )
    return leave


def _in_words(reasons: dict[str, str]) -> str:
    return "; ".join(f"{path or 'the model'}: {reason}" for path, reason in list(reasons.items())[:5])


def _scores(
    model: nn.Module, mixtures: list[Mixture], criterion: ExpertCriterion, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Return one score per expert, by path of the mixture."""
    # Over the tokens that each expert gets: the sum of the norm of its output times its gate; and their number.
    use = {mixture.path: torch.zeros(2, mixture.experts, dtype=torch.float64) for mixture in mixtures}
    if criterion == "random":
        return {path: torch.rand(own.shape[1]) for path, own in use.items()}
    for batch in batches:
        with undisturbed(model, batch):  # which removes the hooks
            for mixture in mixtures:
                hook = partial(_measure, mixture, use[mixture.path], [])
                model.get_submodule(mixture.path).register_forward_hook(hook, with_kwargs=True)
            call_on(model, batch)
    if criterion == "frequency":
        return {path: counts for path, (_, counts) in use.items()}
    return {path: norms / counts.clamp(min=1) for path, (norms, counts) in use.items()}


def _measure(mixture: Mixture, use: Tensor, busy: list[bool], home: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
    """Run a mixture once more for every expert, without it: an expert adds its output times its gate; a hook."""
    if busy:  # a run without an expert
        return
    busy.append(True)
    # The output has the shape of an input, or else is the first: scores may be returned, too.
    shapes = {tensor.shape for tensor in tensors_in((args, kwargs))}
    whole = None
    for expert in (-1, *range(mixture.experts)):
        torch.manual_seed(0)  # some add noise to scores, always
        given = tensors_in(_run_without(home, mixture, expert, args, kwargs))
        outputs = [tensor for tensor in given if tensor.is_floating_point() and tensor.dim()]
        if not outputs:
            raise PruningError(f"{mixture.path or 'The model'} returns no numbers on the batches to score experts by.")
        own = next((tensor for tensor in outputs if tensor.shape in shapes), outputs[0])
        if whole is None:
            whole = own
            continue
        norms = widened(whole - own).norm(dim=-1).cpu().double()
        use[:, expert] += torch.stack([norms.sum(), (norms > 0).double().sum()])
    busy.clear()


def _run_without(home: nn.Module, mixture: Mixture, expert: int, args: Any, kwargs: Any) -> Any:
    """Run a mixture in which the output of one expert is zero (-1: of none), and the scores are what they were."""
    own, silenced = named_tensors(home), dict[str, Tensor]()
    if expert < 0:
        return home(*args, **kwargs)
    for name, dim in mixture.tensors.items():
        if name not in mixture.routers and own[name].dim() > 1:
            silenced[name] = own[name].detach().clone()
            silenced[name].select(dim, expert).zero_()
    with ExitStack() as hooks:
        for path in mixture.lists:
            hook = list(home.get_submodule(path).children())[expert].register_forward_hook
            hooks.enter_context(hook(lambda *of: pytree.tree_map_only(Tensor, torch.zeros_like, of[2])))
        return torch.func.functional_call(home, silenced, args, kwargs)
