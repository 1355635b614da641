"""Measures, on this machine, what share of a model's latency is left once units have gone; chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.model.calls import ExampleInputs, run, tensors_in
from lightning_prune.model.errors import reraise_out_of_memory
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure import Keep, Structure, named_tensors
from lightning_prune.surgery import AttributeChange, Cut, draft, held_number, shape_attributes, temporarily_cut
from lightning_prune.surgery.skipped import removed_layers, temporarily_whole

__all__ = ["ROUNDS", "CutDoesNotRunError", "Shapes", "Turn", "circumstances", "latency_kept", "rounds", "shapes_of"]

ROUNDS = 5
_ROUND = 0.02  # seconds that each model runs in a round
_IN_A_ROW = 0.002  # seconds that one model runs before it is the other's turn


class CutDoesNotRunError(Exception):
    """A cut that was tried out does not run; ``keep`` is what it kept."""

    def __init__(self, keep: Keep) -> None:
        super().__init__("the slim model does not run")
        self.keep = keep


@dataclass(frozen=True)
class Shapes:
    """The shape of a model as it once was, with which it can be timed again when much of it has gone.

    Attributes:
        sizes: Name of each parameter and buffer -> its sizes.
        attributes: What shapes cannot tell, as ``[module path, name, value]``.
    """

    sizes: dict[str, list[int]]
    attributes: list[list[Any]]


def shapes_of(model: nn.Module, structure: Structure) -> Shapes:
    """Note the shape of a model as it stands."""
    places = dict.fromkeys((attribute.module, attribute.name) for attribute in structure.ledger.attributes)
    values = [(path, name, held_number(model.get_submodule(path), name)) for path, name in places]
    return Shapes(
        {name: list(tensor.shape) for name, tensor in named_tensors(model).items()},
        [[path, name, list(value) if isinstance(value, tuple) else value] for path, name, value in values],
    )


def latency_kept(
    model: nn.Module, example_inputs: ExampleInputs, structure: Structure, keep: Keep, whole: Shapes
) -> float:
    """Return the latency of the model with the units of ``keep == False`` gone, as a share of the whole model's.

    Both run here and now, a few calls of one and a few of the other in turns, in eval mode and without gradients. Of
    each round the fastest call counts, and of the ratios of all rounds the median, so that what else the machine does
    matters little. The model is left as found.

    Args:
        model: The model as it stands.
        example_inputs: What it is timed on: their batch is the batch that the latency is of.
        structure: Its channel groups.
        keep: For every group which units stay.
        whole: The shape that it had as a whole.

    Raises:
        CutDoesNotRunError: If the slim model fails.
    """
    cut = draft(model, structure, keep)
    slim = partial(temporarily_cut, model, cut, cut.tensors(model)) if cut.keep else nullcontext
    with undisturbed(model, example_inputs, copied=True):
        turns = [Turn(model, example_inputs, shape) for shape in (_stand_in(model, whole), slim)]
        try:
            ratios = [slim / dense for dense, slim in rounds(turns)]
        except Exception as error:
            reraise_out_of_memory(error)
            raise CutDoesNotRunError(keep) from error
    return median(ratios)


def circumstances(model: nn.Module, example_inputs: ExampleInputs) -> str:
    """Say on what a latency was measured: device, threads and shapes of the inputs."""
    devices = dict.fromkeys(tensor.device for tensor in named_tensors(model).values())
    where = ", ".join(
        f"{device}, threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device) for device in devices
    )
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(example_inputs))
    return f"on {where}, inputs: {shapes}"


class Turn:
    """One version of a model, which is called whenever it is its turn."""

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, shape: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._call = partial(run, model, example_inputs)
        self._shape = shape
        self._devices = {tensor.device for tensor in named_tensors(model).values() if tensor.device.type != "cpu"}

    def seconds(self, calls: int) -> float:
        """Return the fastest of so many calls in a row: what else the machine does can only add to them."""
        with self._shape():
            self._timed()  # the first call of a shape prepares what the others reuse
            return min([self._timed() for _ in range(calls)])

    def _timed(self) -> float:
        start = perf_counter()
        self._call()
        for device in self._devices:
            torch.accelerator.synchronize(device)
        return max(perf_counter() - start, 1e-9)


def rounds(turns: Sequence[Turn]) -> Iterator[list[float]]:
    """Yield, for each of ``ROUNDS`` rounds, the seconds of the fastest call of each turn.

    Turns change after a few calls and several times in a round, so that whatever else the machine does for longer than
    some milliseconds hits all of them.
    """
    one = turns[0].seconds(1)
    calls = min(10, max(1, math.ceil(_IN_A_ROW / one)))
    changes = min(10, max(3, math.ceil(_ROUND / (one * calls))))
    for _ in range(ROUNDS):
        fastest = [math.inf] * len(turns)
        for _ in range(changes):
            for place, turn in enumerate(turns):
                fastest[place] = min(fastest[place], turn.seconds(calls))
        yield fastest


def _stand_in(model: nn.Module, whole: Shapes) -> Callable[[], AbstractContextManager[None]]:
    """Return what gives a model, for the length of a block, the shape that it once had, with numbers of no matter."""
    if any(name.startswith(f"{path}.") for path in removed_layers(model) for name in whole.sizes):
        return partial(_with_its_layers, model, whole)
    own = named_tensors(model)
    shapes = {
        name: tuple(sizes) for name, sizes in whole.sizes.items() if name in own and list(own[name].shape) != sizes
    }
    if not shapes:
        return nullcontext
    known = []
    for path, name, value in whole.attributes:
        old = held_number(model.get_submodule(path), name)
        known.append(AttributeChange(path, name, old, tuple(value) if isinstance(old, tuple) else value))
    cut = Cut({}, {}, shapes, tuple(shape_attributes(model, shapes, known)))
    return partial(temporarily_cut, model, cut, _filled(own, shapes))


@contextmanager
def _with_its_layers(model: nn.Module, whole: Shapes) -> Iterator[None]:
    with temporarily_whole(model, whole.sizes), _stand_in(model, whole)():
        yield


def _filled(own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: torch.full(shape, 0.01 if own[name].is_floating_point() else 0, dtype=own[name].dtype)
        .to(own[name].device)
        .detach()
        for name, shape in shapes.items()
    }
