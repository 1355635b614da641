"""Tiny networks, data and trainers for the tests of what happens in a run."""

import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import count_flops

SIDE, CLASSES = 6, 3
IMAGE = torch.zeros(1, 2, SIDE, SIDE)
WIDTHS = {"first": 8, "second": 6, "hidden": 10}  # what can leave of the networks below


class Net(pl.LightningModule):
    """Two convolutions, a hidden layer and a head, with BatchNorm and dropout between."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden = nn.Linear(6, 10)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, images):
        x = F.relu(self.norm(self.first(images)))
        x = F.relu(self.second(x)).mean(dim=(2, 3))
        return self.head(self.drop(F.relu(self.hidden(x))))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels))

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


class Known(Net):
    """The same network, which tells what its forward takes."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.2) -> None:
        super().__init__(lr, dropout)
        self.example_input_array = IMAGE


class Depthwise(Net):
    """A grouped and a depthwise convolution and LayerNorms: numbers on modules that shapes alone do not tell."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.layer_norm = nn.LayerNorm(10)

    def forward(self, images):
        x = self.grouped(F.relu(self.depthwise(F.relu(self.norm(self.first(images))))))
        x = F.relu(self.second(F.relu(x))).mean(dim=(2, 3))
        return self.head(F.relu(self.layer_norm(self.hidden(x))))


def largest_weight(weight: torch.Tensor) -> torch.Tensor:
    """A criterion of one's own: a filter's largest weight."""
    return weight.abs().flatten(1).amax(dim=1)


class Watch(Callback):
    """Notes, before every batch and after every epoch, what the model looks like."""

    def __init__(self):
        self.widths, self.params, self.flops, self.logged, self.losses = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.widths.append(widths(pl_module))
            self.params.append(sum(p.numel() for p in pl_module.parameters()))
            self.flops.append(count_flops(pl_module, IMAGE).total)

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")})
        self.losses.append(float(trainer.callback_metrics["loss"]))


class Attentive(Net):
    """Attention with head counts in attributes, in a tuple and in torch's own, and a recurrent layer."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.heads, self.qkv, self.proj = (4, 3), nn.Linear(8, 36), nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.lstm, self.second = nn.LSTM(8, 6, batch_first=True), nn.Identity()

    def forward(self, images):
        x = F.relu(self.norm(self.first(images))).flatten(2).mT[:, ::4]
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.heads)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = self.lstm(x + self.attention(x, x, x)[0])[0].mean(1)
        return self.head(F.relu(self.hidden(x)))


def images(count: int = 32, seed: int = 7) -> TensorDataset:
    """Noise around one colour per class."""
    generator = torch.Generator().manual_seed(seed)
    colours = 2 * torch.randn(CLASSES, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(colours[labels] + torch.randn(count, *IMAGE.shape[1:], generator=generator), labels)


def batches(count: int = 32, batch_size: int = 8, seed: int = 7) -> DataLoader:
    """Batches in a fixed order, so that runs can be compared."""
    # by name: after an error in a hook for loaders, Lightning hands what is given by place on twice
    return DataLoader(images(count, seed), batch_size=batch_size)


def trainer(*callbacks: pl.Callback, **arguments) -> pl.Trainer:
    """A silent trainer on the CPU that writes nothing unless it is told to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "max_epochs": 3,
        "num_sanity_val_steps": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def net(kind: type[pl.LightningModule] = Net, seed: int = 0, **arguments) -> pl.LightningModule:
    """A network with the same weights each time."""
    torch.manual_seed(seed)
    return kind(**arguments)


def fit(module, *callbacks: pl.Callback, ckpt_path=None, val: bool = False, **arguments) -> pl.Trainer:
    """Train with the same random numbers each time."""
    made = trainer(*callbacks, **arguments)
    torch.manual_seed(1)
    made.fit(module, batches(), batches(16, seed=8) if val else None, ckpt_path=ckpt_path)
    return made


def widths(module: nn.Module) -> dict[str, int]:
    """The number of units of each layer of ``Net``."""
    return {name: len(getattr(module, name).weight) for name in WIDTHS}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def assert_agrees_with_shapes(module: nn.Module) -> None:
    """The numbers on the modules repeat the shapes of their tensors."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            assert (part.out_features, part.in_features) == tuple(part.weight.shape)
        if isinstance(part, nn.Conv2d):
            assert (part.out_channels, part.in_channels // part.groups) == tuple(part.weight.shape[:2])
        if isinstance(part, nn.BatchNorm2d):
            assert part.num_features == len(part.weight) == len(part.running_mean)
        if isinstance(part, nn.LayerNorm):
            assert tuple(part.normalized_shape) == tuple(part.weight.shape)


def watch_scores(callback) -> list[tuple[dict, dict]]:
    """Return a list that fills with the scores of every pruning step, and with what was gathered for them."""
    gathering, seen = callback.member.strategy.gathering, []
    compute = gathering.scores

    def scores(*args):
        seen.append((compute(*args), gathering.gathered()))
        return seen[-1][0]

    gathering.scores = scores
    return seen
