"""The command line, used clumsily: whatever is wrong ends with exit code 2 and one line that says what to do."""

import shlex

import pytest
import torch
from torch import nn

from lightning_prune import IterativeMagnitudePruning, OneShot, cli
from tests.runs import Net, fit, net

MODELS = """
import lightning.pytorch as pl
import torch
from torch import nn


def build(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def build_any(**settings):
    return build(**settings)


def needs(width):
    return build(width)


class Tokens(nn.Module):
    def __init__(self, size=50):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(size, 16), nn.Linear(16, 32), nn.Linear(32, size)

    def forward(self, ids):
        return self.head(self.hidden(self.embed(ids)).relu())


def broken():
    raise KeyError("inside")


def number():
    return 3


class Blind(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def validation_step(self, batch, batch_idx):
        pass


instance = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""
IMAGE = "--input-shape 1,3,8,8"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with models and files of all kinds, which is the current one."""
    (tmp_path / "clumsy_models.py").write_text(MODELS)
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "no_class.yaml").write_text("model:\n  class_path: clumsy_models.Missing\n")
    (tmp_path / "blind.yaml").write_text("model: {class_path: clumsy_models.Blind}\ntrainer: {accelerator: cpu}\n")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.json").write_text("{}")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def ended(line):
    """Run a command line and return its exit code."""
    try:
        cli.main(shlex.split(line))
    except SystemExit as stop:
        return stop.code
    return 0


WORKS = {
    "a factory without annotations": f"inspect --model clumsy_models.build {IMAGE}",
    "its options": f"inspect --model clumsy_models.build {IMAGE} --model.width 4",
    "a factory of any options": f"inspect --model clumsy_models.build_any {IMAGE} --model.width 4",
    "a required option": f"inspect --model clumsy_models.needs {IMAGE} --model.width 4",
    "a model itself": "inspect --model clumsy_models.instance --input-shape 1,4",
    "a class of torch": (
        "inspect --model torch.nn.Linear --input-shape 1,3 --model.in_features 3 --model.out_features 5"
    ),
    "tokens": "inspect --model clumsy_models.Tokens --input-shape 1,12 --tokens 50",
    "a shape in brackets": "inspect --model clumsy_models.build --input-shape '(1, 3, 8, 8)'",
    "an equals sign": "inspect --model=clumsy_models.build --input_shape=1,3,8,8",
    "the version": "--version",
}


@pytest.mark.parametrize("line", WORKS.values(), ids=WORKS)
def test_what_people_type_works(line, here):
    """Dashes and underscores, factories as they are written, tokens."""
    assert ended(line) == 0


REFUSED = {
    "inspect --model clumsy_models.build": "needs --input-shape",
    "inspect --model clumsy_models.build --input-shape 1x3x8x8": "'1x3x8x8' is not a shape",
    "inspect --model clumsy_models.build --input-shape 1,0": "each size must be 1 or more",
    "inspect --model clumsy_models.build --input-shape 1,5,8,8": "expected input[1, 5, 8, 8] to have 3 channels",
    f"inspect --model clumsy_models.build {IMAGE} --model.widht 4": "Its options: --model.width",
    f"inspect --model clumsy_models.build {IMAGE} --model.width four": "cannot be called with {'width': 'four'}",
    f"inspect --model clumsy_models.build {IMAGE} --bogus": "unrecognized arguments: --bogus",
    f"inspect --model clumsy_models.build {IMAGE} --ignore conv9": "ignore='conv9' names no module",
    f"inspect --model clumsy_models.build {IMAGE} --ckpt-path missing.ckpt": "missing.ckpt does not exist",
    f"inspect --model clumsy_models.build {IMAGE} --ckpt-path notes.txt": "notes.txt cannot be read as a checkpoint",
    f"inspect --model clumsy_models.build {IMAGE} --ckpt-path other.pt": "other.pt does not fit Sequential",
    f"inspect --model clumsy_models.needs {IMAGE}": "clumsy_models.needs needs --model.width",
    f"inspect --model clumsy_models.broken {IMAGE}": "(KeyError: 'inside', at ",
    f"inspect --model clumsy_models.number {IMAGE}": "it returned an int, not a torch.nn.Module",
    f"inspect --model clumsy_models.missing {IMAGE}": "cannot be imported",
    f"inspect --model nowhere.build {IMAGE}": "modules are looked up from the current folder",
    "inspect --model clumsy_models.Tokens --input-shape 1,12": "If the inputs are token ids, add --tokens N",
    "inspect --model clumsy_models.Tokens --input-shape 1,12 --tokens 500": "does not run on such inputs",
    "inspect --model clumsy_models.Tokens --input-shape 1,12 --tokens 0": "must be a whole number from 1",
    "inspect --config bad.yaml": "bad.yaml is not valid YAML",
    "inspect --config missing.yaml": "missing.yaml does not exist",
    "sensitivity --config no_class.yaml --metric acc --out found": "module 'clumsy_models' has no attribute 'Missing'",
    "sensitivity --config no_class.yaml --metric acc --out notes.txt": "notes.txt is a file; name a folder",
    "inspect --config blind.yaml": "--data_class names its class",
    "sensitivity --config blind.yaml --metric acc --out found": "Blind cannot be validated",
    "report other.pt --metric acc": "--metric compares several runs",
    "report missing": "missing does not exist",
    "report s3://bucket/run": "s3://bucket/run is not on this machine",
    "report empty": "holds neither pruning.json nor a checkpoint",
    "report empty.json": "holds no history of a pruning",
    "report notes.txt": "cannot be read as a checkpoint",
    "report other.pt": "has no pruning history",
    "report other.pt --out notes.txt": "notes.txt is a file; name a folder",
    "report other.pt --batch-sizes 0": "must be a whole number from 1",
    "export --ckpt-path missing --out x.safetensors": "missing does not exist",
    "export --ckpt-path other.pt --out no/where/x.safetensors": "there is no folder no/where",
    "export --ckpt-path other.pt --out /": "--out / is a folder; name a file in it",
    "export --ckpt-path other.pt --onnx empty": "--onnx empty is a folder; name a file in it",
    "bogus": "invalid choice: 'bogus'",
    "": "the following arguments are required: command",
}


@pytest.mark.parametrize("line, told", REFUSED.items(), ids=REFUSED)
def test_what_cannot_work_ends_in_one_line(line, told, here, capsys):
    """No traceback, exit code 2, and the line names the command, what is wrong and what would be right."""
    assert ended(line) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("lightning-prune")]
    assert len(lines) == 1 and told.lower() in lines[0].lower()  # jsonargparse has changed its capitals


def test_a_checkpoint_without_masks_is_not_timed_as_the_masked_model(here, capsys):
    """What was saved before the first pruning step has the shapes of the masked model, and no masks."""
    module = net()
    early, late = here / "early.ckpt", here / "late.ckpt"

    class Saver(IterativeMagnitudePruning):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(early if trainer.current_epoch == 0 else late)

    fit(module, Saver(0.5, schedule=OneShot(1)), max_epochs=2)
    arguments = f"--latency --batch-sizes 1 --model {Net.__module__}.Net --input-shape 1,2,6,6"
    assert ended(f"report {early} {arguments}") == 2
    assert "early.ckpt holds the dense model" in capsys.readouterr().err
    assert ended(f"report {late} {arguments}") == 0
