"""Asks a Trainer what a module is worth: sensitivity analysis by ``trainer.validate``; knows no command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_prune.analysis.layer_sensitivity import TENTHS, sensitivity
from lightning_prune.analysis.sensitivity_findings import Mode, Sensitivity
from lightning_prune.analysis.weight_sensitivity import weight_sensitivity
from lightning_prune.callbacks.engine.example_inputs import batch_as_inputs, on_device_of
from lightning_prune.callbacks.engine.packages import is_a
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Modules, Parameters, Parts
from lightning_prune.pruning.scoring import Criterion
from lightning_prune.pruning.weights import WeightCriterion
from lightning_prune.reports.metric_mode import mode_by_name

__all__ = ["inputs_from_validation", "trainer_sensitivity", "trainer_weight_sensitivity"]


def trainer_sensitivity(
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule | Iterable[Any] | None = None,
    *,
    metric: str,
    mode: Mode | None = None,
    example_inputs: ExampleInputs | None = None,
    shares: Sequence[float] = TENTHS,
    criterion: Criterion = "l1",
    module: Parts = None,
    ignore: Modules = (),
    done: Sensitivity | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Run :func:`~lightning_prune.sensitivity` with a metric of ``trainer.validate``.

    The trainer's loggers, progress bar, checkpoints and pruning callbacks rest meanwhile.

    Args:
        trainer: What validates.
        model: The model.
        data: A datamodule, or what else ``trainer.validate`` takes, unless the module has its own.
        metric: Name under which the module logs the metric in validation.
        mode: ``"max"`` where a higher metric is better, ``"min"`` where a lower one is; by default ``"min"`` for names
            of losses and errors.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. By default the module's
            ``example_input_array``, else one example of the first validation batch.
        shares: Fractions of a group's units that leave.
        criterion: Name of a criterion, or a function from a weight ``(out, ...)`` to one score per filter ``(out,)``;
            higher is kept longer.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of module paths, or modules, whose channels are not pruned.
        done: What an earlier call returned or wrote.
        path: A JSON file, written anew after each group.
        progress: Whether to show progress bars.

    Raises:
        PruningError: If validation logs no such metric, or as :func:`~lightning_prune.sensitivity` does.
    """
    mode = mode_by_name(metric) if mode is None else mode
    with _quiet(trainer):
        found = inputs_from_validation(trainer, model, data)
        _logged(trainer, metric)
        return sensitivity(
            model,
            found if example_inputs is None else on_device_of(trainer, model, example_inputs),
            _by_validation(trainer, data, metric),
            shares=shares,
            metric=metric,
            mode=mode,
            criterion=criterion,
            module=module,
            ignore=ignore,
            done=done,
            path=path if trainer.is_global_zero else None,
            progress=progress and trainer.is_global_zero,
        )


def trainer_weight_sensitivity(
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule | Iterable[Any] | None = None,
    *,
    metric: str,
    mode: Mode | None = None,
    shares: Sequence[float] = TENTHS,
    criterion: WeightCriterion = "magnitude",
    module: Parts = None,
    ignore: Parameters = (),
    parameters: Parameters | None = None,
    done: Sensitivity | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Run ``weight_sensitivity`` with a metric of ``trainer.validate``.

    The trainer's loggers, progress bar, checkpoints and pruning callbacks rest meanwhile.

    Args:
        trainer: What validates.
        model: The model.
        data: A datamodule, or what else ``trainer.validate`` takes, unless the module has its own.
        metric: Name under which the module logs the metric in validation.
        mode: ``"max"`` where a higher metric is better, ``"min"`` where a lower one is; by default ``"min"`` for names
            of losses and errors.
        shares: Fractions of a weight's entries that are zeroed.
        criterion: Name of a criterion, or a function from a weight to one score for each of its entries; higher is kept
            longer.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers.
        done: What an earlier call returned or wrote.
        path: A JSON file, written anew after each weight.
        progress: Whether to show progress bars.

    Raises:
        PruningError: If validation logs no such metric, or as ``weight_sensitivity`` does.
    """
    mode = mode_by_name(metric) if mode is None else mode
    with _quiet(trainer):
        evaluate = _by_validation(trainer, data, metric)
        evaluate(model)  # so that the model lies where it is evaluated
        return weight_sensitivity(
            model,
            evaluate,
            shares=shares,
            metric=metric,
            mode=mode,
            criterion=criterion,
            module=module,
            parameters=parameters,
            ignore=ignore,
            done=done,
            path=path if trainer.is_global_zero else None,
            progress=progress and trainer.is_global_zero,
        )


def _by_validation(trainer: Trainer, data: Any, metric: str) -> Callable[[nn.Module], float]:
    def evaluate(module: nn.Module) -> float:
        _validate(trainer, module, data)  # type: ignore[arg-type]  # called on the module alone
        return _logged(trainer, metric)

    return evaluate


def inputs_from_validation(
    trainer: Trainer, model: LightningModule, data: LightningDataModule | Iterable[Any] | None = None
) -> ExampleInputs:
    """Validate once, and return inputs of ``forward``: ``example_input_array``, or one example of the first batch."""
    seen, callbacks = _FirstBatch(), _callbacks(trainer)
    callbacks.append(seen)
    try:
        _validate(trainer, model, data)
    finally:
        callbacks.remove(seen)
    own: ExampleInputs | None = model.example_input_array
    if own is None and seen.batch is None:
        raise PruningError(
            f"validation of {type(model).__name__} had no batch to take inputs from. Give it data, and "
            "limit_val_batches above 0."
        )
    if own is None:
        _, own = batch_as_inputs(model, on_device_of(trainer, model, seen.batch))
    return on_device_of(trainer, model, own)


def _validate(trainer: Trainer, model: LightningModule, data: Any) -> None:
    """Validate without a table of the metrics.

    Raises:
        PruningError: If there is nothing to validate with.
    """
    try:
        trainer.validate(model, dataloaders=data, verbose=False)
    except Exception as error:
        if not is_a(error, "MisconfigurationException"):
            raise
        raise PruningError(
            f"{type(model).__name__} cannot be validated: {error}. Give it validation_step and val_dataloader, or a "
            "datamodule that has one; on the command line, --data_class names its class."
        ) from error


_RESTING = ("ProgressBar", "Checkpoint", "ModelSummary")


class _FirstBatch(Callback):
    """Keeps the first batch as the module got it."""

    batch: Any = None

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        if self.batch is None:
            self.batch = batch


def _logged(trainer: Trainer, metric: str) -> float:
    names = sorted(trainer.callback_metrics)
    if metric not in names:
        near = difflib.get_close_matches(metric, names, n=1)
        raise PruningError(
            f"metric={metric!r}: validation logs {', '.join(names) or 'nothing'}."
            + (f" Did you mean {near[0]!r}?" if near else " Choose one of these, or log it in validation_step.")
        )
    return float(trainer.callback_metrics[metric])


@contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    """Validate without writing to loggers, terminal or disk."""
    callbacks, loggers = _callbacks(trainer), trainer.loggers
    everything = list(callbacks)
    callbacks[:] = [callback for callback in everything if not _rests(callback)]
    trainer.loggers = []
    try:
        yield
    finally:
        callbacks[:], trainer.loggers = everything, loggers


def _rests(callback: Callback) -> bool:
    return isinstance(callback, PruningCallback) or is_a(callback, *_RESTING)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # a part of the Trainer gives it the attribute
