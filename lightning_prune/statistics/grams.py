r"""Gathers the Gram matrices :math:`X X^T` of what weights multiply, over batches; watches products, whoever calls.

A product is known by its weight's memory, so linear and convolution modules, fused projections, attention's own and
bare parameters are all found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import PruningError
from lightning_prune.inputs import undisturbed
from lightning_prune.statistics.unrolled import Convolution, Matmul, Reading
from lightning_prune.structure import named_tensors
from lightning_prune.structure.watch import unfused

__all__ = [
    "Change", "Gram", "Pair", "Products", "Run", "find_products", "fitting", "gather_grams", "gather_pair",
    "watch_inputs",
]  # fmt: skip

Run = Callable[[nn.Module, Any], Any]
"""Calls a model on a batch; what it returns does not matter."""
Change = Callable[[], AbstractContextManager[None]]
"""Makes a block in which the model is another."""

aten = torch.ops.aten


@dataclass(eq=False)
class Gram:
    """What a weight's inputs look like.

    Attributes:
        reading: How weight and inputs are laid out.
        hessian: Mean over columns of inputs of their outer products, ``(groups, columns, columns)``: the Hessian of
            half the squared error of an output, its mean over positions.
        mean: Mean column, ``(groups, columns)``.
        count: How many columns were seen.
    """

    reading: Reading
    hessian: Tensor
    mean: Tensor
    count: int

    def without(self, groups: Tensor, columns: Tensor) -> Pair:
        """Return this beside what is left of it once only some columns are there.

        Args:
            groups: Groups that are left, ``(slim groups,)``.
            columns: Columns that are left of each, ``(slim groups, slim columns)``.
        """
        before, mean = self.hessian[groups], self.mean[groups]
        cross = before.gather(2, columns[:, None].expand(-1, before.shape[1], -1))
        after = cross.gather(1, columns[:, :, None].expand(-1, -1, columns.shape[1]))
        return Pair(before, cross, after, mean, mean.gather(1, columns))


@dataclass(frozen=True, eq=False)
class Pair:
    """What a weight's inputs look like in two runs of a model, before and after layers in front of it changed.

    Attributes:
        before: Mean over columns of the outer products of the inputs before, ``(groups, columns, columns)``.
        cross: Of the inputs before and those after.
        after: Of the inputs after.
        mean_before: Mean column before, ``(groups, columns)``.
        mean_after: And after.
    """

    before: Tensor
    cross: Tensor
    after: Tensor
    mean_before: Tensor
    mean_after: Tensor

    def centred(self) -> Pair:
        """Return the same of the inputs less their means."""
        x, y = self.mean_before, self.mean_after
        outer = [a[:, :, None] * b[:, None] for a, b in ((x, x), (x, y), (y, y))]
        return Pair(self.before - outer[0], self.cross - outer[1], self.after - outer[2], x, y)


class Shift(NamedTuple):
    """What is added to the rows of a product: a bias, or, with the other sign, the running mean of a BatchNorm."""

    name: str
    sign: int


@dataclass(frozen=True)
class Products:
    """Which weights of a model multiply what.

    Attributes:
        readings: Name of a parameter -> how it multiplies its inputs, in the order in which they first run.
        calls: Name -> how many products one run of the model takes with it.
        shapes: Name -> groups, rows and columns of the weight so laid out.
        otherwise: Name -> why its inputs do not tell all that it does.
        shifts: Name -> what is added to each of its rows.
    """

    readings: dict[str, Reading]
    calls: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    otherwise: dict[str, str]
    shifts: dict[str, Shift]

    def bytes(self, name: str, dtype: torch.dtype) -> int:
        """Return what a weight's Gram matrices take up."""
        groups, _, columns = self.shapes[name]
        return groups * columns**2 * dtype.itemsize


def fitting(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Part names, in order, so that the sizes of each part come to at most so much, or it has one name."""
    part: list[str] = []
    for name, size in sizes.items():
        if part and sum(sizes[other] for other in part) + size > most:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


def find_products(model: nn.Module, batch: Any, run: Run) -> Products:
    """Run the model once and see which parameters multiply what, and which are used in other ways too.

    Raises:
        PruningError: If it does not run.
    """
    readings: dict[str, Reading] = {}
    calls: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    otherwise: dict[str, str] = {}

    def receive(name: str, reading: Reading, inputs: Tensor) -> None:
        if readings.setdefault(name, reading) != reading:
            otherwise[name] = "it multiplies its inputs in two ways"
        calls[name] = calls.get(name, 0) + 1
        shapes[name] = tuple(reading.rows(named[name]).shape)

    named = dict(model.named_parameters())
    uses: dict[str, list[tuple[Any, tuple[Any, ...]]]] = {}
    with undisturbed(model), watch_inputs(model, named, receive, otherwise, uses):
        try:
            run(model, batch)
        except Exception as error:
            raise PruningError(
                f"{type(model).__name__} does not run on the first batch ({type(error).__name__}: {error}). Pass "
                "batches of what its forward takes, or say how it is run: forward=lambda model, batch: model(batch[0])."
            ) from error
    shifts = {name: shift for name, used in uses.items() if (shift := _normalised(model, used)) is not None}
    for name, (groups, rows, _) in shapes.items():
        bias = name.removesuffix("weight") + "bias"
        if bias in named and named[bias].numel() == groups * rows:
            shifts[name] = Shift(bias, 1)
    return Products(readings, calls, shapes, otherwise, shifts)


def _normalised(model: nn.Module, uses: Sequence[tuple[Any, tuple[Any, ...]]]) -> Shift | None:
    """Return the running mean of the BatchNorm that is all that uses what a product made, if it is so."""
    if len(uses) != 1 or "batch_norm" not in str(uses[0][0]):
        return None
    mean = uses[0][1][3]
    found = [name for name, b in model.named_buffers() if isinstance(mean, Tensor) and b.data_ptr() == mean.data_ptr()]
    return Shift(found[0], -1) if found else None


def gather_grams(
    model: nn.Module, batches: Iterable[Any], run: Run, names: Collection[str], dtype: torch.dtype = torch.float64
) -> dict[str, Gram]:
    """Sum the Gram matrices of the named weights' inputs over all batches, in eval mode; the model is left as found.

    Raises:
        PruningError: If one of them multiplied nothing.
    """
    grams: dict[str, Gram] = {}

    def receive(name: str, reading: Reading, inputs: Tensor) -> None:
        columns = _single(reading.unrolled(inputs.detach()))
        product, total = (columns @ columns.transpose(1, 2)).to(dtype), columns.sum(dim=2).to(dtype)
        gram = grams.setdefault(name, Gram(reading, torch.zeros_like(product), torch.zeros_like(total), 0))
        gram.hessian += product
        gram.mean += total
        gram.count += columns.shape[2]

    with undisturbed(model), watch_inputs(model, names, receive):
        for batch in batches:
            run(model, batch)
    for name in names:
        if name not in grams:
            raise PruningError(
                f"{name}: no batch came, or nothing was multiplied by it on these batches, so it has no Hessian. "
                "Pass batches that reach it, or leave it out by ignore=."
            )
    return {name: _mean(grams[name]) for name in names}


def gather_pair(
    model: nn.Module,
    batches: Iterable[Any],
    run: Run,
    name: str,
    change: Change,
    calls: int,
    dtype: torch.dtype = torch.float64,
    groups: Tensor | None = None,
) -> Pair:
    """Compare the inputs of one weight with what they are once the model has changed; runs stop behind it.

    ``change`` is entered around the second run of every batch, and left again; ``groups`` says which groups of the
    first run belong to those of the second, where not all are left.

    Raises:
        PruningError: If one of the two runs multiplies other numbers of inputs than the other.
    """
    sums: list[Tensor] = []
    count = 0
    for batch in batches:
        x = _columns(model, batch, run, name, calls)
        x = x if groups is None else x[groups]
        with change():
            y = _columns(model, batch, run, name, calls)
        if x.shape[2] != y.shape[2]:
            raise PruningError(
                f"{name}: it multiplies {x.shape[2]} inputs, and {y.shape[2]} once layers before it are pruned, so the "
                "two cannot be compared. Prune with sequential=False."
            )
        found = [_product(x, x), _product(x, y), _product(y, y), x.sum(dim=2), y.sum(dim=2)]
        sums = (
            [total + new.to(dtype) for total, new in zip(sums, found, strict=True)]
            if sums
            else [new.to(dtype) for new in found]
        )
        count += x.shape[2]
    return Pair(*(total / count for total in sums))


class _EnoughError(Exception):
    """Everything was seen that was to be seen."""


def _columns(model: nn.Module, batch: Any, run: Run, name: str, calls: int) -> Tensor:
    """Return what a weight multiplies in one run, ``(groups, columns, n)``."""
    found: list[Tensor] = []

    def receive(_: str, reading: Reading, inputs: Tensor) -> None:
        found.append(_single(reading.unrolled(inputs.detach())))
        if len(found) == calls:
            raise _EnoughError

    with undisturbed(model), suppress(_EnoughError), watch_inputs(model, [name], receive):
        run(model, batch)
    return torch.cat(found, dim=2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(1, 2)


def _single(columns: Tensor) -> Tensor:
    return columns.to(torch.promote_types(columns.dtype, torch.float32))


@contextmanager
def watch_inputs(
    model: nn.Module,
    names: Collection[str],
    receive: Callable[[str, Reading, Tensor], None],
    otherwise: dict[str, str] | None = None,
    uses: dict[str, list[tuple[Any, tuple[Any, ...]]]] | None = None,
) -> Iterator[None]:
    """Hand the inputs of every product with a named weight to ``receive``, inside the block, in forward passes.

    Args:
        model: Whose weights.
        names: Which of its parameters.
        receive: Gets the parameter's name, how it is laid out, and what it is about to multiply.
        otherwise: Gets, by name, other uses of these parameters.
        uses: Gets, by name, operators that use what the products made, and their arguments.
    """
    own = named_tensors(model)
    weights = {own[name].data_ptr(): (name, own[name]) for name in names if name in own and own[name].dim() > 1}
    with unfused(), _ProductMode(weights, receive, {} if otherwise is None else otherwise, uses):
        yield


class _ProductMode(TorchDispatchMode):
    """Looks at every operator that runs for a weight it is to watch."""

    def __init__(
        self,
        weights: Mapping[int, tuple[str, Tensor]],
        receive: Callable[[str, Reading, Tensor], None],
        otherwise: dict[str, str],
        uses: dict[str, list[tuple[Any, tuple[Any, ...]]]] | None,
    ) -> None:
        super().__init__()
        self.uses = uses
        self.made: dict[int, tuple[Tensor, str]] = {}
        self.weights = weights
        self.receive = receive
        self.otherwise = otherwise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, made = kwargs or {}, None
        watched = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.data_ptr() in self.weights]
        for i in watched:
            name, weight = self.weights[args[i].data_ptr()]
            read = _READERS.get((func.overloadpacket, i))
            if read is not None and args[i].numel() == weight.numel():
                reading, inputs = read(weight, args)
                made = name
                self.receive(name, reading, inputs)
            elif not func.is_view and func.overloadpacket is not aten.detach:
                self.otherwise[name] = f"{func.overloadpacket} reads it too"
        out = func(*args, **kwargs)
        if self.uses is not None:
            for arg in args:
                if id(arg) in self.made:
                    self.uses.setdefault(self.made[id(arg)][1], []).append((func.overloadpacket, args))
            if made is not None:
                self.made[id(out)] = out, made  # held, so that no other tensor takes its number
        return out


def _from_right(weight: Tensor, args: tuple[Any, ...]) -> tuple[Reading, Tensor]:
    """Read ``x @ w``, with or without something added."""
    x, w = args[-2:]
    return Matmul(outputs_first=not _same_layout(w, weight)), x


def _from_left(weight: Tensor, args: tuple[Any, ...]) -> tuple[Reading, Tensor]:
    """Read ``w @ x``."""
    w, x = args[-2:]
    return Matmul(outputs_first=_same_layout(w, weight)), x.T


def _convolved(weight: Tensor, args: tuple[Any, ...]) -> tuple[Reading, Tensor]:
    x, _, _, stride, padding, dilation, transposed, output_padding, groups = args
    kernel = tuple(weight.shape[2:])
    sizes = tuple(stride), tuple(padding), tuple(dilation)
    return Convolution(kernel, *sizes, transposed, tuple(output_padding), groups), x


def _same_layout(seen: Tensor, weight: Tensor) -> bool:
    return seen.shape == weight.shape and seen.stride() == weight.stride()


_READERS: dict[tuple[Any, int], Callable[[Tensor, tuple[Any, ...]], tuple[Reading, Tensor]]] = {
    (aten.mm, 1): _from_right,
    (aten.addmm, 2): _from_right,
    (aten.mm, 0): _from_left,
    (aten.addmm, 1): _from_left,
    (aten.convolution, 1): _convolved,
}


def _mean(gram: Gram) -> Gram:
    gram.hessian /= gram.count
    gram.mean /= gram.count
    return gram
