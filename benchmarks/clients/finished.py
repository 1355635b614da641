"""What each client returns, and the training, images and classifier that several of them share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class Finished(NamedTuple):
    """What a library trained: the network; a function that predicts, one that saves, one that loads and predicts.

    Where the library's files cannot hold uneven widths, ``checkpoint`` has the Trainer, the class of the module and a
    function that predicts by it: Lightning's checkpoint is loaded by ``load_from_checkpoint`` then.
    """

    module: Any
    predict: Callable[[], Any]
    save: Callable[[Path], None]
    predict_loaded: Callable[[Path], Any]
    checkpoint: tuple[Any, Any, Callable[[Any], Any]] | None = None


def trained(module: Any, loaders: Sequence[Any], callback: Any, folder: Path) -> Any:
    """Train a LightningModule for two epochs of four batches, and return the Trainer."""
    import lightning.pytorch as pl

    trainer = pl.Trainer(max_epochs=2, limit_train_batches=4, callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(module, *loaders)
    return trainer


def plain(kind: Any, loader: Any, inputs: Any, callback: Any, folder: Path) -> Finished:
    """Train a LightningModule by a Trainer; Lightning's own checkpoints save and load it."""
    import torch

    module = kind()
    trainer = trained(module, [loader], callback, folder)

    def predict(of: Any) -> Any:
        with torch.no_grad():
            found = of.eval()(inputs)
        return found if isinstance(found, torch.Tensor) else found[0]

    return Finished(
        module,
        lambda: predict(module),
        lambda path: trainer.save_checkpoint(path / "model.ckpt"),
        lambda path: predict(kind.load_from_checkpoint(path / "model.ckpt", weights_only=False)),
    )


def images(size: int, channels: int = 3, classes: int = 4, **named: str) -> Any:
    """Return a loader of random images and labels, as a tuple or under names."""
    import torch
    from torch.utils.data import DataLoader

    rows = [(torch.randn(channels, size, size), torch.tensor(i % classes)) for i in range(16)]
    if named:
        return DataLoader([{named["image"]: x, named["label"]: y} for x, y in rows], batch_size=4)
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def classifier(build: Callable[[], Any]) -> Any:
    """Return a LightningModule around a network that classifies."""
    import lightning.pytorch as pl
    import torch

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, images: Any) -> Any:
            found = self.net(images)
            return found[0] if isinstance(found, tuple) else found

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            return torch.nn.functional.cross_entropy(self(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    return Classifier
