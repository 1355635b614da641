"""``trace="training_step"``: what a step runs is traced, counted and cut, and nothing comes of looking at it."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_prune import FilterL1Pruning, OneShot, PruningError, count_flops
from lightning_prune.callbacks.engine.step import instead_of_forward
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure import find_structure, trace
from tests.runs import CLASSES, fit, trainer


class TrainsElsewhere(pl.LightningModule):
    """Its forward is not what it trains; its step logs, counts, draws random numbers and remembers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.seen, self.noted = 0, []

    def forward(self, x):
        raise NotImplementedError

    def score(self, x):
        return self.head(F.dropout(F.relu(self.norm(self.first(x))), 0.1, self.training).mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.score(x + 0.01 * torch.rand_like(x))
        loss = F.cross_entropy(scores, y)
        self.accuracy(scores, y)
        self.seen += 1
        self.noted.append(float(loss))
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy}, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"steps": self.seen})
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Validates(TrainsElsewhere):
    """Trains by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.score(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self.score(batch[0]), batch[1])


class SaysNothing(TrainsElsewhere):
    """Its validation step returns nothing to go by."""

    def validation_step(self, batch, batch_idx):
        self.score(batch[0])


BATCH = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 0])


def test_what_a_step_runs_is_cut():
    """Half the filters of a module without a forward leave, and training goes on."""
    module = TrainsElsewhere()
    fit(module, FilterL1Pruning(amount=0.5, trace="training_step"))
    assert (module.first.out_channels, module.head.in_features, module.head.out_features) == (4, 4, CLASSES)


def test_a_step_has_the_structure_of_what_it_calls():
    """Groups and FLOPs of a step are those of the network that it trains."""
    module = TrainsElsewhere().eval()
    net = nn.Sequential(module.first, module.norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), module.head)
    step = instead_of_forward("training_step", BATCH)
    module._trainer = trainer()
    found, expected = (
        [group.width for group in find_structure(trace(model, inputs)).groups.values()]
        for model, inputs in ((module, step), (net, BATCH[0]))
    )
    assert found == expected == [8]
    pooling = 4 * 8 * 4 * 4  # which fvcore counts for the layer, and not for a mean
    assert count_flops(module, step).total == count_flops(net, BATCH[0]).total - pooling


def test_nothing_comes_of_looking_at_a_step(tmp_path):
    """Logs, loggers, metrics, buffers, modes, random state, attributes and the batch are as they were."""
    module = TrainsElsewhere()
    module._trainer = trainer(logger=CSVLogger(tmp_path))
    module.accuracy.update(torch.eye(CLASSES), torch.arange(CLASSES))
    before, attributes = copy.deepcopy(module.state_dict()), dict(vars(module))
    counted = {name: getattr(module.accuracy, name).clone() for name in module.accuracy._defaults}
    rng, batch = torch.get_rng_state(), [tensor.clone() for tensor in BATCH]
    step = instead_of_forward("training_step", BATCH)
    trace(module, step)
    count_flops(module, step)
    with undisturbed(module):
        step.function(module, *step.inputs)
    assert vars(module) == attributes and module.seen == 0 and module.noted == []
    assert module.training and module.accuracy._update_count == 1
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(torch.equal(getattr(module.accuracy, name), value) for name, value in counted.items())
    assert all(torch.equal(tensor, was) for tensor, was in zip(BATCH, batch, strict=True))
    assert not module._trainer.logger.experiment.metrics and not module._trainer.callback_metrics


def test_training_is_the_same_with_and_without_a_look():
    """Until the first cut a run has the losses, drawn numbers and all, of one without a callback."""
    losses = []
    for callbacks in ((), (FilterL1Pruning(amount=0.5, trace="training_step", schedule=OneShot(at=1)),)):
        torch.manual_seed(0)
        module = TrainsElsewhere()
        fit(module, *callbacks, max_epochs=2)
        losses.append(module.noted)
    first = len(losses[0]) // 2
    assert losses[0][:first] == losses[1][:first]
    assert losses[0][first:] != losses[1][first:]


def test_manual_optimization_is_traced_by_its_validation_step():
    """A training step that optimizes is refused in setup; the validation step is taken instead."""
    with pytest.raises(PruningError, match=r"optimizes manually.*trace='validation_step'"):
        fit(Validates(), FilterL1Pruning(amount=0.5, trace="training_step"))
    module = Validates()
    fit(module, FilterL1Pruning(amount=0.5, trace="validation_step"))
    assert module.first.out_channels == 4


@pytest.mark.parametrize(
    ("module", "told"),
    [(TrainsElsewhere, "has no validation_step"), (SaysNothing, "returned None.*Let it return its loss")],
)
def test_steps_that_tell_nothing_are_refused(module, told):
    """A step that the module lacks, or that returns no tensor, is refused by name."""
    with pytest.raises(PruningError, match=told):
        fit(module(), FilterL1Pruning(amount=0.5, trace="validation_step"))


@pytest.mark.parametrize("arguments", [{"trace": "test_step"}, {"trace": "training_step", "example_inputs": 1}])
def test_bad_arguments_are_refused(arguments):
    """Unknown steps, and inputs of a forward that is not run, are refused at once."""
    with pytest.raises(ValueError, match="trace="):
        FilterL1Pruning(**arguments)
