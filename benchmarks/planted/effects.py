"""Says whether a planted error has an effect, by plain runs that do not ask the proof."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.planted.errors import Written, narrowed
from benchmarks.planted.subjects import Planted, Subject, Tensors
from lightning_prune.surgery import AttributeChange, Cut
from lightning_prune.surgery.attributes import set_attributes_
from tests.programs import compiled
from tests.survivors import MisfitError
from tests.verdicts import EVERY_CONSTANT, choices, oracle, ordinary_, unequal


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
    """Fill memory that nothing was written to with NaN, so that two runs read the same there."""
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
