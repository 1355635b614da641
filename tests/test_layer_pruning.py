"""LayerPruning in a run: what every pruning callback promises, with layers in place of filters."""

import copy
import inspect
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prune
from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    LayerPruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
    load_from_checkpoint,
)
from lightning_prune.reports.run_tables import run_tables
from lightning_prune.surgery.pass_through import Skipped
from tests.newer_lightning import WeightAveraging, reading
from tests.runs import CLASSES, IMAGE, Net, assert_same_weights, batches, fit, net, weights
from tests.test_callback_contract import arguments_of, global_hooks, hooks_of, recipe_hooks

CALLBACKS = {
    "influence": LayerPruning,
    "taylor": partial(LayerPruning, criterion="taylor"),
    "second": partial(LayerPruning, criterion="taylor_second_order"),
    "output-change": partial(LayerPruning, criterion="output_change", batches=1),
    "loss": partial(LayerPruning, criterion="loss", batches=2, repair=True, recalibrate=1),
}
every_kind = pytest.mark.parametrize("kind", CALLBACKS.values(), ids=CALLBACKS)
some_kinds = pytest.mark.parametrize("kind", [CALLBACKS["influence"], CALLBACKS["loss"]], ids=["influence", "loss"])


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Deep(Net):
    """The network of the runs with four residual blocks between its first convolution and its head."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        del self.second, self.hidden
        self.blocks = nn.Sequential(*(Residual(8) for _ in range(4)))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        x = self.blocks(F.relu(self.norm(self.first(images))))
        return self.head(self.drop(x.mean(dim=(2, 3))))


class Fails(Deep):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def gone(module):
    return [path for path, part in module.named_modules() if isinstance(part, Skipped)]


@some_kinds
@pytest.mark.parametrize("after_a_run", [False, True], ids=["new", "after-a-run"])
def test_pickles(kind, after_a_run):
    """A callback comes back from pickle, and from a deep copy, with the same arguments and state."""
    callback = kind(amount=0.25, schedule=Cubic(1, 2))
    if after_a_run:
        fit(net(Deep), callback)
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert arguments_of(other) == arguments_of(callback)
        assert repr(other.state_dict()) == repr(callback.state_dict())


@every_kind
def test_repr_rebuilds(kind):
    """The printed form is a call that makes an equal callback, and each argument is an attribute."""
    given = {"amount": 0.4, "target": "params", "schedule": Linear(1, 2), "ignore": ["blocks.0"], "min_layers": 2}
    callback = kind(**given)
    rebuilt = eval(repr(callback), {name: getattr(lightning_prune, name) for name in lightning_prune.__all__})
    assert arguments_of(rebuilt) == arguments_of(callback) and repr(rebuilt) == repr(callback)
    assert {name: getattr(callback, name) for name in given} == given


@pytest.mark.parametrize(
    "arguments, error, told",
    [
        ({"amount": 30.0}, ValueError, "amount=30.0.*Write 0.3 to remove 30 %"),
        ({"amount": math.nan}, ValueError, "amount=nan"),
        ({"amount": {"blocks": 0.5}}, TypeError, "a fraction or a whole number of layers"),
        ({"target": "filters"}, ValueError, "target='filters'"),
        ({"criterion": "l1"}, ValueError, "criterion='l1'"),
        ({"batches": 0}, ValueError, "batches=0"),
        ({"recalibrate": -1}, ValueError, "recalibrate=-1"),
        ({"min_layers": True}, ValueError, "min_layers=True"),
        ({"ignore": "head"}, TypeError, r"ignore='head'.*\['head'\]"),
        ({"schedule": 0.5}, TypeError, "schedule=0.5.*OneShot, Linear, Cubic"),
        ({"module": "net", "target": "latency"}, ValueError, "latency is measured of the whole"),
        ({"trace": "backward"}, ValueError, "trace='backward'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, told):
    """What no run could make sense of is refused at construction, naming callback, argument and value."""
    with pytest.raises(error, match=told) as raised:
        LayerPruning(**arguments)
    assert str(raised.value).startswith("LayerPruning")


@every_kind
def test_layers_leave_gradually(kind):
    """After each epoch of the schedule as many layers are gone as it asks for; logs and optimizer follow."""
    seen = []

    class Watched(Deep):
        def on_train_batch_start(self, batch, batch_idx):  # comes after that of callbacks
            if batch_idx == 0:
                seen.append(len(gone(self)))

    module = net(Watched)
    kept = dict(module.named_parameters())
    callback = kind(amount=0.5, schedule=Linear(1, 2), example_inputs=IMAGE)
    trainer = fit(module, callback, max_epochs=3)
    assert seen == [0, 1, 2] and len(callback.removed) == 2
    (optimizer,) = trainer.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    assert len(optimizer.state) == len(list(module.parameters()))
    assert all(kept[name] is parameter for name, parameter in module.named_parameters())
    dense, slim = (sum(p.numel() for p in m.parameters()) for m in (Deep(), module))
    metrics = trainer.callback_metrics
    assert float(metrics["prune/params"]) == slim
    assert float(metrics["prune/params_kept"]) == pytest.approx(slim / dense)
    assert float(metrics["prune/sparsity"]) == 0.5
    assert float(metrics["prune/flops"]) == lightning_prune.count_flops(module, IMAGE).total


@some_kinds
def test_state_is_plain(kind):
    """The state loads with ``weights_only=True``: numbers, strings, lists, dicts and tensors."""
    callback = kind(amount=0.5)
    fit(net(Deep), callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    other = kind(amount=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert repr(other.state_dict()) == repr(callback.state_dict())


def test_amount_0_changes_nothing():
    """With nothing to remove, a run ends bit for bit where it ends without the callback: the same random numbers."""
    alone, watched = net(Deep), net(Deep)
    fit(alone, val=True)
    after = torch.get_rng_state()
    fit(watched, LayerPruning(0.0, schedule=Linear(1, 2)), val=True)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_weights(watched, weights(alone))


@some_kinds
@pytest.mark.parametrize("amount", [0.0, 0.5], ids=["whole", "cut"])
def test_no_hooks_stay(kind, amount):
    """After a run, or one that failed, nothing hangs on the model but what writes its recipe, if it was cut."""
    everywhere = global_hooks()
    module = net(Deep)
    fit(module, kind(amount=amount))
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == (recipe_hooks(module) if amount else [])
    module = net(Fails)
    with pytest.raises(ZeroDivisionError):
        fit(module, kind(amount=amount, schedule=Linear(1, 2)))
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == (recipe_hooks(module) if amount else [])
    assert global_hooks() == everywhere


def test_a_refused_run_leaves_nothing():
    """A run that is refused leaves the model bit for bit as it was, and nothing on it."""
    module = net(Deep)
    before = weights(module)
    with pytest.raises(PruningError, match="at most 50.0% of the layers"):
        fit(module, LayerPruning(0.75, min_layers=2))
    with pytest.raises(PruningError, match="prunes alone in its run"):
        fit(module, LayerPruning(0.25), FilterL1Pruning(0.25))
    assert hooks_of(module) == [] and not gone(module)
    assert_same_weights(module, before)


@some_kinds
def test_a_resumed_run_ends_where_the_other_does(kind, tmp_path):
    """Killed after a removal and resumed with a new model, a run ends bit for bit where it would have ended."""
    make = partial(kind, amount=0.5, schedule=Linear(1, 3), example_inputs=IMAGE)
    whole = net(Deep, dropout=0.0)  # checkpoints hold no random state
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, make(), saving, max_epochs=5, enable_checkpointing=True)
    for epoch in (1, 2):
        other = net(Deep, dropout=0.0)
        callback = make()
        fit(other, callback, max_epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert gone(other) == gone(whole)
        assert_same_weights(other, weights(whole))
        loaded = load_from_checkpoint(Deep, tmp_path / f"epoch={epoch}.ckpt")
        assert len(gone(loaded)) == [0, 1, 2, 2][epoch]


def test_the_best_checkpoint_may_have_more_layers(tmp_path):
    """Testing an earlier checkpoint brings its layers back into the slimmer model, with its values."""
    module = net(Deep)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, LayerPruning(0.5, schedule=Linear(1, 2)), saving, max_epochs=3, enable_checkpointing=True)
    assert len(gone(module)) == 2
    trainer.test(module, batches(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), **reading(weights_only=False))
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["state_dict"]
    assert gone(module) == []
    assert_same_weights(module, state)


def test_a_guard_brings_layers_back():
    """A removal that does harm is rolled back: layers, values and the optimizer's groups and state are as before."""

    class Judged(Deep):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0 - 0.3 * (len(gone(self)) > 1))

    module = net(Judged)
    guard = MetricGuard("val_acc", drop=0.1, mode="max", then="stop")
    callback = LayerPruning(0.75, schedule=Linear(1, 3), example_inputs=IMAGE)
    trainer = fit(module, callback, guard, val=True, max_epochs=5)
    assert len(gone(module)) == 1 and [layer.path for layer in callback.removed] == gone(module)
    (optimizer,) = trainer.optimizers
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.parameters()}
    for parameter in module.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


def test_averaged_copies_follow():
    """A copy that averages weights loses the same layers, and ends as the model's own shape."""
    module = net(Deep)
    averaging = WeightAveraging()
    fit(module, averaging, LayerPruning(0.5, schedule=Linear(1, 2)), max_epochs=3)
    assert len(gone(module)) == 2
    assert torch.isfinite(module(IMAGE)).all()


@pytest.mark.parametrize("order", [1, -1], ids=["averaging first", "pruning first"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_averaged_copies_follow_when_resumed(epoch, order, tmp_path):
    """From a checkpoint before or after layers left, a run with an average ends where the uninterrupted run ends."""

    def run(seed, ckpt_path=None):
        module = net(Deep, seed=seed, dropout=0.0)
        callbacks = [WeightAveraging(), LayerPruning(0.5, schedule=Linear(1, 2))][::order]
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(module, *callbacks, saver, max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module

    expected = weights(run(0))
    resumed = run(5, tmp_path / f"epoch={epoch}.ckpt")
    assert len(gone(resumed)) == 2
    assert_same_weights(resumed, expected)


def test_the_report_shows_which_layers_left():
    """The history knows of each removable layer when it left, and its table shows a strip of them."""
    module = net(Deep)
    callback = LayerPruning(0.5, schedule=Linear(1, 2))
    fit(module, callback, max_epochs=3)
    assert [path for path, when in callback.history.depth.items() if when] == gone(module)
    assert set(callback.history.depth.values()) == {"", "epoch 1, step 4", "epoch 2, step 8"}
    titles = {table.title.plain: table.caption.plain for table in run_tables(callback.history)}
    strip = "".join("□" if when else "■" for when in callback.history.depth.values())
    assert titles["Removed layers"].startswith(strip)


def test_the_latency_is_relative_to_the_dense_model(monkeypatch):
    """Timings put the removed layers back for the length of a call."""
    seen = []

    def seconds(self, calls):
        with self._shape():
            seen.append(len(gone(MODULE[0])))
            return 1.0 - 0.2 * seen[-1]

    monkeypatch.setattr("lightning_prune.measure.latency.Turn.seconds", seconds)
    MODULE = [net(Deep)]
    callback = LayerPruning(0.4, target="latency", schedule=Linear(1, 2), example_inputs=IMAGE)
    trainer = fit(MODULE[0], callback, max_epochs=3)
    assert len(gone(MODULE[0])) == 2 and float(trainer.callback_metrics["prune/latency_kept"]) == pytest.approx(0.6)
    assert 0 in seen and callback.member.strategy.state.latency == pytest.approx(0.6)


def test_every_argument_is_passed_on():
    """The arguments that both forms have are the same."""
    function = inspect.signature(lightning_prune.prune_layers).parameters
    own = inspect.signature(LayerPruning).parameters
    assert {"amount", "criterion", "target", "module", "ignore", "min_layers", "repair"} <= function.keys() & own.keys()
    assert own["schedule"].default is None and isinstance(LayerPruning().schedule, OneShot)


def test_parts_of_a_lightning_module():
    """``module=`` prunes and counts one network of several, whose own layers are removed."""

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.net, self.other = Deep(), nn.Sequential(*(Residual(2) for _ in range(2)))

        def forward(self, images):
            return self.net(self.other(images))

    module = net(Two)
    fit(module, LayerPruning(0.5, module="net", example_inputs=IMAGE), max_epochs=1)
    assert len(gone(module)) == 2 and all(path.startswith("net.") for path in gone(module))
