"""Holds entries of parameters at exactly zero while optimizers write to them; decides nothing, wraps nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.model.bits import pack_bits, unpack_bits
from lightning_prune.model.errors import PruningError
from lightning_prune.model.lazy import Lazily
from lightning_prune.model.shards import own_part, part_like, settle_
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.surgery import Kept, PackedMasks, Recipe, narrowed, recipe_of
from lightning_prune.surgery.resize import with_wrapped

__all__ = ["Masks", "apply_masks_", "carried_masks", "hold_masks", "masks_on", "unpacked", "unwrapped"]

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")  # as optimizers of torch name them
_TINY = 1e-12


class Masks:
    """Zeros in a model's parameters that stay zero.

    A mask that waits is one bit for each entry. While optimizers are held, it is a tensor of ones and zeros in its
    parameter's dtype, by which the parameter is multiplied after each step of an optimizer that owns it: in place, so
    that parameters, their names and their place in optimizers and state dicts stay what they are. Between two steps the
    zeros are zero for everyone who looks.

    The model carries its masks in its recipe (:func:`~lightning_prune.surgery.recipe_of`), so that its state dicts tell
    of them.

    Args:
        model: The model whose parameters are masked.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> masks = Masks(model)
        >>> masks.set_masks_({"weight": torch.tensor([[True, False]])}, [optimizer])
        >>> masks.hold([optimizer])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight[0, 1].item() == 0
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._packed: PackedMasks = {}
        self._factors: dict[str, Tensor] = {}  # ones and zeros, while optimizers are held
        self._held: dict[int, tuple[Optimizer, RemovableHandle]] = {}
        self._pairs: dict[int, _Pairs] = {}

    @property
    def keep(self) -> Mapping[str, Tensor]:
        """What stays of every masked parameter, as bool of its shape, or of one that broadcasts to it; on the CPU."""
        packed = self._packed
        return Lazily(packed, lambda name: unpack_bits(*packed[name]))

    def set_masks_(self, keep: Mapping[str, Tensor], optimizers: Iterable[Optimizer] = ()) -> None:
        """Mask weights: zero them, and zero their entries in the optimizer state.

        Args:
            keep: Name of a parameter -> what stays, as bool of its shape, or of one that broadcasts to it, such as
                ``(out, 1, 1, 1)`` where whole filters go. Other parameters keep the masks they have.
            optimizers: The optimizers that train the model.
        """
        whole, packed = [], dict(self._packed)
        for name in keep:
            stays = keep[name]
            packed.pop(name, None)
            if stays.all():  # where nothing goes no mask is needed
                whole.append(name)
            else:
                packed[name] = [pack_bits(stays), list(stays.shape)]
        self._packed = packed
        self._changed(lifted=whole)
        self.clear_(optimizers)

    def clear_(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Zero what is hidden, and what optimizers remember of it."""
        parameters, optimizers = _parameters(self._model), with_wrapped(optimizers)
        with torch.inference_mode(False), torch.no_grad():
            for name, keep in self.keep.items():
                parameter = parameters[name]
                _zero_(parameter, keep)
                for optimizer in optimizers:
                    for value in optimizer.state.get(parameter, {}).values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            _zero_(value, keep)

    def lift(self) -> None:
        """Forget all masks; what they hid stays zero until something is written there."""
        lifted, self._packed = self._packed, {}
        self._changed(lifted)

    def apply_(self, model: nn.Module | None = None) -> None:
        """Zero what is hidden: of the model, or of a copy of it, such as an average of its weights."""
        parameters = _parameters(model or self._model)
        with torch.inference_mode(False), torch.no_grad():
            for name, keep in self.keep.items():
                _zero_(parameters[name], keep)

    def renew(self) -> None:
        """Find the parameters anew: others may stand in their places."""
        self._factors = {}
        self._lay_out()

    def hold(self, optimizers: Iterable[Optimizer]) -> None:
        """Multiply by the masks after every step of these optimizers, until :meth:`release`; again is no more."""
        for optimizer in optimizers:
            if id(optimizer) not in self._held:
                self._held[id(optimizer)] = optimizer, optimizer.register_step_post_hook(self._after_step)
        self._lay_out()

    def release(self) -> None:
        """Remove every hook from the optimizers."""
        for _, handle in self._held.values():
            handle.remove()
        self._held = {}
        self._lay_out()

    def mask_gradients_(self, optimizer: Optimizer) -> None:
        """Zero the gradients of what is hidden, of the parameters that an optimizer owns."""
        pairs = self._pairs_of(optimizer)
        dense = [
            (weight.grad, mask)
            for weight, mask in zip(pairs.weights, pairs.masks, strict=True)
            if weight.grad is not None and weight.grad.layout == torch.strided
        ]
        _multiply_([own_part(gradient) for gradient, _ in dense], [mask for _, mask in dense])

    def follow_(self, kept: Kept) -> None:
        """Follow a cut that removed entries of the parameters themselves."""
        for name, dims in kept.items():
            if name in self._packed:
                slim = _followed(unpack_bits(*self._packed[name]), dims)
                self._packed[name] = [pack_bits(slim), list(slim.shape)]
        self._changed()

    def packed(self) -> PackedMasks:
        """Return the masks as a checkpoint holds them: packed bits and shapes, by name."""
        return {name: [bits, list(shape)] for name, (bits, shape) in self._packed.items()}

    def _changed(self, lifted: Iterable[str] = ()) -> None:
        """Write the masks into the recipe, which may hold masks of others, too."""
        self._factors = {}
        self._lay_out()
        recipe_of(self._model).write_masks_(self.packed(), lifted)

    def _lay_out(self) -> None:
        """Make what parameters are multiplied by, while optimizers are held."""
        self._pairs = {}
        if not self._held:
            self._factors = {}
            return
        parameters = _parameters(self._model)
        for name in self._packed:
            parameter, factor = parameters[name], self._factors.get(name)
            if factor is None or (factor.dtype, factor.device) != (parameter.dtype, parameter.device):
                self._factors[name] = _as_mask(self.keep[name], parameter)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        pairs = self._pairs_of(optimizer)
        _multiply_([own_part(weight) for weight in pairs.weights], pairs.masks)
        for weight, mask, place in zip(pairs.weights, pairs.masks, pairs.places, strict=True):
            if place is not None and mask.device.type == "cpu":
                _refill_(optimizer.state.get(weight, {}), weight, mask, place)

    def _pairs_of(self, optimizer: Optimizer) -> _Pairs:
        """Return the masked parameters that an optimizer owns; parameters may join it while it trains."""
        owned = sum(len(group["params"]) for group in optimizer.param_groups)
        pairs = self._pairs.get(id(optimizer))
        if pairs is None or pairs.owned != owned:
            theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            named = _parameters(self._model)
            masked = [(named[name], mask) for name, mask in self._factors.items() if id(named[name]) in theirs]
            places = [_first_zero(mask) for _, mask in masked]
            pairs = _Pairs(owned, [weight for weight, _ in masked], [mask for _, mask in masked], places)
            self._pairs[id(optimizer)] = pairs
        return pairs


class _Pairs(NamedTuple):
    """How many parameters an optimizer owns, those of them that are masked, their masks, and one zero of each."""

    owned: int
    weights: list[Tensor]
    masks: list[Tensor]
    places: list[tuple[int, ...] | None]


def masks_on(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks that a model and its parts carry, as bool, by name; weights set to other values have none."""
    return dict(carried_masks(model))


def carried_masks(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the masks of :func:`masks_on`, each unpacked when it is looked at."""
    packed = Recipe(model).masks
    return Lazily(packed, lambda name: unpack_bits(*packed[name]))


def unpacked(masks: PackedMasks) -> dict[str, Tensor]:
    """Return what a checkpoint holds of masks as bool, by name."""
    return {name: unpack_bits(packed, shape) for name, (packed, shape) in masks.items()}


@changes_model
def apply_masks_(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Zero weights of a model by given masks, which it carries from then on, as after a pruning of its own.

    Args:
        model: The model.
        keep: Name of a parameter -> what stays, as bool, such as :func:`masks_on` returns of another model.

    Raises:
        ValueError: If there is no such parameter, or a mask does not fit its shape.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> apply_masks_(model, {"weight": torch.tensor([[True, False]])})
        >>> model.weight[0, 1].item(), masks_on(model)
        (0.0, {'weight': tensor([[ True, False]])})
    """
    model = unwrapped(model)
    _check_keep(model, keep)
    Masks(model).set_masks_(keep)


def _check_keep(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, stays in keep.items():
        if name not in own:
            raise ValueError(f"keep[{name!r}]: {type(model).__name__} has no parameter of this name.")
        try:
            stays.expand(own[name].shape)
        except RuntimeError:
            shapes = f"{tuple(stays.shape)}, of a parameter of shape {tuple(own[name].shape)}"
            raise ValueError(f"keep[{name!r}] is of shape {shapes}. Give masks of this model.") from None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and the wrappers that run it on several devices: its names are known."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


@changes_model
@contextmanager
def hold_masks(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], keep: Mapping[str, Tensor] | None = None
) -> Iterator[Masks]:
    """Keep zeros zero while the body trains, in plain PyTorch.

    Args:
        model: The model, also compiled, or wrapped for several devices.
        optimizer: The optimizer or optimizers that train it.
        keep: Name of a parameter -> what stays, as bool; by default the masks that the model carries, as
            :func:`~lightning_prune.prune_weights` left them.

    Yields:
        The masks, whose ``mask_gradients_`` the body may call before it clips gradients.

    Raises:
        ValueError: If ``keep`` is not for this model.
        PruningError: If there is nothing to hold.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> with hold_masks(model, optimizer, {"weight": torch.tensor([[True, False]])}):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight[0, 1].item() == 0
        True
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    model = unwrapped(model)
    if keep is None:
        keep = masks_on(model)
    _check_keep(model, keep)
    if not keep:
        raise PruningError(
            f"hold_masks: {type(model).__name__} carries no masks, so there are no zeros to hold: it was not pruned, "
            "weights were written to since, or they were loaded by load_state_dict. Prune it, load it by "
            "load_state_dict_, or pass keep=."
        )
    masks = Masks(model)
    masks.set_masks_(keep, optimizers)
    masks.hold(optimizers)
    try:
        yield masks
    finally:
        masks.release()


def _followed(mask: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    return narrowed(mask, {dim: index for dim, index in dims.items() if mask.shape[dim] > 1})


def _as_mask(keep: Tensor, parameter: Tensor) -> Tensor:
    """Return ones and zeros of a parameter's dtype, lying in memory as the parameter does, or smaller.

    Of a parameter that is split over processes, what belongs to this process's part.
    """
    keep = part_like(keep, parameter)
    parameter = own_part(parameter.detach())
    if keep.shape != parameter.shape:
        return keep.to(parameter)
    return torch.empty_like(parameter).copy_(keep)


def _refill_(state: Mapping[str, Any], weight: Tensor, mask: Tensor, place: tuple[int, ...]) -> None:
    """Set second moments of hidden weights to one, where they are zero or nearly so.

    Processors take several times as long for the root of zero, or of a number that is almost zero, as for that of one.
    What is divided by these roots is zero, so no weight takes another step.
    """
    for name in _SECOND_MOMENTS:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            continue
        own = own_part(value.detach())
        if 0 <= float(own[place]) < _TINY:
            own.masked_fill_(mask == 0, 1)


def _first_zero(mask: Tensor) -> tuple[int, ...] | None:
    """Return the place of a zero; of a part of a mask that hides nothing, None."""
    zeros = (mask == 0).nonzero()
    return tuple(zeros[0].tolist()) if len(zeros) else None


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name; of those that are split over processes, the parts and not what was gathered."""
    settle_(model)
    return dict(model.named_parameters())


def _zero_(tensor: Tensor, keep: Tensor) -> None:
    """Zero what is not kept; of a tensor that is split over processes, in this process's part."""
    own = own_part(tensor.detach())
    own.masked_fill_(~part_like(keep, tensor).to(own.device), 0)


def _multiply_(tensors: list[Tensor], masks: list[Tensor]) -> None:
    if tensors:
        with torch.no_grad():
            torch._foreach_mul_(tensors, masks)
