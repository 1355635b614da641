"""Has the weights of a layer share few values, chosen by k-means; knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.algorithms.k_means import share_values
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import is_sharded
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.pruning.arguments import Parameters, Parts, by_path, check_list, check_module, listed, part_of
from lightning_prune.pruning.find_weights import amount_by_weight, find_weights
from lightning_prune.pruning.left_alone import left_alone
from lightning_prune.surgery.masks import carried_masks
from lightning_prune.surgery.shared_values import forget_

__all__ = ["SharedWeight", "SharingReport", "check_sharing", "share_weights"]

_MOST_BITS = 8


class SharedWeight(NamedTuple):
    """A weight that shares values.

    Attributes:
        name: Its name.
        entries: How many entries survive pruning.
        values: How many values these share.
        change: Root mean square of what sharing changed of an entry, relative to that of the entries.
    """

    name: str
    entries: int
    values: int
    change: float


class SharingReport(NamedTuple):
    """What shares values.

    Attributes:
        weights: Every weight that shares values.
        codes: Name of a weight -> the code of each entry, of its shape; 0 for pruned entries.
    """

    weights: tuple[SharedWeight, ...]
    codes: dict[str, Tensor]


@changes_model
def share_weights(
    model: nn.Module,
    bits: int | Mapping[str, int] = 5,
    *,
    module: Parts = None,
    ignore: Parameters = (),
    parameters: Parameters | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> SharingReport:
    """Set the weights of each layer to at most ``2 ** bits`` values, in place; pruned weights stay zero.

    The values are the centres of k-means, from a start that is spread evenly over the layer's range, so equal weights
    give equal values on every machine. :func:`~lightning_prune.save_sparse` stores shared weights as codes and one
    codebook for each layer. :func:`~lightning_prune.surgery.shared_values.hold_shared` trains the values.

    Args:
        model: The model, dense or pruned by any method. Where a weight has a mask its kept entries share values, else
            those that are not zero.
        bits: Bits of a code, from 1 to 8; or bits by pattern of paths of modules or parameters, or by module. What no
            pattern names is left as it is.
        module: Path of a module, or the module, or a list of them: only weights in this part of the model are shared.
        ignore: Patterns of paths of modules or parameters, or modules, whose weights are left as they are.
        parameters: Patterns of paths of modules or parameters, or modules, whose weights share values; by default the
            weights of all linear and convolutional layers.
        optimizer: The optimizer or optimizers that train the model; they start anew with shared weights.

    Raises:
        ValueError: If an argument is out of range, or a pattern names nothing.
        TypeError: If an argument is of a wrong kind.
        PruningError: If there is no such weight, or a weight is not finite, not dense or split over processes. The
            model is as it was.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> report = share_weights(model, bits=2)
        >>> report.weights[0].entries, len(model.weight.unique())
        (1000, 4)

    References:
        Han, Mao, Dally, Deep Compression, ICLR 2016 (arXiv:1510.00149).
    """
    check_sharing("share_weights", bits, parameters, ignore)
    check_module("share_weights", module)
    by_name = by_path(model, bits, "bits") if isinstance(bits, Mapping) else {}
    named = [*by_name, *(parameters or ()), *listed(module)]
    ignore = [*ignore, *left_alone(model, named)]
    chosen = list(by_name) if by_name else parameters
    found = find_weights(model, chosen, ignore, "bits" if by_name else "parameters", part_of(model, module)).found
    bits_of = amount_by_weight(found, by_name) if isinstance(bits, Mapping) else dict.fromkeys(found, bits)
    weights = {name: found[name].parameter for name in bits_of}
    for name, weight in weights.items():
        _refuse_unshareable(name, weight)

    # All codebooks are chosen before the first weight is written to.
    masks, codes, values = carried_masks(model), {}, {}
    for name, weight in weights.items():
        kept = _kept(weight, masks.get(name))
        values[name], own = share_values(weight.detach()[kept], 2 ** int(bits_of[name]))
        codes[name] = torch.zeros(weight.shape, dtype=torch.int16)
        codes[name][kept.cpu()] = (own + 1).to(torch.int16)

    shared = []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    for name, weight in weights.items():
        written = torch.cat([values[name].new_zeros(1), values[name]])[codes[name].long()].to(weight.device)
        shared.append(_compared(name, weight.detach(), written, codes[name], len(values[name])))
        with torch.no_grad():
            weight.copy_(written)
        forget_(optimizers, weight)
    return SharingReport(tuple(shared), codes)


def check_sharing(where: str, bits: int | Mapping[str, int], parameters: Parameters | None, ignore: Parameters) -> None:
    """Refuse arguments that no model could make sense of.

    Raises:
        ValueError: If ``bits`` is out of range, or contradicts ``parameters``.
        TypeError: If an argument is of a wrong kind.
    """
    given: list[Any] = list(bits.values()) if isinstance(bits, Mapping) else [bits]
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int) or not 1 <= one <= _MOST_BITS:
            raise ValueError(f"{where}(bits={bits!r}): a code has from 1 to {_MOST_BITS} bits. Write 5 for 32 values.")
    if not given:
        raise ValueError(f"{where}(bits={bits!r}): no weight is named.")
    for name, patterns in (("parameters", parameters), ("ignore", ignore)):
        check_list(where, name, patterns)
    if isinstance(bits, Mapping) and parameters is not None:
        raise ValueError(f"{where}(parameters={parameters!r}): bits by pattern name the parameters. Leave it out.")


def _refuse_unshareable(name: str, weight: nn.Parameter) -> None:
    """Refuse weights that cannot share values.

    Raises:
        PruningError: Saying why.
    """
    if weight.is_meta or weight.layout != torch.strided or not weight.is_floating_point() or weight.itemsize == 1:
        raise PruningError(
            f"share_weights: {name} is a tensor of {weight.dtype}, {weight.layout}, on {weight.device}: only dense "
            "weights of 16 bits or more can share values. Share them before weights are converted."
        )
    if is_sharded(weight):
        raise PruningError(f"share_weights: {name} is split over processes. Share values after training, of the whole.")
    if not weight.isfinite().all():
        raise PruningError(f"share_weights: {name} holds NaN or infinity. Load weights that are finite.")


def _kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return which entries survive pruning: what the mask keeps, or, without one, what is not zero."""
    return weight.detach() != 0 if mask is None else mask.to(weight.device).expand(weight.shape)


def _compared(name: str, before: Tensor, after: Tensor, codes: Tensor, values: int) -> SharedWeight:
    """Return how much sharing changed a weight."""
    was, now = before.cpu().double(), after.cpu().double()  # not every device has float64
    moved, size = float((now - was).norm()), float(was.norm())
    return SharedWeight(name, int(codes.count_nonzero()), values, moved / size if size else 0.0)
