"""Lets a step of a module run where nothing may come of it: no logs, no metrics, no training; knows no structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_prune.callbacks.engine.packages import overrides
from lightning_prune.model.calls import Instead, tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import check_choice

__all__ = [
    "Traced", "call_silently", "call_step", "call_with_hooks", "copied", "check_traced", "has_hooks",
    "instead_of_forward", "refuse_step", "silent",
]  # fmt: skip

Traced = Literal["forward", "training_step", "validation_step"]
"""What of a module is traced, counted and verified."""
_HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_train_batch_end")


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
    """Call a step, silently, on containers that it may change; what optimizes manually trains nothing."""
    with silent(pl_module), _standing_still(pl_module):
        return call_step(pl_module, name, pytree.tree_map(lambda value: value, batch))


def call_with_hooks(pl_module: LightningModule, batch: Any, strict: bool = True) -> Any:
    """Call the training step, silently, between the hooks of the module that may write its parameters.

    Args:
        pl_module: The module.
        batch: A training batch.
        strict: Whether to raise what hooks raise, such as those that read what was logged.
    """
    batch = pytree.tree_map(lambda value: value, batch)
    with silent(pl_module), _standing_still(pl_module):
        _call_hook(pl_module, strict, "on_train_batch_start", batch, 0)
        found = call_step(pl_module, "training_step", batch)
        for optimizer in pl_module.trainer.optimizers if pl_module.automatic_optimization else ():
            _call_hook(pl_module, strict, "on_before_zero_grad", optimizer)
        outputs = {"loss": found} if isinstance(found, Tensor) else dict(found or {})
        if isinstance(outputs.get("loss"), Tensor):
            outputs["loss"] = outputs["loss"].detach()  # as Lightning hands it on
        _call_hook(pl_module, strict, "on_train_batch_end", outputs, batch, 0)
        return found


def has_hooks(pl_module: LightningModule) -> bool:
    """Return whether a module has hooks of its own around a training step, which may write its parameters."""
    return any(overrides(pl_module, name) for name in _HOOKS)


def _call_hook(pl_module: LightningModule, strict: bool, name: str, *args: Any) -> None:
    if overrides(pl_module, name):
        with nullcontext() if strict else suppress(Exception):
            getattr(pl_module, name)(*args)


def _output_of_step(pl_module: LightningModule, name: str, batch: Any) -> Any:
    """Return what a step returns, silently.

    Raises:
        PruningError: If that holds no tensor, so that a trace would end nowhere.
    """
    if name == "training_step" and has_hooks(pl_module):
        found = call_with_hooks(pl_module, batch, strict=False)
    else:
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
    trainer = pl_module._trainer
    loggers = [] if trainer is None else trainer.loggers
    try:
        for metric, state in zip(metrics, states, strict=True):  # which hash by them: its own come back at the end
            for name, value in state.items():
                setattr(metric, name, copy.deepcopy(value))
        if trainer is not None:
            trainer.loggers = [DummyLogger() for _ in loggers]
        with _instead(pl_module, log=_do_nothing, log_dict=_do_nothing):
            yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for metric, state, (updates, computed) in zip(metrics, states, counts, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = updates, computed


@contextmanager
def _standing_still(pl_module: LightningModule) -> Iterator[None]:
    """Hold optimizers and schedules of a run still while the body calls a step, or hooks, that may step them.

    What steps are given as a closure runs, so that all their code does.
    """
    trainer = pl_module._trainer
    if trainer is None:
        yield
        return
    # to optimizers lead two ways: Lightning's own, by the strategy, and theirs
    strategy: Any = trainer.strategy
    with ExitStack() as stack:
        stack.enter_context(_instead(strategy, backward=_do_nothing, optimizer_step=_run_closure))
        for optimizer in trainer.optimizers:
            stack.enter_context(_instead(optimizer, step=partial(_run_closure, optimizer)))
        for config in trainer.lr_scheduler_configs:
            stack.enter_context(_instead(config.scheduler, step=_do_nothing))
        yield


@contextmanager
def _instead(owner: Any, **attributes: Any) -> Iterator[None]:
    """Put others in place of attributes of an object for the length of the body."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes.keys() - before.keys():
            del own[name]
        own.update(before)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``, and for what trains."""


def _run_closure(optimizer: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a step of an optimizer."""
    return None if closure is None else closure()
