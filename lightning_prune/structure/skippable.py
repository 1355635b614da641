"""Finds the layers of a model that can be left out: whose output one of their inputs, or nothing, can stand in for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.model.calls import ExampleInputs, modules_of, run, same_draws
from lightning_prune.model.output_forms import Place, form_of, main_output, places_of
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure.tracer import unfused

__all__ = ["Branches", "Depth", "SkippableLayer", "find_skippable", "is_inside", "outermost_of", "parts_of"]

_aten = torch.ops.aten
_ADDS = frozenset({_aten.add, _aten.add_})
# Of zeros, these operators make zeros again, whatever their other inputs are.
_LINEAR = frozenset({
    _aten.mul, _aten.mul_, _aten.div, _aten.div_, _aten.neg, _aten.view, _aten._unsafe_view, _aten.reshape,
    _aten._reshape_alias, _aten.permute, _aten.transpose, _aten.t, _aten.clone, _aten.contiguous, _aten._to_copy,
    _aten.native_dropout, _aten.alias, _aten.detach, _aten.squeeze, _aten.unsqueeze, _aten.flatten, _aten.roll,
})  # fmt: skip


# How large numbers are, by which norms divide them: of zeros, whatever this is, the quotient is zero.
_OF_SIZE = frozenset({
    _aten.pow, _aten.mean, _aten.sum, _aten.abs, _aten.sqrt, _aten.rsqrt, _aten.reciprocal, _aten.add, _aten.clamp,
    _aten._to_copy, _aten.linalg_vector_norm, _aten.div, _aten.mul, _aten.view, _aten.expand,
})  # fmt: skip


@dataclass(frozen=True)
class SkippableLayer:
    """A module that can be left out.

    Attributes:
        path: The first path of the module.
        source: Where each of its calls holds the input that has the shape and dtype of its output.
        fill: ``"input"`` if that input stands in for the output; ``"zeros"`` if the output is only added to something
            else, as that of a residual branch is: then nothing is added.
        form: What lies around the output: a tuple, a dataclass (see :mod:`lightning_prune.model.output_forms`).
        shape: Shape of the output on the example inputs.
        params: Parameters that leave with it: those that no other module holds.
        calls: How often one run of the model calls it.
        parts: Paths of the skippable layers directly inside.
    """

    path: str
    source: Place
    fill: Literal["input", "zeros"]
    form: list[Any]
    shape: tuple[int, ...]
    params: int
    calls: int
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Depth:
    """The layers of a model that can be left out, and why others cannot.

    Attributes:
        layers: By path, in the order in which they are first called; a layer may lie inside another.
        others: Path of a module that holds weights -> why it cannot be left out.
    """

    layers: dict[str, SkippableLayer] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def outermost(self) -> list[str]:
        """Paths of the layers that lie in no other."""
        return outermost_of(self.layers)

    def without(self, why: Mapping[str, str]) -> Depth:
        """Return the same without some layers; ``why`` by path."""
        left = {}
        for path, layer in self.layers.items():
            if path not in why:
                left[path] = layer
        found = Depth(left, {**self.others, **why})
        return Depth(_with_parts(left), found.others)

    def within(self, dense: Collection[str]) -> Depth:
        """Return the layers that the dense model had, by path.

        Once widths have shrunk, others may return what their inputs could stand for: a head with as many inputs as
        there are classes.
        """
        return self.without(dict.fromkeys(self.layers.keys() - set(dense), "it was no layer of the dense model"))


def outermost_of(paths: Iterable[str]) -> list[str]:
    """Return the paths that lie in none of the others, in their order."""
    given = list(paths)
    found: set[str] = set()
    for path in sorted(given, key=len):
        if not is_inside(path, found):
            found.add(path)
    return [path for path in given if path in found]


def is_inside(path: str, others: Iterable[str]) -> bool:
    """Return whether a path lies below one of the others."""
    return any(path.startswith(f"{other}.") for other in others)


def parts_of(depth: Depth, path: str) -> list[str]:
    """Return the paths of all layers inside of a layer."""
    found: list[str] = []
    waiting = list(depth.layers[path].parts)
    while waiting:
        part = waiting.pop()
        found.append(part)
        waiting += depth.layers[part].parts
    return found


@dataclass
class _Calls:
    """What the calls of one module have in common; ``reason`` if that is too little."""

    source: Place = field(default_factory=list)
    form: list[Any] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    count: int = 0
    reason: str = ""
    numbers: list[int] = field(default_factory=list)
    residual: bool = True  # whether each output was a sum with that input


def find_skippable(model: nn.Module, example_inputs: ExampleInputs) -> Depth:
    """Find the layers of a model that can be left out, in one forward pass in eval mode.

    A module counts if it holds weights of two or more dimensions and each of its calls returns, as it is or inside a
    tuple, dict or dataclass, a tensor of the shape and dtype of one of its inputs. Left out are: what only strings
    together other layers, the same weights under a second path, and single weights inside of a layer.

    Args:
        model: Any module that runs; it is left as found.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
    """
    held = _weights_held(model)
    calls = {path: _Calls() for path in held if path}
    branches = Branches()
    with undisturbed(model, example_inputs), same_draws(), unfused(), branches:
        for path in calls:
            module = model.get_submodule(path)
            module.register_forward_hook(partial(_look, calls[path], branches), with_kwargs=True)
        run(model, example_inputs)
    layers: dict[str, SkippableLayer] = {}
    others: dict[str, str] = {}
    for path in sorted(calls, key=lambda path: min(calls[path].numbers, default=0)):
        seen = calls[path]
        if not seen.count:
            others[path] = "it is not called on the example inputs"
        elif seen.reason:
            others[path] = seen.reason
        else:
            # Nothing in place of a sum with its input would drop what came in, too.
            added = not seen.residual and all(branches.only_added(number) for number in seen.numbers)
            fill: Literal["input", "zeros"] = "zeros" if added else "input"
            params = _own_params(model, path)
            layers[path] = SkippableLayer(path, seen.source, fill, seen.form, seen.shape, params, seen.count)
    others |= _not_layers(model, layers, held)
    layers = {path: layer for path, layer in layers.items() if path not in others}
    order = sorted(layers, key=lambda path: (calls[path].numbers[0], path.count(".")))
    return Depth(_with_parts({path: layers[path] for path in order}), others)


def _look(seen: _Calls, branches: Branches, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Compare what a call was given with what it returned."""
    seen.count += 1
    main = main_output(output)
    seen.numbers.append(branches.made(main))
    if seen.reason:
        return
    if main is None:
        seen.reason = "it returns no floating-point tensor"
        return
    held = places_of(module, args, kwargs)
    inputs = [own for own in held if own.tensor.shape == main.shape and own.tensor.dtype == main.dtype]
    inputs.sort(key=lambda own: not branches.is_term(own.tensor, main))  # what the output is a sum with comes first
    alike = [own.place for own in inputs]
    if not alike:
        seen.reason = f"it returns shape {tuple(main.shape)}, and no input has that shape and dtype"
        return
    if seen.count > 1:
        alike = [place for place in alike if place == seen.source]
    form = form_of(output, held)
    if seen.count > 1 and not (alike and form == seen.form):
        seen.reason = "its calls take or return different things"
        return
    seen.source, seen.form, seen.shape = alike[0], form, tuple(main.shape)
    source = next(own.tensor for own in inputs if own.place == seen.source)
    seen.residual = seen.residual and branches.is_term(source, main)


class Branches(TorchDispatchMode):
    """Follows outputs of modules to the operators that use them.

    Args:
        receive: Gets, of each addition, the number of the output, what it is added to, and the sum.
    """

    def __init__(self, receive: Any = None) -> None:
        super().__init__()
        self._receive = receive
        self._held: list[Tensor] = []  # so that no other tensor takes the identity of one
        self._numbers: dict[int, set[int]] = {}  # id of a tensor -> outputs of which it is zero where they are zero
        self._uses: list[set[str]] = []  # of each output
        self._terms: dict[int, set[int]] = {}  # id of a sum -> ids of the tensors that it is a sum of
        self._factors: dict[int, set[int]] = {}  # id of a tensor -> outputs that it depends on, only to multiply them

    def made(self, output: Tensor | None) -> int:
        """Follow an output from here on; return its number."""
        number = len(self._uses)
        self._uses.append(set())
        if output is not None:
            self._note(output, {number})
        return number

    def only_added(self, number: int) -> bool:
        """Return whether all uses of an output were additions to something that does not depend on it."""
        return self._uses[number] == {"added"}

    def is_term(self, tensor: Tensor, total: Tensor) -> bool:
        """Return whether ``total`` is a sum of ``tensor`` and more, as a residual block returns one of its input."""
        return id(tensor) in self._terms.get(id(total), ())

    def _note(self, tensor: Tensor, numbers: set[int]) -> None:
        self._held.append(tensor)
        self._numbers.setdefault(id(tensor), set()).update(numbers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _ADDS and all(isinstance(term, Tensor) and term.dim() for term in args[:2]):
            terms = args
            if packet is _aten.add_ and self._receive is not None and self._numbers.get(id(args[1])):
                terms = (args[0].clone(), *args[1:])  # the sum takes its memory
            out = func(*args, **(kwargs or {}))
            for term in args[:2]:
                self._use(self._factors.get(id(term), ()))
            if self._receive is None:
                self._sum(args[:2], out)
            self._add(terms, out)
            return out
        out = func(*args, **(kwargs or {}))
        made = out[0] if isinstance(out, tuple | list) else out
        given = list(_tensors_given(args, kwargs))
        zeros: set[int] = set()  # outputs that make this one zero
        for position, value in enumerate(given):
            numbers = self._numbers.get(id(value), set())
            if packet in _LINEAR and (position == 0 or packet is _aten.mul):
                zeros |= numbers
            elif packet in _OF_SIZE and position == 0:
                self._note_factor(made, numbers)
            else:
                self._use(numbers)
        for value in given:
            factors = self._factors.get(id(value), set()) - zeros
            if packet in _OF_SIZE:
                self._note_factor(made, factors)
            else:
                self._use(factors)
        if zeros:
            self._note(made, zeros)
        return out

    def _sum(self, terms: Sequence[Tensor], out: Tensor) -> None:
        self._held += [*terms, out]
        found = self._terms.setdefault(id(out), set())
        for term in terms:
            found |= {id(term)} | self._terms.get(id(term), set())

    def _use(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._uses[number].add("used")

    def _note_factor(self, tensor: Tensor, numbers: set[int]) -> None:
        if numbers:
            self._held.append(tensor)
            self._factors.setdefault(id(tensor), set()).update(numbers)

    def _add(self, args: Any, out: Tensor) -> None:
        terms = [self._numbers.get(id(value), set()) if isinstance(value, Tensor) else set() for value in args[:2]]
        for own, other, which in ((terms[0], terms[1], 1), (terms[1], terms[0], 0)):
            for number in own:
                added = isinstance(args[which], Tensor) and number not in other and args[which].shape == out.shape
                self._uses[number].add("added" if added else "used")
                if added and self._receive is not None:
                    self._receive(number, args[which], out)
        if args and id(args[0]) == id(out):  # written in place: it is no output any more
            self._numbers.pop(id(out), None)


def _tensors_given(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def _weights_held(model: nn.Module) -> dict[str, frozenset[int]]:
    """Return, for every module with weights of two or more dimensions below it, their identities."""
    found = {}
    for path, module in modules_of(model):
        weights = frozenset(id(parameter) for parameter in module.parameters() if parameter.dim() > 1)
        if weights:
            found[path] = weights
    return found


def _own_params(model: nn.Module, path: str) -> int:
    """Count the parameters that leave with a module: those that no module outside of it holds."""
    inside = {id(module) for module in model.get_submodule(path).modules()}
    outside: set[int] = set()
    for _, module in modules_of(model):
        if id(module) not in inside:
            outside.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    own = model.get_submodule(path).parameters()
    return sum(parameter.numel() for parameter in own if id(parameter) not in outside)


def _not_layers(
    model: nn.Module, layers: Mapping[str, SkippableLayer], held: Mapping[str, frozenset[int]]
) -> dict[str, str]:
    """Return which modules that can be skipped are not layers of their own, and why."""
    everything = held[""]
    composite = {path for path in layers if _is_composite(model, path)}
    why: dict[str, str] = {}
    for path in layers:
        if held[path] == everything:
            why[path] = "it holds all weights of the model"
        elif not layers[path].params:
            why[path] = "other modules hold all of its parameters, too"
    for path in layers:
        around = [other for other in layers if path.startswith(f"{other}.")]
        same = [other for other in around if other not in why and held[other] == held[path]]
        if path not in why and same:
            why[path] = f"it holds the same weights as {same[0]}"
    for path in composite - why.keys():
        inside = [other for other in composite if other.startswith(f"{path}.") and layers[other].fill == "input"]
        inside = [other for other in inside if other not in why or "same weights" not in why[other]]
        outermost = outermost_of(inside)
        weight = sum(len(held[one]) for one in outermost)
        if len(outermost) > 1 and 2 * weight > len(held[path]):
            why[path] = f"it strings together {len(outermost)} layers, which can be left out one by one"
    for path in layers.keys() - composite:
        around = [other for other in composite if path.startswith(f"{other}.") and other not in why]
        if around and path not in why:
            why[path] = f"it is a single module inside of {around[0]}"
    return why


def _is_composite(model: nn.Module, path: str) -> bool:
    """Return whether weights lie in modules below a module."""
    module = model.get_submodule(path)
    own = {id(parameter) for parameter in module._parameters.values()}
    return any(id(parameter) not in own and parameter.dim() > 1 for parameter in module.parameters())


def _with_parts(layers: Mapping[str, SkippableLayer]) -> dict[str, SkippableLayer]:
    """Return layers, each with those directly inside of it."""
    found = {}
    for path, layer in layers.items():
        inside = [other for other in layers if is_inside(other, [path])]
        found[path] = replace(layer, parts=tuple(outermost_of(inside)))
    return found
