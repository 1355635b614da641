"""Checkpoints that are cut off, of other models, or damaged in one place."""

import io
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback

import lightning_prune
from benchmarks.trust.nonsense.promises import fit, fit_or_refuse, images, ours, promise
from benchmarks.trust.runs import Net
from lightning_prune import PruningError, load_from_checkpoint
from lightning_prune.model.bits import pack_bits

__all__ = ["FILES", "with_files"]

_BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda saved: None,
    "no weights": lambda saved: saved.pop("state_dict"),
    "no loops": lambda saved: saved.pop("loops"),
    "no callbacks": lambda saved: saved.pop("callbacks"),
    "no optimizers": lambda saved: saved.pop("optimizer_states"),
    "no version": lambda saved: saved.pop("pytorch-lightning_version"),
    "a weight less": lambda saved: saved["state_dict"].pop("hidden.weight"),
    "a weight more": lambda saved: saved["state_dict"].update({"more": torch.ones(2)}),
    "another rank": lambda saved: saved["state_dict"].update({"hidden.weight": torch.ones(3)}),
    "another width": lambda saved: saved["state_dict"].update({"hidden.weight": torch.ones(4, 9)}),
    "no recipe": lambda saved: _told(saved).pop("lightning_prune"),
    "no metadata": lambda saved: saved.update(state_dict=dict(saved["state_dict"])),
    "no recipe at all": lambda saved: _told(saved).update(lightning_prune=None),
    "a word for a recipe": lambda saved: _told(saved).update(lightning_prune="slim"),
    "half a recipe": lambda saved: _told(saved)["lightning_prune"].pop("attributes"),
    "attributes too short": lambda saved: _told(saved)["lightning_prune"].update(attributes=[["first", "groups"]]),
    "attributes of words": lambda saved: _told(saved)["lightning_prune"].update(attributes=[["first", "groups", "x"]]),
    "masks of numbers": lambda saved: _told(saved)["lightning_prune"].update(masks={"first.weight": 3}),
    "a word for a weight": lambda saved: saved["state_dict"].update({"hidden.weight": "many"}),
    "a list for weights": lambda saved: saved.update(state_dict=[torch.ones(2)]),
    "weights of another": lambda saved: saved.update(state_dict={"layer.weight": torch.ones(2, 2)}),
    "our state empty": lambda saved: [state.clear() for state in _ours(saved)],
    "our state gone": lambda saved: saved.update(callbacks=dict.fromkeys(saved["callbacks"])),
    "our progress a word": lambda saved: [state.update(progress="half") for state in _ours(saved)],
    "our history empty": lambda saved: [state.update(history={}) for state in _ours(saved)],
    "our start half": lambda saved: [state.update(start={"widths": {}}) for state in _ours(saved)],
    "our widths none": lambda saved: [state.update(widths=None) for state in _ours(saved)],
    "our masks of numbers": lambda saved: [state.update(masks={"first.weight": 3}) for state in _ours(saved)],
    "our masks of another": lambda saved: [
        state.update(masks={"other.weight": [pack_bits(torch.ones(2, 2) > 0), [2, 2]]}) for state in _ours(saved)
    ],
    "momentum of another": lambda saved: _momentum(saved).update(momentum_buffer=torch.ones(2, 2, 3, 3)),
    "momentum of another rank": lambda saved: _momentum(saved).update(momentum_buffer=torch.ones(2, 2)),
}
"""What is wrong with a file -> what does it, to what the file holds."""
FILES = st.tuples(
    st.sampled_from(["FilterL1Pruning", "IterativeMagnitudePruning"]),
    st.sampled_from(list(_BREAKS)),
    st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.0]),  # share of the file that is there
)


def with_files(case: tuple[str, str, float]) -> str:
    """Load what was damaged, and take a run up from it: what our code finds is told in our words."""
    name, broken, share = case
    saved = torch.load(io.BytesIO(_saved(name)), weights_only=True)
    _BREAKS[broken](saved)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "broken.ckpt"
        torch.save(saved, path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        try:
            load_from_checkpoint(Net, path)
        except Exception as error:
            promise(isinstance(error, PruningError) or (share == 1 and not ours(error)), f"{error!r}, of load")
        promise("load_state_dict" not in vars(Net), "the class is changed")
        # one width that contradicts the others is loaded as it is written, and then nothing runs
        runs = broken != "another width"
        return fit_or_refuse(Net, [_pruning(name)], images(), ckpt_path=path, runs=runs)


class _Saver(Callback):
    """Keeps a checkpoint of the first epoch's end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@cache
def _saved(name: str) -> bytes:
    """Return the checkpoint of a run of which most is still to come."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.ckpt"
        fit(Net(), [_pruning(name), _Saver(path)], images())
        return path.read_bytes()


def _pruning(name: str) -> Callback:
    return getattr(lightning_prune, name)(0.5, schedule=lightning_prune.Linear(0, 2))


def _told(saved: dict[str, Any]) -> dict[str, Any]:
    return saved["state_dict"]._metadata[""]


def _ours(saved: dict[str, Any]) -> list[dict[str, Any]]:
    return [state for key, state in saved["callbacks"].items() if "Prun" in key]


def _momentum(saved: dict[str, Any]) -> dict[str, Any]:
    return saved["optimizer_states"][0]["state"][0]
