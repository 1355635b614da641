"""Sums over batches and ranks what passes show of every unit; knows no criterion and no loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.measure.unit_reads import Place, Reads, Seen, Unseen, find_reads
from lightning_prune.model.calls import tensors_in
from lightning_prune.model.devices import widest_float
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import gradient_part, is_sharded, over_processes, own_part
from lightning_prune.structure import Slot, Structure

__all__ = [
    "MOMENTS", "Contributions", "UnitMeans", "contributions_of", "moments_of", "over_units", "taylor_over_units",
    "watch_contributions",
]  # fmt: skip

MOMENTS = ("total", "squares", "zeros")
"""What is summed of activations: themselves, their squares, how many are zero."""

_PASSES = ("absent", "hidden", "veiled")  # see Unseen
_AT_ONCE = 2**16  # products of weights and gradients made at a time: few enough for a processor's cache


class UnitMeans(Metric):
    """Mean over batches and ranks of one number per unit of every channel group.

    Groups lie behind one another in one tensor, so that an update costs as much for many groups as for one.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    absent: Tensor
    hidden: Tensor
    veiled: Tensor

    def __init__(self, widths: Mapping[str, int], device: torch.device | str = "cpu") -> None:
        """Start from nothing.

        Args:
            widths: Group name -> number of units.
            device: Where the numbers come from.
        """
        super().__init__()
        self.names = list(widths)
        self.widths = list(widths.values())
        wide = widest_float(torch.device(device))
        self.add_state("total", torch.zeros(sum(self.widths), dtype=wide, device=device), dist_reduce_fx="sum")
        # per group: what the sums are over, and passes in which the group took no part or could not be seen
        for name in ("count", *_PASSES):
            state = torch.zeros(len(self.names), dtype=wide, device=device)
            self.add_state(name, state, dist_reduce_fx="sum")
        self.to(device)
        self._chosen: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, totals: Mapping[str, Tensor], count: float | Mapping[str, Tensor] = 1) -> None:
        """Add sums over ``count`` examples or batches, of each group or of all alike, ``(width,)`` for each group seen.

        Sums of which one is not finite, as a loss scaled too far gives them, do not count at all: were only the unit at
        fault left out, it would look as if the loss did not need it.
        """
        names = tuple(name for name in self.names if name in totals)
        if not names:
            return
        groups, entries, owner = self._chosen.get(names) or self._choose(names)
        values = torch.cat([totals[name].to(self.total.device) for name in names])
        broken = torch.zeros(len(names), dtype=torch.float32, device=values.device)
        broken.index_add_(0, owner, (~values.isfinite()).float())
        finite = broken == 0
        self.total.index_add_(0, entries, torch.where(finite[owner], values, 0.0).to(self.total.dtype))
        counts = torch.stack([count[name] for name in names]) if isinstance(count, Mapping) else count
        self.count.index_add_(0, groups, (finite * counts).to(self.count.dtype))

    def note(self, what: str, names: Iterable[str]) -> None:
        """Note a pass in which groups were ``"absent"``, or what reads them was ``"hidden"`` or ``"veiled"``."""
        places = [self.names.index(name) for name in names]
        if places:
            getattr(self, what)[places] += 1

    @property
    def unseen(self) -> Tensor:
        """Which groups cannot be scored, ``(groups,)``: what reads them was hidden, or veiled in every pass."""
        return (self.hidden > 0) | ((self.veiled > 0) & (self.count == 0))

    def compute(self) -> dict[str, Tensor]:
        """Return the means, ``(width,)`` for each group; 0 where a group could take part in passes and never did.

        Raises:
            PruningError: If a group was never seen, or what reads it was hidden.
        """
        groups = [name.partition("/")[0] for name in self.names]
        for name, unseen, hidden in zip(groups, self.unseen.tolist(), self.hidden.tolist(), strict=True):
            if unseen and hidden:
                raise PruningError(
                    f"{name}: an operator that reads its channels ran where autograd does not show it, in a fused "
                    "kernel, compiled code, a reentrant checkpoint or a function with a backward pass of its own, so "
                    f"its activations cannot be watched. Name ignore=[{name!r}], or use a criterion of weights."
                )
            if unseen:
                raise PruningError(
                    f"{name}: the layers that read its channels, or all that make them, are frozen, so no backward "
                    f"pass shows them. Unfreeze them, name ignore=[{name!r}], or use a criterion of weights."
                )
        parts = self.total.split(self.widths)
        means = {}
        for name, part, count, absent in zip(self.names, parts, self.count, self.absent.tolist(), strict=True):
            if not count and not absent:
                group = name.partition("/")[0]
                raise PruningError(
                    f"{group}: nothing was gathered for its channels: no batch came, or no finite gradient of them was "
                    "seen. If the layers that read these channels are frozen or unused, unfreeze them or name "
                    f"ignore=[{group!r}]."
                )
            means[name] = part / count.clamp_min(1)
        return means

    @property
    def without_gradient(self) -> list[str]:
        """The groups that could take part in passes, and that no pass has shown."""
        absent = ((self.absent > 0) & (self.count == 0)).tolist()
        names = [name.partition("/")[0] for name, missing in zip(self.names, absent, strict=True) if missing]
        return list(dict.fromkeys(names))

    @property
    def has_seen(self) -> bool:
        """Whether anything was added on this process."""
        return bool(self.count.any() or self.unseen.any())

    def gathered(self) -> dict[str, list[Any]]:
        """Return what this process has summed so far, as ``name -> [total, count]``, for a checkpoint."""
        parts = [part.clone() for part in self.total.cpu().split(self.widths)]
        sums: dict[str, list[Any]] = {
            name: [part, count] for name, part, count in zip(self.names, parts, self.count.tolist(), strict=True)
        }
        for name in _PASSES:
            if getattr(self, name).any():
                sums[f"groups {name}"] = [getattr(self, name).cpu().clone(), 1.0]
        return sums

    def take_up(self, gathered: Mapping[str, list[Any]]) -> None:
        """Go on from what :meth:`gathered` returned; groups of another width start anew."""
        for name, width in zip(self.names, self.widths, strict=True):
            total, count = gathered.get(name, (torch.empty(0), 0.0))
            if total.shape == (width,):
                self.update({name: total.to(self.device)}, count=count)
        for name in _PASSES:
            passes, _ = gathered.get(f"groups {name}", (torch.empty(0), 0.0))
            if passes.shape == getattr(self, name).shape:
                getattr(self, name).add_(passes.to(self.device))

    def _choose(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places of groups, of all their entries, and for each entry which of these groups owns it."""
        chosen = [self.names.index(name) for name in names]
        parts = torch.arange(sum(self.widths)).split(self.widths)
        entries = torch.cat([parts[group] for group in chosen])
        owner = torch.cat([torch.full((self.widths[group],), place) for place, group in enumerate(chosen)])
        found = (torch.tensor(chosen, device=self.device), entries.to(self.device), owner.to(self.device))
        self._chosen[names] = found
        return found


def over_units(slots: Iterable[Slot], width: int, values: Mapping[str, Tensor]) -> Tensor | None:
    """Sum values of weights over each unit's own.

    Args:
        slots: Where to look: all slots of a group, or some.
        width: Number of units of the group.
        values: By name of parameter, one value per weight. Parameters left out do not count.

    Returns:
        One sum per unit, ``(width,)``, or None where no slot has values.
    """

    def sums(slot: Slot) -> Tensor | None:
        value = values.get(slot.tensor)
        return None if value is None else _but(value, slot.dim)

    return _added(slots, width, sums)


def _added(slots: Iterable[Slot], width: int, sums: Callable[[Slot], Tensor | None]) -> Tensor | None:
    """Add up over slots what is one number for each index of a slot's dimension."""
    total: Tensor | None = None
    for slot in slots:
        rows = sums(slot)
        if rows is not None:
            if not (slot.aligned and len(rows) == width):
                rows = Place("", width, torch.from_numpy(slot.units), False).over_units(rows)
            total = rows if total is None else total + rows
    return total


def _but(values: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but one."""
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(dim=others) if others else values


def _product_sums(one: Tensor, other: Tensor, dims: Iterable[int]) -> dict[int, Tensor]:
    """Sum the product of two tensors over all dimensions but one, for each of some dimensions, ``(size of it,)``.

    The product is made a part at a time, which stays in a processor's cache: it is never written to memory.
    """
    if not one.dim():
        return {}
    rows = max(1, _AT_ONCE // max(1, one[:1].numel()))
    parts: dict[int, list[Tensor]] = {dim: [] for dim in dims}
    for first, second in zip(one.split(rows), other.split(rows), strict=True):
        product = first.to(_at_least_single(second)) * second
        for dim, sums in parts.items():
            sums.append(_but(product, dim))
    return {dim: sums[0] if len(sums) == 1 else _joined(sums, dim) for dim, sums in parts.items()}


def _joined(sums: list[Tensor], dim: int) -> Tensor:
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(dim=0)


def taylor_over_units(
    structure: Structure,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    elsewhere: Collection[str] = (),
) -> dict[str, Tensor]:
    r"""Return, for each group that has gradients, the square of each unit's expansion of the loss, ``(width,)``.

    The paper puts a gate on the unit and takes :math:`\sum_s g_s w_s` over the weights right before it, which is the
    loss's derivative with respect to the gate. Here the gate stands where the unit is read, and the weights are those
    right behind it: the derivative is exact whatever lies between, and however many layers write on the unit. Only
    where nothing that reads a unit has gradients, the weights that make and follow it stand in.

    Args:
        structure: The channel groups.
        parameters: Weights by name.
        gradients: Their gradients, where they have any.
        elsewhere: Parameters whose gradients count at another time, as another optimizer steps them: units that only
            these read are left out now.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, eq. 8 (arXiv:1906.10771).
    """
    seen = {name for name, gradient in gradients.items() if gradient is not None}
    wanted: dict[str, list[Slot]] = {}
    for name, group in structure.groups.items():
        # to add the weights that make a unit would be to count its gate again, and those of a norm, yet again
        readers = [slot for slot in group.slots if slot.role == "consumer"]
        known = [slot for slot in readers if slot.tensor in seen]
        if known or not any(slot.tensor in elsewhere for slot in readers):
            wanted[name] = known or [slot for slot in group.slots if slot.tensor in seen]
    found = {}
    with torch.no_grad():
        dims: dict[str, set[int]] = {}
        for slots in wanted.values():
            for slot in slots:
                dims.setdefault(slot.tensor, set()).add(slot.dim)
        sums = _sums_by_name(dims, parameters, gradients)
        for name, slots in wanted.items():
            total = _added(slots, structure.groups[name].width, lambda slot: sums[slot.tensor].get(slot.dim))
            if total is not None:
                found[name] = total.square()
    return found


def _sums_by_name(
    dims: Mapping[str, set[int]], parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> dict[str, dict[int, Tensor]]:
    """Sum weights times gradients for each index of the given dimensions, over all processes that hold a part."""
    sums: dict[str, dict[int, Tensor]] = {}
    for name, own in dims.items():
        gradient = gradients[name]
        assert gradient is not None
        sums[name] = _product_sums(own_part(parameters[name]), gradient_part(gradient, parameters[name]), own)
    split = [(name, dim) for name, own in sums.items() for dim in own if is_sharded(parameters[name])]
    if split:
        parts = [sums[name][dim] for name, dim in split]
        totals = over_processes(parts, [parameters[name] for name, _ in split], [dim for _, dim in split])
        for (name, dim), total in zip(split, totals, strict=True):
            sums[name][dim] = total
    return sums


class Contributions:
    """Gathers, in backward passes, what each unit's activations contribute to each example's loss.

    A unit's activations are what the operators that sum over it receive; the contributions of all of them add up, since
    all would lose it.

    Attributes:
        found: (group name, number of examples) -> signed contributions, ``(N, width)``. Clear it between two passes.
    """

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.found: dict[tuple[str, int], Tensor] = {}
        self._handles: list[Any] = []

    def attach(self, value: Any) -> Unseen:
        """Watch the backward passes from some tensors; those of earlier ones are not watched any longer.

        Returns:
            Groups of which an operator was not found.
        """
        self.detach()
        seen, unseen = self.reads.seen_from(tensors_in(value))
        for operator in seen:
            values: list[Tensor] = []
            self._handles.append(operator.node.register_prehook(partial(self._keep, operator, values)))
            self._handles.append(operator.node.register_hook(partial(self._add, operator, values)))
        groups = {True: set[str](), False: set[str]()}
        for operator in seen:
            groups[operator.without_gradient].update(place.group for place in operator.read.places)
        # constants have no gradient, either, such as the first state of a recurrent layer
        frozen = {name for name, parameter in self.reads.model.named_parameters() if not parameter.requires_grad}
        dark = {group for group in groups[True] if self.reads.own[group] & frozen}
        hidden = unseen.hidden | (dark & groups[False])  # seen in part
        return unseen._replace(hidden=hidden, veiled=(unseen.veiled | dark) - hidden)

    def detach(self) -> None:
        """Watch nothing any longer, and forget what was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.found.clear()

    @staticmethod
    def _keep(operator: Seen, values: list[Tensor], leaving: Any) -> None:
        values[:] = [operator.values()]  # before the backward pass frees them

    def _add(self, operator: Seen, values: list[Tensor], entering: Any, leaving: Any) -> None:
        read, gradient = values.pop(), operator.gradient(entering, leaving)
        if gradient is None:
            return
        rows = operator.by_example(read * gradient.to(read.dtype).reshape(read.shape))
        for place in operator.read.places:
            key = place.group, len(rows)
            own = place.over_units(rows)
            self.found[key] = self.found[key] + own if key in self.found else own


@contextmanager
def watch_contributions(model: nn.Module, structure: Structure) -> Iterator[Contributions]:
    """Find the operators that sum over units, and watch those that are attached inside the block.

    Raises:
        PruningError: If nothing that could be watched sums over a group's units or makes them.
    """
    contributions = Contributions(find_reads(model, structure, by_example=True))
    try:
        yield contributions
    finally:
        contributions.detach()


def contributions_of(found: Mapping[tuple[str, int], Tensor]) -> dict[str, list[Tensor]]:
    """Add up what operators saw of the same examples in what :class:`Contributions` has found.

    Returns:
        Group name -> signed contributions, ``(N, width)``; more than one where examples cannot be matched.
    """
    fewest = min((rows for _, rows in found), default=1)
    added = {}
    for name in dict.fromkeys(name for name, _ in found):
        seen = [rows for (group, _), rows in found.items() if group == name]
        # an image may be read in windows, one image's after another's, and other layers read it as a whole
        examples = fewest if all(len(rows) % fewest == 0 for rows in seen) else min(map(len, seen))
        if all(len(rows) % examples == 0 for rows in seen):
            seen = [torch.stack([rows.reshape(examples, -1, rows.shape[1]).sum(dim=1) for rows in seen]).sum(dim=0)]
        added[name] = seen
    return added


def moments_of(seen: Iterable[Seen]) -> dict[str, dict[str, Tensor]]:
    """Sum every unit's activations, their squares and how many are zero, over what operators received.

    Returns:
        Group name -> ``total``, ``squares``, ``zeros`` and ``count``, each ``(width,)``.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for operator in seen:
        values = operator.values().flatten(0, -2)
        sums = {
            "total": values.sum(dim=0),
            "squares": values.square().sum(dim=0),
            "zeros": (values == 0).sum(dim=0).to(values),
            "count": values.new_full(values.shape[1:], len(values)),
        }
        for place in operator.read.places:
            own = found.setdefault(place.group, {})
            for name, value in sums.items():
                rows = place.over_units(value.to(widest_float(value.device)))
                own[name] = own[name] + rows if name in own else rows
    return found


def _at_least_single(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
