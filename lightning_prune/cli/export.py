"""The command ``export``: stores weights compactly."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lightning_prune.cli.runs import saved_weights
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import stored_table
from lightning_prune.surgery.sparse_files import save_sparse

__all__ = ["TOLD", "add_arguments", "run"]

TOLD = """\
Store the weights of a checkpoint, or of a state dict, compactly.

--sparse keeps of every tensor that is mostly zero the entries that are left, in a safetensors file without any code,
and prints the bytes before and after. lightning_prune.load_sparse_(model, path) loads it into the original class.

example:
  lightning-prune export --sparse --ckpt_path last.ckpt --out model.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--sparse", action="store_true", required=True, help="leave out what is zero")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of Lightning, or a saved state dict")
    parser.add_argument("--out", type=Path, required=True, help="the file, such as model.safetensors")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Write the compact file and print what it saves."""
    if rest:
        raise PruningError(f"unknown arguments: {' '.join(rest)}.")
    report = save_sparse(saved_weights(options.ckpt_path), options.out)
    console = Console()
    console.print(stored_table(report))
    source = options.ckpt_path.stat().st_size
    console.print(
        f"Written: {options.out}, {report.bytes_after:,} bytes; the weights alone were {report.bytes_before:,}, "
        f"{options.ckpt_path} is {source:,}.", soft_wrap=True,
    )  # fmt: skip
