"""Finds which parameters of a model multiply what, by watching products, whoever calls; computes nothing else.

A product is known by its weight's memory, so linear and convolution modules, fused projections, attention's own and
bare parameters are all found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.measure.calibration import Run
from lightning_prune.measure.unrolled import Convolution, Matmul, Reading
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure import named_tensors
from lightning_prune.structure.tracer import taken_apart

__all__ = ["Products", "Shift", "find_products", "watch_inputs"]

aten = torch.ops.aten


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
        alike: Name -> the first of the weights right before it that multiply the same tensor, such as those of queries,
            keys and values.
    """

    readings: dict[str, Reading]
    calls: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    otherwise: dict[str, str]
    shifts: dict[str, Shift]
    alike: dict[str, str]

    def bytes(self, name: str, dtype: torch.dtype) -> int:
        """Return what a weight's Gram matrices take up."""
        groups, _, columns = self.shapes[name]
        return groups * columns**2 * dtype.itemsize


def find_products(model: nn.Module, batch: Any, run: Run) -> Products:
    """Run the model once and see which parameters multiply what, and which are used in other ways too.

    Raises:
        PruningError: If it does not run.
    """
    readings: dict[str, Reading] = {}
    calls: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    otherwise: dict[str, str] = {}
    alike: dict[str, str] = {}
    last: list[Any] = []  # a weight and what it multiplied, which is held so that no other takes its memory

    def receive(name: str, reading: Reading, inputs: Tensor) -> None:
        what = inputs.data_ptr(), inputs._version, inputs.shape, inputs.stride(), reading
        if last and last[1] == what:
            alike[name] = last[0]
        else:
            last[:] = [name, what, inputs]
        if readings.setdefault(name, reading) != reading:
            otherwise[name] = "it multiplies its inputs in two ways"
        calls[name] = calls.get(name, 0) + 1
        shapes[name] = tuple(reading.rows(named[name]).shape)

    named = dict(model.named_parameters())
    uses: dict[str, list[tuple[Any, tuple[Any, ...]]]] = {}
    with undisturbed(model, batch), watch_inputs(model, named, receive, otherwise, uses):
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
    alike = {name: first for name, first in alike.items() if calls[name] == calls[first] == 1}
    return Products(readings, calls, shapes, otherwise, shifts, alike)


def _normalised(model: nn.Module, uses: Sequence[tuple[Any, tuple[Any, ...]]]) -> Shift | None:
    """Return the running mean of the BatchNorm that is all that uses what a product made, if it is so."""
    if len(uses) != 1 or "batch_norm" not in str(uses[0][0]):
        return None
    mean = uses[0][1][3]
    found = [name for name, b in model.named_buffers() if isinstance(mean, Tensor) and b.data_ptr() == mean.data_ptr()]
    return Shift(found[0], -1) if found else None


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
    with taken_apart(), _ProductMode(weights, receive, {} if otherwise is None else otherwise, uses):
        yield


_CAST = "its code casts it to another type, which hides its products: leave autocast to the Trainer's precision"


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
                self.otherwise[name] = _CAST if func is aten._to_copy.default else f"{func.overloadpacket} reads it too"
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
