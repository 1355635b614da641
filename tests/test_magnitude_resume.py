"""Masks in checkpoints: killed runs go on with them, loaded models keep their zeros."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)

from lightning_prune import Cubic, Geometric, IterativeMagnitudePruning, Linear, load_from_checkpoint, prune_weights
from lightning_prune.surgery import recipes_in
from lightning_prune.surgery.masks import masks_on
from tests.magnitude import SIZES, Falling, WithAdam, gone_of, pruning, zeros
from tests.newer_lightning import EMAWeightAveraging
from tests.runs import Net, assert_same_weights, batches, fit, net, trainer, weights


class Goes(torch.utils.data.DataLoader):
    """Batches in a fixed order, that go on inside an epoch where a checkpoint was saved."""

    def __init__(self, dataset, batch_size):
        super().__init__(dataset, batch_size)
        self.seen = 0

    def __iter__(self):
        self.seen %= len(self)
        for batch in list(super().__iter__())[self.seen :]:
            self.seen += 1
            yield batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


KINDS = {
    "gradual": (Falling, {"schedule": Cubic(7, 23, every=8, by="steps")}, []),
    "rounds": (Falling, {"schedule": Geometric(2, 4), "rewind_to": 5}, []),
    "shuffled": (Falling, {"schedule": Linear(1, 4), "rewind_to": 0, "control": "shuffle"}, []),
    "2:4": (WithAdam, {"amount": None, "pattern": "2:4", "schedule": Linear(1, 4, every=3)}, []),
    "random": (Falling, {"schedule": Linear(1, 4), "criterion": "random"}, []),
    "ema": (Falling, {"schedule": Linear(1, 4)}, [lambda: EMAWeightAveraging(decay=0.9)]),
}


@pytest.mark.parametrize("kind, arguments, others", KINDS.values(), ids=KINDS)
def test_killed_at_every_tenth_step(kind, arguments, others, tmp_path):
    """From a checkpoint of every tenth step, in any round, a run ends at the weights and masks of the whole run."""

    def run(module, *callbacks, ckpt_path=None):
        made = trainer(*(make() for make in others), pruning(**arguments), *callbacks, max_epochs=6,
                       enable_checkpointing=bool(callbacks))  # fmt: skip
        torch.manual_seed(1 if ckpt_path is None else 2)
        made.fit(module, Goes(batches(64).dataset, 8), ckpt_path=ckpt_path)

    whole = net(kind, dropout=0.0)
    run(whole, ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=10))
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(paths) == 4
    for path in paths:
        torch.load(path, weights_only=True)
        resumed = net(kind, seed=5, dropout=0.0)
        run(resumed, ckpt_path=path)
        assert_same_weights(resumed, weights(whole))
        assert all(torch.equal(stays, masks_on(whole)[name]) for name, stays in masks_on(resumed).items())
        assert masks_on(resumed).keys() == masks_on(whole).keys()


def test_masks_are_bits_in_a_checkpoint(tmp_path):
    """A checkpoint holds one bit for each weight, in its own state and beside the weights, and no other mask."""
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit(net(), pruning(), saver, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = next(value for key, value in saved["callbacks"].items() if key.startswith("IterativeMagnitude"))
    told = recipes_in(saved["state_dict"])
    beside = {f"{path}.{leaf}": mask for path, recipe in told.items() for leaf, mask in recipe["masks"].items()}
    for masks in (state["masks"], beside):
        assert {name: len(bits) for name, (bits, _) in masks.items()} == {n: -(-s // 8) for n, s in SIZES.items()}


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_loaded_model_keeps_its_zeros(weights_only, tmp_path):
    """What is loaded outside a Trainer, from weights alone, too, is held by the next callback, whatever its amount."""
    module = net()
    fit(module, pruning()).save_checkpoint(tmp_path / "one.ckpt", weights_only=weights_only)
    loaded = load_from_checkpoint(Net, tmp_path / "one.ckpt")
    gone = {name: loaded.get_parameter(name) == 0 for name in SIZES}
    fit(loaded, IterativeMagnitudePruning(0.0, scope="global"))
    assert zeros(loaded) == zeros(module)
    fit(loaded, IterativeMagnitudePruning(0.9, scope="global"))
    assert sum(zeros(loaded).values()) == gone_of(0.9)
    assert not any(loaded.get_parameter(name)[where].any() for name, where in gone.items())


def test_zeros_that_no_callback_is_about_are_held():
    """Masks that lie on the model are held, on weights that the callback is not to prune, too."""
    module = net()
    prune_weights(module, {"second": 0.5})
    fit(module, pruning(amount={"head": 0.5}))
    assert zeros(module) == {"first.weight": 0, "second.weight": 216, "hidden.weight": 0, "head.weight": 15}


def test_a_second_fit_goes_on():
    """A second fit with the same callback neither compounds nor lets zeros grow back; another model starts anew."""
    module, callback = net(), pruning()
    fit(module, callback)
    before = zeros(module)
    fit(module, callback)
    assert zeros(module) == before
    other = net(seed=1)
    fit(other, callback, max_epochs=2)
    assert sum(zeros(other).values()) == gone_of(0.8)
