"""What a model is traced and counted on: what forward takes of the first batch, or example inputs."""

import re
from collections import OrderedDict
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import FilterL1Pruning, FilterPruning, OBSOneShot, PruningError, count_flops
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


# Batches that no person sees


class Holds:
    """A batch with attributes, as those of graphs are."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Holds(self.x.to(device), self.y.to(device))


class OfObjects(Takes):
    """Forward takes two attributes of the batch."""

    def forward(self, x, y):
        return F.cross_entropy(self.score(x), y)

    def training_step(self, batch, _):
        return self(batch.x, batch.y)


class OfImages(TakesTensor):
    """Forward takes one value of the batch, or one attribute."""

    def training_step(self, batch, _):
        return self(batch["image"] if isinstance(batch, dict) else batch.x).square().mean()


class OfSteps(Takes):
    """Forward takes what only the step makes of a batch, with a scale that no batch holds."""

    def forward(self, pixels, scale):
        return self.score(pixels * scale)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch["pixels"], 2.0), batch["labels"])


class NoForward(Takes):
    """All happens in the step."""

    def training_step(self, batch, _):
        return F.cross_entropy(self.score(batch["pixels"]), batch["labels"])


class Manual(NoForward):
    """Its training step trains; its validation step can be looked at."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()

    def validation_step(self, batch, index):
        return super().training_step(batch, index)


def together(parts):
    """Stack examples that are objects."""
    return Holds(torch.stack([part.x for part in parts]), torch.tensor([part.y for part in parts]))


def pixels(x, y):
    return {"pixels": x, "labels": y}


HIDDEN = {
    "value": (OfImages, lambda x, y: {"image": x, "mask": y}, None, r"forward of batch\['image'\]"),
    "attribute": (OfImages, Holds, together, r"forward of batch\.x"),
    "attributes": (OfObjects, Holds, together, r"forward of batch\.x, batch\.y"),
    "step": (OfSteps, pixels, None, "training_step"),
    "no-forward": (NoForward, pixels, None, "training_step"),
    "manual": (Manual, pixels, None, "validation_step"),
}


@pytest.mark.parametrize("kind, make, collate, told", HIDDEN.values(), ids=HIDDEN)
def test_a_way_in_is_found_and_told(kind, make, collate, told, caplog):
    """Single values, attributes and steps are tried after forward on the batch, and the log says what was chosen."""
    module = net(kind)
    with caplog.at_level("INFO"):
        trainer(FilterL1Pruning(amount=0.5), max_epochs=1).fit(module, DataLoader(Parts(make), 4, collate_fn=collate))
    assert len(module.first.weight) == 4
    assert re.search(f"{kind.__name__} is traced on {told}\\.", caplog.text)


READERS = {
    "obs": lambda: OBSOneShot(amount=0.5, batches=2),
    "recalibrate": lambda: FilterL1Pruning(amount=0.5, recalibrate=1),
    "criterion": lambda: FilterPruning(amount=0.5, criterion="obs", batches=2),
    "repair": lambda: FilterPruning(amount=0.5, repair=True, batches=2),
}


@pytest.mark.parametrize("kind", [OfSteps, NoForward, Manual])
@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_batches_are_read_by_the_same_way(kind, make):
    """What runs the model on training batches runs its step, too, where forward takes none of them."""
    module = net(kind)
    module.norm = nn.BatchNorm2d(2)
    module.score = lambda x: Takes.score(module, module.norm(x))
    callback = make()
    trainer(callback, max_epochs=1).fit(module, DataLoader(Parts(pixels), 4))
    zeros = int((module.first.weight == 0).sum())
    assert zeros == 8 * 2 * 9 // 2 if isinstance(callback, OBSOneShot) else len(module.first.weight) == 4


def test_inputs_of_a_forward_that_is_not_there():
    """Example inputs for a module without forward are refused with advice that works."""
    with pytest.raises(PruningError, match="NoForward has no forward.*Leave them out"):
        trainer(FilterL1Pruning(amount=0.5, example_inputs=IMAGE)).fit(net(NoForward), DataLoader(Parts(pixels), 4))
    module = net(NoForward)
    module.example_input_array = IMAGE  # which only forward takes
    trainer(FilterL1Pruning(amount=0.5), max_epochs=1).fit(module, DataLoader(Parts(pixels), 4))
    assert len(module.first.weight) == 4
