"""Keeps weights that share values sharing them while optimizers write to them; chooses no values, wraps nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.model.torch_modes import changes_model
from lightning_prune.surgery.masks import unwrapped
from lightning_prune.surgery.resize import with_wrapped

__all__ = ["SharedValues", "forget_", "hold_shared", "packed_codes"]


class SharedValues:
    """Weights that share values, and go on to share them.

    The gradients of all entries with one code are summed in each backward pass, before they are accumulated, averaged
    over processes or clipped. So these entries take the same step under any optimizer that treats entries alike (SGD,
    Adam, ...): the step of the value that they share. After each step they are set to what the first of them is, since
    vectorised kernels round the last entries of a tensor otherwise. Entries with code 0 stay zero.

    Args:
        model: The model.
        codes: Name of a parameter -> code of each of its entries, integers of its shape; 0 where it is pruned.
    """

    def __init__(self, model: nn.Module, codes: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self._weights = [_Codes(parameters[name], own) for name, own in codes.items()]
        self._handles: list[RemovableHandle] = []

    def hold(self, optimizers: Iterable[Optimizer]) -> None:
        """Sum gradients, and share values after each step of these optimizers, until :meth:`release`."""
        for own in self._weights:
            if own.weight.requires_grad:  # the others stay as they are
                self._handles.append(own.weight.register_hook(own.summed))
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def release(self) -> None:
        """Remove every hook from the weights and the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for own in self._weights:
                own.share_()


class _Codes:
    """A weight, the code of each entry, and where each code is found first."""

    def __init__(self, weight: nn.Parameter, codes: Tensor) -> None:
        self.weight = weight
        self.codes = codes.to(weight.device, torch.int32).reshape(-1)
        size = self.codes.numel()
        self.count = 1 + int(self.codes.max()) if size else 1
        places = torch.arange(size, device=weight.device)
        first = torch.full((self.count,), max(size - 1, 0), device=weight.device)  # code 0 may be nowhere
        self.first = first.scatter_reduce(0, self.codes.long(), places, "amin")

    def summed(self, gradient: Tensor) -> Tensor:
        """Return for each entry the sum of the gradients of all entries with its code; 0 for code 0."""
        if not gradient.numel():
            return gradient
        wide = gradient.float() if gradient.itemsize < 4 else gradient  # sums of 16 bits soon add nothing
        sums = wide.new_zeros(self.count).index_add_(0, self.codes, wide.reshape(-1))
        sums[0] = 0
        return sums.index_select(0, self.codes).view_as(gradient).to(gradient.dtype)

    def share_(self) -> None:
        """Set the entries of each code to what the first of them is, and those of code 0 to zero."""
        if not self.weight.numel():
            return
        values = self.weight.detach().reshape(-1).index_select(0, self.first)
        values[0] = 0
        self.weight.copy_(values.index_select(0, self.codes).view_as(self.weight))


@changes_model
@contextmanager
def hold_shared(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], codes: Mapping[str, Tensor]
) -> Iterator[None]:
    """Train the values that weights share while the body trains, in plain PyTorch: the codes stay as they are.

    A step moves a value by the sum of the gradients of all weights that share it, which is many times the gradient of
    one: plain SGD takes a smaller learning rate than before. Pruned weights stay zero.

    Args:
        model: The model, also compiled, or wrapped for several devices.
        optimizer: The optimizer or optimizers that train it.
        codes: The codes that :func:`~lightning_prune.pruning.sharing.share_weights` reports.

    Raises:
        ValueError: If the codes are not of this model.

    Examples:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.5, 0.5, 2.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> with hold_shared(model, optimizer, {"weight": torch.tensor([[1, 1, 2]])}):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.data
        tensor([[0.3000, 0.3000, 1.9000]])
    """
    model = unwrapped(model)
    own = dict(model.named_parameters())
    for name, code in codes.items():
        if name not in own or own[name].shape != code.shape:
            raise ValueError(
                f"codes[{name!r}] of shape {tuple(code.shape)} fit no parameter of {type(model).__name__}. Give those "
                "that share_weights reported of this model."
            )
    shared = SharedValues(model, codes)
    shared.hold([optimizer] if isinstance(optimizer, Optimizer) else optimizer)
    try:
        yield
    finally:
        shared.release()


def forget_(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> None:
    """Have optimizers start anew with a parameter: summed gradients are on another scale than what they remember."""
    for optimizer in with_wrapped(optimizers):
        if isinstance(optimizer, torch.optim.Adagrad):  # it makes its state once, not at its first step
            for value in optimizer.state.get(parameter, {}).values():
                value.zero_()
        else:
            optimizer.state.pop(parameter, None)


def packed_codes(codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return codes as checkpoints hold them: in one byte an entry, where these suffice."""
    return {name: own.to(torch.uint8) if own.numel() and int(own.max()) < 256 else own for name, own in codes.items()}
