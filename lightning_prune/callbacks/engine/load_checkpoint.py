"""Makes a module from the checkpoint of a pruned one, by the module's class."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lightning_prune.model.errors import PruningError
from lightning_prune.surgery.attributes import set_number_
from lightning_prune.surgery.loading import shapes_first, slim_loading
from lightning_prune.surgery.recipe_part import recipes_in

__all__ = ["load_from_checkpoint"]

_Module = TypeVar("_Module", bound=LightningModule)


def load_from_checkpoint(module_class: type[_Module], checkpoint_path: str | Path, **kwargs: Any) -> _Module:
    """Load a checkpoint whose model was pruned, as ``module_class.load_from_checkpoint`` loads others.

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
    built_with = _built_with(Path(checkpoint_path), trusted=kwargs.get("weights_only") is False)
    try:
        with _shapes_first(module_class), slim_loading():
            return module_class.load_from_checkpoint(checkpoint_path, **{**built_with, **kwargs})
    except PruningError as error:
        raise PruningError(f"load_from_checkpoint: {checkpoint_path}: {error}") from error
    except Exception as error:
        if wrong := _wrong_with(Path(checkpoint_path)):
            raise PruningError(
                f"load_from_checkpoint: {checkpoint_path} {wrong}. Give the path of a checkpoint that a Trainer wrote."
            ) from error
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):  # torch's words
            raise PruningError(f"load_from_checkpoint: {checkpoint_path} is of another class. {error}") from error
        if isinstance(error, pickle.UnpicklingError):
            told, wrong = f"load_from_checkpoint: {checkpoint_path} cannot be read", str(error)
            if "Unsupported" in wrong:  # torch's word for what weights_only keeps out
                wrong = wrong.partition("WeightsUnpickler error: ")[2].partition(" was not")[0]
                told += (
                    ": it holds objects, such as hyperparameters that are no plain values. Pass weights_only=False if"
                )
                told += " you trust the file, or leave them out by save_hyperparameters(ignore=[...])"
            raise PruningError(f"{told}. {wrong}") from error
        raise


@contextmanager
def _shapes_first(module_class: type[LightningModule]) -> Iterator[None]:
    """Have modules of a class take the shapes of a checkpoint before their own ``on_load_checkpoint`` reads it."""
    own = vars(module_class).get("on_load_checkpoint")
    first: Any = shapes_first(module_class.on_load_checkpoint)
    module_class.on_load_checkpoint = first  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module_class.on_load_checkpoint
        else:
            module_class.on_load_checkpoint = own  # type: ignore[method-assign]


def _built_with(path: Path, trusted: bool) -> dict[str, Any]:
    """Return the hyperparameters that the constructor takes and a cut has changed since.

    A full checkpoint holds them. In one of weights alone Lightning lets no callback correct them, so there they are in
    the metadata of the state dict.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return {}
    try:
        found = torch.load(path, map_location="meta", weights_only=not trusted)
        changed = recipes_in(found["state_dict"]).get("", {}).get("built_with", {})
        saved = found.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    except MemoryError:
        raise
    except Exception:  # what loads the module says what is wrong
        return {}
    built_with: dict[str, Any] = {}
    for name, value in changed.items():
        key, *inner = name.split(".")
        if not inner:
            built_with[key] = value
        elif key in saved:  # a config of its own, of which the number is a part
            built_with.setdefault(key, saved[key])
            set_number_(built_with, name, value)
    return built_with


def _wrong_with(path: Path) -> str | None:
    """Return what is wrong with a file that is no checkpoint; None for one that is, or that lies elsewhere."""
    if path.is_dir():
        return "is a folder"
    if not path.is_file():
        return None
    if not zipfile.is_zipfile(path):
        return "was not written by torch.save, or only in part"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "is damaged"
        found = torch.load(path, map_location="meta", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # Objects that are not plain are read where the caller allows it, so that the first failure tells more.
        return None if "Unsupported global" in str(error) else f"cannot be read ({type(error).__name__}: {error})"
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        return None if "pytorch-lightning_version" in found else "does not say which Lightning wrote it"
    holds = ", ".join(map(repr, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
    return f"holds no state_dict (but {holds or 'nothing'})"
