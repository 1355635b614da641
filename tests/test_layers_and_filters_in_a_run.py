"""Layers and filters under one amount, in a run: chosen as by prune_filters, and what every callback promises."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    LayerPruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
    TaylorFilterPruning,
    count_flops,
    load_from_checkpoint,
    prune_filters,
)
from lightning_prune.algorithms.schedules import FewUnits
from lightning_prune.reports.run_tables import run_tables
from lightning_prune.surgery.pass_through import Skipped
from tests.in_processes import seen_by_both
from tests.newer_lightning import WeightAveraging, reading
from tests.runs import CLASSES, IMAGE, Net, assert_same_weights, batches, fit, net, weights

KINDS = {
    "l1": FilterL1Pruning,
    "taylor": TaylorFilterPruning,
    "obs": partial(FilterPruning, criterion="obs", batches=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
one_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=name, marks=[pytest.mark.slow] * (name != "l1")) for name, kind in KINDS.items()]
)


class Residual(nn.Module):
    def __init__(self, width, gain):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, width, 1)
        self.back.weight.data.mul_(gain)
        self.back.bias.data.zero_()

    def forward(self, x):
        return x + self.back(F.relu(self.norm(self.conv(x))))


class Deep(Net):
    """Residual blocks, some of which do next to nothing, between the first convolution and the head."""

    def __init__(self, gains=(1.0, 0.01, 0.01), **arguments):
        super().__init__(**{"dropout": 0.0, **arguments})
        del self.second, self.hidden
        self.blocks = nn.Sequential(*(Residual(8, gain) for gain in gains))
        self.head = nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        self.last = super().training_step(batch, batch_idx)  # with its graph, which torch does not copy
        return self.last

    def forward(self, images):
        x = self.blocks(F.relu(self.norm(self.first(images))))
        return self.head(self.drop(x.mean(dim=(2, 3))))


@cache
def trained():
    """Return weights with which blocks of a small gain are worth less than filters of the others."""
    module = net(Deep)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for batch in [*batches()] * 10:
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
    return module.state_dict()


def deep(kind=Deep):
    """Return the trained network."""
    module = net(kind)
    module.load_state_dict(trained())
    return module


def gone(module):
    return [path for path, part in module.named_modules() if isinstance(part, Skipped)]


def cost(module, target):
    return count_flops(module, IMAGE).total if target == "flops" else sum(p.numel() for p in module.parameters())


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


class StopError(Exception):
    """Ends a run at its first batch."""


class AtOnce(Deep):
    def on_train_batch_start(self, batch, batch_idx):  # comes after that of callbacks
        raise StopError


@pytest.mark.parametrize("target", ["params", pytest.param("flops", marks=pytest.mark.slow)])
@every_kind
def test_a_run_chooses_as_the_function_does(kind, target):
    """The first pruning step removes what ``prune_filters(layers=True)`` removes, and weights are equal bit for bit."""
    module = deep(AtOnce)
    alone = copy.deepcopy(module)
    callback = kind(0.5, target=target, schedule=OneShot(), layers=True, example_inputs=IMAGE, scope="global")
    with pytest.raises(StopError):
        fit(module, callback)
    criterion = getattr(callback, "criterion", "taylor" if kind is TaylorFilterPruning else "l1")
    given = list(batches())[: getattr(callback, "batches", 8)]
    asked = {"criterion": criterion, "target": target, "scope": "global", "batches": given, "loss": loss}
    report = prune_filters(alone, IMAGE, 0.5, **asked, layers=True, progress=False)
    assert gone(module) == sorted(layer.path for layer in report.removed)
    assert gone(module) or criterion == "obs"  # whose repair makes filters worth less than any block
    assert_same_weights(module, weights(alone))


@pytest.mark.parametrize("target", ["flops", pytest.param("params", marks=pytest.mark.slow)])
@one_kind
def test_both_leave_gradually(kind, target):
    """After each pruning step as much is gone as its schedule asks for; optimizer, logs and history follow."""
    seen = []

    class Watched(Deep):
        def on_train_batch_start(self, batch, batch_idx):  # comes after that of callbacks
            if batch_idx == 0:
                seen.append((cost(self, target), len(gone(self))))

    module = deep(Watched)
    kept, dense = dict(module.named_parameters()), cost(module, target)
    callback = kind(0.6, target=target, schedule=Linear(1, 2), layers=True, example_inputs=IMAGE, scope="global")
    trainer = fit(module, callback, max_epochs=3)
    assert [layers for _, layers in seen] == sorted(layers for _, layers in seen)
    for share, (left, _) in zip((0, 0.3, 0.6), seen, strict=True):
        assert 1 - left / dense >= share - 1e-9
    (optimizer,) = trainer.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in module.parameters())
    assert all(kept[name] is parameter for name, parameter in module.named_parameters())
    metrics, history = trainer.callback_metrics, callback.history
    assert float(metrics[f"prune/{target}"]) == cost(module, target)
    assert float(metrics[f"prune/{target}_kept"]) == pytest.approx(cost(module, target) / dense)
    assert history.goals[0].asked == 0.6 and history.goals[0].reached == pytest.approx(1 - cost(module, target) / dense)
    assert sorted(path for path, when in history.depth.items() if when) == gone(module)
    units = 8 + 3 * 12  # of the first convolution and inside of the blocks
    left = module.first.out_channels + sum(block.conv.out_channels for block in module.blocks if not gone(block))
    assert float(metrics["prune/sparsity"]) == pytest.approx(1 - left / units)
    if gone(module):
        change = history.layers[f"{gone(module)[0]}.conv"]
        assert (change.before.width, change.now.width, change.now.params) == (12, 0, 0)
        assert any("Removed layers" in table.title.plain for table in run_tables(history))


@one_kind
def test_the_next_step_is_that_of_a_slim_twin(kind):
    """The step after a pruning step is that of a model which was built slim, with the slim optimizer's state."""
    twins = []

    class Twinned(Deep):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 0:
                self.last = None  # which this cannot copy
                twin = copy.deepcopy(self)
                optimizer = twin.configure_optimizers()
                optimizer.load_state_dict(copy.deepcopy(self.optimizers().state_dict()))
                loss(twin, batch).backward()
                optimizer.step()
                twins.append(twin)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 0:
                twins.append(weights(self))

    module = deep(Twinned)
    fit(module, kind(0.5, target="flops", schedule=OneShot(1), layers=True, example_inputs=IMAGE), max_epochs=2)
    assert gone(twins[0]) == gone(module) and cost(module, "flops") <= cost(deep(), "flops") / 2
    assert_same_weights(twins[0], twins[1])


@one_kind
def test_a_resumed_run_ends_where_the_other_does(kind, tmp_path):
    """Killed between pruning steps and resumed with a new model, a run ends bit for bit where it would have ended."""
    given = {"scope": "global", "max_amount": {"blocks.2.conv": 0.9}}  # a limit of a layer that leaves
    make = partial(kind, 0.6, target="params", schedule=Linear(1, 2), layers=True, example_inputs=IMAGE, **given)
    whole = deep()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(whole, make(), saving, max_epochs=3, enable_checkpointing=True)
    other, file = net(Deep, seed=1), tmp_path / "epoch=1.ckpt"
    fit(other, make(), max_epochs=3, ckpt_path=file)
    assert gone(other) == gone(whole)
    assert_same_weights(other, weights(whole))
    loaded = load_from_checkpoint(Deep, file)
    assert cost(whole, "params") < cost(loaded, "params") < cost(deep(), "params")
    # The best may have other layers and filters.
    trainer.test(whole, batches(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), **reading(weights_only=False))
    assert gone(whole) == [] and cost(whole, "params") == cost(deep(), "params")


@pytest.mark.parametrize("then", ["stop", pytest.param("halve", marks=pytest.mark.slow)])
def test_a_guard_brings_both_back(then):
    """A pruning step that does harm is rolled back: layers, widths, values, optimizer and what the callback knows."""

    class Judged(Deep):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0 - 0.3 * bool(gone(self)))

    module = deep(Judged)
    guard = MetricGuard("val_acc", drop=0.1, mode="max", then=then)
    callback = FilterL1Pruning(0.6, target="params", schedule=Linear(1, 2), layers=True, example_inputs=IMAGE)
    trainer = fit(module, callback, guard, val=True, max_epochs=4)
    assert guard.state_dict()["cuts_back"] >= 1 and not gone(module)
    assert not any(callback.history.depth.values())
    assert callback.history.goals[0].reached == pytest.approx(1 - cost(module, "params") / cost(deep(), "params"))
    (optimizer,) = trainer.optimizers
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.parameters()}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in module.parameters())


def test_averaged_copies_follow():
    """A copy that averages weights loses the same layers and filters, and ends as the model's own shape."""
    module = deep()
    callback = FilterL1Pruning(0.5, target="params", schedule=OneShot(1), layers=True, scope="global")
    fit(module, WeightAveraging(), callback, max_epochs=2)
    assert gone(module) and torch.isfinite(module(IMAGE)).all()


def test_latency_is_relative_to_the_dense_model(monkeypatch):
    """At every pruning step timings put back the layers and filters that are gone."""
    seen = []

    def seconds(self, calls):
        with self._shape():
            model = self._call.args[0]
            left = [block for block in model.blocks if not isinstance(block, Skipped)]
            seen.append(0.2 + sum(0.1 + 0.1 * block.conv.out_channels / 12 for block in left))
            return seen[-1]

    monkeypatch.setattr("lightning_prune.measure.latency.Turn.seconds", seconds)
    module = deep()
    callback = FilterL1Pruning(
        0.6,
        target="latency",
        schedule=Linear(1, 2),
        layers=True,
        scope="global",
        example_inputs=IMAGE,
        ignore=["first"],
    )
    trainer = fit(module, callback, max_epochs=3)
    left = [block for block in module.blocks if not isinstance(block, Skipped)]
    share = 0.2 + sum(0.1 + 0.1 * block.conv.out_channels / 12 for block in left)
    assert float(trainer.callback_metrics["prune/latency_kept"]) == pytest.approx(share / 0.8)
    assert share / 0.8 <= 0.42 and max(seen[-2:]) == pytest.approx(0.8) and gone(module)


REFUSED = {
    "target": ({}, "share one amount"),
    "pattern": ({"amount": {"first": 0.5}, "target": "params"}, "amounts by pattern"),
    "schedule": ({"target": "params", "schedule": FewUnits(1, by="epochs")}, "it counts filters"),
    "fade": ({"target": "params", "fade_steps": 2}, "layers do not fade"),
}


@pytest.mark.parametrize("given, told", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_together_is_refused(given, told):
    """Arguments that contradict each other are refused when the callback is made."""
    with pytest.raises(ValueError, match=f"FilterL1Pruning.*{told}"):
        FilterL1Pruning(layers=True, **given)


def test_runs_that_cannot_work_are_refused():
    """A run without a layer to remove, beside another callback, or for more than can leave, does not start."""
    module = deep()
    before = weights(module)
    with pytest.raises(PruningError, match="No layer of Net can be removed"):
        fit(net(), FilterL1Pruning(0.3, target="params", layers=True, example_inputs=IMAGE))
    with pytest.raises(PruningError, match="prunes alone in its run"):
        fit(module, FilterL1Pruning(0.3, target="params", layers=True), LayerPruning(0.2))
    with pytest.raises(PruningError, match="cannot go"):
        fit(module, FilterL1Pruning(0.999, target="params", layers=True, example_inputs=IMAGE))
    assert not gone(module)
    assert_same_weights(module, before)


def test_layers_reach_what_filters_cannot():
    """An amount beyond what filters can give is accepted, and reached with layers."""
    module = deep()
    limits = {"min_width": {"blocks": 12}, "target": "params", "example_inputs": IMAGE}
    with pytest.raises(PruningError, match="cannot go"):
        fit(deep(), FilterL1Pruning(0.6, **limits))
    fit(module, FilterL1Pruning(0.6, layers=True, **limits))
    assert len(gone(module)) >= 2 and cost(module, "params") <= 0.4 * cost(deep(), "params")


SCRIPT = """
    import json, sys
    from pathlib import Path

    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from lightning_prune import FilterL1Pruning, Linear
    from tests.runs import IMAGE, images, trainer
    from tests.test_layers_and_filters_in_a_run import deep, gone

    module = deep()
    amount = {'params': 0.6, 'latency': 0.25}[sys.argv[2]]
    pruning = FilterL1Pruning(amount, target=sys.argv[2], schedule=Linear(1, 2), layers=True, scope="global")
    made = trainer(pruning, strategy=DDPStrategy(process_group_backend="gloo"), devices=2, max_epochs=4)
    made.fit(module, DataLoader(images(64), 8, shuffle=True))
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    both = made.strategy.all_gather(flat)
    result = {"gone": gone(module), "size": len(flat), "apart": float((both[0] - both[1]).abs().max())}
    (Path(sys.argv[1]) / f"rank{made.global_rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["params", "latency"])
def test_processes_prune_as_one(target, tmp_path):
    """Two processes with other data and other timings remove the same layers and filters, and stay equal."""
    one, other = seen_by_both(SCRIPT, tmp_path, target)
    assert one == other and one["apart"] == 0.0
    assert one["gone"] or target == "latency"  # of so small a net, as the machine has it
