"""Runs a model once with labels riding on its tensors; knows how to watch operators, not what they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.model.calls import mode_of, modules_of, run, tensors_in
from lightning_prune.model.errors import reraise_out_of_memory
from lightning_prune.model.tensor_state import keep, places_written, written_by
from lightning_prune.structure.costs import CostRule, cost_rule, drop_unneeded_
from lightning_prune.structure.decisions import Ways, decided_by, drawn_by, explore_, impose_
from lightning_prune.structure.fused_cells import CellsInSteps
from lightning_prune.structure.labels import Equation, Label, Labels, Ledger, Pass, Ran
from lightning_prune.structure.next_call import Held, held_tensors, left_for_next_call
from lightning_prune.structure.rules import Call, Rule, is_pointwise, pointwise_rule, rule_for, tensors_among, tested
from lightning_prune.structure.rules.frozen_sizes import compared, eye, made_anew
from lightning_prune.structure.rules.movement import repeat
from lightning_prune.structure.rules.views import expand
from lightning_prune.structure.shape_only import NumbersNeededError, Shaped, reads, refuse_reading, shaper, writes
from lightning_prune.structure.tensor_names import exchange_, named_tensors
from lightning_prune.structure.traced_ints import Number, Size, Told, remembering

__all__ = ["Watch", "aliases", "plain", "taken_apart", "unfused", "watch"]

_UNLABELLED = Labels(weight=True)
_ACTIVATION = Labels(weight=False)
_RIDING = "_lightning_prune_labels"
_SHAPE_READERS = {Tensor.shape.__get__, Tensor.size}  # type: ignore[attr-defined]
_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr}
# Rules of what makes a tensor as long as others, of one without labels too.
_STRETCHING = {made_anew, eye, expand, repeat}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.lstm_cell, torch.gru_cell}
_PIECES = {torch.ops.aten.slice, torch.ops.aten.split, torch.ops.aten.split_with_sizes}
_RESHAPES = {torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten._reshape_alias}
_FOREIGN = Labels(weight=True, constant=True)  # of tensors that are none of the model's, but constants in its code
_NOTHING: tuple[object, Labels] = (None, _FOREIGN)


def watch(
    model: nn.Module,
    one: Pass,
    replaced: Mapping[str, Tensor],
    ledger: Ledger,
    labels: Mapping[str, Labels],
    ways: Ways | None = None,
) -> int:
    """Run the model with labels, inside :func:`undisturbed`, and pin what reaches its outputs.

    A model that keeps tensors with channels for its next call is called twice.

    Args:
        model: The model; parameters and buffers named in ``replaced`` are exchanged for the run.
        one: What to call it on, and in which mode.
        replaced: Tensors to run with instead of the model's own, by name.
        ledger: Where meetings are written down; says whether anything is computed.
        labels: The labels that each parameter and buffer carries, by name; the others carry none.
        ways: What to decide instead of what is computed, if anything.

    Returns:
        How often the model was called.

    Raises:
        NumbersNeededError: If nothing is to be computed, and the model's code asks for numbers.
    """
    mode = _LabelMode(ledger, ways)
    own = named_tensors(model)
    for name, tensor in own.items():
        mode.give(replaced.get(name, tensor), labels.get(name, _UNLABELLED))
    for tensor in tensors_in(one.inputs):
        mode.give(tensor, _ACTIVATION)
    exchange_(model, replaced)
    with ExitStack() as stack:
        stack.enter_context(mode_of(model, one.training, one.gradients))
        if ledger.numbers:
            stack.enter_context(remembering(model, _told(ledger), labels))
        stack.enter_context(unfused())
        stack.enter_context(mode.knows_modules(model))
        stack.enter_context(mode)
        stack.enter_context(_NumberMode(mode) if ledger.numbers else _StepMode())
        held, begin = held_tensors(model), len(ledger.ran)
        _pin_returned(mode, run(model, one.inputs), first=not ledger.passes)
        calls = one.calls
        if calls == 1 and mode.leaves_channels(held, held_tensors(model), begin):
            calls = _called_again(model, one, mode)
        elif calls == 2:
            _pin_returned(mode, run(model, one.inputs), first=False)
    unseen = {name for name, tensor in own.items() if id(replaced.get(name, tensor)) not in mode.seen}
    ledger.unseen = ledger.unseen & unseen if ledger.passes else unseen
    if mode.refusal is not None:  # the model's own code may have caught it
        raise mode.refusal
    return calls


def _pin_returned(mode: _LabelMode, outputs: Any, first: bool) -> None:
    """Pin what reaches the outputs of a call; count the costs of the first call in eval mode."""
    ledger = mode.ledger
    ledger.running = ("", None)
    returned = list(tensors_in(outputs))
    for tensor in returned:
        labels = mode.labels_of(tensor)
        for found in (*labels.dims.values(), labels.positions):
            ledger.pin(found, "reaches the model's output")
    if first:
        drop_unneeded_(ledger, map(mode.labels_of, returned))


def _called_again(model: nn.Module, one: Pass, mode: _LabelMode) -> int:
    """Call the model once more, on what its first call left; return how often it was called with success."""
    ledger = mode.ledger
    before, costs = ledger.state(), list(ledger.costs)
    try:
        _pin_returned(mode, run(model, one.inputs), first=False)
    except NumbersNeededError:
        raise
    except Exception as error:  # code that has to be reset between calls
        reraise_out_of_memory(error)
        ledger.restore_(before)
        return 1
    ledger.costs = costs
    return 2


def _told(ledger: Ledger) -> Told:
    """Return what writes down what code does with numbers."""
    return Told(partial(compared, ledger), ledger.note_real)


def plain(values: Any) -> tuple[Any, ...]:
    """Return arguments of an operator with None in place of tensors."""
    return tuple(
        [
            None if isinstance(value, Tensor) else plain(value) if type(value) in (list, tuple) else value
            for value in values
        ]
    )


class Watch(TorchDispatchMode):
    """Base of the modes that watch operators.

    What operators write into tensors that were there before, such as a parameter that a forward pass updates, is taken
    back when the mode is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()  # storages of this run, which may be written to, by weak references
        self._before: dict[int, tuple[Any, Any]] = {}  # storages that were there before -> themselves, and a copy

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # None of these modes is ever compiled. Else torch wraps each call, and imports all of dynamo at the first.
        return False

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for storage, copy in self._before.values():
            storage.copy_(copy)
        for made in self._made:
            torch.UntypedStorage._free_weak_ref(made)
        self._made = set()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; keep a copy of what was there before and is about to be written to."""
        if places_written(func):
            for tensor in written_by(func, args, kwargs):
                self.keep(tensor)
        out = func(*args, **kwargs)
        if not _aliases(func):
            for tensor in (out,) if isinstance(out, Tensor) else tensors_among((out,)):
                if tensor.layout is not torch.strided:  # sparse tensors have no one storage
                    continue
                storage = tensor.untyped_storage()
                number = storage._cdata
                if number not in self._made:
                    storage._weak_ref()  # while there is one, no other storage gets this number
                    self._made.add(number)
        return out

    def in_parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator as the operators that it consists of, or return NotImplemented where it is one by itself.

        In inference mode, which a model's own code may turn on, torch does not take operators apart before a mode sees
        them.
        """
        if not (torch.is_inference_mode_enabled() and _consists_of_others(func)):
            return NotImplemented
        TorchDispatchMode.__enter__(self)  # nothing begins or ends but the watch
        try:
            return func.decompose(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def keep(self, tensor: Tensor) -> None:
        """Copy what a tensor holds before something is written into it, if it was there before this mode."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._made and storage._cdata not in self._before:
            keep(tensor)  # so that it is restored even if Ctrl-C arrives while this mode is left
            self._before[storage._cdata] = storage, storage.clone()


def _aliases(func: Any) -> bool:
    known = _SHOWING.get(id(func))
    if known is None:
        known = _SHOWING[id(func)] = aliases(func)
        _OPERATORS.append(func)
    return known


_SHOWING: dict[int, bool] = {}  # :func:`aliases` by ``id``, since an operator is slow to hash
_OPERATORS: list[Any] = []  # so that their ids stay


@cache
def _consists_of_others(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def aliases(func: Any) -> bool:
    """Return whether an operator's output may share memory with an argument: views, and operators in place."""
    return any(value.alias_info is not None for value in func._schema.returns)


class _Known(NamedTuple):
    """What a trace needs to know of an operator each time it runs."""

    func: Any
    rule: Rule
    cost: CostRule | None
    shaped: Shaped | None
    reads: bool
    writes: bool
    draws: bool
    pointwise: bool
    aliases: bool


class _LabelMode(Watch):
    """Looks up the rule of every operator that runs, and lets it pass labels on."""

    def __init__(self, ledger: Ledger, ways: Ways | None = None) -> None:
        super().__init__()
        self.ledger, self._ways = ledger, ways
        self._given: dict[int, tuple[Tensor, Labels]] = {}
        self._mark = object()  # tells this trace's labels from another's
        self._running: list[tuple[str, nn.Module | None]] = [("", None)]
        self._owners: list[tuple[type, str]] = [(nn.Module, "")]  # innermost modules that are none of torch.nn
        self._written: dict[int, Any] = {}  # storages that something hollow was written into, kept so that ids stay
        self._filled: dict[int, Any] = {}  # storages of weights that data was written into: all views of them show it
        self.arguments: tuple[Any, ...] = ()  # args, kwargs and the Python function itself that is calling operators
        self.seen: set[int] = set()  # tensors given before the run that an operator took
        self._known: dict[int, _Known] = {}  # by ``id``, since an operator is slow to hash
        self.refusal: NumbersNeededError | None = None
        self._ordinals: dict[str, int] = {}  # path of a module -> operators that have run in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = self.in_parts(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        known = self._known.get(id(func)) or self._learnt(func)
        tensors = tensors_among((*args, *kwargs.values()) if kwargs else args)
        found = [self.labels_of(tensor) for tensor in tensors]
        weight, labelled, constant = True, False, True
        for labels in found:
            weight = weight and labels.weight
            labelled = labelled or bool(labels.dims)
            constant = constant and labels.constant
        if weight and self._filled:
            weight = not any(map(self._shows_data, tensors))
        elif known.writes and not weight and found[0].weight and tensors[0].layout is torch.strided:
            self._filled[tensors[0].untyped_storage()._cdata] = tensors[0].untyped_storage()
        running = self._running[-1]
        path = running[0]
        self._pin_positions(found, func)
        ordinal = self._ordinals.get(path, 0)
        self._ordinals[path] = ordinal + 1
        owner, owner_path = self._owners[-1]
        kind = owner, path[len(owner_path) :], ordinal
        entering = [tensor.shape for tensor in tensors]  # before an operator in place may change them
        out, hollow = self._run(known, args, kwargs, tensors, found, weight)
        ledger = self.ledger
        ran = Ran(func, path, kind, found, entering, plain((*args, *kwargs.values()) if kwargs else args))
        ledger.ran.append(ran)
        if _FOREIGN in found:
            ran.foreign = {at: tensors[at] for at, labels in enumerate(found) if labels is _FOREIGN}
        if known.reads and not weight:
            ledger.decided.append(path)
        blank = known.rule is made_anew
        dims: Any = {}
        ruled = labelled or (known.rule in _STRETCHING and self.arguments and out.numel())
        if ruled or known.cost is not None:
            call = Call(ledger, func, args, kwargs, out, self.labels_of, running, self.arguments, self._lay)
        if labelled and known.pointwise and self._takes_number():
            ledger.note_real()
        if ruled:
            ledger.running = (path, func)
            dims = known.rule(call)
        outputs = [(out, dims)] if isinstance(out, Tensor) else list(_outputs(out, dims))
        seen = blank or not outputs or any(tensor.numel() for tensor, _ in outputs)
        if labelled and not seen and func.overloadpacket not in _PIECES:  # a piece is empty before anything meets in it
            self._pin_unseen(tensors, found)
        for tensor, own in outputs:
            if not all(own.values()):
                own = {d: labels for d, labels in own.items() if labels}
            made = weight and not blank and (labelled or not own)
            if ledger.literals:
                self._fix_literals(func, tensor, own)
            shows_blank = known.aliases and not known.writes and any(labels.blank for labels in found)
            ran.made.append(Labels(own, made, blank or shows_blank, hollow, constant))
            if ruled and call.positions_along and not tensor.is_floating_point():
                ran.made[-1].positions = call.positions_along
            ran.leaving.append(tensor.shape)
            self._lay(tensor, ran.made[-1])
        if known.writes and not constant:
            self._note_written(tensors[0])
        if known.cost is not None:
            known.cost(call)
        if not hollow and (known.draws or not (weight or known.writes or known.aliases)):
            self._decide(known, ran, tensors, [tensor for tensor, _ in outputs])
        return out

    def _pin_positions(self, found: Iterable[Labels], func: Any) -> None:
        """Pin channels whose positions something goes on by: where others leave, these are other numbers."""
        for labels in found:
            if labels.positions:
                self.ledger.running = (self._running[-1][0], func)
                self.ledger.pin(labels.positions, "the place of its largest or smallest entry is used")

    def _takes_number(self) -> bool:
        """Return whether the Python function that is running was given a number that remembers where it comes from."""
        return bool(self.arguments) and any(type(value) is Number for value in self.arguments[0])

    def _note_written(self, view: Tensor) -> None:
        """Note that the tensor that a view shows is no constant once something else was written into the view."""
        if view._base is not None and (labels := self.labels_of(view._base)).constant:
            self._lay(view._base, replace(labels, constant=False))

    def _shows_data(self, tensor: Tensor) -> bool:
        if not self._filled or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage()._cdata in self._filled

    def _decide(self, known: _Known, ran: Ran, taken: list[Tensor], made: list[Tensor]) -> None:
        """Write down what the code may go on by, or decide as another trace did, or otherwise."""
        if known.draws:
            ran.decisions = drawn_by(made, ran.made)
        else:
            ran.decisions = decided_by(taken, made, ran.made)
            if self._ways is not None and ran.decisions:
                explore_(known.func, ran.plain, ran.entering[0], [made[which] for which in ran.decisions], self._ways)
                ran.decisions = decided_by(taken, made, ran.made)
        given = self.ledger.given.get((ran.path, ran.kind[-1]))
        if given and ran.decisions:
            impose_(given.pop(0), made)

    def _fix_literals(self, func: Any, out: Tensor, dims: dict[int, tuple[Label, ...]]) -> None:
        """Fix the width of what a number in the code says; slices and pieces have rules for that."""
        for dim, labels in dims.items():
            if not self.ledger.is_literal(dim) or func.overloadpacket in _PIECES:
                continue
            if func.overloadpacket in _RESHAPES:  # of several ways to shrink, another may be free
                self.ledger.equations.append(Equation(labels, out.shape[dim], self.ledger.where))
            else:
                self.ledger.pin(labels, "its size is a number in the code")

    def _pin_unseen(self, tensors: list[Tensor], found: list[Labels]) -> None:
        """Pin what goes into an empty tensor: with what its entries would have met was not seen."""
        for tensor, labels in zip(tensors, found, strict=True):
            for own in labels.dims.values() if tensor.numel() else ():
                self.ledger.pin(own, "reaches a tensor that was empty on the example inputs")

    def _learnt(self, func: Any) -> _Known:
        pointwise = is_pointwise(func)
        rule = rule_for(func) or (pointwise_rule if pointwise else tested)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        shows = aliases(func)
        known = _Known(func, rule, cost_rule(func), shaper(func), reads(func), writes(func), draws, pointwise, shows)
        self._known[id(func)] = known
        return known

    def _run(
        self, known: _Known, args: Any, kwargs: Any, tensors: list[Tensor], found: list[Labels], weight: bool
    ) -> tuple[Any, bool]:
        """Return what an operator returns, and whether that was not computed."""
        if not self.ledger.hollow:
            return self.run(known.func, args, kwargs), False
        hollow = [t for t, labels in zip(tensors, found, strict=True) if labels.hollow]
        if self._written and len(hollow) < len(tensors):
            hollow = [t for t, labels in zip(tensors, found, strict=True) if labels.hollow or self._written_into(t)]
        shaped = None if weight and not hollow else known.shaped
        out = None if shaped is None else shaped(*args, **kwargs)
        if hollow and out is None:
            self.refuse(known.func, hollow)
            out = self._run_on_hollow(known, args, kwargs)
        if out is None:
            return self.run(known.func, args, kwargs), False
        if known.writes and not found[0].hollow:
            self._written[tensors[0].untyped_storage()._cdata] = tensors[0].untyped_storage()
        return out, True

    def _run_on_hollow(self, known: _Known, args: Any, kwargs: Any) -> Any:
        """Run an operator on entries that were not computed; where it fails, these may be why."""
        try:
            return self.run(known.func, args, kwargs)
        except Exception as error:
            reraise_out_of_memory(error)
            told = f"{known.func.overloadpacket} failed on values that were not computed ({error})"
            self.refusal = NumbersNeededError(told)
            raise self.refusal from error

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
        """Note that Python reads entries of tensors, other than by an operator."""
        read = [(tensor, self.labels_of(tensor)) for tensor in tensors_among(values)]
        if any(not labels.weight or self._shows_data(tensor) for tensor, labels in read):
            self.ledger.decided.append(self._running[-1][0])
        self._pin_positions([labels for _, labels in read], None)
        if any(labels.hollow or self._written_into(tensor) for tensor, labels in read):
            self.refusal = NumbersNeededError(f"{func.__name__} reads numbers that were not computed")
            raise self.refusal

    def leaves_channels(self, before: Held, after: Held, begin: int) -> bool:
        """Return whether a call, whose operators are ``ran`` from ``begin`` on, left channels for the next call."""
        read = self.seen.union(*(map(id, (ran.foreign or {}).values()) for ran in self.ledger.ran[begin:]))
        left = [tensor for tensor in left_for_next_call(before, after, read) if id(tensor) not in self._given]
        labels = [label for tensor in left for found in self.labels_of(tensor).dims.values() for label in found]
        pinned = {id(atoms) for atoms, _ in self.ledger.pins} if labels else set()
        return any(id(label.atoms) not in pinned for label in labels)

    def give(self, tensor: Tensor, labels: Labels) -> None:
        """Lay labels on a tensor that is there before the run; it is kept, and nothing is written on it."""
        self._given[id(tensor)] = tensor, labels

    def labels_of(self, tensor: Tensor) -> Labels:
        """Return the labels that a tensor carries."""
        given = self._given.get(id(tensor))
        if given is not None:
            self.seen.add(id(tensor))
            return given[1]
        mark, labels = getattr(tensor, _RIDING, _NOTHING)
        return labels if mark is self._mark else _FOREIGN

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
            path = names.get(id(module), self._running[-1][0])
            self._running.append((path, module))
            generic = type(module).__module__.startswith("torch.nn.")
            self._owners.append(self._owners[-1] if generic else (type(module), path))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._running.pop()
            self._owners.pop()

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
        self._told = _told(labels.ledger)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPE_READERS:
            return self._remembering(args[0], func(*args, **kwargs), args[1:])
        if func in _READERS:
            self._labels.read(func, args)
        self._labels.arguments = args, kwargs, func
        if not self._labels.ledger.in_steps and _needs_steps(func, args):
            self._labels.ledger.in_steps = True
        try:
            return _in_steps(func, args, kwargs)
        finally:
            self._labels.arguments = ()

    def _remembering(self, tensor: Tensor, sizes: Any, dim: Any) -> Any:
        dims = self._labels.labels_of(tensor).dims
        if not dims:
            return sizes
        if isinstance(sizes, int):
            found = dims.get(int(dim[0]) % tensor.dim() if dim else -1)
            return Number(sizes, Size(found), self._told) if found else sizes
        return torch.Size(
            [Number(size, Size(dims[d]), self._told) if d in dims else size for d, size in enumerate(sizes)]
        )


def _outputs(out: Any, dims: Any) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(out, Tensor):
        yield out, dims
    elif isinstance(out, list | tuple):
        for i, part in enumerate(out):
            if isinstance(part, Tensor):
                yield part, dims[i] if isinstance(dims, list) else {}


class _StepMode(TorchFunctionMode):
    """Lets recurrent layers run step by step, and linear ones by the same operators whatever their input's layout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _in_steps(func, args, kwargs or {})


_FOR_EACH = {
    getattr(torch, f"_foreach_{name}"): getattr(Tensor, name)
    for name in dir(Tensor)
    if hasattr(torch, f"_foreach_{name}") and name not in ("maximum", "minimum")  # which take no numbers
}
"""Operators on lists of tensors, and what they do to each."""


def _needs_steps(func: Any, args: Any) -> bool:
    """Return whether a function would run other operators by itself than :func:`_in_steps` has it run."""
    if func is F.linear:
        return not (args and isinstance(args[0], Tensor) and args[0].is_contiguous())
    return func in _RECURRENT or func in _FOR_EACH


def _in_steps(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function; run recurrent layers step by step, since those of oneDNN and cuDNN cannot be looked into."""
    if func is F.linear and args:  # torch chooses other operators for an input that does not lie in one piece
        return func(args[0].contiguous(), *args[1:], **kwargs)
    if func in _FOR_EACH and args and isinstance(args[0], list | tuple):
        return _one_by_one(_FOR_EACH[func], args, kwargs)
    if func not in _RECURRENT:
        return func(*args, **kwargs)
    libraries = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.set_flags(_enabled=False)[0] for library in libraries]
    try:
        with CellsInSteps():
            return func(*args, **kwargs)
    finally:
        for library, before in zip(libraries, enabled, strict=True):
            library.set_flags(_enabled=before)


def _one_by_one(method: Any, args: Any, kwargs: Any) -> list[Any]:
    """Run what is written for lists of tensors, such as averages of weights, on one tensor after the other."""
    found = []
    for at in range(len(args[0])):
        own = [value[at] if isinstance(value, list | tuple) else value for value in args]
        found.append(method(*own, **kwargs))
    return found


@contextmanager
def taken_apart(in_steps: bool = True) -> Iterator[None]:
    """Run attention as the operators that a trace sees, and recurrent and linear layers unless not ``in_steps``."""
    with unfused(), _StepMode() if in_steps else nullcontext():
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Run attention as products, which have rules."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
