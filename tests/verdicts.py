"""Judges what the library made of a random program, by an oracle that shares no code with it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import PruningError, prune_filters
from tests.programs import DTYPES, Program, build, compiled, example_of, fresh_input, source
from tests.survivors import MisfitError, Survivors, marked, narrow_scales, plain, survivors_along

__all__ = ["EVERY_CONSTANT", "Verdict", "judge", "shrunk", "told"]

UNRELATED = ("n_layers",)
"""Attributes that no cut may change."""


@dataclass(frozen=True)
class Verdict:
    """What came of pruning one program.

    Attributes:
        outcome: ``"right"``, ``"whole"`` (nothing was cut, with a reason) or ``"wrong"``.
        why: What is wrong, or why nothing was cut.
        rows: For each stage and the rest of the network, the rows of its weights before and after.
        followed: Whether constants made from a width followed it, as the report or the operator says.
    """

    outcome: str
    why: str = ""
    rows: Mapping[str, tuple[int, int]] | None = None
    followed: bool = False


def judge(program: Program) -> Verdict:
    """Prune the network of a program and compare it with the oracle on inputs that the library did not see."""
    full = build(program)
    slim = copy.deepcopy(full)
    try:
        report = prune_filters(
            slim, example_of(program), program.amount, criterion="l1", scope=program.scope, progress=False
        )  # type: ignore[arg-type]
    except PruningError as error:
        changed = [name for name, tensor in slim.state_dict().items() if tensor.shape != full.state_dict()[name].shape]
        return (
            Verdict("wrong", f"refused, but cut: {changed}")
            if changed
            else Verdict("whole", str(error), rows(full, full))
        )
    except Exception as error:
        return Verdict("wrong", f"pruning raised {type(error).__name__}: {error}")
    counted = rows(full, slim)
    if not report.kept:
        reasons = [pinned.reason for pinned in report.pinned]
        if not reasons:
            return Verdict("wrong", "nothing was cut and no reason is named", counted)
        return Verdict("whole", "; ".join(dict.fromkeys(reasons)), counted)
    if strange := changed_attributes(full, slim) or changed_buffers(full, slim, report.kept):
        return Verdict("wrong", strange, counted)
    wrong, followed = compared(program, full, slim, report)
    return Verdict("wrong" if wrong else "right", wrong, counted, followed)


def rows(full: nn.Module, slim: nn.Module) -> dict[str, tuple[int, int]]:
    """Count the rows of the weights of every stage, before and after; the last layers cannot lose any."""
    found: dict[str, tuple[int, int]] = {}
    after = dict(slim.named_parameters())
    for name, weight in full.named_parameters():
        part = name.split(".")[0]
        if weight.dim() < 2 or part in ("head", "heads", "aux", "other", "cls", "box"):
            continue
        before, left = found.get(part, (0, 0))
        found[part] = before + weight.shape[0], left + after[name].shape[0]
    return found


def changed_attributes(full: nn.Module, slim: nn.Module) -> str:
    """Name an attribute that changed though it has nothing to do with widths."""
    for (path, old), (_, new) in zip(full.named_modules(), slim.named_modules(), strict=True):
        for name in UNRELATED:
            if getattr(old, name, None) != getattr(new, name, None):
                return f"{path}.{name} changed from {getattr(old, name)} to {getattr(new, name)}"
    return ""


def changed_buffers(full: nn.Module, slim: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> str:
    """Name a buffer that holds anything but what was kept of it, such as statistics that moved while it was pruned."""
    after = dict(slim.named_buffers())
    for name, buffer in full.named_buffers():
        for dim, index in kept.get(name, {}).items():
            buffer = buffer.index_select(dim, index)
        if buffer.shape != after[name].shape or not torch.equal(buffer, after[name]):
            return f"{name} does not hold what was kept of it"
    return ""


def ordinary_(model: nn.Module) -> nn.Module:
    """Open what hides errors: scales that are next to nothing, and thresholds that nothing passes."""
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "gain" or (last[0] == "g" and last[1:].isdigit()):
            parameter.data.fill_(1.0)
        elif last == "shift":
            parameter.data.fill_(0.1)
    return model.double()


def compared(program: Program, full: nn.Module, slim: nn.Module, report: Any) -> tuple[str, bool]:
    """Return what is wrong with the slim model, if anything, and whether constants followed their widths."""
    exact = follows(full, slim, report.kept)
    spare = 1e-9 if exact or program.dtype == "float64" else 64 * torch.finfo(DTYPES[program.dtype]).eps
    full, slim = ordinary_(copy.deepcopy(full)), ordinary_(copy.deepcopy(slim))
    real = type(slim)
    probe = compiled(program, probe=True)
    followed = False
    for training, arguments in paths(program):
        x = fresh_input(program, 77)
        expected = None
        try:
            shapes = [structure(run(model, x, training, arguments)) for model in (full, slim)]
            slim.__class__ = probe
            found = run(slim, x, training, arguments)
        except Exception as error:
            if arguments and untouched(full, slim, "other"):
                continue  # no example showed this path, and nothing in it was changed
            return f"{where(training, arguments)}: the slim model raises {type(error).__name__}: {error}", followed
        finally:
            slim.__class__ = real
        if shapes[0] != shapes[1]:
            return f"{where(training, arguments)}: outputs {shapes[0]} became {shapes[1]}", followed
        reasons = []
        for constants in choices(program, report):
            try:
                expected = oracle(program, full, report.kept, x, training, arguments, constants)
                reason = unequal(expected, found, spare)
            except MisfitError as error:
                reason = str(error)
            if not reason:
                followed |= any(constants.values())
                break
            reasons.append(reason)
        else:
            if arguments and untouched(full, slim, "other"):
                continue
            for constants in choices(program, EVERY_CONSTANT):
                with suppress(MisfitError):
                    expected = oracle(program, full, report.kept, x, training, arguments, constants)
                    if not unequal(expected, found, spare):
                        reasons[0] += "; a constant follows its width, and the report does not name it"
                        break
            return f"{where(training, arguments)}: {reasons[0]}", followed
        if wrong := places_lost(program, expected):
            return wrong, followed
    return "", followed


def paths(program: Program) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield the ways through the network: evaluation, training, and the task that no example shows."""
    yield False, {}
    yield True, {}
    if program.tail == "tasks":
        yield False, {"task": 1}


def where(training: bool, arguments: dict[str, Any]) -> str:
    return " ".join(["training" if training else "eval", *(f"{k}={v}" for k, v in arguments.items())])


def run(model: nn.Module, x: Tensor, training: bool, arguments: dict[str, Any]) -> Any:
    """Run a copy, so that statistics that training gathers do not stay."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return copy.deepcopy(model).train(training)(x, **arguments)


def structure(outputs: Any) -> Any:
    """Return the shapes and types of outputs; of selections only what each entry is."""
    if isinstance(outputs, dict):
        return {key: (tuple(value.shape[1:]), value.dtype) for key, value in outputs.items()}
    if isinstance(outputs, tuple):
        return tuple(structure(value) for value in outputs)
    return tuple(outputs.shape), outputs.dtype


def untouched(full: nn.Module, slim: nn.Module, part: str) -> bool:
    """Say whether a module was left exactly as it was."""
    pairs = zip(getattr(full, part).parameters(), getattr(slim, part).parameters(), strict=True)
    return all(old.shape == new.shape and torch.equal(old, new) for old, new in pairs)


def follows(full: nn.Module, slim: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> bool:
    """Say whether the slim tensors hold what was kept, bit by bit; else something was compensated for."""
    after = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
    for name, tensor in {**dict(full.named_parameters()), **dict(full.named_buffers())}.items():
        for dim, index in kept.get(name, {}).items():
            tensor = tensor.index_select(dim, index)
        if tensor.shape != after[name].shape or not torch.equal(tensor, after[name]):
            return False
    return True


def choices(program: Program, report: Any) -> Iterator[dict[str, Any]]:
    """Yield which constants made from widths go by the slim width; by default all go by the original one.

    Attention may divide by either width, as ``scaled_dot_product_attention`` does by its own; a mean written out as a
    sum and a division is one over what survives. Any other constant must stay unless the report names its module; then
    it may also be the new value of an attribute that the report names.
    """
    named = " ".join(str(constant) for constant in constants_of(report))
    places = dict.fromkeys(re.findall(r'"(\w+ of s\d)"', source(program, oracle=True)))
    free: dict[str, tuple[Any, ...]] = {}
    for place in places:
        module = place.split()[-1]
        if not place.startswith("other") or module in named:
            free[place] = (False, True)
        if module in named:  # an attribute that is read for this number may follow another width
            changes = [change for change in getattr(report, "attributes", ()) if change.module == module]
            free[place] += tuple({change.new for change in changes if isinstance(change.new, int)})
    if any(stage.kind == "attention" for stage in program.stages):
        free[OPERATOR] = (False, True)
    for values in itertools.product(*free.values()):
        yield dict(zip(free, values, strict=True))


@dataclass(frozen=True)
class Followed:
    """A report that names constants of modules."""

    constants: tuple[str, ...]


EVERY_CONSTANT = Followed(tuple(f"s{i}" for i in range(9)))
"""A report by which any constant may follow its width."""
OPERATOR = "scaled_dot_product_attention"


def constants_of(report: Any) -> tuple[Any, ...]:
    """Return the constants that the report says follow a width."""
    return tuple(getattr(report, "constants", ()) or getattr(report, "rescaled", ()))


def oracle(
    program: Program,
    full: nn.Module,
    kept: Mapping[str, Mapping[int, Tensor]],
    x: Tensor,
    training: bool,
    arguments: dict[str, Any],
    constants: Mapping[str, Any],
) -> Any:
    """Run the program at full width on the full model's weights, marked by what the report says is kept."""

    def width(tensor: Any, dim: int, kind: str) -> int:
        chosen = constants.get(kind, False)
        if chosen is True:
            return survivors_along(tensor, dim)
        return chosen or tensor.shape[dim]

    model = build(replace(program, dtype="float64"), compiled(program, oracle=True, probe=True, WIDTH=width))
    for (path, module), (_, other) in zip(model.named_modules(), full.named_modules(), strict=True):
        for held, theirs in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            for name, tensor in theirs.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                alive = torch.ones(tensor.shape, dtype=torch.bool)
                for dim, index in kept.get(f"{path}.{name}".lstrip("."), {}).items():
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                    gone[index] = False
                    alive.index_fill_(dim, gone.nonzero().squeeze(1), False)
                held[name] = marked(tensor.detach(), alive)  # type: ignore[assignment]
    model.train(training)
    with torch.no_grad(), torch.random.fork_rng(), narrow_scales(constants.get(OPERATOR, False)):
        torch.manual_seed(0)
        return model(marked(x), **arguments)


def unequal(expected: Any, found: Any, spare: float) -> str:
    """Say how outputs differ, if they do."""
    if isinstance(expected, tuple):
        reasons = [unequal(one, other, spare) for one, other in zip(expected, found, strict=True)]
        return next((reason for reason in reasons if reason), "")
    if not isinstance(expected, Survivors):
        raise TypeError("an output hangs on nothing")
    left = plain(expected)[expected.alive]
    if left.numel() != found.numel():
        return f"{found.numel()} entries where {left.numel()} survive"
    if not left.numel():
        return ""
    difference = float((left - found.flatten()).abs().max()) / max(float(left.abs().max()), 1e-30)
    return "" if difference <= spare else f"wrong by {difference:.2g}"


def places_lost(program: Program, features: Any) -> str:
    """Say so if outputs that name places were made from features of which some are gone."""
    for value in features if isinstance(features, tuple) else (features,):
        if program.tail != "square" and not value.alive.all():
            return "outputs lost entries"
    return ""


def shrunk(program: Program, budget: int = 60) -> Program:
    """Return a simpler program that is judged wrong too."""
    tried = 0
    again = True
    while again:
        again = False
        for simpler in simpler_ones(program):
            tried += 1
            if tried > budget:
                return program
            try:
                wrong = judge(simpler).outcome == "wrong"
            except Exception:
                continue
            if wrong:
                program, again = simpler, True
                break
    return program


def simpler_ones(program: Program) -> Iterator[Program]:
    for i in range(len(program.stages)):
        if len(program.stages) > 1:
            rest = program.stages[:i] + program.stages[i + 1 :]
            yield replace(program, stages=rest, tapped=min(program.tapped, len(rest) - 1))
    for name, simple in (
        ("tail", "plain"),
        ("example", "random"),
        ("dtype", "float64"),
        ("scope", "layer"),
        ("amount", 0.5),
    ):
        if getattr(program, name) != simple:
            yield replace(program, **{name: simple})
    for i, stage in enumerate(program.stages):
        plainer = {**stage.options}
        for name in ("how", "size_how"):
            if plainer.get(name, "literal") != "literal":
                plainer[name] = "literal"
        for name in ("extra", "norm_kind"):
            if plainer.get(name, "none") != "none":
                plainer[name] = "none"
        options = [replace(stage, options=plainer)] if plainer != stage.options else []
        for other in [*options, *([replace(stage, join="plain")] if stage.join != "plain" else [])]:
            yield replace(program, stages=(*program.stages[:i], other, *program.stages[i + 1 :]))


def told(program: Program, why: str) -> str:
    """Return what a reader needs to see a failure again: the program, what is wrong, and its code."""
    code = source(program).partition("heads: int = 0\n")[2].strip()
    return f"{why}\n{program!r}\n\n{code}\n"
