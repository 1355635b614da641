"""What tensors hold, so that it can be restored; large ones are copied only when they are written to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.model.errors import reraise_out_of_memory

__all__ = ["TensorStates", "WriteGuard", "keep", "places_written", "updates_nothing", "written_by"]

_ORDINARY = frozenset({Tensor, nn.Parameter})  # never without shape
_WRITTEN_UNSAID = frozenset({"running_mean", "running_var"})  # BatchNorm writes to them, which schemas do not say
_FEW = 2**12  # bytes; vectors as small are copied and compared in one piece, since an operator costs more than they do
_TRAINING = frozenset({"training", "train", "use_input_stats"})  # unless this argument of it is False


class _State(NamedTuple):
    """What a tensor was.

    Attributes:
        tensor: The tensor.
        alias: Another tensor on the same storage, which keeps shape and strides.
        version: How often it had been written to, as torch counts.
        requires_grad: As the tensor's.
        gradient: The tensor's ``grad``, itself.
        hooks: The tensor's hooks, itself.
    """

    tensor: Tensor
    alias: Tensor
    version: int | None
    requires_grad: bool
    gradient: Tensor | None
    hooks: Any


class TensorStates:
    """Tensors and what they held: values, shape, gradient, hooks.

    Args:
        copied_below: Bytes; larger tensors, and those on other devices than the CPU, are copied when an operator is
            about to write to them, inside :meth:`watching`, by a mode that calls :func:`keep`. Infinity copies all.
        on_cpu: Whether copies are made on the CPU.
    """

    def __init__(self, copied_below: float, on_cpu: bool) -> None:
        self.devices: set[torch.device] = set()
        self.watched: dict[int, list[int]] = {}  # storage -> places of the tensors on it that are not copied yet
        self._copied_below = copied_below
        self._on_cpu = on_cpu
        self._states: list[_State] = []
        self._copies: dict[int, Tensor] = {}  # place of the tensor -> its values
        self._small: dict[torch.dtype, list[int]] = {}  # places of vectors that are still to be copied together
        self._together: list[tuple[list[int], Tensor]] = []  # places, and the values of all of them

    def add(self, tensor: Tensor) -> None:
        """Note what a tensor holds."""
        if type(tensor) not in _ORDINARY and is_lazy(tensor):
            return
        place = len(self._states)
        gradient, hooks = (tensor.grad, tensor._backward_hooks) if tensor.is_leaf else (None, None)
        state = _State(tensor, tensor.detach(), _version(tensor), tensor.requires_grad, gradient, hooks)
        self._states.append(state)
        if not tensor.is_cpu:
            self.devices.add(tensor.device)
            if tensor.is_meta:
                return
        storage = None if self._is_small(tensor) else _storage(tensor)
        if storage is not None:
            self.watched.setdefault(storage, []).append(place)
        elif type(tensor) in _ORDINARY and tensor.dim() == 1 and tensor.nbytes <= _FEW and _lies_plainly(state.alias):
            self._small.setdefault(tensor.dtype, []).append(place)
        else:
            self._copy(place)

    def copy_small(self) -> None:
        """Copy the small vectors that were noted; before this, nothing is known of what they held."""
        for places in self._small.values():
            self._together.append((places, torch.cat([self._states[place].alias for place in places])))
        self._small = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Copy tensors that operators are about to write to in the body, if a mode calls :func:`keep`."""
        _watching.add(self)
        try:
            yield
        finally:
            _watching.discard(self)

    def copy_before_writing(self, tensor: Tensor) -> None:
        """Copy the watched tensors that share memory with one that is about to be written to."""
        storage = _storage(tensor)
        if storage in self.watched:
            for place in self.watched[storage]:
                self._copy(place)
            del self.watched[storage]

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore_(self) -> None:
        """Restore what has changed; nothing happens the second time."""
        for places, values in self._together:
            states = [self._states[place] for place in places]
            aliases = [state.alias for state in states]
            written = any(state.version != _version(state.tensor) for state in states)
            if written or not torch.equal(torch.cat(aliases), values):
                self._copies.update(zip(places, values.split([len(alias) for alias in aliases]), strict=True))
        for place, (tensor, alias, version, requires_grad, gradient, hooks) in enumerate(self._states):
            if not _same_place(tensor, alias):
                tensor.data = alias
            copied = self._copies.get(place)
            if copied is not None and not (version == _version(tensor) and _equal(alias, copied)):
                _write(alias if alias.layout == torch.strided else tensor, copied)
            if tensor.is_leaf:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not gradient:
                    tensor.grad = gradient
                if hooks is None and tensor._backward_hooks:  # a dict that was there before is restored as such
                    tensor._backward_hooks.clear()

    def _is_small(self, tensor: Tensor) -> bool:
        return self._copied_below == math.inf or (
            tensor.is_cpu and tensor.layout == torch.strided and tensor.nbytes <= self._copied_below
        )

    def _copy(self, place: int) -> None:
        try:
            own = _without_repeats(self._states[place].alias)
            self._copies[place] = own.to("cpu", copy=True) if self._on_cpu else own.clone()
        except (RuntimeError, NotImplementedError, TypeError) as error:  # of a kind that has no values
            reraise_out_of_memory(error)


class WriteGuard(TorchDispatchMode):
    """Copies what operators are about to write to, if it is to be restored."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: what torch.compile makes runs as it does without this mode."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each call, and imports all of dynamo at the first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        for tensor in written_by(func, args, kwargs):
            keep(tensor)
        return func(*args, **kwargs)


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operator may write to."""
    if not places_written(func) or updates_nothing(func, args, kwargs):
        return
    for index, name in places_written(func):
        value = args[index] if index < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor):
                yield tensor


def places_written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return places and names of the arguments that an operator may write to."""
    written = _written.get(id(func))  # an operator is slow to hash
    if written is None:
        written = _written[id(func)] = _places(func)
        _operators.append(func)
    return written


def updates_nothing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator that may update running statistics, and write to nothing else, is told not to."""
    index, name = _training_flag(func)
    if index < 0:
        return False
    return (args[index] if index < len(args) else kwargs.get(name)) is False


@cache
def _training_flag(func: Any) -> tuple[int, str]:
    """Return place and name of the argument that tells whether running statistics are updated; -1 if there is none."""
    schema = getattr(func, "_schema", None)
    arguments = [] if schema is None or schema.is_mutable else schema.arguments
    return next(((at, argument.name) for at, argument in enumerate(arguments) if argument.name in _TRAINING), (-1, ""))


def keep(tensor: Tensor) -> None:
    """Copy what a tensor holds before it is written to, if that is to be restored."""
    for states in _watching:
        states.copy_before_writing(tensor)


_watching: WeakSet[TensorStates] = WeakSet()  # weak, since Ctrl-C may come right before one is discarded
_written: dict[int, tuple[tuple[int, str], ...]] = {}  # by ``id`` of an operator: the arguments it may write to
_operators: list[Any] = []  # those operators, so that each ``id`` stays theirs


def _places(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    found = []
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        said = argument.alias_info is not None and argument.alias_info.is_write
        if said or argument.name in _WRITTEN_UNSAID:
            found.append((index, argument.name))
    return tuple(found)


def _storage(tensor: Tensor) -> int | None:
    """Return a number that tensors on the same memory share, or None if torch does not say."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same_place(tensor: Tensor, alias: Tensor) -> bool:
    """Return whether a tensor is still what its alias is: on the same memory, of the same shape and type."""
    if tensor.layout != torch.strided:
        return True
    if tensor.shape != alias.shape or tensor.dtype != alias.dtype:
        return False
    try:
        return tensor.data_ptr() == alias.data_ptr() and tensor.stride() == alias.stride()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return True


def _without_repeats(tensor: Tensor) -> Tensor:
    """Return a view with every entry once, of a tensor that ``expand`` made."""
    if tensor.layout == torch.strided and 0 in tensor.stride():
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _lies_plainly(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one of the CPU, every entry of which has its own place, in order."""
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.is_contiguous() and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()


def _equal(alias: Tensor, copied: Tensor) -> bool:
    """Return whether values are the same; the version counter does not say it, since BatchNorm's kernels do not count.

    Of what cannot be compared, the counter is all there is.
    """
    if alias.layout == torch.strided and not alias.is_quantized:
        with suppress(RuntimeError, NotImplementedError):
            return torch.equal(_without_repeats(alias), copied.to(alias.device))
    return not alias.is_inference()


def _write(tensor: Tensor, copied: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):
        _without_repeats(tensor).copy_(copied)
