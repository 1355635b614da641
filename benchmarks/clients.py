"""Trains models of other libraries through their own API with our callbacks, then predicts, saves and loads.

    python -m benchmarks.clients --save                        # all; makes an environment for each, deletes it after
    python -m benchmarks.clients --clients darts monai --keep --environments environments

Each library gets a virtual environment of its own that sees the packages of the one this runs in, so that torch is not
installed again. Each client and callback runs in a process of its own. Data are made up; models are small. ``loaded``
says what loaded the file that the library itself wrote: the library's own loader as it is (``its own``), or that loader
inside ``slim_loading(recipe)`` (``ours``); or that only a checkpoint of Lightning could be loaded, by ours.
The predictions before and after must be equal.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

RESULTS = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
SECONDS = 600  # for one run
LOADED = ("its own", "ours")
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


class Client(NamedTuple):
    """A library: what to install.

    ``torchvision``: whether it needs that, which is installed without its dependencies. ``uniform``: whether its files
    have one width for all layers of a kind, so that filters are pruned with ``uniform=True``.
    """

    train: Callable[[Any, Path], Finished]
    packages: tuple[str, ...]
    torchvision: bool = False
    uniform: bool = False


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


# Forecasting


def pytorch_forecasting(callback: Any, folder: Path) -> Finished:
    """Train a temporal fusion transformer on sums of waves."""
    import lightning.pytorch as pl
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    steps = np.arange(80)
    frames = [pd.DataFrame({"t": steps, "group": str(i), "value": np.sin(steps / (3 + i)) + i}) for i in range(4)]
    data = TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True), time_idx="t", target="value", group_ids=["group"], max_encoder_length=16,
        max_prediction_length=4, time_varying_unknown_reals=["value"], time_varying_known_reals=["t"],
    )  # fmt: skip
    loader = data.to_dataloader(train=True, batch_size=16, num_workers=0)
    model = TemporalFusionTransformer.from_dataset(data, hidden_size=16, attention_head_size=2, dropout=0.0)
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=4, callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(model, loader)
    fixed = data.to_dataloader(train=False, batch_size=16, num_workers=0)

    def predict(of: Any) -> Any:
        return of.predict(fixed, trainer_kwargs={"accelerator": "cpu", "logger": False, "enable_progress_bar": False})

    def predict_loaded(path: Path) -> Any:
        return predict(TemporalFusionTransformer.load_from_checkpoint(path / "model.ckpt", weights_only=False))

    return Finished(
        model,
        lambda: predict(model),
        lambda path: trainer.save_checkpoint(path / "model.ckpt"),
        predict_loaded,
    )


def neuralforecast(callback: Any, folder: Path) -> Finished:
    """Train NHITS."""
    import numpy as np
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    days = pd.date_range("2024-01-01", periods=120, freq="D")
    frames = [pd.DataFrame({"unique_id": str(i), "ds": days, "y": np.sin(np.arange(120) / (4 + i))}) for i in range(4)]
    table = pd.concat(frames, ignore_index=True)
    model = NHITS(
        h=8, input_size=24, max_steps=8, mlp_units=[[32, 32]] * 3, batch_size=4, callbacks=[callback],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        default_root_dir=str(folder),
    )  # fmt: skip
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(table)
    return Finished(
        forecast.models[0],
        lambda: forecast.predict()["NHITS"].to_numpy(),
        lambda path: forecast.save(str(path / "model"), overwrite=True),
        lambda path: NeuralForecast.load(str(path / "model")).predict()["NHITS"].to_numpy(),
    )


def darts(callback: Any, folder: Path) -> Finished:
    """Train a temporal convolutional network."""
    import numpy as np
    from darts import TimeSeries
    from darts.models import TCNModel

    series = TimeSeries.from_values(np.sin(np.arange(160) / 5).astype(np.float32))
    model = TCNModel(
        input_chunk_length=24, output_chunk_length=8, num_filters=8, n_epochs=3, batch_size=32, dropout=0.0,
        random_state=0, pl_trainer_kwargs={"callbacks": [callback], **QUIET},
    )  # fmt: skip
    model.fit(series)
    return Finished(
        model.model,
        lambda: model.predict(8).values(),
        lambda path: model.save(str(path / "model.pt")),
        lambda path: TCNModel.load(str(path / "model.pt"), trusted=True).predict(8).values(),
    )


def gluonts(callback: Any, folder: Path) -> Finished:
    """Train a feed-forward network that predicts a distribution."""
    import numpy as np
    import pandas as pd
    import torch
    from gluonts.dataset.common import ListDataset
    from gluonts.model.predictor import Predictor
    from gluonts.torch import SimpleFeedForwardEstimator

    rows = [{"start": pd.Period("2024-01-01", freq="D"), "target": np.sin(np.arange(120) / (4 + i))} for i in range(4)]
    data = ListDataset(rows, freq="D")
    estimator = SimpleFeedForwardEstimator(
        prediction_length=8, hidden_dimensions=[32, 32], num_batches_per_epoch=4, batch_size=8,
        trainer_kwargs={"max_epochs": 3, "callbacks": [callback], "default_root_dir": str(folder), **QUIET},
    )  # fmt: skip
    predictor = estimator.train(data)

    def predict(of: Any) -> Any:
        torch.manual_seed(0)  # it samples
        return np.stack([forecast.mean for forecast in of.predict(data)])

    return Finished(
        predictor.prediction_net,
        lambda: predict(predictor),
        lambda path: predictor.serialize(path),
        lambda path: predict(Predictor.deserialize(path)),
    )


# Tables, cells and graphs


def scvi_tools(callback: Any, folder: Path) -> Finished:
    """Train the variational autoencoder of single cells."""
    import anndata
    import numpy as np
    import scvi

    counts = np.random.default_rng(0).poisson(2.0, (128, 40)).astype(np.float32)
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=32, n_latent=4)
    model.train(max_epochs=3, batch_size=32, callbacks=[callback], accelerator="cpu", enable_progress_bar=False)
    return Finished(
        model.module,
        lambda: model.get_latent_representation(),
        lambda path: model.save(str(path / "model"), overwrite=True),
        lambda path: scvi.model.SCVI.load(str(path / "model"), adata=cells, accelerator="cpu")
        .get_latent_representation(),
    )  # fmt: skip


def pytorch_tabular(callback: Any, folder: Path) -> Finished:
    """Train a classifier with embedded categories."""
    import numpy as np
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    chance = np.random.default_rng(0)
    table = pd.DataFrame(chance.normal(size=(200, 4)), columns=list("abcd"))
    table["kind"] = chance.choice(["u", "v", "w"], 200)
    table["label"] = (table["a"] + table["b"] > 0).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["label"], continuous_cols=list("abcd"), categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="32-16"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=3, batch_size=32, accelerator="cpu", progress_bar="none", checkpoints=None, load_best=False,
            early_stopping=None, checkpoints_path=str(folder),
        ),
        verbose=False,
    )  # fmt: skip
    model.fit(train=table, callbacks=[callback])

    def predict(of: Any) -> Any:
        return of.predict(table).filter(like="probability").to_numpy()

    return Finished(
        model.model,
        lambda: predict(model),
        lambda path: model.save_model(str(path / "model")),
        lambda path: predict(TabularModel.load_model(str(path / "model"))),
    )


def pyg(callback: Any, folder: Path) -> Finished:
    """Train a graph network on small graphs."""
    import lightning.pytorch as pl
    import torch
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCN, global_mean_pool

    class Graphs(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = GCN(8, 32, num_layers=3, out_channels=16)
            self.head = torch.nn.Linear(16, 2)

        def forward(self, data: Any) -> Any:
            return self.head(global_mean_pool(self.net(data.x, data.edge_index), data.batch))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch), batch.y)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    graphs = []
    for i in range(32):
        edges = torch.randint(10, (2, 30))
        graphs.append(Data(x=torch.randn(10, 8), edge_index=edges, y=torch.tensor([i % 2])))
    loader = DataLoader(graphs, batch_size=8)
    return _plain(Graphs, loader, next(iter(loader)), callback, folder)


# Images and text


def _plain(kind: Any, loader: Any, inputs: Any, callback: Any, folder: Path) -> Finished:
    """Train a LightningModule by a Trainer; Lightning's own checkpoints save and load it."""
    import lightning.pytorch as pl
    import torch

    module = kind()
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=4, callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(module, loader)

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


def _images(size: int, channels: int = 3, classes: int = 4, **named: str) -> Any:
    """Return a loader of random images and labels, as a tuple or under names."""
    import torch
    from torch.utils.data import DataLoader

    rows = [(torch.randn(channels, size, size), torch.tensor(i % classes)) for i in range(16)]
    if named:
        return DataLoader([{named["image"]: x, named["label"]: y} for x, y in rows], batch_size=4)
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def _classifier(build: Callable[[], Any]) -> Any:
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


def timm(callback: Any, folder: Path) -> Finished:
    """Train a ResNet."""
    from timm import create_model

    loader = _images(32)
    kind = _classifier(lambda: create_model("resnet18", num_classes=4))
    return _plain(kind, loader, next(iter(loader))[0], callback, folder)


def ultralytics(callback: Any, folder: Path) -> Finished:
    """Train the network of a YOLO classifier."""
    from ultralytics.nn.tasks import ClassificationModel

    loader = _images(64)
    kind = _classifier(lambda: ClassificationModel("yolov8n-cls.yaml", nc=4, verbose=False))
    return _plain(kind, loader, next(iter(loader))[0], callback, folder)


def smp(callback: Any, folder: Path) -> Finished:
    """Train a U-Net that segments; it saves and loads itself."""
    import lightning.pytorch as pl
    import segmentation_models_pytorch as models
    import torch

    class Segmenter(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = models.Unet("resnet18", encoder_weights=None, classes=1)
            self.loss = models.losses.DiceLoss("binary", from_logits=True)

        def forward(self, images: Any) -> Any:
            return self.net(images)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(self(batch[0]), (batch[0][:, :1] > 0).float())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    loader = _images(64)
    images = next(iter(loader))[0]
    module = Segmenter()
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=4, callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(module, loader)

    def predict(of: Any) -> Any:
        with torch.no_grad():
            return of.eval()(images)

    return Finished(
        module.net,
        lambda: predict(module.net),
        lambda path: module.net.save_pretrained(str(path / "model")),
        lambda path: predict(models.from_pretrained(str(path / "model"))),
        (trainer, Segmenter, lambda loaded: predict(loaded.net)),
    )


def lightly(callback: Any, folder: Path) -> Finished:
    """Train a backbone by SimCLR, on two views of each image."""
    import lightning.pytorch as pl
    import torch
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            resnet = torchvision.models.resnet18(weights=None)
            self.backbone = torch.nn.Sequential(*list(resnet.children())[:-1])
            self.projection_head = SimCLRProjectionHead(512, 64, 16)
            self.criterion = NTXentLoss()

        def forward(self, images: Any) -> Any:
            return self.projection_head(self.backbone(images).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (first, second), *_ = batch
            return self.criterion(self(first), self(second))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    rows = [((torch.randn(3, 32, 32), torch.randn(3, 32, 32)), i % 4, f"{i}.png") for i in range(16)]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    return _plain(SimCLR, loader, next(iter(loader))[0][0], callback, folder)


def monai(callback: Any, folder: Path) -> Finished:
    """Train a U-Net on batches that are dicts."""
    import lightning.pytorch as pl
    import torch
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet

    class Segmenter(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
            self.loss = DiceLoss(to_onehot_y=True, softmax=True)

        def forward(self, images: Any) -> Any:
            return self.net(images)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(self(batch["image"]), (batch["image"] > 0).float())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    loader = _images(32, channels=1, image="image", label="label")
    return _plain(Segmenter, loader, next(iter(loader))["image"], callback, folder)


def torchgeo(callback: Any, folder: Path) -> Finished:
    """Train a classifier of satellite images by the library's own task."""
    import lightning.pytorch as pl
    import torch
    from torchgeo.trainers import ClassificationTask

    task = ClassificationTask(model="resnet18", weights=None, in_channels=5, num_classes=4)
    loader = _images(32, channels=5, image="image", label="label")
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=4, callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(task, loader, loader)  # its scheduler looks at the validation loss
    images = next(iter(loader))["image"]

    def predict(of: Any) -> Any:
        with torch.no_grad():
            return of.eval()(images)

    return Finished(
        task,
        lambda: predict(task),
        lambda path: trainer.save_checkpoint(path / "model.ckpt"),
        lambda path: predict(ClassificationTask.load_from_checkpoint(path / "model.ckpt", weights_only=False)),
    )


def transformers(callback: Any, folder: Path) -> Finished:
    """Train a BERT classifier; it saves and loads itself."""
    import lightning.pytorch as pl
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2,
        max_position_embeddings=32,
    )  # fmt: skip

    class Texts(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = BertForSequenceClassification(config)

        def forward(self, **inputs: Any) -> Any:
            return self.net(**inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    tokens = torch.randint(100, (16, 12))
    rows = [{"input_ids": row, "attention_mask": torch.ones(12).long(), "labels": row[0] % 2} for row in tokens]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    module = Texts()
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=4, callbacks=[callback], default_root_dir=folder, **QUIET)
    trainer.fit(module, loader)

    def predict(of: Any) -> Any:
        with torch.no_grad():
            return of.eval()(input_ids=tokens).logits

    return Finished(
        module.net,
        lambda: predict(module.net),
        lambda path: module.net.save_pretrained(path / "model"),
        lambda path: predict(BertForSequenceClassification.from_pretrained(path / "model")),
        (trainer, Texts, lambda loaded: predict(loaded.net)),
    )


CLIENTS = {
    "pytorch-forecasting": Client(pytorch_forecasting, ("pytorch-forecasting",)),
    "neuralforecast": Client(neuralforecast, ("neuralforecast",)),
    "darts": Client(darts, ("darts",)),
    "gluonts": Client(gluonts, ("gluonts[torch]",)),
    "scvi-tools": Client(scvi_tools, ("scvi-tools",)),
    "pytorch-tabular": Client(pytorch_tabular, ("pytorch-tabular",)),
    "pyg": Client(pyg, ("torch-geometric",)),
    "timm": Client(timm, ("timm",), torchvision=True),
    "ultralytics": Client(ultralytics, ("ultralytics",), torchvision=True),
    "smp": Client(smp, ("segmentation-models-pytorch",), torchvision=True),
    "lightly": Client(lightly, ("lightly",), torchvision=True),
    "monai": Client(monai, ("monai",)),
    "torchgeo": Client(torchgeo, ("torchgeo",), torchvision=True),
    "transformers": Client(transformers, ("transformers",), uniform=True),
}


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


def environment(client: str, folder: Path) -> Path:
    """Return the interpreter of a client's environment, which is made if there is none."""
    home = folder / client
    python = home / "bin" / "python"
    if python.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "packages_of_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # A client may not bring another torch, which would be the one that is imported.
    torch, kept = _release_of("torch"), home / "constraints.txt"
    kept.write_text(f"torch=={torch}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(kept)]
    if CLIENTS[client].torchvision:
        minor = int(torch.split(".")[1]) + 15  # torch 2.0 goes with torchvision 0.15, and so on
        subprocess.run([*pip, "--no-deps", f"torchvision==0.{minor}.*"], check=True)
    subprocess.run([*pip, *CLIENTS[client].packages], check=True)
    return python


def _release_of(package: str) -> str:
    """Return the version of a package that is installed here, without the kind of its build."""
    return importlib.metadata.version(package).partition("+")[0]


def run_client(client: str, names: list[str], environments: Path) -> dict[str, Any]:
    """Run a client with each callback, in processes of its own environment."""
    try:
        python = environment(client, environments)
    except subprocess.CalledProcessError as error:
        return {"not installed": str(error)}
    found = {}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for name in names:
        command = [str(python), "-m", "benchmarks.clients", "--run", client, name]
        with TemporaryDirectory() as scratch:
            try:
                done = subprocess.run(
                    command, cwd=scratch, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
                )
                lines = done.stdout.splitlines()
                found[name] = json.loads(lines[-1]) if lines and done.returncode == 0 else {"error": done.stderr[-600:]}
            except subprocess.TimeoutExpired:
                found[name] = {"error": f"still running after {SECONDS} s"}
        print(f"{client}, {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Run the clients and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=CLIENTS)
    parser.add_argument("--callbacks", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--environments", type=Path, help="folder of the environments (default: a temporary one)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}; other clients in it stay")
    parser.add_argument("--run", nargs=2, metavar=("CLIENT", "CALLBACK"), help="run one, in this process")
    options = parser.parse_args()
    if options.run:
        found = run_one(*options.run)
        print(json.dumps(found))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and options.save else {}
    with TemporaryDirectory() as temporary:
        for client in options.clients:
            found = run_client(client, options.callbacks, options.environments or Path(temporary))
            results[client] = {**results.get(client, {}), **found}
            if options.save:
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    _print_table(results)


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("client", "callback", "started", "asked", "reached", "predicted", "saved", "loaded by", "error"):
        table.add_column(heading, overflow="fold")
    for client, by_callback in results.items():
        for name, found in by_callback.items():
            cells = [found.get(key, "") for key in ("started", "asked", "reached", "predicted", "saved", "loaded")]
            table.add_row(client, name, *map(str, cells), found.get("error", ""))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
