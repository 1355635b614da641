"""Finds the outer-product form of a loss's Hessian in all weights of a small net; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from lightning_prune.model.calls import tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import unchanged, undisturbed

__all__ = ["OutputLoss", "outer_product_rows"]

OutputLoss = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets, both batched, to the mean loss, a single number."""


def outer_product_rows(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], loss: OutputLoss, names: Sequence[str]
) -> tuple[Tensor, int]:
    r"""Return rows x with :math:`H \approx \frac{1}{P} \sum_k x_k x_k^T`, the sum over P examples.

    Of every example the outputs' derivatives, times the root of the loss's Hessian in the outputs: for squared errors
    and cross-entropy alike this is the Hessian where the outputs' own curvature does not matter, as near a minimum.

    Args:
        model: The model; it runs in eval mode, example by example.
        batches: Inputs and targets.
        loss: From outputs and targets to the mean loss.
        names: Parameters that make up a row, one behind the other.

    Returns:
        Rows, ``(n, weights)``, and P.

    Raises:
        PruningError: If no batch came.
    """
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].detach() for name in names}

    def outputs(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return next(tensors_in(functional_call(model, values, (inputs[None],))))[0]

    def roots(output: Tensor, target: Tensor) -> Tensor:
        curvature = hessian(lambda o: loss(o[None], target[None]))(output)
        return curvature.reshape(output.numel(), output.numel())

    rows = []
    examples = 0
    with undisturbed(model), torch.enable_grad():
        for batch in batches:
            inputs, targets = batch
            with unchanged(batch):
                found = vmap(lambda x: outputs(own, x))(inputs).detach()
                jacobian = vmap(jacrev(outputs), in_dims=(None, 0))(own, inputs)
            found = found.to(torch.promote_types(found.dtype, torch.float32))  # halves have no eigenvectors
            values, vectors = torch.linalg.eigh(vmap(roots)(found, targets))
            root = vectors * values.clamp_min(0).sqrt()[:, None]  # (N, outputs, outputs), H = root @ root.T
            flat = torch.cat([jacobian[name].flatten(found.dim()) for name in names], dim=-1).flatten(1, -2)
            rows.append((root.transpose(1, 2) @ flat.to(root.dtype)).flatten(0, 1).detach())
            examples += len(inputs)
    if not rows:
        raise PruningError("outer_product_rows: no batch came. Pass batches of inputs and targets.")
    return torch.cat(rows), examples
