"""Finds, in the autograd graph of any pass, the operators that sum over the units of channel groups; changes nothing.

The trace says which operators these are: matrix products, convolutions and bilinear products of the data with a weight.
In the graph of a later pass an operator is found by the parameters that its weight is made of, whichever module or
function called it. What it read was saved for the backward pass anyway, so that forward passes cost nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import gathered_names, is_sharded
from lightning_prune.structure import Structure, named_tensors, trace
from lightning_prune.structure.labels import Labels, Ledger, Ran

__all__ = ["Place", "Read", "Reads", "Seen", "Unseen", "find_reads"]


class _Side(NamedTuple):
    """How an operator reads data: positions of data and weight, the data's summed dimension, the output's made one."""

    data: int
    weight: int
    along: int
    out: int


class _Kind(NamedTuple):
    """A kind of product: its node in autograd graphs, where that keeps its operands, the sides data may stand on."""

    node: str
    saved: tuple[str, ...]
    bias: int | None
    sides: tuple[_Side, ...]


_BOTH = (_Side(0, 1, -1, -1), _Side(1, 0, -2, -2))
_BEHIND_ADDEND = (_Side(1, 2, -1, -1), _Side(2, 1, -2, -2))
_KINDS: dict[str, _Kind] = {
    "mm": _Kind("MmBackward0", ("_saved_self", "_saved_mat2"), None, _BOTH),
    "bmm": _Kind("BmmBackward0", ("_saved_self", "_saved_mat2"), None, _BOTH),
    "addmm": _Kind("AddmmBackward0", ("", "_saved_mat1", "_saved_mat2"), 0, _BEHIND_ADDEND),
    "baddbmm": _Kind("BaddbmmBackward0", ("", "_saved_batch1", "_saved_batch2"), None, _BEHIND_ADDEND),
    "mv": _Kind("MvBackward0", ("_saved_self", "_saved_vec"), None, (_Side(0, 1, -1, -1), _Side(1, 0, -1, -1))),
    "dot": _Kind("DotBackward0", ("_saved_self", "_saved_tensor"), None, (_Side(0, 1, -1, -1), _Side(1, 0, -1, -1))),
    "linear": _Kind("LinearBackward0", ("_saved_input", "_saved_weight"), 2, (_Side(0, 1, -1, -1),)),
    "convolution": _Kind("ConvolutionBackward0", ("_saved_input", "_saved_weight"), 2, (_Side(0, 1, 1, 1),)),
    "_trilinear": _Kind(
        "TrilinearBackward0", ("_saved_i1", "_saved_i2", "_saved_i3"), None, (_Side(0, 1, -1, -1), _Side(2, 1, -1, -1))
    ),
}
"""Operators that sum data against a weight, by name in aten; operands are counted alike in traces and graphs."""
_BY_NODE = {kind.node: kind for kind in _KINDS.values()}
_VIEWS = {"view", "_unsafe_view", "_reshape_alias"}
_VIEW_NODES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
_LEAF = "torch::autograd::AccumulateGrad"
_FAR = 64  # nodes between a product and the parameters that its weight is made of, at most


@dataclass(frozen=True, eq=False)
class Place:
    """Which unit of a group each index along the summed dimension belongs to, or -1, ``(size,)``."""

    group: str
    width: int
    units: Tensor
    aligned: bool
    share: float = 1.0

    def over_units(self, values: Tensor) -> Tensor:
        """Sum ``(..., size)`` over the indices of each unit: ``(..., width)``."""
        if self.aligned and values.shape[-1] == self.width:
            return values * self.share if self.share != 1 else values
        places = torch.where(self.units < 0, self.width, self.units).to(values.device)
        total = values.new_zeros(*values.shape[:-1], self.width + 1).index_add(-1, places, values)
        return total[..., : self.width] * self.share


@dataclass(frozen=True, eq=False)
class Read:
    """An operator that sums over units, or, of a group that nothing sums over with a weight, the first to make them.

    Attributes:
        parameters: What its weight is made of.
        size: Entries along the dimension on which the units lie.
        places: The groups whose units these are.
        made: Whether it makes them.
        lead: How many other dimensions the data has before it is flattened, and which of them counts examples.
    """

    parameters: frozenset[str]
    size: int
    places: tuple[Place, ...]
    made: bool
    lead: tuple[int, int]

    @property
    def key(self) -> tuple[frozenset[str], int, bool]:
        """What is alike of all uses of one weight."""
        return self.parameters, self.size, self.made


@dataclass(frozen=True, eq=False)
class Seen:
    """An operator found in the graph of a pass."""

    read: Read
    node: Any
    kind: _Kind
    side: _Side
    added: Tensor | None  # a bias that is added behind the product

    @property
    def without_gradient(self) -> bool:
        """Whether what it reads has no gradient, as everything is frozen that it is made of."""
        return not self.read.made and self.node.next_functions[self.side.data][0] is None

    @property
    def readable(self) -> bool:
        """Whether :meth:`values` can be called now: FSDP2 frees weights from a forward pass to the backward pass."""
        return not self.read.made or bool(self._saved(self.side.weight).untyped_storage().size())

    def values(self) -> Tensor:
        """Return what it read, or made, as ``(*lead, size)``, before or while a backward pass comes to it."""
        data = self._saved(self.side.data)
        if not self.read.made:
            return self._laid(data.movedim(self.side.along, -1), data.shape[self.side.along])
        bias = self.added
        if self.kind.node == "ConvolutionBackward0":
            n = self.node
            sizes = n._saved_stride, n._saved_padding, n._saved_dilation, n._saved_transposed, n._saved_output_padding
            out = torch.ops.aten.convolution(data, self._saved(1), bias, *sizes, n._saved_groups)
        else:
            left, right = sorted(self.side[:2])
            weights = self._saved(right)
            out = self._saved(left) @ (weights.mT if self.kind.node == "LinearBackward0" else weights)
            out = out if bias is None else out + bias
        return self._laid(out.movedim(self.side.out, -1), data.shape[self.side.along])

    def gradient(self, entering: Sequence[Tensor | None], leaving: Sequence[Tensor | None]) -> Tensor | None:
        """Return the derivative by these values, of what flows through this operator alone, ``(..., size)``."""
        found = leaving[0] if self.read.made else entering[self.side.data]
        return (
            None if found is None else found.detach().movedim(self.side.out if self.read.made else self.side.along, -1)
        )

    def by_example(self, values: Tensor) -> Tensor:
        """Sum ``(*lead, size)`` over all but examples and indices: ``(N, size)``."""
        dims, examples = self.read.lead
        lead = values.dim() - 1
        examples = examples if dims == lead else 0
        others = [dim for dim in range(lead) if dim != examples]
        values = values.sum(dim=others) if others else values
        return values if values.dim() > 1 else values[None]

    def _saved(self, position: int) -> Tensor:
        found: Tensor = getattr(self.node, self.kind.saved[position]).detach()
        return found

    def _laid(self, values: Tensor, size: int) -> Tensor:
        """Undo the flattening of dimensions right before the operator, that examples can be told apart."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        before, _ = self.node.next_functions[self.side.data]
        if before is None or before.name() not in _VIEW_NODES or self.side.along != -1:
            return values
        lead = _lead(before._saved_self_sym_sizes, size, values.numel() // values.shape[-1])
        return values if lead is None else values.reshape(*lead, values.shape[-1])


class Unseen(NamedTuple):
    """Groups of which an operator that sums over their units was not found in a graph.

    Attributes:
        hidden: Groups that take part, such as those that a fused kernel reads.
        veiled: Groups all of whose readers, or all of whose weights, are frozen in this pass, or whose activations have
            no gradient, as what makes them is frozen. Another may show them, where optimizers take turns.
        absent: Groups that could have been differentiated and do not take part.
    """

    hidden: set[str]
    veiled: set[str]
    absent: set[str]


class Reads:
    """The operators that sum over the units of a model's channel groups.

    Attributes:
        found: All of them.
        own: Group name -> parameters that its units have entries in.
    """

    def __init__(self, model: nn.Module, structure: Structure, found: list[Read]) -> None:
        self.model = model
        self.found = found
        parameters = {name for name, _ in model.named_parameters()}
        self.own: dict[str, set[str]] = {
            name: parameters.intersection(slot.tensor for slot in group.slots)
            for name, group in structure.groups.items()
        }
        self._by_parameter: dict[str, list[Read]] = {}
        for read in found:
            for name in read.parameters:
                self._by_parameter.setdefault(name, []).append(read)

    def seen_from(self, roots: Iterable[Tensor]) -> tuple[list[Seen], Unseen]:
        """Find these operators in the graph behind some tensors.

        Returns:
            Those found, and the groups of which one was not found.
        """
        parameters = dict(self.model.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        if any(map(is_sharded, parameters.values())):
            names |= gathered_names(self.model)
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        nodes = _nodes(roots)
        reached = {names[id(node.variable)] for node in nodes if node.name() == _LEAF and id(node.variable) in names}
        products = [(node, _BY_NODE[node.name()]) for node in nodes if node.name() in _BY_NODE]
        products.sort(key=lambda product: product[0]._sequence_nr())  # in the order of the forward pass
        feeds = _Feeds(nodes)
        seen: list[Seen] = []
        turns: dict[tuple[int, ...], int] = {}
        for node, kind in products:
            for reads, side in self._matches(node, kind, names):
                key = tuple(map(id, reads))
                turn = turns[key] = turns.get(key, -1) + 1
                read = reads[turn % len(reads)]  # a weight used in several ways is so in the order of the trace
                seen.append(Seen(read, node, kind, side, feeds.bias(node, kind, read.size) if read.made else None))
        return seen, self._missing({one.read.key for one in seen}, reached, frozen)

    def _missing(self, seen: set[Any], reached: set[str], frozen: set[str]) -> Unseen:
        hidden: set[str] = set()
        veiled: set[str] = set()
        taking_part: set[str] = set()
        for read in self.found:
            groups = {place.group for place in read.places}
            if read.key in seen:
                taking_part |= groups
            elif read.parameters & reached:
                hidden |= groups
            elif read.parameters <= frozen:
                veiled |= {group for group in groups if self.own[group] & reached}
        veiled |= {group for group, own in self.own.items() if own <= frozen and group not in taking_part}
        hidden |= veiled & taking_part  # seen in part
        absent = {group for group in self.own.keys() - taking_part - hidden - veiled if self.own[group] - frozen}
        return Unseen(hidden, veiled - hidden, absent)

    def _matches(self, node: Any, kind: _Kind, names: dict[int, str]) -> list[tuple[list[Read], _Side]]:
        """Return what the trace knows of a node, and the side on which its data stands; the nearest weight counts."""
        best: list[tuple[list[Read], _Side]] = []
        nearest = _FAR + 1
        for side in kind.sides:
            leaves, far = _leaves(node.next_functions[side.weight][0], names, self._by_parameter)
            known = self._by_parameter[next(iter(leaves))] if leaves else []
            fitting = [read for read in known if leaves <= read.parameters and _fits(node, kind, side, read)]
            if not fitting or far > nearest:
                continue
            parts = [[read for read in fitting if read.made is made] for made in (False, True)]
            own = [(part, side) for part in parts if part]
            both = far == nearest and best[0][1].weight == side.weight  # a bilinear product has two sides
            best = [*best, *own] if both else own
            nearest = far
        return best


def find_reads(model: nn.Module, structure: Structure, by_example: bool = False) -> Reads:
    """Find which operators sum over the units of each group.

    Args:
        model: The model.
        structure: Its channel groups, and the ledger of their trace.
        by_example: Whether examples will be told apart. Then the model is traced on twice as many, to see which
            dimension of each operator's data runs over them.

    Raises:
        PruningError: If nothing sums over a group's units, or makes them, that could be watched.
    """
    ledger = structure.ledger
    device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
    index = _Index(structure, device)
    origins = _origins(ledger)
    made_by = {id(labels): ran for ran in ledger.ran for labels in ran.made}
    consumers: dict[str, set[str]] = {}
    for name, group in structure.groups.items():
        consumers[name] = {slot.tensor for slot in group.slots if slot.role == "consumer"}
    twice = _twice(model, ledger) if by_example else None
    twice_by = {id(labels): ran for ran in twice or () for labels in ran.made}
    found: list[Read] = []
    makers: list[Read] = []
    paired: set[str] = set()
    for number, ran in enumerate(ledger.ran):
        kind = _KINDS.get(_name_of(ran))
        if kind is None:
            continue
        for side in kind.sides:
            data, weight = ran.taken[side.data], ran.taken[side.weight]
            along = side.along % len(ran.entering[side.data])
            reading = index.places(data, along)
            if not data.weight and not weight.weight:
                paired |= {place.group for place in reading}
            if data.weight or id(weight) not in origins:
                continue  # a weight that another multiplies is no data, and what comes from no weight has no name
            lead = len(ran.entering[side.data]) - 1, 0
            shape = _lead_of(ran, side, made_by)
            if twice is not None:
                lead = _examples_of(shape, _lead_of(twice[number], side, twice_by))
            sources = origins[id(weight)]
            summed = tuple(place for place in reading if sources & consumers[place.group])
            if summed and not _depthwise(ran):
                found.append(Read(sources, int(ran.entering[side.data][along]), summed, False, lead))
            out = side.out % len(ran.leaving[0])
            making = index.places(ran.made[0], out)
            if making and weight.weight:
                makers.append(Read(sources, int(ran.leaving[0][out]), making, True, lead))
    found.extend(_first_makers(structure, found, makers, paired))
    unseen = structure.groups.keys() - {place.group for read in found for place in read.places}
    if unseen:
        name = min(unseen)
        raise PruningError(
            f"{name}: no matrix product or convolution with a weight makes its channels or sums over them, so its "
            f"activations cannot be watched. Name ignore=[{name!r}], or use a criterion of weights."
        )
    return Reads(model, structure, _distinct(found))


def _first_makers(structure: Structure, found: list[Read], makers: list[Read], paired: set[str]) -> Iterator[Read]:
    """Yield, for each group that no weight sums over, the first operator that makes it.

    Where data is multiplied with data, as queries with keys, a unit is one term of the sum: to scale one of its factors
    is to scale it. If one operator makes both factors, half of what it makes counts.
    """
    rest = structure.groups.keys() - {place.group for read in found for place in read.places}
    for name in rest:
        own = [(read, place) for read in makers for place in read.places if place.group == name]
        if own:
            read, place = own[0]
            several = len({id(other.parameters) for other, _ in own}) > 1
            share = 0.5 if name in paired and not several else 1.0
            halved = Place(place.group, place.width, place.units, place.aligned, share)
            yield Read(read.parameters, read.size, (halved,), True, read.lead)


def _distinct(found: list[Read]) -> list[Read]:
    """Keep one of the uses of a weight where all are alike, as are those in a second pass."""
    uses: dict[Any, list[Read]] = {}
    for read in found:
        uses.setdefault(read.key, []).append(read)
    kept: list[Read] = []
    for reads in uses.values():
        ways = {(read.lead, *((place.group, str(place.units.tolist())) for place in read.places)) for read in reads}
        kept.extend(reads[:1] if len(ways) == 1 else reads)
    return kept


class _Index:
    """Looks up which group and unit atoms belong to."""

    def __init__(self, structure: Structure, device: torch.device) -> None:
        self.names = list(structure.groups)
        self.widths = [structure.groups[name].width for name in self.names]
        self.component = structure.component
        self.device = device
        self.group = np.full(structure.ledger.size, -1)
        self.unit = np.full(structure.ledger.size, -1)
        for number, name in enumerate(self.names):
            self.group[structure.units[name]] = number
            self.unit[structure.units[name]] = np.arange(self.widths[number])

    def places(self, labels: Labels, dim: int) -> tuple[Place, ...]:
        """Return the groups whose units lie along a dimension."""
        found: dict[int, Place] = {}
        for label in labels.at(dim):
            components = self.component[label.atoms]
            groups = self.group[components]
            for number in np.unique(groups[groups >= 0]).tolist():
                if number not in found:
                    units: NDArray[np.int64] = np.where(groups == number, self.unit[components], -1)
                    width = self.widths[number]
                    aligned = len(units) == width and bool((units == np.arange(width)).all())
                    found[number] = Place(self.names[number], width, torch.from_numpy(units).to(self.device), aligned)
        return tuple(found.values())


def _origins(ledger: Ledger) -> dict[int, frozenset[str]]:
    """Return, by ``id``, the parameters that each labelled tensor made from parameters alone is made of."""
    starts = {slot.start: slot.tensor for slot in ledger.slots}
    origins: dict[int, frozenset[str]] = {}
    for ran in ledger.ran:
        sources: frozenset[str] = frozenset()
        for labels in ran.taken:
            if id(labels) not in origins and labels.weight and labels.dims:
                atoms = next(iter(labels.dims.values()))[0].atoms
                name = starts.get(int(atoms[0])) if len(atoms) else None
                if name is not None:
                    origins[id(labels)] = frozenset([name])
            sources |= origins.get(id(labels), frozenset())
        for labels in ran.made:
            if labels.weight and sources:
                origins[id(labels)] = sources
    return origins


def _twice(model: nn.Module, ledger: Ledger) -> list[Ran] | None:
    """Trace the model on twice as many examples; None where it does not run on them, or runs otherwise."""
    inputs = ledger.passes[0].inputs
    first = [tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor) and tensor.dim()]
    if not first:
        return None
    count = len(first[0])

    def doubled(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == count else tensor

    try:
        found = trace(model, pytree.tree_map_only(Tensor, doubled, inputs), ledger.literals).ran
    except PruningError:
        return None
    alike = len(found) >= len(ledger.ran) and all(a.func is b.func for a, b in zip(ledger.ran, found, strict=False))
    return found if alike else None


def _lead_of(ran: Ran, side: _Side, made_by: dict[int, Ran]) -> list[int]:
    """Return the sizes of all dimensions of the data but the summed one, as they are before these are flattened."""
    shape = [int(size) for size in ran.entering[side.data]]
    before = made_by.get(id(ran.taken[side.data]))
    size = shape.pop(side.along)
    if before is not None and _name_of(before) in _VIEWS and side.along == -1:
        return _lead(before.entering[0], size, math.prod(shape)) or shape
    return shape


def _lead(shape: Iterable[Any], size: int, rows: int) -> list[int] | None:
    """Return the leading sizes of a shape whose other dimensions make up ``size``, if they make up ``rows``."""
    lead = [int(one) for one in shape]
    rest = 1
    while lead and rest < size:
        rest *= lead.pop()
    return lead if lead and rest == size and math.prod(lead) == rows else None


def _examples_of(once: list[int], twice: list[int]) -> tuple[int, int]:
    differing = [dim for dim, (a, b) in enumerate(zip(once, twice, strict=False)) if a != b]
    return len(once), differing[0] if differing else 0


def _name_of(ran: Ran) -> str:
    return str(ran.func.overloadpacket.__name__)


def _depthwise(ran: Ran) -> bool:
    """Return whether a convolution reads each channel to hand it on: what reads that is watched."""
    return _name_of(ran) == "convolution" and 1 < ran.plain[8] == ran.entering[0][1]


def _nodes(roots: Iterable[Tensor]) -> list[Any]:
    """Return every node of a graph once."""
    waiting = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for behind, _ in waiting.pop().next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return list(seen)


class _Feeds:
    """Which nodes of a graph each node feeds, looked up only when asked for."""

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes

    @cached_property
    def fed(self) -> dict[Any, list[Any]]:
        """Return, for each node, those that take what it makes."""
        fed: dict[Any, list[Any]] = {}
        for node in self.nodes:
            for behind, _ in node.next_functions:
                fed.setdefault(behind, []).append(node)
        return fed

    def bias(self, node: Any, kind: _Kind, size: int) -> Tensor | None:
        """Return the vector that a product adds, or that is added to its output right behind it."""
        if kind.bias is not None:
            return _vector(node.next_functions[kind.bias][0], size)
        after = self.fed.get(node, [])
        while len(after) == 1 and after[0].name() in _VIEW_NODES:
            after = self.fed.get(after[0], [])
        if len(after) != 1 or after[0].name() != "AddBackward0":
            return None
        found = [_vector(behind, size) for behind, _ in after[0].next_functions]
        return next((vector for vector in found if vector is not None), None)


def _vector(node: Any, size: int) -> Tensor | None:
    """Return the parameter of so many entries that a node hands on, if it is one."""
    while node is not None and node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    if node is None or node.name() != _LEAF or node.variable.shape != (size,):
        return None
    found: Tensor = node.variable.detach()
    return found


def _leaves(node: Any, names: dict[int, str], known: dict[str, Any]) -> tuple[set[str], int]:
    """Return the parameters that an operand is made of, if these are all known and near, and how near."""
    leaves: set[str] = set()
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == _LEAF:
            name = names.get(id(node.variable), "")
            if name not in known:
                return set(), 0
            leaves.add(name)
        for behind, _ in node.next_functions:
            if behind not in seen:
                seen.add(behind)
                waiting.append(behind)
        if len(seen) > _FAR:
            return set(), 0
    return leaves, len(seen)


def _fits(node: Any, kind: _Kind, side: _Side, read: Read) -> bool:
    """Return whether the operands have the size that the trace saw, as far as the node tells without unpacking them."""
    position, dim = (side.weight, side.out) if read.made else (side.data, side.along)
    sizes = getattr(node, f"{kind.saved[position]}_sym_sizes", None)
    return sizes is None or int(sizes[dim]) == read.size
