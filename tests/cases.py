"""Small modules written to catch a wrong cut, and their judge: oracles that share no code with the library.

Files named ``cases_KIND.py`` hold the modules. A cut is right if the slim model computes what the full model does whose
pruned units are silenced, or what the oracle of survivors says, where statistics run over units.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import PruningError, prune_filters
from tests.survivors import MisfitError, Survivors, marked, plain

__all__ = ["CASES", "Case", "Verdict", "case", "image", "judged", "rows", "tokens"]

FRESH_BATCH = 3


@dataclass(frozen=True)
class Case:
    """A module, what it is traced on, and what is expected of its cut.

    Attributes:
        make: Builds it.
        kind: The kind of fault that it is meant to show.
        example: What it is traced on.
        fresh: What it is judged on; random inputs like the example by default.
        opened: Opens what hides errors, in both models: a scale of zero, a threshold that nothing passes.
        most: Name of a parameter -> rows that it may keep at most, where a right cut must not be refused.
        same: Attributes that may not change.
        ignore: Layers that are not pruned.
        scope: Whether scores are compared within layers or across them.
        calls: Keyword arguments of the calls that are judged.
        train: Whether train mode is judged too; random numbers of it may be others in the slim model.
        reference: Builds the same network in other words, which the oracle can follow.
        named: Whether a number made from a width may change, if the report names it.
        idle: Parameters that never run on the example: they keep their shapes, and a warning names them.
        inside: Mode in which the library is called.
        dtype: Type of the module.
        tolerance: Of a difference, relative to the outputs' scale.
    """

    make: Callable[[], nn.Module]
    kind: str
    example: Any
    fresh: Any = None
    opened: Callable[[nn.Module], Any] | None = None
    most: Mapping[str, int] = field(default_factory=dict)
    same: Sequence[str] = ()
    ignore: Sequence[str] = ()
    scope: str = "layer"
    calls: Sequence[Mapping[str, Any]] = ({},)
    train: bool = True
    reference: Callable[[], nn.Module] | None = None
    named: bool = False
    idle: Sequence[str] = ()
    inside: Callable[[], AbstractContextManager[Any]] = torch.enable_grad
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-9


@dataclass(frozen=True)
class Verdict:
    """``"right"``, ``"whole"`` (nothing was cut, with a reason) or ``"wrong"``, and why."""

    outcome: str
    why: str = ""


CASES: dict[str, Case] = {}


def case(kind: str, example: Any, name: str = "", **expected: Any) -> Callable[[Any], Any]:
    """Register a class, or a function that builds a module, as a case."""

    def register(make: Any) -> Any:
        own = name or make.__name__
        if own in CASES:
            raise ValueError(f"two cases are called {own}")
        CASES[own] = Case(make, kind, example, **expected)
        return make

    return register


def image(batch: int = 2, channels: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 2, length: int = 5, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def rows(batch: int = 4, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


def judged(name: str) -> Verdict:
    """Prune the module of a case and judge the cut."""
    chosen = CASES[name]
    full = built(chosen)
    slim = copy.deepcopy(full)
    before = {path: at(full, path) for path in chosen.same}
    example = typed(chosen.example, chosen.dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with chosen.inside():
                report = prune_filters(
                    slim,
                    example,
                    0.5,
                    scope=chosen.scope,
                    ignore=list(chosen.ignore),
                    progress=False,  # type: ignore[arg-type]
                )
        except PruningError as error:
            shapes = [(old.shape, new.shape) for old, new in zip(full.parameters(), slim.parameters(), strict=True)]
            if any(old != new for old, new in shapes):
                return Verdict("wrong", "refused, but cut")
            return Verdict("whole", str(error))
    if not report.kept:
        return Verdict("whole", "; ".join(dict.fromkeys(pin.reason for pin in report.pinned)))
    changed = [path for path, value in before.items() if at(slim, path) != value]
    if changed:
        return Verdict("wrong", f"changed: {changed}")
    quiet = not any("never ran" in str(warning.message) for warning in said)
    for path in chosen.idle:
        if slim.get_parameter(path).shape != full.get_parameter(path).shape or quiet:
            return Verdict("wrong", f"{path} never ran, and was cut or not named")
    why = compared(chosen, full, slim, report)
    if why and chosen.named and report.constants:
        why = ""
    if why:
        return Verdict("wrong", why)
    for path, most in chosen.most.items():
        if slim.get_parameter(path).shape[0] > most:
            reasons = {pin.tensor: pin.reason for pin in report.pinned}
            return Verdict("whole", f"{path} keeps {slim.get_parameter(path).shape[0]} rows: {reasons.get(path)}")
    return Verdict("right")


def built(chosen: Case) -> nn.Module:
    """Build a module with random statistics and affine parameters of its norms, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = chosen.make().to(chosen.dtype).eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                with torch.inference_mode(module.running_mean.is_inference()), torch.no_grad():
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
        return model


def at(model: nn.Module, path: str) -> Any:
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def typed(value: Any, dtype: torch.dtype) -> Any:
    """Return inputs with their floating-point tensors in another type."""
    if isinstance(value, tuple):
        return tuple([typed(item, dtype) for item in value])
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def fresh_like(example: Any) -> Any:
    """Return random inputs that the example is not, as a batch of three."""
    if isinstance(example, tuple):
        return tuple([fresh_like(item) for item in example])
    generator = torch.Generator().manual_seed(99)
    shape = (max(FRESH_BATCH, example.shape[0]), *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 8, shape, generator=generator)


def compared(chosen: Case, full: nn.Module, slim: nn.Module, report: Any) -> str:
    """Return what is wrong with a slim model, if anything, in every mode and call."""
    tolerance = chosen.tolerance
    if report.scaled:  # compensated weights are rounded to the type of the model
        half = chosen.dtype in (torch.float16, torch.bfloat16)
        tolerance = max(tolerance, 0.05 if half else 2e-6)
    pair = [copy.deepcopy(model).double() for model in (full, slim)]
    for model in pair:
        if chosen.opened is not None:
            chosen.opened(model)
    inputs = fresh_like(chosen.example) if chosen.fresh is None else chosen.fresh
    inputs = typed(inputs, torch.float64)
    for arguments in chosen.calls:
        if chosen.idle and arguments:
            continue  # these run what never ran, which is left as it was and fails loudly
        for training in (False, True) if chosen.train else (False,):
            why = unequal(chosen, *pair, report.kept, inputs, arguments, training, tolerance)
            if why:
                mode = "training" if training else "eval"
                return f"{mode} {dict(arguments)}: {why}"
    return ""


def unequal(
    chosen: Case,
    full: nn.Module,
    slim: nn.Module,
    kept: Any,
    inputs: Any,
    arguments: Any,
    training: bool,
    tolerance: float,
) -> str:
    """Return how the outputs of a slim model differ from both oracles, if they do."""
    try:
        found = outputs(copy.deepcopy(slim), copy.deepcopy(inputs), arguments, training)
    except Exception as error:
        return f"the slim model raises {type(error).__name__}: {error}"
    apart = difference(outputs(silenced(full, kept), copy.deepcopy(inputs), arguments, training), found)
    if apart <= tolerance:
        return ""
    if chosen.reference is not None:
        known, full = full, chosen.reference().double()
        full.load_state_dict(known.state_dict())
    try:
        expected = outputs(with_survivors(full, kept), marked_inputs(inputs), arguments, training)
        apart = difference(expected, found)
    except (MisfitError, NotImplementedError) as error:
        return f"differs from the silenced model by {apart:.2g}, and the oracle cannot run it: {error}"
    return "" if apart <= tolerance else f"wrong by {apart:.2g}"


def outputs(model: nn.Module, inputs: Any, arguments: Any, training: bool) -> list[Tensor]:
    """Run a model and return its tensors in order."""
    model.train(training)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        random.seed(1)
        found = model(*inputs, **arguments) if isinstance(inputs, tuple) else model(inputs, **arguments)
    return list(tensors_in(found))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference of outputs, relative to the scale of each; of integers, how many differ."""
    if len(expected) != len(found):
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Survivors):
            one, other = plain(one)[one.alive], other.flatten()
        if one.is_sparse:
            one, other = one.to_dense(), other.to_dense()
        if one.shape != other.shape:
            return float("inf")
        if not one.numel():
            continue
        if one.is_floating_point() or one.is_complex():
            one, other = one.nan_to_num(), other.nan_to_num()
            worst = max(worst, float((one - other).abs().max()) / max(float(one.abs().max()), 1e-12))
        else:
            worst = max(worst, float((one != other).double().mean()))
    return worst


def silenced(full: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """Return a copy of the full model with zeros wherever indices were pruned."""
    model = copy.deepcopy(full)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            for dim, indices in kept.get(name, {}).items():
                tensor.index_fill_(dim, gone(tensor.shape[dim], indices), 0)
    return model


def with_survivors(full: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """Return a copy of the full model whose tensors carry which of their entries survive."""
    model = copy.deepcopy(full)
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is None or not tensor.is_floating_point():
                    continue
                alive = torch.ones(tensor.shape, dtype=torch.bool)
                for dim, indices in kept.get(f"{path}.{name}".lstrip("."), {}).items():
                    alive.index_fill_(dim, gone(tensor.shape[dim], indices), False)
                held[name] = marked(tensor.detach(), alive)  # type: ignore[assignment]
    return model


def marked_inputs(inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return tuple([marked_inputs(item) for item in inputs])
    return marked(inputs) if inputs.is_floating_point() else inputs


def gone(size: int, indices: Tensor) -> Tensor:
    left = torch.ones(size, dtype=torch.bool)
    left[indices] = False
    return left.nonzero().squeeze(1)
