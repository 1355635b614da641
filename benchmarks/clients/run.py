"""Trains, predicts, saves and loads one client with one callback, in this process."""

import contextlib
import importlib
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.clients import forecasting, images, tables
from benchmarks.clients.finished import Finished

LOADED = ("its own", "ours")


class Client(NamedTuple):
    """A library: what to install.

    ``torchvision``: whether it needs that, which is installed without its dependencies. ``uniform``: whether its files
    have one width for all layers of a kind, so that filters are pruned with ``uniform=True``.
    """

    train: Callable[[Any, Path], Finished]
    packages: tuple[str, ...]
    torchvision: bool = False
    uniform: bool = False


CLIENTS = {
    "pytorch-forecasting": Client(forecasting.pytorch_forecasting, ("pytorch-forecasting",)),
    "neuralforecast": Client(forecasting.neuralforecast, ("neuralforecast",)),
    "darts": Client(forecasting.darts, ("darts",)),
    "gluonts": Client(forecasting.gluonts, ("gluonts[torch]",)),
    "scvi-tools": Client(tables.scvi_tools, ("scvi-tools",)),
    "pytorch-tabular": Client(tables.pytorch_tabular, ("pytorch-tabular",)),
    "pyg": Client(tables.pyg, ("torch-geometric",)),
    "timm": Client(images.timm, ("timm",), torchvision=True),
    "ultralytics": Client(images.ultralytics, ("ultralytics",), torchvision=True),
    "smp": Client(images.smp, ("segmentation-models-pytorch",), torchvision=True),
    "lightly": Client(images.lightly, ("lightly",), torchvision=True),
    "monai": Client(images.monai, ("monai",)),
    "torchgeo": Client(images.torchgeo, ("torchgeo",), torchvision=True),
    "transformers": Client(images.transformers, ("transformers",), uniform=True),
}


def callback_named(name: str, uniform: bool = False) -> Any:
    """Return a new callback that prunes half of what it can, or 30 % of the channels."""
    import lightning_prune

    if name == "IterativeMagnitudePruning":
        return lightning_prune.IterativeMagnitudePruning(0.5)
    if name == "OBSOneShot":
        return lightning_prune.OBSOneShot(0.5, batches=2)
    if name == "TaylorFilterPruning":
        return lightning_prune.TaylorFilterPruning(
            0.3, schedule=lightning_prune.OneShot(1, by="steps"), uniform=uniform
        )
    return lightning_prune.FilterL1Pruning(0.3, uniform=uniform)


NAMES = ("IterativeMagnitudePruning", "FilterL1Pruning", "TaylorFilterPruning", "OBSOneShot")


def run_one(client: str, name: str) -> dict[str, Any]:
    """Train, predict, save and load in this process; return what became of each."""
    if CLIENTS[client].torchvision:
        with contextlib.suppress(ImportError):  # where it was built for another device; before Lightning imports it
            importlib.import_module("torchvision_cpu")
    import torch

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found: dict[str, Any] = {"started": False}
    callback = callback_named(name, CLIENTS[client].uniform)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            finished = CLIENTS[client].train(callback, folder)
            found |= {"started": True, **_reached(_used(callback, finished))}
            before = finished.predict()
            found["predicted"] = _finite(before)
            finished.save(folder)
            found["saved"] = True
            found["loaded"] = _loader_that_works(finished, folder, before)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
            traceback.print_exc()
    return found


def _used(callback: Any, finished: Finished) -> Any:
    """Return the callback that was trained with: some libraries train a copy of what they are given."""
    copies = getattr(finished.module, "trainer_kwargs", {}).get("callbacks", ())
    return next((copy for copy in copies if type(copy) is type(callback)), callback)


def _reached(callback: Any) -> dict[str, Any]:
    goals = callback.history.goals
    return {"asked": round(goals[-1].asked, 4), "reached": round(goals[-1].reached, 4)} if goals else {}


def _loader_that_works(finished: Finished, folder: Path, before: Any) -> str:
    """Return whose loader gives back what predicts the same."""
    from lightning_prune import load_from_checkpoint, slim_loading
    from lightning_prune.surgery.loading import recipe_json

    recipe = recipe_json(finished.module)  # some libraries save into files that keep no metadata
    failures = []
    for name in LOADED:
        try:
            with contextlib.nullcontext() if name == "its own" else slim_loading(recipe):
                after = finished.predict_loaded(folder)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"[:300])
            continue
        if _equal(before, after):
            return name
        failures.append(f"{name}: predicts something else")
    if finished.checkpoint is not None:
        trainer, kind, predict = finished.checkpoint
        trainer.save_checkpoint(folder / "whole.ckpt")
        if _equal(before, predict(load_from_checkpoint(kind, folder / "whole.ckpt", weights_only=False))):
            return "Lightning's checkpoint"
    raise RuntimeError("; ".join(failures))


def _finite(values: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(np.asarray(values)).all())


def _equal(before: Any, after: Any) -> bool:
    import numpy as np

    return bool(np.allclose(np.asarray(before), np.asarray(after), atol=1e-5))
