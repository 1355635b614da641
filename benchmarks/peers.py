"""Lets this library, Lightning's ModelPruning and torch-pruning take half of a small network away while it trains.

    python -m benchmarks.peers

Every tool is asked for half, and what came of it is counted: how much the model costs, how much of it is zero, whether
its optimizer still trains it, whether a resumed run still knows. The table is printed and written into ``peers.json``.
"""

import argparse
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, OneShot, count_flops

RESULTS = Path(__file__).with_suffix(".json")
IMAGE = torch.zeros(1, 3, 16, 16)
CUT_AT, EPOCHS = 1, 5
ASKED = {
    "flops_left": "FLOPs left (0.5 asked for)",
    "zeros": "weights that are zero (0.5 asked for where nothing is removed)",
    "zeros_after_resume": "the same after a resume and two epochs more",
    "trained": "parameters of the model that its optimizer still trains",
}


class Net(pl.LightningModule):
    """Three convolutions and a classifier, trained on noise: what is counted does not depend on what is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(F.relu(self.conv3(x)).mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class TorchPruning(Callback):
    """What one writes to call torch-pruning from a run."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import torch_pruning as tp

        if trainer.current_epoch == CUT_AT:
            pruner = tp.pruner.BasePruner(
                pl_module,
                IMAGE,
                tp.importance.MagnitudeImportance(p=1),
                pruning_ratio=0.3,
                ignored_layers=[pl_module.head],
            )  # fmt: skip
            pruner.step()


def tools() -> dict[str, Callable[[], Callback]]:
    """Return what can be compared here."""
    found: dict[str, Callable[[], Callback]] = {
        "FilterL1Pruning": lambda: FilterL1Pruning(0.5, target="flops", schedule=OneShot(CUT_AT)),
        "IterativeMagnitudePruning": lambda: IterativeMagnitudePruning(0.5, schedule=OneShot(CUT_AT), scope="global"),
        "ModelPruning": lambda: ModelPruning("l1_unstructured", amount=0.5),
    }
    if importlib.util.find_spec("torch_pruning"):
        found["torch-pruning"] = TorchPruning
    return found


def measure(make: Callable[[], Callback], folder: Path) -> dict[str, float | None]:
    """Train with one tool, resume from its last checkpoint, and count."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(256, *IMAGE.shape[1:], generator=generator), torch.randint(10, (256,), generator=generator)
    )
    dense, model = Net(), Net()
    trainer = _fit(model, make(), data, EPOCHS, folder)
    parameters = list(model.parameters())
    live = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    return {
        "flops_left": count_flops(model, IMAGE).total / count_flops(dense, IMAGE).total,
        "zeros": _zeros(model),
        "zeros_after_resume": _resumed(make, data, folder),
        "trained": sum(p.numel() for p in parameters if id(p) in live) / sum(p.numel() for p in parameters),
    }


def _fit(model: Net, callback: Callback, data: TensorDataset, epochs: int, folder: Path, **where: Path) -> pl.Trainer:
    saver = ModelCheckpoint(folder, save_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[callback, saver], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, 64), ckpt_path=where.get("ckpt_path"))
    return trainer


def _resumed(make: Callable[[], Callback], data: TensorDataset, folder: Path) -> float | None:
    resumed = Net()
    try:
        _fit(resumed, make(), data, EPOCHS + 2, folder / "resumed", ckpt_path=folder / "last.ckpt")
    except RuntimeError:  # the shapes of the checkpoint are not those of the class
        return None
    return _zeros(resumed)


def _zeros(model: nn.Module) -> float:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def main() -> None:
    """Read the command line, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in tools().items():
            with tempfile.TemporaryDirectory() as folder:
                found[name] = measure(make, Path(folder))
    table = Table("asked for half, before epoch 1 of 5", *found, title="What came of it")
    for key, told in ASKED.items():
        table.add_row(told, *(_shown(result[key]) for result in found.values()))
    Console().print(table)
    options.json.write_text(json.dumps(found, indent=2) + "\n")


def _shown(value: float | None) -> str:
    return "cannot resume" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
