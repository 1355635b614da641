"""Rounds of pruning and rewinding: each is the training of its ticket."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
)

import lightning_prune
from lightning_prune import Geometric, IterativeMagnitudePruning, Linear, OneShot
from lightning_prune.surgery.masks import masks_on
from tests.magnitude import SIZES, Falling, gone_of, pruning, zeros
from tests.newer_lightning import EMAWeightAveraging
from tests.runs import assert_same_weights, fit, net, weights


class Rewound(Callback):
    """Notes the run as it stands before the first step of every epoch, behind ours."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            (optimizer,) = trainer.optimizers
            momentum = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
            (config,) = trainer.lr_scheduler_configs
            self.seen.append(
                {
                    "weights": weights(pl_module),
                    "momentum": [buffer.clone() for buffer in momentum],
                    "lr": optimizer.param_groups[0]["lr"],
                    "scheduler": copy.deepcopy(config.scheduler.state_dict()),
                }
            )


@pytest.mark.parametrize("step", [0, 4])
def test_every_round_starts_where_the_first_did(step):
    """After a cut weights, biases, BatchNorm, momentum, learning rate and its scheduler are those of that step."""
    module, rewound = net(Falling, dropout=0.0), Rewound()
    fit(module, pruning(schedule=Geometric(2, 3), rewind_to=step), rewound, max_epochs=5)
    early = rewound.seen[step // 4]
    gone = [0, 0, 1 - 0.2**0.5, 0.8, 0.8]
    for epoch in (2, 3):
        found = rewound.seen[epoch]
        keep = {name: found["weights"][name] != 0 for name in SIZES}
        assert sum(int((~stays).sum()) for stays in keep.values()) == gone_of(gone[epoch])
        for name, value in found["weights"].items():
            assert torch.equal(value, early["weights"][name] * keep[name] if name in keep else early["weights"][name])
        assert (found["lr"], found["scheduler"]) == (early["lr"], early["scheduler"])
        names = [name for name, _ in module.named_parameters()]
        assert len(found["momentum"]) == len(early["momentum"])
        for name, now, was in zip(names, found["momentum"], early["momentum"], strict=False):
            assert torch.equal(now, was * keep[name] if name in keep else was)
    assert rewound.seen[4]["lr"] < early["lr"]


def test_a_round_is_the_training_of_its_ticket():
    """A round ends where a training ends that starts from the ticket: the initial weights within the masks."""
    module = net(dropout=0.0)
    fit(module, pruning(schedule=OneShot(2), rewind_to=0), max_epochs=4)
    ticket = net(dropout=0.0)
    lightning_prune.apply_masks_(ticket, masks_on(module))
    fit(ticket, IterativeMagnitudePruning(0.0, scope="global"), max_epochs=2)
    assert_same_weights(ticket, weights(module))


def test_the_average_starts_anew_with_a_round():
    """An average of weights forgets the rounds before."""
    averaging, seen = EMAWeightAveraging(decay=0.9), []

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                seen.append((weights(averaging._average_model.module), int(averaging._average_model.n_averaged)))

    early = net()
    initial = weights(early)
    fit(early, averaging, pruning(schedule=OneShot(1), rewind_to=0), Note())
    ((average, count),) = seen
    assert count == 0
    assert torch.equal(average["second.bias"], initial["second.bias"])
    assert int((average["second.weight"] == 0).sum()) == zeros(early)["second.weight"]


def test_controls():
    """The last round of a control has other weights in the same masks, or as many weights of each layer elsewhere."""
    runs = {}
    for control in (None, "reinitialize", "shuffle"):
        seen = Rewound()
        fit(net(Falling), pruning(schedule=Linear(1, 2), rewind_to=0, control=control), seen, max_epochs=4)
        runs[control] = [each["weights"] for each in seen.seen]
    ticket, anew, shuffled = (runs[control][2] for control in (None, "reinitialize", "shuffle"))
    for run in runs.values():
        assert all(torch.equal(run[1][name], value) for name, value in runs[None][1].items())
    for name in SIZES:
        assert torch.equal(anew[name] != 0, ticket[name] != 0)
        assert not (anew[name] == ticket[name])[ticket[name] != 0].any()
        assert (shuffled[name] != 0).sum() == (ticket[name] != 0).sum()
        both = (shuffled[name] != 0) & (ticket[name] != 0)
        assert torch.equal(shuffled[name][both], ticket[name][both])
    assert not torch.equal(shuffled["second.weight"] != 0, ticket["second.weight"] != 0)
