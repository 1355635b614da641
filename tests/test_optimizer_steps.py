"""Schedules by steps and ``rewind_to`` count optimizer steps, however many a batch takes."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import FilterL1Pruning, Geometric, IterativeMagnitudePruning, Linear, OneShot, PruningError
from tests.runs import Net, batches, fit, images, net, trainer, weights

BATCHES = 4  # in an epoch


class Two(Net):
    """Two optimizers, which both step in every batch: two optimizer steps."""

    def __init__(self, lr=0.05, dropout=0.0):
        super().__init__(lr, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        parts = [self.first, self.norm, self.second], [self.hidden, self.head]
        return [torch.optim.SGD([p for each in part for p in each.parameters()], self.hparams.lr) for part in parts]


class Accumulates(Net):
    """One optimizer, which steps after every second batch."""

    def __init__(self, lr=0.05, dropout=0.0):
        super().__init__(lr, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Note(Callback):
    """Notes zeros and weights by the number of optimizer steps that were made."""

    def __init__(self):
        self.zeros, self.before, self.after = {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before[trainer.global_step] = weights(pl_module)
        count = sum(int((p == 0).sum()) for p in pl_module.parameters() if p.dim() > 1)
        self.zeros.setdefault(count, trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after[trainer.global_step] = weights(pl_module)


@pytest.mark.parametrize(("kind", "each"), [(Two, 8), (Accumulates, 2), (Net, 4)])
def test_a_schedule_counts_optimizer_steps(kind, each):
    """Pruning steps fall before the batch at which so many optimizer steps were made; the last within the training."""
    note, last = Note(), 3 * each - 2
    schedule = Linear(2, last, every=2, by="steps")
    made = fit(net(kind, dropout=0.0), IterativeMagnitudePruning(0.5, schedule=schedule), note, max_epochs=3)
    assert made.global_step == 3 * each
    assert sorted(note.zeros.values()) == [0, *range(2, last + 1, 2)]
    assert max(note.zeros) == sum(p.numel() for p in net().parameters() if p.dim() > 1) // 2


@pytest.mark.parametrize(("kind", "step"), [(Two, 6), (Two, 5), (Accumulates, 2), (Net, 3)])
def test_rewinding_counts_optimizer_steps(kind, step):
    """Each round starts from the weights after that many optimizer steps, at the end of a batch."""
    note, module = Note(), net(kind, dropout=0.0)
    pruning = IterativeMagnitudePruning(0.5, schedule=Geometric(2, 3), rewind_to=step)
    if step == 5:
        with pytest.warns(UserWarning, match=r"rewind_to=5.*several optimizer steps.*after step 6"):
            fit(module, pruning, note, max_epochs=4)
    else:
        fit(module, pruning, note, max_epochs=4)
    stood = note.after[6 if step == 5 else step]
    starts = sorted(note.zeros.values())[1:]
    assert len(starts) == 2
    for start in starts:
        found = note.before[start]["first.weight"]
        assert torch.equal(found, stood["first.weight"] * (found != 0))
        assert torch.equal(note.before[start]["first.weight"] != 0, found != 0)


class Unknown(IterableDataset):
    """Examples whose number no loader knows."""

    def __iter__(self):
        return iter(images(32))


@pytest.mark.parametrize("rewind_to", [0, 3])
def test_loaders_of_unknown_length_are_rewound(rewind_to):
    """A run on a stream goes back as one on a dataset does."""
    note, module = Note(), net(dropout=0.0)
    pruning = IterativeMagnitudePruning(0.5, schedule=Geometric(1, 2), rewind_to=rewind_to)
    trainer(pruning, note, max_epochs=3).fit(module, DataLoader(Unknown(), 8))
    stood = note.after[3] if rewind_to else weights(net(dropout=0.0))
    found = note.before[2 * BATCHES]["first.weight"]
    assert torch.equal(found, stood["first.weight"] * (found != 0))


@pytest.mark.parametrize("kind", [Accumulates, "stream"])
def test_a_rewind_that_cannot_happen_is_an_error(kind):
    """A pruning step that comes before the step to rewind to stops the run, before it changes anything."""
    pruning = IterativeMagnitudePruning(0.5, schedule=OneShot(1), rewind_to=5)
    module = net(Net if kind == "stream" else kind, dropout=0.0)
    data = DataLoader(Unknown(), 8) if kind == "stream" else batches()
    made = trainer(pruning, max_epochs=3)
    with pytest.raises(PruningError, match=r"rewind_to=5.*comes after \d optimizer steps, before there is anything"):
        made.fit(module, data)
    assert made.current_epoch == 1
    assert not any((p == 0).any() for p in module.parameters() if p.dim() > 1)


def test_a_change_of_accumulation_is_no_reason_to_refuse():
    """How many steps an epoch takes is not known where batches make a step now so, now so."""
    changes = GradientAccumulationScheduler({0: 4, 1: 1})
    module = net(dropout=0.0)
    made = fit(module, FilterL1Pruning(0.5, schedule=OneShot(7, by="steps")), changes, max_epochs=3)
    assert made.global_step == 9 and module.first.out_channels == 4


class Backbone(Net):
    def __init__(self, lr=0.05, dropout=0.0):
        super().__init__(lr, dropout)
        self.backbone = self.first

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.hparams.lr)


def test_unfreezing_is_refused_beside_rewinding():
    """Layers that a callback unfreezes in some epoch cannot go back; that is said before training."""
    made = trainer(
        BackboneFinetuning(2, backbone_initial_lr=0.01),
        IterativeMagnitudePruning(0.5, schedule=Geometric(1, 2), rewind_to=0),
    )
    with pytest.raises(PruningError, match="BackboneFinetuning contradict"):
        made.fit(net(Backbone), batches())
    assert made.global_step == 0


def test_groups_added_by_hand_are_named():
    """Parameter groups that were added after the step to rewind to are an error that says so."""

    class Adds(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})

    with pytest.raises(PruningError, match=r"have \[2\] parameter groups, and had \[1\]"):
        fit(net(), IterativeMagnitudePruning(0.5, schedule=OneShot(1), rewind_to=0), Adds())
