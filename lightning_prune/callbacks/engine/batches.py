"""Reads training batches beside the training, which goes on as if nothing had been read; changes nothing."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_prune.callbacks.engine.step import call_step, silent
from lightning_prune.measure.gradients import Loss
from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError

__all__ = ["losses_of", "training_batches"]


@contextmanager
def training_batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Iterator[Any]]:
    """Yield the first batches of the training data, on the module's device, as the training step would get them.

    Where the loader shuffles, they are others at every step of training, and the same whenever a run is resumed there.
    Workers, samplers and random generators of the training are left as found.
    """
    loaders = trainer.fit_loop._combined_loader
    assert loaders is not None  # training has begun
    own = pytree.tree_map(_beside, loaders.iterables)
    generators = [g for loader in pytree.tree_leaves(own) for g in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    chance = random.getstate(), np.random.get_state()
    with generators_restored([pl_module.device]):
        torch.manual_seed(torch.initial_seed() + trainer.global_step)
        try:
            combined = CombinedLoader(own, loaders._mode)
            yield (_moved(trainer, pl_module, batch) for batch, _, _ in itertools.islice(iter(combined), count))
        finally:
            random.setstate(chance[0])
            np.random.set_state(chance[1])
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def losses_of(pl_module: LightningModule) -> Iterator[Loss]:
    """Yield a function of module and batch that returns the training step's loss, which logs and counts nothing."""
    if not pl_module.automatic_optimization:
        raise PruningError(
            f"{type(pl_module).__name__} optimizes manually: its training step returns no loss to be differentiated. "
            "Use a criterion that the run itself shows, such as 'taylor'."
        )

    def loss(module: nn.Module, batch: Any) -> Tensor:
        found = call_step(pl_module, "training_step", batch)
        value = found["loss"] if isinstance(found, dict) else found
        if not isinstance(value, Tensor):
            raise PruningError(
                f"{type(pl_module).__name__}.training_step returned {value!r}; a criterion of the loss needs it."
            )
        return value

    with silent(pl_module):
        yield loss


def _beside(loader: Any) -> Any:
    """Return a loader of the same data that works in this process and shares neither iterator nor place with it."""
    if isinstance(loader, Iterator):  # which can be read once alone
        return loader
    own = copy.copy(loader)
    if not isinstance(loader, DataLoader):
        return own
    vars(own).update(num_workers=0, prefetch_factor=None, persistent_workers=False, timeout=0, _iterator=None)
    vars(own).update(_DataLoader__multiprocessing_context=None)
    return own


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    places = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    found = {id(g): g for place in places if isinstance(g := getattr(place, "generator", None), torch.Generator)}
    return list(found.values())


def _moved(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Bring a batch to the module as the training loop does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
