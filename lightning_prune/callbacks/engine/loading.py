"""Loads what pruning has left where no callback of ours is at work: by a function, or by the module's class."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune.model.errors import PruningError
from lightning_prune.model.inference_mode import changes_model
from lightning_prune.structure import named_tensors
from lightning_prune.surgery import RECIPE, take_shapes_

__all__ = ["Prunable", "load_from_checkpoint", "load_state_dict_"]

_Module = TypeVar("_Module", bound=LightningModule)


class Prunable:
    """Lets a module load what pruning has left of it: name it before ``LightningModule``.

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

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the shapes of the state dict, and whatever else it tells of its model, and load it."""
        _take_shapes_of(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]


@changes_model
def load_state_dict_(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Load the state dict of a pruned model into one of the original class, which takes its shapes and masks.

    Parameters stay the same objects, so that an optimizer made before goes on with them, once its own state is loaded.

    Args:
        model: The model, full-size, or slimmer or fatter than what is loaded.
        state_dict: What ``state_dict()`` of the pruned model gave, as ``torch.save`` and ``torch.load`` keep it.
        strict: Whether names must be the same on both sides.

    Returns:
        What ``model.load_state_dict`` returns: missing and unexpected names.

    Raises:
        PruningError: If shapes differ and the state dict does not tell what else does.
        RuntimeError: By torch, if names differ.

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
    if not _take_shapes_of(model, state_dict):
        _refuse_other_shapes("load_state_dict_", model, state_dict)
    return model.load_state_dict(state_dict, strict)


def load_from_checkpoint(module_class: type[_Module], checkpoint_path: str | Path, **kwargs: Any) -> _Module:
    """Do what ``module_class.load_from_checkpoint`` does, for a checkpoint whose model was pruned.

    Args:
        module_class: The class that was trained.
        checkpoint_path: A checkpoint, full or of weights alone.
        **kwargs: What ``LightningModule.load_from_checkpoint`` takes: ``map_location``, hyperparameters, ...

    Returns:
        The slim model.

    Raises:
        PruningError: If the file is no checkpoint or only part of one, or its shapes are not the module's and it does
            not tell what else differs.
    """
    try:
        with _taking_shapes(module_class):
            return module_class.load_from_checkpoint(checkpoint_path, **kwargs)
    except Exception as error:
        if wrong := _wrong_with(Path(checkpoint_path)):
            raise PruningError(
                f"load_from_checkpoint: {checkpoint_path} {wrong}. Give the path of a checkpoint that a Trainer wrote."
            ) from error
        raise


@contextmanager
def _taking_shapes(module_class: type[LightningModule]) -> Iterator[None]:
    """Let modules made in the body take the shapes of what they load; a subclass would not be taken for the class."""
    inherited = "load_state_dict" not in vars(module_class)
    load = module_class.load_state_dict

    def resize_and_load(self: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        told = _take_shapes_of(self, state_dict)
        try:
            return load(self, state_dict, *args, **kwargs)
        except RuntimeError:
            if not told:
                _refuse_other_shapes("load_from_checkpoint", self, state_dict)
            raise

    module_class.load_state_dict = resize_and_load  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if inherited:
            del module_class.load_state_dict
        else:
            module_class.load_state_dict = load  # type: ignore[method-assign]


def _take_shapes_of(module: Any, state_dict: Mapping[str, Any]) -> bool:
    """Take the shapes that a state dict has, of the module and of parts that were pruned alone; tell if it had any."""
    parts = dict(module.named_modules())
    told = {path: of for path, of in getattr(state_dict, "_metadata", {}).items() if RECIPE in of and path in parts}
    for path, of in told.items():
        take_shapes_(parts[path], state_dict, f"{path}." if path else "", of)
    return bool(told)


def _refuse_other_shapes(where: str, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    for name, tensor in named_tensors(model).items():
        saved = state_dict.get(name)
        if isinstance(saved, Tensor) and saved.shape != tensor.shape:
            raise PruningError(
                f"{where}: {name} is {tuple(saved.shape)} in the state dict and {tuple(tensor.shape)} in "
                f"{type(model).__name__}, and nothing beside it tells what else differs: another model was saved, or a "
                "copy into a plain dict or a file of safetensors lost that. Save model.state_dict() as it is by "
                "torch.save, or by save_sparse for load_sparse_."
            )


def _wrong_with(path: Path) -> str | None:
    """Tell in words why a file is no checkpoint; nothing of one that is, or that lies elsewhere than on disk."""
    if not path.is_file():
        return None
    if not zipfile.is_zipfile(path):
        return "was not written by torch.save, or only in part"
    try:
        found = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # what it holds is not plain: then the first failure told
        return None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        return None if "pytorch-lightning_version" in found else "does not say which Lightning wrote it"
    holds = ", ".join(map(repr, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
    return f"holds no state_dict (but {holds or 'nothing'})"
