"""A few units leave, training goes on for some steps, and so on until the amount is gone; cuts by steps in general."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import ConcatDataset, DataLoader

from lightning_prune import Cubic, FilterL1Pruning, Linear, MetricGuard, OneShot, PruningError, TaylorFilterPruning
from lightning_prune.algorithms.schedules import FewUnits
from tests.runs import Net, assert_same_weights, fit, images, net, trainer, weights, widths


class Steps(Callback):
    """Notes the units left before every step."""

    def __init__(self):
        self.units = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.units.setdefault(trainer.global_step, sum(widths(pl_module).values()))


@given(
    units=st.integers(1, 9), every=st.integers(1, 9), start=st.integers(0, 20), of=st.integers(0, 60),
    moments=st.lists(st.integers(0, 300), min_size=2, max_size=2).map(sorted),
)  # fmt: skip
def test_as_many_cuts_as_it_takes(units, every, start, of, moments):
    """Of so many units, each cut lets as many leave as asked; the last one is as early as it can be."""
    schedule = FewUnits(units, every, start).over(of)
    cuts = max(1, math.ceil(of / units))
    assert schedule.last == start + every * (cuts - 1)
    shares = [schedule.progress(moment) for moment in moments]
    assert shares == sorted(shares)
    assert schedule.progress(schedule.last) == 1.0 and schedule.progress(start - 1) == 0.0
    for cut in range(1, cuts):
        assert schedule.at_most(schedule.progress(start + every * (cut - 1))) == cut * units
    assert schedule.at_most(1.0) is None


@pytest.mark.parametrize("kind", [FilterL1Pruning, TaylorFilterPruning])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_few_units_at_a_time(kind, scope):
    """Every so many steps at most so many filters leave, of all layers together, until the amount has."""
    steps = Steps()
    fit(net(), kind(0.5, scope=scope, schedule=FewUnits(units=5, every=2, start=3)), steps)
    expected = [24] * 3 + [19] * 2 + [14] * 2 + [12] * 5
    assert [steps.units[step] for step in range(12)] == expected


@pytest.mark.parametrize("target", ["flops", "params"])
def test_towards_a_budget(target):
    """Towards a budget of the whole model, too, few leave at once, and the budget is reached in the end."""
    steps = Steps()
    made = fit(net(), FilterL1Pruning(0.5, target=target, scope="global", schedule=FewUnits(units=2, every=1)), steps)
    left = list(steps.units.values())
    assert all(before - after <= 2 for before, after in zip([24, *left], left, strict=False))
    assert made.callback_metrics[f"prune/{target}_kept"] <= 0.5


def test_a_training_too_short_is_refused_before_the_first_step():
    """How many cuts it takes is known before training: one that ends earlier is refused with the step of the last."""
    with pytest.raises(
        PruningError, match=r"FewUnits\(units=1.*\) for 12 units to prune is complete only before step 22"
    ):
        fit(net(), FilterL1Pruning(0.5, schedule=FewUnits(units=1, every=2)))
    module = net()
    fit(module, FilterL1Pruning(0.5, schedule=FewUnits(units=1, every=2)), max_epochs=6)
    assert sum(widths(module).values()) == 12


def test_by_epochs_and_patterns():
    """Moments may count epochs, and amounts go by pattern."""
    module, steps = net(), Steps()
    fit(module, FilterL1Pruning({"first": 0.5, "hidden": 0.3}, schedule=FewUnits(3, by="epochs")), steps)
    assert [steps.units[step] for step in (0, 4, 8)] == [21, 18, 17]
    assert widths(module) == {"first": 4, "second": 6, "hidden": 7}


@pytest.mark.parametrize(
    "make", [lambda: FewUnits(0), lambda: FewUnits(1, 0), lambda: FewUnits(1, 1, -1), lambda: FewUnits(1, by="weeks")]
)
def test_impossible_schedules_are_refused(make):
    """No unit, no step between cuts, a start before the first step and unknown counts are refused at construction."""
    with pytest.raises(ValueError, match="FewUnits"):
        make()


# Cuts by steps in a run

SCHEDULES = {
    "few": FewUnits(units=3, every=2, start=3),
    "linear": Linear(1, 9, every=3, by="steps"),
    "cubic": Cubic(2, 8, by="steps"),
    "one-shot": OneShot(5, by="steps"),
}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.filterwarnings("ignore")
def test_cuts_by_steps_fall_between_windows_of_accumulation(schedule, precision):
    """A cut by steps comes right after an optimizer's step, so that no gradient of a window is lost to it."""
    cuts = []

    class Watched(Net):
        def on_train_batch_start(self, batch, batch_idx):  # runs after callbacks
            now = sum(widths(self).values())
            if (cuts and now != cuts[-1][0]) or not cuts:
                cuts.append((now, batch_idx))

    module = net(Watched)
    fit(module, FilterL1Pruning(0.5, schedule=schedule), max_epochs=15, accumulate_grad_batches=3, precision=precision)
    assert len(cuts) > 1 and all(batch_idx in (0, 3) for _, batch_idx in cuts)  # windows of 3 and 1 of 4 batches
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.parametrize("kind", [pytest.param(FilterL1Pruning, marks=pytest.mark.slow), TaylorFilterPruning])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_resume_from_any_step(kind, schedule, tmp_path):
    """From the checkpoint of any step, a run with cuts by steps ends where the uninterrupted one does."""
    loader = DataLoader(ConcatDataset([images(8)] * 4), 8)  # a resumed epoch begins with its first batch again
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = net(dropout=0.0)
    trainer(kind(0.5, schedule=schedule), saver, enable_checkpointing=True).fit(whole, loader)
    for step in range(1, 12):
        resumed = net(dropout=0.0, seed=step)
        trainer(kind(0.5, schedule=schedule)).fit(resumed, loader, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_weights(resumed, weights(whole))


# Guards


class Scripted(Net):
    """Its validation metric follows a script, one value a validation."""

    def __init__(self, script=(), **arguments):
        super().__init__(**arguments)
        self.script, self.validations = list(script), 0

    def on_validation_end(self):
        self.validations += 1

    def validation_step(self, batch, batch_idx):
        self.log("score", self.script[min(self.validations, len(self.script) - 1)])


@pytest.mark.parametrize(
    ("then", "expected"), [("stop", [22, 20, 18, 20, 20, 20, 20]), ("halve", [22, 20, 18, 19, 19, 17, 16])]
)
def test_a_guard_takes_a_few_units_back(then, expected):
    """A guard judges cuts by steps at validations within epochs, takes the last back, and stops or goes on by half."""
    steps = Steps()
    module = Scripted([0.9, 0.9, 0.9, 0.1, *[0.9] * 9])
    pruning = FilterL1Pruning(0.5, schedule=FewUnits(units=2, every=2, start=2), scope="global")
    fit(module, pruning, MetricGuard("score", 0.1, then=then), steps, val=True, val_check_interval=2, max_epochs=4)
    assert [steps.units[step] for step in (2, 4, 6, 8, 9, 12, 15)] == expected


def test_a_guard_waits_for_a_validation():
    """While no validation has seen the last cut, no further one is made."""
    steps = Steps()
    pruning = FilterL1Pruning(0.5, schedule=FewUnits(units=2, every=1, start=1), scope="global")
    fit(Scripted([0.9]), pruning, MetricGuard("score", 0.1), steps, val=True, max_epochs=5)
    left = [steps.units[step] for step in range(20)]
    drops = [step for step in range(1, 20) if left[step] != left[step - 1]]
    assert drops[0] == 1 and all(step % 4 == 0 for step in drops[1:])
