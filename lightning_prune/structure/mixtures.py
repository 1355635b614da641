"""Finds what may be mixtures of experts, by shapes and products; ``surgery/remove_experts.py`` verifies removals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import ExampleInputs, mode_of, modules_of, run
from lightning_prune.model.errors import failures_suppressed
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure.tensor_names import lies_in, named_tensors

__all__ = ["Mixture", "RouterMode", "find_mixtures"]

_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "einsum", "inner"})
_SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "sub_", "__isub__"})
_LEVELS = 4  # modules around the experts that may hold their router
_LONELY = "no matrix with a row for each of its experts is multiplied with its inputs (soft mixtures are not prunable)"


class Mixture(NamedTuple):
    """A mixture of experts. Names are relative to ``path``, the module that routes and adds up.

    ``routers`` are matrices that score the experts, ``lists`` containers with a module for each, ``tensors`` names with
    the dimension that counts experts. An input goes to ``routed`` experts (0: to all); ``groups`` divide the scores.
    """

    path: str
    experts: int
    routers: tuple[str, ...]
    lists: tuple[str, ...]
    tensors: dict[str, int]
    routed: int
    groups: int

    def name(self, inner: str) -> str:
        """Return a name in the whole model."""
        return f"{self.path}.{inner}".strip(".")


@dataclass(eq=False)
class _Scores:
    """What code does with the scores that a matrix gives."""

    router: str
    experts: int
    seen: bool = False
    routed: int = 0
    groups: int = 1
    chosen: set[int] = field(default_factory=set)

    def watch(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note how many experts a function of the scores chooses, which, and whether it divides them into groups."""
        if name in ("topk", "max", "argmax"):
            given = (
                dict(zip(("input", "k", "dim") if name == "topk" else ("input", "dim"), args, strict=False)) | kwargs
            )
            dim = given.get("dim", {"topk": -1}.get(name))
            if type(dim) is int and args[0].shape[dim] == self.experts:
                self.routed = max(int(given.get("k", 1)), self.routed)
                numbers = out[1] if isinstance(out, tuple) else out
                self.chosen.update(numbers.unique().tolist())
        elif name in ("view", "reshape", "unflatten") and args[0].shape[-1] == self.experts and out.dim() > 1:
            rows, columns = out.shape[-2:]
            if rows > 1 and columns > 1 and rows * columns == self.experts:
                self.groups = rows


class RouterMode(TorchFunctionMode):
    """Watches what code does with the scores that ``routers`` give, and sets those of ``gone`` to minus infinity."""

    def __init__(self, model: nn.Module, routers: Mapping[str, int], gone: Mapping[str, Tensor]) -> None:
        super().__init__()
        own, self._gone = named_tensors(model), gone
        self.of = {name: _Scores(name, experts) for name, experts in routers.items()}
        # Tensors are held, so that no ``id`` is used twice.
        self._weights: dict[int, tuple[Tensor, _Scores]] = {id(own[n]): (own[n], of) for n, of in self.of.items()}
        self._scores: dict[int, tuple[Tensor, _Scores]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for _, of in [self._scores[id(tensor)] for tensor in given if id(tensor) in self._scores][:1]:
            vector = any(tensor.numel() == of.experts for tensor in given)
            if name in _SUMS and vector and out.dim() > 1 and out.shape[-1] == of.experts:
                self._block_(out, of)  # such as a correction of sigmoids, which are bounded
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == of.experts:
                    self._scores[id(tensor)] = tensor, of
            if args and isinstance(args[0], Tensor) and args[0].dim():
                of.watch(name, args, kwargs or {}, out)
        for weight, of in [self._weights[id(tensor)] for tensor in given if id(tensor) in self._weights]:
            if name in _PRODUCTS and out.dim() and out.shape[-1] == of.experts:
                of.seen = True
                self._scores[id(out)] = out, of
                self._block_(out, of)
            elif name not in _PRODUCTS and isinstance(out, Tensor) and out.numel() == weight.numel():
                self._weights[id(out)] = out, of  # a cast, a transpose, a norm of its rows
        return out

    def _block_(self, scores: Tensor, of: _Scores) -> None:
        if of.router in self._gone:
            scores.index_fill_(-1, self._gone[of.router].to(scores.device), -torch.inf)


class _Place(NamedTuple):
    path: str
    experts: int
    is_list: bool


def find_mixtures(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[dict[str, list[Mixture]], dict[str, Any], dict[str, str]]:
    """Find what may be mixtures of experts: alike modules in a container, or fused weights, and what scores them.

    Returns:
        By path of the module that routes: candidates, likeliest first; and arguments of its first call. By path of what
        may be experts: why nothing routes to them.
    """
    places, lonely, calls, mixtures = _places(model), list[_Place](), dict[str, Any](), dict[str, list[Mixture]]()
    sizes, routers, own = {place.experts for place in places}, dict[str, int](), named_tensors(model)
    for name, tensor in own.items():
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 2 and sizes.intersection(tensor.shape):
            routers[name] = next(size for size in tensor.shape if size in sizes)
    mode, in_training = RouterMode(model, routers, {}), RouterMode(model, routers, {})
    with undisturbed(model, example_inputs), mode:  # which removes the hooks
        for path in {path for place in places for path in _around(place.path)}:
            hook = model.get_submodule(path).register_forward_pre_hook
            hook(lambda _, *call, path=path: calls.setdefault(path, call) and None, with_kwargs=True)
        run(model, example_inputs)
    with failures_suppressed(), undisturbed(model, example_inputs), mode_of(model, True), in_training:
        run(model, example_inputs)
    seen = [of for of in mode.of.values() if of.seen]
    noisy = [of for name, of in in_training.of.items() if of.seen and not mode.of[name].seen]
    for place in places:
        home, inner, scoring = _router_near(place, places, seen)
        caller = next((path for path in _around(home) if path in calls), None)  # None: run by another method
        if not scoring:
            lonely.append(place)
        elif caller is not None and caller not in mixtures:
            sets = [*([of] for of in scoring), *([scoring] if len(scoring) > 1 else [])]
            found = [_mixture(model, caller, home, inner, some, noisy) for some in sets]
            # Of square matrices either rows or columns may belong to experts.
            turned = [one._replace(tensors=one.tensors | dict.fromkeys(one.routers, 1)) for one in found]
            found += [one for one in turned if one not in found]
            mixtures[caller] = sorted(found, key=lambda one: not one.routed)
    # Where there are mixtures, alike modules in other lists are layers.
    others = {place.path: _LONELY for place in lonely if not (place.is_list and mixtures)}
    return mixtures, calls, others


def _places(model: nn.Module) -> list[_Place]:
    """Return where there may be experts: containers of alike modules, and modules with weights of three dimensions."""
    found = []
    for path, module in modules_of(model):
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            kinds = set()
            for child in module.children():
                kinds.add((type(child), *((name, own.dim()) for name, own in named_tensors(child).items())))
            if len(module) > 1 and len(kinds) == 1 and len(*kinds) > 1:
                found.append(_Place(path, len(module), True))
        elif not _is_of_torch(module):
            sizes = {p.shape[0] for p in module._parameters.values() if p is not None and p.dim() > 2}
            found += [_Place(path, size, False) for size in sorted(sizes) if size > 1]
    return found


def _router_near(
    place: _Place, places: list[_Place], scoring: list[_Scores]
) -> tuple[str, list[_Place], list[_Scores]]:
    """Return the closest module around experts with what may be a router, the experts in it, and these routers."""
    for home in _around(place.path)[:_LEVELS]:
        inner = [other for other in places if other.experts == place.experts and lies_in(other.path, home)]
        own = [of for of in scoring if of.experts == place.experts and lies_in(of.router, home)]
        own = [of for of in own if not any(other.is_list and lies_in(of.router, other.path) for other in inner)]
        if own:
            return home, inner, own
    return "", [], []


def _mixture(
    model: nn.Module, path: str, home: str, inner: list[_Place], scoring: list[_Scores], noisy: list[_Scores]
) -> Mixture:
    """Return a mixture with all that has an entry for each expert: routers, their biases and noise, fused experts."""
    own, start, experts = named_tensors(model), len(path) + 1 if path else 0, scoring[0].experts
    own = {name[start:]: tensor for name, tensor in own.items() if lies_in(name, home)}
    rows = [of.router[start:] for of in (*scoring, *noisy) if of.experts == experts and of.router[start:] in own]
    tensors = {name: list(own[name].shape).index(experts) for name in rows}
    owners = {name.rpartition(".")[0] for name in tensors}
    fused = {place.path[start:] for place in inner if not place.is_list}
    lists = tuple(place.path[start:] for place in inner if place.is_list)
    for name, tensor in own.items():
        owner = name.rpartition(".")[0]
        in_list = any(owner != path and lies_in(owner, path) for path in lists)
        if name not in tensors and not in_list and tensor.shape[:1] == (experts,):
            is_of_router = owner in owners or not _is_of_torch(model.get_submodule(path).get_submodule(owner))
            if (is_of_router and tensor.dim() == 1) or (owner in fused and tensor.dim() > 1):
                tensors[name] = 0
    routers, routed = tuple(rows[: len(scoring)]), max(of.routed for of in scoring)
    return Mixture(path, experts, routers, lists, tensors, routed, max(of.groups for of in scoring))


def _around(path: str) -> list[str]:
    """Return a path, and those of the modules around it, from the inside."""
    parts = path.split(".")
    return list(dict.fromkeys(".".join(parts[:count]) for count in range(len(parts), -1, -1)))


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
