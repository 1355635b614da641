"""Masks beside guards, cuts and other masks, in one run."""

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
)

from lightning_prune import FilterL1Pruning, Linear, MetricGuard, OneShot, PruningError
from lightning_prune.surgery.masks import masks_on
from tests.magnitude import TOTAL, Zeros, gone_of, pruning, zeros
from tests.runs import Net, assert_same_weights, fit, net, weights


@pytest.mark.parametrize("then, left", [("stop", 0.4), ("halve", 0.6)])
def test_a_guard_takes_masks_back(then, left):
    """A guard gives back the weights of a cut that did harm, with their optimizer state, and the masks before it."""

    class Judged(Net):
        def validation_step(self, batch, batch_idx):
            gone = sum(zeros(self).values()) / TOTAL
            self.log("score", 1.0 if gone < 0.7 else 0.0)

    module = net(Judged)
    callback, seen = pruning(schedule=Linear(1, 2)), Zeros()
    fit(module, callback, seen, MetricGuard("score", 0.1, then=then), val=True, max_epochs=6)
    counts = [count for _, count in seen.seen]
    assert max(counts) == gone_of(0.8)
    assert sum(zeros(module).values()) == gone_of(left)
    assert sum(int((~stays).sum()) for stays in masks_on(module).values()) == gone_of(left)


def test_two_callbacks_share_a_model():
    """Two callbacks part a model between them, each with its schedule; what is logged is about both; both resume."""
    one, other = pruning(amount={"first": 0.5}), pruning(amount=0.25, ignore=["first", "head"], schedule=OneShot(2))
    module = net()
    made = fit(module, one, other)
    counts = zeros(module)
    assert counts["first.weight"] == 72 and counts["head.weight"] == 0
    assert counts["second.weight"] + counts["hidden.weight"] == 123
    assert made.callback_metrics["prune/weight_sparsity"] == pytest.approx((72 + 123) / (144 + 492))
    assert masks_on(module).keys() == {"first.weight", "second.weight", "hidden.weight"}


def test_rewinding_brings_back_no_zero_of_another():
    """Where one of two callbacks rewinds, weights that the other has masked stay zero at every forward pass."""

    class Watched(Net):
        def training_step(self, batch, batch_idx):
            if self.current_epoch:
                assert int((self.first.weight == 0).sum()) == 72
            return super().training_step(batch, batch_idx)

    first = pruning(amount={"first": 0.5}, schedule=OneShot(1))
    fit(net(Watched), first, pruning(amount={"second": 0.5}, schedule=OneShot(2), rewind_to=0), max_epochs=4)


def test_a_layer_without_weights_is_told():
    """Where nothing is left of a layer, a warning names it."""

    class Faint(Net):
        def __init__(self, lr=0.05, dropout=0.0):
            super().__init__(lr, dropout)
            with torch.no_grad():
                self.head.weight.mul_(1e-9)

    with pytest.warns(UserWarning, match="nothing is left of head.weight"):
        fit(net(Faint), pruning(schedule=None), max_epochs=1)


def test_overlapping_callbacks_are_refused():
    """Two callbacks about one weight are refused, with both named."""
    with pytest.raises(PruningError, match=r"amount=0.2.*amount=\{'head': 0.5\}.*both prune head.weight"):
        fit(net(), pruning(amount=0.2), pruning(amount={"head": 0.5}))


def zeros_by_filter(values):
    """How often each pattern of zeros is found among the filters of the first layer."""
    return Counter(tuple((row == 0).flatten().tolist()) for row in values["first.weight"])


@pytest.mark.parametrize("order", [1, -1])
def test_masks_follow_cuts(order, tmp_path):
    """Where another callback removes filters, masks lose the same rows and columns, and go on to hold; it resumes."""

    def made():
        masking = pruning(amount=0.5, scope="layer", schedule=OneShot(0))
        return (masking, FilterL1Pruning({"first": 0.5}, schedule=OneShot(2)))[::order]

    seen = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = weights(pl_module)

    module = net(dropout=0.0)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trained = fit(module, *made(), Note(), saver, max_epochs=4, enable_checkpointing=True)
    assert zeros_by_filter(seen[1]) >= zeros_by_filter(seen[2])
    for epoch in (2, 3):
        found = masks_on(module)
        assert found["second.weight"].shape == (6, 4, 3, 3)
        for name, stays in found.items():
            assert not seen[epoch][name][~stays].any()
    metrics = trained.callback_metrics
    gone = sum(int((~stays).sum()) for stays in masks_on(module).values())
    left = sum(p.numel() for p in module.parameters()) - gone
    assert (float(metrics["prune/nonzero"]), float(metrics["prune/nonzero_kept"])) == pytest.approx((left, left / 701))
    assert metrics["prune/sparsity"] == pytest.approx(4 / 24)  # of the filters, which the other callback speaks of
    resumed = net(seed=5, dropout=0.0)
    fit(resumed, *made(), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=4)
    assert_same_weights(resumed, weights(module))
