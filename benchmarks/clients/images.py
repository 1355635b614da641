"""Clients on images and text."""

from pathlib import Path
from typing import Any

from benchmarks.clients.finished import Finished, classifier, images, plain, trained


def timm(callback: Any, folder: Path) -> Finished:
    """Train a ResNet."""
    from timm import create_model

    loader = images(32)
    kind = classifier(lambda: create_model("resnet18", num_classes=4))
    return plain(kind, loader, next(iter(loader))[0], callback, folder)


def ultralytics(callback: Any, folder: Path) -> Finished:
    """Train the network of a YOLO classifier."""
    from ultralytics.nn.tasks import ClassificationModel

    loader = images(64)
    kind = classifier(lambda: ClassificationModel("yolov8n-cls.yaml", nc=4, verbose=False))
    return plain(kind, loader, next(iter(loader))[0], callback, folder)


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

    loader = images(64)
    shown = next(iter(loader))[0]
    module = Segmenter()
    trainer = trained(module, [loader], callback, folder)

    def predict(of: Any) -> Any:
        with torch.no_grad():
            return of.eval()(shown)

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
    return plain(SimCLR, loader, next(iter(loader))[0][0], callback, folder)


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

    loader = images(32, channels=1, image="image", label="label")
    return plain(Segmenter, loader, next(iter(loader))["image"], callback, folder)


def torchgeo(callback: Any, folder: Path) -> Finished:
    """Train a classifier of satellite images by the library's own task."""
    import torch
    from torchgeo.trainers import ClassificationTask

    task = ClassificationTask(model="resnet18", weights=None, in_channels=5, num_classes=4)
    loader = images(32, channels=5, image="image", label="label")
    trainer = trained(task, [loader, loader], callback, folder)  # its scheduler looks at the validation loss
    shown = next(iter(loader))["image"]

    def predict(of: Any) -> Any:
        with torch.no_grad():
            return of.eval()(shown)

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
    trainer = trained(module, [loader], callback, folder)

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
