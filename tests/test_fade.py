"""Units that fade before their pruning step: the cut changes nothing, and whatever happens meanwhile is followed."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
    TaylorFilterPruning,
)
from lightning_prune.algorithms.schedules import FewUnits
from tests.runs import (
    CLASSES,
    IMAGE,
    Depthwise,
    Net,
    assert_same_weights,
    batches,
    fit,
    images,
    net,
    trainer,
    weights,
    widths,
)


class Residual(Net):
    """Two branches that are added and one that is concatenated, behind a gate, with BatchNorm everywhere."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16)])
        self.second = nn.Conv2d(16, 6, 3, padding=1)

    def forward(self, images):
        x = F.silu(self.norm(self.first(images)))
        x = self.norms[0](x + self.left(x)) * self.right(x).sigmoid()
        x = self.norms[1](torch.cat([x, self.left(x)], dim=1))
        return self.head(F.gelu(self.hidden(F.relu(self.second(x)).mean(dim=(2, 3)))))


class Tied(Net):
    """One layer that is called twice, under two names."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.between = nn.Linear(10, 10)
        self.again = self.between

    def forward(self, images):
        x = F.relu(self.norm(self.first(images)))
        x = self.hidden(F.relu(self.second(x)).mean(dim=(2, 3)))
        return self.head(F.relu(self.again(F.relu(self.between(F.relu(x))))))


class Attentive(Net):
    """Queries and keys, which no weight sums over, values that one does, and a recurrent layer."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.query, self.key, self.value = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 12)
        self.lstm, self.second = nn.LSTM(12, 6, batch_first=True), nn.Identity()

    def forward(self, images):
        x = F.relu(self.norm(self.first(images))).flatten(2).mT[:, ::4]
        similar = (self.query(x) @ self.key(x).mT).softmax(-1)
        x = self.lstm(similar @ self.value(x))[0].mean(1)
        return self.head(F.relu(self.hidden(x)))


class Outputs(Callback):
    """Notes the outputs in eval mode after every batch, and before the next one, when pruning may have happened."""

    def __init__(self):
        self.after, self.before, self.params = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(outputs(pl_module))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before.append(outputs(pl_module))
        self.params.append(sum(parameter.numel() for parameter in pl_module.parameters()))


def outputs(module):
    training = module.training
    module.eval()
    with torch.no_grad():
        found = module(images(16, seed=5).tensors[0].to(next(module.parameters())))
    module.train(training)
    return found


def cuts(seen):
    """Return the places in a run at which the model became smaller."""
    return [at for at in range(1, len(seen.params)) if seen.params[at] < seen.params[at - 1]]


def assert_cuts_change_nothing(seen, count, relative=1e-12):
    found = cuts(seen)
    assert len(found) == count
    for at in found:
        before, after = seen.after[at - 1], seen.before[at]
        assert (before - after).abs().max() <= relative * before.abs().max()


KINDS = {
    "l1": lambda **given: FilterL1Pruning(0.5, **given),
    "taylor": lambda **given: TaylorFilterPruning(0.5, **given),
    "activations": lambda **given: FilterPruning(0.5, criterion="apoz", **given),
    "obs": lambda **given: FilterPruning(0.5, criterion="obs", batches=1, repair=False, **given),
    "flops": lambda **given: FilterL1Pruning(0.5, target="flops", scope="global", **given),
}
SCHEDULES = {
    "epochs": (OneShot(2), 1),
    "cubic": (Cubic(1, 3), 2),
    "steps": (OneShot(6, by="steps"), 1),
    "linear steps": (Linear(4, 12, every=4, by="steps"), 3),
    "few": (FewUnits(4, every=3, start=3), 3),
}


@pytest.mark.parametrize("schedule, count", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_cut_changes_nothing(make, schedule, count):
    """By any criterion and schedule, outputs right before a cut, in float64, are those right after it."""
    module, seen = net(dropout=0.0), Outputs()
    fit(module, make(schedule=schedule, fade_steps=3), seen, max_epochs=5, precision="64-true")
    found = cuts(seen)
    assert len(found) >= count
    assert_cuts_change_nothing(seen, len(found))


@pytest.mark.parametrize("kind", [Net, Residual, Tied, Depthwise, Attentive])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_structures_and_optimizers(kind, optimizer, monkeypatch):
    """Residual, concatenated, gated, shared, depthwise and attended channels fade, whatever steps the weights."""
    monkeypatch.setattr(
        kind, "configure_optimizers", lambda self: getattr(torch.optim, optimizer)(self.parameters(), 0.01)
    )
    module, seen = net(kind, dropout=0.0), Outputs()
    statistics = ["layer_norm", "hidden"] if kind is Depthwise else []  # removing units changes what a LayerNorm gives
    pruning = FilterL1Pruning(0.5, schedule=OneShot(2), fade_steps=5, ignore=statistics)
    fit(module, pruning, seen, max_epochs=4, precision="64-true")
    assert_cuts_change_nothing(seen, 1)


def test_without_a_fade_the_same_cut_changes_much():
    """The same run that removes units at once changes the outputs; the test above can fail."""
    module, seen = net(dropout=0.0), Outputs()
    fit(module, FilterL1Pruning(0.5, schedule=OneShot(2)), seen, max_epochs=4, precision="64-true")
    with pytest.raises(AssertionError):
        assert_cuts_change_nothing(seen, 1, relative=1e-3)


class Weights(Callback):
    """Notes the weight that sums over the hidden units, before and after each of its optimizer's steps."""

    def __init__(self):
        self.found, self.stepped = [], []

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda *_: self.stepped.append(pl_module.head.weight.detach().clone()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.append(pl_module.head.weight.detach().clone())


def test_factors_fall_evenly():
    """After each step the chosen columns are the optimizer's times 3/4, 2/3, 1/2 and 0; others are not touched."""
    module, seen = net(dropout=0.0), Weights()
    pruning = FilterL1Pruning(0.5, schedule=OneShot(6, by="steps"), fade_steps=4, ignore=["first", "second"])
    kept = []
    cut = pruning.member.strategy.after_cut
    pruning.member.strategy.after_cut = lambda run, plan: (kept.append(plan.keep["hidden"]), cut(run, plan))
    fit(module, seen, pruning)  # it looks before the callback fades
    gone = torch.from_numpy(~kept[0])
    assert len(seen.found[5][0]) == 10 and len(seen.found[6][0]) == 5
    factors = [1, 1, 3 / 4, 2 / 3, 1 / 2, 0]
    looking = net(dropout=0.0), Weights()
    later = FilterL1Pruning(0.5, schedule=OneShot(6, by="steps"), fade_steps=4, ignore=["first", "second"])
    fit(looking[0], later, looking[1])  # it looks after the callback has faded
    for step, factor in enumerate(factors):
        stepped, found = looking[1].stepped[step], looking[1].found[step]
        torch.testing.assert_close(found[:, gone], stepped[:, gone] * factor)
        assert torch.equal(found[:, ~gone], stepped[:, ~gone])


@pytest.mark.parametrize("make", [KINDS["l1"], KINDS["taylor"]], ids=["l1", "taylor"])
@pytest.mark.parametrize(
    "arguments, stop, among",
    [({}, 5, (6, 7, 8)), ({}, 6, (6, 7, 8)), ({}, 7, (6, 7, 8)), ({}, 8, (6, 7, 8))]
    + [({"accumulate_grad_batches": 3}, stop, (2, 3, 4)) for stop in (2, 3, 4)],
)
def test_resumed_in_the_middle_of_a_fade(make, arguments, stop, among, tmp_path):
    """A run that ends after any batch of a fade goes on, to the bit, as one that was not interrupted."""

    def run(module, last, ckpt_path=None):
        saving = ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        given = {"max_epochs": 5, "enable_checkpointing": True, **arguments, "max_steps": last}
        made = trainer(make(schedule=OneShot(2), fade_steps=3), saving, **given)
        # Lightning does not go to a batch in the middle of an epoch, so all of them are alike.
        made.fit(module, DataLoader(ConcatDataset([images(8)] * 4), 8), ckpt_path=ckpt_path)

    whole = net(dropout=0.0)
    run(whole, -1)
    assert widths(whole)["hidden"] == 5
    saved = torch.load(tmp_path / f"step={stop}.ckpt", weights_only=True)["callbacks"]
    fades = [state["fade"] for state in saved.values() if "fade" in state]
    assert (fades[0] is None) == (stop not in among)
    second = net(seed=4, dropout=0.0)
    run(second, -1, tmp_path / f"step={stop}.ckpt")
    assert_same_weights(second, weights(whole))


def test_accumulated_gradients_count_steps():
    """Under accumulation, and with a short last window, units are zero at the end of the epoch before the cut."""
    module, seen = net(dropout=0.0), Outputs()
    pruning = FilterL1Pruning(0.5, schedule=OneShot(2), fade_steps=4)
    fit(module, pruning, seen, max_epochs=4, accumulate_grad_batches=3, precision="64-true")
    assert_cuts_change_nothing(seen, 1)
    by_steps = FilterL1Pruning(0.5, schedule=OneShot(3, by="steps"), fade_steps=2)
    module, seen = net(dropout=0.0), Outputs()
    fit(module, by_steps, seen, max_epochs=4, accumulate_grad_batches=2, precision="64-true")
    assert_cuts_change_nothing(seen, 1)


class Twice(Net):
    """Optimizes by hand, twice a batch."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for half in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0][half::2]), batch[1][half::2]))
            optimizer.step()


@pytest.mark.parametrize("schedule", [OneShot(2), OneShot(7, by="steps"), OneShot(8, by="steps")], ids=str)
def test_manual_optimization(schedule):
    """Where a batch takes two steps by hand, what fades is zero when the cut is due."""
    module, seen = net(Twice), Outputs()
    fit(module, FilterL1Pruning(0.5, schedule=schedule, fade_steps=4), seen, max_epochs=4, precision="64-true")
    assert_cuts_change_nothing(seen, 1)


class Worse(Net):
    """Reports a loss that is worse from the second epoch on."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch >= 2))


def test_a_guard_takes_the_fade_back_with_the_cut():
    """A cut that does harm is taken back to before its units began to fade, and is judged after the cut alone."""
    module, noted = net(Worse, dropout=0.0), {}

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            noted[trainer.global_step] = weights(pl_module), pruning.member.strategy.fading

    pruning = FilterL1Pruning(0.5, schedule=OneShot(2), fade_steps=6)
    fit(module, MetricGuard("val_loss", 0.5), pruning, Note(), val=True, max_epochs=4)
    assert noted[1][1] is None and noted[2][1] == 1.0  # of 8 steps before the cut
    assert len(noted[8][0]["hidden.weight"]) == 5
    assert_same = noted[12][0]
    assert all(torch.equal(value, noted[2][0][name]) for name, value in assert_same.items())
    assert pruning.member.clock.stopped and widths(module)["hidden"] == 10


def test_other_callbacks_may_cut_meanwhile():
    """What fades follows the cut of another callback, and its own cut changes nothing."""
    module, seen = net(Residual), Outputs()
    one = FilterL1Pruning({"second": 0.5}, schedule=OneShot(10, by="steps"), fade_steps=8)
    other = FilterL1Pruning({"left": 0.5}, schedule=OneShot(6, by="steps"))
    fit(module, one, other, seen, max_epochs=4, precision="64-true")
    found = cuts(seen)
    assert found == [6, 10]
    before, after = seen.after[9], seen.before[10]
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()


def test_masks_and_averages_may_be_there():
    """Masked weights stay zero while units fade."""
    module, seen = net(dropout=0.0), Outputs()
    masks = IterativeMagnitudePruning(0.5, schedule=OneShot(1))
    fit(module, masks, FilterL1Pruning(0.5, schedule=OneShot(2), fade_steps=3), seen, max_epochs=4, precision="64-true")
    assert_cuts_change_nothing(seen, 1)


def test_what_cannot_fade_is_refused():
    """A first pruning step before any training, other numbers and data of unknown length are refused."""
    for steps in (-1, 1.5, True):
        with pytest.raises(ValueError, match="fade_steps="):
            FilterL1Pruning(fade_steps=steps)
    with pytest.raises(ValueError, match="no step comes before the first one"):
        FilterL1Pruning(fade_steps=3)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(IMAGE.shape[1:]), torch.tensor(CLASSES - 1)

    pruning = FilterL1Pruning(0.5, schedule=OneShot(2), fade_steps=3)
    with pytest.raises(PruningError, match="do not tell how many batches"):
        trainer(pruning, max_epochs=4).fit(net(), torch.utils.data.DataLoader(Endless(), 4))


def test_a_cut_that_could_not_fade_says_so():
    """Where a guard holds a pruning step back until it is overdue, it is made at once, with a warning."""
    module = net(dropout=0.0)
    pruning = FilterL1Pruning(0.5, schedule=Linear(1, 2), fade_steps=2)
    with pytest.warns(UserWarning, match="is made at once"):
        fit(module, MetricGuard("val_loss", 100.0, patience=2), pruning, val=True, max_epochs=5)
    assert widths(module)["hidden"] == 5 and len(batches()) == 4
