"""A run that is resumed with other arguments follows them, relative to the dense model, or says why it cannot."""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    Linear,
    OBSOneShot,
    OneShot,
    PruningError,
)
from lightning_prune.surgery.masks import masks_on
from tests.runs import assert_same_weights, fit, net, weights, widths

STEPS = 4  # in an epoch


def zeros(module):
    return sum(int((p == 0).sum()) for p in module.parameters() if p.dim() > 1)


def saved(folder, *callbacks, epochs=2):
    """Train, and return the last checkpoint."""
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    module = net(dropout=0.0)
    fit(module, *callbacks, saving, max_epochs=epochs, enable_checkpointing=True)
    return module, folder / f"step={STEPS * epochs}.ckpt"


def resumed(path, *callbacks, epochs=5):
    """Resume, and return the module and our warnings of changed arguments."""
    module = net(seed=5, dropout=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(module, *callbacks, ckpt_path=path, max_epochs=epochs)
    return module, [str(each.message) for each in told if "other arguments than in the checkpoint" in str(each.message)]


@pytest.mark.parametrize("finished", [True, False])
def test_a_larger_amount_of_filters_is_reached(finished, tmp_path):
    """Of each layer, what the new amount says of its dense width is gone, whether the first run had come to its end."""
    schedule = Linear(0, 1) if finished else Linear(0, 4)
    _, path = saved(tmp_path, FilterL1Pruning(0.25, schedule=schedule), epochs=2 if finished else 5)
    path = tmp_path / f"step={2 * STEPS}.ckpt"
    module, told = resumed(path, FilterL1Pruning(0.5, schedule=Linear(2, 4)))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert len(told) == 1 and "amount=0.25 is now amount=0.5" in told[0]


@pytest.mark.parametrize("kind", [FilterL1Pruning, IterativeMagnitudePruning], ids=lambda kind: kind.__name__)
def test_a_larger_amount_without_epochs_left_is_said(kind, tmp_path):
    """A checkpoint that has had all epochs trains no more: a warning says that a larger amount changes nothing."""
    module, path = saved(tmp_path, kind(0.25))
    for amount, expected in ((0.25, 0), (0.5, 1)):
        again = net(seed=5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(again, kind(amount), ckpt_path=path, max_epochs=2)
        assert_same_weights(again, weights(module))
        assert sum("trained no batch, so it pruned nothing" in str(each.message) for each in told) == expected


def test_a_smaller_amount_prunes_no_more(tmp_path):
    """Nothing that is gone comes back, and nothing more goes."""
    _, path = saved(tmp_path, FilterL1Pruning(0.5))
    module, told = resumed(path, FilterL1Pruning(0.25, schedule=OneShot(3)))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert "amount=0.5 is now amount=0.25" in told[0]


@pytest.mark.parametrize(("amount", "share"), [(0.9, 0.9), (0.2, 0.5)])
def test_another_amount_of_weights(amount, share, tmp_path):
    """The share of zeros is that of the larger amount."""
    _, path = saved(tmp_path, IterativeMagnitudePruning(0.5, scope="global"))
    module, told = resumed(path, IterativeMagnitudePruning(amount, scope="global", schedule=OneShot(3)))
    sizes = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    assert zeros(module) == math.ceil(share * sizes)
    assert f"amount=0.5 is now amount={amount}" in told[0]


def test_other_limits_hold(tmp_path):
    """A new ``min_width`` and ``max_amount`` hold for what is still pruned; a new target is reached."""
    _, path = saved(tmp_path, FilterL1Pruning(0.25, schedule=OneShot(0)))
    limited = FilterL1Pruning(0.75, schedule=OneShot(3), min_width=5, max_amount={"hidden": 0.3})
    module, told = resumed(path, limited)
    assert widths(module) == {"first": 5, "second": 4, "hidden": 7}  # 4 were kept before
    assert "min_width=1 is now min_width=5" in told[0] and "max_amount=1.0 is now max_amount={'hidden': 0.3}" in told[0]
    dense = sum(p.numel() for p in net().parameters())
    module, told = resumed(path, FilterL1Pruning(0.6, target="params", schedule=OneShot(3)))
    assert sum(p.numel() for p in module.parameters()) <= 0.4 * dense
    assert "target='filters' is now target='params'" in told[0]


def test_another_ignore_prunes_nothing_twice(tmp_path):
    """Layers keep what they had of their dense width; one that is no longer ignored is pruned from its own."""
    _, path = saved(tmp_path, FilterL1Pruning(0.5))
    module, told = resumed(path, FilterL1Pruning(0.5, ignore=["second"]))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert "ignore=[] is now ignore=['second']" in told[0]
    (tmp_path / "b").mkdir()
    _, path = saved(tmp_path / "b", FilterL1Pruning(0.5, ignore=["second"]))
    module, told = resumed(path, FilterL1Pruning(0.5))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    module, told = resumed(path, FilterL1Pruning({"first": 0.75}))
    assert widths(module) == {"first": 2, "second": 6, "hidden": 5}


def test_other_weights_are_masked_beside_those_that_were(tmp_path):
    """Masks of weights that are ignored from now on are held."""
    first, path = saved(tmp_path, IterativeMagnitudePruning(0.5, ignore=["first"]))
    before = dict(masks_on(first))
    module, told = resumed(path, IterativeMagnitudePruning(0.5, ignore=["second"]))
    assert "ignore=['first'] is now ignore=['second']" in told[0]
    assert int((module.first.weight == 0).sum()) == module.first.weight.numel() // 2
    assert not module.second.weight[~before["second.weight"]].any()
    assert int((module.hidden.weight == 0).sum()) == module.hidden.weight.numel() // 2


def test_the_same_arguments_say_nothing(tmp_path):
    """A run that is resumed as it was is not spoken of."""
    _, path = saved(tmp_path, FilterL1Pruning({"first": 0.5}, min_width={"hidden": 2}, ignore=["second"]))
    _, told = resumed(path, FilterL1Pruning({"first": 0.5}, min_width={"hidden": 2}, ignore=["second"]))
    assert not told


def test_surgery_goes_on_from_its_masks(tmp_path):
    """A larger amount is reached from what was pruned before, all of which stays zero."""
    first, path = saved(tmp_path, OBSOneShot(0.5, batches=1, epoch=1))
    module, told = resumed(path, OBSOneShot(0.9, batches=1, epoch=3))
    assert "amount=0.5 is now amount=0.9" in told[0]
    for name, keep in masks_on(first).items():
        weight = module.get_parameter(name).detach()
        assert not weight[~keep].any()
        assert int((weight == 0).sum()) == math.ceil(0.9 * weight.numel())


def test_two_callbacks_that_both_changed_are_refused(tmp_path):
    """Which state belongs to which cannot be known, and none starts anew."""
    pair = FilterL1Pruning(0.5, ignore=["second", "hidden"]), FilterL1Pruning(0.5, ignore=["first", "second"])
    _, path = saved(tmp_path, *pair)
    other = FilterL1Pruning(0.5, ignore=["second", "first"]), FilterL1Pruning(0.5, ignore=["hidden", "second"])
    with pytest.raises(PruningError, match="it is not known which goes on where"):
        resumed(path, *other)


def test_one_of_two_may_change(tmp_path):
    """The callback whose arguments changed goes on from the state that no other has."""
    pair = FilterL1Pruning(0.5, ignore=["second", "hidden"]), FilterL1Pruning(0.5, ignore=["first", "second"])
    _, path = saved(tmp_path, *pair)
    other = FilterL1Pruning(0.5, ignore=["second", "hidden"]), FilterL1Pruning(0.5, ignore=["first"])
    module, told = resumed(path, *other)
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert len(told) == 1


def test_states_stay_plain(tmp_path):
    """The arguments in a checkpoint load without code."""
    _, path = saved(tmp_path, FilterL1Pruning({"first": 0.5}))
    state = next(iter(torch.load(path, weights_only=True)["callbacks"].values()))
    assert state["asked"]["amount"] == {"first": 0.5}
