"""Trains under strategies, precisions, callbacks and optimizers, each cell once whole and once taken up in the middle.

A cell passes if what was asked for has left, all numbers are finite, optimizers hold what fits their parameters, the
run that was taken up in the middle ends at the same bits, and, where there are several processes, all hold the same.

    python -m benchmarks.trust cells                                                      # in one process
    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.trust.cells OUT.json  # in two, by gloo
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, optim
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.trust.kills import differing
from benchmarks.trust.runs import CALLBACKS, Batches, Net, outcome, trainer
from lightning_prune import PruningError
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback

__all__ = ["DDP", "EXTRAS", "OPTIMIZERS", "PRECISIONS", "Cell", "Tried", "across", "alone", "try_cells"]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true")
OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam, fused": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01, amsgrad=True),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": partial(optim.Adagrad, lr=0.01),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "ASGD": partial(optim.ASGD, lr=0.05),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "Adafactor": partial(optim.Adafactor, lr=0.05),
    **({"Muon": partial(optim.Muon, lr=0.02)} if hasattr(optim, "Muon") else {}),  # torch 2.6 has none
    "LBFGS": partial(optim.LBFGS, lr=0.1),
}
"""Name -> maker. Muon takes matrices alone, and is tried beside SGD, by hand; LBFGS is to be refused."""
EXTRAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "clipped norm": {"gradient_clip_val": 0.1},
    "clipped values": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
    "rate by step": {},
    "rate by epoch": {},
    "rate by plateau": {},
    "by hand": {},
}
"""What else happens -> arguments of the Trainer; the module's part is in :class:`CellNet`."""
DDP: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, unused parameters": {"find_unused_parameters": True},
    "ddp, static graph": {"static_graph": True},
    "ddp, bucket views": {"gradient_as_bucket_view": True},
}
PRUNING = [name for name in CALLBACKS if name != "none"]


@dataclass(frozen=True)
class Cell:
    """What is tried together, by names in the tables above."""

    strategy: str
    precision: str
    callback: str
    optimizer: str
    extra: str


@dataclass
class Tried:
    """Cells that were tried; those among them that were refused as they should be, or fail without pruning as well."""

    tried: int = 0
    passed: int = 0
    refused: int = 0
    fail_anyway: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class CellNet(Net):
    """The network, trained as a cell says."""

    def __init__(self, optimizer: str, extra: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = extra != "by hand" and optimizer != "Muon"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        make, extra = OPTIMIZERS[self.hparams.optimizer], self.hparams.extra
        if not self.automatic_optimization:
            matrices = [self.hidden.weight, self.head.weight]
            others = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
            return make(matrices), OPTIMIZERS["SGD"](others)
        optimizer = make(self.parameters())
        if extra == "rate by plateau":
            plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        if extra.startswith("rate by"):
            by = {"scheduler": optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": extra.split()[-1]}
            return {"optimizer": optimizer, "lr_scheduler": by}
        return optimizer


def alone() -> Iterator[Cell]:
    """Yield every precision with every callback and optimizer, in one process; extras take turns."""
    extras = itertools.cycle(EXTRAS)
    for precision, callback, optimizer in itertools.product(PRECISIONS, PRUNING, OPTIMIZERS):
        yield Cell("one process", precision, callback, optimizer, next(extras))


def across() -> Iterator[Cell]:
    """Yield every way of DDP with every callback; precisions, optimizers and extras take turns."""
    extras = itertools.cycle(EXTRAS)
    precisions = itertools.cycle(PRECISIONS)
    optimizers = itertools.cycle([name for name in OPTIMIZERS if name not in ("LBFGS", "Muon")])
    for strategy, callback in itertools.product(DDP, PRUNING):
        yield Cell(strategy, next(precisions), callback, next(optimizers), next(extras))


def try_cells(cells: Iterator[Cell], out: Path | None = None) -> Tried:
    """Try cells one after the other, and write how far it has come after each."""
    found = Tried()
    for cell in cells:
        found.tried += 1
        wrong = _agreed(_wrong(cell))
        if wrong and cell.optimizer != "LBFGS" and (anyway := _agreed(_wrong(replace(cell, callback="none")))):
            found.fail_anyway.append(f"{cell}: {anyway}"[:600])
        elif wrong:
            found.failures.append(f"{cell}: {wrong}"[:600])
        else:
            found.passed += 1
            found.refused += cell.optimizer == "LBFGS"
        if out is not None and int(os.environ.get("RANK", 0)) == 0:
            out.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return found


def _wrong(cell: Cell) -> str:
    try:
        return _try(cell)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _agreed(wrong: str) -> str:
    """Return what is wrong on any process, on all of them."""
    if not torch.distributed.is_initialized():
        return wrong
    told: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, wrong)
    return next(filter(None, told), "")


def _try(cell: Cell) -> str:
    """Return what is wrong with a cell, nothing if it passes."""
    with tempfile.TemporaryDirectory() as folder:
        path = _shared(folder)
        if cell.optimizer == "LBFGS":
            return _not_refused(cell, path)
        saver = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        module, made = _fit(cell, saver)
        wrong = _unfit(cell, module, made)
        again, resumed = _fit(cell, None, path / "epoch=1.ckpt")
        # Lightning saves before a plateau's step and does not make up for it; how more than two processes add up
        # depends on DDP's buckets, which it lays anew some steps after it was wrapped
        lost = cell.extra == "rate by plateau" or made.world_size > 2
        apart = [] if lost else differing(outcome(module, made), outcome(again, resumed))
        made.strategy.barrier()
        return wrong or (f"taken up, it ended elsewhere: {apart[:5]}" if apart else "")


def _fit(cell: Cell, saver: ModelCheckpoint | None, ckpt_path: Path | None = None) -> tuple[CellNet, pl.Trainer]:
    torch.manual_seed(0 if saver else 5)
    module = CellNet(cell.optimizer, cell.extra)
    if cell.precision == "64-true":  # Lightning converts only after it has loaded a checkpoint, into single precision
        module.double()
    several = cell.strategy in DDP
    wait = timedelta(seconds=90)
    how = {"strategy": DDPStrategy(process_group_backend="gloo", timeout=wait, **DDP[cell.strategy])} if several else {}
    by_hand = not module.automatic_optimization
    made = trainer(
        *CALLBACKS[cell.callback](),
        *([saver] if saver else []),
        enable_checkpointing=saver is not None,
        precision=cell.precision,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        **({} if by_hand else EXTRAS[cell.extra]),
        **how,
    )
    made.fit(module, _uneven() if several else Batches(7), DataLoader(list(Batches(8, 2)), None), ckpt_path=ckpt_path)
    return module, made


def _uneven() -> DataLoader:
    """Return examples of which no number of processes gets an equal share, nor any an equal last batch."""
    data = Batches(7, 37, 1)
    return DataLoader(TensorDataset(data.images[:, 0], data.labels[:, 0]), 6, shuffle=True)


def _unfit(cell: Cell, module: CellNet, made: pl.Trainer) -> str:
    """Return what is not as it should be after a run."""
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        return "numbers that are not finite"
    for callback in made.callbacks:
        prunes = isinstance(callback, PruningCallback) and cell.callback != "guard"
        if prunes and callback.state_dict()["progress"] != 1.0:
            return f"only {callback.state_dict()['progress']:.0%} of the cuts were made"
    for optimizer in made.optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                whole = isinstance(value, Tensor) and value.dim() and "Adafactor" not in type(optimizer).__name__
                if whole and value.numel() > 1 and value.shape != parameter.shape:
                    return f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
    if made.world_size > 1:
        flat = torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])
        all_of_them = made.strategy.all_gather(flat)
        if not all(torch.equal(one, all_of_them[0]) for one in all_of_them):
            return "processes hold other weights"
    return ""


def _not_refused(cell: Cell, path: Path) -> str:
    try:
        _fit(cell, ModelCheckpoint(path))
    except PruningError as error:
        return "" if "LBFGS" in str(error) else str(error)
    return "LBFGS was not refused"


def _shared(folder: str) -> Path:
    """Return one folder for all processes: the first one's."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not torch.distributed.is_initialized():
        common = os.environ.get("TORCHELASTIC_RUN_ID")
        return Path(folder) if common is None else Path(tempfile.gettempdir()) / f"cells-{os.getppid()}"
    given = [folder]
    torch.distributed.broadcast_object_list(given)
    return Path(given[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    try_cells(across(), Path(sys.argv[1]))
