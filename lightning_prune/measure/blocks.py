"""Finds the blocks that a model runs one after the other, such as a decoder's layers, and runs each by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.measure.calibration import Calibration
from lightning_prune.model.calls import tensors_in
from lightning_prune.model.sandbox import undisturbed

__all__ = ["Chain", "find_chain"]

_PLAIN = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)


class _Call(NamedTuple):
    """What a block was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self, but: int | str) -> list[Tensor]:
        """Return all tensors among the arguments, except for those at one place."""
        return list(tensors_in([value for place, value in _arguments(self) if place != but]))


@dataclass(frozen=True, eq=False)
class Chain:
    """Blocks of which each gets what the one before it made, beside arguments that depend on no block.

    Attributes:
        model: The model that they belong to.
        paths: The blocks' paths, in the order in which they run.
        place: Where a block takes what the one before made: the number or the name of an argument.
        bare: Whether every block returns one tensor, and none need run for the others to be called as they are.
    """

    model: nn.Module
    paths: tuple[str, ...]
    place: int | str
    bare: bool = False

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks."""
        return [self.model.get_submodule(path) for path in self.paths]

    def begin(self, calibration: Calibration) -> Stream:
        """Run the model on all batches up to the blocks, and return what the first of them gets."""
        calls: list[list[_Call]] = []
        for batch in calibration.batches:
            own: list[_Call] = []
            with undisturbed(self.model), suppress(_EnoughError), ExitStack() as stack:
                if self.bare:
                    stack.enter_context(_idle(self.blocks, self.place))
                stack.enter_context(_noted(self.blocks, own, stops=True))
                calibration.forward(self.model, batch)
            calls.append(own)
        return Stream(self.place, calls, [_at(own[0], self.place) for own in calls])

    @contextmanager
    def ending_in(self, made: Tensor) -> Iterator[None]:
        """Make the last block return a given tensor, inside the body; for use within ``undisturbed``."""

        def instead(module: nn.Module, args: Any, output: Any) -> Any:
            return made if isinstance(output, Tensor) else type(output)([made, *output[1:]])

        handle = self.blocks[-1].register_forward_hook(instead)
        try:
            yield
        finally:
            handle.remove()


@dataclass(eq=False)
class Stream:
    """What flows between two blocks, for every batch.

    Attributes:
        place: Where a block takes it.
        calls: For every batch, what each block is called with.
        hidden: For every batch, what the next block gets.
        made: For every batch, what the next block made of it when it ran last.
    """

    place: int | str
    calls: Sequence[Sequence[_Call]]
    hidden: list[Tensor]
    made: dict[int, Tensor] = field(default_factory=dict)

    def run(self, number: int, block: nn.Module, batch: int) -> None:
        """Run the block of a number on the batch of a number."""
        args, kwargs = _fresh(self.calls[batch][number])
        if isinstance(self.place, int):
            args = (*args[: self.place], self.hidden[batch], *args[self.place + 1 :])
        else:
            kwargs[self.place] = self.hidden[batch]
        self.made[batch] = _first(block(*args, **kwargs)).detach()

    def advance(self) -> None:
        """Go on to the next block: what the last one made is what it gets."""
        self.hidden = [self.made[batch] for batch in range(len(self.hidden))]
        self.made = {}


def find_chain(model: nn.Module, calibration: Calibration) -> Chain | None:
    """Find the blocks that hold most of a model's parameters and run one after the other, if there are such.

    They are the children of one container. That each depends on those before it through one tensor alone, and what
    comes behind them on the last one alone, is tried out on the first batch.
    """
    containers = []
    for path, module in model.named_modules():
        # A place of a container may be empty, so its blocks are its children.
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(list(module.children())) > 1:
            containers.append((sum(parameter.numel() for parameter in module.parameters()), path, module))
    for _, path, module in sorted(containers, key=lambda found: -found[0]):
        paths = tuple([f"{path}.{name}".lstrip(".") for name, _ in module.named_children()])
        blocks = list(module.children())
        if _shares_parameters(model, blocks):
            continue
        first = None
        with suppress(Exception):  # whatever fails here runs well as a whole
            first = _first_run(model, blocks, calibration)
        if first is None:
            continue
        chain = Chain(model, paths, first.place)
        for tried in (replace(chain, bare=True), chain) if first.bare else (chain,):
            with suppress(Exception):
                if _is_closed(tried, first, calibration):
                    return tried
    return None


def _shares_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Return whether a parameter of a block also lies elsewhere."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return any(holders[id(parameter)] > 1 for block in blocks for parameter in block.parameters())


class _FirstRun(NamedTuple):
    """A run of the model on the first batch: what blocks were called with and made, and what the model returned."""

    place: int | str
    calls: list[_Call]
    made: list[Tensor]
    bare: bool
    outputs: list[Tensor]


def _first_run(model: nn.Module, blocks: Sequence[nn.Module], calibration: Calibration) -> _FirstRun | None:
    """Run the model on the first batch, if all blocks run once, each on what the one before made."""
    calls: list[_Call] = []
    made: list[Any] = []
    with undisturbed(model), _noted(blocks, calls, made):
        outputs = list(tensors_in(calibration.forward(model, calibration.batches[0])))
    if len(calls) != len(blocks):
        return None
    found = set()
    for output, call in zip(made, calls[1:], strict=False):
        places = [place for place, value in _arguments(call) if value is _first(output)]
        if len(places) != 1:
            return None
        found.add(places[0])
    if len(found) != 1:
        return None
    bare = all(isinstance(output, Tensor) for output in made)
    return _FirstRun(found.pop(), calls, [_first(output) for output in made], bare, outputs)


def _is_closed(chain: Chain, first: _FirstRun, calibration: Calibration) -> bool:
    """Return whether blocks depend on those before through one tensor, and the rest of the model on the last alone."""
    model, blocks, batch = chain.model, chain.blocks, calibration.batches[0]
    stream = Stream(chain.place, [first.calls], [_at(first.calls[0], chain.place)])
    for number, block in enumerate(blocks):
        with undisturbed(block):
            stream.run(number, block, 0)
        if not torch.allclose(stream.made[0], first.made[number], rtol=1e-4, atol=1e-5, equal_nan=True):
            return False
        stream.hidden = [first.made[number]]

    others: list[_Call] = []
    changed = _idle(blocks, chain.place) if chain.bare else _disturbed(blocks[0])
    with undisturbed(model), chain.ending_in(first.made[-1]), changed, _noted(blocks, others):
        found = list(tensors_in(calibration.forward(model, batch)))
    pairs = list(zip(first.outputs, found, strict=True))
    for before, after in zip(first.calls, others, strict=True):
        pairs += zip(before.tensors(chain.place), after.tensors(chain.place), strict=True)
    return all(a.shape == b.shape and torch.allclose(a.double(), b.double(), equal_nan=True) for a, b in pairs)


@contextmanager
def _idle(blocks: Sequence[nn.Module], place: int | str) -> Iterator[None]:
    """Make blocks return what the one before made, without running, inside the body; within ``undisturbed``."""

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return args[place] if isinstance(place, int) else kwargs[place]

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = pass_on
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = own


@contextmanager
def _disturbed(block: nn.Module) -> Iterator[None]:
    """Make a block return something else, inside the body."""

    def instead(module: nn.Module, args: Any, output: Any) -> Any:
        made = _first(output)
        other = made + made.abs().mean() * torch.linspace(-1, 1, made.shape[-1], dtype=made.dtype, device=made.device)
        return other if isinstance(output, Tensor) else type(output)([other, *output[1:]])

    handle = block.register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()


class _EnoughError(Exception):
    """All blocks were called."""


@contextmanager
def _noted(
    blocks: Sequence[nn.Module], calls: list[_Call], outputs: list[Any] | None = None, stops: bool = False
) -> Iterator[None]:
    """Note with what the blocks are called, in order, and what they return; one call out of order ends it.

    Args:
        blocks: The blocks.
        calls: Gets what each is called with. Objects that calls may change, such as caches, are noted as they were
            when they were first seen.
        outputs: Gets what each returns.
        stops: Whether to stop when the last block is called.
    """
    firsts: dict[int, tuple[Any, Any]] = {}  # with the object itself, so that no other takes its number

    def as_first_seen(value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if id(value) not in firsts:
            firsts[id(value)] = value, copy.deepcopy(value)
        return firsts[id(value)][1]

    def before(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if number != len(calls):
                raise RuntimeError("The blocks do not run one after the other.")
            calls.append(_Call(*pytree.tree_map(as_first_seen, (args, dict(kwargs)), is_leaf=_is_opaque)))
            if stops and number == len(blocks) - 1:
                raise _EnoughError

        return note

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if outputs is not None:
            outputs.append(output)

    handles = []
    for number, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _arguments(call: _Call) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(call.args)
    yield from call.kwargs.items()


def _at(call: _Call, place: int | str) -> Tensor:
    return call.args[place] if isinstance(place, int) else call.kwargs[place]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _fresh(call: _Call) -> _Call:
    """Copy what a call may change, such as a cache."""
    return _Call(*pytree.tree_map(_copied, tuple(call), is_leaf=_is_opaque))


def _copied(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else copy.deepcopy(value)


def _is_opaque(value: Any) -> bool:
    """Return whether a value is looked at as a whole: a cache is, even if torch knows how to take it apart."""
    return type(value) not in (tuple, list, dict)
