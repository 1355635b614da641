"""One accumulator for each criterion: what it sums over batches, offline or in a run, and the scores it gives."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.algorithms import criteria
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.expansions import Outputs, last_of, outputs_of
from lightning_prune.measure.gradients import Loss, batch_gradients
from lightning_prune.measure.products import find_products
from lightning_prune.measure.unit_reads import find_reads
from lightning_prune.measure.unit_statistics import (
    MOMENTS,
    UnitMeans,
    contributions_of,
    moments_of,
    over_units,
    taylor_over_units,
    watch_contributions,
)
from lightning_prune.model.calls import tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.consumers import DAMPING, readers_of, score_by_readers
from lightning_prune.structure import ChannelGroup, Slot, Structure, named_tensors

__all__ = [
    "Accumulator", "Curvature", "Expansion", "Moments", "NormScales", "RandomScores", "Compensation",
    "TaylorOfActivations", "TaylorOfWeights", "Weights", "by_l2", "by_mean",
]  # fmt: skip

Scores = dict[str, Tensor]


def by_mean(scores: Tensor) -> Tensor:
    """Divide a layer's scores by their mean, so that wide and narrow layers can be compared."""
    mean = scores.abs().mean()
    return scores / mean if mean > 0 else scores


def by_l2(scores: Tensor) -> Tensor:
    """Divide a layer's scores by their l2 norm.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, eq. 10 (arXiv:1611.06440).
    """
    norm = torch.linalg.vector_norm(scores)
    return scores / norm if norm > 0 else scores


class Accumulator:
    """Sums over batches what a criterion looks at, and computes one score per unit of every channel group.

    Subclass it for a criterion of your own and pass the class as ``criterion=``. Offline, :meth:`update` is called with
    each batch. In a run, an accumulator that ``looks_at`` the training gets each training step instead, through
    :meth:`before_backward`, :meth:`after_backward` and :meth:`before_step`; any other is updated with some training
    batches when a pruning step is due. ``means`` are added up over processes, saved in checkpoints and restored.

    Attributes:
        needs: What it is updated with: ``""``, ``"batches"``, or ``"batches and loss"``.
        looks_at: What of the training it sees: ``"gradients"``, ``"activations"``, or ``""`` for nothing.
        calls_forward: Whether, in a run, it gets the inputs of ``forward`` instead of whole training batches.
        adds_up: Whether scores are losses, so that those of several units add up.
        reads_parts: Whether it can look at the training of a model that tensor parallelism splits.
        means: The sums of what was seen since :meth:`watch`.
    """

    needs: str = "batches and loss"
    looks_at: str = ""
    calls_forward: bool = False
    adds_up: bool = False
    reads_parts: bool = False
    model: nn.Module
    structure: Structure
    means: UnitMeans

    @contextmanager
    def watch(self, model: nn.Module, structure: Structure) -> Iterator[None]:
        """Start from nothing, and watch the model, which is not changed, inside the block."""
        self.model, self.structure = model, structure
        device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
        self.means = UnitMeans(self.sums(), device)
        with ExitStack() as hooks:
            self.begin(hooks)
            yield

    def sums(self) -> dict[str, int]:
        """Return what is summed: name -> how many numbers; by default one per unit of every group."""
        return {name: group.width for name, group in self.structure.groups.items()}

    def begin(self, hooks: ExitStack) -> None:
        """Prepare to watch; whatever must be undone afterwards goes into ``hooks``."""

    def update(self, batch: Any, loss: Loss) -> None:
        """Add what one batch shows, in eval mode; by default its forward and backward pass."""

        def watched(model: nn.Module, batch: Any) -> Tensor:
            value = loss(model, batch)
            self.before_backward(value)
            return value

        gradients = batch_gradients(self.model, batch, watched)
        self.after_backward()
        self.before_step(gradients)

    def before_backward(self, value: Any) -> None:
        """Look at the loss of a forward pass before it is differentiated."""

    def after_backward(self, scale: float = 1.0) -> None:
        """Look at the gradients of a backward pass; the loss was multiplied by ``scale``."""

    def before_step(self, gradients: Mapping[str, Tensor | None], elsewhere: Collection[str] = ()) -> None:
        """Look at gradients, by name, before an optimizer's step; those ``elsewhere`` are other optimizers'."""

    def compute(self) -> Scores:
        """Return one score per unit of every group, ``(width,)``; higher is kept longer."""
        return self.means.compute()

    def normalise(self, scores: Tensor) -> Tensor:
        """Make the scores of one group, ``(width,)``, comparable with another's; by default they are."""
        return scores


class _OfWeights(Accumulator):
    """Base of what scores weights as they are; sums nothing."""

    needs = ""

    @contextmanager
    def watch(self, model: nn.Module, structure: Structure) -> Iterator[None]:
        """Remember the model; there is nothing to watch."""
        self.model, self.structure = model, structure
        yield


class Weights(_OfWeights):
    """Scores units by the filters that make them, summed over the layers of the group.

    Args:
        score: From a weight ``(out, ...)`` to one score per filter ``(out,)``.
    """

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score

    def compute(self) -> Scores:
        """Score the weights as they are."""
        own = named_tensors(self.model)
        scores: Scores = {}
        for group in self.structure.groups.values():
            for slot in [slot for slot in group.slots if slot.role == "producer"] or group.slots:
                _add(scores, group, slot, self.score, own[slot.tensor].detach().transpose(0, slot.dim))
        return scores

    def normalise(self, scores: Tensor) -> Tensor:
        """Divide by the mean."""
        return by_mean(scores)


class NormScales(_OfWeights):
    """Scores units by the scales of the normalisations behind them, summed over the layers of the group."""

    def compute(self) -> Scores:
        """Score the scales as they are."""
        own = named_tensors(self.model)
        known = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm
        norms = {
            f"{path}.weight"
            for path, module in self.model.named_modules()
            if isinstance(module, known) or type(module).__name__.endswith("Norm")
        }
        scores: Scores = {}
        for name, group in self.structure.groups.items():
            for slot in group.slots:
                if slot.tensor in norms and own[slot.tensor].dim() == 1:
                    _add(scores, group, slot, criteria.batch_norm_scale, own[slot.tensor])
            if name not in scores:
                raise PruningError(
                    f"bn_scale: {name} has no normalisation with a scale. Name it in ignore=, or use another criterion."
                )
        return scores


class RandomScores(Accumulator):
    """Draws scores: the same for one seed, and leaving the global generator alone."""

    needs = ""

    def compute(self) -> Scores:
        """Draw one number per unit."""
        scores: Scores = {}
        for name, group in self.structure.groups.items():
            generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
            scores[name] = torch.rand(group.width, generator=generator, dtype=torch.float32)
        return scores


class Moments(Accumulator):
    """Averages activations, their squares and how many are zero.

    Args:
        score: From ``total``, ``squares``, ``zeros`` and ``count``, each ``(width,)``, to scores.
    """

    needs = "batches"
    looks_at = "activations"

    def __init__(self, score: Callable[..., Tensor]) -> None:
        self.score = score

    def sums(self) -> dict[str, int]:
        """Return three numbers per unit."""
        return {f"{name}/{what}": group.width for name, group in self.structure.groups.items() for what in MOMENTS}

    def begin(self, hooks: ExitStack) -> None:
        """Find the operators that read units."""
        self.reads = find_reads(self.model, self.structure)

    def update(self, batch: Any, loss: Loss) -> None:
        """Add the activations of one batch."""
        self.before_backward(loss(self.model, batch))

    def before_backward(self, value: Any) -> None:
        """Add the activations of a forward pass, which its graph holds."""
        found, unseen = self.reads.seen_from(tensors_in(value))
        hidden = set(unseen.hidden)
        seen = [operator for operator in found if operator.readable]
        for operator in found:
            hidden |= {place.group for place in operator.read.places if not operator.readable}
        totals: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for name, moments in moments_of(seen).items():
            for what in MOMENTS:
                totals[f"{name}/{what}"] = moments[what]
                counts[f"{name}/{what}"] = moments["count"][0]
        self.means.update(totals, counts)
        noted = {"hidden": hidden, "veiled": unseen.veiled, "absent": unseen.absent if seen else ()}
        for how, groups in noted.items():
            self.means.note(how, [f"{name}/{what}" for name in groups for what in MOMENTS])

    def compute(self) -> Scores:
        """Return what the criterion makes of the means."""
        found = self.means.compute()
        scores: Scores = {}
        for name in self.structure.groups:
            means = {what: found[f"{name}/{what}"] for what in MOMENTS}
            scores[name] = self.score(**means, count=torch.ones_like(means["total"]))
        return scores

    def normalise(self, scores: Tensor) -> Tensor:
        """Divide by the l2 norm."""
        return by_l2(scores)


class TaylorOfWeights(Accumulator):
    """Expands the loss in the weights that read a unit, squared (Molchanov et al. 2019)."""

    looks_at = "gradients"
    adds_up = True
    reads_parts = True

    def before_step(self, gradients: Mapping[str, Tensor | None], elsewhere: Collection[str] = ()) -> None:
        """Add what gradients say; without any, a group that could have them is worth nothing to this loss."""
        parameters = dict(self.model.named_parameters())  # FSDP2 makes them other objects
        found = taylor_over_units(self.structure, parameters, gradients, elsewhere)
        self.means.update(found)
        missing = [group for name, group in self.structure.groups.items() if name not in found]
        if found and missing:
            trained = {name for name in gradients if parameters[name].requires_grad}
            absent, frozen = [], []
            for group in missing:
                own = {slot.tensor for slot in group.slots}
                if not any(parameters[name].requires_grad for name in own & parameters.keys()):
                    frozen.append(group.name)
                elif own & trained and not own.intersection(elsewhere):
                    absent.append(group.name)
            self.means.note("absent", absent)
            self.means.note("veiled", frozen)


class TaylorOfActivations(Accumulator):
    """Expands each example's loss in the activations, in absolute value (Molchanov et al. 2016)."""

    looks_at = "gradients"

    def begin(self, hooks: ExitStack) -> None:
        """Find the operators that read units."""
        self.contributions = hooks.enter_context(watch_contributions(self.model, self.structure))

    def before_backward(self, value: Any) -> None:
        """Watch the backward pass from this loss."""
        hidden, veiled, absent = self.contributions.attach(value)
        self.means.note("hidden", hidden)
        self.means.note("veiled", veiled)
        if len(absent) < len(self.structure.groups):
            self.means.note("absent", absent)

    def after_backward(self, scale: float = 1.0) -> None:
        """Add what each example contributes: its own loss, which a mean divides by the number of examples."""
        for name, seen in contributions_of(self.contributions.found).items():
            for rows in seen:
                self.means.update({name: rows.abs().sum(dim=0) * (len(rows) / scale)}, count=len(rows))
        self.contributions.detach()

    def normalise(self, scores: Tensor) -> Tensor:
        """Divide by the l2 norm."""
        return by_l2(scores)


class Curvature(Accumulator):
    """Sums half of the curvature times the squared weight over all that leaves with a unit (LeCun et al. 1989).

    Args:
        samples: From model, batch and loss to estimates of the diagonal of the Hessian, by name of parameter.
    """

    adds_up = True

    def __init__(self, samples: Callable[[nn.Module, Any, Loss], Iterator[Mapping[str, Tensor]]]) -> None:
        self.samples = samples

    def update(self, batch: Any, loss: Loss) -> None:
        """Add the estimates of one batch."""
        parameters = dict(self.model.named_parameters())
        for diagonal in self.samples(self.model, batch, loss):
            with torch.no_grad():
                saliencies = {name: criteria.obd(parameters[name], h) for name, h in diagonal.items()}
                absent = []
                found: Scores = {}
                for name, group in self.structure.groups.items():
                    total = over_units(group.slots, group.width, saliencies)
                    if total is not None:
                        found[name] = total
                    else:
                        absent.append(name)
            self.means.update(found)
            self.means.note("absent", absent)


class Expansion(Accumulator):
    """Expands the outputs, or the loss in the outputs, in every unit, example by example.

    Args:
        change: From a batch's outputs and loss to the change without each unit, ``(N, width)`` for each group.
        needs: What it is updated with.
    """

    adds_up = True

    def __init__(self, change: Callable[[Outputs, Any], Mapping[str, Tensor]], needs: str = "batches and loss") -> None:
        self.change = change
        self.needs = needs

    def begin(self, hooks: ExitStack) -> None:
        """Watch what the model returns, and find the operators that read units."""
        self.contributions = hooks.enter_context(watch_contributions(self.model, self.structure))
        self.outputs = hooks.enter_context(outputs_of(self.model))

    def update(self, batch: Any, loss: Loss) -> None:
        """Add the changes of one batch."""
        self.outputs.clear()
        value = loss(self.model, batch)
        weights = [parameter for parameter in self.model.parameters() if parameter.is_floating_point()]
        outputs = Outputs(last_of(self.outputs), weights, self.contributions)
        hidden, veiled, absent = self.contributions.attach(outputs.tensors)
        for name, rows in self.change(outputs, value).items():
            self.means.update({name: rows.sum(dim=0)}, count=len(rows))
        self.means.note("hidden", hidden)
        self.means.note("veiled", veiled)
        self.means.note("absent", absent)
        self.contributions.detach()

    def compute(self) -> Scores:
        """Return the absolute change of the mean."""
        return {name: mean.abs() for name, mean in self.means.compute().items()}


class Compensation(Accumulator):
    """Asks the layers that read a unit how well they can compensate for it (Hassibi and Stork 1992)."""

    needs = "batches"
    calls_forward = True
    adds_up = True

    def begin(self, hooks: ExitStack) -> None:
        """Hold no batch yet."""
        self.batches: list[Any] = []
        self.loss: Loss | None = None

    def update(self, batch: Any, loss: Loss) -> None:
        """Hold on to a batch."""
        self.batches.append(batch)
        self.loss = loss

    def compute(self) -> Scores:
        """Score by the batches of all processes."""
        calibration = Calibration(self.batches, self._forward, over_processes=_summed)
        products = find_products(self.model, self.batches[0], self._forward)
        for name, group in self.structure.groups.items():
            if not readers_of(self.model, group, products):
                raise PruningError(
                    f"obs: {name} is read by no layer that could make up for its channels. Name ignore=[{name!r}], or "
                    "use another criterion."
                )
        scores = score_by_readers(self.model, self.structure, products, calibration, DAMPING)
        return {name: _finite(score) for name, score in scores.items()}

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        """Return what the model returns, whatever the loss makes of it."""
        assert self.loss is not None  # a batch came with it
        with outputs_of(model) as seen:
            value = self.loss(model, batch)
        return tuple(seen) or value


def _finite(scores: Tensor) -> Tensor:
    """Score the unit kept to the last, which nothing can compensate, at twice the highest score of the others."""
    most = torch.where(scores.isfinite(), scores, 0.0).max()
    return torch.where(scores.isfinite(), scores, 2 * most)


def _summed(total: Tensor) -> Tensor:
    """Add up over processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def _add(scores: Scores, group: ChannelGroup, slot: Slot, score: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    found = score(weight)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"criterion: for {slot.tensor}, it gave {type(found).__name__}; it must give a tensor, one score per "
            "filter."
        )
    if found.shape != weight.shape[:1]:
        raise ValueError(
            f"criterion: for {slot.tensor}, {tuple(weight.shape)}, it gave scores of shape {tuple(found.shape)}; "
            f"it must give one per filter, ({len(weight)},)."
        )
    if group.name not in scores:
        scores[group.name] = torch.zeros(group.width, dtype=found.dtype, device=found.device)
    own = scores[group.name]
    if slot.aligned:
        own += found.to(own)
        return
    inside = slot.units >= 0
    found = found[torch.from_numpy(inside).to(found.device)]
    own.index_add_(0, torch.from_numpy(slot.units[inside]).to(own.device), found.to(own))
