"""Prunes the weights of a trained model at once by the block-wise empirical Fisher matrix; knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.algorithms.selection import number_to_prune
from lightning_prune.algorithms.solvers import Paths, best_on_support, greedy_paths, inverse, keep_along
from lightning_prune.measure.gradients import Loss, example_gradients
from lightning_prune.model.devices import supported
from lightning_prune.model.errors import PruningError
from lightning_prune.model.progress_bars import each
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.model.torch_modes import changes_model, ordinary
from lightning_prune.pruning.amounts import check_amount, check_count, check_single, fraction_of
from lightning_prune.pruning.arguments import (
    Parameters,
    Parts,
    check_damping,
    check_module,
    listed,
    part_of,
)
from lightning_prune.pruning.find_weights import find_weights
from lightning_prune.pruning.left_alone import left_alone, weights_left_alone
from lightning_prune.pruning.obs import write_
from lightning_prune.pruning.report_types import WeightReport
from lightning_prune.pruning.weights import count_unmasked, weight_report
from lightning_prune.surgery.masks import apply_masks_, masks_on

__all__ = ["FisherFit", "block_fisher", "prune_fisher"]


class FisherFit(NamedTuple):
    """By this matrix, what the loss rises by; and what was added to the matrix's diagonal."""

    predicted: float
    damping: float


class _Part(NamedTuple):
    """Neighbouring weights of one parameter: from ``start`` on, in ``blocks`` of ``size``."""

    name: str
    start: int
    blocks: int
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of a flat tensor, ``(blocks, size)``."""
        return flat[self.start : self.start + self.blocks * self.size].view(self.blocks, self.size)


@changes_model
def prune_fisher(
    model: nn.Module,
    amount: float = 0.5,
    *,
    batches: Iterable[Any],
    loss: Loss,
    module: Parts = None,
    ignore: Parameters = (),
    parameters: Parameters | None = None,
    block: int = 50,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> WeightReport:
    """Set the weights that the loss needs least to zero, in place; their neighbours compensate for them.

    The loss's Hessian is taken to be the mean over examples of the outer products of their gradients, in blocks of
    neighbouring weights. What leaves is compared across all layers, by the rise of the loss itself. What an earlier
    call set to zero stays zero, and counts.

    Args:
        model: The model. Examples run one by one in eval mode.
        amount: Fraction, in [0, 1), of the weights that are set to zero, relative to the dense model; or a whole number
            of them.
        batches: Batches of data, a list or loader that can be read once. With labels; some hundred examples.
        loss: A function of model and batch that returns the mean loss.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers.
        block: How many neighbours compensate for each other.
        damping: Share of its mean diagonal entry that is added to the diagonal of every Hessian.
        dtype: What the matrix is summed and solved in; float32 in place of float64 for a device that has no float64.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is out of range, or a pattern names nothing.
        PruningError: If no batch came or the matrix is singular. The model is as it was.

    Examples:
        >>> model = nn.Linear(8, 2)
        >>> batch = torch.randn(64, 8), torch.randint(2, (64,))
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> report = prune_fisher(model, 0.5, batches=[batch], loss=loss)
        >>> int((model.weight == 0).sum())
        8

    References:
        Singh and Alistarh, WoodFisher, NeurIPS 2020 (arXiv:2004.14340); Kurtic et al., The Optimal BERT Surgeon, EMNLP
        2022 (arXiv:2203.07259).
    """
    check_single("prune_fisher", amount)
    check_amount("prune_fisher", amount)
    check_damping("prune_fisher", damping, "mean diagonal entry")
    check_count("prune_fisher", "block", block, 1, "weights")
    check_module("prune_fisher", module)
    alone = left_alone(model, [*(parameters or ()), *listed(module)])
    found = find_weights(model, parameters, [*ignore, *alone], part=part_of(model, module))
    amount = fraction_of(amount, sum(weight.parameter.numel() for weight in found.found.values()), "weights")
    flat = {name: _wide(weight.parameter.detach().flatten(), dtype) for name, weight in found.found.items()}
    parts = [part for name, values in flat.items() for part in _parts(name, len(values), block)]
    with each(batches, "batches", progress) as seen:
        fisher = block_fisher(model, ordinary(seen), loss, parts, dtype)
    added = _damp_(fisher, damping)
    with each(list(zip(parts, fisher, strict=True)), "weights", progress) as each_part:
        paths = [greedy_paths(part.of(flat[part.name])[:, None], inverse(matrix)) for part, matrix in each_part]
    earlier = masks_on(model)
    alive: dict[str, Tensor] = {}  # where masks hold some of a weight at zero: what stays
    for name in flat.keys() & earlier.keys():
        alive[name] = earlier[name].expand(found.found[name].parameter.shape).flatten()
    gone = sum(len(stays) - int(stays.count_nonzero()) for stays in alive.values())
    size = sum(map(len, flat.values()))
    counts = _leaving(paths, max(gone, number_to_prune(amount, size)))
    keep = {name: torch.ones_like(values, dtype=torch.bool) for name, values in flat.items()}
    predicted = 0.0
    for part, matrix, path, count in zip(parts, fisher, paths, counts, strict=True):
        stays = keep_along(path, count)
        if part.name in alive:
            stays = stays & part.of(alive[part.name]).to(stays.device)
        weights = part.of(flat[part.name])
        new = best_on_support(weights[:, None], matrix, stays[:, None])[:, 0]
        change = (new - weights)[:, None]
        predicted += float(0.5 * ((change @ matrix) * change).sum())
        part.of(keep[part.name]).copy_(stays)
        part.of(flat[part.name]).copy_(new)
    shapes = {name: weight.parameter.shape for name, weight in found.found.items()}
    write_(model, {name: values.view(shapes[name]) for name, values in flat.items()})
    masks = {name: stays.view(shapes[name]) for name, stays in keep.items()}
    before = count_unmasked(model)
    apply_masks_(model, masks)
    stay = {**found.stay, **found.others, **weights_left_alone(model, alone)}
    return weight_report(model, before, masks, stay, amount, FisherFit(predicted, added))


def _damp_(fisher: Sequence[Tensor], damping: float) -> float:
    """Add a share of the mean diagonal entry to every diagonal, in place; return what was added."""
    diagonals = [matrix.diagonal(dim1=1, dim2=2) for matrix in fisher]
    total = sum(float(diagonal.sum()) for diagonal in diagonals)
    added = damping * total / sum(diagonal.numel() for diagonal in diagonals)
    for diagonal in diagonals:
        diagonal.add_(added)
    return added


def _leaving(paths: Sequence[Paths], count: int) -> list[int]:
    """Return how many weights of each part leave: the ``count`` whose removal raises the loss least.

    What is zero already costs nothing, so it leaves first.
    """
    reached = torch.cat([path.rises.cummax(dim=1).values.flatten() for path in paths])
    leaving = torch.zeros_like(reached, dtype=torch.bool)
    leaving[torch.argsort(reached, stable=True)[:count]] = True
    each_part = leaving.split([path.rises.numel() for path in paths])
    return [int(own.sum()) for own in each_part]


def block_fisher(
    model: nn.Module, batches: Iterable[Any], loss: Loss, parts: Sequence[_Part], dtype: torch.dtype
) -> list[Tensor]:
    """Return, for every part, the mean over examples of the gradients' outer products, ``(blocks, size, size)``.

    Raises:
        PruningError: If no batch came.
    """
    parameters = dict(model.named_parameters())
    totals = []
    for part in parts:
        device = parameters[part.name].device
        totals.append(torch.zeros(part.blocks, part.size, part.size, dtype=supported(dtype, device), device=device))
    examples = 0
    with undisturbed(model), torch.enable_grad():
        for batch in batches:
            with unchanged(batch):
                for gradients in example_gradients(model, batch, loss):
                    examples += 1
                    _add_outer_products_(totals, parts, gradients)
    if not examples:
        raise PruningError("prune_fisher: no batch came. Pass a list or loader of at least one batch.")
    return [total / examples for total in totals]


def _add_outer_products_(totals: Sequence[Tensor], parts: Sequence[_Part], gradients: Mapping[str, Tensor]) -> None:
    flat = {name: _wide(gradient.flatten(), totals[0].dtype) for name, gradient in gradients.items()}
    for part, total in zip(parts, totals, strict=True):
        if part.name in flat:
            rows = part.of(flat[part.name])
            total.baddbmm_(rows[:, :, None], rows[:, None])


def _wide(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(supported(dtype, values.device))


def _parts(name: str, length: int, block: int) -> list[_Part]:
    """Part a flat weight into whole blocks and what is left over."""
    whole, rest = divmod(length, block)
    parts = [_Part(name, 0, whole, block), _Part(name, whole * block, 1, rest)]
    return [part for part in parts if part.blocks * part.size]
