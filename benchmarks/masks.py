"""Measures what keeping masks costs a training step and memory, beside a bare Trainer and Lightning's ``ModelPruning``.

    python -m benchmarks.masks

Four trainers, each with its own copy of the network, take turns step by step in threads of one process; two are bare,
to show how far two of a kind differ. Half of the weights are masked after a first epoch of two steps; then steps are
timed, in seconds of their thread's CPU time, from the end of one to the end of the next. Figures are medians of the
ratios to the mean bare step of the same turn, which other work on the machine disturbs least; they are printed and
written into ``masks.json`` beside this file.
"""

import argparse
import copy
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import thread_time
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.data import Batches
from benchmarks.models import resnet_cifar
from benchmarks.training import Classifier
from lightning_prune import IterativeMagnitudePruning, OneShot

RESULTS = Path(__file__).with_suffix(".json")


def mlp() -> nn.Sequential:
    """A network of 10 million weights, almost all of them in matrices: the worst case for masks at a small batch."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 1792), nn.ReLU(), nn.Linear(1792, 10)
    )


def small_mlp() -> nn.Sequential:
    """A network of 4.3 million weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


class WithAdam(Classifier):
    """The same, trained by Adam."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Setting(NamedTuple):
    """What is trained and how, and the goal as a ratio to the bare step."""

    make: Callable[[], nn.Module]
    goal: float
    kind: type[Classifier] = Classifier
    clips: float | None = None


NETWORKS = {
    "ResNet-20": Setting(lambda: resnet_cifar(20), 1.01),
    "MLP of 10M weights": Setting(mlp, 1.10),
    "MLP of 4.3M weights, Adam": Setting(small_mlp, 1.10, WithAdam),
    "MLP of 4.3M weights, Adam, clipped": Setting(small_mlp, 1.10, WithAdam, 1.0),
}


def weights_of(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """What ``ModelPruning`` is to prune: the same weights as ours."""
    return [(module, "weight") for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


KINDS: dict[str, Callable[[nn.Module], list[Callback]]] = {
    "bare": lambda net: [],
    "ours": lambda net: [IterativeMagnitudePruning(0.5, schedule=OneShot(1), scope="global")],
    "bare, again": lambda net: [],
    "ModelPruning": lambda net: [
        ModelPruning(
            "l1_unstructured", weights_of(net), amount=0.5, use_global_unstructured=True,
            apply_pruning=lambda epoch: epoch == 0, make_pruning_permanent=False,
        )
    ],
}  # fmt: skip


class Turns:
    """Lets one thread run at a time, in a ring."""

    def __init__(self, number: int):
        self.locks = [threading.Semaphore(int(place == 0)) for place in range(number)]

    def wait(self, place: int) -> None:
        self.locks[place].acquire()

    def pass_on(self, place: int) -> None:
        self.locks[(place + 1) % len(self.locks)].release()


class Clock(Callback):
    """Times every step, and weighs the tensors that live at the end. Stands last, so that a step is all of it."""

    def __init__(self, turns: Turns, place: int):
        self.turns, self.place = turns, place
        self.seconds: list[float] = []
        self.bytes = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.turns.wait(self.place)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.seconds.append(thread_time())
        self.turns.pass_on(self.place)
        self.turns.wait(self.place)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {t.data_ptr(): t.nbytes for m in pl_module.modules() for t in vars(m).values() if torch.is_tensor(t)}
        found |= {t.data_ptr(): t.nbytes for t in (*pl_module.parameters(), *pl_module.buffers())}
        for callback in trainer.callbacks:
            if isinstance(callback, IterativeMagnitudePruning):
                found |= {mask.data_ptr(): mask.nbytes for mask in callback.member.strategy.own.masks._factors.values()}
        self.bytes = sum(found.values())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.turns.pass_on(self.place)


class Data(pl.LightningDataModule):
    """Random images: two batches in the first epoch, many in the second."""

    def __init__(self, batch: int, steps: int):
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> Batches:
        count = self.batch * (self.steps if self.trainer.current_epoch else 2)
        return Batches(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)), self.batch)


def train(kind: str, setting: Setting, net: nn.Module, clock: Clock, data: Data, threads: int) -> None:
    """Run one of the trainers."""
    torch.set_num_threads(threads)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[*KINDS[kind](net), clock],
        reload_dataloaders_every_n_epochs=1, gradient_clip_val=setting.clips,
    )  # fmt: skip
    trainer.fit(setting.kind(net, lr=1e-3), data)


def measure(name: str, steps: int, batch: int, threads: int) -> dict:
    """Let the four take turns."""
    torch.manual_seed(0)
    setting, turns = NETWORKS[name], Turns(len(KINDS))
    dense = setting.make()
    clocks = {kind: Clock(turns, place) for place, kind in enumerate(KINDS)}
    runs = [
        threading.Thread(
            target=train, args=(kind, setting, copy.deepcopy(dense), clocks[kind], Data(batch, steps), threads)
        )
        for kind in KINDS
    ]
    with warnings.catch_warnings(action="ignore"):
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    # of the second epoch, without its first steps
    seconds = {
        kind: torch.tensor(clock.seconds[5:], dtype=torch.float64).diff().tolist() for kind, clock in clocks.items()
    }
    bare = [(one + other) / 2 for one, other in zip(seconds["bare"], seconds["bare, again"], strict=True)]
    ratios = {kind: [own / of for own, of in zip(values, bare, strict=True)] for kind, values in seconds.items()}
    return {
        "batch_size": batch,
        "steps": len(bare),
        "bare_step_ms": round(1e3 * median(bare), 1),
        "ratios": {kind: round(median(values), 3) for kind, values in ratios.items()},
        "quartiles": {kind: [round(q, 3) for q in quantiles(values, n=4)] for kind, values in ratios.items()},
        "memory": {kind: round(clock.bytes / clocks["bare"].bytes, 3) for kind, clock in clocks.items()},
    }


def main() -> None:
    """Read the command line, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each that are timed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("network", "masks by", "step / bare step", "goal", "memory of weights / bare")
    results = {}
    for name, setting in NETWORKS.items():
        results[name] = measure(name, options.steps, options.batch_size, options.threads)
        for kind, ratio in results[name]["ratios"].items():
            aim = f"{setting.goal:.2f}" if kind == "ours" else ""
            table.add_row(name, kind, f"{ratio:.3f}", aim, f"{results[name]['memory'][kind]:.2f}")
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
