"""First and second derivatives of a loss with respect to weights, over batches; knows no structure, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.structure.tracer import taken_apart

__all__ = ["Loss", "batch_gradients", "differentiable", "example_gradients", "hutchinson", "squared_gradients"]

Loss = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the mean loss over the batch, a single number."""


def batch_gradients(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor | None]:
    """Return the gradient of the loss of one batch for every parameter, frozen or not; ``.grad`` is not touched."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    with differentiable(parameters.values()):
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def example_gradients(model: nn.Module, batch: Any, loss: Loss) -> Iterator[dict[str, Tensor]]:
    """Yield, example by example, the loss's gradient for every parameter that it depends on."""
    for example in _examples(batch):
        found = batch_gradients(model, example, loss)
        yield {name: gradient for name, gradient in found.items() if gradient is not None}


def squared_gradients(model: nn.Module, batch: Any, loss: Loss) -> Iterator[dict[str, Tensor]]:
    """Yield each example's squared gradients: their mean stands in for the diagonal of the Hessian.

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992, sec. 4: the outer-product form.
    """
    for example in _examples(batch):
        found = batch_gradients(model, example, loss)
        yield {name: _single(gradient).square() for name, gradient in found.items() if gradient is not None}


def hutchinson(model: nn.Module, batch: Any, loss: Loss, probes: int = 4) -> Iterator[dict[str, Tensor]]:
    r"""Yield estimates :math:`v \odot H v` of the diagonal of a batch's Hessian, by random signs :math:`v`.

    Attention and recurrent layers run as plain operators, since their fused kernels have no second derivative.

    Args:
        model: The model.
        batch: A batch of data.
        loss: From model and batch to the mean loss.
        probes: How many estimates.

    Yields:
        Parameter name -> estimate, of the parameter's shape. Unbiased; single entries may be negative.

    References:
        Hutchinson, 1990; Bekas, Kokiopoulou and Saad, An Estimator for the Diagonal of a Matrix, 2007.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    with differentiable(parameters.values()):
        with taken_apart():
            value = loss(model, batch)
        first = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True)
        used = [
            (name, p, g)
            for (name, p), g in zip(parameters.items(), first, strict=True)
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
            found = zip(used, signs, second, strict=True)
            yield {name: _single(sign * product) for (name, _, _), sign, product in found if product is not None}


def _single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make frozen parameters differentiable, too, inside the block."""
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
        yield pytree.tree_map_only(Tensor, partial(_one_of, i), batch)


def _one_of(i: int, tensor: Tensor) -> Tensor:
    return tensor[i : i + 1] if tensor.dim() else tensor
