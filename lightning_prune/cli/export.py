"""The command ``export``: writes weights to a sparse file, or a model to ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import LightningModule
from rich.console import Console

from lightning_prune.cli.onnx_files import OnnxFile, write_onnx
from lightning_prune.cli.runs import (
    RUN,
    add_model_options,
    add_run_options,
    load_weights_,
    model_and_inputs,
    saved_weights,
)
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import stored_table
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.sparse_files import save_sparse

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = f"""\
Write the weights of a checkpoint, or of a state dict, to a compact file, or the model to ONNX.

--out: of every tensor that is mostly zero, only the nonzero entries are stored, in a safetensors file. The bytes before
and after are printed. lightning_prune.load_sparse_(model, path) loads the file into the original class.

--onnx: the model is written for ONNX Runtime and other runtimes, if ONNX Runtime computes what PyTorch does; the bytes
of the dense and the pruned file are printed. This needs to create the model: from --config, or from --model (any class
or function that returns a torch.nn.Module) with --input-shape; and the packages onnx, onnxscript and onnxruntime.

{RUN}
examples:
  lightning-prune export --ckpt-path last.ckpt --out model.safetensors
  lightning-prune export --ckpt-path last.ckpt --onnx model.onnx --config config.yaml
  lightning-prune export --ckpt-path last.ckpt --onnx model.onnx --model my_script.Net --input-shape 1,3,32,32
  lightning-prune export --ckpt-path last.ckpt --onnx model.onnx --model my_script.gpt --input-shape 1,128 --tokens 99
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--out", type=Path, help="sparse file to write, such as model.safetensors")
    add("--onnx", type=Path, help="ONNX file to write, such as model.onnx")
    add("--any_batch", action="store_true", help="for --onnx: the first dimension of the inputs may have any size")
    add("--external_data", action="store_true", help="for --onnx: write the weights into a second file")
    add_run_options(parser, required=False)
    add_model_options(parser)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Write the files and print the bytes saved."""
    if options.ckpt_path is None:
        raise PruningError("give --ckpt-path: a checkpoint of Lightning, or a saved state dict.")
    if options.out is None and options.onnx is None:
        raise PruningError("give --out (a sparse file of weights), --onnx (the whole model), or both.")
    for name, path in (("out", options.out), ("onnx", options.onnx)):
        if path is not None and not path.parent.is_dir():
            raise PruningError(f"--{name} {path}: there is no folder {path.parent}. Create it first.")
        if path is not None and path.is_dir():
            raise PruningError(f"--{name} {path} is a folder; name a file in it.")
    if rest and options.onnx is None:
        raise PruningError(f"unknown arguments: {' '.join(rest)}.")
    console = Console()
    if options.out is not None:
        _sparse(options, console)
    if options.onnx is not None:
        _onnx(options, rest, console)


def _sparse(options: argparse.Namespace, console: Console) -> None:
    report = save_sparse(saved_weights(options.ckpt_path), options.out)
    console.print(stored_table(report))
    source = options.ckpt_path.stat().st_size
    written = f"Written: {options.out}, {report.bytes_after:,} bytes ({options.ckpt_path}: {source:,} bytes)."
    console.print(written, soft_wrap=True, markup=False)


def _onnx(options: argparse.Namespace, rest: list[str], console: Console) -> None:
    model, inputs = model_and_inputs(options, rest)
    if isinstance(model, LightningModule):
        model.trainer = None  # it cannot be copied, as the exporter does
    model.eval()
    how = {"any_batch": options.any_batch, "external": options.external_data}
    with TemporaryDirectory() as folder:
        dense = write_onnx(model, inputs, Path(folder) / "dense.onnx", **how)
    load_weights_(model, options.ckpt_path)
    pruned = write_onnx(model, inputs, options.onnx, **how)
    for line in _in_words(dense, pruned, bool(masks_on(model))):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _in_words(dense: OnnxFile, pruned: OnnxFile, masked: bool) -> list[str]:
    """Return what was written, in words."""
    beside = f" and {pruned.path.name}.data, which holds the weights: keep both together" if pruned.external else ""
    lines = [f"Written: {pruned.path}{beside}. {pruned.size:,} bytes; the dense model: {dense.size:,} bytes."]
    if pruned.difference is None:
        lines.append("Not compared with PyTorch: onnxruntime is not installed.")
    else:
        lines.append(f"ONNX Runtime's outputs are PyTorch's up to {pruned.difference:.1e} of the largest.")
    if masked:
        lines.append("Weights were zeroed, not removed, and ONNX stores zeros. --out writes a small file.")
    return lines
