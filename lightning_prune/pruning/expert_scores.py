"""Scores the experts of mixtures: by what they add to the output, how often they are chosen, or their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import call_on, tensors_in
from lightning_prune.model.devices import widened
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure import named_tensors
from lightning_prune.structure.mixtures import Mixture

__all__ = ["ExpertCriterion", "experts_read", "score_experts"]

ExpertCriterion = Literal["reap", "frequency", "magnitude", "random"]


def experts_read(criterion: ExpertCriterion) -> bool:
    """Return whether a criterion reads batches of data."""
    return criterion in ("reap", "frequency")


def score_experts(
    model: nn.Module,
    mixtures: Iterable[Mixture],
    criterion: ExpertCriterion,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = call_on,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return one score per expert, ``(experts,)``, by path of the mixture; higher is kept longer.

    Args:
        model: The model.
        mixtures: Its mixtures.
        criterion: How experts are scored.
        batches: What the model is run on, for criteria that read data.
        forward: Runs the model on a batch.
        over_processes: Adds up sums of several processes.
    """
    mixtures = list(mixtures)
    if criterion == "random":
        return {mixture.path: torch.rand(mixture.experts, dtype=torch.float64) for mixture in mixtures}
    if criterion == "magnitude":
        return {mixture.path: _norms(model.get_submodule(mixture.path), mixture) for mixture in mixtures}
    # Over the tokens that each expert gets: the sum of the norm of its output times its gate; and their number.
    use = {mixture.path: torch.zeros(2, mixture.experts, dtype=torch.float64) for mixture in mixtures}
    for batch in batches:
        with undisturbed(model, batch):  # which removes the hooks
            for mixture in mixtures:
                hook = partial(_measure, mixture, use[mixture.path], [])
                model.get_submodule(mixture.path).register_forward_hook(hook, with_kwargs=True)
            forward(model, batch)
    if over_processes is not None:
        use = {path: over_processes(sums) for path, sums in use.items()}
    if criterion == "frequency":
        return {path: counts for path, (_, counts) in use.items()}
    return {path: norms / counts.clamp(min=1) for path, (norms, counts) in use.items()}


def _norms(home: nn.Module, mixture: Mixture) -> Tensor:
    """Return the l2 norm of the weights of each expert, ``(experts,)``; rows of routers do not count."""
    squares, own = torch.zeros(mixture.experts, dtype=torch.float64), named_tensors(home)
    for name, dim in mixture.tensors.items():
        if own[name].dim() > 2:  # fused weights
            squares += _squares(own[name].movedim(dim, 0).flatten(1))
    for path in mixture.lists:
        for number, expert in enumerate(home.get_submodule(path).children()):
            for weight in expert.parameters():
                squares[number] += _squares(weight.reshape(1, -1))[0]
    return squares.sqrt()


def _squares(rows: Tensor) -> Tensor:
    return widened(rows.detach()).square().sum(1).cpu().double()


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
