"""Model, trainer, data and weights of a run, from its YAML, a checkpoint or an import path, for all commands."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import pkgutil
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_prune.callbacks.validation import inputs_from_validation
from lightning_prune.model.calls import ExampleInputs, run
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.surgery.loading import load_state_dict_

__all__ = [
    "RUN", "add_model_options", "add_run_options", "existing_file", "load_checkpoint", "load_run", "load_weights_",
    "model_and_inputs", "results_folder", "saved_weights", "whole_number",
]  # fmt: skip

RUN = """\
--config is the YAML that you train with by LightningCLI, or the config.yaml in the log folder of a run. If your script
names the classes, as in LightningCLI(MyModel, MyData), name them here, too: --model_class my_script.MyModel
--data_class my_script.MyData. Modules are imported from the current folder. Any option of LightningCLI may follow, such
as --trainer.limit_val_batches 10, --trainer.accelerator cpu or --data.batch_size 512. Callbacks and loggers of the
config are not used, and one device is. Options may be written with dashes or underscores.
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
    """Add the options that name a run."""
    add = parser.add_argument
    add("--config", type=existing_file, required=required, help="YAML of LightningCLI")
    add("--model_class", help="import path of the module's class, if the YAML does not name it")
    add("--data_class", help="import path of the datamodule's class, likewise")
    add("--ckpt_path", type=existing_file, help="checkpoint, also of a pruned model (default: as initialised)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that create a model without a run."""
    add = parser.add_argument
    add("--model", help="import path of a class or function that returns the model")
    add("--input_shape", type=_shape, help="shape of the input, such as 1,3,32,32")
    add("--tokens", type=whole_number, metavar="N", help="size of the vocabulary, if the input is token ids below N")


def model_and_inputs(options: argparse.Namespace, rest: list[str]) -> tuple[nn.Module, ExampleInputs]:
    """Return the model that --config or --model names, as initialised, and inputs to run it on."""
    if (options.config is None) == (options.model is None):
        raise PruningError("give either --config or --model.")
    if options.config is not None:
        trainer, module, datamodule = load_run(options, ["--trainer.limit_val_batches=1", *rest])
        if options.input_shape is not None:
            return module, _random(options)
        return module, inputs_from_validation(trainer, module, datamodule)
    if options.input_shape is None:
        raise PruningError("--model needs --input-shape, such as 1,3,32,32, to run the model.")
    model, inputs = _made(options.model, rest), _random(options)
    _check_runs(model, inputs, options)
    return model, inputs


def load_run(
    options: argparse.Namespace, rest: list[str]
) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
    """Return trainer, module (as initialised) and data, as LightningCLI creates them from the same YAML."""
    _require_jsonargparse()
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningCLI

    settings = _settings(options, rest)
    model_class = options.model_class and _imported(options.model_class)
    data_class = options.data_class and _imported(options.data_class)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            made = LightningCLI(
                model_class, data_class, save_config_callback=None, run=False, auto_configure_optimizers=False,
                args=["--config", yaml.safe_dump(settings), *rest], parser_kwargs={"exit_on_error": False},
            )  # fmt: skip
        except ArgumentError as error:
            raise PruningError(f"{options.config}: {error}") from error
    return made.trainer, made.model, getattr(made, "datamodule", None)


def saved_weights(path: Path) -> Any:
    """Return the state dict of a checkpoint, or of a file that holds only that."""
    checkpoint = load_checkpoint(path)
    return checkpoint.get("state_dict", checkpoint)


def load_checkpoint(path: Path) -> Any:
    """Return the content of a checkpoint.

    Raises:
        PruningError: If the file is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises one of many kinds
        raise PruningError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}). Give a checkpoint of Lightning, "
            "or a state dict that torch.save wrote."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise PruningError(f"{path} holds {type(checkpoint).__name__}, not a checkpoint or state dict.")
    return checkpoint


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a model, whose shapes become those of the checkpoint.

    Raises:
        PruningError: If the checkpoint is of another model.
    """
    try:
        load_state_dict_(model, saved_weights(path))
    except RuntimeError as error:
        raise PruningError(f"{path} does not fit {type(model).__name__}: {error}") from error


def _settings(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Return the parts of the YAML that create model, trainer and data; refuse one that does not name the classes."""
    try:
        found = yaml.safe_load(options.config.read_text()) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise PruningError(f"{options.config} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise PruningError(f"{options.config} holds {type(found).__name__}, not a config of LightningCLI.")
    found = found.get("fit") or found  # files may hold the arguments of each of LightningCLI's own commands
    settings = {}
    for part in ("seed_everything", "trainer", "model", "data"):
        if found.get(part) is not None:
            settings[part] = found[part]
    settings["trainer"] = settings.get("trainer", {}) | _SWITCHED_OFF
    for part, given in (("model", options.model_class), ("data", options.data_class)):
        if given is None and isinstance(settings.get(part), dict) and "class_path" not in settings[part]:
            raise PruningError(
                f"{options.config} gives arguments for {part}, but no class. Name the class that your script names: "
                f"--{part}_class my_script.MyClass."
            )
    if options.model_class is None and "model" not in settings and not any(a.startswith("--model") for a in rest):
        raise PruningError(
            f"{options.config} does not name a model. Name the class that your script names: "
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


def _made(path: str, rest: list[str]) -> nn.Module:
    """Return the model that an import path names: a class or function, called with its arguments, or a model itself."""
    found = _imported(path)
    if isinstance(found, nn.Module) and not rest:
        return found
    if not callable(found) or isinstance(found, nn.Module):
        raise PruningError(f"--model {path}: it is {_kind(found)}. Name a class or a function that returns a model.")
    made = _called(path, found, rest)
    if not isinstance(made, nn.Module):
        raise PruningError(f"--model {path}: it returned {_kind(made)}, not a torch.nn.Module.")
    return made


def _called(path: str, found: Callable[..., Any], rest: list[str]) -> Any:
    """Call a class or function with ``--model.name value`` options; its annotations, if any, tell their types."""
    _require_jsonargparse()
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    if inspect.isclass(found):
        names = parser.add_class_arguments(found, "model", instantiate=False, fail_untyped=False)
    else:
        names = parser.add_function_arguments(found, "model", fail_untyped=False)
    known = ", ".join(f"--{name}" for name in names) or "none"
    try:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
        settings = instantiate(parser.parse_args(rest)).as_dict().get("model", {})
    except ArgumentError as error:
        raise PruningError(f"--model {path}: {error}. Its options: {known}.") from error
    for name, parameter in inspect.signature(found).parameters.items():
        if settings.get(name, 0) is None and parameter.default is inspect.Parameter.empty:
            raise PruningError(f"--model {path} needs --model.{name}. Its options: {known}.")
    try:
        return found(**settings)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}, at {at.filename}:{at.lineno}"
        raise PruningError(f"--model {path}: it cannot be called with {settings} ({said}).") from error


def _kind(found: Any) -> str:
    name = type(found).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _check_runs(model: nn.Module, inputs: ExampleInputs, options: argparse.Namespace) -> None:
    """Run a model on inputs made from --input-shape, so that a wrong shape or kind is reported as such."""
    try:
        if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
            run(model, inputs)  # which gives lazy layers their shapes
        with undisturbed(model):
            run(model, inputs)
    except Exception as error:  # whatever the model raises
        shape = ",".join(map(str, options.input_shape))
        given = f"--input-shape {shape}" + ("" if options.tokens is None else f" --tokens {options.tokens}")
        said = " ".join(str(error).split())
        advice = "Correct the shape."
        if options.tokens is None:
            advice += " If the inputs are token ids, add --tokens N, the size of the vocabulary."
        raise PruningError(
            f"{given}: {type(model).__name__} does not run on such inputs ({type(error).__name__}: {said}). {advice}"
        ) from error


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.strip("()[] ").rstrip(",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write sizes as 1,3,32,32") from error
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each size must be 1 or more")
    return sizes


def whole_number(text: str) -> int:
    """Return a number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def existing_file(text: str) -> Path:
    """Return the path of a file, for argparse, which reports an error if there is none."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist, or is not a file")
    return Path(text)


def results_folder(text: str) -> Path:
    """Return the path of a folder to write to, for argparse, which reports an error if it is a file."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return Path(text)


def _require_jsonargparse() -> None:
    """Refuse to go on without jsonargparse, an optional dependency."""
    if importlib.util.find_spec("jsonargparse") is None:
        raise PruningError("jsonargparse is not installed. Install it: pip install 'lightning-prune[cli]'.")


def _random(options: argparse.Namespace) -> ExampleInputs:
    """Return random inputs: numbers, or token ids if --tokens is given."""
    generator = torch.Generator().manual_seed(0)
    if options.tokens is not None:
        return torch.randint(options.tokens, options.input_shape, generator=generator)
    return torch.randn(options.input_shape, generator=generator)
