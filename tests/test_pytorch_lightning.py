"""Those who import ``pytorch_lightning`` use the same callbacks."""

import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from lightning_prune.callbacks.validation import trainer_sensitivity
from tests.mixtures import WIDTH, Mixture
from tests.newer_lightning import has_averaging

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
SCRIPT = """
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.hidden(x).relu())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(3, (32,))), 8)


callbacks = '[{class_path: EMAWeightAveraging}, {class_path: FilterL1Pruning, init_args: {amount: 0.5}}]'
cli = LightningCLI(
    Model, Data, save_config_callback=None,
    args=["fit", "--trainer.max_epochs=2", "--trainer.logger=false", f"--trainer.callbacks={callbacks}"],
)
checkpoint = cli.trainer.checkpoint_callback.best_model_path
assert cli.model.hidden.out_features == 8
assert lightning_prune.load_from_checkpoint(Model, checkpoint).hidden.out_features == 8
resumed = Model()
again = [EMAWeightAveraging(), lightning_prune.FilterL1Pruning(0.5)]
pl.Trainer(max_epochs=3, callbacks=again, logger=False).fit(resumed, Data(), ckpt_path=checkpoint)
assert resumed.hidden.out_features == 8
"""


@pytest.mark.skipif(not has_averaging, reason="Lightning has averaged weights from 2.6 on")
def test_trainer_and_cli_of_the_other_package(tmp_path):
    """Its CLI takes our callbacks from YAML, its Trainer cuts, saves and resumes, beside its averaging callback."""
    script = tmp_path / "main.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def net_of(pl):
    """A network of one of the packages, with every hook that a callback may ask about left as it is."""

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, batch_idx):
            loss = self.training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    return Model()


def data():
    return DataLoader(TensorDataset(torch.randn(32, 8), torch.randn(32, 1)), 8)


def trainer_of(pl, callbacks=(), **settings):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(max_epochs=2, callbacks=callbacks, accelerator="cpu", **{**quiet, **settings})


CUTS = {"FilterL1Pruning": {}, "FilterPruning": {"criterion": "apoz"}, "TaylorFilterPruning": {}}
MASKS = {"IterativeMagnitudePruning": {}, "OBSOneShot": {}}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["LayerPruning", "ExpertPruning"])
def test_layers_and_experts_leave_in_either_package(package, name):
    """Half of the layers, or of the experts, are gone after a run."""
    pl = importlib.import_module(package)
    model = net_of(pl)
    blocks = [Mixture(experts=4) for _ in range(4)]
    model.net = nn.Sequential(nn.Linear(8, WIDTH), *blocks, nn.Linear(WIDTH, 1))
    trainer_of(pl, getattr(lightning_prune.callbacks, name)(0.5)).fit(model, data())
    left = [block for block in model.net if isinstance(block, Mixture)]
    assert (len(left), len(left[0].experts)) == ((2, 4) if name == "LayerPruning" else (4, 2))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", lightning_prune.callbacks.__all__)
def test_every_callback_in_either_package(package, name, tmp_path):
    """Every exported callback is one of the Trainer's own, passed alone or in a list, and prunes half of the model."""
    pl = importlib.import_module(package)
    model, kind, settings = net_of(pl), getattr(lightning_prune.callbacks, name), {}
    if name == "MetricGuard":
        callbacks = [kind("loss", drop=1e9), lightning_prune.FilterL1Pruning(0.5)]
    elif name in ("PruningCheckpoint", "PruningEarlyStopping"):
        callbacks = [kind(monitor="loss"), lightning_prune.FilterL1Pruning(0.5)]
        settings = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    elif name == "DistillFromDense":
        callbacks = [kind(loss="mse"), lightning_prune.FilterL1Pruning(0.5)]
    elif name == "LearningRateRewinding":
        callbacks = [lightning_prune.FilterL1Pruning(0.5), kind()]
        optimizer = model.configure_optimizers()
        model.configure_optimizers = lambda: ([optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)])
    elif name == "WeightSharing":
        callbacks = [lightning_prune.FilterL1Pruning(0.5), kind(bits=4, epoch=1)]
    elif name in ("LayerPruning", "ExpertPruning"):
        pytest.skip("the model here has no layers or experts that can leave; the next test removes both")
    else:
        callbacks = kind(amount=0.5, **{**CUTS, **MASKS}[name])
        assert isinstance(callbacks, pl.Callback)
    trainer_of(pl, callbacks, **settings).fit(model, data(), data())
    if name in MASKS:
        zeros = sum(int((model.net[layer].weight == 0).sum()) for layer in (0, 2))
        assert zeros == (8 * 32 + 32) // 2
    else:
        assert model.net[0].out_features == 16


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_steps_are_traced_in_either_package(package, step):
    """What a step runs is cut; a step that the module does not have is refused by its name."""
    pl = importlib.import_module(package)
    model = net_of(pl)
    trainer_of(pl, lightning_prune.FilterL1Pruning(0.5, trace=step)).fit(model, data())
    assert model.net[0].out_features == 16
    del type(model).validation_step
    if step == "validation_step":
        with pytest.raises(lightning_prune.PruningError, match="has no validation_step"):
            trainer_of(pl, lightning_prune.FilterL1Pruning(0.5, trace=step)).fit(model, data())


@pytest.mark.parametrize("package", PACKAGES)
def test_sensitivity_by_the_trainer_of_either_package(package):
    """Its progress bar rests meanwhile, and comes back."""
    pl = importlib.import_module(package)
    trainer = trainer_of(pl, enable_progress_bar=True)
    before = list(trainer.callbacks)
    found = trainer_sensitivity(trainer, net_of(pl), data(), metric="loss", shares=(0.5,), progress=False)
    assert [(group.name, group.width) for group in found.groups] == [("net.0", 32)]
    assert trainer.callbacks == before
