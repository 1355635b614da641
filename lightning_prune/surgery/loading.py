"""Loads the state dict of a pruned model into one of the original class, by our own functions or by other code."""

from __future__ import annotations

import base64
import binascii
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_prune.model.errors import PruningError
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.recipe import refuse_other_shapes, refuse_unloadable, take_told_, take_untold_
from lightning_prune.surgery.recipe_part import Told, checked, recipes_in
from lightning_prune.surgery.resize import all_or_nothing

__all__ = [
    "Prunable", "load_state_dict_", "load_told_", "recipe_json", "shapes_first", "slim_loading",
    "take_recorded_shapes_",
]  # fmt: skip

_OF_THE_FILE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # what bad contents raise


class Prunable:
    """Makes a module load what pruning has left of it: name it before ``LightningModule``.

    Then ``MyModule.load_from_checkpoint``, ``load_state_dict`` and ``trainer.test(ckpt_path=...)`` take checkpoints of
    any shape that a run has written, and ``strategy="ddp_spawn"`` and ``"ddp_notebook"`` can bring a slim model back.
    Nothing else changes. It works for plain modules, too.

    Raises:
        TypeError: When a class is defined that names it too late to be heard.

    Examples:
        >>> from lightning_prune import prune_weights
        >>> from lightning_prune.surgery.masks import masks_on
        >>> class Net(Prunable, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden = nn.Linear(4, 10)
        >>> pruned, other = Net(), Net()
        >>> report = prune_weights(pruned, 0.5)
        >>> _ = other.load_state_dict(pruned.state_dict())
        >>> int(masks_on(other)["hidden.weight"].sum())
        20
    """

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        """Refuse an order of bases in which ``load_state_dict`` would not be ours."""
        super().__init_subclass__(*args, **kwargs)
        order = cls.__mro__
        if nn.Module in order and order.index(nn.Module) < order.index(Prunable):
            raise TypeError(
                f"class {cls.__name__}: Prunable stands behind a module, whose load_state_dict is used. Name it first: "
                f"class {cls.__name__}(Prunable, LightningModule)."
            )
        own = getattr(cls, "on_load_checkpoint", None)
        if own is not None and ("on_load_checkpoint" in vars(cls) or Prunable in cls.__bases__):
            cls.on_load_checkpoint = shapes_first(own)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Apply the shapes of the state dict, and whatever else it records of its model, and load it."""
        told = recipes_in(state_dict)
        if not told:
            refuse_other_shapes(f"{type(self).__name__}.load_state_dict", self, state_dict)  # type: ignore[arg-type]
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        with all_or_nothing(self):  # type: ignore[arg-type]
            take_told_(self, state_dict, told)  # type: ignore[arg-type]
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


def take_recorded_shapes_(model: nn.Module, checkpoint: Any) -> None:
    """Apply the shapes and masks that a checkpoint records, before the model's own code reads the checkpoint.

    That code may drop what does not fit the model, or copy the state dict, which loses its metadata.

    Raises:
        PruningError: If what is recorded cannot be, or is not for this model. The model is as it was.
    """
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if isinstance(state_dict, Mapping) and (told := recipes_in(state_dict)):
        take_told_(model, state_dict, told)


def shapes_first(on_load_checkpoint: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the method ``on_load_checkpoint`` of a module class, called after :func:`take_recorded_shapes_`."""

    @wraps(on_load_checkpoint)
    def take_shapes_and_call(self: nn.Module, checkpoint: Any) -> Any:
        take_recorded_shapes_(self, checkpoint)
        return on_load_checkpoint(self, checkpoint)

    return take_shapes_and_call


@changes_model
def load_state_dict_(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, recipe: str | None = None
) -> Any:
    """Load the state dict of a pruned model into one of the original class, which takes its shapes and masks.

    Parameters stay the same objects, so that an optimizer made before goes on with them, once its own state is loaded.

    Args:
        model: The model, full-size, or slimmer or fatter than what is loaded.
        state_dict: What ``state_dict()`` of the pruned model gave, as ``torch.save`` and ``torch.load`` keep it.
        strict: Whether names must be the same on both sides.
        recipe: What :func:`recipe_json` gave, where the state dict was copied or kept by something else, such as
            safetensors, and so lost its metadata.

    Returns:
        What ``model.load_state_dict`` returns: missing and unexpected names.

    Raises:
        PruningError: If names differ, shapes differ and nothing tells what else does, or what is loaded is damaged.
            The model is as it was.

    Examples:
        >>> from lightning_prune import prune_filters
        >>> net = lambda: nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> slim, full = net(), net()
        >>> report = prune_filters(slim, torch.randn(1, 4), amount=0.3)
        >>> load_state_dict_(full, slim.state_dict())
        <All keys matched successfully>
        >>> full
        Sequential(
          (0): Linear(in_features=4, out_features=7, bias=True)
          (1): ReLU()
          (2): Linear(in_features=7, out_features=2, bias=True)
        )
    """
    told = recipes_in(state_dict) if recipe is None else _read(recipe)
    return load_told_("load_state_dict_", model, state_dict, told, strict)


def load_told_(where: str, model: nn.Module, state_dict: Mapping[str, Any], told: Told, strict: bool = True) -> Any:
    """Load a state dict into a model that takes the shapes and masks told of it, or nothing of it.

    Raises:
        PruningError: If that cannot be done. The model is as it was.
    """
    if not isinstance(state_dict, Mapping):
        raise PruningError(f"{where}: a state dict was expected, not {type(state_dict).__name__}. Pass state_dict().")
    refuse_unloadable(state_dict, named_tensors(model))
    known = inspect.signature(model.load_state_dict).parameters.values()
    # a class may have a load_state_dict of its own that knows no such argument
    takes_strict = any(each.name == "strict" or each.kind is each.VAR_KEYWORD for each in known)
    arguments = {"strict": strict} if takes_strict or not strict else {}
    return _load_whole(where, model, state_dict, told, partial(model.load_state_dict, state_dict, **arguments))


def _load_whole(
    where: str, model: nn.Module, state_dict: Mapping[str, Any], told: Told, load: Callable[[], Any]
) -> Any:
    """Apply what is told of a state dict and call ``load``, or leave the model as it was.

    Raises:
        PruningError: If that cannot be done.
    """
    try:
        # One block with no other inside: an interruption between the ends of two would undo the shapes alone.
        with all_or_nothing(model) as undo:
            resized = take_told_(model, state_dict, told) if told else take_untold_(where, model, state_dict)
            undo.copy_values([tensor for name, tensor in named_tensors(model).items() if name not in resized])
            return load()
    except PruningError:
        raise
    except _OF_THE_FILE as error:
        raise PruningError(
            f"{where}: {error} The model is as it was. Load what was saved of the same class."
        ) from error


def recipe_json(source: nn.Module | Mapping[str, Any]) -> str:
    """Return, as JSON, what the shapes in a state dict cannot tell: for files that keep tensors alone.

    Args:
        source: A pruned model or a part of it, or its state dict as ``state_dict()`` or ``torch.load`` gave it.

    Returns:
        A string for the ``recipe`` of :func:`load_state_dict_` and :func:`slim_loading`.

    Raises:
        PruningError: If the source tells nothing, since it was not pruned or has lost its metadata.

    Examples:
        >>> from lightning_prune import prune_weights
        >>> model, other = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> _ = prune_weights(model, 0.5)
        >>> recipe, tensors = recipe_json(model), dict(model.state_dict())
        >>> _ = load_state_dict_(other, tensors, recipe=recipe)
        >>> int((other.weight == 0).sum())
        4
    """
    told = recipes_in(source.state_dict() if isinstance(source, nn.Module) else source)
    if not told:
        raise PruningError(
            f"recipe_json: {type(source).__name__} carries no pruning metadata: it was not pruned, or was copied into "
            "a plain dict. Pass the pruned model, or its state_dict() as it is."
        )
    modules = {}
    for path, recipe in told.items():
        masks = {
            name: [base64.b64encode(packed.numpy().tobytes()).decode(), list(shape)]
            for name, (packed, shape) in recipe["masks"].items()
        }
        modules[path] = {**recipe, "masks": masks}
    return json.dumps(modules)


def _read(recipe: str) -> Told:
    """Read what :func:`recipe_json` wrote.

    Raises:
        PruningError: If it is something else.
    """
    try:
        told = json.loads(recipe)
        for path, part in told.items():
            masks = {
                name: [torch.from_numpy(np.frombuffer(base64.b64decode(bits, validate=True), np.uint8).copy()), shape]
                for name, (bits, shape) in part["masks"].items()
            }
            told[path] = {**part, "masks": masks}
    except (*_OF_THE_FILE, RecursionError, binascii.Error) as error:
        raise PruningError(f"recipe={recipe[:40]!r}...: recipe_json did not write this ({error!r}).") from error
    return checked(told)


@contextmanager
def slim_loading(recipe: str | None = None) -> Iterator[None]:
    """Make every ``load_state_dict`` in the body take the shapes and masks of what it loads.

    For code that builds a model and loads it, and is not yours: a factory with ``checkpoint_path=``, a class method
    ``from_pretrained``, ``safetensors.torch.load_model``. It replaces ``nn.Module.load_state_dict`` for the length of
    the body, in all threads.

    Args:
        recipe: What :func:`recipe_json` gave, for files that keep no metadata. It is used for models that have all
            the modules it tells of.

    Examples:
        >>> from lightning_prune import prune_filters
        >>> def build(state):  # of another project
        ...     model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        ...     model.load_state_dict(state)
        ...     return model
        >>> pruned = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> report = prune_filters(pruned, torch.randn(1, 4), amount=0.3)
        >>> with slim_loading():
        ...     build(pruned.state_dict())[0].out_features
        7
    """
    given = None if recipe is None else _read(recipe)
    load = nn.Module.load_state_dict

    @wraps(load)
    def load_slim(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        told = recipes_in(state_dict)
        if not told and given is not None and given.keys() <= dict(self.named_modules(remove_duplicate=False)).keys():
            told = given
        if told:
            return _load_whole("slim_loading", self, state_dict, told, partial(load, self, state_dict, *args, **kwargs))
        refuse_other_shapes("slim_loading", self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    nn.Module.load_state_dict = load_slim  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
