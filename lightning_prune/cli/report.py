"""The command ``report``: the report of a pruning run, and the latency of its model on this machine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from rich.console import Console
from torch import nn

from lightning_prune.analysis.latency_comparison import compare_latency
from lightning_prune.cli.runs import (
    RUN,
    add_model_options,
    add_run_options,
    load_checkpoint,
    load_weights_,
    model_and_inputs,
    results_folder,
    whole_number,
)
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import (
    HISTORY_FILE,
    History,
    headline,
    latency_advice,
    latency_table,
    run_tables,
    write_run,
)
from lightning_prune.reports.comparison import compare_runs, comparison_table, write_comparison
from lightning_prune.surgery.masks import masks_on

__all__ = ["DESCRIPTION", "add_arguments", "compare", "latest_checkpoint", "run"]

DESCRIPTION = f"""\
Show the report of a pruning run: layers, pruning steps, metrics, and what could not be pruned; measure latency.

RUN is a logger's folder (version_3), a checkpoint, or pruning.json. The report is printed; --out writes it to a folder
as pruning.html, pruning.png and pruning.json.

Of several runs, one table is printed: what each kept, its metric, and which are on the Pareto front. --out writes it as
runs.csv and runs.tex, and draws the metric against the cost as runs.png.

--latency compares the latency of the dense and the pruned model on this machine, also with rounded widths. It needs to
create the model: from --config (default: config.yaml in RUN), or from --model (any class or function that returns a
torch.nn.Module) with --input-shape. Weights are read from --ckpt-path (default: RUN, or the latest checkpoint in it).

{RUN}
examples:
  lightning-prune report lightning_logs/version_3
  lightning-prune report last.ckpt --out report
  lightning-prune report sweep/l1-0.3 sweep/l1-0.5 sweep/taylor-0.5 --out sweep
  lightning-prune report lightning_logs/version_3 --latency --batch-sizes 1 64
  lightning-prune report last.ckpt --latency --model my_script.Net --input-shape 1,3,32,32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "run_paths", metavar="RUN", type=_local, nargs="+", help="log folder, checkpoint or pruning.json"
    )
    parser.add_argument("--metric", help="of several runs: metric to compare by (default: the first that is no loss)")
    parser.add_argument("--out", type=results_folder, help="folder to write the report to")
    parser.add_argument("--latency", action="store_true", help="compare dense and pruned on this machine")
    parser.add_argument(
        "--batch_sizes", type=whole_number, nargs="+", default=[1, 32], help="for --latency (default: 1 32)"
    )
    parser.add_argument("--device", default="cpu", help="for --latency, such as cuda (default: cpu)")
    add_run_options(parser, required=False)
    add_model_options(parser)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the report of a run; write it and measure latency if requested."""
    if rest and not options.latency:
        raise PruningError(f"unknown arguments: {' '.join(rest)}.")
    console = Console()
    if len(options.run_paths) > 1:  # a shell's sweep/* names the tables of the sweep, too
        runs = [path for path in options.run_paths if path.suffix not in (".csv", ".tex", ".png")]
        options.run_paths = runs or options.run_paths
    if len(options.run_paths) > 1:
        if options.latency:
            raise PruningError("--latency measures one run. Give one RUN, or leave --latency out.")
        compare(options.run_paths, options.out, options.metric, console)
        return
    if options.metric is not None:
        raise PruningError("--metric compares several runs. Give more than one RUN, or leave --metric out.")
    options.run_path = options.run_paths[0]
    history = _history(options.run_path)
    for line in headline(history):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for table in run_tables(history):
        console.print(table)
    if options.out is not None:
        files = write_run(history, options.out)
        console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True, markup=False)
    if options.latency:
        _latency(options, rest, console)


def compare(paths: Sequence[Path], out: Path | None, metric: str | None, console: Console) -> None:
    """Print what several runs came to; write the table and a picture if a folder is given."""
    names = [path.name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    compared = compare_runs({name: _history(path) for name, path in zip(names, paths, strict=True)}, metric)
    console.print(comparison_table(compared))
    if out is not None:
        files = write_comparison(compared, out)
        console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True, markup=False)


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on this machine; copy {HISTORY_FILE} here and give its path")
    return Path(text)


def _history(path: Path) -> History:
    """Return the history of a run, from its JSON file or from a checkpoint."""
    if not path.exists():
        raise PruningError(f"{path} does not exist. Give a log folder, a checkpoint or {HISTORY_FILE}.")
    if path.is_dir() and (path / HISTORY_FILE).exists():
        return History.from_json(path / HISTORY_FILE)
    if path.suffix == ".json":
        return History.from_json(path)
    checkpoint = latest_checkpoint(path) if path.is_dir() else path
    if checkpoint is None:
        raise PruningError(f"{path} holds neither {HISTORY_FILE} nor a checkpoint.")
    # Several callbacks may have saved a history. The longest is that of the whole run.
    longest = History()
    for state in load_checkpoint(checkpoint).get("callbacks", {}).values():
        if isinstance(state, dict) and "history" in state:
            history = History.from_plain(state["history"])
            if len(history.moments) > len(longest.moments):
                longest = history
    if not longest.moments:
        raise PruningError(
            f"{checkpoint} has no pruning history: it holds only weights, or the run had no pruning callback."
        )
    return longest


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint in a folder, or below it, that was written last."""
    return max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _latency(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    """Measure and print the latency of the dense and the pruned model."""
    path: Path = options.run_path
    folder = path if path.is_dir() else path.parent
    if options.config is None and options.model is None:
        # LightningCLI saves the config in the run's folder: this one, or the one above its checkpoints.
        configs = [folder / "config.yaml", folder.parent / "config.yaml"]
        found = [config for config in configs if config.exists()]
        if not found:
            raise PruningError(
                f"--latency must create the model, and there is no config.yaml in {folder}. Give --config, or --model "
                "with --input-shape."
            )
        options.config = found[0]
    checkpoint = options.ckpt_path or (path if path.suffix == ".ckpt" else latest_checkpoint(folder))
    if checkpoint is None:
        raise PruningError(
            f"--latency needs the pruned model, and there is no checkpoint in {folder}. Give --ckpt-path."
        )
    dense, inputs = model_and_inputs(options, rest)
    if isinstance(dense, LightningModule):
        dense.trainer = None  # it cannot be copied
    pruned = copy.deepcopy(dense)
    load_weights_(pruned, checkpoint)
    _refuse_dense(dense, pruned, checkpoint)
    try:
        inputs = move_data_to_device(inputs, torch.device(options.device))
        dense, pruned = dense.to(options.device), pruned.to(options.device)
    except (AssertionError, RuntimeError) as error:  # what torch raises for a device that is not there
        raise PruningError(f"--device {options.device}: {error}") from error
    report = compare_latency(dense, pruned, inputs, batch_sizes=options.batch_sizes)
    console.print(latency_table(report))
    console.print(latency_advice(report), soft_wrap=True, markup=False)


def _refuse_dense(dense: nn.Module, pruned: nn.Module, checkpoint: Path) -> None:
    """Refuse to measure a model that lost nothing, neither units nor weights: it would be called the pruned one."""
    shapes = [parameter.shape for parameter in dense.parameters()]
    same = shapes == [parameter.shape for parameter in pruned.parameters()]
    if same and not masks_on(pruned):
        raise PruningError(
            f"{checkpoint} holds the dense model: it was saved before the first pruning step. Give --ckpt_path of a "
            "checkpoint that was saved after the last one."
        )
