"""A run that is killed and resumed ends where the uninterrupted one ends, and checkpoints know their shape."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    Linear,
    OneShot,
    PruningError,
    TaylorFilterPruning,
    load_from_checkpoint,
)
from tests.runs import (
    IMAGE,
    WIDTHS,
    Attentive,
    Depthwise,
    Known,
    Net,
    assert_agrees_with_shapes,
    assert_same_weights,
    batches,
    fit,
    net,
    trainer,
    weights,
    widths,
)

STEPS = 4  # in an epoch
SLIM = {"first": 4, "second": 3, "hidden": 5}


def pruning(**arguments):
    return FilterL1Pruning(**{"amount": 0.5, "target": "flops", "schedule": Cubic(1, 4), **arguments})


def saving(folder, **arguments):
    return ModelCheckpoint(folder, **{"filename": "{step}", "save_top_k": -1, **arguments})


def saved_run(folder, kind=Net, val=False, max_epochs=6, callback=None, **arguments):
    """An uninterrupted run without dropout, and its checkpoints by step."""
    module, saver = net(kind, dropout=0.0), saving(folder, **arguments)
    fit(module, callback or pruning(), saver, val=val, max_epochs=max_epochs, enable_checkpointing=True)
    paths = {int(path.stem.partition("=")[2].split("-")[0]): path for path in folder.glob("step=*.ckpt")}
    return module, dict(sorted(paths.items()))


# Kill and resume


@pytest.mark.parametrize(
    "kind", [Net, Known, Depthwise, Attentive], ids=["first-batch", "example_input_array", "groups", "heads"]
)
@pytest.mark.parametrize("every", [{}, {"every_n_train_steps": STEPS}], ids=["epoch", "last-batch"])
def test_resumed_ends_where_uninterrupted_ends(kind, every, tmp_path):
    """From the checkpoint of any epoch, saved at its end or after its last batch, a run ends at equal weights."""
    whole, paths = saved_run(tmp_path, kind, **every)
    assert list(paths) == [STEPS * epoch for epoch in range(1, 7)]
    for path in list(paths.values())[:-1]:
        resumed = net(kind, seed=5, dropout=0.0)
        made = fit(resumed, pruning(), ckpt_path=path, max_epochs=6)
        assert made.current_epoch == 6
        assert_same_weights(resumed, weights(whole))
        assert_agrees_with_shapes(resumed)


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
@pytest.mark.parametrize("every", [{}, {"every_n_train_steps": STEPS}], ids=["epoch", "last-batch"])
@pytest.mark.parametrize("form", ["weights", "activations"])
def test_gathered_scores_resume(form, every, kind, tmp_path):
    """What a callback has gathered for its scores goes on, too: cuts that are rare fall on the same units."""

    def gathering():
        return TaylorFilterPruning(0.5, target="flops", schedule=Linear(2, 5, every=3), form=form, scope="global")

    whole, paths = saved_run(tmp_path, kind, callback=gathering(), **every)
    for path in list(paths.values())[:-1]:
        resumed = net(kind, seed=5, dropout=0.0)
        fit(resumed, gathering(), ckpt_path=path, max_epochs=6)
        assert_same_weights(resumed, weights(whole))


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
def test_other_callbacks_see_the_model_change_when_they_would_have(kind, tmp_path):
    """Callbacks in front of ours, at the start of epochs and of batches, see the same after a resumption."""

    class Note(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_epoch_start(self, trainer, pl_module):
            self.seen[trainer.current_epoch] = [widths(pl_module)]

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.seen[trainer.current_epoch].append(widths(pl_module))

    noted, saver = Note(), saving(tmp_path)
    fit(net(kind, dropout=0.0), noted, pruning(), saver, max_epochs=6, enable_checkpointing=True)
    for path in tmp_path.glob("step=*.ckpt"):
        again = Note()
        fit(net(kind, dropout=0.0), again, pruning(), ckpt_path=path, max_epochs=6)
        assert again.seen == {epoch: seen for epoch, seen in noted.seen.items() if epoch in again.seen}


def test_resume_within_an_epoch(tmp_path):
    """From a checkpoint inside an epoch a run goes on with the shapes it had, and ends with those it should have."""
    whole, paths = saved_run(tmp_path, every_n_train_steps=3)
    for path in list(paths.values())[:-1]:
        seen = []

        class Note(Callback):
            def on_train_batch_start(self, trainer, pl_module, *_):
                seen.append(widths(pl_module))  # noqa: B023

        saved = torch.load(path, weights_only=True)["state_dict"]
        resumed = net(seed=5, dropout=0.0)
        fit(resumed, pruning(), Note(), ckpt_path=path, max_epochs=6)
        if "step=12" not in path.stem:  # the last batch of an epoch: what is due next has left
            assert seen[0] == {name: len(saved[f"{name}.weight"]) for name in WIDTHS}
        assert widths(resumed) == widths(whole)


def test_optimizer_and_logs_resume(tmp_path):
    """Momentum and logged values go on, too."""
    callback = pruning()
    _, paths = saved_run(tmp_path, callback=callback)
    other = pruning()
    resumed = net(seed=5, dropout=0.0)
    made = fit(resumed, other, ckpt_path=paths[8], max_epochs=6)
    for parameter in resumed.parameters():
        assert made.optimizers[0].state[parameter]["momentum_buffer"].shape == parameter.shape
    assert made.callback_metrics["prune/flops_kept"] <= 0.5
    assert repr(other.state_dict()) == repr(callback.state_dict())


def test_resume_after_everything_has_left(tmp_path):
    """A resumed run that has reached its amount prunes no more."""
    _, paths = saved_run(tmp_path, callback=pruning(schedule=None), max_epochs=2)
    resumed = net(seed=5)
    before = {name: value.shape for name, value in torch.load(paths[8])["state_dict"].items()}
    fit(resumed, pruning(schedule=None), ckpt_path=paths[8], max_epochs=5)
    assert {name: value.shape for name, value in resumed.state_dict().items()} == before


def test_resume_into_the_pruned_model(tmp_path):
    """A model that was pruned further takes the shapes of an earlier checkpoint, and ends as before."""
    callback = pruning()
    whole, paths = saved_run(tmp_path, Depthwise, callback=callback)
    expected = weights(whole)
    fit(whole, callback, ckpt_path=paths[8], max_epochs=6)
    assert_same_weights(whole, expected)


def test_resume_with_examples_of_another_size(tmp_path):
    """FLOPs stay those of the example of the first run, whatever the first batch after a resume looks like."""

    class Sized(Net):
        """Its images grow."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            size = 6 + 2 * self.current_epoch
            return F.interpolate(batch[0], size=(size, size)), batch[1]

    whole, paths = saved_run(tmp_path, Sized)
    for path in list(paths.values())[:-1]:
        resumed = net(Sized, seed=5, dropout=0.0)
        fit(resumed, pruning(), ckpt_path=path, max_epochs=6)
        assert_same_weights(resumed, weights(whole))


def test_killed_run_resumes(tmp_path):
    """What OnExceptionCheckpoint saves of a run that fails can be resumed from."""

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 10 and self.trainer.max_epochs == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    kill = OnExceptionCheckpoint(tmp_path)
    module = net(Fails)
    with pytest.raises(ZeroDivisionError):
        fit(module, pruning(schedule=Linear(0, 2)), kill, max_epochs=3, enable_checkpointing=True)
    resumed = net(Fails)
    fit(resumed, pruning(schedule=Linear(0, 2)), ckpt_path=kill.ckpt_path, max_epochs=4)
    assert widths(resumed) == widths(module)


def test_resumed_schedule_may_differ(tmp_path):
    """The callback's arguments are those of the new run: a larger amount goes on from what has left."""
    _, paths = saved_run(tmp_path, callback=pruning(amount=0.3, schedule=None), max_epochs=1)
    resumed = net()
    made = fit(resumed, FilterL1Pruning(0.3, schedule=OneShot(3)), ckpt_path=paths[4], max_epochs=5)
    assert made.callback_metrics["prune/flops_kept"] <= 0.7


# Checkpoints of other shapes


@pytest.mark.parametrize("kind", [Net, Depthwise])
@pytest.mark.parametrize("epoch", range(6))
def test_every_checkpoint_can_be_tested(kind, epoch, tmp_path):
    """After training, checkpoints that are fatter or as slim can be validated and tested: each gives its own values."""
    module = net(kind, dropout=0.0)
    callback, saver = pruning(), saving(tmp_path, monitor="val_loss", filename="{epoch}")
    made = fit(module, callback, saver, val=True, max_epochs=6, enable_checkpointing=True)
    path = str(tmp_path / f"epoch={epoch}.ckpt")
    (found,) = made.validate(module, batches(16, seed=8), ckpt_path=path, verbose=False)
    assert found["val_loss"] == pytest.approx(float(saver.best_k_models[path]), rel=1e-5)
    (tested,) = made.test(module, batches(16, seed=8), ckpt_path=path, verbose=False)
    assert tested["test_loss"] == pytest.approx(found["val_loss"], rel=1e-5)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert_same_weights(module, saved)
    assert_agrees_with_shapes(module)


@pytest.mark.parametrize("mode", ["min", "max"], ids=["slimmer", "fatter"])
def test_best_checkpoint(mode, tmp_path):
    """``trainer.test(ckpt_path="best")`` works where the best is fatter or slimmer than the model at hand."""
    module = net(dropout=0.0)
    saver = saving(tmp_path, monitor="prune/flops", mode=mode, save_top_k=1)
    callback = pruning()
    made = fit(module, callback, saver, val=True, max_epochs=6, enable_checkpointing=True)
    slim = widths(module)
    made.test(dataloaders=batches(), ckpt_path="best", verbose=False)
    assert widths(module) == (slim if mode == "min" else WIDTHS)
    made.validate(module, batches(), ckpt_path=saver.best_model_path, verbose=False)
    predicted = made.predict(module, DataLoader(IMAGE), ckpt_path="best")
    assert len(predicted) == 1


def test_last_checkpoint(tmp_path):
    """``ckpt_path="last"`` finds and resumes the last."""
    module = net(dropout=0.0)
    callback = pruning(schedule=Cubic(1, 2))
    fit(module, callback, saving(tmp_path, save_last=True), max_epochs=3, enable_checkpointing=True)
    resumed = net(dropout=0.0)
    callback = pruning(schedule=Cubic(1, 2))
    fit(resumed, callback, saving(tmp_path, save_last=True), ckpt_path="last", max_epochs=6, enable_checkpointing=True)
    whole = net(dropout=0.0)
    fit(whole, pruning(schedule=Cubic(1, 2)), max_epochs=6)
    assert_same_weights(resumed, weights(whole))


def test_weights_only_checkpoints(tmp_path):
    """A checkpoint of weights alone loads into a fresh or a pruned model."""
    whole, paths = saved_run(tmp_path, Depthwise, save_weights_only=True)
    for path in paths.values():
        saved = torch.load(path, weights_only=True)
        assert "callbacks" not in saved
        for module in (whole, net(Depthwise, seed=5)):
            trainer(pruning()).validate(module, batches(), ckpt_path=path, verbose=False)
            assert_same_weights(module, saved["state_dict"])
            assert_agrees_with_shapes(module)


def test_foreign_checkpoint_is_refused(tmp_path):
    """A checkpoint that pruning did not write and that does not fit is refused, and the model stays."""

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 5, 3, padding=1, bias=False)

    made = trainer()
    made.strategy.connect(net(Other))
    made.save_checkpoint(tmp_path / "foreign.ckpt")
    module = net()
    before = weights(module)
    for run in (
        lambda: fit(module, pruning(schedule=None), ckpt_path=tmp_path / "foreign.ckpt"),
        lambda: trainer(pruning()).test(module, batches(), ckpt_path=tmp_path / "foreign.ckpt", verbose=False),
    ):
        with pytest.raises(PruningError, match="size mismatch for first.weight.*no pruning metadata"):
            run()
        assert_same_weights(module, before)
        assert_agrees_with_shapes(module)


def test_foreign_checkpoint_that_fits_is_loaded(tmp_path):
    """A checkpoint of a dense run starts a pruned one."""
    fit(net(seed=3), saving(tmp_path), max_epochs=1, enable_checkpointing=True)
    module = net()
    fit(module, FilterL1Pruning(0.5, schedule=Linear(1, 2)), ckpt_path=tmp_path / "step=4.ckpt")
    assert widths(module) == SLIM


# After training


@pytest.mark.parametrize("kind", [Net, Depthwise])
@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_saved_after_training(kind, weights_only, tmp_path):
    """``trainer.save_checkpoint`` after training writes what can be loaded."""
    module = net(kind, lr=0.03)
    made = fit(module, pruning(schedule=None))
    made.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    loaded = load_from_checkpoint(kind, tmp_path / "after.ckpt")
    assert_same_weights(loaded, weights(module))
    assert loaded.hparams == module.hparams


@pytest.mark.parametrize("kind", [Net, Known, Depthwise, Attentive])
def test_load_from_checkpoint(kind, tmp_path):
    """Every checkpoint of a run loads outside a Trainer, with its hyperparameters, numbers on modules and class."""
    whole, paths = saved_run(tmp_path, kind)
    for path in paths.values():
        loaded = load_from_checkpoint(kind, path, map_location="cpu")
        assert type(loaded) is kind
        assert_same_weights(loaded, torch.load(path, weights_only=True)["state_dict"])
        assert_agrees_with_shapes(loaded)
    assert_same_weights(loaded, weights(whole))
    assert torch.equal(loaded.eval()(IMAGE + 1), whole.eval()(IMAGE + 1))
    assert load_from_checkpoint(kind, path, lr=0.5).hparams.lr == 0.5
    assert "load_state_dict" not in vars(kind)


def test_loaded_model_goes_on(tmp_path):
    """What was loaded can be trained without pruning, and its checkpoints load again; or be pruned further."""
    _, paths = saved_run(tmp_path, Depthwise)
    loaded = load_from_checkpoint(Depthwise, paths[24])
    slim = widths(loaded)
    made = fit(loaded)
    made.save_checkpoint(tmp_path / "tuned.ckpt")
    again = load_from_checkpoint(Depthwise, tmp_path / "tuned.ckpt")
    assert_same_weights(again, weights(loaded))
    fit(again, FilterL1Pruning(0.5))
    # the first layer shrinks by whole groups of the grouped convolution: two of its three, since counts round up
    channels_per_group = slim["first"] // loaded.grouped.groups
    assert (slim["first"], channels_per_group) == (6, 2)
    assert widths(again) == {**{name: width // 2 for name, width in slim.items()}, "first": channels_per_group}
    assert_agrees_with_shapes(again)


def test_load_from_checkpoint_of_other_origin(tmp_path):
    """A dense checkpoint loads as usual; one that does not fit gives torch's own error."""
    made = fit(net(seed=3), max_epochs=1)
    made.save_checkpoint(tmp_path / "dense.ckpt")
    assert_same_weights(load_from_checkpoint(Net, tmp_path / "dense.ckpt"), weights(made.lightning_module))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_from_checkpoint(Depthwise, tmp_path / "dense.ckpt")
    assert "load_state_dict" not in vars(Depthwise)


def test_checkpoint_holds_plain_things(tmp_path):
    """A checkpoint loads with ``weights_only=True``."""
    _, paths = saved_run(tmp_path, Depthwise)
    for path in paths.values():
        saved = torch.load(path, weights_only=True)
        recipe = saved["state_dict"]._metadata["depthwise"]["lightning_prune"]
        assert recipe["attributes"] == {"groups": len(saved["state_dict"]["first.weight"])}


# More than one fit, more than one callback


def test_fit_after_fit():
    """A second fit of the same model with the same callback goes on: amounts are still of what was there at first."""
    module, callback = net(), FilterL1Pruning(0.5, schedule=Linear(0, 2))
    fit(module, callback)
    made = fit(module, callback)
    assert widths(module) == SLIM
    assert made.callback_metrics["prune/sparsity"] == 0.5


def test_fit_goes_on():
    """A fit that ended before its schedule says so, and is carried on by the next, as if it had been one."""
    module, callback = net(dropout=0.0), FilterL1Pruning(0.5, schedule=Linear(0, 2))
    made = trainer(callback, max_epochs=3)
    made.should_stop = False

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 0

    made.callbacks.append(Stop())
    with pytest.warns(UserWarning, match=r"ended before Linear\(start=0.*33% of its cuts were due and were made"):
        made.fit(module, batches())
    assert made.current_epoch == 1 and widths(module)["first"] > 4
    made.should_stop = False
    made.fit(module, batches())
    assert widths(module) == SLIM


def test_another_model_starts_anew():
    """The same callback with another model starts from nothing."""
    callback = FilterL1Pruning(0.5)
    for kind in (Net, Depthwise, Net):
        module = net(kind)
        made = fit(module, callback)
        assert widths(module) == SLIM
        assert made.callback_metrics["prune/sparsity"] == 0.5


def test_another_callback_counts_from_the_slim_model():
    """A new callback takes the model as it is for the whole."""
    module = net()
    fit(module, FilterL1Pruning(0.5))
    fit(module, FilterL1Pruning({"first": 0.5}))
    assert widths(module) == {"first": 2, "second": 3, "hidden": 5}


def test_state_that_validate_restored_is_kept(tmp_path):
    """A run that follows ``validate(ckpt_path=...)`` goes on from that checkpoint's state."""
    _, paths = saved_run(tmp_path, callback=FilterL1Pruning(0.5), max_epochs=1)
    module, callback = net(), FilterL1Pruning(0.5)
    trainer(callback).validate(module, batches(), ckpt_path=paths[4], verbose=False)
    fit(module, callback)
    assert widths(module) == SLIM


TWO = {
    "patterns": ({"amount": {"first": 0.5}}, {"amount": {"hidden": 0.7}}),
    "ignore": ({"amount": 0.5, "ignore": ["second", "hidden"]}, {"amount": 0.7, "ignore": ["first", "second"]}),
}


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
@pytest.mark.parametrize("order", [1, -1], ids=["first-leads", "last-leads"])
@pytest.mark.parametrize("arguments", TWO.values(), ids=TWO)
def test_two_callbacks(arguments, order, kind, tmp_path):
    """Two callbacks part a model between them, each with its schedule; what is logged is about both; both resume."""

    def made():
        one = FilterL1Pruning(**arguments[0], schedule=Linear(0, 1))
        two = FilterL1Pruning(**arguments[1], schedule=OneShot(3), example_inputs=IMAGE)
        return (one, two)[::order]

    class Note(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")})

    note, module = Note(), net(kind, dropout=0.0)
    fit(module, *made(), note, saving(tmp_path), max_epochs=5, enable_checkpointing=True)
    assert widths(module) == {"first": 4, "second": 6, "hidden": 3}
    units = 24 if "patterns" in str(arguments) or "ignore" not in arguments[0] else 18
    gone = [2, 4, 4, 11, 11]
    assert [seen["prune/sparsity"] for seen in note.seen] == pytest.approx([count / units for count in gone])
    assert note.seen[-1]["prune/params"] == sum(p.numel() for p in module.parameters())
    flops = [seen["prune/flops"] for seen in note.seen]
    assert flops[0] > flops[1] == flops[2] > flops[3] == flops[4]
    for step in (4, 8, 12, 16):
        resumed = net(kind, seed=5, dropout=0.0)
        fit(resumed, *made(), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=5)
        assert_same_weights(resumed, weights(module))


def test_state_dict_of_a_copy():
    """A copy of a pruned model, and a part of it, can be saved and loaded like any other."""
    module = net(Depthwise)
    fit(module, pruning(schedule=None))
    other = copy.deepcopy(module)
    other.head = nn.Identity()
    other.depthwise = nn.Identity()
    assert "lightning_prune" not in other.state_dict()._metadata["depthwise"]
