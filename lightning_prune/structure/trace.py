"""Runs a model once with labels riding on its tensors; knows how to watch operators, not what they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs, as_call, refuse_shapeless, tensors_in, undisturbed
from lightning_prune.structure.labels import Labels, Ledger
from lightning_prune.structure.numbers import Number, Size, numbers_in, remember_
from lightning_prune.structure.rules import Call, pointwise_rule, rule_for, tensors_among, unknown
from lightning_prune.structure.rules.frozen import compared, made_anew

__all__ = ["exchange_", "named_tensors", "trace", "unfused"]

_UNLABELLED = Labels(weight=True)
_ACTIVATION = Labels(weight=False)
_RIDING = "_lightning_prune_labels"
_SHAPE_READERS = {Tensor.shape.__get__, Tensor.size}  # type: ignore[attr-defined]
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_NOTHING: tuple[object, Labels] = (None, _UNLABELLED)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under the first of its names."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():  # one walk where named_parameters and named_buffers take two
        for found, own in ((parameters, module._parameters), (buffers, module._buffers)):
            for leaf, tensor in own.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{leaf}" if path else leaf] = tensor
    return parameters | buffers


def exchange_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put other tensors where parameters and buffers are, under all their names; ``undisturbed`` takes this back."""
    if not tensors:
        return
    own = named_tensors(model)
    other = {id(own[name]): tensor for name, tensor in tensors.items()}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if id(tensor) in other:
                    held[leaf] = other[id(tensor)]  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Ledger:
    """Run the model once on example inputs and write down which channels met.

    Costs about one forward pass. Mode, RNG, buffers and module attributes are left as found.

    Raises:
        PruningError: If the model does not run on the example inputs, or has parameters without a shape.
    """
    refuse_shapeless(model)
    with suppress(Exception):  # some code takes plain numbers alone
        return _traced(model, example_inputs, numbers=True)
    try:
        return _traced(model, example_inputs, numbers=False)
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs in eval mode ({type(error).__name__}: {error})"
            ". Pass example_inputs that its forward accepts: a tensor, a tuple of positional inputs or a dict of "
            "keyword inputs."
        ) from error


def _traced(model: nn.Module, example_inputs: ExampleInputs, numbers: bool) -> Ledger:
    ledger = Ledger()
    labels = {name: ledger.register(name, tensor) for name, tensor in named_tensors(model).items()}
    ledger.numbers = numbers
    with undisturbed(model):
        watch(model, example_inputs, {}, ledger, labels)
    _follow_siblings(model, ledger, labels)
    return ledger


def _follow_siblings(model: nn.Module, ledger: Ledger, labels: Mapping[str, Labels]) -> None:
    """Let modules that did not run, such as experts that no example came to, go with one beside them that did."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    for parent in model.modules():
        ran: dict[object, list[str]] = {}
        for child in sorted(parent.children(), key=lambda child: _idle(child, names, ledger)):
            own = [(leaf, tuple(tensor.shape), names[id(tensor)]) for leaf, tensor in named_tensors(child).items()]
            kind = (type(child), *((leaf, shape) for leaf, shape, _ in own))
            first = ran.setdefault(kind, [name for _, _, name in own])
            if own and _idle(child, names, ledger) and not set(first) <= ledger.unseen:
                for name, other in zip((name for _, _, name in own), first, strict=True):
                    for dim, found in labels[name].dims.items():
                        ledger.meet(found[0].atoms, labels[other].dims[dim][0].atoms)


def _idle(module: nn.Module, names: Mapping[int, str], ledger: Ledger) -> bool:
    """Tell whether no operator took any tensor of a module."""
    return all(names[id(tensor)] in ledger.unseen for tensor in named_tensors(module).values())


def watch(
    model: nn.Module,
    example_inputs: ExampleInputs,
    replaced: Mapping[str, Tensor],
    ledger: Ledger,
    labels: Mapping[str, Labels],
    *,
    meta: bool = False,
) -> list[Tensor]:
    """Run the model with labels, inside :func:`undisturbed`, pin what reaches its outputs, and return those.

    Args:
        model: The model; parameters and buffers named in ``replaced`` are exchanged for the run.
        example_inputs: What to call it on.
        replaced: Tensors to run with instead of the model's own, by name.
        ledger: Where meetings are written down.
        labels: The labels that each parameter and buffer carries, by name.
        meta: Whether ``replaced`` and ``example_inputs`` lie on the meta device, so that nothing is computed.
    """
    args, kwargs = as_call(example_inputs)
    mode = _LabelMode(ledger, meta)
    for name, tensor in named_tensors(model).items():
        mode.give(replaced.get(name, tensor), labels[name])
    for tensor in tensors_in((args, kwargs)):
        mode.give(tensor, _ACTIVATION)
    exchange_(model, replaced)
    if ledger.numbers:
        remember_(model, partial(compared, ledger))
    with unfused(), mode.knows_modules(model), mode, _NumberMode(mode) if ledger.numbers else nullcontext():
        outputs = model(*args, **kwargs)
    ledger.running = ("", None)
    ledger.unseen = {name for name, tensor in named_tensors(model).items() if id(tensor) not in mode.seen}
    tensors = list(tensors_in(outputs))
    for tensor in tensors:
        ledger.output_shapes.append(tuple(tensor.shape))
        for found in mode.labels_of(tensor).dims.values():
            ledger.pin(found, "reaches the model's output")
    return tensors


class _LabelMode(TorchDispatchMode):
    """Looks up the rule of every operator that runs, and lets it pass labels on."""

    def __init__(self, ledger: Ledger, meta: bool) -> None:
        super().__init__()
        self.ledger = ledger
        self._given: dict[int, tuple[Tensor, Labels]] = {}
        self._mark = object()  # tells this trace's labels from another's
        self._meta = meta
        self._running: list[tuple[str, nn.Module | None]] = [("", None)]
        self.asked: tuple[int, ...] = ()
        self.seen: set[int] = set()  # tensors given before the run that an operator took

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._meta:
            out = func(*_on_meta(args), **dict(zip(kwargs, _on_meta(tuple(kwargs.values())), strict=True)))
        else:
            out = func(*args, **kwargs)
        found = [self.labels_of(t) for t in tensors_among((*args, *kwargs.values()))]
        blank = rule_for(func) is made_anew
        weight = all(labels.weight for labels in found) and not blank
        if (blank and self.asked) or any(labels.dims for labels in found):
            self.ledger.running = (self._running[-1][0], func)
            call = Call(self.ledger, func, args, kwargs, out, self.labels_of, self._running[-1], self.asked, self._lay)
            rule = rule_for(func) or (pointwise_rule if torch.Tag.pointwise in func.tags else unknown)
            dims = rule(call)
        else:
            dims = {}
        for tensor, own in _outputs(out, dims):
            self._lay(tensor, Labels({d: found for d, found in own.items() if found}, weight, blank))
        return out

    def give(self, tensor: Tensor, labels: Labels) -> None:
        """Let a tensor that is there before the run carry labels; it is kept, and nothing is written on it."""
        self._given[id(tensor)] = tensor, labels

    def labels_of(self, tensor: Tensor) -> Labels:
        """Return the labels that a tensor carries."""
        given = self._given.get(id(tensor))
        if given is not None:
            self.seen.add(id(tensor))
            return given[1]
        mark, labels = getattr(tensor, _RIDING, _NOTHING)
        return labels if mark is self._mark else _UNLABELLED

    def _lay(self, tensor: Tensor, labels: Labels) -> None:
        if id(tensor) in self._given:  # written in place
            self.give(tensor, labels)
        else:
            setattr(tensor, _RIDING, (self._mark, labels))  # leaves with the tensor; a table of weak keys costs more

    @contextmanager
    def knows_modules(self, model: nn.Module) -> Iterator[None]:
        """Know, inside the block, which module of the model is running."""
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: nn.Module, args: Any) -> None:
            self._running.append((names.get(id(module), self._running[-1][0]), module))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._running.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _NumberMode(TorchFunctionMode):
    """Lets sizes remember the labels they count, and tells rules which numbers Python asked an operator for."""

    def __init__(self, labels: _LabelMode) -> None:
        super().__init__()
        self._labels = labels
        self._compared = partial(compared, labels.ledger)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHAPE_READERS:
            return self._remembering(args[0], func(*args, **(kwargs or {})), args[1:])
        self._labels.asked = tuple(numbers_in((args, tuple(kwargs.values()) if kwargs else ())))
        try:
            with _in_steps() if func in _RECURRENT else nullcontext():
                return func(*args, **(kwargs or {}))
        finally:
            self._labels.asked = ()

    def _remembering(self, tensor: Tensor, sizes: Any, dim: Any) -> Any:
        dims = self._labels.labels_of(tensor).dims
        if not dims:
            return sizes
        if isinstance(sizes, int):
            found = dims.get(int(dim[0]) % tensor.dim() if dim else -1)
            return Number(sizes, Size(found), self._compared) if found else sizes
        return torch.Size(
            [Number(size, Size(dims[d]), self._compared) if d in dims else size for d, size in enumerate(sizes)]
        )


def _outputs(out: Any, dims: Any) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(out, Tensor):
        yield out, dims
    elif isinstance(out, list | tuple):
        for i, part in enumerate(out):
            if isinstance(part, Tensor):
                yield part, dims[i] if isinstance(dims, list) else {}


def _on_meta(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.to("meta") if isinstance(value, Tensor) and not value.is_meta and value.dim()
        else type(value)(_on_meta(tuple(value))) if type(value) in (list, tuple)
        else value
        for value in values
    )  # fmt: skip


@contextmanager
def _in_steps() -> Iterator[None]:
    """Run recurrent layers step by step: those of oneDNN and cuDNN cannot be looked into."""
    libraries = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.set_flags(_enabled=False)[0] for library in libraries]
    try:
        yield
    finally:
        for library, before in zip(libraries, enabled, strict=True):
            library.set_flags(_enabled=before)


@contextmanager
def unfused() -> Iterator[None]:
    """Take attention apart into products, which have rules."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
