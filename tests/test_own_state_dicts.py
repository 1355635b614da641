"""Modules whose own ``state_dict`` leaves something out: that is not pruned, and the rest can be resumed."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, Linear, PruningError, load_from_checkpoint
from lightning_prune.surgery import recipe_of
from tests.runs import WIDTHS, Net, assert_same_weights, fit, net, weights, widths


class Adapted(Net):
    """A frozen layer in front of the trained ones, which checkpoints leave out, as they do with pretrained weights."""

    left_out = ("first", "stem")

    def __init__(self):
        super().__init__(dropout=0.0)
        self.strict_loading = False
        self.stem = nn.Conv2d(2, 2, 1)
        for name in self.left_out:
            getattr(self, name).requires_grad_(False)

    def forward(self, images):
        return super().forward(self.stem(images))

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name.partition(".")[0] not in self.left_out}


class Renaming(Net):
    """A module that saves everything, under other names."""

    def __init__(self):
        super().__init__(dropout=0.0)

    def state_dict(self, *args, **kwargs):
        return {f"net.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


def pruning(**arguments):
    return FilterL1Pruning(0.5, schedule=Linear(1, 3), report=False, **arguments)


def pretrained(seed=0):
    module, known = net(Adapted, seed), net(Adapted)
    for name in Adapted.left_out:
        getattr(module, name).load_state_dict(getattr(known, name).state_dict())
    return module


def test_what_is_not_saved_is_not_pruned_and_the_run_resumes(tmp_path):
    """The plain dict has lost the metadata and the checkpoint has them: a resumed run ends where the other does."""
    whole, callback = pretrained(), pruning()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, callback, saving, max_epochs=5, enable_checkpointing=True)
    assert widths(whole) == {**WIDTHS, "second": 3, "hidden": 5}
    reasons = {pin.tensor: pin.reason for pin in callback.member.strategy.state.pinned}
    assert "no checkpoint would hold what is left of it" in reasons["first.weight"]
    for epoch in (0, 2):
        resumed = pretrained(seed=5)
        fit(resumed, pruning(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert resumed.second.out_channels == 3
        for name, value in nn.Module.state_dict(whole).items():
            assert torch.equal(nn.Module.state_dict(resumed)[name], value), name
    assert load_from_checkpoint(Adapted, tmp_path / "epoch=4.ckpt").second.out_channels == 3


def test_what_is_named_and_not_saved_is_refused():
    """Whoever names such a layer learns why it stays."""
    with pytest.raises(PruningError, match="first"):
        fit(pretrained(), FilterL1Pruning({"first": 0.5}))


def test_what_is_saved_under_another_name_is_pruned():
    """Names say nothing of what is saved."""
    module, plain = net(Renaming), net(dropout=0.0)
    fit(module, pruning(), max_epochs=4)
    fit(plain, pruning(), max_epochs=4)
    assert_same_weights(plain, {name.removeprefix("net."): value for name, value in weights(module).items()})


class Filtering(Net):
    """A module that writes what it likes into the checkpoint, after all callbacks have seen it."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.teacher = nn.Linear(3, 3).requires_grad_(False)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if not name.startswith("teacher")}


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", [FilterL1Pruning, IterativeMagnitudePruning])
def test_what_a_module_writes_into_a_checkpoint_keeps_its_metadata(kind, weights_only, tmp_path):
    """Shapes and masks are there when the file is loaded, in the run, in another and by the class."""
    whole = net(Filtering)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=weights_only)
    pruning = partial(kind, 0.5, schedule=Linear(1, 3), ignore=["teacher"], report=False)
    fit(whole, pruning(), saving, max_epochs=5, enable_checkpointing=True)
    whole.trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    for name in ("epoch=4.ckpt", "after.ckpt"):
        loaded = load_from_checkpoint(Filtering, tmp_path / name)
        assert widths(loaded) == widths(whole)
        assert recipe_of(loaded).masks.keys() == recipe_of(whole).masks.keys()
        saved = {key: value for key, value in weights(whole).items() if not key.startswith("teacher")}
        assert all(torch.equal(value, weights(loaded)[key]) for key, value in saved.items())
    if not weights_only:
        resumed = net(Filtering)
        fit(resumed, pruning(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=5)
        assert_same_weights(resumed, weights(whole))
