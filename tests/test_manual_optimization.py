"""Modules that optimize manually, with one optimizer or several, are pruned like others."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_prune import FilterL1Pruning, FilterPruning, Linear, OneShot, PruningError, TaylorFilterPruning
from tests.runs import Net, assert_agrees_with_shapes, assert_same_weights, fit, net, watch_scores, weights, widths

SLIM = {"first": 4, "second": 3, "hidden": 5}


class Manual(Net):
    """Steps its one optimizer by hand, as automatic optimization does."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Two(Manual):
    """One optimizer for the convolutions, and one that gathers gradients of two batches for the rest."""

    def configure_optimizers(self):
        early = [*self.first.parameters(), *self.norm.parameters(), *self.second.parameters()]
        late = [*self.hidden.parameters(), *self.head.parameters()]
        return torch.optim.SGD(early, 0.05, momentum=0.9), torch.optim.Adam(late, 0.01)

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        one.zero_grad()
        self.manual_backward(loss)
        one.step()
        if batch_idx % 2:
            two.step()
            two.zero_grad()


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("callback", [
    lambda: FilterL1Pruning(0.5, schedule=Linear(1, 2)),
    lambda: TaylorFilterPruning(0.5, scope="layer", schedule=Linear(1, 2)),
    lambda: TaylorFilterPruning(0.5, scope="layer", schedule=Linear(1, 2), form="activations"),
    lambda: FilterPruning(0.5, criterion="apoz", schedule=Linear(1, 2)),
    lambda: FilterPruning(0.5, criterion="l2", schedule=Linear(3, 9, by="steps")),
], ids=["l1", "taylor", "activations", "apoz", "steps"])  # fmt: skip
def test_by_hand_as_by_itself(callback, precision):
    """A module that does by hand what Lightning does by itself ends at the same weights.

    By hand, hooks run inside of the training step, where Lightning's precision changes the default dtype.
    """
    by_hand, by_itself = net(Manual), net(Net)
    for module in (by_hand, by_itself):
        fit(module, callback(), precision=precision)
    assert_same_weights(by_hand, weights(by_itself))
    assert widths(by_hand) == SLIM


class Turns(Two):
    """Two optimizers that take turns: what the other one trains is frozen meanwhile, as in adversarial training."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("callback", [
    lambda: TaylorFilterPruning(0.5, scope="layer", schedule=Linear(1, 2)),
    lambda: FilterPruning(0.5, criterion="apoz", schedule=Linear(1, 2)),
    lambda: FilterPruning(0.5, criterion="activation_std", schedule=Linear(1, 2)),
], ids=["taylor", "apoz", "activation_std"])  # fmt: skip
def test_optimizers_that_take_turns(callback):
    """A pass in which all that reads a layer is frozen shows nothing of it, and those that show it are enough."""
    module = net(Turns)
    fit(module, callback())
    assert widths(module) == SLIM
    assert_agrees_with_shapes(module)


def test_gradients_that_take_turns_never_show_are_refused():
    """Where what makes channels and what reads them are never trained together, the first epoch says so."""
    with pytest.raises(PruningError, match=r"of second are not seen .* ignore=\['second'\]"):
        fit(net(Turns), TaylorFilterPruning(0.5, schedule=OneShot(2), form="activations"))
    module = net(Turns)
    fit(module, TaylorFilterPruning(0.5, schedule=Linear(1, 2), form="activations", ignore=["second"]))
    assert widths(module) == {**SLIM, "second": 6}


class Lossless(Net):
    """Skips every batch."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind, told", [(Manual, "optimizes manually"), (Lossless, "training_step returned None")])
@pytest.mark.parametrize("callback", [
    lambda: FilterPruning(0.5, criterion="obd", schedule=OneShot(1)),
    lambda: FilterPruning(0.5, criterion="output_change", schedule=OneShot(1)),
    lambda: FilterPruning(0.5, criterion="taylor_second_order", schedule=OneShot(1)),
], ids=["obd", "output_change", "taylor_second_order"])  # fmt: skip
def test_criteria_of_a_loss_are_refused_where_there_is_none(callback, kind, told):
    """That is found on the first batch, not at the first pruning step; nothing was trained until then."""
    module = net(kind)
    with pytest.raises(PruningError, match=told):
        fit(module, callback())
    assert_same_weights(module, weights(net(kind)))


@pytest.mark.parametrize("form", ["weights", "activations"])
def test_several_optimizers_resume(form, tmp_path):
    """With several optimizers a run is pruned, each state follows, and a resumed run ends where it would have."""

    def pruning():
        return TaylorFilterPruning(0.5, scope="layer", schedule=Linear(1, 3), form=form)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = net(Two, dropout=0.0)
    made = fit(whole, pruning(), saver, max_epochs=5, enable_checkpointing=True)
    assert widths(whole) == SLIM
    assert_agrees_with_shapes(whole)
    for optimizer in made.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                assert all(v.shape == parameter.shape for v in state.values() if torch.is_tensor(v) and v.dim())
    for epoch in range(4):
        resumed = net(Two, seed=9, dropout=0.0)
        fit(resumed, pruning(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert_same_weights(resumed, weights(whole))


class Expanded(Two):
    """Keeps, at each optimizer's step, the expansions by the weights that it steps, found without the library."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.expanded = {name: [] for name in SLIM}

    def on_before_optimizer_step(self, optimizer):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, reader in (("first", self.second), ("second", self.hidden), ("hidden", self.head)):
            if id(reader.weight) in stepped and self.current_epoch == 0:
                product = (reader.weight * reader.weight.grad).detach().double()
                self.expanded[name].append(product.transpose(0, 1).flatten(1).sum(1).square())


def test_units_are_scored_by_the_steps_of_what_reads_them():
    """With several optimizers, a unit's score is the mean over the steps of the optimizer that trains its readers."""
    module, callback = net(Expanded), TaylorFilterPruning(0.5, scope="global")
    seen = watch_scores(callback)
    fit(module, callback, max_epochs=2)
    ((scores, _),) = seen
    assert {name: len(found) for name, found in module.expanded.items()} == {"first": 4, "second": 2, "hidden": 2}
    for name, found in module.expanded.items():
        torch.testing.assert_close(scores[name].double(), torch.stack(found).mean(0), rtol=1e-4, atol=1e-10)


class Gathers(Manual):
    """Gathers gradients over five batches, across the ends of its epochs of four."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.batches, self.counts = 0, []

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.batches += 1
        if self.batches % 5 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_gradients_that_gather_across_a_cut_are_cut_alike():
    """What has gathered in gradients when a cut falls stays, for the units that stay."""
    found = []

    class Before(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                found.append({n: (p.detach().clone(), p.grad.clone()) for n, p in pl_module.named_parameters()})

    class After(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                found.append({n: (p.detach().clone(), p.grad.clone()) for n, p in pl_module.named_parameters()})

    module = net(Gathers)
    fit(module, FilterL1Pruning(0.5, schedule=OneShot(1)), Before(), After(), max_epochs=2)
    before, after = found
    stays = [int((before["second.bias"][0] - value).abs().argmin()) for value in after["second.bias"][0]]
    assert len(stays) == 3
    assert torch.equal(after["second.bias"][1], before["second.bias"][1][stays])
    assert torch.equal(after["head.bias"][1], before["head.bias"][1])
    assert after["second.bias"][1].abs().sum() > 0


class Unseen(Manual):
    """Steps an optimizer of torch behind Lightning's back."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        optimizer.step()


@pytest.mark.parametrize("form", ["weights", "activations"])
def test_gradients_that_no_callback_is_told_of(form):
    """Where a step tells callbacks nothing, criteria of gradients say so after the first epoch; others work."""
    with pytest.raises(PruningError, match="of their gradients nothing was seen.*manual_backward"):
        fit(net(Unseen), TaylorFilterPruning(0.5, form=form, scope="global"))
    module = net(Unseen)
    fit(module, FilterL1Pruning(0.5, schedule=Linear(1, 2)))
    assert widths(module) == SLIM


def test_gradients_that_gather_for_longer_than_an_epoch():
    """Where no step was taken yet, there was none to be seen: pruning waits."""
    module = net(Gathers)
    fit(module, TaylorFilterPruning(0.5, scope="layer"), max_epochs=3)
    assert widths(module) == SLIM


def test_losses_of_manual_steps_are_not_to_be_had():
    """Second derivatives need the loss that a training step returns, which a manual one does not."""
    with pytest.raises(PruningError, match="Manual optimizes manually: its training step returns no loss"):
        fit(net(Manual), FilterPruning(0.5, criterion="obd"))
