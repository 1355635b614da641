"""Running a model without side effects: whatever its forward pass changes is undone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from lightning_prune.model.calls import modules_of, refuse_shapeless
from lightning_prune.model.global_state import GlobalState, global_containers
from lightning_prune.model.interrupts import undone_by
from lightning_prune.model.object_graph import ObjectGraph
from lightning_prune.model.tensor_state import WriteGuard

__all__ = ["remembered_once", "unchanged", "undisturbed"]

_SMALL = 2**16  # bytes; copying so few costs no more than watching for writes to them
_FUNCTIONS = frozenset({FunctionType, MethodType})


class _Remembered:
    """A model's modules and the state of all that they lead to, as they stood when this was made."""

    def __init__(self, model: nn.Module, copied: bool) -> None:
        refuse_shapeless(model)
        self.modules = [module for _, module in modules_of(model)]
        self.graph = ObjectGraph([*self.modules, *global_containers()], math.inf if copied else _SMALL, copied)
        self.uncompiled = _uncompiled(self.modules)


class _Once:
    """The state of a model that several bodies of :func:`undisturbed` restore, once the first of them has noted it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state: _Remembered | None = None


_once: ContextVar[_Once | None] = ContextVar("once", default=None)


@contextmanager
def remembered_once(model: nn.Module) -> Iterator[None]:
    """Look through a model once for all bodies of :func:`undisturbed` inside this block.

    Each of these leaves the model as it was, so that what the first one noted holds for the next. Nothing else in the
    block may change the model, or run code of users.
    """
    once = _once.get()
    if once is not None and once.model is model:  # a block around this one has begun it
        yield
        return
    token = _once.set(_Once(model))
    try:
        yield
    finally:
        _once.reset(token)


@contextmanager
def undisturbed(model: nn.Module, *beside: Any, watched: bool = False, copied: bool = False) -> Iterator[None]:
    """Run the body in eval mode without gradients, then restore all that it changed of the model and the process.

    Modules compiled by torch.compile run their original code, since compiled code cannot be traced. What a forward pass
    writes is undone, wherever the model leads to it (see :class:`~lightning_prune.model.object_graph.ObjectGraph`):
    parameters, buffers and other tensors, attributes, containers, hooks, class attributes, closures, random generators;
    so are the settings of torch, and the random state of Python, NumPy and torch. Ctrl-C waits until that is done.

    What cannot be undone: what is written to files, sent elsewhere or done in C; generators that were advanced.

    Args:
        model: The model.
        beside: Inputs and whatever else the body hands to the model; restored in the same way.
        watched: Whether the body runs the model under a mode that calls
            :func:`~lightning_prune.model.tensor_state.keep` before writes, so that no other mode is needed.
        copied: Whether all tensors are copied before, to the CPU, rather than once they are written to. The mode that
            watches for writes costs some microseconds for every operator, and ``torch.jit.trace`` records other
            operators under it: so do this where the body measures time or is traced by torch.

    Raises:
        PruningError: If a parameter or buffer has no shape yet.
    """
    once = _once.get()
    if copied or once is None or once.model is not model:
        once = _Once(model)
    remembered, once.state = once.state or _Remembered(model, copied), None
    graph = remembered.graph
    others = ObjectGraph(beside, math.inf)
    process = GlobalState(graph.tensors.devices | others.tensors.devices)

    def undo() -> None:
        with ExitStack() as stack:  # if one fails, the others are restored all the same
            for state in (others, graph, process):
                stack.callback(state.restore_)
        once.state = remembered

    token = _once.set(None)  # in the body the model is another one, and so it is for a body in there
    try:
        with undone_by(undo):
            graph.begin_()
            others.begin_()
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(graph.tensors.watching())
                if graph.tensors.watched and not watched:
                    stack.enter_context(WriteGuard())
                for module in remembered.modules:
                    if module.training:
                        module.training = False
                for module, written in remembered.uncompiled:
                    vars(module).update(written)
                yield
    finally:
        _once.reset(token)


@contextmanager
def unchanged(*objects: Any) -> Iterator[None]:
    """Run the body, then restore what it changed of objects such as a batch; see :func:`undisturbed`."""
    graph = ObjectGraph(objects, math.inf)
    with undone_by(graph.restore_):
        graph.begin_()
        yield


def _uncompiled(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return the attributes that torch.compile replaced on modules, with their original values."""
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    compiled_forward: dict[type, Any] = {}  # class -> its ``forward`` if that was compiled in the class, else None
    for module in modules:
        kind, own = type(module), vars(module)
        if kind not in compiled_forward:
            forward = getattr(kind, "forward", None)
            compiled_forward[kind] = forward if hasattr(forward, "_torchdynamo_orig_callable") else None
        functions: dict[str, Any] = {}
        if not _FUNCTIONS.isdisjoint(map(type, own.values())):
            functions = {name: value for name, value in own.items() if type(value) in _FUNCTIONS}
        if compiled_forward[kind] is not None and "forward" not in functions:
            functions["forward"] = MethodType(compiled_forward[kind], module)
        original: dict[str, Any] = {}
        if "_compiled_call_impl" in own:  # set by ``module.compile()``
            original["_compiled_call_impl"] = None
        for name, value in functions.items():
            function = getattr(value, "_torchdynamo_orig_callable", None)
            if function is None:
                continue
            # A method compiled in the class remembers the plain function, which needs its ``self`` back.
            if inspect.ismethod(value) and not inspect.ismethod(function):
                function = MethodType(function, module)
            original[name] = function
        if original:
            found.append((module, original))
    return found
