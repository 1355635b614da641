"""Prunes a small net weight by weight by the Hessian of all its weights together; knows no Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.selection import number_to_prune
from lightning_prune.algorithms.solvers.brain_surgeon import Step, damage, inverse_of_outer_products, magnitude, surgeon
from lightning_prune.measure.curvature import OutputLoss, outer_product_rows
from lightning_prune.measure.footprint import Part
from lightning_prune.model.devices import widened
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import counted
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.model.torch_modes import changes_model, ordinary
from lightning_prune.pruning.amounts import check_amount, check_single, fraction_of
from lightning_prune.pruning.arguments import (
    Parameters,
    Parts,
    check_choice,
    check_ignored,
    check_module,
    listed,
    names_module,
    part_of,
)
from lightning_prune.pruning.left_alone import left_alone, weights_left_alone
from lightning_prune.pruning.report_types import WeightReport
from lightning_prune.pruning.weights import count_unmasked, weight_report
from lightning_prune.surgery.masks import apply_masks_, masks_on

__all__ = ["Removal", "Removals", "prune_exact"]

Method = Literal["obs", "obd", "magnitude"]
_MOST = 20_000  # weights: an inverse Hessian of 3 GB


class Removal(NamedTuple):
    """One weight that left: where it was, what the loss was predicted to rise by, and the loss afterwards."""

    parameter: str
    entry: int
    predicted: float
    loss: float


class Removals(NamedTuple):
    """What was removed one by one, the loss before the first, and why no more was removed."""

    removals: tuple[Removal, ...]
    loss_before: float
    stopped: str


@changes_model
def prune_exact(
    model: nn.Module,
    amount: float = 1.0,
    *,
    batches: Iterable[tuple[Any, Tensor]],
    loss: OutputLoss,
    module: Parts = None,
    ignore: Parameters = (),
    max_loss: float = float("inf"),
    max_rise: float = float("inf"),
    method: Method = "obs",
    alpha: float = 1e-4,
    masks: dict[str, Tensor] | None = None,
    accept: Callable[[nn.Module], bool] | None = None,
    progress: bool = True,
) -> WeightReport:
    """Remove weights and biases of a small, trained net one at a time, in place, until one of the limits is met.

    Before every removal the Hessian is found anew, in its outer-product form. With ``method="obs"`` all other weights
    move to compensate for the one that leaves.

    Args:
        model: The model. Some thousand parameters at most.
        amount: Fraction, in [0, 1], of the weights that are set to zero, relative to the dense model; or a whole number
            of them: 1.0 is all weights, 1 is one. Those that ``masks`` hide count.
        batches: Batches of data, a list or loader that can be read once. Inputs and targets of the training set.
        loss: A function of outputs and targets that returns the mean loss, such as ``F.mse_loss`` or
            ``F.cross_entropy``.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        max_loss: Stop before the loss on the batches, measured, comes above this.
        max_rise: Stop before a removal of which a larger rise of the loss is predicted.
        method: ``"obs"``; ``"obd"``, which looks at the Hessian's diagonal and moves nothing; or ``"magnitude"``.
        alpha: What the Hessian's diagonal starts from.
        masks: True for each weight that had not left before, by parameter name, beside masks that the model carries.
        accept: Tells of the model after a removal whether it is still good enough; if not, the removal is undone. If it
            raises, the model is as it was.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range.
        PruningError: If the net is too large for this, nothing can be removed, or the loss is not finite.

    Examples:
        >>> model, x = nn.Linear(3, 1, bias=False), torch.eye(3)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0, 2.0]]))
        >>> report = prune_exact(
        ...     model, 0.66, batches=[(x, x @ model.weight.detach().T)], loss=nn.functional.mse_loss, progress=False
        ... )
        >>> [removal.entry for removal in report.details.removals], report.params_after
        ([1, 2], 1)

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NIPS 1992; LeCun, Denker
        and Solla, Optimal Brain Damage, NIPS 1989.
    """
    _check(amount, method, alpha)
    check_module("prune_exact", module)
    batches = list(ordinary(batches))
    alone = left_alone(model, listed(module))
    patient = _Patient.of(model, [*ignore, *alone], part_of(model, module), masks)
    amount = fraction_of(amount, patient.left.numel(), "weights")
    least = patient.left.numel() - number_to_prune(amount, patient.left.numel())
    removals: list[Removal] = []
    at_first = patient.values()
    before = current = _measured(model, batches, loss)
    if not math.isfinite(before):
        raise PruningError(f"prune_exact: the loss on the batches is {before}. Pass a trained model and finite data.")
    stopped = "amount reached"
    try:
        with counted("weights", max(0, int(patient.left.sum()) - least), progress) as advance:
            while int(patient.left.sum()) > least:
                step = _STEPS[method](patient, batches, loss, alpha)
                if step.rise > max_rise:
                    stopped = f"the next removal would raise the loss by {step.rise:.3g}, predicted"
                    break
                undo = patient.values()
                at = patient.take(step)
                current = _measured(model, batches, loss)
                refused = "" if current <= max_loss else f"the next removal would take the loss to {current:.3g}"
                if not refused and accept is not None and not accept(model):
                    refused = "accept refused the next removal"
                if refused:
                    patient.put_back(at, undo)
                    stopped = refused
                    break
                removals.append(Removal(*patient.place(at), step.rise, current))
                advance(f"(loss {current:.3g})")
    except BaseException:  # of accept, or Ctrl-C
        patient.write(at_first)
        raise
    unmasked = count_unmasked(model)
    apply_masks_(model, patient.masks())
    details = Removals(tuple(removals), before, stopped)
    return weight_report(model, unmasked, patient.masks(), weights_left_alone(model, alone), amount, details)


@dataclass(eq=False)
class _Patient:
    """The parameters of a net as one vector."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    left: Tensor

    @classmethod
    def of(cls, model: nn.Module, given: Parameters, part: Part, masks: dict[str, Tensor] | None) -> _Patient:
        ignore = check_ignored(model, given)
        parameters = {}
        for name, parameter in model.named_parameters():
            ignored = any(names_module(p, name) or names_module(p, name.rpartition(".")[0]) for p in ignore)
            if part.holds(name) and not ignored:
                parameters[name] = parameter
        count = sum(parameter.numel() for parameter in parameters.values())
        if not 0 < count <= _MOST:
            raise PruningError(
                f"prune_exact: {count:,} weights; from 1 to {_MOST:,} have a Hessian that fits into memory. "
                "Use prune_obs for larger nets."
            )
        left = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in parameters.items()}
        for earlier in (masks or {}, masks_on(model)):
            for name in left.keys() & earlier.keys():
                left[name] = left[name] & earlier[name].to(left[name].device)
        return cls(model, parameters, torch.cat([stays.flatten() for stays in left.values()]))

    def values(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters.values()])

    def take(self, step: Step) -> int:
        """Write what a step over the weights that are left came to, and return the place of the one that left."""
        at = int(self.left.nonzero()[step.which])
        values = self.values()
        self.write(values.index_put((self.left,), step.weights.to(values.dtype)))
        self.left[at] = False
        return at

    def put_back(self, at: int, values: Tensor) -> None:
        self.write(values)
        self.left[at] = True

    def place(self, at: int) -> tuple[str, int]:
        """Return the parameter, and the place within it, of an entry of the vector."""
        for name, parameter in self.parameters.items():
            if at < parameter.numel():
                return name, at
            at -= parameter.numel()
        raise IndexError(at)

    def masks(self) -> dict[str, Tensor]:
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        parts = zip(self.parameters.items(), self.left.split(sizes), strict=True)
        return {name: part.view_as(parameter).clone() for (name, parameter), part in parts}

    def write(self, values: Tensor) -> None:
        """Write these values into the parameters."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        with torch.no_grad():
            for parameter, part in zip(self.parameters.values(), values.split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))


def _by_surgeon(patient: _Patient, batches: list[Any], loss: OutputLoss, alpha: float) -> Step:
    rows, examples = _rows(patient, batches, loss)
    return surgeon(widened(patient.values()[patient.left]), inverse_of_outer_products(rows, examples, alpha))


def _by_damage(patient: _Patient, batches: list[Any], loss: OutputLoss, alpha: float) -> Step:
    rows, examples = _rows(patient, batches, loss)
    return damage(widened(patient.values()[patient.left]), alpha + rows.square().sum(dim=0) / examples)


def _by_magnitude(patient: _Patient, batches: list[Any], loss: OutputLoss, alpha: float) -> Step:
    del batches, loss, alpha  # magnitudes look at no data
    return magnitude(patient.values()[patient.left])


_STEPS: dict[str, Callable[[_Patient, list[Any], OutputLoss, float], Step]] = {
    "obs": _by_surgeon,
    "obd": _by_damage,
    "magnitude": _by_magnitude,
}


def _rows(patient: _Patient, batches: list[Any], loss: OutputLoss) -> tuple[Tensor, int]:
    rows, examples = outer_product_rows(patient.model, batches, loss, list(patient.parameters))
    return widened(rows[:, patient.left]), examples


def _measured(model: nn.Module, batches: list[Any], loss: OutputLoss) -> float:
    total = examples = 0.0
    with undisturbed(model):
        for batch in batches:
            inputs, targets = batch
            with unchanged(batch):
                total += float(loss(model(inputs), targets)) * len(inputs)
            examples += len(inputs)
    return total / max(examples, 1)


def _check(amount: float, method: str, alpha: float) -> None:
    check_single("prune_exact", amount)
    check_amount("prune_exact", amount, most="1]")
    check_choice("prune_exact", "method", method, get_args(Method))
    if not alpha > 0:
        raise ValueError(f"prune_exact(alpha={alpha!r}): the Hessian starts at alpha times the identity; above 0.")
