"""BatchNorm's statistics are averaged anew, by hand or by a callback after each cut."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import FilterL1Pruning, Linear, OneShot, PruningError, recalibrate_batch_norm
from tests.runs import Known, Net, assert_same_weights, batches, fit, images, net, trainer, weights


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 5), nn.BatchNorm1d(5)
    )


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def averaged(net, seen):
    """Mean over batches of each batch's mean and unbiased variance at both norms, without the library."""
    first = [net[0](x) for x in seen]
    second = [net[4](((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * net[1].weight + net[1].bias).relu())
              for x in first]  # fmt: skip
    return [(torch.stack([x.mean(0) for x in xs]).mean(0), torch.stack([x.var(0) for x in xs]).mean(0))
            for xs in (first, second)]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_statistics_are_averages_over_the_batches(training):
    """Means and variances become plain averages of each batch's own, layer after layer, without dropout."""
    net, seen = model().train(training), data()
    expected = averaged(net, seen)
    assert recalibrate_batch_norm(net, iter(seen)) == ("1", "5")
    for norm, (mean, var) in zip((net[1], net[5]), expected, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training):
    """Weights, gradients, modes, momenta, counts of batches and random numbers stay as they were."""
    net = model().train(training)
    net[1].momentum, net[5].momentum = 0.3, None
    net[1].num_batches_tracked.fill_(7)
    net(data()[0]).sum().backward()
    net[1].num_batches_tracked.fill_(7)
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" not in k}
    gradients, state = [p.grad.clone() for p in net.parameters()], torch.get_rng_state()
    modes = [part.training for part in net.modules()]
    recalibrate_batch_norm(net, data())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert (net[1].momentum, net[5].momentum) == (0.3, None)
    assert [part.training for part in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_layers_stay():
    """In a model that trains, a BatchNorm in eval mode is frozen; one that no batch reaches keeps its statistics."""
    net = model()
    net[1].eval()
    net.append(nn.Identity())
    net[6].unused = nn.BatchNorm1d(3)
    net[6].unused.running_mean.fill_(2.0)
    before = net[1].running_mean.clone()
    assert recalibrate_batch_norm(net, data()) == ("5",)
    assert torch.equal(net[1].running_mean, before) and net[6].unused.running_mean.eq(2.0).all()


def test_batches_are_positional_or_named_inputs_or_what_forward_takes_of_them():
    """Tuples are positional inputs, mappings keyword inputs; ``forward`` says otherwise."""
    net, seen = model(), data()
    found = []
    for given, forward in (
        (seen, None),
        ([(x,) for x in seen], None),
        ([{"input": x} for x in seen], None),
        ([(x, torch.zeros(8)) for x in seen], lambda net, batch: net(batch[0])),
    ):
        recalibrate_batch_norm(net, given, forward)
        found.append(net[1].running_mean.clone())
    assert all(torch.equal(mean, found[0]) for mean in found)


def test_no_batches_are_refused():
    """Without a batch there is nothing to average, and the statistics stay."""
    net = model()
    with pytest.raises(PruningError, match="batches is empty"):
        recalibrate_batch_norm(net, [])
    assert net[1].running_mean.eq(0).all() and recalibrate_batch_norm(nn.Linear(2, 2), []) == ()


# In a run


class Statistics(Callback):
    """Notes BatchNorm's statistics at the first batch of each epoch, and what they should be after a cut."""

    def __init__(self, count):
        self.count, self.seen, self.expected, self.modes = count, [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append(pl_module.norm.running_mean.clone())
            self.modes.append([part.training for part in pl_module.modules()])
            with torch.no_grad():
                maps = [pl_module.first(images) for images, _ in list(batches())[: self.count]]
            self.expected.append(torch.stack([x.mean(dim=(0, 2, 3)) for x in maps]).mean(0))


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
def test_a_cut_recalibrates(kind):
    """After each cut the statistics are those of the slim model over the first so many training batches."""
    statistics = Statistics(3)
    fit(net(kind), FilterL1Pruning(0.5, schedule=Linear(1, 2), recalibrate=3), statistics, max_epochs=4)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(statistics.seen, statistics.expected, strict=True)]
    assert same == [False, True, True, False]
    assert all(all(modes) for modes in statistics.modes)


class Augmented(torch.utils.data.Dataset):
    """Draws from every generator of random numbers for each example."""

    def __init__(self):
        self.images = images()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        x, y = self.images[index]
        return x + random.random() + np.random.rand() + torch.rand(()), y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_data_go_on_as_if_nothing_had_been_read(workers):
    """Order, augmentation and workers of the training are the same whether batches were read beside it or not."""
    seen = []

    class Watched(Net):
        def training_step(self, batch, batch_idx):
            seen[-1].append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    for count in (0, 2):
        seen.append([])
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        loader = DataLoader(
            Augmented(), 8, shuffle=True, generator=torch.Generator().manual_seed(2), num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        module = net(Watched, dropout=0.0)
        pruning = FilterL1Pruning(0.5, schedule=Linear(1, 9, by="steps"), recalibrate=count)
        trainer(pruning, max_epochs=3).fit(module, loader)
    assert len(seen[0]) == len(seen[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_resume_with_recalibration(tmp_path):
    """A resumed run recalibrates over the same batches and ends at equal weights and statistics."""

    def pruning():
        return FilterL1Pruning(0.5, schedule=Linear(1, 3), recalibrate=2)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    whole = net(dropout=0.0)
    fit(whole, pruning(), saver, max_epochs=5, enable_checkpointing=True)
    for step in (4, 8, 12):
        resumed = net(dropout=0.0, seed=step)
        fit(resumed, pruning(), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=5)
        assert_same_weights(resumed, weights(whole))


class Needs(Net):
    """Its forward takes nothing of the training batches, its training step does."""

    def forward(self, images, scale):
        return super().forward(images * scale)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0], torch.ones(1, 1, 1, 1)), batch[1])

    def validation_step(self, batch, batch_idx):
        """Return nothing."""


class Drops(Needs):
    """Its training step runs in train mode only."""

    def training_step(self, batch, batch_idx):
        assert self.training
        return super().training_step(batch, batch_idx)


def test_batches_that_forward_does_not_take():
    """Where forward takes nothing of a batch the step runs; where that does not run either, the error says so."""
    module = net(Needs)
    fit(module, FilterL1Pruning(0.5, schedule=OneShot(1), recalibrate=1, example_inputs=(images()[0][0][None], 1)))
    assert module.first.out_channels == 4
    module = net(Drops)
    callback = FilterL1Pruning(0.5, schedule=OneShot(1), recalibrate=1, example_inputs=(images()[0][0][None], 1))
    with pytest.raises(
        PruningError,
        match="(?s)Drops.forward accepts nothing of the training batch.*training_step: Assert.*validation_step: .*None",
    ):
        fit(module, callback)
