"""What a pruning says of what was asked and what was reached, of what counted it, and of what refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import FilterL1Pruning, Linear, MetricGuard, OneShot, PruningError, prune_filters
from lightning_prune.measure import footprint
from lightning_prune.measure.flops import BY_TRACE, UntraceableError
from lightning_prune.pruning import plan
from lightning_prune.surgery import Disproof
from tests.runs import IMAGE, Known, fit, net

X = torch.randn(4, 6)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))


class Force(nn.Module):
    """Returns a gradient of what it computes, which ``torch.jit`` cannot trace."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, positions):
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            energy = self.net(positions).sum()
            return energy, -torch.autograd.grad(energy, positions)[0]


def warned(call):
    """Call, and return what came back and the warnings about amounts."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in found if "asked to prune" in str(warning.message)]


@pytest.mark.parametrize("target", ["filters", "params", "flops"])
@pytest.mark.parametrize("amount", [0.0, 0.25, 0.5])
def test_what_is_reached_is_reported(target, amount):
    """Reports carry what was asked and the share that is gone, as counted; nothing is warned of."""
    model = mlp()
    report, told = warned(lambda: prune_filters(model, X, amount, target=target, scope="global", progress=False))
    assert report.asked == pytest.approx(amount)
    gone = {
        "filters": 1 - (model[0].out_features + model[2].out_features) / 28,
        "params": 1 - sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in mlp().parameters()),
        "flops": 1 - report.flops_after / report.flops_before,
    }
    assert report.reached == pytest.approx(gone[target])
    assert report.reached >= amount - 1e-9
    assert told == []


@pytest.mark.parametrize(
    ("arguments", "reached", "reason"),
    [
        ({"amount": 0.5, "max_amount": 0.25}, 0.25, "max_amount=0.25"),
        ({"amount": 0.5, "min_width": 12}, 4 / 28, "min_width=12"),
        ({"amount": 0.3, "round_to": 16}, 0.0, "round_to=16"),
        (
            {"amount": {"0": 0.5, "2": 0.5}, "max_amount": {"2": 0.25}},
            11 / 28,
            "2 lost 25.0% of 50.0% (max_amount=0.25)",
        ),
    ],
)
def test_less_than_asked_is_warned_of_once(arguments, reached, reason):
    """A pruning that ends with less than was asked says so once: what was asked, what was reached and what kept it."""
    report, told = warned(lambda: prune_filters(mlp(), X, **arguments, progress=False))
    assert report.reached == pytest.approx(reached)
    assert len(told) == 1
    assert f"pruned {reached:.1%}" in told[0]
    assert reason in told[0]


REASON = "a reason of its own"


@pytest.fixture
def second_refuses(monkeypatch):
    """No cut of the group ``second`` can be proved."""
    own = plan.verify
    failed = Disproof(REASON, "second")
    monkeypatch.setattr(plan, "verify", lambda m, s, cut, t: failed if "second" in cut.keep else own(m, s, cut, t))
    monkeypatch.setattr(plan, "groups_at_fault", lambda *_: {"second": REASON})


@pytest.mark.usefixtures("second_refuses")
def test_refusals_are_warned_of_with_their_reasons():
    """What could not be proved is named with the reason, in the warning and where the rest cannot make up for it."""
    report, told = warned(lambda: prune_filters(net(), IMAGE, 0.5, progress=False))
    assert report.reached == pytest.approx(9 / 24)
    assert len(told) == 1
    assert f"second lost 0.0% of 50.0% ({REASON})" in told[0]
    with pytest.raises(PruningError, match=f"(?s)cannot go.*stay whole:\n  second: {REASON}"):
        prune_filters(net(), IMAGE, 0.9, target="params", progress=False)


@pytest.mark.usefixtures("second_refuses")
def test_runs_remember_why_a_group_was_refused():
    """Callbacks warn before the first epoch, once, and the reason is in pins and checkpoints when the run goes on."""
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 3))
    _, told = warned(lambda: fit(net(Known), callback, max_epochs=4))
    assert len(told) == 1
    assert f"second lost 0.0% of 50.0% ({REASON})" in told[0]
    taken = FilterL1Pruning(0.5, schedule=Linear(1, 3))
    taken.load_state_dict(callback.state_dict())
    assert taken.member.strategy.state.refused == {"second": REASON}
    assert REASON in [pin.reason for pin in taken.history.pinned]


@pytest.mark.parametrize("target", ["filters", "params", "flops"])
def test_what_the_counter_cannot_trace_is_counted_by_the_structure(target):
    """A model that torch.jit cannot trace is pruned to any budget; its count is that of the label trace."""
    model = Force()
    with pytest.raises(UntraceableError, match="runs on the example inputs, but torch.jit cannot trace it"):
        lightning_prune.count_flops(model, X)
    before = copy.deepcopy(model)
    report = prune_filters(model, X, 0.5, target=target, progress=False)
    assert report.counted == BY_TRACE
    assert report.reached >= 0.5 - 1e-9
    slim = prune_filters(before, X, 0.0, progress=False)  # the same count of the whole
    assert slim.flops_before == slim.flops_after == report.flops_before
    assert prune_filters(model, X, 0.0, progress=False).flops_before == report.flops_after  # traced anew


def test_repair_counts_what_the_counter_cannot_trace():
    """The same where what is left is refitted."""
    report = prune_filters(Force(), X, 0.5, batches=[torch.randn(64, 6)], repair=True, progress=False)
    assert report.counted == BY_TRACE


def test_a_run_counts_what_the_counter_cannot_trace():
    """Where fvcore cannot trace a module its run logs the count of the label trace, and the report says why."""

    class OnSizes(Known):
        def forward(self, images):
            channels = np.ceil(np.log(images.shape[1])).astype("int").item()  # which no torch.jit trace takes
            return super().forward(images) + 0 * channels

    twin, module, callbacks = net(Known), net(OnSizes), [FilterL1Pruning(0.5, schedule=OneShot(1)) for _ in range(2)]
    fit(twin, callbacks[0], max_epochs=2)
    fit(module, callbacks[1], max_epochs=2)
    left = [callback.history.left["prune/flops"] for callback in callbacks]
    assert left[0] == left[1] == lightning_prune.count_flops(twin, IMAGE).total
    assert callbacks[0].history.counted == "by fvcore"
    assert callbacks[1].history.counted.startswith(f"{BY_TRACE}, since fvcore cannot: ")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), PruningError("no count")], ids=["memory", "no"])
def test_a_count_that_fails_after_a_cut_does_not_fail_the_run(monkeypatch, error):
    """A run goes on when fvcore fails on the slim model, and logs what was planned."""
    twin, module, callback = net(Known), net(Known), FilterL1Pruning(0.5, schedule=OneShot(1))
    fit(twin, FilterL1Pruning(0.5, schedule=OneShot(1)), max_epochs=2)

    def broken(model, inputs):
        if model.first.out_channels < 8:
            raise error
        return lightning_prune.count_flops(model, inputs)

    monkeypatch.setattr(footprint, "count_flops", broken)
    fit(module, callback, max_epochs=2)
    assert module.first.out_channels == 4
    assert callback.history.left["prune/flops"] == lightning_prune.count_flops(twin, IMAGE).total
    assert str(error) in callback.history.counted


class Wide(Known):
    """Logs its width, so that a guard finds every cut harmful."""

    def validation_step(self, batch, batch_idx):
        self.log("width", float(self.first.out_channels))


def test_cuts_that_a_guard_took_back_are_warned_of():
    """A run that ends with less than its schedule asked, since a guard took cuts back, says so."""
    model = net(Wide)
    with pytest.warns(UserWarning, match=r"FilterL1Pruning: 0% of the cuts of OneShot\(.*MetricGuard took back"):
        fit(model, FilterL1Pruning(0.5, schedule=OneShot(1)), MetricGuard("width", drop=0.0), max_epochs=4, val=True)
    assert model.first.out_channels == 8
