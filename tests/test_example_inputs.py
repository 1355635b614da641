"""What a model is traced and counted on: what forward takes of the first batch, or example inputs."""

from collections import OrderedDict
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import FilterL1Pruning, count_flops
from tests.runs import CLASSES, IMAGE, Known, fit, images, net, trainer, widths


class Parts(Dataset):
    """One example is whatever ``make`` makes of an image and its label."""

    def __init__(self, make):
        self.make, self.images = make, images(16)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.make(*self.images[index])


class Takes(pl.LightningModule):
    """Learns from ``step(module, batch) -> loss``; forward is ``call(module, ...)``."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 8, 3), nn.Linear(8, CLASSES)

    def score(self, x):
        return self.head(F.relu(self.first(x)).mean(dim=(2, 3)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class TakesTensor(Takes):
    def forward(self, x):
        return self.score(x)

    def training_step(self, batch, _):
        return self(batch).square().mean()


class TakesPair(Takes):
    def forward(self, x, y):
        return F.cross_entropy(self.score(x), y)

    def training_step(self, batch, _):
        return self(*batch)


class TakesNames(Takes):
    def forward(self, *, pixels, labels=None):
        scores = self.score(pixels)
        return {"logits": scores, "loss": None if labels is None else F.cross_entropy(scores, labels)}

    def training_step(self, batch, _):
        return self(pixels=batch["pixels"], labels=batch["labels"])["loss"]


class TakesAnyNames(TakesNames):
    def forward(self, **inputs):
        return SimpleNamespace(**super().forward(pixels=inputs["pixels"], labels=inputs.get("labels")))

    def training_step(self, batch, _):
        return self(**batch).loss


class TakesDict(Takes):
    def forward(self, batch):
        return OrderedDict(loss=F.cross_entropy(self.score(batch["pixels"]), batch["labels"]))

    def training_step(self, batch, _):
        return self(batch)["loss"]


class TakesList(Takes):
    def forward(self, x):
        return [self.score(part) for part in x]

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0])[0], batch[1])


class TakesBatch(Takes):
    """Needs more than one example at once."""

    def forward(self, x):
        if len(x) < 2:
            raise ValueError("one is too few")
        return self.score(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])


class Says(Takes):
    def forward(self, batch):
        return self.score(batch[0][0])

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch), batch[1])


KINDS = {
    "tensor": (TakesTensor, lambda x, y: x),
    "pair": (TakesPair, lambda x, y: (x, y)),
    "names": (TakesNames, lambda x, y: {"pixels": x, "labels": y, "index": 3}),
    "any-names": (TakesAnyNames, lambda x, y: {"pixels": x, "labels": y}),
    "dict": (TakesDict, lambda x, y: {"pixels": x, "labels": y}),
    "list": (TakesList, lambda x, y: ([x, x], y)),
    "whole-batch": (TakesBatch, lambda x, y: (x, y)),
    "whole-tuple": (Says, lambda x, y: ((x, x), y)),
}


@pytest.mark.parametrize("kind, make", KINDS.values(), ids=KINDS)
def test_forward_is_found_in_the_first_batch(kind, make):
    """What forward takes is found in the first batch, whether it is a tensor, a tuple or named parts."""
    module = net(kind)
    made = trainer(FilterL1Pruning(amount=0.5), max_epochs=2)
    made.fit(module, DataLoader(Parts(make), 4))
    assert len(module.first.weight) == 4
    assert made.callback_metrics["prune/sparsity"] == 0.5


@pytest.mark.parametrize(
    "inputs", [IMAGE, (IMAGE,), [IMAGE], {"images": IMAGE}], ids=["tensor", "tuple", "list", "dict"]
)
@pytest.mark.parametrize("where", ["argument", "module"])
def test_example_inputs(inputs, where):
    """Example inputs are a tensor, positional inputs or named ones, of the argument or of the module."""
    module = net()
    if where == "module":
        module.example_input_array = inputs
    fit(module, FilterL1Pruning(amount=0.5, example_inputs=inputs if where == "argument" else None))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_argument_wins_over_the_module():
    """FLOPs are those of one call on the callback's own example inputs, where it has any."""
    module = net(Known)
    made = fit(module, FilterL1Pruning(amount=0.0, example_inputs=torch.zeros(3, *IMAGE.shape[1:])))
    assert made.callback_metrics["prune/flops"] == 3 * count_flops(module, IMAGE).total


def test_one_example_of_the_batch_is_counted():
    """FLOPs found on the first batch are those of one example."""
    module = net()
    made = fit(module, FilterL1Pruning(amount=0.0))
    assert made.callback_metrics["prune/flops"] == count_flops(module, IMAGE).total


def test_example_inputs_stay():
    """Pruning does not change the example inputs, nor move them."""
    inputs = torch.randn(2, *IMAGE.shape[1:], dtype=torch.float32)
    before = inputs.clone()
    fit(net(), FilterL1Pruning(amount=0.5, example_inputs=inputs), precision="64-true")
    assert torch.equal(inputs, before) and inputs.dtype == torch.float32
