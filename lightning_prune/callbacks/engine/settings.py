"""Gives the settings of a run's callbacks, as a call, as hyperparameters, and as facts of the run."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_prune import __version__
from lightning_prune.callbacks.engine.reporting import guarded
from lightning_prune.pruning.arguments import listed, plain, shown

__all__ = [
    "call_of", "changed_arguments", "compared_arguments", "facts_of_run", "log_settings", "settings_of",
    "warn_of_changes",
]  # fmt: skip

_NOT_SETTINGS = ("example_inputs", "report")


def call_of(callback: Callback) -> str:
    """Return the call that makes a callback, without what was left at its default and without example inputs."""
    given = []
    for name, default, value in _arguments(callback):
        if value == default or (value == [] and not default):
            continue
        given.append(f"{name}={value!r}")
    return f"{type(callback).__name__}({', '.join(given)})"


def compared_arguments(callback: Callback, model: nn.Module | None) -> dict[str, Any]:
    """Return every argument in a form that a checkpoint holds, to be compared with those of a run that resumes it.

    Args:
        callback: The callback.
        model: The model, once it is known: modules are named by their paths in it.
    """
    found: dict[str, Any] = {}
    for name, _, given in _arguments(callback):
        value = list(given) if isinstance(given, tuple) else given
        if name == "module":
            found[name] = None if value is None else sorted(shown(part, model) for part in listed(value))
        elif value is None or isinstance(value, bool | int | float | str | Mapping | list | nn.Module):
            found[name] = plain(value, model)
        else:
            found[name] = _loggable(value)
    return found


def changed_arguments(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return, in words, which arguments are others than in a checkpoint; nothing where none is."""
    changes = [
        f"{name}={_in_words(name, before[name])} is now {name}={_in_words(name, value)}"
        for name, value in now.items()
        if before[name] != value
    ]
    return "; ".join(changes)


def warn_of_changes(callback: Callback, before: Mapping[str, Any]) -> None:
    """Warn of arguments that are others than those in the checkpoint that is resumed."""
    changes = changed_arguments(before, compared_arguments(callback, None))
    if changes:
        rank_zero_warn(
            f"{type(callback).__name__}: other arguments than in the checkpoint: {changes}. From here on the new ones "
            "hold."
        )


def settings_of(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return every argument of the callbacks, as numbers, bools and strings, by ``prune/Class/argument``.

    Several callbacks of a class are numbered: ``prune/Class-2/argument``.
    """
    settings = {}
    seen: Counter[str] = Counter()
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] += 1
        which = kind if seen[kind] == 1 else f"{kind}-{seen[kind]}"
        for name, _, value in _arguments(callback):
            settings[f"prune/{which}/{name}"] = _loggable(value)
    return settings


def log_settings(trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[Callback]) -> None:
    """Log the arguments of the callbacks as hyperparameters to every logger.

    Those of the module and the datamodule, which Lightning logs later, are logged along: TensorBoard shows the
    hyperparameters of the first call alone.
    """
    settings: dict[str, Any] = {}
    for source in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
        if source is not None and source._log_hyperparams:
            settings |= dict(source.hparams_initial)
    settings |= settings_of(callbacks)
    for logger in trainer.loggers:
        with guarded(f"The settings of the pruning could not be logged to {type(logger).__name__}"):
            logger.log_hyperparams(settings)


def facts_of_run() -> dict[str, str]:
    """Return when a run started, its seed and the versions of what it runs on."""
    facts = {"started": datetime.now().astimezone().isoformat(" ", "seconds")}
    seed = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything sets
    facts["seed"] = seed if seed is not None else "not set by seed_everything"
    facts["lightning-prune"] = __version__
    try:
        facts["lightning"] = importlib.metadata.version("lightning")
    except importlib.metadata.PackageNotFoundError:  # then pytorch_lightning is
        facts["lightning"] = "not installed"
    return {**facts, "torch": str(torch.__version__), "Python": platform.python_version()}


def _arguments(callback: Callback) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the default and the value of every argument."""
    for name, parameter in inspect.signature(type(callback)).parameters.items():
        if name not in _NOT_SETTINGS:
            yield name, parameter.default, getattr(callback, name)


def _in_words(name: str, value: Any) -> str:
    return str(value) if name == "schedule" else repr(value)


def _loggable(value: Any) -> bool | int | float | str:
    """Return a value that every logger can store; modules, functions and schedules as text."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, nn.Module):
        return shown(value)
    if isinstance(value, Mapping):
        return str({_loggable(key): _loggable(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return str([_loggable(item) for item in value])
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
