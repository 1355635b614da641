"""After a cut training goes on as that of a network that had been slim all along."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_prune import FilterL1Pruning, Linear, OneShot
from tests.runs import CLASSES, IMAGE, Depthwise, Known, Net, Watch, batches, fit, net, trainer, weights, widths


@pytest.mark.parametrize("kind", [Net, Known, Depthwise])
def test_loss_falls(kind):
    """The loss goes on falling while the network becomes smaller."""

    class Trained(kind):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01)

    watch = Watch()
    fit(net(Trained, dropout=0.0), FilterL1Pruning(amount=0.4, schedule=Linear(2, 6)), watch, max_epochs=12)
    assert watch.losses[-1] < 0.6 * watch.losses[0]


def test_pruned_layers_keep_learning():
    """After a cut every parameter still moves, at its new shape."""
    module = net(dropout=0.0)
    fit(module, FilterL1Pruning(amount=0.5), max_epochs=1)
    before = weights(module)
    fit(module, FilterL1Pruning(amount=0.0), max_epochs=2)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_follows(name):
    """From a cut on, training goes on as a network that had been slim all along, with the momentum of what stayed."""
    states = []

    class Trained(Net):
        def configure_optimizers(self):
            return OPTIMIZERS[name](self.parameters())

    class TakeTwin(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                (optimizer,) = trainer.optimizers
                state = {n: dict(optimizer.state[p]) for n, p in pl_module.named_parameters()}
                states.append((weights(pl_module), {n: {k: v.clone() for k, v in s.items()} for n, s in state.items()}))

    module = net(Trained, dropout=0.0)
    module.example_input_array = IMAGE
    fit(module, FilterL1Pruning(amount=0.5, schedule=OneShot(2)), TakeTwin(), max_epochs=4)
    ((start, state),) = states
    twin = Trained(dropout=0.0)
    twin.first, twin.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    twin.second, twin.hidden, twin.head = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(3, 5), nn.Linear(5, CLASSES)
    twin.load_state_dict(start)

    class GiveState(Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            for n, parameter in pl_module.named_parameters():
                optimizer.state[parameter].update(state[n])

    fit(twin, GiveState(), max_epochs=2)
    for key, value in weights(twin).items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_cut_changes_no_more_than_it_must():
    """A unit whose outgoing weights are zero leaves without changing what the network computes."""
    module = net(Known).eval()
    with torch.no_grad():
        module.first.weight[[1, 3, 4, 6]] *= 1e-3
        module.second.weight[:, [1, 3, 4, 6]] = 0
    x = torch.randn(4, *IMAGE.shape[1:])
    expected = module(x)
    module.train()
    made = trainer(FilterL1Pruning(amount={"first": 0.5}), max_epochs=1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    made.fit(module, batches(8))
    module.eval()
    module.norm.running_mean.zero_(), module.norm.running_var.fill_(1.0)
    assert widths(module)["first"] == 4
    torch.testing.assert_close(module(x), expected)


def of_plateau(optimizer, monitor):
    return {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "monitor": monitor}


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 2), [0.05, 0.05, 0.005, 0.005, 0.0005]),
        (
            lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 8), "interval": "step"},
            [0.05, 0.05, 0.005, 0.005, 0.0005],
        ),
        (lambda o: of_plateau(o, "prune/flops"), [0.05, 0.05, 0.05, 0.05, 0.05]),  # falls until epoch 3
        (lambda o: of_plateau(o, "prune/sparsity"), [0.05, 0.05, 0.005, 0.0005, 0.00005]),  # rises
    ],
    ids=["epoch", "step", "plateau-of-flops", "plateau-of-sparsity"],
)
def test_learning_rate_schedules_go_on(make, expected):
    """Learning rates follow their schedule, which may watch what is logged of the pruning."""

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": make(optimizer)}

    rates = []

    class Note(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = net(Scheduled)
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 3)), Note(), max_epochs=5)
    assert rates == pytest.approx(expected)
    assert widths(module)["first"] == 4


def test_trained_model_is_pruned_and_tuned():
    """Pruning a trained model and training on costs little: the loss returns to where it was."""
    module = net(dropout=0.0)
    before, after = Watch(), Watch()
    fit(module, before, max_epochs=10)
    fit(module, FilterL1Pruning(amount=0.3), after, max_epochs=10)
    assert after.losses[-1] < 1.1 * before.losses[-1] + 0.05
