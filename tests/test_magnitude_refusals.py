"""Runs and arguments that masks make no sense in are refused, before an optimizer has stepped."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_prune import FilterL1Pruning, MetricGuard, OneShot, PruningError
from lightning_prune.algorithms.schedules import FewUnits
from tests.magnitude import pruning
from tests.runs import Net, assert_same_weights, fit, net, weights


class Sharded(SingleDeviceStrategy):
    @property
    def restore_checkpoint_after_setup(self):
        return True


class WithLBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


REFUSED = {
    "shards": (Net, {}, lambda: [], {"strategy": Sharded()}, "Sharded splits parameters into shards"),
    "LBFGS": (WithLBFGS, {}, lambda: [], {}, "LBFGS runs the model several times within a step"),
    "ModelPruning": (Net, {}, lambda: [ModelPruning("l1_unstructured")], {}, "one masks what the other wraps"),
    "pattern": (
        Net, {"amount": None, "pattern": "2:4"}, lambda: [FilterL1Pruning(0.5)], {}, "no longer keeps to the pattern",
    ),
    "rewound cuts": (Net, {"rewind_to": 0}, lambda: [FilterL1Pruning(0.5)], {}, "and FilterL1Pruning contradict"),
    "rewound guard": (Net, {"rewind_to": 0}, lambda: [MetricGuard("loss", 1)], {}, "and MetricGuard contradict"),
    "rewound SWA": (
        Net, {"rewind_to": 0}, lambda: [StochasticWeightAveraging(0.1)], {},
        "and StochasticWeightAveraging contradict",
    ),
    "late": (Net, {"rewind_to": 5, "schedule": OneShot(1)}, lambda: [], {}, "at step 4, comes before"),
}  # fmt: skip


@pytest.mark.slow
def test_spawned_processes_are_refused():
    """Strategies that train in other processes, from which the masks cannot return, are refused."""
    with pytest.raises(Exception, match="(?s)IterativeMagnitudePruning: DDPStrategy trains in processes"):
        fit(net(), pruning(), strategy="ddp_spawn", devices=2)


@pytest.mark.parametrize("kind, arguments, others, run, match", REFUSED.values(), ids=REFUSED)
def test_runs_that_cannot_be_are_refused(kind, arguments, others, run, match):
    """What cannot work is refused before the first step, and the model stays as it was."""
    module = net(kind)
    before = weights(module)
    with pytest.raises(PruningError, match=match):
        fit(module, pruning(**arguments), *others(), **run)
    assert_same_weights(module, before)


def test_a_past_step_cannot_be_rewound_to(tmp_path):
    """A run that is taken up later than the step to rewind to, without having passed it, is refused."""
    fit(net()).save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(PruningError, match=r"rewind_to=0\): training starts at step 12"):
        fit(net(), pruning(schedule=OneShot(4), rewind_to=0), ckpt_path=tmp_path / "dense.ckpt", max_epochs=6)


ARGUMENTS = {
    "percent": ({"amount": 80.0}, r"IterativeMagnitudePruning\(amount=80.0\).*Write 0.8"),
    "both": ({"pattern": "2:4"}, "Give one of both"),
    "pattern": ({"amount": None, "pattern": "4:4"}, "IterativeMagnitudePruning: pattern='4:4'"),
    "scope": ({"scope": "local"}, "scope='local'"),
    "rewind": ({"rewind_to": -1}, "rewind_to=-1"),
    "rewind before": ({"rewind_to": 9, "schedule": OneShot(8, by="steps")}, "the first cut, at step 8"),
    "control": ({"rewind_to": 0, "control": "random"}, "choose 'reinitialize', 'shuffle' or None"),
    "control alone": ({"control": "shuffle"}, "Give rewind_to, too"),
    "units": ({"schedule": FewUnits(2)}, "it counts filters and neurons, and weights leave here"),
    "gradients": ({"mask_gradients": "always"}, "choose True, False or 'auto'"),
}


@pytest.mark.parametrize("arguments, match", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_make_no_sense_are_refused(arguments, match):
    """Arguments are refused at construction, with the value found."""
    with pytest.raises(ValueError, match=match):
        pruning(**arguments)
