"""Plants errors in right cuts and counts how many of those that change what some operator computes the proof catches.

    python -m benchmarks.proof --errors 10000 --processes 2

An error counts if it has an effect: a plain run of the wrong slim model in float64, on random weights of ordinary size,
differs from that of the right one in the output of at least one operator, or it does not run. The proof is not asked.
Prints planted, effective, caught and missed by kind of error and by setting, and writes them with every miss, by name,
into ``proof.json`` beside this file.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import multiprocessing
import random
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune import PruningError
from lightning_prune.measure.footprint import Footprint
from lightning_prune.pruning.budget import Budget, Dense
from lightning_prune.pruning.filters import count_params, prepare
from lightning_prune.surgery import AttributeChange, Cut, Disproof, find_groups, held_number, verify
from lightning_prune.surgery.attributes import set_attributes_
from tests import models, sequences
from tests.programs import DTYPES, Program, Stage, build, compiled, draw, example_of, fresh_input
from tests.survivors import MisfitError
from tests.verdicts import EVERY_CONSTANT, choices, oracle, ordinary_, unequal

RESULTS = Path(__file__).with_suffix(".json")
Tensors = dict[str, Tensor]
Kept = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A network to cut.

    Attributes:
        name: What it is called, or what rebuilds it.
        build: Makes the model.
        example: What it is traced and proved on.
        fresh: Other inputs of ordinary size, in float64.
        program: The program it was made from, if any.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Any
    fresh: Any
    program: Program | None = None


@dataclass(frozen=True, eq=False)
class Planted:
    """A wrong cut.

    Attributes:
        kind: What was done.
        where: To which tensor or attribute.
        cut: The cut that says what is written.
        edit: What changes the slim values after that, in place.
    """

    kind: str
    where: str
    cut: Cut
    edit: Callable[[Tensors], None] | None = None

    def tensors(self, model: nn.Module) -> Tensors:
        """Make the slim values that would be written."""
        made = self.cut.tensors(model)
        if self.edit is not None:
            self.edit(made)
        return made


# Where errors are planted: networks


SLICED = {
    "width": 16, "taken": "slice", "count": 4, "stat": "layer", "only": "first", "how": "literal", "closed": True,
}  # fmt: skip
CONFIGURED = {
    "heads": 4, "head": 4, "shared": 4, "packed": "chunk", "view": "reshape -1", "product": "sdpa", "extra": "none",
    "joined": "reshape", "how": "config", "size_how": "literal",
}  # fmt: skip
LAYERED = {"count": 4, "spare": 0, "kind": "heads", "scale": 1e-6, "how": "literal"}
CASES: dict[str, Program] = {
    "group norm as a function": Program(
        "image", 16, (Stage("layer", options={"width": 16, "norm_kind": "group", "how": "attribute"}),)
    ),
    "literal slice and a statistic": Program("image", 16, (Stage("pieces", options=SLICED),)),
    "heads in a config": Program("tokens", 16, (Stage("attention", "scaled", CONFIGURED),)),
    "another attribute of equal value": Program("tokens", 16, (Stage("layered", options=LAYERED),)),
    "a detector without detections": Program(
        "image", 16, (Stage("layer", options={"width": 16, "norm_kind": "none", "how": "literal"}),), tail="boxes"
    ),
    "a sibling that did not run": Program(
        "image", 16, (Stage("layer", options={"width": 16, "norm_kind": "none", "how": "literal"}),), tail="tasks"
    ),
    "heads that training runs": Program(
        "tokens", 16, (Stage("layer", options={"width": 16, "norm_kind": "none", "how": "literal"}),), tail="listed"
    ),
    "a branch of training": Program(
        "image", 16, (Stage("trained", options={"width": 8, "form": "more", "how": "literal"}),)
    ),
    "kernels made from data": Program(
        "image", 12, (Stage("dynamic", options={"width": 8, "form": "shape", "how": "attribute"}),)
    ),
}  # fmt: skip
"""Programs in which cuts were once wrong."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class GPT(nn.Module):
    """A transformer over tokens, initialised as GPT-2 is: normal weights of 0.02, smaller ones on the residual path."""

    def __init__(self, depth: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, width), nn.Embedding(16, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 50, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = "c_proj" in name or ".2.weight" in name
                nn.init.normal_(parameter, 0.0, 0.02 / (2 * depth) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.lm_head(self.ln_f(x))


def scaled(program: Program) -> Program:
    """Let every stage that can join by a LayerScale of 1e-6."""
    return dataclasses.replace(program, stages=tuple(dataclasses.replace(s, join="scaled") for s in program.stages))


def tailed(*tails: str) -> Callable[[Program], Program]:
    return lambda program: dataclasses.replace(program, tail=tails[program.seed % len(tails)])


def as_dtype(dtype: str) -> Callable[[Program], Program]:
    return lambda program: dataclasses.replace(program, dtype=dtype)


SETTINGS: dict[str, Callable[[Program], Program]] = {
    "float32": as_dtype("float32"),
    "bfloat16": as_dtype("bfloat16"),
    "float64": as_dtype("float64"),
    "LayerScale 1e-6": scaled,
    "integers": tailed("argmax", "threshold"),
    "loss alone": tailed("square", "cross"),
    "no numbers": tailed("nan", "complex"),
}
GPT_SETTING = "GPT-2 init"


def subject_of(program: Program, name: str = "") -> Subject:
    return Subject(name or repr(program), lambda: build(program), example_of(program), fresh_input(program, 5), program)


def networks(dtype: torch.dtype) -> Iterator[Subject]:
    """Yield the small networks of the tests."""
    for name, net in models.NETS.items():
        inputs = cast(net.inputs, dtype)
        yield Subject(name, lambda b=net.build: lively(seeded(b)).to(dtype).eval(), inputs, renewed(net.inputs))
    for name, sequence in sequences.ATTENTION.items():
        make = lambda b=sequence.build: lively(seeded(b)).to(dtype).eval()  # noqa: E731
        yield Subject(name, make, cast(sequences.TOKENS, dtype), renewed(sequences.TOKENS))
    for name, recurrent in sequences.RECURRENT.items():
        make = lambda b=recurrent: lively(seeded(b)).to(dtype).eval()  # noqa: E731
        yield Subject(name, make, cast(sequences.TOKENS, dtype), renewed(sequences.TOKENS))


def gpts() -> Iterator[Subject]:
    """Yield fresh transformers, shallow and deep."""
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    fresh = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(2))
    for depth, dtype in itertools.product((2, 12), (torch.float32, torch.bfloat16)):
        make = lambda d=depth, t=dtype: seeded(lambda: GPT(d)).to(t).eval()  # noqa: E731
        yield Subject(f"GPT of {depth} layers, {str(dtype)[6:]}", make, tokens, fresh)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def lively(model: nn.Module) -> nn.Module:
    """Give vectors that start as zeros or ones random entries: among equal ones no error shows."""
    generator = torch.Generator().manual_seed(4)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point() and torch.equal(tensor, tensor[:1].expand_as(tensor)):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    return mapped(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)


def renewed(inputs: Any) -> Any:
    generator = torch.Generator().manual_seed(9)

    def other(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64) if t.is_floating_point() else t

    return mapped(inputs, other)


def mapped(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, dict):
        return {key: mapped(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(mapped(value, function) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


# What is planted


def planted(subject: Subject, model: nn.Module, structure: Any, cut: Cut, r: random.Random) -> Iterator[Planted]:
    """Yield wrong cuts of every kind that this cut has a place for."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = [(name, dim) for name, dims in cut.kept.items() for dim in dims if visible(structure, cut, name, dim)]
    buffers = {name for name, _ in model.named_buffers()}
    kinds = {
        "another index": lambda kept, size: another(kept, size, r),
        "shifted indices": lambda kept, size: ((kept + 1) % size).sort().values,
        "other rows": lambda kept, size: torch.tensor(sorted(r.sample(range(size), len(kept)))),
        "rows in another order": lambda kept, size: reordered(kept, r),
        "one slot not cut": lambda kept, size: torch.arange(size),
    }
    for kind, change in kinds.items():
        # torch reads beyond its memory where the two parts of a weight norm differ in size
        free = [p for p in places if "parametrizations" not in p[0]] if kind == "one slot not cut" else places
        for name, dim in r.sample(free, min(2, len(free))):
            yield from replaced(kind, cut, own, name, dim, change(cut.kept[name][dim], own[name].shape[dim]), r)
    for kind, some in (
        ("buffer cut elsewhere", [p for p in places if p[0] in buffers]),
        ("bias cut elsewhere", [p for p in places if own[p[0]].dim() == 1 and p[0] not in buffers]),
    ):
        for name, dim in r.sample(some, min(2, len(some))):
            kept = cut.kept[name][dim]
            yield from replaced(kind, cut, own, name, dim, another(kept, own[name].shape[dim], r), r)
    for name in r.sample(sorted(cut.kept), min(2, len(cut.kept))):
        if own[name].is_floating_point():
            yield Planted("a row scaled by 1.1", name, cut, row_scaled(name, next(iter(cut.kept[name])), r))
    changes = list(cut.attributes)
    for change in r.sample(changes, min(3, len(changes))):
        rest = tuple(c for c in changes if c is not change)
        yield Planted("stale attribute", named(change), dataclasses.replace(cut, attributes=rest))
    for change in counts(model, changes, r):
        rest = tuple(c for c in changes if (c.module, c.name) != (change.module, change.name))
        yield Planted(
            "wrong count", f"{named(change)}={change.new}", dataclasses.replace(cut, attributes=(*rest, change))
        )
    yield from heads_misread(model, cut)
    if subject.program is not None:
        yield from regrouped(structure, cut, own, r)


def visible(structure: Any, cut: Cut, name: str, dim: int) -> bool:
    """Say whether an error there is one: groups that live in a single place may keep any of their units."""
    groups = [structure.groups[group] for group in cut.keep]
    touching = [g for g in groups if any((slot.tensor, slot.dim) == (name, dim) for slot in g.slots)]
    return all(len({(slot.tensor, slot.dim) for slot in g.slots}) > 1 for g in touching)


def another(kept: Tensor, size: int, r: random.Random) -> Tensor:
    """Swap one index that is kept for one that is not, in place of the other."""
    gone = sorted(set(range(size)) - set(kept.tolist()))
    wrong = kept.clone()
    if gone:
        wrong[r.randrange(len(kept))] = r.choice(gone)
    return wrong


def reordered(kept: Tensor, r: random.Random) -> Tensor:
    if len(kept) < 2:
        return kept
    i, j = r.sample(range(len(kept)), 2)
    wrong = kept.clone()
    wrong[i], wrong[j] = kept[j], kept[i]
    return wrong


def replaced(
    kind: str, cut: Cut, own: Tensors, name: str, dim: int, index: Tensor, r: random.Random
) -> Iterator[Planted]:
    """Yield the cut with other indices in one slot: in what is planned, or only in what is written."""
    if torch.equal(index, cut.kept[name][dim]):
        return
    dims = {**cut.kept[name], dim: index}
    where = f"{name} dim {dim}"
    if r.random() < 0.5:
        shape = tuple(dims[d].numel() if d in dims else size for d, size in enumerate(own[name].shape))
        kept, shapes = {**cut.kept, name: dims}, {**cut.shapes, name: shape}
        yield Planted(kind, f"{where}, planned", dataclasses.replace(cut, kept=kept, shapes=shapes))
        return

    def edit(tensors: Tensors) -> None:
        tensors[name] = narrowed(own[name].detach(), dims)

    yield Planted(kind, f"{where}, written", cut, Written(edit, {name: dims}))


@dataclass(frozen=True, eq=False)
class Written:
    """An edit of slim values that are selections of the full ones, which can be done to other weights as well."""

    edit: Callable[[Tensors], None]
    dims: Kept

    def __call__(self, tensors: Tensors) -> None:
        self.edit(tensors)


def row_scaled(name: str, dim: int, r: random.Random) -> Callable[[Tensors], None]:
    share = r.random()

    def edit(tensors: Tensors) -> None:
        value = tensors[name] = tensors[name].detach().clone()
        value.select(dim, int(share * value.shape[dim])).mul_(1.1)

    return edit


def counts(model: nn.Module, changes: list[AttributeChange], r: random.Random) -> list[AttributeChange]:
    """Return wrong values of whole numbers that modules hold: those that change, and others."""
    now = {(change.module, change.name): change.new for change in changes}
    old = {(change.module, change.name): change.old for change in changes}  # some stand in objects that modules hold
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and not name.startswith("_"):
                now.setdefault((path, name), value)
    now = {place: value for place, value in now.items() if type(value) is int and value > 0}
    found = []
    for path, name in r.sample(sorted(now), min(3, len(now))):
        value = now[path, name]
        wrong = r.choice([v for v in (value - 1, value + 1, value // 2, 2 * value) if v > 0 and v != value])
        found.append(AttributeChange(path, name, old.get((path, name), value), wrong))
    return found


def named(change: AttributeChange) -> str:
    return f"{change.module}.{change.name}".lstrip(".")


HEADS = ("num_heads", "heads", "n_head")
SIZES = ("head_dim",)


def heads_misread(model: nn.Module, cut: Cut) -> Iterator[Planted]:
    """Where whole heads left, keep their number and make each narrower; where each lost a share, the other way."""
    for change in cut.attributes:
        holder, _, last = change.name.rpartition(".")  # of a number in an object that the module holds
        if last not in (*HEADS, *SIZES) or not isinstance(change.old, int):
            continue
        rest = [c for c in cut.attributes if c is not change]
        module = model.get_submodule(change.module)
        for other in SIZES if last in HEADS else HEADS:
            name = f"{holder}.{other}".lstrip(".")
            size = held_number(module, name)
            if isinstance(size, int) and not any((c.module, c.name) == (change.module, name) for c in rest):
                wrong = size * change.new // change.old
                if wrong and wrong != size:
                    other = AttributeChange(change.module, name, size, wrong)
                    where = f"{named(change)} stays {change.old}, {name} becomes {wrong}"
                    yield Planted(
                        "heads at the wrong width", where, dataclasses.replace(cut, attributes=(*rest, other))
                    )


def regrouped(structure: Any, cut: Cut, own: Tensors, r: random.Random) -> Iterator[Planted]:
    """Keep other units of a group, in all its slots alike, without heeding which of them belong together."""
    for name in r.sample(sorted(cut.keep), min(2, len(cut.keep))):
        slots = structure.groups[name].slots
        dims = {(slot.tensor, slot.dim): slot for slot in slots}
        sizes = {own[tensor].shape[dim] for tensor, dim in dims}
        if len(sizes) != 1 or any((slot.units < 0).any() for slot in slots):
            continue  # part of other groups too
        size = sizes.pop()
        counted = {len(cut.kept[tensor][dim]) for tensor, dim in dims}
        if len(counted) != 1:
            continue
        index = torch.arange(counted.pop()) if r.random() < 0.5 else None
        if index is None:
            index = torch.tensor(sorted(r.sample(range(size), len(cut.kept[slots[0].tensor][slots[0].dim]))))
        kept = {tensor: dict(held) for tensor, held in cut.kept.items()}
        for tensor, dim in dims:
            kept[tensor][dim] = index
        if not all(torch.equal(kept[t][d], cut.kept[t][d]) for t, d in dims):
            yield Planted("units taken apart", f"{name} keeps {index.tolist()}", dataclasses.replace(cut, kept=kept))


def narrowed(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index)
    return tensor


# Whether an error has an effect


class Recorded(TorchDispatchMode):
    """Writes down what every operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and "empty" not in str(func):  # what was not written holds anything
                self.outputs.append((str(func), value.detach().clone()))
        return result


def stand_in(model: nn.Module) -> nn.Module:
    """Return a copy in float64 with random weights of ordinary size."""
    other = ordinary_(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(11)
    for name, parameter in other.named_parameters():
        last = name.rpartition(".")[2]
        if last == "shift":
            continue
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            value /= max(parameter[0].numel(), 1) ** 0.5
        else:
            value = 0.75 + 0.25 * value.tanh()
        parameter.data.copy_(value)
    for name, buffer in other.named_buffers():
        if buffer.is_floating_point() and name.endswith(("running_mean", "running_var")):
            buffer.data.uniform_(0.5, 1.5, generator=generator)
    return other


def written(full: nn.Module, tensors: Tensors, attributes: tuple[AttributeChange, ...]) -> nn.Module:
    """Return a copy with other tensors and attributes."""
    slim = copy.deepcopy(full)
    own = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
    for name, value in tensors.items():
        own[name].data = value.clone()
    set_attributes_(slim, attributes)
    return slim


@contextmanager
def filled() -> Iterator[None]:
    """Let memory that nothing was written to hold NaN, so that two runs read the same there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def recorded(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Run a model and return what every operator of the run returned."""
    with filled(), torch.no_grad(), torch.random.fork_rng(), Recorded() as mode:
        torch.manual_seed(0)
        if isinstance(inputs, dict):
            model(**inputs)
        else:
            model(*inputs if isinstance(inputs, tuple) else (inputs,))
    return mode.outputs


class Reference:
    """What the right slim model computes on stand-in weights, and whether a wrong one does otherwise."""

    def __init__(self, subject: Subject, model: nn.Module, cut: Cut) -> None:
        self.subject, self.full, self.cut = subject, stand_in(model), cut
        self.slim = written(self.full, cut.tensors(self.full), cut.attributes)
        self.right = recorded(self.slim, subject.fresh)

    def changes(self, error: Planted) -> str:
        """Say what the error changes, or return nothing if it has no effect."""
        tensors = dict(error.cut.tensors(self.full))
        if isinstance(error.edit, Written):
            own = {**dict(self.full.named_parameters()), **dict(self.full.named_buffers())}
            tensors |= {name: narrowed(own[name].detach(), dims) for name, dims in error.edit.dims.items()}
        elif error.edit is not None:
            error.edit(tensors)
        try:
            slim = written(self.full, tensors, error.cut.attributes)
            found = recorded(slim, self.subject.fresh)
        except Exception as failure:
            return f"does not run ({type(failure).__name__})"
        if error.kind == "units taken apart":  # other units may be as right as these
            return self.misjudged(error, slim)
        if len(found) != len(self.right):
            return f"{len(found)} operators run instead of {len(self.right)}"
        for (name, ours), (_, theirs) in zip(found, self.right, strict=True):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                return f"{name} returns {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
            if not close(ours, theirs):
                return f"{name} returns other numbers"
        return ""

    def misjudged(self, error: Planted, slim: nn.Module) -> str:
        program = self.subject.program
        assert program is not None
        real = type(slim)
        slim.__class__ = compiled(program, probe=True)
        with torch.no_grad():
            found = slim(self.subject.fresh)
        slim.__class__ = real
        reasons = []
        for constants in choices(program, EVERY_CONSTANT):  # whether they may is the hunt's question
            try:
                expected = oracle(program, self.full, error.cut.kept, self.subject.fresh, False, {}, constants)
                reasons.append(unequal(expected, found, 1e-7))
            except MisfitError as failure:
                reasons.append(str(failure))
        return reasons[0] if all(reasons) else ""


def close(ours: Tensor, theirs: Tensor) -> bool:
    if not ours.dtype.is_floating_point and not ours.dtype.is_complex:
        return torch.equal(ours, theirs)
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return False
    scale = float(theirs[finite].abs().max()) if finite.any() else 0.0
    return not finite.any() or float((ours - theirs)[finite].abs().max()) <= 1e-6 * max(scale, 1e-30)


# The count


def tried(subject: Subject, setting: str, seed: int) -> list[dict[str, Any]]:
    """Cut one network, plant errors, and return a row for each: what it was, its effect, and if it was caught."""
    r = random.Random(seed)
    model = subject.build()
    try:
        structure = find_groups(model, subject.example)
        if not structure.groups:
            return []
        scores = {
            name: torch.tensor([r.random() for _ in range(group.width)]) for name, group in structure.groups.items()
        }
        widths = {name: group.width for name, group in structure.groups.items()}
        prepared = prepare(
            model, subject.example, structure, scores, r.choice((0.3, 0.5)), Budget(),
            dense=Dense(widths, Footprint(count_params(model), 0)),
        )  # fmt: skip
    except PruningError:
        return []
    except Exception as failure:
        why = f"pruning raised {type(failure).__name__}: {failure}"
        return [row(setting, subject, Planted("the cut itself", "", Cut({}, {}, {}, ())), why, False)]
    # Errors are planted in cuts as they are verified first: without what compensates numbers made from widths.
    structure, cut = prepared.structure, replace(prepared.cut, scales={})
    if not cut.kept:
        return []
    reference = Reference(subject, model, cut)
    if subject.program is not None and reference.misjudged(Planted("", "", cut), reference.slim):
        return [row(setting, subject, Planted("the cut itself", "", cut), "wrong from the start", False)]
    rows = []
    for error in [Planted("none: the right cut", "", cut), *planted(subject, model, structure, cut, r)]:
        harmless = error.kind.startswith("none") or (error.edit is not None and writes_the_same(error, model))
        effect = "" if harmless else reference.changes(error)
        try:
            caught = isinstance(verify(model, structure, error.cut, lambda e=error: e.tensors(model)), Disproof)
        except Exception as failure:  # it would stop the run, not go on with a wrong model; still no verdict
            caught, effect = False, effect and f"{effect}; the proof raised {type(failure).__name__}: {failure}"
        rows.append(row(setting, subject, error, effect, caught))
    return rows


def writes_the_same(error: Planted, model: nn.Module) -> bool:
    """Say whether an error in what is written leaves every value as it was, as among equal weights."""
    wrong, right = error.tensors(model), error.cut.tensors(model)
    return all(wrong[name].shape == right[name].shape and torch.equal(wrong[name], right[name]) for name in right)


def row(setting: str, subject: Subject, error: Planted, effect: str, caught: bool) -> dict[str, Any]:
    return {
        "setting": setting, "kind": error.kind, "network": subject.name, "where": error.where, "effect": effect,
        "caught": caught,
    }  # fmt: skip


def task(number: int) -> list[dict[str, Any]]:
    """Try the network of a number: first the small ones and the cases, then random programs in every setting."""
    fixed = fixed_subjects()
    if number < len(fixed):
        setting, subject = fixed[number]
    else:
        names = list(SETTINGS)
        setting = names[number % len(names)]
        program = SETTINGS[setting](draw(random.Random(number)))
        subject = subject_of(program)
    return tried(subject, setting, number)


@cache
def fixed_subjects() -> list[tuple[str, Subject]]:
    """Return the networks that are always there, with their settings."""
    found: list[tuple[str, Subject]] = []
    for setting in ("float32", "bfloat16", "float64"):
        found += [(setting, subject) for subject in networks(DTYPES[setting])]
    for setting, change in SETTINGS.items():
        for name, program in CASES.items():
            tail = program.tail if setting in ("float32", "bfloat16", "float64", "LayerScale 1e-6") else None
            changed = change(program)
            found.append((setting, subject_of(dataclasses.replace(changed, tail=tail or changed.tail), name)))
    return found + [(GPT_SETTING, subject) for subject in gpts()]


def start() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def plant(least: int, processes: int, first: int = 0, progress: Console | None = None) -> list[dict[str, Any]]:
    """Plant errors until so many of them have an effect."""
    rows: list[dict[str, Any]] = []
    effective, batch, begun = 0, 16 * processes, time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start) as pool:  # which says so when a process dies
        while effective < least:
            for found in pool.map(task, range(first, first + batch)):
                rows += found
            first += batch
            effective = sum(bool(r["effect"]) for r in rows)
            if progress:
                missed = sum(bool(r["effect"]) and not r["caught"] for r in rows)
                progress.print(f"{effective} errors, {missed} missed, {time.monotonic() - begun:.0f} seconds")
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Counter]]:
    """Count by kind and setting: planted, effective, caught, missed."""
    found: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for r in rows:
        for setting in (r["setting"], "all"):
            cell = found[r["kind"]][setting]
            cell["planted"] += 1
            if r["effect"]:
                cell["effective"] += 1
                cell["caught" if r["caught"] else "missed"] += 1
            elif r["caught"]:
                cell["refused without effect"] += 1
    return {kind: dict(cells) for kind, cells in found.items()}


def table(counted: dict[str, dict[str, Counter]]) -> Table:
    settings = [*SETTINGS, GPT_SETTING]
    laid = Table(title="Errors that change an operator's output: caught / effective")
    for column in ("error", "planted", "effective", "caught", "missed", *settings):
        laid.add_column(column, justify="left" if column == "error" else "right")
    total: dict[str, Counter] = defaultdict(Counter)
    for kind, cells in counted.items():
        if kind.startswith("none"):
            continue
        laid.add_row(kind, *cells_of(cells, settings))
        for setting, cell in cells.items():
            total[setting].update(cell)
    laid.add_section()
    laid.add_row("all", *cells_of(total, settings))
    right = counted.get("none: the right cut", {}).get("all", Counter())
    laid.caption = f"Right cuts tried beside them: {right['planted']}, refused: {right['refused without effect']}"
    return laid


def cells_of(cells: Mapping[str, Counter], settings: list[str]) -> list[str]:
    whole = cells.get("all", Counter())
    each = [cells.get(setting, Counter()) for setting in settings]
    shares = [f"{c['caught']}/{c['effective']}" if c["effective"] else "" for c in each]
    return [*(str(whole[name]) for name in ("planted", "effective", "caught", "missed")), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=int, default=10_000, help="how many errors with an effect, at least")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(width=160)
    begun = time.monotonic()
    rows = plant(arguments.errors, arguments.processes, arguments.first, console)
    counted = summary(rows)
    console.print(table(counted))
    missed = [r for r in rows if r["effect"] and not r["caught"]]
    for r in missed[:100]:
        console.print(f"missed: {r['kind']}: {r['where']} in {r['network'][:100]}: {r['effect']}", markup=False)
    told = {
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - begun),
        "counts": counted,
        "missed": missed,
    }
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
