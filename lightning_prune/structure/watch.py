"""Runs a model once with labels riding on its tensors; knows how to watch operators, not what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.inputs import ExampleInputs, modules_of, run, tensors_in
from lightning_prune.structure.hollow import NumbersNeededError, Shaped, reads, refuse_reading, shaper, writes
from lightning_prune.structure.labels import Labels, Ledger, Ran
from lightning_prune.structure.numbers import Number, Size, remember_
from lightning_prune.structure.rules import Call, Rule, pointwise_rule, rule_for, tensors_among, tested
from lightning_prune.structure.rules.frozen import compared, made_anew
from lightning_prune.structure.rules.movement import repeat
from lightning_prune.structure.rules.views import expand
from lightning_prune.structure.tensors import exchange_, named_tensors

__all__ = ["OtherOperatorsError", "alike", "exchanged", "unfused", "watch"]

_UNLABELLED = Labels(weight=True)
_ACTIVATION = Labels(weight=False)
_RIDING = "_lightning_prune_labels"
_SHAPE_READERS = {Tensor.shape.__get__, Tensor.size}  # type: ignore[attr-defined]
_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr}
_STRETCHING = {made_anew, expand, repeat}  # rules of what makes a tensor as long as others, of one without labels too
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_NOTHING: tuple[object, Labels] = (None, _UNLABELLED)


def watch(
    model: nn.Module,
    example_inputs: ExampleInputs,
    replaced: Mapping[str, Tensor],
    ledger: Ledger,
    labels: Mapping[str, Labels],
) -> list[Tensor]:
    """Run the model with labels, inside :func:`undisturbed`, pin what reaches its outputs, and return those.

    Args:
        model: The model; parameters and buffers named in ``replaced`` are exchanged for the run.
        example_inputs: What to call it on.
        replaced: Tensors to run with instead of the model's own, by name.
        ledger: Where meetings are written down; says whether anything is computed.
        labels: The labels that each parameter and buffer carries, by name.

    Raises:
        NumbersNeededError: If nothing is to be computed, and the model's code asks for numbers.
    """
    mode = _LabelMode(ledger)
    own = named_tensors(model)
    for name, tensor in own.items():
        mode.give(replaced.get(name, tensor), labels[name])
    for tensor in tensors_in(example_inputs):
        mode.give(tensor, _ACTIVATION)
    exchange_(model, replaced)
    if ledger.numbers:
        remember_(model, partial(compared, ledger))
    with unfused(), mode.knows_modules(model), mode, _NumberMode(mode) if ledger.numbers else nullcontext():
        outputs = run(model, example_inputs)
    ledger.running = ("", None)
    ledger.unseen = {name for name, tensor in own.items() if id(replaced.get(name, tensor)) not in mode.seen}
    tensors = list(tensors_in(outputs))
    for tensor in tensors:
        ledger.output_shapes.append(tuple(tensor.shape))
        for found in mode.labels_of(tensor).dims.values():
            ledger.pin(found, "reaches the model's output")
    if mode.refusal is not None:  # the model's own code may have caught it
        raise mode.refusal
    return tensors


@contextmanager
def exchanged(instead: Mapping[int, Callable[[], Tensor]], expected: Sequence[Ran] | None = None) -> Iterator[None]:
    """Let operators inside the block take other tensors.

    Args:
        instead: ``id`` of a tensor -> what makes the one that operators take in its place.
        expected: The operators that a trace wrote down, if they are to be the same ones.

    Raises:
        OtherOperatorsError: As soon as another operator runs, or its output has one index alone along other dimensions.
    """
    mode = _Exchange(instead, expected)
    with nullcontext() if expected is None else unfused(), mode:
        yield
    if expected is not None and mode.count < len(expected):
        raise OtherOperatorsError


class OtherOperatorsError(Exception):
    """A run came to other operators than it should."""


def _shape(out: Any) -> Sequence[int]:
    """Return the shape of an operator's output, or of the first of several."""
    if isinstance(out, Tensor):
        return out.shape
    first = tensors_among(out[:1]) if isinstance(out, list | tuple) else ()
    return first[0].shape if first else ()


def alike(ran: Ran, expected: Ran) -> bool:
    """Tell whether the same operator ran, with one index alone along the same dimensions of its output."""
    (func, shape), (other, full) = ran, expected
    return func is other and [size == 1 for size in shape] == [size == 1 for size in full]


class _Watch(TorchDispatchMode):
    """What every mode of this file is: none of them is ever compiled, so dynamo need not be told to keep out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each call, and imports all of dynamo at the first


class _Exchange(_Watch):
    """Lets every operator run, on other tensors where there are some instead, as long as it is the expected one."""

    def __init__(self, instead: Mapping[int, Callable[[], Tensor]], expected: Sequence[Ran] | None) -> None:
        super().__init__()
        self.instead = instead
        self.expected = expected
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            kwargs = {name: self._taken(value) for name, value in kwargs.items()}
        out = func(*[self._taken(value) for value in args], **(kwargs or {}))
        if self.expected is not None:
            if self.count == len(self.expected) or not alike((func, _shape(out)), self.expected[self.count]):
                raise OtherOperatorsError
            self.count += 1
        return out

    def _taken(self, value: Any) -> Any:
        make = self.instead.get(id(value))
        if make is not None:
            return make()
        return [self._taken(item) for item in value] if type(value) in (list, tuple) else value


class _Known(NamedTuple):
    """What a trace needs to know of an operator each time it runs."""

    func: Any
    rule: Rule
    shaped: Shaped | None
    reads: bool
    writes: bool


class _LabelMode(_Watch):
    """Looks up the rule of every operator that runs, and lets it pass labels on."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self._given: dict[int, tuple[Tensor, Labels]] = {}
        self._mark = object()  # tells this trace's labels from another's
        self._running: list[tuple[str, nn.Module | None]] = [("", None)]
        self._written: dict[int, Any] = {}  # storages that something hollow was written into, kept so that ids stay
        self.arguments: tuple[Any, ...] = ()  # args, kwargs and the Python function itself that is calling operators
        self.seen: set[int] = set()  # tensors given before the run that an operator took
        self._known: dict[int, _Known] = {}  # by ``id``, since an operator is slow to hash
        self.refusal: NumbersNeededError | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._known.get(id(func)) or self._learnt(func)
        tensors = tensors_among((*args, *kwargs.values()) if kwargs else args)
        found = [self.labels_of(tensor) for tensor in tensors]
        weight, labelled = True, False
        for labels in found:
            weight = weight and labels.weight
            labelled = labelled or bool(labels.dims)
        out, hollow = self._run(known, args, kwargs, tensors, found, weight)
        ledger, running = self.ledger, self._running[-1]
        ledger.ran.append((func, _shape(out)))
        if known.reads and not weight:
            ledger.decided.append(running[0])
        blank = known.rule is made_anew
        dims: Any = {}
        if labelled or (known.rule in _STRETCHING and self.arguments and out.numel()):
            ledger.running = (running[0], func)
            dims = known.rule(Call(ledger, func, args, kwargs, out, self.labels_of, running, self.arguments, self._lay))
        for tensor, own in ((out, dims),) if isinstance(out, Tensor) else _outputs(out, dims):
            if not all(own.values()):
                own = {d: labels for d, labels in own.items() if labels}
            made = weight and not blank and (labelled or not own)
            self._lay(tensor, Labels(own, made, blank, hollow))
        return out

    def _learnt(self, func: Any) -> _Known:
        rule = rule_for(func) or (pointwise_rule if torch.Tag.pointwise in func.tags else tested)
        known = self._known[id(func)] = _Known(func, rule, shaper(func), reads(func), writes(func))
        return known

    def _run(
        self, known: _Known, args: Any, kwargs: Any, tensors: list[Tensor], found: list[Labels], weight: bool
    ) -> tuple[Any, bool]:
        """Return what an operator returns, and whether that was not computed."""
        if not self.ledger.hollow:
            return known.func(*args, **kwargs), False
        hollow = [t for t, labels in zip(tensors, found, strict=True) if labels.hollow]
        if self._written and len(hollow) < len(tensors):
            hollow = [t for t, labels in zip(tensors, found, strict=True) if labels.hollow or self._written_into(t)]
        shaped = None if weight and not hollow else known.shaped
        out = None if shaped is None else shaped(*args, **kwargs)
        if hollow and out is None:
            self.refuse(known.func, hollow)
            out = known.func(*args, **kwargs)
        if out is None:
            return known.func(*args, **kwargs), False
        if known.writes and not found[0].hollow:
            self._written[tensors[0].untyped_storage()._cdata] = tensors[0].untyped_storage()
        return out, True

    def _written_into(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._written

    def refuse(self, func: Any, tensors: Iterable[Tensor]) -> None:
        """Refuse to go on where entries are asked for that were not computed."""
        try:
            refuse_reading(func, tensors)
        except NumbersNeededError as error:
            self.refusal = error
            raise

    def read(self, func: Any, values: Any) -> None:
        """Take note that Python reads entries of tensors, other than by an operator."""
        read = [(tensor, self.labels_of(tensor)) for tensor in tensors_among(values)]
        if any(not labels.weight for _, labels in read):
            self.ledger.decided.append(self._running[-1][0])
        if any(labels.hollow or self._written_into(tensor) for tensor, labels in read):
            self.refusal = NumbersNeededError(f"{func.__name__} reads numbers that were not computed")
            raise self.refusal

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
        names = {id(module): name for name, module in modules_of(model)}

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
        kwargs = kwargs or {}
        if func in _SHAPE_READERS:
            return self._remembering(args[0], func(*args, **kwargs), args[1:])
        if func in _READERS:
            self._labels.read(func, args)
        self._labels.arguments = args, kwargs, func
        try:
            if func in _RECURRENT:
                with _in_steps():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        finally:
            self._labels.arguments = ()

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
