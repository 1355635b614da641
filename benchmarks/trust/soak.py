"""Cuts and masks over and over in one process, and watches what stays in memory and on the model."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader

from benchmarks.trust.runs import trainer
from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, Linear
from lightning_prune.algorithms.schedules import FewUnits

__all__ = ["CASES", "Watch", "left_behind", "soak"]

SPARE = 8  # units that stay
CASES = {
    "cuts": lambda times: FilterL1Pruning(times / (times + SPARE), schedule=FewUnits(units=1)),
    "masks": lambda times: IterativeMagnitudePruning(0.9, schedule=Linear(0, times - 1, by="steps"), scope="global"),
}


class Wide(pl.LightningModule):
    """A hidden layer wide enough to lose a unit as often as it takes."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = (
            nn.Linear(4, times + SPARE),
            nn.BatchNorm1d(times + SPARE),
            nn.Linear(times + SPARE, 2),
        )
        self.example_input_array = torch.zeros(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(x)).relu())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch), batch[:, :2])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


@dataclass
class Watch(Callback):
    """Takes stock every so many steps: bytes in memory, objects of Python, hooks on the model, old storages alive."""

    every: int
    memory: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    _storages: list[StorageWeakRef] = field(default_factory=list)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if (trainer.global_step - 1) % self.every:
            return
        gc.collect()
        self.memory.append(resident())
        self.objects.append(len(gc.get_objects()))
        self.hooks.append(len(hooks_on(pl_module)))
        held = [StorageWeakRef(parameter.untyped_storage()) for parameter in pl_module.parameters()]
        self.alive.append(sum(not old.expired() and old not in held for old in self._storages))
        self._storages = held  # if it is replaced until the next time, it is to be gone


def soak(case: str, times: int) -> dict[str, Any]:
    """Cut, or mask, so many times, one training step between two, and return what was seen."""
    torch.manual_seed(0)
    module, watch = Wide(times), Watch(max(1, times // 10))
    start = time.perf_counter()
    data = DataLoader(torch.randn(8 * times, 4), 8)
    trainer(CASES[case](times), watch, max_epochs=1, max_steps=times).fit(module, data)
    seconds = time.perf_counter() - start
    return {
        "times": times,
        "seconds": round(seconds, 1),
        "width": module.hidden.out_features,
        "memory": watch.memory,
        "objects": watch.objects,
        "hooks": watch.hooks,
        "old storages alive": watch.alive,
        "left behind": left_behind(module, Wide(times)),
    }


def left_behind(module: nn.Module, twin: nn.Module) -> list[str]:
    """Name what a module carries that a twin which was never in a run does not, but for what Lightning leaves."""
    lightnings = {"_fabric", "_metric_attributes", "_hparams"}
    found = []
    for (path, own), other in zip(module.named_modules(), twin.modules(), strict=True):
        found += [f"{path}.{name}" for name in vars(own).keys() ^ vars(other).keys() if name not in lightnings]
    found += [name for name, _ in module.named_buffers() if name not in dict(twin.named_buffers())]
    return found + hooks_on(module)


def hooks_on(module: nn.Module) -> list[str]:
    """Name every hook on a module or its parameters, as ``path.kind``."""
    found = [
        f"{path}.{name}"
        for path, part in module.named_modules()
        for name, hooks in vars(part).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for _ in hooks
    ]
    found += [f"{name}.hook" for name, parameter in module.named_parameters() if parameter._backward_hooks]
    return found + [
        f"{name}.post_accumulate"
        for name, parameter in module.named_parameters()
        if getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    told = Path("/proc/self/status").read_text()
    return int(told.partition("VmRSS:")[2].split()[0]) * 1024
