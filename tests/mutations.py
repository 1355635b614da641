"""Ways in which a forward pass may change what it leaves behind, one at a time: what is changed × how × when.

Each :class:`Mutation` makes a small network whose forward pass changes one thing. :func:`picture` reads everything
that the network, its inputs and the process hold, by a walk of its own.
"""

import array
import itertools
import os
import random
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# how precisely cuDNN multiplies single precision, and a setting that is not the default; older versions have the other
PRECISION, NARROW = (
    ("fp32_precision", "tf32") if hasattr(torch.backends.cudnn, "fp32_precision") else ("allow_tf32", False)
)
COUNT = 0
SEEN = [0]
TABLE = {"tensor": torch.zeros(3)}


@dataclass
class Held:
    """An object that is no module."""

    value: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    count: int = 0


@dataclass(frozen=True)
class Frozen:
    items: list


class Slotted:
    __slots__ = ("count", "late", "value")

    def __init__(self):
        self.value, self.count = torch.zeros(3), 0


class Below(Slotted):
    __slots__ = ("more",)

    def __init__(self):
        super().__init__()
        self.more = [0]


class Named(dict):
    """A dict with attributes of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.count = 0


Pair = namedtuple("Pair", "first second")


def counter():
    count = 0
    total = torch.zeros(3)

    def add():
        nonlocal count, total
        count += 1
        total += 1
        return count

    return add


def with_default(seen=[], *, table={}):  # noqa: B006, what is tested
    seen.append(1)
    table[len(table)] = 1


class Net(nn.Module):
    """Has a place for everything that a forward pass can write to; ``change`` is what it does."""

    calls = 0
    shared = torch.zeros(3)
    table = {"count": 0}  # noqa: RUF012, what is tested

    def __init__(self, change, wide):
        super().__init__()
        self.change = change
        self.when = "always"
        width = 160 if wide else 8
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)
        self.embedding = nn.Embedding(40, 500 if wide else 4, max_norm=0.1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("large", torch.zeros(200, 200))
        self.slow = nn.Linear(6, width)  # a momentum encoder
        self.plain = torch.zeros(3)
        self.big = torch.zeros(200, 200)
        self.number = 0
        self.tuple = (torch.zeros(3), [0], Held())
        self.items = [torch.zeros(3), {"a": torch.zeros(3)}, [1, 2]]
        self.dict = {"a": torch.zeros(3), "b": [torch.zeros(3)], 3: "three"}
        self.ordered = OrderedDict(a=1, b=2)
        self.default = defaultdict(list, {"a": [1]})
        self.counted = Counter(a=1)
        self.deque = deque([1, 2, 3], maxlen=3)
        self.set = {1, 2}
        self.named = Named({"a": 1})
        self.held = Held()
        self.frozen = Frozen([0])
        self.slotted = Slotted()
        self.below = Below()
        self.space = types.SimpleNamespace(count=0, value=torch.zeros(3))
        self.pair = Pair([0], torch.zeros(3))
        self.counter = counter()
        self.partial = partial(dict.__setitem__, {"a": 0}, "a")
        self.array = np.zeros(4)
        self.objects = np.array([[0], {"a": 1}], dtype=object)
        self.bytes = bytearray(b"abc")
        self.ints = array.array("i", [1, 2])
        self.ids = itertools.count()
        self.cycle = itertools.cycle([1, 2, 3])
        self.iterator = iter([1, 2, 3])
        self.generator = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)
        self.state = np.random.RandomState(1)
        self.python = random.Random(1)
        self.modules_in_list = [nn.Linear(2, 2)]
        self.first.weight.note = "own"
        self.sparse = torch.eye(3).to_sparse()
        self.view = torch.zeros(4, 4)[1:3]
        self.expanded = torch.zeros(1, 3).expand(100, 3)

    @cached_property
    def cached(self):
        return torch.ones(3)

    def helper(self):
        self.number += 1
        return self.number

    def forward(self, batch):
        images = batch["images"] if isinstance(batch, dict) else batch
        if isinstance(images, Held):
            images = images.value
        early = self.when != "late"
        if early:
            self.change(self, batch, images)
        hidden = F.relu(self.norm(self.first(images)))
        if self.when == "raises":
            raise ValueError("after it has changed something")
        hidden = F.relu(self.middle(hidden))
        if not early:
            self.change(self, batch, images)
        return self.head(hidden)


class Mutation(NamedTuple):
    """What is changed, by a function of the network, its batch and its images."""

    name: str
    change: Any


def _found() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def add(name, change):
        assert name not in found, name
        found[name] = change

    # Tensors, wherever they are held × how they are written to.
    places = {
        "parameter": lambda n: n.slow.weight,
        "used parameter": lambda n: n.middle.weight,
        "bias": lambda n: n.first.bias,
        "buffer": lambda n: n.norm.running_mean,
        "large buffer": lambda n: n.large,
        "plain": lambda n: n.plain,
        "big": lambda n: n.big,
        "in a tuple": lambda n: n.tuple[0],
        "in a list": lambda n: n.items[0],
        "in a dict in a list": lambda n: n.items[1]["a"],
        "in a list in a dict": lambda n: n.dict["b"][0],
        "of an object": lambda n: n.held.value,
        "of an object in a tuple": lambda n: n.tuple[2].value,
        "in a slot": lambda n: n.slotted.value,
        "in a namespace": lambda n: n.space.value,
        "in a named tuple": lambda n: n.pair.second,
        "of the class": lambda n: type(n).shared,
        "of the file": lambda n: TABLE["tensor"],
        "a view": lambda n: n.view,
        "of a module in a list": lambda n: n.modules_in_list[0].weight,
    }
    writes = {
        "add_": lambda t: t.add_(0.25),
        "data.mul_": lambda t: t.data.add_(1).mul_(3),
        "copy_": lambda t: t.copy_(torch.full_like(t, 2)),
        "item": lambda t: t.view(-1).__setitem__(0, 9),
        "data =": lambda t: setattr(t, "data", torch.ones_like(t)),
        "foreach": lambda t: torch._foreach_add_([t], 1),
        "out": lambda t: torch.add(t.detach(), 1, out=t.detach()),
        "numpy": lambda t: t.detach().numpy().__setitem__(0, 3) if t.nbytes < 2**16 else t.fill_(3),
    }
    for (place, get), (how, write) in itertools.product(places.items(), writes.items()):

        def change(net, batch, images, get=get, write=write):
            with torch.no_grad():
                write(get(net))

        add(f"{place}: {how}", change)

    others = {
        "renorm_": lambda n, *_: n.slow.weight.data.renorm_(2, 0, 0.01),
        "clamp_": lambda n, *_: n.middle.weight.data.clamp_(-0.01, 0.01),
        "zero_ of all": lambda n, *_: [p.data.zero_() for p in n.slow.parameters()],
        "max_norm": lambda n, *_: n.embedding(torch.arange(40)),
        "momentum": lambda n, *_: n.slow.weight.data.lerp_(n.first.weight.data, 0.1),
        "transposed data": lambda n, *_: setattr(n.big, "data", n.big.data.t()),
        "resize_": lambda n, *_: n.plain.resize_(2),
        "t_": lambda n, *_: n.big.t_(),
        "unsqueeze_": lambda n, *_: n.plain.unsqueeze_(0),
        "set_": lambda n, *_: n.plain.set_(torch.ones(5)),
        "requires_grad_": lambda n, *_: n.slow.weight.requires_grad_(False),
        "plain requires grad": lambda n, *_: n.plain.requires_grad_(),
        "grad": lambda n, *_: setattr(n.slow.weight, "grad", torch.ones_like(n.slow.weight)),
        "grad in place": lambda n, *_: n.first.weight.grad.add_(1),
        "grad gone": lambda n, *_: setattr(n.first.weight, "grad", None),
        "note": lambda n, *_: setattr(n.first.weight, "note", "other"),
        "new note": lambda n, *_: setattr(n.middle.weight, "note", 1),
        "tensor hook": lambda n, *_: n.middle.weight.register_hook(lambda g: g),
        "sparse": lambda n, *_: n.sparse.mul_(2),
        "expanded": lambda n, *_: n.expanded[:1].add_(1),
        "batch norm in a dict": lambda n, b, x: F.batch_norm(x[:, :3], n.dict["a"], n.dict["b"][0], training=True),
        "batch norm in train mode": lambda n, b, x: F.batch_norm(
            n.first(x), *list(n.norm.buffers())[:2], training=True
        ),
        "counter": lambda n, *_: n.steps.add_(1),
        "buffer anew": lambda n, *_: setattr(n, "steps", n.steps + 1),
        "buffer registered": lambda n, *_: n.register_buffer("cache", torch.ones(2)),
        "parameter registered": lambda n, *_: n.register_parameter("more", nn.Parameter(torch.ones(2))),
        "parameter anew": lambda n, *_: setattr(n.slow, "bias", nn.Parameter(torch.ones_like(n.slow.bias))),
        "module added": lambda n, *_: n.add_module("more", nn.ReLU()),
        "module gone": lambda n, *_: delattr(n, "slow") if hasattr(n, "slow") else None,
        "module replaced": lambda n, *_: setattr(n, "slow", nn.ReLU()),
        "mode": lambda n, *_: n.norm.train(),
        "mode of all": lambda n, *_: n.train(not n.training),
        "momentum of norm": lambda n, *_: setattr(n.norm, "momentum", 0.9),
        "forward hook": lambda n, *_: n.middle.register_forward_hook(lambda *_: None),
        "backward hook": lambda n, *_: n.middle.register_full_backward_hook(lambda *_: None),
        "state dict hook": lambda n, *_: n.register_state_dict_post_hook(lambda *_: None),
        "global hook": lambda n, *_: nn.modules.module.register_module_forward_hook(lambda *_: None),
        "parametrization": lambda n, *_: nn.utils.parametrizations.weight_norm(n.slow),
        "number": lambda n, *_: n.helper(),
        "new attribute": lambda n, *_: setattr(n, "late", [1]),
        "attribute gone": lambda n, *_: vars(n).pop("number", None),
        "cached property": lambda n, *_: n.cached.add_(1),
        "list append": lambda n, *_: n.items.append(1),
        "list cleared": lambda n, *_: n.items.clear(),
        "list within": lambda n, *_: n.items[2].pop(),
        "list reversed": lambda n, *_: n.items.reverse(),
        "list item": lambda n, *_: n.items.__setitem__(0, torch.ones(3)),
        "dict key": lambda n, *_: n.dict.update(new=torch.ones(1)),
        "dict pop": lambda n, *_: n.dict.pop("a", None),
        "dict order": lambda n, *_: n.dict.update({"a": n.dict.pop("a")}),
        "dict value": lambda n, *_: n.dict.__setitem__(3, "four"),
        "ordered": lambda n, *_: n.ordered.move_to_end("a"),
        "default": lambda n, *_: n.default["b"].append(1),
        "default within": lambda n, *_: n.default["a"].append(1),
        "counted": lambda n, *_: n.counted.update("ab"),
        "deque": lambda n, *_: n.deque.append(4),
        "deque rotated": lambda n, *_: n.deque.rotate(),
        "set": lambda n, *_: n.set.add(3),
        "set gone": lambda n, *_: n.set.discard(1),
        "dict of its own class": lambda n, *_: n.named.update(b=2),
        "attribute of a dict": lambda n, *_: setattr(n.named, "count", 1),
        "object": lambda n, *_: setattr(n.held, "count", n.held.count + 1),
        "object attribute": lambda n, *_: setattr(n.held, "late", 1),
        "object tensor": lambda n, *_: setattr(n.held, "value", torch.ones(3)),
        "frozen object": lambda n, *_: n.frozen.items.append(1),
        "frozen forced": lambda n, *_: object.__setattr__(n.frozen, "items", [5]),
        "slot": lambda n, *_: setattr(n.slotted, "count", 5),
        "late slot": lambda n, *_: setattr(n.slotted, "late", 5),
        "slot gone": lambda n, *_: delattr(n.slotted, "count") if hasattr(n.slotted, "count") else None,
        "slot of a subclass": lambda n, *_: n.below.more.append(1),
        "slot above": lambda n, *_: setattr(n.below, "count", 4),
        "namespace": lambda n, *_: setattr(n.space, "count", n.space.count + 1),
        "named tuple": lambda n, *_: n.pair.first.append(1),
        "object in a tuple": lambda n, *_: setattr(n.tuple[2], "count", 3),
        "list in a tuple": lambda n, *_: n.tuple[1].append(3),
        "closure": lambda n, *_: n.counter(),
        "partial": lambda n, *_: n.partial(random.random()),
        "array": lambda n, *_: n.array.__iadd__(1),
        "array resized": lambda n, *_: n.array.resize(6, refcheck=False),
        "array of objects": lambda n, *_: n.objects[0].append(1),
        "tensor on an array": lambda n, *_: torch.from_numpy(n.array).add_(1),
        "bytes": lambda n, *_: n.bytes.extend(b"d"),
        "ints": lambda n, *_: n.ints.append(3),
        "count": lambda n, *_: next(n.ids),
        "cycle": lambda n, *_: next(n.cycle),
        "iterator": lambda n, *_: next(n.iterator, None),
        "class": lambda n, *_: setattr(type(n), "calls", type(n).calls + 1),
        "class table": lambda n, *_: n.table.__setitem__("count", n.table["count"] + 1),
        "class attribute": lambda n, *_: setattr(type(n), "late", 1),
        "class of an object": lambda n, *_: setattr(Held, "late", 1),
        "method": lambda n, *_: setattr(n, "forward", types.MethodType(lambda self, x: x, n)),
        "method of the class": lambda n, *_: setattr(type(n), "helper", lambda self: 1),
        "method attribute": lambda n, *_: setattr(type(n).helper, "calls", 1),
        "defaults": lambda n, *_: with_default(),
        "other class": lambda n, *_: setattr(n.slow, "__class__", nn.LazyLinear.__mro__[1]),
        "torch generator": lambda n, *_: torch.rand(2, generator=n.generator),
        "torch seed": lambda n, *_: torch.manual_seed(random.randrange(99)),
        "torch random": lambda n, *_: torch.rand(2),
        "numpy generator": lambda n, *_: n.numpy.random(2),
        "numpy state": lambda n, *_: n.state.rand(2),
        "numpy random": lambda n, *_: np.random.rand(2),
        "python generator": lambda n, *_: n.python.random(),
        "python random": lambda n, *_: random.random(),
        "cudnn precision": lambda n, *_: setattr(torch.backends.cudnn, PRECISION, NARROW),
        "matmul precision": lambda n, *_: torch.set_float32_matmul_precision("medium"),
        "cudnn benchmark": lambda n, *_: setattr(torch.backends.cudnn, "benchmark", True),
        "cudnn": lambda n, *_: setattr(torch.backends.cudnn, "enabled", False),
        "deterministic": lambda n, *_: torch.use_deterministic_algorithms(True, warn_only=True),
        "dtype": lambda n, *_: torch.set_default_dtype(torch.float64),
        "gradients": lambda n, *_: torch.set_grad_enabled(True),
        "anomaly": lambda n, *_: torch.autograd.set_detect_anomaly(True),
        "autocast cache": lambda n, *_: torch.set_autocast_cache_enabled(False),
        "autocast dtype": lambda n, *_: torch.set_autocast_dtype("cpu", torch.float16),
        "threads": lambda n, *_: torch.set_num_threads(torch.get_num_threads() % 2 + 1),
        "fast path": lambda n, *_: torch.backends.mha.set_fastpath_enabled(False),
        "flash": lambda n, *_: torch.backends.cuda.enable_flash_sdp(False),
        "environment": lambda n, *_: os.environ.__setitem__("STEPS", os.environ.get("STEPS", "") + "1"),
        "warnings": lambda n, *_: warnings.simplefilter("ignore"),
        "numpy errors": lambda n, *_: np.seterr(under="warn"),
        "images": lambda n, b, x: x.mul_(2),
        "images data": lambda n, b, x: x.data.add_(1),
        "images row": lambda n, b, x: x[0].zero_(),
        "batch key": lambda n, b, x: b.update(seen=1) if isinstance(b, dict) else x.add_(1),
        "batch pop": lambda n, b, x: b.pop("labels", None) if isinstance(b, dict) else x.sub_(1),
        "batch list": lambda n, b, x: b["names"].append("c") if isinstance(b, dict) else x.neg_(),
        "batch tensor": lambda n, b, x: b["mask"].fill_(0) if isinstance(b, dict) else x.abs_(),
        "batch object": lambda n, b, x: setattr(b["meta"], "count", 7) if isinstance(b, dict) else x.clamp_(0, 0.1),
        "file list": lambda n, *_: SEEN.append(1),
        "file tensor anew": lambda n, *_: TABLE.update(tensor=torch.ones(3)),
    }  # fmt: skip
    for name, change in others.items():
        add(name, change)

    def file_name(net, batch, images):
        global COUNT
        COUNT += 1

    add("file name", file_name)
    return found


MUTATIONS = [Mutation(name, change) for name, change in _found().items()]


def batch_of(size=4):
    """Return a batch with keys, tensors, lists and objects in it."""
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.randn(size, 6, generator=generator),
        "labels": torch.arange(size) % 3,
        "mask": torch.ones(size),
        "names": ["a", "b"],
        "meta": Held(),
    }


def made(mutation, wide=False, when="always"):
    """Return the network of a mutation, with gradients on some of its parameters."""
    torch.manual_seed(0)
    net = Net(mutation.change, wide)
    net.when = "always"
    net.first.weight.grad = torch.ones_like(net.first.weight)
    net.when = when
    return net


def picture(*roots, identities=True):
    """Return all that roots lead to, and the settings and generators of the process, as text that can be compared.

    Args:
        roots: Where to begin.
        identities: Whether it counts which objects they are.
    """
    lines, names, held = Lines(identities), {}, []
    for place, root in enumerate(roots):
        _draw(root, f"root{place}", lines, names, held)
    for kind in (Net, Held, Slotted, Below, Named):
        for name, value in vars(kind).items():
            _draw(value, f"{kind.__name__}.{name}", lines, names, held)
    for name in ("COUNT", "SEEN", "TABLE"):
        _draw(globals()[name], name, lines, names, held)
    _draw(with_default.__defaults__, "defaults", lines, names, held)
    _draw(with_default.__kwdefaults__, "keyword defaults", lines, names, held)
    hooks = [len(v) for k, v in vars(nn.modules.module).items() if k.startswith("_global") and isinstance(v, dict)]
    settings = (
        random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(), hooks,
        getattr(torch.backends.cudnn, PRECISION), torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled,
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.is_anomaly_enabled(), torch.is_autocast_cache_enabled(),
        torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"), torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(), dict(os.environ),
        str(warnings.filters), np.geterr(), torch.is_inference_mode_enabled(), torch.empty(0).device,
    )  # fmt: skip
    environment = {name: value for name, value in settings[18].items() if name != "PYTEST_CURRENT_TEST"}
    return [*lines, *(repr(value) for value in settings[:18]), repr(environment), *map(repr, settings[19:])]


class Lines(list):
    """Lines of text about objects."""

    def __init__(self, identities):
        super().__init__()
        self.identities = identities


def _draw(value, path, lines, names, held):
    """Write a value and all that it holds as lines; what comes twice is named by where it came first."""
    if isinstance(value, int | float | str | bytes | bool | type(None) | torch.dtype | torch.device):
        lines.append(f"{path} = {value!r}")
        return
    if id(value) in names:
        lines.append(f"{path} is {names[id(value)]}")
        return
    names[id(value)] = path
    held.append(value)  # so that its id is not used again
    lines.append(f"{path}: {type(value).__name__} {id(value) if lines.identities else ''}")
    below = {}
    if isinstance(value, torch.Tensor):
        _draw_tensor(value, path, lines)
        below = {**vars(value), "grad": value.grad if value.is_leaf else None}
    elif isinstance(value, np.ndarray) and value.dtype != object:
        lines.append(f"{path} = {value.shape} {value.tobytes().hex()}")
    elif isinstance(value, torch.Generator):
        lines.append(f"{path} = {value.get_state().numpy().tobytes().hex()}")
    elif isinstance(value, np.random.Generator):
        lines.append(f"{path} = {value.bit_generator.state}")
    elif isinstance(value, np.random.RandomState):
        lines.append(f"{path} = {value.get_state()[1].tobytes().hex()}, {value.get_state()[2:]}")
    elif isinstance(value, random.Random):
        lines.append(f"{path} = {value.getstate()}")
    elif isinstance(value, itertools.count):
        lines.append(f"{path} = {value!r}")
    elif isinstance(value, itertools.cycle | type(iter([]))):
        lines.append(f"{path} = {value.__reduce__()[1:]}" if not isinstance(value, itertools.cycle) else path)
        if isinstance(value, itertools.cycle):
            lines.append(repr([tuple(value.__reduce__()[1][0].__reduce__()[1:]), value.__reduce__()[2]]))
    elif isinstance(value, bytearray | array.array):
        lines.append(f"{path} = {value!r}")
    elif isinstance(value, types.FunctionType):
        below = {f"cell {i}": cell.cell_contents for i, cell in enumerate(value.__closure__ or ())} | vars(value)
    elif isinstance(value, partial):
        below = {"args": value.args}
    elif isinstance(value, dict):
        below = {f"key {key!r}": item for key, item in value.items() if key not in ("__dict__", "__weakref__")}
        if type(value) is Named:
            below |= vars(value)
    elif isinstance(value, list | tuple | deque | set | np.ndarray):
        below = dict(enumerate(value))
    elif not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        below = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            for slot in vars(kind).get("__slots__", ()):
                below[slot] = getattr(value, slot, "absent")
    for name, item in below.items():
        if name != "change":
            _draw(item, f"{path}.{name}", lines, names, held)


def _draw_tensor(tensor, path, lines):
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    values = tensor.detach().contiguous().numpy().tobytes()
    own = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.storage_offset())
    hooks = len(tensor._backward_hooks or ()) if tensor.is_leaf else 0
    lines.append(f"{path} = {own} {hooks} {hash(values)}")
