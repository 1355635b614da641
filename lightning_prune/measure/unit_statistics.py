"""Gathers what criteria need over batches and ranks, unit by unit; hooks live in ``with``, no loss is known here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.algorithms.criteria import taylor_activations
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import Slot, Structure

__all__ = [
    "UnitMeans",
    "contributions_of",
    "gather_contributions",
    "over_units",
    "taylor_over_units",
    "watch_contributions",
    "watch_moments",
]


class UnitMeans(Metric):
    """Mean over batches and ranks of one number per unit of every channel group."""

    full_state_update = False

    def __init__(self, widths: Mapping[str, int], device: torch.device | str = "cpu") -> None:
        """Start from nothing.

        Args:
            widths: Group name -> number of units.
            device: Where the numbers come from.
        """
        super().__init__()
        self.names = list(widths)
        for i, width in enumerate(widths.values()):
            self.add_state(f"total_{i}", torch.zeros(width, dtype=_wide(device), device=device), dist_reduce_fx="sum")
            self.add_state(f"count_{i}", torch.zeros((), dtype=_wide(device), device=device), dist_reduce_fx="sum")
        self.to(device)

    def update(self, totals: Mapping[str, Tensor], count: float = 1) -> None:
        """Add sums over ``count`` examples or batches, ``(width,)`` for each group seen.

        Sums of which one is not finite, as a loss scaled too far gives them, do not count at all: were only the unit at
        fault left out, it would look as if the loss did not need it.
        """
        for i, name in enumerate(self.names):
            if name in totals:
                finite = totals[name].isfinite().all()
                getattr(self, f"total_{i}").add_(torch.where(finite, totals[name], 0.0))
                getattr(self, f"count_{i}").add_(finite * count)

    def compute(self) -> dict[str, Tensor]:
        """Return the means, ``(width,)`` for each group.

        Raises:
            PruningError: If a group was never seen.
        """
        means = {}
        for i, name in enumerate(self.names):
            count = getattr(self, f"count_{i}")
            if not count:
                raise PruningError(
                    f"{name}: nothing was gathered for its channels: no batch came, or no finite gradient of them was "
                    "seen. If the layers that read these channels are frozen or unused, unfreeze them or name "
                    f"ignore=[{name!r}]."
                )
            means[name] = getattr(self, f"total_{i}") / count
        return means

    @property
    def has_seen(self) -> bool:
        """Whether anything was added on this process."""
        return any(float(getattr(self, f"count_{i}")) for i in range(len(self.names)))

    def gathered(self) -> dict[str, list[Any]]:
        """Return what this process has summed so far, as ``group -> [total, count]``, for a checkpoint."""
        return {
            name: [getattr(self, f"total_{i}").cpu().clone(), float(getattr(self, f"count_{i}"))]
            for i, name in enumerate(self.names)
        }

    def take_up(self, gathered: Mapping[str, list[Any]]) -> None:
        """Go on from what :meth:`gathered` returned; groups of another width start anew."""
        fitting = {
            name: found
            for i, name in enumerate(self.names)
            if (found := gathered.get(name)) is not None and found[0].shape == getattr(self, f"total_{i}").shape
        }
        for name, (total, count) in fitting.items():
            self.update({name: total.to(self.device)}, count=count)


def over_units(slots: Iterable[Slot], width: int, values: Mapping[str, Tensor]) -> Tensor | None:
    """Sum values of weights over each unit's own.

    Args:
        slots: Where to look: all slots of a group, or some.
        width: Number of units of the group.
        values: By name of parameter, one value per weight. Parameters left out do not count.

    Returns:
        One sum per unit, ``(width,)``, or None where no slot has values.
    """
    total: Tensor | None = None
    for slot in slots:
        if slot.tensor in values:
            value = values[slot.tensor]
            rows = value.sum(dim=[d for d in range(value.dim()) if d != slot.dim]) if value.dim() > 1 else value
            rows = _by_unit(rows, torch.from_numpy(slot.units), width, slot.aligned)
            total = rows if total is None else total + rows
    return total


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
    found = {}
    with torch.no_grad():
        products = {
            name: parameters[name].to(_at_least_single(gradient)) * gradient
            for name, gradient in gradients.items()
            if gradient is not None
        }
        for name, group in structure.groups.items():
            # to add the weights that make a unit would be to count its gate again, and those of a norm, yet again
            readers = [slot for slot in group.slots if slot.role == "consumer" and slot.tensor in products]
            if not readers and any(slot.role == "consumer" and slot.tensor in elsewhere for slot in group.slots):
                continue
            total = over_units(readers or group.slots, group.width, products)
            if total is not None:
                found[name] = total.square()
    return found


def gather_contributions(means: UnitMeans, found: dict[tuple[str, int], Tensor], scale: float = 1.0) -> None:
    """Add to the means what :func:`watch_contributions` has found, by size, and clear it.

    Each example counts as its own loss does, which the mean loss of a batch holds divided by the number of examples.

    Args:
        means: What is added to.
        found: What one backward pass has left.
        scale: What the loss was multiplied by.
    """
    for name, seen in contributions_of(found).items():
        for rows in seen:
            means.update({name: rows.abs().sum(dim=0) * (len(rows) / scale)}, count=len(rows))
    found.clear()


def contributions_of(found: Mapping[tuple[str, int], Tensor]) -> dict[str, list[Tensor]]:
    """Add up what modules saw of the same examples in what :func:`watch_contributions` has found.

    Returns:
        Group name -> signed contributions, ``(N, width)``; more than one where examples cannot be matched.
    """
    added = {}
    for name in dict.fromkeys(name for name, _ in found):
        seen = [rows for (group, _), rows in found.items() if group == name]
        examples = min(map(len, seen))
        if all(len(rows) % examples == 0 for rows in seen):  # windows of images, one image's after another's
            seen = [torch.stack([rows.reshape(examples, -1, rows.shape[1]).sum(dim=1) for rows in seen]).sum(dim=0)]
        added[name] = seen
    return added


@contextmanager
def watch_contributions(model: nn.Module, structure: Structure) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Gather, during backward passes inside the block, what each unit's feature map contributes to each example's loss.

    A unit's feature map is what the modules that sum over it receive; the contributions of all of them add up, since
    all would lose it. Nothing is gathered without gradients, so that validation and traces pass unseen.

    Yields:
        (group name, number of examples) -> signed contributions, ``(N, width)``. Clear it between two passes.

    Raises:
        PruningError: If something else than a convolution or a linear module sums over a group's channels.
    """
    found: dict[tuple[str, int], Tensor] = {}

    def add(place: _Place, activations: Tensor, gradients: Tensor) -> None:
        contributions = taylor_activations(place.channels_second(activations), place.channels_second(gradients))
        rows = place.over_units(contributions)
        key = place.group, len(rows)
        found[key] = found[key] + rows if key in found else rows

    def enter(place: _Place, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        seen = x.view_as(x)  # its gradient is the one through this module alone
        seen.register_hook(partial(add, place, x.detach()))
        return seen

    with _entered(model, _places(model, structure), enter):
        yield found


@contextmanager
def watch_moments(
    model: nn.Module, structure: Structure, differentiated: bool = False
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Sum, during forward passes inside the block, every unit's activations, their squares and how many are zero.

    Where several modules read a unit, what each of them receives counts.

    Args:
        model: The model.
        structure: Its channel groups.
        differentiated: Whether only passes with gradients count, so that validation and traces pass unseen.

    Yields:
        Group name -> ``total``, ``squares``, ``zeros`` and ``count``, each ``(width,)``.
    """
    found: dict[str, dict[str, Tensor]] = {}

    def enter(place: _Place, x: Tensor) -> Tensor:
        if differentiated and not torch.is_grad_enabled():
            return x
        maps = place.channels_second(x.detach())
        maps = maps.flatten(2) if maps.dim() > 2 else maps[..., None]
        moments = {
            "total": maps,
            "squares": maps.square(),
            "zeros": (maps == 0).to(maps),
            "count": torch.ones_like(maps),
        }
        wide = _wide(x.device)
        sums = {name: place.over_units(value.sum(dim=(0, 2))[None])[0].to(wide) for name, value in moments.items()}
        before = found.get(place.group, {})
        found[place.group] = {name: before[name] + value if before else value for name, value in sums.items()}
        return x

    with _entered(model, _places(model, structure), enter):
        yield found


@dataclass(frozen=True, eq=False)
class _Place:
    """A module that sums over a group's channels, and which unit each of its input channels belongs to."""

    module: str
    group: str
    width: int
    last: bool  # whether channels are the input's last dimension
    alone: int  # dimensions of an input that is one example without a batch
    units: Tensor
    aligned: bool

    def channels_second(self, x: Tensor) -> Tensor:
        x = x.to(_at_least_single(x))
        x = x[None] if x.dim() == self.alone else x
        return x.movedim(-1, 1) if self.last else x

    def over_units(self, values: Tensor) -> Tensor:
        """Sum ``(N, channels)`` over the channels of each unit: ``(N, width)``."""
        return _by_unit(values, self.units, self.width, self.aligned)


def _places(model: nn.Module, structure: Structure) -> list[_Place]:
    modules = dict(model.named_modules())
    places = []
    for name, group in structure.groups.items():
        for slot in group.slots:
            if slot.role != "consumer":
                continue
            path = slot.tensor.partition(".parametrizations.")[0].removesuffix(".weight")
            module = modules.get(path)
            units = torch.from_numpy(slot.units)
            if isinstance(module, nn.Linear):
                places.append(
                    _Place(path, name, group.width, True, 1, units, slot.aligned and len(units) == group.width)
                )
            elif isinstance(module, nn.modules.conv._ConvNd):
                if module.transposed and module.groups == module.in_channels:
                    continue  # depthwise: it reads each channel to hand it on, and what reads that is watched
                units = units if module.transposed else units.repeat(module.groups)
                aligned = slot.aligned and len(units) == group.width
                places.append(_Place(path, name, group.width, False, module.weight.dim() - 1, units, aligned))
            else:
                raise PruningError(
                    f"{name}: {slot.tensor} sums over its channels and belongs to no convolution or linear module, so "
                    f"what it receives cannot be watched. Name ignore=[{name!r}], or use a criterion of weights."
                )
    return places


@contextmanager
def _entered(model: nn.Module, places: Iterable[_Place], enter: Callable[[_Place, Tensor], Tensor]) -> Iterator[None]:
    """Hand what each place receives to ``enter``, and on to its module what that returns, inside the block."""

    def hook(place: _Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (enter(place, args[0]), *args[1:]), kwargs
        return (), {**kwargs, "input": enter(place, kwargs["input"])}

    with ExitStack() as stack:
        for place in places:
            module = model.get_submodule(place.module)
            stack.callback(module.register_forward_pre_hook(partial(hook, place), with_kwargs=True).remove)
        yield


def _by_unit(values: Tensor, units: Tensor, width: int, aligned: bool) -> Tensor:
    """Sum over the last dimension's entries of each unit, ``(..., size)`` to ``(..., width)``; unit -1 is nobody's."""
    if aligned and values.shape[-1] == width:
        return values
    places = torch.where(units < 0, width, units).to(values.device)
    return values.new_zeros(*values.shape[:-1], width + 1).index_add(-1, places, values)[..., :width]


def _at_least_single(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(device: torch.device | str) -> torch.dtype:
    """Return the widest numbers that a device can add."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
