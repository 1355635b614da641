"""Writes a model as ONNX, and compares what ONNX Runtime computes with what PyTorch does; prunes nothing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lightning_prune.model.calls import ExampleInputs, as_call, run
from lightning_prune.model.errors import PruningError

__all__ = ["OnnxFile", "write_onnx"]

_LARGEST = 2**31 - 2**20  # bytes of weights that fit into one file: protobuf ends at 2 GiB
_TOLERANCE = 1e-3  # of the largest output


class OnnxFile(NamedTuple):
    """What was written.

    Attributes:
        path: The file.
        size: Bytes of the file, and of the one beside it that holds its weights, if there is one.
        external: Whether there is one.
        difference: Largest difference of an output from PyTorch's, relative to the largest output; None if ONNX Runtime
            is not installed.
    """

    path: Path
    size: int
    external: bool
    difference: float | None


def write_onnx(
    model: nn.Module, inputs: ExampleInputs, path: Path, *, any_batch: bool = False, external: bool = False
) -> OnnxFile:
    """Write a model as ONNX, once ONNX Runtime has computed what PyTorch computes.

    Args:
        model: The model, in eval mode.
        inputs: What it is exported for.
        path: The file to write.
        any_batch: Whether the first dimension of every input may have any size in the file.
        external: Whether weights are written into a file beside it; those of 2 GiB or more always are.

    Raises:
        PruningError: If the exporter is not installed or fails, or if ONNX Runtime computes something else. Nothing is
            written then.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise PruningError(
                f"--onnx: {package} is not installed. Install it: pip install onnx onnxscript onnxruntime."
            )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    external = external or weights > _LARGEST
    if any_batch:
        inputs = _several(inputs)
    with TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder:
        # The name of the second file stands in the first, so both get their names here.
        written = Path(folder) / path.name
        _export(model, inputs, written, any_batch, external)
        difference = _difference(model, inputs, written)
        if difference is not None and difference > _TOLERANCE:
            raise PruningError(
                f"--onnx: what ONNX Runtime computes differs from PyTorch by {difference:.2g} of the largest output. "
                "Nothing is written. Update torch and onnxruntime, or report this model to PyTorch's exporter."
            )
        files = sorted(Path(folder).iterdir())
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.parent / file.name)
    return OnnxFile(path, size, len(files) > 1, difference)


def _several(inputs: ExampleInputs) -> ExampleInputs:
    """Return the inputs with a batch of two at least: of one, the exporter would take the size for fixed."""

    def doubled(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value

    return _pytree.tree_map(doubled, inputs)


def _export(model: nn.Module, inputs: ExampleInputs, path: Path, any_batch: bool, external: bool) -> None:
    args, kwargs = as_call(inputs)
    shapes = None
    if any_batch:
        shapes = _pytree.tree_map(_any_first, {"args": tuple(args), "kwargs": dict(kwargs)})
        shapes = (*shapes["args"],) if not kwargs else shapes["kwargs"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model, tuple(args), path, kwargs=dict(kwargs), dynamo=True, external_data=external, verbose=False,
                dynamic_shapes=shapes,
            )  # fmt: skip
        except Exception as error:  # the exporter raises one of many kinds
            said = " ".join(str(error).split())[:300]
            raise PruningError(
                f"--onnx: PyTorch cannot export {type(model).__name__} ({type(error).__name__}: {said}). "
                "torch.onnx.export(model, inputs, dynamo=True, report=True) tells where."
            ) from error


def _any_first(value: Any) -> Any:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() else None


def _difference(model: nn.Module, inputs: ExampleInputs, path: Path) -> float | None:
    """Return how far the outputs of ONNX Runtime are from PyTorch's; None if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [value for value in _pytree.tree_leaves(as_call(inputs)) if isinstance(value, Tensor)]
    feed = {taken.name: value.numpy(force=True) for taken, value in zip(session.get_inputs(), given, strict=True)}
    with torch.no_grad():
        outputs = [value for value in _pytree.tree_leaves(run(model, inputs)) if isinstance(value, Tensor)]
    worst = 0.0
    for expected, found in zip(outputs, session.run(None, feed), strict=True):
        scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 1.0
        distance = (expected.double() - torch.from_numpy(found).double()).abs()
        worst = max(worst, float(distance.max()) / scale if distance.numel() else 0.0)
    return worst
