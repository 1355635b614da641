"""Pruning works beside what else a Trainer can do."""

import copy
import pickle
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from torch import nn

from lightning_prune import Linear, prune_filters
from tests.runs import IMAGE, Known, batches, fit, net, trainer, widths
from tests.test_callback_contract import CALLBACKS, hooks_of, recipe_hooks

each_callback = pytest.mark.parametrize("kind", CALLBACKS.values(), ids=CALLBACKS)


class OwnData(Known):
    """Brings its data, and names what the tuners change."""

    def __init__(self, lr=0.05, dropout=0.2):
        super().__init__(lr, dropout)
        self.lr, self.batch_size = lr, 8

    def train_dataloader(self):
        return batches(32, self.batch_size)

    def val_dataloader(self):
        return batches(16, self.batch_size, seed=8)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), self.lr, momentum=0.9)


class WithBackbone(OwnData):
    """A backbone that is frozen at first."""

    @property
    def backbone(self):
        return self.first


def half(kind, **arguments):
    return kind(0.5, schedule=Linear(1, 3), **arguments)


def assert_half_is_gone(made):
    assert made.callback_metrics["prune/sparsity"] == pytest.approx(0.5, abs=0.03)


@each_callback
@pytest.mark.parametrize(
    "other, module_kind",
    [
        (lambda: LearningRateFinder(num_training_steps=5, update_attr=True), OwnData),
        (lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1), OwnData),
        (lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=2), WithBackbone),
        (lambda: GradientAccumulationScheduler({0: 1, 1: 2}), OwnData),
        (lambda: EarlyStopping("val_loss", patience=9), OwnData),
    ],
    ids=[
        "LearningRateFinder",
        "BatchSizeFinder",
        "BackboneFinetuning",
        "GradientAccumulationScheduler",
        "EarlyStopping",
    ],
)
def test_beside_other_callbacks(kind, other, module_kind):
    """What was asked for is gone at the end, whichever callback of Lightning's runs beside ours."""
    made = trainer(other(), half(kind), max_epochs=5)
    made.fit(net(module_kind))
    assert_half_is_gone(made)


@each_callback
@pytest.mark.parametrize(
    "arguments",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 0.5, "limit_val_batches": 1, "num_sanity_val_steps": 2, "val": True},
        {"val": True, "val_check_interval": 0.5},
        {"reload_dataloaders_every_n_epochs": 1},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 3},
    ],
    ids=lambda arguments: "-".join(f"{name}={value}" for name, value in arguments.items()),
)
def test_under_trainer_options(kind, arguments):
    """What was asked for is gone at the end, under any way to feed and to step."""
    assert_half_is_gone(fit(net(), half(kind), max_epochs=5, **arguments))


@each_callback
def test_barebones(kind):
    """A trainer that does nothing but train prunes as another does."""
    made = pl.Trainer(barebones=True, max_epochs=5, callbacks=[half(kind)], accelerator="cpu")
    made.fit(net(), batches())
    assert made.callbacks[-1].state_dict()["progress"] == 1.0


@each_callback
def test_fast_dev_run_rehearses(kind):
    """A quick trial changes nothing for good, and refuses what the real run would refuse."""
    module = net()
    fit(module, half(kind), fast_dev_run=True)
    assert widths(module) == {"first": 8, "second": 6, "hidden": 10}


@each_callback
def test_interrupted_run_leaves_a_model_that_works(kind):
    """Ctrl-C in the middle leaves a whole model without hooks of a run that is over, which trains on."""

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                raise KeyboardInterrupt

    module = net()
    with pytest.raises(SystemExit):
        fit(module, half(kind), Interrupt(), max_epochs=5)
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == recipe_hooks(module)
    assert_half_is_gone(fit(module, half(kind), max_epochs=5))


@each_callback
def test_pruned_models_copy_pickle_and_export(kind):
    """A pruned model gives the same outputs when copied, pickled and exported."""
    module = net(Known)
    fit(module, half(kind), max_epochs=5)
    module.eval()
    images = torch.randn(2, *IMAGE.shape[1:])
    expected = module(images)
    assert torch.equal(copy.deepcopy(module)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(images), expected)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner.forward(x)

    exported = torch.export.export(Plain(), (images,)).module()
    torch.testing.assert_close(exported(images), expected)


def test_fabric():
    """With Fabric a model is pruned between two steps, and its optimizer steps on."""
    fabric = Fabric(accelerator="cpu", devices=1)
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    wrapped, wrapped_optimizer = fabric.setup(module, optimizer)
    step = partial(torch.randn, 4, *IMAGE.shape[1:])
    for amount in (0.0, 0.5):
        prune_filters(module, IMAGE, amount, optimizer=optimizer)
        fabric.backward(wrapped(step()).square().sum())
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in module.parameters())
