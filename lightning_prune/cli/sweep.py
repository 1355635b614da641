"""The command ``sweep``: the same run with several amounts and criteria, one after another."""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

import lightning_prune.callbacks as callbacks
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.cli.report import compare, latest_checkpoint
from lightning_prune.cli.runs import RUN, existing_file, results_folder
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import HISTORY_FILE, History

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = f"""\
Train a run with several amounts, and criteria, one after another, and compare them.

The YAML names one pruning callback, whose amount and criterion are set. Each run has a folder in --out, named like
l1-0.5, with its config, logs, checkpoints and report. Runs that are finished are not trained again, and one that was
stopped goes on from its latest checkpoint. At the end all are compared as by lightning-prune report.

--print prints the commands instead, one a line, for any launcher.

{RUN}
examples:
  lightning-prune sweep --config run.yaml --amounts 0.3 0.5 0.7 --criteria l1 taylor
  lightning-prune sweep --config run.yaml --amounts 0.3 0.5 --script train.py --trainer.max_epochs 10
  lightning-prune sweep --config run.yaml --amounts 0.3 0.5 --print | parallel -j 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--config", type=existing_file, required=True, help="YAML of LightningCLI, with a pruning callback")
    add("--amounts", type=number, nargs="+", required=True, help="amounts to prune, such as 0.3 0.5")
    add("--criteria", nargs="+", default=[], help="criteria of FilterPruning (default: that of the config)")
    add("--script", type=existing_file, help="your script that calls LightningCLI (default: classes from the YAML)")
    add("--model_class", help="import path of the module's class, if neither YAML nor script names it")
    add("--data_class", help="import path of the datamodule's class, likewise")
    add("--metric", help="metric to compare by (default: the first that is no loss)")
    add("--out", type=results_folder, default=Path("sweep"), help="folder of the runs (default: sweep)")
    add("--print", action="store_true", dest="only_print", help="print the commands, and train nothing")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Train what is not trained yet, or print the commands; compare what is finished."""
    console, failed = Console(), []
    settings = _read(options.config)
    folders = []
    choices = list(itertools.product(options.criteria or [None], options.amounts))
    for criterion, amount in choices:
        _with_callback(settings, amount, criterion)  # refuses before any run is trained
    for criterion, amount in choices:
        name = f"{amount:g}" if criterion is None else f"{criterion}-{amount:g}"
        folder = options.out / name
        folders.append(folder)
        own = _with_callback(settings, amount, criterion)
        _log_into_(own, options.out, name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
        command = _command(options, folder, rest)
        if options.only_print:
            print(shlex.join(command))
        elif not _finished(folder):
            console.rule(name)
            (folder / "config.yaml").unlink(missing_ok=True)  # LightningCLI refuses to write over that of a stopped run
            if subprocess.run(command).returncode:
                failed.append(name)
    if options.only_print:
        return
    done = [folder for folder in folders if _finished(folder)]
    if len(done) > 1:
        compare(done, options.out, options.metric, console)
    if failed:
        raise PruningError(f"{', '.join(failed)} failed; what went wrong is above. The same command trains them again.")


def _read(path: Path) -> dict[str, Any]:
    """Return the settings of a run, as arguments of ``fit``."""
    try:
        found = yaml.safe_load(path.read_text()) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise PruningError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise PruningError(f"{path} holds {type(found).__name__}, not a config of LightningCLI.")
    settings: dict[str, Any] = found.get("fit") or found
    return settings


def _with_callback(settings: dict[str, Any], amount: int | float, criterion: str | None) -> dict[str, Any]:
    """Return settings in which the one pruning callback has another amount and criterion."""
    settings = copy.deepcopy(settings)
    given = (settings.get("trainer") or {}).get("callbacks") or []
    entries = [given] if isinstance(given, dict) else given
    found = [entry for entry in entries if _kind(entry) is not None]
    if len(found) != 1:
        raise PruningError(f"The config has {len(found)} pruning callbacks under trainer.callbacks; a sweep needs one.")
    (entry,) = found
    arguments = entry.setdefault("init_args", {})
    arguments["amount"] = amount
    if criterion is not None:
        kind = _kind(entry)
        if "criterion" not in inspect.signature(kind).parameters:  # FilterPruning takes the same, and any criterion
            known = inspect.signature(callbacks.FilterPruning).parameters
            foreign = sorted(arguments.keys() - known)
            if foreign or "round_to" not in inspect.signature(kind).parameters:
                raise PruningError(
                    f"--criteria: {entry['class_path']} has one criterion, and {foreign or 'it'} cannot be passed to "
                    "FilterPruning. Use FilterPruning in the config."
                )
            entry["class_path"] = "lightning_prune.FilterPruning"
        arguments["criterion"] = criterion
    kind, values = _kind(entry), {name: arguments[name] for name in ("amount", "criterion") if name in arguments}
    try:
        kind(**values)
    except (TypeError, ValueError) as error:
        raise PruningError(str(error)) from error
    return settings


def number(text: str) -> int | float:
    """Return a fraction, or a whole number of what is pruned."""
    return int(text) if text.isdecimal() else float(text)


def _kind(entry: Any) -> Any:
    """Return the class of a pruning callback that an entry names, by its short name or import path; else None."""
    if not isinstance(entry, dict):
        return None
    name = str(entry.get("class_path", "")).rpartition(".")[2]
    kind = getattr(callbacks, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, PruningCallback) else None


def _log_into_(settings: dict[str, Any], out: Path, name: str) -> None:
    """Have a run log into its folder, beside the loggers that it has."""
    trainer = settings.setdefault("trainer", {})
    own = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(out), "name": "", "version": name},
    }
    others = trainer.get("logger")
    listed = others if isinstance(others, list) else [others] if isinstance(others, dict) else []
    trainer["logger"] = [own, *listed]


def _command(options: argparse.Namespace, folder: Path, rest: list[str]) -> list[str]:
    """Return the command that trains a run, from its latest checkpoint if it has one."""
    if options.script is not None:
        command = [sys.executable, str(options.script), "fit"]
    else:
        command = [sys.executable, "-m", "lightning_prune.cli.fit"]
        for name in ("model_class", "data_class"):
            if getattr(options, name) is not None:
                command += [f"--{name}", getattr(options, name)]
    command += ["--config", str(folder / "run.yaml"), *rest]
    checkpoint = latest_checkpoint(folder)
    return command if checkpoint is None else [*command, "--ckpt_path", str(checkpoint)]


def _finished(folder: Path) -> bool:
    """Return whether a run ended by itself."""
    return (folder / HISTORY_FILE).exists() and not History.from_json(folder / HISTORY_FILE).stopped
