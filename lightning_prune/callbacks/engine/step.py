"""Lets a step of a module run where nothing may come of it: no logs, no metrics; knows no structure."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_prune.callbacks.engine.packages import overrides
from lightning_prune.model.calls import Instead, tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import check_choice

__all__ = [
    "Traced", "call_silently", "call_step", "copied", "check_traced", "instead_of_forward", "refuse_step", "silent",
]  # fmt: skip

Traced = Literal["forward", "training_step", "validation_step"]
"""What of a module is traced, counted and verified."""


def check_traced(where: str, traced: str, example_inputs: Any) -> None:
    """Refuse what no module has, and inputs of forward where forward is not run.

    Raises:
        ValueError: Saying what is allowed.
    """
    check_choice(where, "trace", traced, get_args(Traced))
    if traced != "forward" and example_inputs is not None:
        raise ValueError(
            f"{where}(trace={traced!r}): the step runs on the first training batch; example_inputs are for forward. "
            "Leave one of them out."
        )


def refuse_step(where: str, traced: Traced, pl_module: LightningModule) -> None:
    """Refuse steps that a module does not have, or that would train it while they are looked at.

    Raises:
        PruningError: Saying what to do.
    """
    if traced == "forward":
        return
    name = type(pl_module).__name__
    if not overrides(pl_module, traced):
        raise PruningError(f"{where}(trace={traced!r}): {name} has no {traced}. Choose a step that it has.")
    if traced == "training_step" and not pl_module.automatic_optimization:
        raise PruningError(
            f"{where}(trace='training_step'): {name} optimizes manually, so its training step trains and cannot be run "
            "to be looked at. Use trace='validation_step', or example_inputs of its forward."
        )


def instead_of_forward(traced: Traced, batch: Any) -> Instead:
    """Return what runs a step on a copy of a batch in place of forward."""
    return Instead({"training_step": training_step, "validation_step": validation_step}[traced], (copied(batch),))


def copied(batch: Any) -> Any:
    """Return a batch with copies of its tensors."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), batch)


# These two have the names of the methods that they call: a trace looks up by it which code runs in train mode.


def training_step(pl_module: LightningModule, batch: Any) -> Any:
    """Return what the training step returns, silently."""
    return _output_of_step(pl_module, "training_step", batch)


def validation_step(pl_module: LightningModule, batch: Any) -> Any:
    """Return what the validation step returns, silently."""
    return _output_of_step(pl_module, "validation_step", batch)


def call_silently(pl_module: LightningModule, name: str, batch: Any) -> Any:
    """Call a step, silently, on containers that it may change."""
    with silent(pl_module):
        return call_step(pl_module, name, pytree.tree_map(lambda value: value, batch))


def _output_of_step(pl_module: LightningModule, name: str, batch: Any) -> Any:
    """Return what a step returns, silently.

    Raises:
        PruningError: If that holds no tensor, so that a trace would end nowhere.
    """
    found = call_silently(pl_module, name, batch)
    if next(tensors_in(found), None) is None:
        raise PruningError(
            f"{type(pl_module).__name__}.{name} returned {found!r}; what it computes is found by what it returns. "
            "Let it return its loss, or another tensor."
        )
    return found


def call_step(pl_module: LightningModule, name: str, batch: Any) -> Any:
    """Call a step on a batch, the first of its epoch, as Lightning does."""
    step = getattr(pl_module, name)
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)  # as Lightning asks
    return step(*((batch, 0) if takes_index else (batch,)))


@contextmanager
def silent(pl_module: LightningModule) -> Iterator[None]:
    """Silence what the body runs: it logs nothing, to no logger, and counts in no metric."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    states = [{name: getattr(metric, name) for name in metric._defaults} for metric in metrics]
    counts = [(metric._update_count, metric._computed) for metric in metrics]
    logs = {name: vars(pl_module).get(name) for name in ("log", "log_dict")}
    trainer = pl_module._trainer
    loggers = [] if trainer is None else trainer.loggers
    try:
        for metric, state in zip(metrics, states, strict=True):  # which hash by them: its own come back at the end
            for name, value in state.items():
                setattr(metric, name, copy.deepcopy(value))
        vars(pl_module).update(dict.fromkeys(logs, _say_nothing))
        if trainer is not None:
            trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for name, value in logs.items():
            vars(pl_module).pop(name) if value is None else vars(pl_module).update({name: value})
        for metric, state, (updates, computed) in zip(metrics, states, counts, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = updates, computed


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``."""
