"""The command ``lightning-prune``: reads the command line and prints; what it calls knows the rest."""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import nn

from lightning_prune.arguments import budget_by_group, check_arguments, with_ignored
from lightning_prune.budget import Budget
from lightning_prune.errors import PruningError
from lightning_prune.export.sparse import save_sparse
from lightning_prune.inputs import ExampleInputs
from lightning_prune.reports import (
    draw_sensitivity,
    group_costs,
    group_table,
    import_matplotlib,
    pinned_table,
    room_table,
    sensitivity_table,
    stored_table,
)
from lightning_prune.scoring import CRITERIA
from lightning_prune.sensitivity.filters import TENTHS
from lightning_prune.sensitivity.findings import Sensitivity, amount_paths
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery import take_shapes_
from lightning_prune.validation import inputs_from_validation, trainer_sensitivity, trainer_weight_sensitivity

__all__ = ["main"]

_RUN = """\
--config is the YAML that you train with by LightningCLI, or the config.yaml that a run left in its log folder. Where
your script names the classes, LightningCLI(MyModel, MyData), name them here, too: --model_class my_script.MyModel
--data_class my_script.MyData. Modules are looked up from the current folder. All that LightningCLI takes may follow,
such as --trainer.limit_val_batches 10, --trainer.accelerator cpu or --data.batch_size 512. Callbacks and loggers of
the config are left out, and one device is used.
"""
_SENSITIVITY = f"""\
Cut each channel group alone by several shares, validate, take the cut back.

Nothing is retrained, and each cut is the real one. Writes sensitivity.json (a stopped run goes on from it),
sensitivity.png and amounts.yaml (ready for a pruning callback's init_args) into --out.

{_RUN}
example:
  lightning-prune sensitivity --config run.yaml --ckpt_path best.ckpt --metric val_acc --drop 0.01 --out sensitivity
"""
_INSPECT = f"""\
Show which channels can be cut, what they cost, which stay and why.

Nothing is cut. Give --config (a run), or --model (any class or function that makes a torch.nn.Module; its arguments
follow as --model.width 64) with --input_shape.

{_RUN}
examples:
  lightning-prune inspect --config run.yaml
  lightning-prune inspect --model torchvision.models.resnet18 --input_shape 1,3,224,224
"""
_EXPORT = """\
Store the weights of a checkpoint, or of a state dict, compactly.

--sparse keeps of every tensor that is mostly zero the entries that are left, in a safetensors file without any code,
and prints the bytes before and after. lightning_prune.load_sparse_(model, path) loads it into the original class.

example:
  lightning-prune export --sparse --ckpt_path last.ckpt --out model.safetensors
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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options, rest = _parser().parse_known_args(args)
    sys.path.insert(0, os.getcwd())
    try:
        options.run(options, rest)
    except PruningError as error:
        sys.exit(f"lightning-prune {options.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-prune", description="Look at a model before pruning it.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, run, told in (("sensitivity", _sensitivity, _SENSITIVITY), ("inspect", _inspect, _INSPECT)):
        command = commands.add_parser(
            name, help=told.partition("\n")[0], description=told, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("--config", type=Path, required=name == "sensitivity", help="YAML of LightningCLI")
        command.add_argument("--model_class", help="import path of the module's class, where the YAML does not say it")
        command.add_argument("--data_class", help="import path of the datamodule's class, likewise")
        command.add_argument("--ckpt_path", type=Path, help="weights, of a pruned run, too; else as initialised")
        command.add_argument("--ignore", nargs="+", default=[], help="patterns of modules whose channels stay")
    export = commands.add_parser(
        "export", help=_EXPORT.partition("\n")[0], description=_EXPORT, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    export.set_defaults(run=_export)
    export.add_argument("--sparse", action="store_true", required=True, help="leave out what is zero")
    export.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of Lightning, or a saved state dict")
    export.add_argument("--out", type=Path, required=True, help="the file, such as model.safetensors")
    sensitivity, inspect = (commands.choices[name] for name in ("sensitivity", "inspect"))
    named = [name for name, criterion in CRITERIA.items() if not criterion.needs]
    add = sensitivity.add_argument
    add("--metric", required=True, help="name under which validation logs the metric")
    add("--mode", choices=("max", "min"), help="which is better; by default min if the name says loss or error")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--drop", type=float, default=0.01, help="how much worse the metric may be (default: 0.01)")
    add("--shares", type=float, nargs="+", default=TENTHS, help="shares that leave (default: 0.1 0.2 ... 0.9)")
    add("--weights", action="store_true", help="zero single weights, layer by layer, instead of cutting channels")
    add(
        "--criterion", choices=[*named, "magnitude"],
        help="what says which leave first (default: l1; with --weights: magnitude, or random)",
    )  # fmt: skip
    add = inspect.add_argument
    add("--model", help="import path of what makes the model")
    add("--input_shape", type=_shape, help="shape of one input, such as 1,3,32,32")
    add("--min_width", type=yaml.safe_load, default=1, help="units that stay, such as 8 or '{\"layer1*\": 8}'")
    add("--max_amount", type=yaml.safe_load, default=1.0, help="largest fraction of a layer that may leave, likewise")
    add("--round_to", type=int, default=1, help="widths are multiples of this")
    add("--yaml", action="store_true", help="print nothing but a block for amount=, to be filled in")
    return parser


def _sensitivity(options: argparse.Namespace, rest: list[str]) -> None:
    """Measure, write the files, print the table."""
    import_matplotlib()  # what is missing is told before hours are spent
    trainer, model, datamodule = _load(options, rest)
    results = options.out / "sensitivity.json"
    if (options.criterion or "random") not in (("magnitude", "random") if options.weights else CRITERIA):
        raise PruningError(
            f"--criterion {options.criterion} scores {'units' if options.weights else 'single weights'}."
        )
    analyse: Any = trainer_weight_sensitivity if options.weights else trainer_sensitivity
    found = analyse(
        trainer, model, datamodule, metric=options.metric, mode=options.mode, shares=options.shares,
        criterion=options.criterion or ("magnitude" if options.weights else "l1"), ignore=options.ignore, path=results,
        done=Sensitivity.from_json(results) if results.exists() else None,
    )  # fmt: skip
    found.to_json(results)
    draw_sensitivity(found, options.out / "sensitivity.png")
    found.to_yaml(options.out / "amounts.yaml", options.drop)
    console = Console()
    console.print(sensitivity_table(found, options.drop))
    console.print(f"Written: {results}, sensitivity.png and amounts.yaml beside it.", soft_wrap=True)


def _inspect(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the channel groups and what stays."""
    if (options.config is None) == (options.model is None):
        raise PruningError("give either --config or --model.")
    try:
        check_arguments(
            "inspect", 0.0, "l1", "filters", "layer", options.round_to, options.min_width, options.max_amount
        )
    except ValueError as error:
        raise PruningError(str(error)) from error
    model: nn.Module
    if options.config is not None:
        trainer, module, datamodule = _load(options, ["--trainer.limit_val_batches=1", *rest])
        inputs = _inputs(options) if options.input_shape else inputs_from_validation(trainer, module, datamodule)
        model = module
    else:
        if options.input_shape is None:
            raise PruningError("--model needs --input_shape, such as 1,3,32,32, to run the model on.")
        model, inputs = _made(options.model, rest), _inputs(options)
        if options.ckpt_path is not None:
            _load_weights_(model, options.ckpt_path)
    structure = with_ignored(model, find_structure(trace(model, inputs)), options.ignore)
    limits = Budget(round_to=options.round_to, min_width=options.min_width, max_amount=options.max_amount)
    budget = budget_by_group(structure, limits)
    costs, console = group_costs(model, structure), Console()
    if options.yaml:
        paths = amount_paths({name: group.producers for name, group in structure.groups.items()})
        lines = {
            path: f"  {json.dumps(path)}: 0.0  # of {structure.groups[name].width} units"
            for name, path in paths.items()
        }
        console.out("amount:", *lines.values(), sep="\n", highlight=False)
        return
    console.print(group_table(structure, costs))
    console.print(room_table(model, structure, budget))
    if structure.pinned:
        console.print(pinned_table(structure))


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    """Write the compact file and print what it saves."""
    if rest:
        raise PruningError(f"unknown arguments: {' '.join(rest)}.")
    report = save_sparse(_saved_weights(options.ckpt_path), options.out)
    console = Console()
    console.print(stored_table(report))
    source = options.ckpt_path.stat().st_size
    console.print(
        f"Written: {options.out}, {report.bytes_after:,} bytes; the weights alone were {report.bytes_before:,}, "
        f"{options.ckpt_path} is {source:,}.", soft_wrap=True,
    )  # fmt: skip


def _load(options: argparse.Namespace, rest: list[str]) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
    """Make trainer, module and data as LightningCLI does from the same YAML."""
    from lightning.pytorch.cli import LightningCLI

    found = yaml.safe_load(options.config.read_text()) or {}
    found = found.get("fit") or found  # files may hold the arguments of each of LightningCLI's own commands
    settings = {part: found[part] for part in ("seed_everything", "trainer", "model", "data") if part in found}
    settings["trainer"] = (settings.get("trainer") or {}) | _SWITCHED_OFF
    for part, given in (("model", options.model_class), ("data", options.data_class)):
        if given is None and isinstance(settings.get(part), dict) and "class_path" not in settings[part]:
            raise PruningError(
                f"{options.config} gives arguments for {part}, not its class. Name the class that your script names: "
                f"--{part}_class my_script.MyClass."
            )
    model_class, data_class = (given and _imported(given) for given in (options.model_class, options.data_class))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        made = LightningCLI(
            model_class, data_class, save_config_callback=None, run=False, auto_configure_optimizers=False,
            args=["--config", yaml.safe_dump(settings), *rest],
        )  # fmt: skip
    if options.ckpt_path is not None:
        _load_weights_(made.model, options.ckpt_path)
    return made.trainer, made.model, getattr(made, "datamodule", None)


def _imported(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise PruningError(
            f"{path} cannot be imported ({error}); modules are looked up from the current folder."
        ) from error


def _made(path: str, rest: list[str]) -> nn.Module:
    """Make a model from the import path of a class or function, and its arguments."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-prune inspect")
    parser.add_argument("--model", type=nn.Module, required=True)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    return instantiate(parser.parse_args([f"--model={path}", *rest])).model  # type: ignore[no-any-return]


def _saved_weights(path: Path) -> Any:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint.get("state_dict", checkpoint)


def _load_weights_(model: nn.Module, path: Path) -> None:
    state = _saved_weights(path)
    take_shapes_(model, state, "", getattr(state, "_metadata", {}).get("", {}))
    model.load_state_dict(state)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _inputs(options: argparse.Namespace) -> ExampleInputs:
    return torch.randn(options.input_shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
