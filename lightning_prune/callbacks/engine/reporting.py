"""Shows the history of a run when it ends: in the terminal, and as files where each logger keeps its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_prune.callbacks.engine.packages import callbacks_named, is_a
from lightning_prune.reports import History, draw_run, files_of_run, headline, run_tables, write_run

__all__ = ["comparing_checkpoints", "guarded", "log_left", "new_metrics", "report"]


@contextmanager
def guarded(failed: str) -> Iterator[None]:
    """Warn of what fails in the body and go on: a run that has ended shall not be lost for its report."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{failed}: {error!r}")


def new_metrics(trainer: Trainer, before: Mapping[str, Any]) -> dict[str, float]:
    """Return what was logged since ``before`` was read, but for what our callbacks log."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if value is not before.get(name) and not name.startswith("prune/")
    }


def comparing_checkpoints(trainer: Trainer) -> list[Any]:
    """Return the trainer's ModelCheckpoints, of either package, that keep the best by a metric at any size."""
    checkpoints = callbacks_named(trainer, "ModelCheckpoint")
    return [each for each in checkpoints if each.monitor is not None and not is_a(each, "PruningCheckpoint")]


def log_left(trainer: Trainer, history: History) -> None:
    """Log what is left where the last log does not say it."""
    for logger in trainer.loggers:
        with guarded(f"What is left could not be logged to {type(logger).__name__}"):
            logger.log_metrics(history.left, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def report(trainer: Trainer, history: History, tables: bool = True) -> None:
    """Print the tables of a run, and hand each logger the same as files: ``pruning.html``, ``.png`` and ``.json``.

    Above an error of the user's no tables are printed.
    """
    console = Console(markup=False)  # names of modules and metrics may hold brackets
    with guarded("The tables of the pruning could not be printed"):
        if tables:
            for shown in (*headline(history), *run_tables(history)):
                console.print(shown, soft_wrap=isinstance(shown, str), highlight=False)
    for logger in trainer.loggers:
        with guarded(
            f"The report of the pruning could not be handed to {type(logger).__name__}"
        ):  # by a full disk, for example
            written = _way_of(logger)(logger, history)
            if written:
                console.print(f"Report of the pruning: {written}", soft_wrap=True)


def _folder_of(logger: Any) -> str | None:
    """Return the folder or URL where a logger writes, beside the checkpoints of its run, if it writes to one."""
    folder = getattr(logger, "log_dir", None)
    if folder is not None:
        return str(folder)
    if logger.save_dir is None:
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(str(logger.save_dir), str(logger.name), version)


def _to_folder(logger: Any, history: History) -> str | None:
    """Write to where the logger writes, remote folders included; a logger without a folder gets nothing."""
    folder = _folder_of(logger)
    if folder is None:
        return None
    system = get_filesystem(folder)
    system.makedirs(folder, exist_ok=True)
    for name, content in files_of_run(history).items():
        with system.open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    return os.path.join(folder, "pruning.html")


def _to_tensorboard(logger: Any, history: History) -> str | None:
    written = _to_folder(logger, history)
    try:
        figure = draw_run(history)
    except ModuleNotFoundError:
        return written
    logger.experiment.add_figure("prune/report", figure, history.moments[-1].step)
    return written


def _to_wandb(logger: Any, history: History) -> str:
    name = f"pruning-{logger.version}"
    with TemporaryDirectory() as folder:
        files = write_run(history, folder)
        logger.experiment.log_artifact(folder, name=name, type="report")
        pictures = [str(path) for path in files if path.suffix == ".png"]
        if pictures:
            logger.log_image("prune/report", pictures)
    return f"artifact {name} of the run in W&B"


def _to_mlflow(logger: Any, history: History) -> str | None:
    if not getattr(logger, "_log_model", True):  # the user wants no artifacts in the store
        return _to_folder(logger, history)
    with TemporaryDirectory() as folder:
        write_run(history, folder)
        logger.experiment.log_artifacts(logger.run_id, folder, "pruning")
    return f"artifacts of run {logger.run_id} in MLflow, under pruning/"


_WAYS: dict[str, Callable[[Any, History], str | None]] = {
    "TensorBoardLogger": _to_tensorboard,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
}


def _way_of(logger: Any) -> Callable[[Any, History], str | None]:
    """Compare by name, since ``lightning`` and ``pytorch_lightning`` have classes of their own."""
    return next((_WAYS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in _WAYS), _to_folder)
