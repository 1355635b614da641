"""Makes a model whole that FSDP2 or tensor parallelism has split, for a pruning step, and splits it again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.engine.averaging import with_metadata
from lightning_prune.callbacks.engine.packages import is_a
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import (
    hook_counts,
    is_sharded,
    missing_of_torch,
    own_part,
    part_like,
    settle_,
    split_like,
    undo_fully_shard_,
    undo_parallelize_module_,
    whole,
    whole_numbers,
)
from lightning_prune.surgery import RECIPE, checked, take_told_
from lightning_prune.surgery.loading import take_recorded_shapes_
from lightning_prune.surgery.skipped import drop_state_

__all__ = [
    "is_model_parallel", "load_as_before_", "note_shapes_", "refuse_changed_numbers", "refuse_old_torch",
    "refuse_tensor_parallel", "take_shapes_before_loading_", "tensor_parallel_size", "whole_model",
]  # fmt: skip

_LARGER = 2  # how much larger than the largest tensor of the model one of a checkpoint may be
_METADATA = "meta.pt"  # where Lightning keeps what is no tensor of the model in a folder of shards


def is_model_parallel(trainer: Trainer) -> bool:
    """Return whether FSDP2 or tensor parallelism splits the model."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def tensor_parallel_size(trainer: Trainer) -> int:
    """Return over how many processes tensor parallelism splits layers."""
    if not is_model_parallel(trainer):
        return 1
    size: int = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
    return size


def refuse_tensor_parallel(where: str, trainer: Trainer, why: str, instead: str = "Prune") -> None:
    """Refuse tensor parallelism where units cannot be pruned beside it.

    Raises:
        PruningError: Saying why, and what to use instead.
    """
    if tensor_parallel_size(trainer) > 1:
        raise PruningError(
            f"{where}: under tensor parallelism {why}. {instead} under FSDP2 alone (tensor_parallel_size=1), or before "
            "the model is split."
        )


def refuse_changed_numbers(where: str, pl_module: LightningModule, changed: Mapping[tuple[str, str], int]) -> None:
    """Refuse a ``configure_model`` that changed attributes, given by path and name with what they were.

    Raises:
        PruningError: Naming the first of them.
    """
    for (path, name), was in changed.items():
        now = whole_numbers(pl_module).get((path, name))
        raise PruningError(
            f"{where}: configure_model of {type(pl_module).__name__} changes {path or 'its module'}.{name} from {was} "
            f"to {now}. A pruning step puts the model together, where it needs the number of all processes, and calls "
            f"configure_model again. Leave {name} as it is, and let forward take the number from shapes, as in "
            "view(..., -1, head_dim)."
        )


def refuse_old_torch(where: str) -> None:
    """Refuse models that are split over processes where torch lacks what is needed.

    Raises:
        PruningError: Before training starts.
    """
    if missing := missing_of_torch():
        raise PruningError(
            f"{where}: torch {torch.__version__} lacks what pruning under ModelParallelStrategy needs ({missing}). "
            "Install torch 2.7 or newer, or train with strategy='ddp'."
        )


@contextmanager
def whole_model(where: str, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Show the body a plain model and plain optimizer state, on every process; split both again behind it.

    Every process holds the whole model, and its optimizer state, for the length of the body. Parameters are other
    objects before and afterwards; their names, and what optimizers know of them, stay. Where nothing is split, the body
    just runs.

    Raises:
        PruningError: If ``configure_model`` does not split a model that it split before.
    """
    settle_(pl_module)
    split = {name for name, parameter in pl_module.named_parameters() if is_sharded(parameter)}
    if not split:
        yield
        return
    gathered = {name: _plain(parameter) for name, parameter in pl_module.named_parameters()}
    was_split = {id(parameter): name in split for name, parameter in gathered.items()}
    hooks = hook_counts(pl_module)
    undo_fully_shard_(pl_module)
    later = undo_parallelize_module_(pl_module)
    _exchange_(pl_module, trainer.optimizers, gathered)
    try:
        yield
    finally:
        _split_again(where, trainer, pl_module, was_split)
    for own, key in later:
        if key in own:
            own.move_to_end(key)
    if tensor_parallel_size(trainer) > 1:
        _refuse_other_hooks(where, pl_module, hooks)


def note_shapes_(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint the shapes and the recipe of a model that is split, and to its state dict the metadata."""
    state_dict = pl_module.state_dict()
    metadata = state_dict._metadata  # type: ignore[attr-defined]
    told = {path: of[RECIPE] for path, of in metadata.items() if RECIPE in of}
    shapes = {name: list(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
    checkpoint[RECIPE] = {"shapes": shapes, "recipe": told}
    checkpoint["state_dict"] = with_metadata(checkpoint["state_dict"], metadata)


def take_shapes_before_loading_(where: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Have the model take the shapes of any checkpoint as soon as its strategy reads it.

    A hook for ``load_state_dict`` comes too late for shards, which are loaded as they are, and for code in the module's
    ``on_load_checkpoint`` or ``load_state_dict`` that drops what does not fit, or loses the metadata.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy.load_checkpoint, _ShapesFirst):
        strategy.load_checkpoint = _ShapesFirst(where, trainer, pl_module)


def load_as_before_(trainer: Trainer) -> None:
    """Undo :func:`take_shapes_before_loading_`, and nothing else that was put in that place."""
    own = vars(trainer.strategy)
    if not isinstance(ours := own.get("load_checkpoint"), _ShapesFirst):
        return
    del own["load_checkpoint"]
    own.update(ours.replaced)


class _ShapesFirst:
    """Stands in for a strategy's ``load_checkpoint``: the model takes the shapes of what is loaded next."""

    def __init__(self, where: str, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.replaced = {name: value for name, value in vars(strategy).items() if name == "load_checkpoint"}
        self._load = strategy.load_checkpoint
        self._where, self._trainer, self._module = where, trainer, pl_module

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_model_parallel(self._trainer):
            checkpoint = self._load(checkpoint_path, *args, **kwargs)
            take_recorded_shapes_(self._module, checkpoint)
            return checkpoint
        told = _told_by(Path(self._trainer.strategy.broadcast(checkpoint_path)))
        if told is not None:
            with whole_model(self._where, self._trainer, self._module):
                before = {id(parameter) for parameter in self._module.parameters()}
                _take_shapes(self._module, told)
                here = {id(parameter) for parameter in self._module.parameters()}
                drop_state_(self._trainer.optimizers, before - here)  # of layers that were removed
        return self._load(checkpoint_path, *args, **kwargs)


def _told_by(path: Path) -> Mapping[str, Any] | None:
    """Return the shapes and the recipe that a file, or a folder of shards, tells of; None if it is of no pruned run."""
    file = path / _METADATA if path.is_dir() else path
    if not file.is_file():
        return None  # loading says so
    found = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
    return found.get(RECIPE) if isinstance(found, Mapping) else None


def _take_shapes(pl_module: LightningModule, told: Mapping[str, Any]) -> None:
    """Apply shapes and a recipe that a checkpoint tells of.

    Raises:
        PruningError: If they cannot be, or are not for this model.
    """
    own = pl_module.state_dict()
    largest = max((value.numel() for value in own.values() if isinstance(value, Tensor)), default=1)
    damaged = "it is damaged. Load an earlier checkpoint."
    try:
        shapes, recipe = dict(told["shapes"]), dict(told["recipe"])
        sizes = {name: tuple(map(operator.index, shape)) for name, shape in shapes.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise PruningError(f"What the checkpoint tells of its shapes cannot be read ({error!r}): {damaged}") from error
    tensors = {}
    for name, shape in sizes.items():
        if min(shape, default=0) < 0 or math.prod(shape) > largest * _LARGER:
            raise PruningError(f"The checkpoint says that {name} is of shape {shape}: {damaged}")
        # values come next, from the shards; here shapes alone count
        tensors[name] = torch.empty(shape, dtype=torch.uint8)
    take_told_(pl_module, tensors, checked(recipe))


def _plain(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)


def _exchange_(model: nn.Module, optimizers: Iterable[Optimizer], new: Mapping[str, nn.Parameter]) -> None:
    """Put other parameters in place of the model's, under all names, and whole state in place of that of shards."""
    by_id = {id(parameter): new[name] for name, parameter in model.named_parameters()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = by_id[id(parameter)]
    _hand_over(optimizers, by_id, lambda value, parameter: whole(value))


def _hand_over(
    optimizers: Iterable[Optimizer], by_id: Mapping[int, nn.Parameter], change: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Hand optimizers other parameters, with the state of the old ones, changed on the way."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [by_id.get(id(parameter), parameter) for parameter in group["params"]]
        state = dict(optimizer.state)
        optimizer.state.clear()
        for old, values in state.items():
            parameter: Any = by_id.get(id(old), old)
            optimizer.state[parameter] = {
                name: change(value, parameter) if isinstance(value, Tensor) else value for name, value in values.items()
            }


def _split_again(where: str, trainer: Trainer, pl_module: LightningModule, was_split: Mapping[int, bool]) -> None:
    """Have the user's own code split the model, and give the optimizers what it made of their parameters.

    Layers may have left; ``was_split`` says of plain parameters, by ``id``, whether they were split before.

    Raises:
        PruningError: If it does not split what it split before.
    """
    before, numbers = dict(pl_module.named_parameters()), whole_numbers(pl_module)
    with (
        trainer.strategy.tensor_init_context(),
        trainer.strategy.model_sharded_context(),
        trainer.precision_plugin.module_init_context(),
    ):
        pl_module.configure_model()
    after = dict(pl_module.named_parameters())
    now = {name: is_sharded(parameter) for name, parameter in after.items()}
    others = [name for name, plain in before.items() if was_split.get(id(plain), now[name]) != now[name]]
    if others:
        named = ", ".join(sorted(others)[:3])
        raise PruningError(
            f"{where}: a pruning step calls configure_model of {type(pl_module).__name__} again, and {named} is then "
            "split otherwise than at first. Let it split the model whenever it is called, without a guard that returns "
            "early, and build the model in __init__."
        )
    by_id = {id(before[name]): parameter for name, parameter in after.items()}
    _hand_over(trainer.optimizers, by_id, split_like)
    if tensor_parallel_size(trainer) > 1:
        left = whole_numbers(pl_module)
        refuse_changed_numbers(where, pl_module, {at: was for at, was in numbers.items() if left.get(at) != was})
        _refuse_other_parts(where, pl_module, before, after)


def _refuse_other_parts(
    where: str, pl_module: LightningModule, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Refuse parts that are not those into which optimizer state and masks are split.

    Raises:
        PruningError: Naming the first parameter.
    """
    for name, parameter in after.items():
        expected = part_like(before[name].detach(), parameter)
        if not torch.allclose(own_part(parameter), expected, rtol=0, atol=0, equal_nan=True):
            raise PruningError(
                f"{where}: configure_model of {type(pl_module).__name__} changes values of {name}, or splits it in "
                "another way than its placements say. Let it split parameters by parallelize_module and fully_shard "
                "alone."
            )


def _refuse_other_hooks(where: str, pl_module: LightningModule, before: Mapping[int, int]) -> None:
    """Refuse hooks that ``configure_model`` sets each time it is called.

    Raises:
        PruningError: Naming the first module.
    """
    after = hook_counts(pl_module)
    for path, module in pl_module.named_modules():
        count = before.get(id(module), after[id(module)])
        if after[id(module)] != count:
            raise PruningError(
                f"{where}: {path or type(pl_module).__name__} had {count} forward hooks, and {after[id(module)]} once "
                "configure_model was called again for a pruning step. Set hooks in __init__, and there let "
                "parallelize_module set its own."
            )
