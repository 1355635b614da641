"""What is called in a run of Lightning's: callbacks, checkpoints and commands, as in ``functions.py``."""

import inspect
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

import lightning_prune
from lightning_prune import FilterL1Pruning, FilterPruning, OBSOneShot, TaylorFilterPruning, callbacks, cli
from lightning_prune.algorithms.solvers import SOLVERS
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.callbacks.taylor_filter import TaylorFilterPruning as Taylor
from lightning_prune.pruning.scoring import CRITERIA
from tests import runs
from tests.simulated_device.accelerator import DEVICE, Accelerator
from tests.simulated_device.functions import Entry, looks_of
from tests.simulated_device.nets import Data, Net, Normed, Rich

NETS = {"ExpertPruning": Rich, "LayerPruning": Rich, "LearningRateRewinding": Rich, "bn_scale": Normed}
"""Callbacks and criteria that the usual network has nothing for: on it they are refused, on every device alike."""

REQUIRED = {"monitor": "val_loss", "drop": 100.0}
"""A value for each argument that some callback cannot do without."""


def entries() -> dict[str, Entry]:
    """Every entry by name. Registries are enumerated, so that what is added to them is covered."""
    found: dict[str, Entry] = {}
    for name in callbacks.__all__:
        found[f"callback {name}"] = partial(_fitted, getattr(callbacks, name))
    for criterion in CRITERIA:
        found[f"callback FilterPruning({criterion})"] = partial(_fitted, FilterPruning, criterion=criterion, batches=2)
    for solver in SOLVERS:
        found[f"callback OBSOneShot({solver})"] = partial(_fitted, OBSOneShot, solver=solver, batches=2)
    for form in _choices(Taylor, "form"):
        found[f"callback TaylorFilterPruning({form})"] = partial(_fitted, TaylorFilterPruning, form=form)
    for control in ("reinitialize", "shuffle"):
        found[f"callback IterativeMagnitudePruning({control})"] = partial(
            _fitted, lightning_prune.IterativeMagnitudePruning, control=control, rewind_to=0
        )
    found["callback with repair and recalibration"] = partial(_fitted, FilterPruning, repair=True, recalibrate=2)
    found["callback with layers"] = partial(
        _fitted, FilterL1Pruning, net=Rich, amount=0.5, target="params", layers=True
    )
    found["callback in mixed precision"] = partial(_fitted, TaylorFilterPruning, precision=True)
    found["checkpoints"] = _resumed
    found["public load_from_checkpoint"] = _loaded
    for command in COMMANDS:
        found[f"command {command}"] = partial(_printed, command)
    return found


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Work in a folder inside the block."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _choices(kind: type, argument: str) -> tuple[Any, ...]:
    """Return the values that the annotation of an argument allows."""
    return get_args(inspect.get_annotations(kind.__init__, eval_str=True)[argument])


def trainer(device: str, *others: pl.Callback, **arguments: Any) -> pl.Trainer:
    """A silent trainer on a device."""
    chosen = Accelerator() if device == DEVICE else device
    return runs.trainer(*others, **{"accelerator": chosen, "max_epochs": 2, **arguments})


def _made(kind: type, **arguments: Any) -> list[pl.Callback]:
    """Return a callback, with values for the arguments that it needs, and one that prunes where it does not."""
    names = inspect.signature(kind).parameters
    needed = {name: value for name, value in REQUIRED.items() if name in names}
    callback = kind(**needed, **arguments)
    return [callback] if isinstance(callback, PruningCallback) else [FilterL1Pruning(0.4), callback]


def _fitted(
    kind: type, device: str, precision: bool = False, net: type[pl.LightningModule] = Net, **arguments: Any
) -> Any:
    """Train two epochs, and say what became of the model and of what was logged."""
    plugins = [MixedPrecision("bf16-mixed", DEVICE)] if precision and device == DEVICE else []
    how = {"precision": "bf16-mixed"} if precision and device != DEVICE else {}
    module = runs.net(NETS.get(arguments.get("criterion", kind.__name__), net))
    needed = _made(kind, **arguments)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in needed)
    made = trainer(device, *needed, plugins=plugins, enable_checkpointing=saves, **how)
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        made.fit(module, datamodule=Data())
    logged = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("prune/")}
    return shapes_of(module) if precision else looks_of(module), logged


def shapes_of(module: torch.nn.Module) -> list[list[int]]:
    return [list(parameter.shape) for parameter in module.parameters()]


def _resumed(device: str) -> Any:
    """Train one epoch and save, resume for another, then test the best checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        saving = ModelCheckpoint(folder, filename="best")
        first = trainer(device, FilterL1Pruning(0.5), saving, max_epochs=1, enable_checkpointing=True)
        torch.manual_seed(1)
        first.fit(runs.net(Net), datamodule=Data())
        module = runs.net(Net)
        second = trainer(device, FilterL1Pruning(0.5), max_epochs=2)
        second.fit(module, datamodule=Data(), ckpt_path=saving.best_model_path)
        second.test(module, runs.batches(16), ckpt_path=saving.best_model_path, verbose=False)
    return looks_of(module), {name: float(value) for name, value in second.callback_metrics.items() if "test" in name}


def _loaded(device: str) -> Any:
    """Load a checkpoint of a run, onto its device and without naming one."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(device, FilterL1Pruning(0.5), max_epochs=1)
        torch.manual_seed(1)
        made.fit(runs.net(Net), datamodule=Data())
        path = Path(folder) / "last.ckpt"
        made.save_checkpoint(path)
        there = lightning_prune.load_from_checkpoint(Net, path, map_location=device)
        anywhere = lightning_prune.load_from_checkpoint(Net, path)
    return looks_of(there), looks_of(anywhere), there.device.type == device


def _printed(command: str, device: str) -> Any:
    """Run a command on a run's config and checkpoint, and return what it printed, without measured times."""
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        made = trainer(device, FilterL1Pruning(0.5), max_epochs=1, logger=pl.loggers.CSVLogger("."))
        torch.manual_seed(1)
        made.fit(runs.net(Net), datamodule=Data())
        made.save_checkpoint("last.ckpt")
        where: Any = device
        if device == DEVICE:
            where = {"class_path": f"{Accelerator.__module__}.{Accelerator.__name__}"}
        names = {"model": {"class_path": f"{Net.__module__}.Net"}, "data": {"class_path": f"{Data.__module__}.Data"}}
        Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"accelerator": where}, **names}))
        shown = io.StringIO()
        with redirect_stdout(shown), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for arguments in COMMANDS[command](device):
                cli.main([command, *arguments])
        sizes = sorted(str(path) for path in Path().rglob("*") if path.is_file() and "out" in path.parts)
    return _without_times(shown.getvalue()), sizes


def _without_times(text: str) -> list[str]:
    """Return the words of a text up to where latencies are listed, without numbers and frames of tables."""
    return re.findall(r"[A-Za-z_.]{3,}", text.partition("measured")[0])


COMMANDS: dict[str, Callable[[str], list[list[str]]]] = {
    "inspect": lambda device: [["--config", "run.yaml"], ["--config", "run.yaml", "--ckpt-path", "last.ckpt"]],
    "sensitivity": lambda device: [
        ["--config", "run.yaml", "--metric", "val_acc", "--out", "out", "--shares", "0.5"],
        ["--config", "run.yaml", "--metric", "val_acc", "--out", "out/weights", "--shares", "0.5", "--weights"],
    ],
    "report": lambda device: [
        ["last.ckpt", "--out", "out"],
        ["last.ckpt", "--latency", "--device", device, "--config", "run.yaml", "--batch-sizes", "1"],
    ],
    "export": lambda device: [["--ckpt_path", "last.ckpt", "--out", "out.safetensors"]],
}
"""Command -> the arguments of its calls."""
