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
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_prune.callbacks.engine.step import call_step, copied, silent
from lightning_prune.measure.gradients import Loss
from lightning_prune.model.calls import mode_of
from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed

__all__ = ["losses_of", "refuse_without_loss", "training_batches"]

_LARGE = 2**20  # bytes: a smaller tensor may be a counter


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
    """Yield a function of module, or a copy, and batch that returns the training step's loss; it logs nothing."""
    if not pl_module.automatic_optimization:
        raise PruningError(
            f"{type(pl_module).__name__} optimizes manually: its training step returns no loss to be differentiated. "
            "For filters use TaylorFilterPruning, which watches the training itself; for layers, 'output_change'."
        )

    def loss(module: nn.Module, batch: Any) -> Tensor:
        assert isinstance(module, LightningModule)
        with silent(module):
            found = call_step(module, "training_step", batch)
        value = found["loss"] if isinstance(found, dict) else found
        if not isinstance(value, Tensor):
            raise PruningError(
                f"{type(pl_module).__name__}.training_step returned {value!r}; a criterion of the loss needs it."
            )
        return value

    yield loss


def refuse_without_loss(pl_module: LightningModule, batch: Any) -> None:
    """Refuse a module whose training step returns no loss on a training batch, before anything is trained.

    Raises:
        PruningError: Saying what it returned, and what to do.
    """
    with losses_of(pl_module) as loss, undisturbed(pl_module, (batch,)), mode_of(pl_module, True, True):
        loss(pl_module, copied(batch))


def _beside(loader: Any) -> Any:
    """Return a loader of the same data that works in this process and shares neither iterator nor place with it."""
    if isinstance(loader, Iterator):  # which can be read once alone
        _warn_lost(loader)
        return loader
    own = copy.copy(loader)
    if not isinstance(loader, DataLoader):
        return _copied(loader, own)
    vars(own).update(num_workers=0, prefetch_factor=None, persistent_workers=False, timeout=0, _iterator=None)
    vars(own).update(_DataLoader__multiprocessing_context=None)
    # A stream or a sampler may remember its place, so that reading it here would move the training on.
    for name in ("dataset", "sampler", "batch_sampler"):
        part = getattr(loader, name)
        if part is not None and (name != "dataset" or isinstance(part, IterableDataset)):
            vars(own)[name] = _copied(part, part)
    return own


def _copied(source: Any, otherwise: Any) -> Any:
    """Return a copy that keeps a place of its own; where there is none to be had, warn and return ``otherwise``."""
    memo = {id(part): part for part in _parts(source) if _is_data(part)}
    try:
        return copy.deepcopy(source, memo)
    except Exception:  # generators, open files, locks: each raises its own
        _warn_lost(source)
        return otherwise


def _parts(source: Any) -> list[Any]:
    """Return the attributes of an object, and those of its attributes."""
    own = list(getattr(source, "__dict__", {}).values())
    inner = [value for part in own for value in getattr(part, "__dict__", {}).values()]
    return own + inner


def _is_data(part: Any) -> bool:
    """Return whether this holds examples and no place among them: it need not be copied."""
    if isinstance(part, Tensor | np.ndarray):
        return part.nbytes > _LARGE
    return isinstance(part, Dataset) and not isinstance(part, IterableDataset)


def _warn_lost(source: Any) -> None:
    """Warn that what is read here may be missing from the training."""
    rank_zero_warn(
        f"{type(source).__name__} cannot be copied, so the training batches that the pruning reads are taken from it. "
        "If it goes on where it stopped, training does not see them. Make it copyable (copy.deepcopy), or use a "
        "criterion that reads no batches, such as 'taylor'."
    )


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
