"""Makes, for the commands, the model, trainer and data of a run, from the YAML it is trained with or an import path."""

from __future__ import annotations

import argparse
import pkgutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_prune.callbacks.validation import inputs_from_validation
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.model.errors import PruningError
from lightning_prune.surgery.loading import load_state_dict_

__all__ = [
    "RUN", "add_model_options", "add_run_options", "load_run", "load_weights_", "model_and_inputs", "saved_weights",
]  # fmt: skip

RUN = """\
--config is the YAML that you train with by LightningCLI, or the config.yaml that a run left in its log folder. Where
your script names the classes, LightningCLI(MyModel, MyData), name them here, too: --model_class my_script.MyModel
--data_class my_script.MyData. Modules are looked up from the current folder. All that LightningCLI takes may follow,
such as --trainer.limit_val_batches 10, --trainer.accelerator cpu or --data.batch_size 512. Callbacks and loggers of
the config are left out, and one device is used.
"""
_SWITCHED_OFF = {
    "callbacks": None,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
}


def add_run_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add what says of which run a command is."""
    parser.add_argument("--config", type=Path, required=required, help="YAML of LightningCLI")
    parser.add_argument("--model_class", help="import path of the module's class, where the YAML does not say it")
    parser.add_argument("--data_class", help="import path of the datamodule's class, likewise")
    parser.add_argument("--ckpt_path", type=Path, help="weights, of a pruned run, too; else as initialised")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how to make a model where there is no run."""
    parser.add_argument("--model", help="import path of what makes the model")
    parser.add_argument("--input_shape", type=_shape, help="shape of one input, such as 1,3,32,32")


def model_and_inputs(options: argparse.Namespace, rest: list[str]) -> tuple[nn.Module, ExampleInputs]:
    """Make the model that --config or --model names, as initialised, and inputs to run it on."""
    if (options.config is None) == (options.model is None):
        raise PruningError("give either --config or --model.")
    if options.config is not None:
        trainer, module, datamodule = load_run(options, ["--trainer.limit_val_batches=1", *rest])
        return module, _random(options) if options.input_shape else inputs_from_validation(trainer, module, datamodule)
    if options.input_shape is None:
        raise PruningError("--model needs --input_shape, such as 1,3,32,32, to run the model on.")
    return _made(options.model, rest, options.command), _random(options)


def load_run(
    options: argparse.Namespace, rest: list[str]
) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
    """Make trainer, module, as initialised, and data as LightningCLI does from the same YAML."""
    from lightning.pytorch.cli import LightningCLI

    settings = _settings(options, rest)
    model_class, data_class = (given and _imported(given) for given in (options.model_class, options.data_class))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        made = LightningCLI(
            model_class, data_class, save_config_callback=None, run=False, auto_configure_optimizers=False,
            args=["--config", yaml.safe_dump(settings), *rest],
        )  # fmt: skip
    return made.trainer, made.model, getattr(made, "datamodule", None)


def saved_weights(path: Path) -> Any:
    """Return the state dict of a checkpoint, or the one that is saved alone."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes make of torch's reader
        raise PruningError(f"{path} cannot be read by torch.load: {str(error).partition(chr(10))[0]}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        raise PruningError(f"{path} holds {type(state).__name__}, not a state dict.")
    return state


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint into a model, which takes their shapes."""
    load_state_dict_(model, saved_weights(path))


def _settings(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Read from the YAML what makes model, trainer and data; refuse one that does not say what to make."""
    found = yaml.safe_load(options.config.read_text()) or {}
    found = found.get("fit") or found  # files may hold the arguments of each of LightningCLI's own commands
    settings = {
        part: found[part] for part in ("seed_everything", "trainer", "model", "data") if found.get(part) is not None
    }
    settings["trainer"] = settings.get("trainer", {}) | _SWITCHED_OFF
    for part, given in (("model", options.model_class), ("data", options.data_class)):
        if given is None and isinstance(settings.get(part), dict) and "class_path" not in settings[part]:
            raise PruningError(
                f"{options.config} gives arguments for {part}, not its class. Name the class that your script names: "
                f"--{part}_class my_script.MyClass."
            )
    if options.model_class is None and "model" not in settings and not any(a.startswith("--model") for a in rest):
        raise PruningError(
            f"{options.config} says nothing of the model. Name the class that your script names: "
            "--model_class my_script.MyModel."
        )
    return settings


def _imported(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise PruningError(
            f"{path} cannot be imported ({error}); modules are looked up from the current folder."
        ) from error


def _made(path: str, rest: list[str], command: str) -> nn.Module:
    """Make a model from the import path of a class or function, and its arguments."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"lightning-prune {command}")
    parser.add_argument("--model", type=nn.Module, required=True)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    return instantiate(parser.parse_args([f"--model={path}", *rest])).model  # type: ignore[no-any-return]


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write sizes as 1,3,32,32") from error


def _random(options: argparse.Namespace) -> ExampleInputs:
    return torch.randn(options.input_shape, generator=torch.Generator().manual_seed(0))
