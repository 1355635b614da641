"""The state of all objects that others lead to, so that it can be restored: attributes, containers, tensors."""

from __future__ import annotations

import array
import copy
import itertools
import random
import site
import sys
import sysconfig
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import lru_cache, partial
from opcode import opmap
from operator import is_
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.model.tensor_state import TensorStates

_ATOMS = frozenset({
    bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), slice, range, ModuleType,
    BuiltinFunctionType, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
})  # fmt: skip
"""Types of what cannot change, and leads to nothing that can."""

_MANY = 100_000  # items; of a longer list or dict the items stay, but what they hold is not looked into
_LARGE = 2**26  # bytes; larger arrays of NumPy are not copied
_INSIDE = ("torch.utils.data", "torch.distributed", "torch.cuda", "torch._", "torch.fx", "torch.export", "torch.jit")
_BASES = ("lightning_prune.", "torch.utils.data", "torch.distributed", "logging", "threading", "io", "multiprocessing")
_OPAQUE = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "rich"}
# Of the standard library, these modules have classes that models keep numbers in.
_OPAQUE |= sys.stdlib_module_names - {"__main__", "collections", "functools", "weakref", "types", "_thread"}
_SHARED = (threading.Thread, threading.Event, threading.Condition, type(threading.Lock()), type(threading.RLock()))
_ITERATORS = frozenset({
    itertools.count, itertools.cycle, itertools.repeat, type(iter(())), type(iter([])), type(iter("")),
    type(iter(range(0))), type(iter(range(2**70))), type(iter({})), type(iter({}.items())), type(iter({}.values())),
    type(iter(set())), type(reversed([])),
})  # fmt: skip
_INSTALLED = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib"))
_ABSENT = object()


class ObjectGraph:
    """What roots and everything that they lead to hold: read once, compared and written back as often as wanted.

    These are followed: modules, objects with ``__dict__`` or ``__slots__``, dicts, lists, sets, deques, tuples, bound
    methods, closures, default values and attributes of functions, and, of classes and functions that are not part of an
    installed package, class attributes and global names. Tensors, arrays and random generators are restored by value.

    These are not: objects of Lightning and of this package, data sets and loaders, loggers, files, objects that other
    threads may use at the same time, results that ``functools.lru_cache`` keeps, and generators.

    Args:
        roots: Where to begin.
        copied_below: Bytes; larger tensors on a CPU, and all others, are copied when they are first written to.
        on_cpu: Whether copies are made on the CPU, to leave an accelerator its memory.
    """

    def __init__(self, roots: Iterable[Any], copied_below: float, on_cpu: bool = False) -> None:
        self.tensors = TensorStates(copied_below, on_cpu)
        # Pairs in two lists each: fewer objects for the garbage collector to look at.
        self._tables: list[dict[Any, Any]] = []
        self._contents: list[dict[Any, Any]] = []
        self._objects: list[Any] = []
        self._classes: list[type] = []
        self._empty: list[Any] = []  # most containers of a module: dicts of hooks
        self._undo: list[Callable[[], Any]] = []
        self._iterators: list[tuple[Callable[[Any], Any], Any]] = []
        # Bound methods, which would keep this object, and all that it has copied, until the garbage is collected.
        kinds: dict[type, Callable[[Any], Iterable[Any]] | None] = {}
        seen: dict[int, Any] = {}  # keeps what it names alive, so that no number is used twice
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in _ATOMS or id(value) in seen:
                continue
            if kind not in kinds:
                kinds[kind] = self._reader_of(value)
            read = kinds[kind]
            if read is not None:
                seen[id(value)] = value
                waiting.extend(read(value))
        self.tensors.copy_small()

    def begin_(self) -> None:
        """Put copies in the place of iterators, which can be read only once."""
        for write, iterator in self._iterators:
            twin = _twin_of(iterator)
            if twin is not None:
                write(twin)

    def restore_(self) -> None:
        """Write back what has changed; nothing happens the second time."""
        for container in self._empty:
            if container:
                container.clear()
        for value, kind in zip(self._objects, self._classes, strict=True):
            if type(value) is not kind:
                object.__setattr__(value, "__class__", kind)
        for table, content in zip(self._tables, self._contents, strict=True):
            _restore_table(table, content)
        failures = []
        for undo in (*self._undo, self.tensors.restore_):
            try:
                undo()
            except Exception as error:  # the others are restored all the same
                failures.append(error)
        if failures:
            raise failures[0]

    def _reader_of(self, value: Any) -> Callable[[Any], Iterable[Any]] | None:
        """Return what reads the objects of a type, and returns what they lead to; None for what is left alone."""
        for kind, read in self._readers():
            if isinstance(value, kind):
                return read
        if isinstance(value, type):
            return self._read_class
        return None if _is_opaque(type(value)) else self._read_object

    def _readers(self) -> Iterator[tuple[Any, Callable[[Any], Iterable[Any]] | None]]:
        yield Tensor, self._read_tensor
        yield torch.jit.ScriptModule, self._read_script
        yield nn.Module, self._read_module
        yield dict, self._read_dict
        yield list, self._read_list
        yield deque, self._read_deque
        yield set, self._read_set
        yield (tuple, frozenset), self._read_frozen
        yield np.ndarray, self._read_array
        yield (bytearray, array.array), self._read_bytes
        yield FunctionType, self._read_function
        yield MethodType, lambda method: (method.__self__, method.__func__)
        yield partial, self._read_partial
        yield (staticmethod, classmethod), lambda method: (method.__func__,)
        yield property, lambda whole: (whole.fget,)
        yield type(lru_cache(None)), lambda cached: (cached.__wrapped__,)
        yield CellType, self._read_cell
        yield (torch.Generator, np.random.RandomState, random.Random), self._read_generator
        yield np.random.Generator, lambda generator: (generator.bit_generator,)
        yield np.random.BitGenerator, self._read_bits
        yield (Enum, ModuleType, *_ITERATORS), None

    # Each reader notes the state of one object, and returns what the object leads to.

    def _read_tensor(self, tensor: Tensor) -> Iterable[Any]:
        self.tensors.add(tensor)
        own = vars(tensor)
        leads_to: list[Any] = []
        if own:
            leads_to += self._note_table(own).values()
        else:
            self._empty.append(own)
        if tensor.is_leaf:
            leads_to += [tensor.grad, tensor._backward_hooks]
        return leads_to

    def _read_module(self, module: nn.Module) -> Iterable[Any]:
        own = vars(module)
        content = own.copy()
        self._tables.append(own)
        self._contents.append(content)
        self._objects.append(module)
        self._classes.append(type(module))
        leads_to: list[Any] = [type(module)]
        for value in content.values():
            if type(value) in (dict, OrderedDict, set) and not value:
                self._empty.append(value)
            else:
                leads_to.append(value)
        self._note_iterators(own, content)
        return leads_to

    def _read_script(self, module: Any) -> Iterable[Any]:
        """Read a scripted module, whose attributes are kept in C++."""
        held = module._c
        leads_to = [*self._read_module(module), *module.parameters(), *module.buffers(), *module.children()]
        for name in module._concrete_type.get_attributes():
            value = held.getattr(name)
            if isinstance(value, Tensor):
                leads_to.append(value)
            elif type(value) in _ATOMS or isinstance(value, list | tuple | dict):
                leads_to.append(value)
                self._undo.append(partial(_restore_scripted, held, name, copy.copy(value)))
        return leads_to

    def _read_dict(self, table: dict[Any, Any]) -> Iterable[Any]:
        content = self._note_table(table)
        leads_to = [*self._attributes_of(table)]
        if len(content) <= _MANY:
            leads_to += content.values()
            leads_to += [key for key in content if type(key) not in _ATOMS]
        return leads_to

    def _read_list(self, items: list[Any]) -> Iterable[Any]:
        content = items.copy()
        self._undo.append(partial(_restore_list, items, content))
        for index, item in enumerate(content if len(content) <= _MANY else ()):
            if type(item) in _ITERATORS:
                self._iterators.append((partial(items.__setitem__, index), item))
        return [*self._attributes_of(items), *(content if len(content) <= _MANY else ())]

    def _read_deque(self, items: deque[Any]) -> Iterable[Any]:
        content = list(items)
        self._undo.append(partial(_restore_deque, items, content))
        return [*self._attributes_of(items), *(content if len(content) <= _MANY else ())]

    def _read_set(self, items: set[Any]) -> Iterable[Any]:
        content = set(items)
        self._undo.append(partial(_restore_set, items, content))
        return [*self._attributes_of(items), *(content if len(content) <= _MANY else ())]

    def _read_frozen(self, items: Any) -> Iterable[Any]:
        return [*self._attributes_of(items), *(items if len(items) <= _MANY else ())]

    def _read_array(self, items: np.ndarray) -> Iterable[Any]:
        if items.nbytes > _LARGE or isinstance(items, np.memmap) or not items.flags.writeable:
            return ()
        self._undo.append(partial(_restore_array, items, items.copy()))
        return items.flat if items.dtype == object and items.size <= _MANY else ()

    def _read_bytes(self, items: bytearray | array.array[Any]) -> Iterable[Any]:
        self._undo.append(partial(_restore_bytes, items, items[:]))
        return ()

    def _read_cell(self, cell: CellType) -> Iterable[Any]:
        try:
            content = cell.cell_contents
        except ValueError:  # the variable is not assigned yet
            return ()
        self._undo.append(partial(_restore_cell, cell, content))
        if type(content) in _ITERATORS:
            self._iterators.append((partial(setattr, cell, "cell_contents"), content))
        return (content,)

    def _read_function(self, function: FunctionType) -> Iterable[Any]:
        if _is_opaque_name(function.__module__ or ""):
            return ()
        own = vars(function)
        self._note_table(own)
        leads_to: list[Any] = [function.__defaults__, function.__kwdefaults__, *own.values()]
        leads_to += function.__closure__ or ()
        if _is_of_user(function.__module__):
            names, binds = _global_names(function.__code__)
            known = function.__globals__
            if binds:
                self._undo.append(partial(_restore_names, known, {n: known.get(n, _ABSENT) for n in names}))
            for name in names & known.keys():
                leads_to.append(known[name])
                if type(known[name]) in _ITERATORS:
                    self._undo.append(partial(_restore_names, known, {name: known[name]}))
                    self._iterators.append((partial(known.__setitem__, name), known[name]))
        return leads_to

    def _read_class(self, kind: type) -> Iterable[Any]:
        if not _is_of_user(kind.__module__) or _is_opaque(kind):
            return ()
        content = {name: value for name, value in vars(kind).items() if not _is_internal(name, value)}
        self._undo.append(partial(_restore_attributes_of_class, kind, content))
        for name, value in content.items():
            if type(value) in _ITERATORS:
                self._iterators.append((partial(type.__setattr__, kind, name), value))
        return [*content.values(), *kind.__mro__[1:]]

    def _read_generator(self, generator: Any) -> Iterable[Any]:
        """Read a random generator of torch, NumPy or Python."""
        names = ("getstate", "setstate") if isinstance(generator, random.Random) else ("get_state", "set_state")
        read, write = (getattr(generator, name) for name in names)
        self._undo.append(partial(write, read()))
        return ()

    def _read_bits(self, generator: Any) -> Iterable[Any]:
        self._undo.append(partial(setattr, generator, "state", generator.state))
        return ()

    def _read_partial(self, whole: partial[Any]) -> Iterable[Any]:
        if _is_opaque_name(getattr(whole.func, "__module__", None) or ""):
            return ()
        return whole.func, whole.args, whole.keywords, vars(whole)

    def _read_object(self, value: Any) -> Iterable[Any]:
        if any(isinstance(held, _SHARED) for held in getattr(value, "__dict__", {}).values()):
            return ()
        return self._attributes_of(value)

    def _attributes_of(self, value: Any) -> list[Any]:
        """Note the attributes of an object, and return them and its class."""
        kind = type(value)
        leads_to: list[Any] = [kind]
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            leads_to += self._note_table(own).values()
            self._objects.append(value)
            self._classes.append(kind)
        slots = _slots_of(kind)  # type: ignore[arg-type]
        if slots:
            held = [(slot, _in_slot(slot, value)) for slot in slots]
            self._undo.append(partial(_restore_slots, value, held))
            for slot, content in held:
                if type(content) in _ITERATORS:
                    self._iterators.append((partial(slot.__set__, value), content))
                if content is not _ABSENT:
                    leads_to.append(content)
        return leads_to

    def _note_table(self, table: dict[Any, Any]) -> dict[Any, Any]:
        # Not ``table.copy()``: the copy of a subclass may do anything.
        content = dict(table.items()) if type(table) is not dict else table.copy()
        self._tables.append(table)
        self._contents.append(content)
        self._note_iterators(table, content)
        return content

    def _note_iterators(self, table: dict[Any, Any], content: dict[Any, Any]) -> None:
        for key, value in content.items():
            if type(value) in _ITERATORS:
                self._iterators.append((partial(dict.__setitem__, table, key), value))


def _twin_of(iterator: Any) -> Any:
    """Return an iterator that yields what another has left, or None if it cannot be copied."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # later versions of Python copy none of itertools
            # What is yielded stays the same; only iterators inside of others are copied along.
            return copy.deepcopy(iterator) if isinstance(iterator, itertools.cycle) else copy.copy(iterator)
    except TypeError:
        return None


# Each of these functions writes back the state of one object, if it has changed.


def _restore_table(table: dict[Any, Any], content: dict[Any, Any]) -> None:
    if len(table) == len(content) and all(map(is_, table, content)) and all(map(is_, table.values(), content.values())):
        return
    methods: Any = OrderedDict if isinstance(table, OrderedDict) else dict  # not those of a subclass
    methods.clear(table)
    methods.update(table, content)


def _restore_list(items: list[Any], content: list[Any]) -> None:
    if len(items) != len(content) or not all(map(is_, items, content)):
        list.__setitem__(items, slice(None), content)


def _restore_deque(items: deque[Any], content: list[Any]) -> None:
    if len(items) != len(content) or not all(map(is_, items, content)):
        deque.clear(items)
        deque.extend(items, content)


def _restore_set(items: set[Any], content: set[Any]) -> None:
    if {id(item) for item in items} != {id(item) for item in content}:
        set.clear(items)
        set.update(items, content)


def _restore_array(items: np.ndarray, content: np.ndarray) -> None:
    if items.shape != content.shape:
        items.resize(content.shape, refcheck=False)
    if items.tobytes() != content.tobytes():
        items[...] = content


def _restore_bytes(items: Any, content: Any) -> None:
    if items != content:
        items[:] = content


def _restore_cell(cell: CellType, content: Any) -> None:
    try:
        if cell.cell_contents is content:
            return
    except ValueError:
        pass
    cell.cell_contents = content


def _restore_names(known: dict[str, Any], content: dict[str, Any]) -> None:
    for name, value in content.items():
        if value is _ABSENT:
            known.pop(name, None)
        elif known.get(name, _ABSENT) is not value:
            known[name] = value


def _restore_attributes_of_class(kind: type, content: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name, value in now.items():
        if name not in content and not _is_internal(name, value):
            type.__delattr__(kind, name)
    for name, value in content.items():
        if now.get(name, _ABSENT) is not value:
            type.__setattr__(kind, name, value)


def _restore_slots(value: Any, content: list[tuple[Any, Any]]) -> None:
    for slot, held in content:
        now = _in_slot(slot, value)
        if held is _ABSENT and now is not _ABSENT:
            slot.__delete__(value)
        elif now is not held:
            slot.__set__(value, held)


def _restore_scripted(held: Any, name: str, value: Any) -> None:
    if isinstance(value, list | tuple | dict) or held.getattr(name) != value:
        held.setattr(name, value)


def _in_slot(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value, type(value))
    except AttributeError:
        return _ABSENT


@lru_cache(maxsize=4096)
def _slots_of(kind: type) -> tuple[Any, ...]:
    """Return the descriptors of the slots of a class and those above it."""
    found = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            own = name if not name.startswith("__") or name.endswith("__") else f"_{base.__name__.lstrip('_')}{name}"
            slot = vars(base).get(own)
            if name not in ("__dict__", "__weakref__") and hasattr(slot, "__set__"):
                found.append(slot)
    return tuple(found)


def _is_opaque(kind: type) -> bool:
    """Return whether objects of a class are left as they are: they are part of a run, or of this package."""
    if issubclass(kind, SimpleNamespace | threading.local):
        return False
    return _is_opaque_name(kind.__module__) or any(base.__module__.startswith(_BASES) for base in kind.__mro__)


@lru_cache(maxsize=4096)
def _is_opaque_name(module: str) -> bool:
    top = module.partition(".")[0]
    return top in _OPAQUE or top == "lightning_prune" or module.startswith(_INSIDE)


@lru_cache(maxsize=4096)
def _is_of_user(module: str | None) -> bool:
    """Return whether a module is neither installed nor part of Python: what is written for the run at hand."""
    if module is None or _is_opaque_name(module) or module in ("builtins", "torch"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)


@lru_cache(maxsize=65536)
def _global_names(code: CodeType) -> tuple[frozenset[str], bool]:
    """Return the names that code may look up outside of itself, and whether it assigns to any of them."""
    names = set(code.co_names)
    binds = bool({opmap["STORE_GLOBAL"], opmap["DELETE_GLOBAL"]} & set(code.co_code[::2]))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, also = _global_names(constant)
            names |= inner
            binds = binds or also
    return frozenset(names), binds


def _is_internal(name: str, value: Any) -> bool:
    """Return whether Python itself keeps this in a class."""
    return (name.startswith("__") and name.endswith("__")) or type(value).__name__ in ("_abc_data", "getset_descriptor")
