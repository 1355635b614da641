"""Compares a pruned network with the full one, module by module; shares no code with the library's proof.

The library only says which indices of which tensor are kept. The full network runs with the pruned entries of every
parameter set to zero. Its normalisations are computed here over the kept channels alone. Each float output of each
module of the pruned network must then consist of entries of the full one's, in their order.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.model.calls import run, tensors_in

__all__ = ["TOLERANCE", "Comparison", "Kept", "compare", "in_double", "with_ordinary_sizes_"]

Kept = Mapping[str, Mapping[int, Tensor]]
"""Name of a tensor -> dimension -> indices kept, as the report of a pruning says."""

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference that rounding explains, relative to the largest entry; some networks compute parts in float32."""

WHOLE = "the model"
"""Path of the network itself in what is found."""

Inputs = Any


@dataclass
class Comparison:
    """What became of every float output of every module, call by call.

    Attributes:
        equal: Outputs that are entries of the full network's.
        scaled: Outputs that are so but for one factor of some channels, such as queries that make up for a narrower
            head; path -> factor.
        skipped: Outputs that were not compared, path -> why.
        wrong: Outputs that differ, path -> how; the first is where to look.
        worst: Largest difference among the equal ones, relative to the largest entry.
        tolerance: Largest that counts as equal.
    """

    equal: int = 0
    scaled: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    worst: float = 0.0
    tolerance: float = TOLERANCE[torch.float64]

    def told(self) -> dict[str, Any]:
        """Return the counts, and the first few of what is named."""
        named: dict[str, dict[str, Any]] = {"scaled": self.scaled, "skipped": self.skipped, "wrong": self.wrong}
        first = {name: dict(islice(found.items(), 5)) for name, found in named.items() if found}
        counts = {f"{name} outputs": len(found) for name, found in named.items()}
        return {"equal outputs": self.equal, **counts, **first, "worst": self.worst}


def with_ordinary_sizes_(model: nn.Module) -> nn.Module:
    """Raise parameters that hide what is behind them: those near zero, and matrices that leave outputs near zero.

    With a LayerScale of 1e-6, a gate of zero or attention scores of 1e-3 a wrong branch changes next to nothing.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.numel() == 0:
                continue
            real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            small = bool(real.abs().max() < 1e-2)
            if parameter.dim() == 0 or parameter.numel() == max(parameter.shape):  # a scalar, a vector, (C, 1, 1)
                if small:
                    real.copy_(0.5 + torch.rand(real.shape, generator=generator))
                continue
            ordinary = (parameter.numel() / parameter.shape[0]) ** -0.5
            if small:
                real.copy_(ordinary * torch.randn(real.shape, generator=generator))
            elif (spread := float(real.std())) < ordinary:
                real.mul_(ordinary / spread)
    return model


def in_double(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return the model and its inputs in float64 and complex128."""
    model = model.double()
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None and tensor.is_complex():
                    tensor.data = tensor.data.to(torch.complex128)
    return model, _mapped(lambda x: x.double() if x.is_floating_point() else x, inputs)


def compare(full: nn.Module, slim: nn.Module, kept: Kept, inputs: Inputs) -> Comparison:
    """Compare every module's float outputs; ``full`` is changed.

    Args:
        full: The network before pruning, in eval mode; its pruned entries are set to zero.
        slim: The network after pruning.
        kept: Which indices were kept.
        inputs: What both run on.
    """
    expected = _outputs(slim, inputs)
    precision = next((p.dtype for p in full.parameters() if p.is_floating_point()), torch.float64)
    found = Comparison(tolerance=TOLERANCE[precision])
    sizes = _lists_by_sizes(full, kept)
    norms = _normalisations(full, kept)
    _silence_(full, kept)
    calls: dict[str, int] = {}

    def check(path: str, output: Any) -> None:
        call = calls[path] = calls.get(path, 0) + 1
        made = expected.get(path, [])
        if len(made) < call:
            found.wrong[path] = f"runs at least {call} times, and {len(made)} times once pruned"
            return
        mine, other = _floats(output), made[call - 1]
        if len(mine) != len(other):
            found.wrong[path] = f"returns {len(mine)} tensors, and {len(other)} once pruned"
            return
        for whole, part in zip(mine, other, strict=True):
            _note_(found, path, whole, part, sizes)
        made[call - 1] = []  # no longer needed

    with ExitStack() as hooks:
        for path, module in norms.items():
            hooks.enter_context(_replaced(full.get_submodule(path), module))
        for path, module in full.named_modules():
            handle = module.register_forward_hook(lambda m, args, output, path=path: check(path or WHOLE, output))
            hooks.callback(handle.remove)
        with torch.no_grad():
            run(full, inputs)
    for path, made in expected.items():
        if len(made) != calls.get(path, 0):
            found.wrong[path] = f"runs {calls.get(path, 0)} times, and {len(made)} times once pruned"
    return found


def _outputs(model: nn.Module, inputs: Inputs) -> dict[str, list[list[Tensor]]]:
    """Run the model and return the float outputs of every module, call by call."""
    found: dict[str, list[list[Tensor]]] = {}

    def keep(path: str, output: Any) -> None:
        # what comes after may write into an output
        found.setdefault(path, []).append([tensor.clone() for tensor in _floats(output)])

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            handle = module.register_forward_hook(lambda m, args, output, path=path: keep(path or WHOLE, output))
            hooks.callback(handle.remove)
        with torch.no_grad():
            run(model, inputs)
    return found


def _floats(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point() or tensor.is_complex()]


def _silence_(full: nn.Module, kept: Kept) -> None:
    """Set the pruned entries of every parameter to zero; statistics of BatchNorm stay, since they hide nothing."""
    parameters = dict(full.named_parameters())
    for name, dims in kept.items():
        for dim, indices in dims.items() if name in parameters else ():
            gone = torch.ones(parameters[name].shape[dim], dtype=torch.bool)
            gone[indices] = False
            parameters[name].data.index_fill_(dim, gone.nonzero().flatten(), 0.0)


# --- normalisations over the kept channels


def _normalisations(full: nn.Module, kept: Kept) -> dict[str, Callable[..., Any]]:
    """Return what computes each normalisation across channels that lost some, by path."""
    found: dict[str, Callable[..., Any]] = {}
    for path, module in full.named_modules():
        name = type(module).__name__.lower()
        if "norm" not in name or "batchnorm" in name or "instancenorm" in name or next(module.children(), None):
            continue
        own = [name for name, _ in module.named_parameters(recurse=False)]
        lists = [dims for leaf in own if (dims := kept.get(f"{path}.{leaf}" if path else leaf))]
        vectors = all(parameter.dim() == 1 for parameter in module.parameters())
        if lists and len(lists) == len(own) and vectors:
            indices = lists[0][0]
            size = next(module.parameters()).numel()
            make = _by_groups if isinstance(module, nn.GroupNorm) else _restricted
            if (computes := make(module, indices, size)) is not None:
                found[path] = computes
    return found


def _restricted(module: nn.Module, indices: Tensor, size: int) -> Callable[..., Any]:
    """Compute a module on the kept channels of its inputs, with those of its parameters."""
    small: Any = copy.deepcopy(module)
    for parameter in small.parameters():
        parameter.data = parameter.data[indices]
    if hasattr(small, "normalized_shape"):
        shape = small.normalized_shape
        small.normalized_shape = (len(indices),) if isinstance(shape, tuple) else len(indices)

    def computed(*args: Any, **kwargs: Any) -> Any:
        first = next(tensors_in((args, kwargs)))
        dim = _channel_dim(first, size, last="2d" not in type(module).__name__.lower())

        def narrowed(x: Tensor) -> Tensor:
            return x.index_select(dim, indices) if x.dim() == first.dim() and x.shape[dim] == size else x

        args, kwargs = _mapped(narrowed, args), _mapped(narrowed, kwargs)
        return _mapped(lambda x: _widened(x, dim, indices, size), small(*args, **kwargs))

    return computed


def _by_groups(module: nn.Module, indices: Tensor, size: int) -> Callable[..., Any] | None:
    """Compute a group norm whose channels keep their groups, each over what is left of it.

    Nothing is returned where a class of its own does more than ``nn.GroupNorm``.
    """
    if type(module).forward is not nn.GroupNorm.forward:
        return None
    assert isinstance(module, nn.GroupNorm)
    group = torch.arange(size) // (size // module.num_groups)

    def computed(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in range(module.num_groups):
            members = indices[group[indices] == index]
            if len(members):
                out[:, members] = F.group_norm(x[:, members], 1, eps=module.eps)
        if module.affine:
            shape = [1, -1, *[1] * (x.dim() - 2)]
            out = out * module.weight.view(shape) + module.bias.view(shape)  # silenced where pruned
        return out

    return computed


def _channel_dim(x: Tensor, size: int, last: bool) -> int:
    order = (x.dim() - 1, 1) if last else (1, x.dim() - 1)
    return next(dim for dim in order if x.shape[dim] == size)


def _widened(x: Tensor, dim: int, indices: Tensor, size: int) -> Tensor:
    if x.dim() <= dim or x.shape[dim] != len(indices):
        return x
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy(dim, indices, x)


@contextmanager
def _replaced(module: nn.Module, computed: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else until the block ends."""
    module.forward = computed
    try:
        yield
    finally:
        del module.forward


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    return value


# --- whether one tensor is made of entries of another


def _lists_by_sizes(full: nn.Module, kept: Kept) -> dict[tuple[int, int], list[Tensor]]:
    """Return the distinct lists of kept indices by the sizes of the dimension, before and after."""
    own = dict(full.named_parameters()) | dict(full.named_buffers())
    found: dict[tuple[int, int], list[Tensor]] = {}
    for name, dims in kept.items():
        for dim, indices in dims.items():
            lists = found.setdefault((own[name].shape[dim], len(indices)), [])
            if not any(torch.equal(indices, other) for other in lists):
                lists.append(indices)
    return found


def _note_(
    found: Comparison, path: str, whole: Tensor, part: Tensor, sizes: Mapping[tuple[int, int], list[Tensor]]
) -> None:
    """Note whether an output of the pruned network is made of entries of the full one's."""
    if whole.dim() != part.dim():
        found.wrong[path] = f"has shape {tuple(whole.shape)}, and {tuple(part.shape)} once pruned"
        return
    dims = [dim for dim in range(whole.dim()) if whole.shape[dim] != part.shape[dim]]
    if any(part.shape[dim] > whole.shape[dim] for dim in dims):
        found.wrong[path] = f"has shape {tuple(whole.shape)}, and {tuple(part.shape)} once pruned"
        return
    candidates = list(islice(_candidates(whole, part, dims, sizes), 200))
    if not whole.isfinite().any():
        found.skipped[path] = "no entry is a finite number"
        return
    if not candidates:
        found.skipped[path] = f"{len(dims)} dimensions shrink by other lists than the report names"
        return
    differences = []
    for candidate in candidates:
        difference = _difference(candidate, part)
        differences.append(difference)
        if difference <= found.tolerance:
            found.equal += 1
            found.worst = max(found.worst, difference)
            return
    for candidate in candidates if path != WHOLE else ():  # what users see must be equal
        factor = _factor(candidate, part, dims[-1] if dims else None, found.tolerance)
        if factor is not None:
            found.scaled.setdefault(path, factor)
            return
    found.wrong.setdefault(path, f"differs by {min(differences):.1e} of its largest entry")


def _candidates(
    whole: Tensor, part: Tensor, dims: list[int], sizes: Mapping[tuple[int, int], list[Tensor]]
) -> Iterator[Tensor]:
    """Yield the parts of a tensor that another of its size could be."""
    if len(dims) == 1 and not whole.is_complex():
        # a loose tolerance takes a pruned slice of zeros for a small one, a tight one misses parts kept in float32
        for tolerance in (1e-10, 1e-7, 1e-4):
            found = _subsequence(whole, part, dims[0], tolerance)
            if found is not None:
                yield whole.index_select(dims[0], found)
    lists = [sizes.get((whole.shape[dim], part.shape[dim]), []) for dim in dims]
    for indices in product(*lists):
        chosen = whole
        for dim, index in zip(dims, indices, strict=True):
            chosen = chosen.index_select(dim, index)
        yield chosen


def _subsequence(whole: Tensor, part: Tensor, dim: int, relative: float) -> Tensor | None:
    """Return indices, in order, at which slices of a tensor equal those of a part of it; none where there are none."""
    generator = torch.Generator().manual_seed(2)
    rows, others = whole.movedim(dim, 0).flatten(1), part.movedim(dim, 0).flatten(1)
    signs = torch.randint(0, 2, (rows.shape[1], 8), generator=generator).to(rows.dtype) * 2 - 1
    rows, others = (x.nan_to_num(posinf=0.0, neginf=0.0) @ signs for x in (rows, others))
    tolerance = relative * max(float(others.abs().max()), 1e-300) if others.numel() else 0.0
    found: list[int] = []
    wanted = others.numpy()
    for index, row in enumerate(rows.numpy()):  # taking the first that fits finds a subsequence where there is one
        if len(found) < len(wanted) and abs(wanted[len(found)] - row).max() <= tolerance:
            found.append(index)
    return torch.tensor(found, dtype=torch.int64) if len(found) == len(wanted) else None


def _difference(whole: Tensor, part: Tensor) -> float:
    """Return the largest difference relative to the largest entry, infinite where other entries are no numbers."""
    if not part.numel():
        return 0.0
    numbers = whole.isfinite()
    if not torch.equal(numbers, part.isfinite()):
        return float("inf")
    whole, part = whole[numbers], part[numbers]
    if not part.numel():
        return 0.0
    return float((whole - part).abs().max()) / max(float(whole.abs().max()), float(part.abs().max()), 1e-300)


def _factor(whole: Tensor, part: Tensor, dim: int | None, tolerance: float) -> float | None:
    """Return the one positive factor between two tensors, or between slices of them; none where others differ.

    Queries may be scaled to make up for a narrower head. In one projection of queries, keys and values some slices are
    scaled, and the others are equal.
    """
    if not (whole.isfinite().all() and part.isfinite().all()):
        return None
    whole, part = (x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1) for x in (whole, part))
    squares = (whole * whole.conj()).real.sum(1)
    products = (whole.conj() * part).real.sum(1)
    factors = torch.where(squares > 0, products / squares, 1.0)
    if _difference(whole * factors[:, None], part) > tolerance:
        return None
    others = factors[(factors - 1).abs() > tolerance]
    if not len(others) or float(others.min()) <= 0 or float(others.max() - others.min()) > 1e3 * tolerance:
        return None
    return float(others.median())
