"""Modules that read their hyperparameters in forward: the pruned numbers are used, and the constructor gets its own."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterL1Pruning, PruningError, TaylorFilterPruning, load_from_checkpoint, slim_loading
from tests.newer_lightning import reading
from tests.runs import Net, fit, net, trainer


class Sized(pl.LightningModule):
    """Makes a state of ``hparams.width`` numbers, and resamples to a length that is not a width of its channels."""

    def __init__(self, width=16, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.length = width
        self.hidden, self.head = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        state = torch.zeros(x.shape[0], self.hparams.width)
        shift = F.interpolate(x[:, None], self.length)[:, 0, ::5].sum(-1, keepdim=True)
        return self.head((self.hidden(x) + state).relu()) + shift

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class Nested(Sized):
    """Holds the number in a config of its own."""

    def __init__(self, sizes=None, lr=0.1):
        super().__init__(sizes["width"], lr)
        self.save_hyperparameters()

    def forward(self, x):
        state = torch.zeros(x.shape[0], self.hparams.sizes["width"])
        shift = F.interpolate(x[:, None], self.length)[:, 0, ::5].sum(-1, keepdim=True)
        return self.head((self.hidden(x) + state).relu()) + shift


PRUNE = {"l1": lambda: FilterL1Pruning(0.3), "taylor": lambda: TaylorFilterPruning(0.3)}


@pytest.mark.parametrize("made", PRUNE.values(), ids=PRUNE)
def test_a_checkpoint_builds_the_module_as_it_was_built(made, tmp_path):
    """The checkpoint holds the constructor's numbers; what loads it predicts the same, again and again."""
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(3, (32,))), 8)
    module, x = Sized(), torch.randn(4, 6)
    run = trainer(made(), max_epochs=2)
    run.fit(module, data)
    assert module.hparams.width == module.hidden.out_features == 11 and module.length == 16
    run.save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=False)["hyper_parameters"]
    assert dict(saved) == {"width": 16, "lr": 0.1} and module.hparams.width == 11
    loaded = load_from_checkpoint(Sized, tmp_path / "first.ckpt", weights_only=False)
    assert (loaded.hparams.width, loaded.length) == (11, 16)
    with slim_loading():  # the class's own loader
        again = Sized.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=False)
    for other in (loaded, again):
        assert torch.equal(other.eval()(x), module.eval()(x))
    on = trainer(made(), max_epochs=3)
    resumed = Sized()
    on.fit(resumed, data, ckpt_path=tmp_path / "first.ckpt", **reading(weights_only=False))
    on.save_checkpoint(tmp_path / "second.ckpt")
    last = load_from_checkpoint(Sized, tmp_path / "second.ckpt", weights_only=False)
    assert torch.equal(last.eval()(x), resumed.eval()(x))


@pytest.mark.parametrize("made", [Sized, lambda: Nested({"width": 16})], ids=["plain", "config"])
def test_a_checkpoint_of_weights_alone_builds_the_module_as_it_was_built(made, tmp_path):
    """Lightning lets no callback touch such a checkpoint, so its state dict carries the constructor's numbers."""
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(3, (32,))), 8)
    module, x = made(), torch.randn(4, 6)
    run = trainer(FilterL1Pruning(0.3), max_epochs=2)
    run.fit(module, data)
    path = tmp_path / "weights.ckpt"
    run.save_checkpoint(path, weights_only=True)
    assert "callbacks" not in torch.load(path, weights_only=True)
    loaded = load_from_checkpoint(type(module), path)
    assert loaded.length == 16 and loaded.hidden.out_features == 11
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    with slim_loading(), pytest.warns(UserWarning, match="width=11 instead of 16.*load_from_checkpoint"):
        type(module).load_from_checkpoint(path)  # the class's own loader calls the constructor with what is there


class Activated(Net):
    """Takes a class among its hyperparameters."""

    def __init__(self, kind=torch.nn.ReLU):
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_that_are_objects_need_trust(tmp_path):
    """A checkpoint with a class among its hyperparameters is refused with what to pass, and loads with that."""
    module = net(Activated)
    fit(module, FilterL1Pruning(0.5, report=False)).save_checkpoint(tmp_path / "with.ckpt")
    if trusting := reading(weights_only=False):
        with pytest.raises(
            PruningError, match=r"Pass weights_only=False .*GLOBAL torch\.nn\.modules\.activation\.ReLU$"
        ):
            load_from_checkpoint(Activated, tmp_path / "with.ckpt")
    with pytest.raises(PruningError, match="is a folder"):
        load_from_checkpoint(Activated, tmp_path)
    slim = load_from_checkpoint(Activated, tmp_path / "with.ckpt", **trusting)
    assert slim.first.out_channels == module.first.out_channels == 4
