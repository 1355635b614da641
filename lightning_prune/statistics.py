"""Gathers what criteria need over batches and ranks: gradients, activations, curvature; hooks live in ``with``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_prune.criteria import taylor_activations
from lightning_prune.errors import PruningError
from lightning_prune.inputs import tensors_in, undisturbed
from lightning_prune.structure import ChannelGroup, Structure

__all__ = [
    "Loss",
    "UnitMeans",
    "batch_gradients",
    "empirical_fisher",
    "hutchinson",
    "over_units",
    "taylor_over_units",
    "watch_contributions",
    "watch_moments",
]

Loss = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the mean loss over the batch, a single number."""


class UnitMeans(Metric):
    """Mean over batches and ranks of one number per unit of every channel group."""

    full_state_update = False

    def __init__(self, widths: Mapping[str, int]) -> None:
        """Start from nothing.

        Args:
            widths: Group name -> number of units.
        """
        super().__init__()
        self.names = list(widths)
        for i, width in enumerate(widths.values()):
            self.add_state(f"total_{i}", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"count_{i}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, totals: Mapping[str, Tensor], count: float = 1) -> None:
        """Add sums over ``count`` examples or batches, ``(width,)`` for each group seen."""
        for i, name in enumerate(self.names):
            if name in totals:
                getattr(self, f"total_{i}").add_(totals[name].nan_to_num(0.0, 0.0, 0.0))  # a scaled loss may overflow
                getattr(self, f"count_{i}").add_(count)

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
                    f"{name}: nothing was gathered for its channels, because no gradient or activation of it was seen. "
                    "If its layers are frozen, unfreeze them or name them in ignore=."
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
            name: [getattr(self, f"total_{i}").cpu(), float(getattr(self, f"count_{i}"))] for i, name in enumerate(self.names)
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


def over_units(group: ChannelGroup, values: Mapping[str, Tensor]) -> Tensor | None:
    """Sum values of weights over each unit's own: those that make it and follow it, not those that sum over it.

    Args:
        group: The channel group.
        values: By name of parameter, one value per weight. Parameters left out do not count.

    Returns:
        One sum per unit, ``(width,)``, or None where no parameter of the group has values.
    """
    total: Tensor | None = None
    for slot in group.slots:
        value = values.get(slot.tensor)
        if value is None or slot.role == "consumer":
            continue
        rows = value.sum(dim=[d for d in range(value.dim()) if d != slot.dim]) if value.dim() > 1 else value
        if total is None:
            total = rows.new_zeros(group.width)
        if slot.aligned and len(slot.units) == group.width:
            total = total + rows
        else:
            units = torch.from_numpy(slot.units).to(rows.device)
            total = total.index_add(0, units[units >= 0], rows[units >= 0])
    return total


def taylor_over_units(
    structure: Structure, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return, for each group that has gradients, the square of each unit's expansion of the loss, ``(width,)``.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, eq. 8 (arXiv:1906.10771).
    """
    found = {}
    with torch.no_grad():
        for name, group in structure.groups.items():
            products = {
                slot.tensor: parameters[slot.tensor] * gradient
                for slot in group.slots
                if slot.role != "consumer" and (gradient := gradients.get(slot.tensor)) is not None
            }
            total = over_units(group, products)
            if total is not None:
                found[name] = total.square()
    return found


@contextmanager
def watch_contributions(model: nn.Module, structure: Structure) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Gather, during backward passes inside the block, what each unit's feature map contributes to each example's loss.

    A unit's feature map is what the modules that sum over it receive; the contributions of all of them add up, since all
    would lose it. Nothing is gathered without gradients, so that validation and traces pass unseen.

    Yields:
        (group name, number of examples) -> signed contributions, ``(N, width)``. Clear it between two passes.

    Raises:
        PruningError: If no module that can be watched sums over a group's channels.
    """
    found: dict[tuple[str, int], Tensor] = {}

    def add(place: _Place, activations: Tensor, gradients: Tensor) -> None:
        contributions = taylor_activations(place.channels_second(activations), place.channels_second(gradients))
        rows = place.over_units(contributions)
        key = place.group, len(rows)
        found[key] = found[key] + rows if key in found else rows

    def enter(place: _Place, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return None
        seen = args[0].view_as(args[0])  # its gradient is the one through this module alone
        seen.register_hook(partial(add, place, args[0].detach()))
        return (seen, *args[1:])

    with ExitStack() as stack:
        for place in _places(model, structure):
            handle = model.get_submodule(place.module).register_forward_pre_hook(partial(enter, place))
            stack.callback(handle.remove)
        yield found


@contextmanager
def watch_moments(model: nn.Module, structure: Structure) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Sum, during forward passes inside the block, every unit's activations, their squares and how many are zero.

    Yields:
        Group name -> ``total``, ``squares``, ``zeros`` and ``count``, each ``(width,)``.
    """
    found: dict[str, dict[str, Tensor]] = {}

    def enter(place: _Place, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = place.channels_second(args[0].detach()).flatten(2) if args[0].dim() > 2 else args[0].detach()[..., None]
        moments = {"total": x, "squares": x.square(), "zeros": (x == 0).to(x), "count": torch.ones_like(x)}
        sums = {name: place.over_units(value.sum(dim=(0, 2))[None])[0].double() for name, value in moments.items()}
        before = found.get(place.group, {})
        found[place.group] = {name: before[name] + value if before else value for name, value in sums.items()}

    with ExitStack() as stack:
        seen: set[str] = set()
        for place in _places(model, structure):
            if place.group not in seen:
                seen.add(place.group)
                handle = model.get_submodule(place.module).register_forward_pre_hook(partial(enter, place))
                stack.callback(handle.remove)
        yield found


def batch_gradients(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor | None]:
    """Return the gradient of the loss of one batch for every parameter, frozen or not; ``.grad`` is not touched."""
    parameters = dict(model.named_parameters())
    with _differentiable(parameters.values()):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def empirical_fisher(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Approximate the Hessian's diagonal by the mean over examples of their squared gradients, example by example.

    Returns:
        Parameter name -> diagonal, of the parameter's shape.

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992, sec. 4: the outer-product form.
    """
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    examples = 0
    with undisturbed(model), torch.enable_grad():
        for batch in batches:
            for example in _examples(batch):
                examples += 1
                for name, gradient in batch_gradients(model, example, loss).items():
                    if gradient is not None:
                        total[name] += gradient.square()
    return {name: value / max(examples, 1) for name, value in total.items()}


def hutchinson(model: nn.Module, batches: Iterable[Any], loss: Loss, probes: int = 4) -> dict[str, Tensor]:
    r"""Estimate the Hessian's diagonal by :math:`E[v \odot H v]` with random signs :math:`v`.

    Args:
        model: The model.
        batches: Batches of data.
        loss: From model and batch to the mean loss.
        probes: Random vectors per batch.

    Returns:
        Parameter name -> diagonal, of the parameter's shape. Unbiased; single entries may be negative.

    References:
        Hutchinson, 1990; Bekas, Kokiopoulou and Saad, An Estimator for the Diagonal of a Matrix, 2007.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    drawn = 0
    with undisturbed(model), torch.enable_grad(), _differentiable(parameters.values()):
        for batch in batches:
            own = list(parameters.values())
            first = torch.autograd.grad(loss(model, batch), own, create_graph=True, allow_unused=True)
            used = [
                (name, p, g)
                for name, p, g in zip(parameters, own, first, strict=True)
                if g is not None and g.requires_grad
            ]
            for probe in range(probes):
                signs = [torch.randint_like(p, 2) * 2 - 1 for _, p, _ in used]
                second = torch.autograd.grad(
                    [g for _, _, g in used],
                    [p for _, p, _ in used],
                    signs,
                    retain_graph=probe < probes - 1,
                    allow_unused=True,
                )
                drawn += 1
                for (name, _, _), sign, product in zip(used, signs, second, strict=True):
                    if product is not None:
                        total[name] += sign * product
    return {name: value / max(drawn, 1) for name, value in total.items()}


@dataclass(frozen=True, eq=False)
class _Place:
    """A module that sums over a group's channels, and which unit each of its input channels belongs to."""

    module: str
    group: str
    width: int
    last: bool  # whether channels are the input's last dimension
    units: Tensor
    aligned: bool

    def channels_second(self, x: Tensor) -> Tensor:
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        x = x[None] if x.dim() == 1 else x
        return x.movedim(-1, 1) if self.last else x

    def over_units(self, values: Tensor) -> Tensor:
        """Sum ``(N, channels)`` over the channels of each unit: ``(N, width)``."""
        if self.aligned:
            return values
        units = self.units.to(values.device)
        return values.new_zeros(len(values), self.width).index_add(1, units[units >= 0], values[:, units >= 0])


def _places(model: nn.Module, structure: Structure) -> list[_Place]:
    modules = dict(model.named_modules())
    places = []
    for name, group in structure.groups.items():
        own = []
        for slot in group.slots:
            path, _, leaf = slot.tensor.rpartition(".")
            module = modules.get(path)
            if (
                slot.role != "consumer"
                or leaf != "weight"
                or not isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            ):
                continue
            units = torch.from_numpy(slot.units)
            if isinstance(module, nn.modules.conv._ConvNd) and slot.dim == 1 and not module.transposed:
                units = units.repeat(module.groups)
            aligned = slot.aligned and len(units) == group.width
            own.append(_Place(path, name, group.width, isinstance(module, nn.Linear), units, aligned))
        if not own:
            raise PruningError(
                f"{name}: no convolution or linear module sums over its channels, so their activations cannot be watched. "
                "Name it in ignore=, or use a criterion of weights."
            )
        places += own
    return places


@contextmanager
def _differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _examples(batch: Any) -> Iterator[Any]:
    sizes = {tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()}
    if len(sizes) != 1:
        raise PruningError(
            f"One example at a time is asked for, but the batch's tensors hold {sorted(sizes)} entries. "
            "Pass batches whose tensors agree in their first dimension."
        )
    for i in range(sizes.pop()):
        yield pytree.tree_map_only(Tensor, lambda tensor, i=i: tensor[i : i + 1] if tensor.dim() else tensor, batch)
