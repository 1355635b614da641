"""Modules whose own code drops, copies or renames what a checkpoint holds before it is loaded."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, OneShot, Prunable, load_from_checkpoint
from lightning_prune.callbacks import LayerPruning
from lightning_prune.surgery import recipe_of
from lightning_prune.surgery.recipe import resize_
from tests.runs import Depthwise, assert_same_weights, batches, fit, net, trainer, weights, widths

EPOCHS = 3


class Exchanging(Depthwise):
    """Puts its own weights in the place of what does not fit, as a much copied answer of a forum does."""

    def on_load_checkpoint(self, checkpoint):
        own, saved = self.state_dict(), checkpoint["state_dict"]
        others = [name for name in saved if name in own and saved[name].shape != own[name].shape]
        for name in others:
            saved[name] = own[name]
        if others or saved.keys() != own.keys():
            checkpoint.pop("optimizer_states", None)


class Dropping(Depthwise):
    """Drops what does not fit."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint):
        own, saved = self.state_dict(), checkpoint["state_dict"]
        for name in list(saved):
            if name not in own or saved[name].shape != own[name].shape:
                del saved[name]


class Renaming(Depthwise):
    """Makes another dict, which loses the metadata."""

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name.removeprefix("model."): v for name, v in checkpoint["state_dict"].items()}


class CopyingLate(Depthwise):
    """Makes another dict in its own ``load_state_dict``."""

    def load_state_dict(self, state_dict, **arguments):
        return super().load_state_dict(dict(state_dict), **arguments)


class DroppingLate(Depthwise):
    """Drops what does not fit in its own ``load_state_dict``."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        own = self.state_dict()
        fitting = {name: v for name, v in state_dict.items() if name in own and own[name].shape == v.shape}
        return super().load_state_dict(fitting, strict=False)


KINDS = {"filters": FilterL1Pruning, "weights": IterativeMagnitudePruning, "layers": LayerPruning}


def pruning(kind):
    return KINDS[kind](0.5, schedule=OneShot(1), report=False)


def evaluated(module, callbacks, path):
    trainer(*callbacks).test(module, batches(), ckpt_path=path, verbose=False)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module_class", [Exchanging, Dropping, Renaming, CopyingLate, DroppingLate])
def test_shapes_are_taken_before_own_code_sees_what_is_loaded(module_class, kind, tmp_path):
    """The run goes on, is tested and is loaded as that of a module without such code, from either size."""
    whole = net(module_class)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, pruning(kind), saving, max_epochs=EPOCHS, enable_checkpointing=True)
    expected, masks = weights(whole), recipe_of(whole).masks.keys()
    assert bool(masks) == (kind == "weights")
    last = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    for epoch in (0, 1):
        resumed = net(module_class, seed=5)
        fit(resumed, pruning(kind), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=EPOCHS)
        assert_same_weights(resumed, expected)
    mixed_in = type("MixedIn", (Prunable, module_class), {})
    loaded = [
        load_from_checkpoint(module_class, last),
        mixed_in.load_from_checkpoint(last),
        evaluated(net(module_class, seed=5), [pruning(kind)], last),
        evaluated(net(mixed_in, seed=5), [], last),
    ]
    for module in loaded:
        assert_same_weights(module, expected)
        assert recipe_of(module).masks.keys() == masks
    evaluated(whole, [pruning(kind)], tmp_path / "epoch=0.ckpt")  # of the dense model
    assert widths(whole) == widths(net(module_class))
    assert "on_load_checkpoint" not in vars(CopyingLate)  # nothing stays on classes


def test_own_code_of_a_mixed_in_class_is_called_once():
    """Shapes are taken first, whether the class or one of its bases has the code."""
    calls = []

    class Own(Prunable, Depthwise):
        def on_load_checkpoint(self, checkpoint):
            calls.append(self.first.out_channels)

    class Further(Own):
        pass

    slim = net(Depthwise)
    fit(slim, pruning("filters"), max_epochs=2)
    for module_class in (Own, Further):
        net(module_class).on_load_checkpoint({"state_dict": slim.state_dict()})
    assert calls == [slim.first.out_channels] * 2
    assert calls[0] < 8


def test_what_is_not_loaded_keeps_what_both_shapes_have():
    """Code that leaves a part out finds the weights that the module was built with, and no zeros."""
    module = net(Depthwise)
    before = module.head.weight.detach().clone()
    resize_(module, {"head.weight": torch.empty(3, 6)}, [])
    assert torch.equal(module.head.weight, before[:, :6])
    resize_(module, {"head.weight": torch.empty(3, 8)}, [])
    assert torch.equal(module.head.weight, torch.cat([before[:, :6], torch.zeros(3, 2)], dim=1))
