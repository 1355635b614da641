"""The command ``report``: what became of a run that pruned, and how fast its model is on this machine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from rich.console import Console
from torch import nn

from lightning_prune.analysis.latency_comparison import compare_latency
from lightning_prune.cli.runs import RUN, add_model_options, add_run_options, load_weights_, model_and_inputs
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import HISTORY_FILE, History, latency_advice, latency_table, run_tables, write_run

__all__ = ["TOLD", "add_arguments", "run"]

TOLD = f"""\
Show what became of a run that pruned: layers, cuts, metrics over cost, what stays; and how fast its model is.

RUN is the folder that a logger left (version_3), a checkpoint, or pruning.json. The report is printed again; --out
writes it as pruning.html, pruning.png and pruning.json into a folder.

--latency measures the dense model beside the pruned one on this machine, and whether rounder widths would be faster.
For that the model must be made: by --config (default: config.yaml in RUN), or by --model (any class or function that
makes a torch.nn.Module) with --input_shape. Weights are those of --ckpt_path (default: RUN, or the latest in it).

{RUN}
examples:
  lightning-prune report lightning_logs/version_3
  lightning-prune report last.ckpt --out report
  lightning-prune report lightning_logs/version_3 --latency --batch_sizes 1 64
  lightning-prune report last.ckpt --latency --model my_script.Net --input_shape 1,3,32,32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("run_path", metavar="RUN", type=Path, help="log folder, checkpoint or pruning.json")
    parser.add_argument("--out", type=Path, help="folder to write the report to")
    parser.add_argument("--latency", action="store_true", help="measure dense against pruned on this machine")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="for --latency (default: 1 32)")
    parser.add_argument("--device", default="cpu", help="for --latency, such as cuda (default: cpu)")
    add_run_options(parser, required=False)
    add_model_options(parser)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the report of a run; write it, and measure, if asked to."""
    if rest and not options.latency:
        raise PruningError(f"unknown arguments: {' '.join(rest)}.")
    console = Console()
    history = _history(options.run_path)
    for table in run_tables(history):
        console.print(table)
    if options.out is not None:
        files = write_run(history, options.out)
        console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)
    if options.latency:
        _latency(options, rest, console, history)


def _history(path: Path) -> History:
    """Find the history of a run: in the file that it left, or in a checkpoint."""
    if not path.exists():
        raise PruningError(f"{path} does not exist. Give a log folder, a checkpoint or {HISTORY_FILE}.")
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".json" or (path.is_dir() and (path / HISTORY_FILE).exists()):
        return History.from_json(path / HISTORY_FILE if path.is_dir() else path)
    checkpoint = _latest(folder) if path.is_dir() else path
    if checkpoint is None:
        raise PruningError(f"{path} holds neither {HISTORY_FILE} nor a checkpoint.")
    try:
        states = torch.load(checkpoint, map_location="cpu", weights_only=True).get("callbacks", {})
    except Exception as error:
        raise PruningError(f"{checkpoint} cannot be read as a checkpoint: {error}") from error
    histories = [History.from_plain(s["history"]) for s in states.values() if isinstance(s, dict) and "history" in s]
    told = max(histories, key=lambda history: len(history.moments), default=History())
    if not told.moments:
        raise PruningError(
            f"{checkpoint} tells of no pruning: it is of weights alone, or no pruning callback was in the run."
        )
    return told


def _latest(folder: Path) -> Path | None:
    """Return the checkpoint of a folder, or of those below, that was written last."""
    return max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _latency(options: argparse.Namespace, rest: list[str], console: Console, history: History) -> None:
    """Measure dense against pruned, and say what would be better."""
    path: Path = options.run_path
    folder = path if path.is_dir() else path.parent
    if options.config is None and options.model is None:
        options.config = next((found for found in _configs(folder) if found.exists()), None)
    if options.config is None and options.model is None:
        raise PruningError(
            f"--latency must make the model, and there is no config.yaml in {folder}. Give --config, or --model with "
            "--input_shape."
        )
    checkpoint = options.ckpt_path or (path if path.suffix == ".ckpt" else _latest(folder))
    if checkpoint is None:
        raise PruningError(
            f"--latency needs the pruned model, and there is no checkpoint in {folder}. Give --ckpt_path."
        )
    dense, inputs = model_and_inputs(options, rest)
    if isinstance(dense, LightningModule):
        dense.trainer = None  # which no copy could take along
    pruned = copy.deepcopy(dense)
    load_weights_(pruned, checkpoint)
    _refuse_dense(dense, pruned, checkpoint, history)
    inputs = move_data_to_device(inputs, torch.device(options.device))
    dense, pruned = dense.to(options.device), pruned.to(options.device)
    report = compare_latency(dense, pruned, inputs, batch_sizes=options.batch_sizes)
    console.print(latency_table(report))
    console.print(latency_advice(report), soft_wrap=True)


def _refuse_dense(dense: nn.Module, pruned: nn.Module, checkpoint: Path, history: History) -> None:
    """Refuse to measure a model that lost nothing, where the run removed units: it would be called the pruned one."""
    shapes = [parameter.shape for parameter in dense.parameters()]
    removes = "prune/params_kept" in history.left
    if removes and shapes == [parameter.shape for parameter in pruned.parameters()]:
        raise PruningError(
            f"{checkpoint} holds the dense model: it was saved before the first pruning step. Give --ckpt_path of a "
            "checkpoint that was saved after the last one."
        )


def _configs(folder: Path) -> Iterator[Path]:
    """Yield where LightningCLI leaves the config of a run: its folder, or the one above its checkpoints."""
    yield folder / "config.yaml"
    yield folder.parent / "config.yaml"
