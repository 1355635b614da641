"""Expands a model's outputs, and its loss to second order, in every unit, example by example; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.measure.unit_statistics import Contributions, contributions_of
from lightning_prune.model.calls import tensors_in
from lightning_prune.model.errors import PruningError

__all__ = ["Outputs", "loss_change", "output_change", "outputs_of"]


def output_change(outputs: Outputs, value: Any, probes: int = 4) -> dict[str, Tensor]:
    r"""Return how much each example's outputs would change without each unit: :math:`\lVert J_n \rVert^2`.

    :math:`J_n` is the derivative of example n's outputs with respect to a gate on the unit. Its square is estimated by
    random signs :math:`v`, :math:`E_v[(v^\top J_n)^2]`, one backward pass each. It is the Gauss-Newton curvature of the
    squared error: it needs no labels and unlike the loss's own does not vanish where the model is sure of them.

    Args:
        outputs: What the model returned for a batch.
        value: The batch's loss; it is not looked at.
        probes: Random signs for every example.

    Returns:
        Group name -> squared change, ``(N, width)``.

    References:
        Hassibi, Stork and Wolff, Optimal Brain Surgeon and General Network Pruning, 1993, eq. 7-9, for gates instead of
        weights; Aljundi et al., Memory Aware Synapses, ECCV 2018, for what the outputs say without labels.
    """
    found: dict[str, Tensor] = {}
    for _ in range(probes):
        for name, rows in outputs.contributions(outputs.random_signs()).items():
            found[name] = found.get(name, 0) + rows.square() / probes
    return found


def loss_change(outputs: Outputs, value: Tensor, directions: int = 4) -> dict[str, Tensor]:
    r"""Expand each example's loss to second order in a gate on every unit: :math:`-g_n + \frac12 h_n`.

    :math:`g_n` is the derivative of example n's loss with respect to the gate, and :math:`h_n = J_n^\top H_n J_n` its
    Gauss-Newton second derivative, of the outputs' derivatives :math:`J_n` and the loss's curvature :math:`H_n` in the
    outputs; in a network that is piecewise linear in the gate, as one of ReLUs is, it is exact. :math:`H_n` is taken by
    its largest eigenvalues: exact where it has no more than so many that are not zero.

    Args:
        outputs: What the model returned for a batch.
        value: The mean over the batch of losses, each of which depends on its own example's outputs alone.
        directions: Eigenvectors taken for every example, one backward pass each.

    Returns:
        Group name -> change of each example's loss without the unit, ``(N, width)``.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989, eq. 1, in gates and with the first term; Molchanov et
        al., CVPR 2019, eq. 6 (arXiv:1906.10771); Schraudolph, Fast Curvature Matrix-Vector Products, 2002, sec. 3.
    """
    slopes = outputs.slopes(value)
    found = {name: -rows for name, rows in outputs.contributions(slopes.detach()).items()}
    for axis, bend in _principal_axes(partial(outputs.curvature, slopes), slopes, directions):
        for name, rows in outputs.contributions(axis).items():
            found[name] = found[name] + bend[:, None] * rows.square() / 2
    return found


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Note what the model returns inside the block and can be differentiated, but for single numbers.

    All its calls count; where parts of it are called by themselves, as in a training step, the last of them.
    """
    seen: list[Tensor] = []
    running: list[nn.Module] = []

    def begin(module: nn.Module, args: Any) -> None:
        running.append(module)

    def end(module: nn.Module, args: Any, outputs: Any) -> None:
        running.pop()
        found = [z for z in tensors_in(outputs) if z.dim() and z.is_floating_point()]
        found = [z for z in found if z.requires_grad] if torch.is_grad_enabled() else found
        if not running and found:
            seen[:] = [*seen, *found] if module is model else found

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield seen


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model returned for one batch, as ``(N, outputs)``: an example a row.

    Attributes:
        tensors: The outputs as they are.
        parameters: What backward passes run to.
        watched: What sees the units' contributions in backward passes from these outputs.
    """

    tensors: tuple[Tensor, ...]
    parameters: list[nn.Parameter]
    watched: Contributions

    def __post_init__(self) -> None:
        if len({len(z) for z in self.tensors}) != 1:
            raise PruningError(
                f"Outputs are looked at example by example, but the model returned "
                f"{[tuple(z.shape) for z in self.tensors]}. Let the loss call the model, and the model return tensors "
                "with one row for each example; or use another criterion."
            )

    def contributions(self, direction: Tensor) -> dict[str, Tensor]:
        """Return what each unit adds to every example's outputs along a direction, ``(N, width)`` for each group."""
        found = self.watched.found
        found.clear()
        torch.autograd.grad(self.tensors, self.parameters, self._apart(direction), retain_graph=True, allow_unused=True)
        return {name: self._by_example(name, rows) for name, rows in contributions_of(found).items()}

    def slopes(self, value: Tensor) -> Tensor:
        """Return the gradient of every example's loss, of which ``value`` is the mean."""
        gradients = torch.autograd.grad(value, self.tensors, create_graph=True, allow_unused=True)
        return self._together(gradients) * len(self.tensors[0])

    def curvature(self, slopes: Tensor, direction: Tensor) -> Tensor:
        """Return the change of the slopes along a direction."""
        if not slopes.requires_grad:  # of a loss that is linear
            return torch.zeros_like(slopes)
        direction = direction.to(slopes)
        return self._together(
            torch.autograd.grad(slopes, self.tensors, direction, retain_graph=True, allow_unused=True)
        )

    def random_signs(self) -> Tensor:
        """Draw a direction of ones and minus ones."""
        return self._together([torch.randint_like(z, 2) * 2 - 1 for z in self.tensors])

    def _by_example(self, name: str, seen: list[Tensor]) -> Tensor:
        examples = len(self.tensors[0])
        if len(seen) > 1 or len(seen[0]) % examples:
            raise PruningError(
                f"{name}: the operators that read its channels see {[len(rows) for rows in seen]} rows for {examples} "
                f"rows of outputs, so examples cannot be told apart. Name ignore=[{name!r}], or use another criterion."
            )
        return seen[0].reshape(examples, -1, seen[0].shape[1]).sum(dim=1)

    def _together(self, tensors: Iterable[Tensor | None]) -> Tensor:
        pairs = zip(tensors, self.tensors, strict=True)
        rows = [(torch.zeros_like(z) if x is None else x).reshape(len(z), -1) for x, z in pairs]
        return torch.cat(rows, dim=1)

    def _apart(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split([z[0].numel() for z in self.tensors], dim=1)
        return [part.reshape(z.shape).to(z) for part, z in zip(parts, self.tensors, strict=True)]


def _principal_axes(product: Callable[[Tensor], Tensor], like: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    r"""Find, for every example, the axes :math:`\sqrt{|\lambda|} u` of the largest eigenvalues of a symmetric matrix.

    Args:
        product: The product of every example's matrix with a vector, ``(N, K)`` to ``(N, K)``.
        like: A tensor ``(N, K)``.
        count: How many.

    Returns:
        Axes, ``(N, K)`` each, and the signs of their eigenvalues, ``(N,)``.

    References:
        Halko, Martinsson and Tropp, Finding Structure with Randomness, 2011, alg. 4.4 and 5.3 (arXiv:0909.4061).
    """

    def products(basis: Tensor) -> Tensor:
        return torch.stack([product(vector) for vector in basis.unbind(-1)], dim=-1).detach()

    wide = torch.promote_types(like.dtype, torch.float32)
    basis = torch.randn(*like.shape, min(like.shape[1], count + 4), dtype=wide, device=like.device)
    for _ in range(2):
        basis = torch.linalg.qr(products(basis).to(wide)).Q
    small = basis.mT @ products(basis).to(wide)  # (N, size, size)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    order = values.abs().argsort(dim=-1, descending=True)[:, :count]
    values, vectors = values.gather(1, order), vectors.gather(2, order[:, None].expand(-1, len(small[0]), -1))
    axes = (basis @ vectors) * values.abs().sqrt()[:, None]
    return list(zip(axes.unbind(-1), values.sign().unbind(-1), strict=True))
