"""Draws the reports of five runs on scikit-learn's digits, which the documentation shows: docs/images/report*.png.

python -m benchmarks.gallery            # five trainings of a minute each; writes gallery.json beside this file
python -m benchmarks.gallery --only report-guard
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn

from examples.digits import ONE_IMAGE, Digits, DigitsNet
from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    IterativeMagnitudePruning,
    LayerPruning,
    Linear,
    MetricGuard,
    OneShot,
    TaylorFilterPruning,
)
from lightning_prune.callbacks import LearningRateRewinding
from lightning_prune.reports.run_picture import picture_of
from lightning_prune.reports.run_summary import headline

RESULTS = Path(__file__).with_suffix(".json")
IMAGES = Path(__file__).parents[1] / "docs" / "images"
DENSE, EPOCHS = 16, 16  # of the training before, and of the one that prunes


class DeepNet(DigitsNet):
    """The network of the example with six blocks instead of two."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self._block(32) for _ in range(6))


# name of the picture -> the network, and the callbacks; the first one prunes
RUNS: dict[str, tuple[type[DigitsNet], Callable[[], list[Callback]]]] = {
    "report": (
        DigitsNet,
        lambda: [FilterL1Pruning(0.5, target="flops", schedule=Cubic(2, 8, every=2))],
    ),
    "report-at-once": (
        DigitsNet,
        lambda: [TaylorFilterPruning(0.8, target="flops", schedule=OneShot(2)), LearningRateRewinding()],
    ),
    "report-guard": (
        DigitsNet,
        lambda: [
            FilterL1Pruning(0.97, target="flops", schedule=Linear(2, 11, every=3)),
            MetricGuard(monitor="val_acc", drop=0.01, patience=3),
        ],
    ),
    "report-weights": (
        DigitsNet,
        lambda: [IterativeMagnitudePruning(0.95, scope="global", schedule=Cubic(2, 10, every=2))],
    ),
    "report-layers": (
        DeepNet,
        lambda: [LayerPruning(0.49, target="flops", schedule=Linear(2, 8, every=3))],
    ),
}


def trained(make: type[DigitsNet], callbacks: list[Callback]) -> Any:
    """Train a network, and once more with the callbacks; return the history of the second run."""
    pl.seed_everything(0, verbose=False)
    net = make()
    net.example_input_array = ONE_IMAGE
    for epochs, added in ((DENSE, []), (EPOCHS, callbacks)):
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=added, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(net, datamodule=Digits())
    return callbacks[0].history  # type: ignore[attr-defined]


def write_small(picture: bytes, path: Path) -> None:
    """Write a picture with at most 64 colours, which these have, so that the file is small."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        make, callbacks = RUNS[name]
        history = trained(make, callbacks())
        write_small(picture_of(history).png, IMAGES / f"{name}.png")
        found[name] = headline(history)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, *found[name], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
