"""The command ``export``: writes weights to a sparse file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lightning_prune.cli.runs import existing_file, saved_weights
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import stored_table
from lightning_prune.surgery.sparse_files import save_sparse

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = """\
Write the weights of a checkpoint, or of a state dict, to a compact file.

Of every tensor that is mostly zero, only the nonzero entries are stored, in a safetensors file. The bytes before and
after are printed. lightning_prune.load_sparse_(model, path) loads the file into the original class.

example:
  lightning-prune export --ckpt_path last.ckpt --out model.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--ckpt_path", type=existing_file, required=True, help="checkpoint of Lightning, or a saved state dict")
    add("--out", type=Path, required=True, help="file to write, such as model.safetensors")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Write the file and print the bytes saved."""
    if rest:
        raise PruningError(f"unknown arguments: {' '.join(rest)}.")
    if not options.out.parent.is_dir():
        raise PruningError(f"--out {options.out}: there is no folder {options.out.parent}. Create it first.")
    report = save_sparse(saved_weights(options.ckpt_path), options.out)
    console = Console()
    console.print(stored_table(report))
    source = options.ckpt_path.stat().st_size
    written = f"Written: {options.out}, {report.bytes_after:,} bytes ({options.ckpt_path}: {source:,} bytes)."
    console.print(written, soft_wrap=True, markup=False)
