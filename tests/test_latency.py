"""A share of the latency, measured on this machine, leaves."""

import copy
import itertools
import random
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_prune import FilterL1Pruning, Linear, OneShot, PruningError, prune_filters
from lightning_prune.measure.footprint import Footprint
from lightning_prune.measure.latency import latency_kept, shapes_of
from lightning_prune.pruning import plan
from lightning_prune.pruning.budget import Budget, Dense, select_units
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery import cut_, draft
from tests.runs import Known, assert_same_weights, fit, net, weights, widths


class Clock:
    """A clock that goes on by a millisecond for every channel that a layer makes, and otherwise stands still."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("lightning_prune.measure.latency.perf_counter", made)
    return made


class Slow(nn.Module):
    """Takes a time that is known."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.first, self.second, self.head = nn.Linear(4, 20), nn.Linear(20, 40), nn.Linear(40, 2)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x).relu()
            self.clock.now += 1e-3 * layer.out_features
        return self.head(x)


def channels(model):
    return model.first.out_features + model.second.out_features


@pytest.mark.parametrize("scope, amount", [("layer", 0.5), ("global", 0.3)])
def test_the_latency_asked_for_leaves(scope, amount, clock):
    """With target="latency" the share that was asked for is gone, to 5 %, and the report tells what was measured."""
    model, x = Slow(clock), torch.ones(3, 4)
    report = prune_filters(model, x, amount, target="latency", scope=scope)
    assert channels(model) == 60 * (1 - amount)
    assert report.latency_kept == pytest.approx(1 - amount)
    assert report.measured == f"on cpu, threads: {torch.get_num_threads()}, inputs: (3, 4)"


class Busy(Clock):
    """Another program takes half of the machine from time to time, for many calls in a row."""

    def __init__(self):
        super().__init__()
        self.rest = random.Random(0)
        self.calls_until_change, self.slow = 10, False

    def spend(self, seconds):
        self.calls_until_change -= 1
        if self.calls_until_change == 0:
            self.calls_until_change, self.slow = self.rest.randint(25, 60), not self.slow
        self.now += seconds * (2.0 if self.slow else 1.0)


def test_a_busy_machine_hits_both_models(monkeypatch):
    """The whole and the slim model are called in short turns, so that a load that comes and goes changes no share."""
    clock = Busy()
    monkeypatch.setattr("lightning_prune.measure.latency.perf_counter", clock)
    turns = Mock()  # what a list would hold is taken back

    class Net(Slow):
        def forward(self, x):
            turns(self.first.out_features)
            self.clock.spend(1e-3 * self.first.out_features)
            return x

    model, x = Net(clock), torch.ones(1, 4)
    structure = find_structure(trace(Slow(Clock()), x))
    for _ in range(10):
        share = latency_kept(model, x, structure, {"first": np.arange(20) < 10}, shapes_of(model, structure))
        assert share == pytest.approx(0.5, rel=0.01)
    lengths = [len(list(run)) for _, run in itertools.groupby(turns.call_args_list)]
    assert max(lengths) <= 4


@pytest.mark.parametrize("reached", [0.2, 0.59])
def test_latencies_that_are_missed_are_warned_of(reached, monkeypatch, clock):
    """Where the latency measured of the plan is another than was asked, a warning names both, whichever is larger."""
    measured = iter([*itertools.repeat(0.5, 3), *itertools.repeat(1 - reached, 1000)])
    monkeypatch.setattr(plan, "latency_kept", lambda *_: next(measured))
    monkeypatch.setattr(plan, "select_units", lambda structure, *_, **options: halves(structure, options["latency"]))
    with pytest.warns(UserWarning, match=f"prune_filters: asked to prune 50.0% of the latency, pruned {reached:.1%}"):
        report = prune_filters(Slow(clock), torch.ones(1, 4), 0.5, target="latency")
    assert report.reached == pytest.approx(reached)


def halves(structure, latency):
    keep = {name: np.arange(group.width) % 2 > 0 for name, group in structure.groups.items()}
    for _ in range(3):
        latency(keep)
    return keep


def test_latencies_out_of_reach_are_refused(clock):
    """What one unit in every group still takes cannot go; the model stays as it was."""
    model = Slow(clock)
    with pytest.raises(PruningError, match="amount=0.99 of the latency cannot go.*96.7% would be gone"):
        prune_filters(model, torch.ones(1, 4), 0.99, target="latency")
    assert channels(model) == 60


def test_amounts_count_from_the_whole_models_latency(clock):
    """A model that was cut before is timed beside one of the shape it had as a whole."""
    model, x = Slow(clock), torch.ones(1, 4)
    structure = find_structure(trace(model, x))
    whole = shapes_of(model, structure)
    cut = draft(model, structure, {"first": np.arange(20) < 10, "second": np.arange(40) < 10})
    cut_(model, cut, cut.tensors(model))
    now = find_structure(trace(model, x))
    assert latency_kept(model, x, now, {}, whole) == pytest.approx(20 / 60)
    keep = {"second": np.arange(10) < 2}
    assert latency_kept(model, x, now, keep, whole) == pytest.approx(12 / 60)
    assert channels(model) == 20


def test_measuring_changes_nothing():
    """Values, mode, gradients and random numbers are as they were."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)), torch.ones(3, 4)
    structure = find_structure(trace(model, x))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, state = list(model.parameters()), torch.get_rng_state()
    whole = shapes_of(model, structure)
    whole.sizes["0.weight"] = [16, 4]  # as if some had left
    whole.sizes["0.bias"] = whole.sizes["1.weight"] = whole.sizes["1.bias"] = [16]
    whole.sizes["1.running_mean"] = whole.sizes["1.running_var"] = [16]
    whole.sizes["3.weight"] = [2, 16]
    latency_kept(model, x, structure, {"0": np.arange(8) < 2}, whole)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].out_features == model[1].num_features == model[3].in_features == 8
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_clock_is_borne(seed):
    """One measurement in ten that is far too slow, and odd widths that cost more, do not spoil the search."""
    noise = random.Random(seed)
    model = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 2))
    structure = find_structure(trace(model, torch.ones(1, 4)))

    def real(width):
        return (width + (6 if width % 2 else 0)) / 200

    def measured(keep):
        disturbed = 1.5 if noise.random() < 1 / 10 else 1.0
        return real(int(keep["0"].sum())) * noise.uniform(0.99, 1.01) * disturbed

    amount = noise.uniform(0.1, 0.8)
    keep = select_units(
        structure, {"0": torch.arange(200.0)}, amount, Budget("latency", "global"), latency=measured,
        dense=Dense({"0": 200}, Footprint(0, 0)), footprint=lambda keep: Footprint(0, 0),
    )  # fmt: skip
    assert real(int(keep["0"].sum())) == pytest.approx(1 - amount, rel=0.05)


class Picky(Slow):
    """Does not run with a second layer of another width."""

    def forward(self, x):
        if self.second.out_features < 40:
            raise RuntimeError("too narrow")
        return super().forward(x)


def test_what_does_not_run_slim_stays(clock):
    """A group without which the model does not run is found while timing, and the others make up for it."""
    model = Picky(clock)
    report = prune_filters(model, torch.ones(1, 4), 0.2, target="latency", scope="global")
    assert model.second.out_features == 40
    assert channels(model) == 48
    assert any("too narrow" in pin.reason for pin in report.pinned)


class SlowNet(Known):
    """Takes a time that is known, in eval mode."""

    clock = None

    def forward(self, images):
        self.clock.now += 1e-3 * sum(widths(self).values())
        return super().forward(images)


def slow_net(clock):
    module = net(SlowNet, dropout=0.0)
    module.clock = clock
    return module


def test_latency_in_a_run(clock, tmp_path, capsys):
    """A callback reaches the share of the latency that is due, of the whole model's, logs it, and resumes exactly."""

    def pruning():
        return FilterL1Pruning(0.5, target="latency", scope="global", schedule=Linear(1, 3))

    class Notes(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append((sum(widths(pl_module).values()), float(trainer.callback_metrics["prune/latency_kept"])))

    notes, saver = Notes(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = slow_net(clock)
    fit(module, pruning(), notes, saver, max_epochs=5, enable_checkpointing=True)
    assert [units for units, _ in notes.seen] == [24, 20, 16, 12, 12]
    assert [kept for _, kept in notes.seen] == pytest.approx([units / 24 for units, _ in notes.seen])
    assert "50.0% of the latency on cpu" in " ".join(capsys.readouterr().out.split())
    for epoch in range(4):
        resumed = slow_net(clock)
        fit(resumed, pruning(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert_same_weights(resumed, weights(module))


def test_a_latency_target_needs_the_shape_of_the_start(clock, tmp_path):
    """Resumed with another target, a run cannot know the latency of the whole model, and says so."""
    module = slow_net(clock)
    made = fit(module, FilterL1Pruning(0.3, schedule=Linear(1, 2)))
    made.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(PruningError, match="the checkpoint is of a run with another target"):
        fit(slow_net(clock), FilterL1Pruning(0.5, target="latency", schedule=OneShot(4)),
            ckpt_path=tmp_path / "other.ckpt",            max_epochs=6)  # fmt: skip


@pytest.mark.slow
def test_real_time():
    """A real model, timed again with fresh inputs and the stopwatch of the test, has lost what was asked."""

    def seconds(model, x):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    widths = [3, 96, 96, 96, 96]
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 256, 10)).eval()
    whole = copy.deepcopy(model)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        prune_filters(model, x, 0.5, target="latency", scope="global")
        ratios = [seconds(model, x) / seconds(whole, x) for _ in range(15)]
    assert float(np.median(ratios)) == pytest.approx(0.5, rel=0.08)  # the test's own clock is disturbed, too
