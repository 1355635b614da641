"""Takes the layers of a decoder to a solver block by block, with one block's Hessians in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.measure.blocks import Chain, Stream, find_chain
from lightning_prune.measure.output_change import replaced
from lightning_prune.measure.products import Products, Shift
from lightning_prune.model.lazy import Lazily
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.pruning.layerwise import Leaving, Solved, Surgery, all_together, naming_weight, one_by_one, shown
from lightning_prune.structure import named_tensors

__all__ = ["Stages", "by_blocks", "stages_of"]

_Value = TypeVar("_Value")
_LEAST = 2**28  # bytes of Hessians that are held at a time in small blocks, too: each part takes a run of the block


@dataclass(frozen=True, eq=False)
class Stages:
    """The weights to prune, by where they run.

    Attributes:
        chain: The blocks.
        before: Names of weights that run before them.
        inside: Names of the weights of each block.
        behind: Names of weights that run behind them.
    """

    chain: Chain
    before: tuple[str, ...]
    inside: tuple[tuple[str, ...], ...]
    behind: tuple[str, ...]


def stages_of(surgery: Surgery, names: Sequence[str]) -> Stages | None:
    """Sort weights by the blocks that they belong to, or return None where a model does not consist of such.

    Args:
        surgery: The model and its data.
        names: The weights, in the order in which they run.
    """
    calibration = surgery.calibration
    chain = find_chain(surgery.model, calibration)
    without = torch.tensor(float(chain is None), device=next(iter(surgery.tensors.values())).device)
    if chain is None or float(calibration.over_processes(without)):  # all processes go the same way
        return None
    inside: list[tuple[str, ...]] = []
    ours: list[str] = []
    for path in chain.paths:
        block = [name for name in names if name.startswith(f"{path}.")]
        for name in block:
            shift = surgery.products.shifts.get(name)
            if shift is not None and not shift.name.startswith(f"{path}."):
                return None  # what is added behind the weight is another block's
        inside.append(tuple(block))
        ours.extend(block)
    if not ours:
        return None
    first = names.index(ours[0])
    last = first + len(ours)
    if list(names[first:last]) != ours:
        return None  # another weight runs between two of the blocks
    return Stages(chain, tuple(names[:first]), tuple(inside), tuple(names[last:]))


def by_blocks(
    surgery: Surgery, stages: Stages, leaving: Leaving, sequential: bool, progress: bool
) -> Iterator[tuple[str, Solved]]:
    """Solve block after block, and yield what each layer becomes; the model is left as found.

    Every block runs by itself on what the blocks before it made of the batches, so that the work grows with the number
    of blocks and not with its square.

    Args:
        surgery: The model, its data and how layers are solved.
        stages: Its weights, by where they run.
        leaving: How much leaves each.
        sequential: Whether layers are fitted to the inputs that the pruned ones before them give.
        progress: Whether to show a progress bar.
    """
    found: dict[str, Solved] = {}
    if not sequential:
        outside = [*stages.before, *stages.behind]
        if outside:
            found = all_together(surgery, {name: leaving[name] for name in outside}, progress)
    elif stages.before:
        found = one_by_one(surgery, {name: leaving[name] for name in stages.before}, progress)
    yield from found.items()

    chain = stages.chain
    dense = chain.begin(surgery.calibration)
    pruned = None
    if sequential:
        with replaced(surgery.model, _written(found)):
            hidden = chain.begin(surgery.calibration).hidden
        pruned = Stream(dense.place, dense.calls, hidden)
    for number in shown("blocks pruned", range(len(chain.paths)), progress):
        found = _solved_block(surgery, stages, number, dense, pruned, leaving)
        for name, solved in found.items():
            others = {f"{chain.paths[number]}.{other}": tensor for other, tensor in solved.others.items()}
            yield f"{chain.paths[number]}.{name}", replace(solved, others=others)

    if pruned is not None and stages.behind:
        behind = _behind(surgery, stages, dense, pruned)
        yield from one_by_one(behind, {name: leaving[name] for name in stages.behind}, progress).items()


def _solved_block(
    surgery: Surgery, stages: Stages, number: int, dense: Stream, pruned: Stream | None, leaving: Leaving
) -> dict[str, Solved]:
    """Solve the layers of one block, and let what flows go on behind it; names are those in the block."""
    path = stages.chain.paths[number]
    block = stages.chain.blocks[number]
    flows = _Flows(dense, pruned, number)
    own = _Part(surgery, block, f"{path}.", flows)
    names = stages.inside[number]
    found: dict[str, Solved] = {}
    with naming_weight(path):
        if names and pruned is None:
            found = all_together(own.surgery, own.of(leaving, names), False)
        elif names:
            found = one_by_one(own.surgery, own.of(leaving, names), False)
    if len(dense.made) < len(dense.hidden) or pruned is not None:
        with undisturbed(block):
            for batch in range(len(dense.hidden)):
                dense.run(number, block, batch)
    dense.advance()
    if pruned is not None:
        with replaced(block, _written(found)):
            for batch in range(len(pruned.hidden)):
                pruned.run(number, block, batch)
        pruned.advance()
    return found


def _behind(surgery: Surgery, stages: Stages, dense: Stream, pruned: Stream) -> Surgery:
    """Return the surgery of what runs behind the blocks: the last of them returns what flows there."""
    flows = _Flows(dense, pruned, len(stages.chain.paths))
    batches, whole = surgery.calibration.batches, surgery.calibration.forward

    def forward(model: nn.Module, batch: int) -> Any:
        with stages.chain.ending_in(flows.now.hidden[batch]):
            return whole(model, batches[batch])

    calibration = replace(surgery.calibration, batches=range(len(batches)), forward=forward)
    return replace(surgery, calibration=calibration, after=flows.after)


class _Flows:
    """What flows into a block of the whole model and of the pruned one, and which of both is run on."""

    def __init__(self, dense: Stream, pruned: Stream | None, number: int) -> None:
        self.now, self.dense, self.pruned, self.number = dense, dense, pruned, number

    def forward(self, block: nn.Module, batch: int) -> None:
        self.now.run(self.number, block, batch)

    @contextmanager
    def after(self) -> Iterator[None]:
        assert self.pruned is not None  # asked in sequence alone
        self.now = self.pruned
        try:
            yield
        finally:
            self.now = self.dense


class _Part:
    """A surgery of one block alone, by names in the block."""

    def __init__(self, surgery: Surgery, block: nn.Module, prefix: str, flows: _Flows) -> None:
        self.prefix = prefix
        whole, masks = surgery.products, surgery.masks
        shifts = {}
        for name, shift in self._own(whole.shifts).items():
            shifts[name] = Shift(shift.name.removeprefix(prefix), shift.sign)
        alike = {name: first.removeprefix(prefix) for name, first in self._own(whole.alike).items()}
        products = Products(
            self._own(whole.readings), self._own(whole.calls), self._own(whole.shapes), {}, shifts, alike
        )
        batches = range(len(surgery.calibration.batches))
        self.surgery = Surgery(
            block,
            replace(surgery.calibration, batches=batches, forward=flows.forward),
            products,
            surgery.solver,
            surgery.damping,
            named_tensors(block),
            Lazily([name.removeprefix(prefix) for name in masks if name.startswith(prefix)], _of_block(masks, prefix)),
            flows.after,
            memory=max(_bytes(block), _LEAST),
        )

    def of(self, values: Mapping[str, _Value], names: Sequence[str]) -> dict[str, _Value]:
        """Return values by names in the block."""
        return {name.removeprefix(self.prefix): values[name] for name in names}

    def _own(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
        return self.of(values, [name for name in values if name.startswith(self.prefix)])


def _of_block(masks: Mapping[str, Tensor], prefix: str) -> Callable[[str], Tensor]:
    # No method, which would lead back to the part, and hold its Hessians until garbage is collected.
    return lambda name: masks[prefix + name]


def _bytes(block: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in named_tensors(block).values())


def _written(found: Mapping[str, Solved]) -> dict[str, Tensor]:
    """Return all tensors that change, by name."""
    tensors: dict[str, Tensor] = {}
    for name, solved in found.items():
        tensors |= {name: solved.weight, **solved.others}
    return tensors
