"""What steps do with channels beside forward is found before training, and looking for it changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import FilterL1Pruning, Linear, OneShot, PruningError, TaylorFilterPruning
from lightning_prune.callbacks.engine import unit_removal
from tests.runs import IMAGE, Net, assert_same_weights, fit, net, weights


def features(module, images):
    return F.relu(module.second(F.relu(module.norm(module.first(images)))))


class Beside(Net):
    """A network whose training step adds to the loss what a function makes of the module and the images."""

    def __init__(self, add, setup=None, step="training_step"):
        super().__init__(dropout=0.0)
        self.add, self.step = add, step
        if setup is not None:
            setup(self)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 0.01 * self.add(self, batch[0]) if self.step == "training_step" else loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.step == "validation_step":
            self.log("beside", self.add(self, batch[0]))


def centres(module):
    module.register_buffer("centres", torch.zeros(6))


def target(module):
    module.target = copy.deepcopy(module.second).requires_grad_(False)


def start(module):
    module.start = module.second.weight.detach().clone()


def auxiliary(module):
    module.auxiliary = nn.Linear(6, 3)


def follow(module, images):
    for own, copied in zip(module.second.parameters(), module.target.parameters(), strict=True):
        copied.mul_(0.9).add_(own.detach(), alpha=0.1)
    return images.sum()


BESIDE = {
    "a buffer": (lambda m, x: (features(m, x).mean((2, 3)) - m.centres).square().mean(), centres),
    "an average of weights": (follow, target),
    "weights at the start": (lambda m, x: (m.second.weight - m.start).square().sum(), start),
    "an auxiliary head": (lambda m, x: m.auxiliary(features(m, x).mean((2, 3))).square().mean(), auxiliary),
    "a literal": (lambda m, x: (m.second.weight.flatten(1) @ m.second.weight.flatten(1).T - torch.eye(6)).sum(), None),
}
"""What training steps do with channels and forward does not."""


def pruning(**arguments):
    return FilterL1Pruning(**{"amount": 0.5, "schedule": Linear(1, 2), "report": False, **arguments})


@pytest.mark.filterwarnings("ignore:.*never ran")
@pytest.mark.parametrize("when", [{}, {"schedule": OneShot(0)}, {"schedule": OneShot(0), "example_inputs": IMAGE}])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize("name", BESIDE)
def test_channels_that_steps_use_beside_forward_are_refused_before_training(name, step, when):
    """Such a run would end with a bare error after its first cut; the refusal comes first, and the model is whole."""
    module = net(lambda: Beside(*BESIDE[name], step))
    before = weights(module)
    with pytest.raises(PruningError, match=rf"FilterL1Pruning\(trace='forward'\): {step} runs on .*RuntimeError"):
        fit(module, pruning(**when), val=True)
    assert_same_weights(module, before)
    assert module.trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:.*never ran")
@pytest.mark.parametrize("name", BESIDE)
def test_where_the_step_is_traced_they_stay_or_follow(name):
    """With ``trace="training_step"`` the same runs end."""
    module = net(lambda: Beside(*BESIDE[name]))
    fit(module, pruning(trace="training_step"))
    assert len(module.hidden.weight) == 5


class Counting(Net):
    """A step with side effects: it draws numbers, counts, and keeps what it saw."""

    def __init__(self):
        super().__init__(dropout=0.2)
        self.seen, self.calls = [], 0
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.steps += 1
        self.seen.append(float(batch[0].sum()))
        batch[0].mul_(1 + 0.1 * torch.rand(()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "callback",
    [
        pruning,
        lambda: TaylorFilterPruning(0.5, schedule=Linear(1, 2), form="activations", report=False),
        lambda: TaylorFilterPruning(0.5, schedule=Linear(1, 2), report=False),
    ],
    ids=["l1", "activations", "weights"],
)
def test_looking_changes_nothing(callback, monkeypatch):
    """A run whose steps are rehearsed is the run without, to the bit, with all that its steps do beside."""
    rehearsed = net(Counting)
    fit(rehearsed, callback())
    monkeypatch.setattr(unit_removal, "refuse_cut_steps", lambda *args: None)
    plain = net(Counting)
    fit(plain, callback())
    assert_same_weights(rehearsed, weights(plain))
    assert (rehearsed.calls, rehearsed.seen) == (plain.calls, plain.seen) and plain.calls == 12


class ByHand(Counting):
    """The same, optimized by hand: two optimizers, each with its schedule, in one of the ways that people step them."""

    def __init__(self, way="plainly"):
        super().__init__()
        self.automatic_optimization = False
        self.way = way

    def configure_optimizers(self):
        early = [*self.first.parameters(), *self.norm.parameters(), *self.second.parameters()]
        late = [*self.hidden.parameters(), *self.head.parameters()]
        optimizers = [torch.optim.SGD(early, 0.05, momentum=0.9), torch.optim.Adam(late, 0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 3) for optimizer in optimizers]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        getattr(self, self.way)(loss, batch, batch_idx)
        for schedule in self.lr_schedulers():
            schedule.step()

    def plainly(self, loss, batch, batch_idx):
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def gathered(self, loss, batch, batch_idx):
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def in_turns(self, loss, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def by_closures(self, loss, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            found = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(found)
            return found

        for optimizer in self.optimizers():
            optimizer.step(closure)

    def without_lightning(self, loss, batch, batch_idx):
        loss.backward()
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.step()
            optimizer.zero_grad()


WAYS = ("plainly", "gathered", "in_turns", "by_closures", "without_lightning")


def state_of_optimizers(module):
    return [
        [optimizer.state_dict() for optimizer in module.trainer.optimizers],
        [config.scheduler.state_dict() for config in module.trainer.lr_scheduler_configs],
        module.trainer.global_step,
    ]


@pytest.mark.parametrize("way", WAYS)
def test_looking_trains_nothing_by_hand(way, monkeypatch):
    """What steps, schedules and optimizers do by hand is the same, to the bit, whether steps are rehearsed or not."""
    rehearsed = net(lambda: ByHand(way))
    fit(rehearsed, pruning())
    monkeypatch.setattr(unit_removal, "refuse_cut_steps", lambda *args: None)
    plain = net(lambda: ByHand(way))
    fit(plain, pruning())
    assert_same_weights(rehearsed, weights(plain))
    torch.testing.assert_close(state_of_optimizers(rehearsed), state_of_optimizers(plain), rtol=0, atol=0)
    assert (rehearsed.calls, rehearsed.seen) == (plain.calls, plain.seen) and plain.calls == 12


@pytest.mark.filterwarnings("ignore:.*never ran")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BESIDE)
def test_what_steps_by_hand_use_is_refused_before_training(name, way):
    """Nothing was trained when the refusal comes, in closures of optimizers, too."""
    add, setup = BESIDE[name]

    class Own(ByHand):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.manual_backward(0.01 * add(self, batch[0]))

    def made():
        module = Own(way)
        if setup is not None:
            setup(module)
        return module

    module = net(made)
    before = weights(module)
    with pytest.raises(PruningError, match=r"FilterL1Pruning\(trace='forward'\): training_step runs on .*RuntimeError"):
        fit(module, pruning())
    assert_same_weights(module, before)
    assert module.trainer.global_step == 0
    assert not any(optimizer.state for optimizer in module.trainer.optimizers)
