"""Removes experts of mixtures, and verifies that the slim mixture is the dense one without them; decides nothing.

What is removed can never be chosen in the reference: its scores are minus infinity, also where a vector was added.
A copy of the mixture with random weights runs on random inputs, dense and slim, so that nothing hides behind weights
that are equal, tiny or never chosen. Then the rest of the model runs behind the slim mixtures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import ExampleInputs, modules_of, run, same_draws, tensors_in
from lightning_prune.model.devices import devices_of, widest_float
from lightning_prune.model.errors import PruningError, failures_suppressed, reraise_out_of_memory
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure import named_tensors
from lightning_prune.structure.mixtures import Mixture, RouterMode
from lightning_prune.surgery import attributes
from lightning_prune.surgery.configs import follow_configs
from lightning_prune.surgery.cut import Cut, cut_
from lightning_prune.surgery.recipe import drop_unused_recipe_, recipe_of
from lightning_prune.surgery.recipe_part import keep_experts_
from lightning_prune.surgery.resize import all_or_nothing, with_wrapped
from lightning_prune.surgery.skipped import drop_state_

__all__ = ["ExpertCut", "remove_experts_", "take_out_experts_", "temporarily_without", "verify_experts"]

_TRIALS = (3, 24)  # random inputs: at least, and at most until every kept expert was chosen
_SINGLE = "it returns a single number, such as a balancing loss, that changes otherwise than by a factor"
_OTHER = "it returns something else than with scores of minus infinity for these experts, as soft mixtures do"
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}  # routers often compute in float32


class ExpertCut(NamedTuple):
    """The removal of all but the ``kept`` experts of a mixture, by ascending numbers, ``(kept,)``.

    ``numbers`` are the attributes that follow, as ``(module path, name)``; ``missed`` says what was not compared.
    """

    mixture: Mixture
    kept: Tensor
    numbers: tuple[tuple[str, str], ...] = ()
    missed: str = ""


def remove_experts_(
    model: nn.Module, example_inputs: ExampleInputs, cuts: list[ExpertCut], optimizers: Iterable[Optimizer] = ()
) -> tuple[Cut, str]:
    """Remove experts, and what optimizers hold of them; configs follow. The rest of the model is verified.

    It runs on what mixtures return if the removed experts cannot be chosen, so that rounding changes no choice. If it
    computes something else, the model is as it was.

    Returns:
        What changed besides containers of experts, and why a config cannot express the pruned model.
    """
    taped = [(cut, list[Any]()) for cut in cuts]
    with _without(model, cuts):
        expected = _run_rest(model, example_inputs, taped, replay=False)
    recipe_of(model)  # so that its state is restored, too
    try:
        with all_or_nothing(model, with_wrapped(optimizers)):
            made = take_out_experts_(model, cuts, optimizers)
            found = _run_rest(model, example_inputs, taped, replay=True)
            half = any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors_in(found))
            reason = _compared(expected, found, cuts[0], 2e-2 if half else 1e-4)
            if reason and all(cut.mixture.path for cut in cuts):  # a model that is a mixture has no rest
                raise PruningError(reason)
    except Exception as error:
        reraise_out_of_memory(error)
        kind = type(model).__name__
        raise PruningError(f"{kind} cannot lose experts, since of what lies outside of mixtures: {error}") from error
    finally:
        drop_unused_recipe_(model)
    return made


def take_out_experts_(
    model: nn.Module, cuts: Iterable[ExpertCut], optimizers: Iterable[Optimizer] = ()
) -> tuple[Cut, str]:
    """Remove experts, and what optimizers hold of them; configs follow. Nothing is run: the cuts are verified.

    Returns:
        What changed besides containers of experts, and why a config cannot express the pruned model.
    """
    optimizers, recipe = with_wrapped(optimizers), recipe_of(model)
    own, modules = named_tensors(model), dict(modules_of(model))
    cut, known, gone = Cut({}, {}, {}, ()), [], set[str]()
    for mixture, kept, numbers, _ in cuts:
        for inner, dim in mixture.tensors.items():
            name = mixture.name(inner)
            cut.kept[name] = {dim: kept}
            cut.shapes[name] = (*own[name].shape[:dim], len(kept), *own[name].shape[dim + 1 :])
        for path, name in [(mixture.name(inner), name) for inner, name in numbers]:
            held = attributes.held_number(modules[path], name)
            known.append(attributes.AttributeChange(path, name, held, len(kept)))
        for path in map(mixture.name, mixture.lists):
            gone |= {f"{path}.{name}" for name in list(modules[path]._modules)[len(kept) :]}
    changes = attributes.shape_attributes(model, cut.shapes, known)
    told = {(one.module, one.name): one.new for one in changes}
    followed = follow_configs(model, cut.shapes, told, cut.kept, gone, remedy="Remove as many experts of every mixture")
    cut = Cut({}, cut.kept, cut.shapes, (*changes, *followed.changes))
    with all_or_nothing(model, optimizers):
        before = {id(parameter) for parameter in model.parameters()}
        for mixture, kept, _, _ in cuts:
            for inner in mixture.lists:
                keep_experts_(modules[mixture.name(inner)], kept.tolist())
        # What configs become follows from shapes; but lists of experts have no shape.
        recipe.note((change.module, change.name) for change in (cut.attributes if gone else changes))
        cut_(model, cut, cut.tensors(model), optimizers)
        drop_state_(optimizers, before - {id(parameter) for parameter in model.parameters()})
    return cut, followed.inexpressible


class _UndoneError(Exception):
    """Ends a block whose removals are taken back."""


@contextmanager
def temporarily_without(
    model: nn.Module, example_inputs: ExampleInputs, cuts: list[ExpertCut]
) -> Iterator[tuple[attributes.AttributeChange, ...]]:
    """Leave experts out inside the block, and yield which attributes of modules follow.

    Raises:
        PruningError: If the rest of the model computes something else without them.
    """
    try:
        with all_or_nothing(model):
            made, _ = remove_experts_(model, example_inputs, cuts)
            yield made.attributes
            raise _UndoneError
    except _UndoneError:
        pass


def _run_rest(model: nn.Module, example_inputs: ExampleInputs, taped: Iterable[Any], replay: bool) -> Any:
    """Run a model, and note on tapes what its mixtures return, or make them return what was noted."""

    def hook(cut: ExpertCut, tape: list[Any], *of: Any) -> Any:
        if not replay or not cut.mixture.path:
            return tape.append(of[2])
        noted = tensors_in(tape.pop(0))
        pairs = [(own, _restricted(next(noted), own, cut)) for own in tensors_in(of[2])]
        values = iter([dense if own.is_floating_point() else own for own, dense in pairs])  # others number experts
        return pytree.tree_map_only(Tensor, lambda _: next(values), of[2])

    with undisturbed(model, example_inputs), same_draws():  # which removes the hooks
        for cut, tape in taped:
            model.get_submodule(cut.mixture.path).register_forward_hook(partial(hook, cut, tape))
        return run(model, example_inputs)


def _without(model: nn.Module, cuts: list[ExpertCut]) -> RouterMode:
    """Return a mode in which removed experts cannot be chosen."""
    routers = {cut.mixture.name(router): cut for cut in cuts for router in cut.mixture.routers}
    experts = {name: cut.mixture.experts for name, cut in routers.items()}
    stay = {name: torch.isin(torch.arange(experts[name]), cut.kept) for name, cut in routers.items()}
    return RouterMode(model, experts, {name: (~kept).nonzero().flatten() for name, kept in stay.items()})


@torch.no_grad()
def verify_experts(model: nn.Module, candidates: Iterable[Mixture], kept: Tensor, call: Any) -> ExpertCut | str:
    """Return the removal of all but the ``kept`` experts, verified on a copy of a mixture; or why that is kept."""
    reasons = []
    for mixture in candidates:
        home = model.get_submodule(mixture.path)
        with undisturbed(home, call), same_draws():
            widest = {widest_float(device) for device in devices_of(home)}
            dtypes = [dtype for dtype in _TOLERANCES if widest == {torch.float64} or dtype is not torch.float64]
            copies = ((*_copy(home, call, dtype), _TOLERANCES[dtype]) for dtype in dtypes)
            dense, inputs, tolerance = next((made for made in copies if _outcome(*made[:2])), (home, None, 0.0))
            if inputs is None:
                return "a copy of it runs neither in float64 nor in float32"
            used = _numbers_used(dense, mixture.experts, inputs)
            # All of them follow; or one name is a width, which is the number of experts by chance.
            for other in ("", *dict.fromkeys(name for _, name in used)):
                numbers = tuple([place for place in used if place[1] != other])
                cut, missed = ExpertCut(mixture._replace(path=""), kept, numbers), ""
                try:
                    slim = copy.deepcopy(dense.eval())
                    take_out_experts_(slim, [cut])
                    reason, missed = _differs(dense, slim, cut, inputs, tolerance)
                    if not reason and _outcome(dense.train(), inputs) and not _outcome(slim.train(), inputs):
                        reason = "without some experts it does not run in train mode"
                except Exception as error:
                    reraise_out_of_memory(error)
                    reason = f"without some experts it does not run ({type(error).__name__}: {error})"
                if not reason:
                    return ExpertCut(mixture, kept, numbers, missed)
                reasons.append(reason)
    return reasons[0]


def _differs(dense: nn.Module, slim: nn.Module, cut: ExpertCut, call: Any, tolerance: float) -> tuple[str, str]:
    """Return what differs from a mixture in which removed experts cannot be chosen, and what was not compared."""
    mode, unseen, single = _without(dense, [cut]), 0, ""
    for trial in range(_TRIALS[1]):
        with mode:
            expected = _run(dense, call, trial)
        if not all(scores.seen for scores in mode.of.values()):
            return "its router is not multiplied with the inputs in every run", ""
        reason = _compared(expected, _run(slim, call, trial), cut, tolerance)
        if reason and reason != _SINGLE:
            return reason, ""
        single = single or reason
        chosen = [scores.chosen for scores in mode.of.values()]
        unseen = len(set(cut.kept.tolist()).difference(*chosen)) * all(chosen)
        if trial + 1 >= _TRIALS[0] and not unseen:
            break
    return "", single or f"{unseen} experts were chosen by no input" * bool(unseen)


def _compared(expected: Any, found: Any, cut: ExpertCut, tolerance: float) -> str:
    """Return what differs between outputs of the dense and the slim mixture; empty if nothing does."""
    one, other = list(tensors_in(expected)), list(tensors_in(found))
    experts, count, single = cut.mixture.experts, len(cut.kept), ""
    telling = any(tensor.dim() and tensor.is_floating_point() for tensor in other)  # more than a loss
    if len(one) != len(other) or not one:
        return _OTHER
    for dense, slim in zip(one, other, strict=True):
        dense = _restricted(dense, slim, cut)
        same = torch.equal(dense, slim)
        if dense.shape != slim.shape:
            return _OTHER
        if dense.dtype == torch.int64 and bool(((dense >= 0) & (dense < experts)).all()):  # numbers of experts
            place = torch.full((experts,), -1).index_copy(0, cut.kept, torch.arange(count)).to(dense.device)
            same = same or torch.equal(place[dense], slim)
        elif dense.is_floating_point() and dense.numel():
            allowed = tolerance * float(dense.masked_fill(~dense.isfinite(), 0).abs().max())
            # Losses that balance experts are multiplied, or divided, by the number of experts.
            for factor in (1.0, count / experts, experts / count)[: 1 + 2 * (telling and not dense.dim())]:
                same = same or torch.allclose(slim, dense * factor, 0.0, allowed)
        if not same and (dense.dim() or not telling or not slim.isfinite()):
            return _OTHER
        single = single or _SINGLE * (not same)
    return single


def _restricted(dense: Tensor, slim: Tensor, cut: ExpertCut) -> Tensor:
    """Return a tensor of the dense model on the experts that are kept, where the slim one has fewer entries."""
    for dim in range(dense.dim()) if dense.dim() == slim.dim() else ():
        if dense.shape[dim] == cut.mixture.experts and slim.shape[dim] == len(cut.kept):
            dense = dense.index_select(dim, cut.kept.to(dense.device))
    return dense


def _copy(home: nn.Module, call: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a copy with random weights of ordinary size, and the arguments of a call, in a dtype."""
    memo: dict[int, Any] = {}
    for _, module in modules_of(home):
        for tensor in tensors_in([value for name, value in vars(module).items() if not name.startswith("_")]):
            if not tensor.is_leaf:  # such as a loss that the last forward pass left there
                memo[id(tensor)] = tensor.detach().clone()
    dense, generator = copy.deepcopy(home, memo).to(dtype), torch.Generator().manual_seed(0)
    for tensor in named_tensors(dense).values():
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or tensor.dim() < 2):
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            vector = tensor.dim() < 2  # a variance stays positive
            tensor.copy_(tensor + drawn.abs() * 0.05 if vector else drawn / max(tensor.shape[1:]) ** 0.5)
    return dense, pytree.tree_map_only(Tensor, lambda own: own.to(dtype) if own.is_floating_point() else own, call)


def _run(module: nn.Module, call: Any, trial: int) -> Any:
    """Run a module on random numbers in the place of the floating-point arguments of a call."""
    generator = torch.Generator().manual_seed(trial)

    def drawn(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor.clone()

    args, kwargs = pytree.tree_map_only(Tensor, drawn, call)
    torch.manual_seed(trial)
    with _Still():
        return module(*args, **kwargs)


class _Still(TorchFunctionMode):
    """Makes noise that is drawn for each score the same: of fewer scores other numbers would be drawn."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.fill_(0.3) if func in (torch.randn_like, torch.rand_like) else out


def _outcome(module: nn.Module, call: Any) -> list[Tensor]:
    """Return the tensors that a module returns, or none if it fails."""
    with failures_suppressed():
        return list(tensors_in(_run(module, call, 0)))
    return []


def _numbers_used(dense: nn.Module, experts: int, call: Any) -> list[tuple[str, str]]:
    """Return where modules, or configs in them, hold the number of experts, if code fails or changes without it."""
    places, used = [], {}
    for path, module in modules_of(dense):
        for name, value in vars(module).items():
            plain = hasattr(value, "__dict__") and not callable(value)
            below = value if isinstance(value, dict) else vars(value) if plain else ()
            places += [(path, module, leaf) for leaf in (name, *(f"{name}.{leaf}" for leaf in below))]
    for training in (False, True):
        expected = _outcome(dense.train(training), call)
        for path, module, name in places if expected else ():  # train mode may need what is not here
            value = attributes.held_number(module, name)
            if type(value) is int and value == experts and attributes.follows_cuts(module, name):
                attributes.set_number_(module, name, object())
                found = _outcome(dense, call)
                attributes.set_number_(module, name, value)
                if len(found) != len(expected) or not all(map(torch.equal, expected, found)):
                    used[path, name] = True
    return list(used)
