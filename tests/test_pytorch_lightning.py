"""Those who import ``pytorch_lightning`` use the same callbacks."""

import subprocess
import sys
import textwrap

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


def test_trainer_and_cli_of_the_other_package(tmp_path):
    """Its CLI takes our callbacks from YAML, its Trainer cuts, saves and resumes, beside its averaging callback."""
    script = tmp_path / "main.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
