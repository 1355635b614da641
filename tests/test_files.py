"""Files that nobody can load, or nobody should: what our code reads is refused in words that say what to do."""

import pytest
import torch

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    Linear,
    PruningError,
    load_from_checkpoint,
    load_state_dict_,
)
from tests.runs import Net, Watch, assert_same_weights, fit, net, weights


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "was not written by torch.save, or only in part"),
        (b"nothing that torch has written", "was not written by torch.save, or only in part"),
        ({"a": torch.ones(1), "b": 2}, r"holds no state_dict \(but 'a', 'b'\)"),
        ({}, r"holds no state_dict \(but nothing\)"),
        ([1, 2], r"holds no state_dict \(but list\)"),
    ],
    ids=["empty", "bytes", "dict", "empty-dict", "list"],
)
def test_what_is_no_checkpoint_is_told(content, told, tmp_path):
    """A file that is something else is refused with what it is."""
    path = tmp_path / "junk.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(PruningError, match=f"load_from_checkpoint: .*junk.ckpt {told}"):
        load_from_checkpoint(Net, path)


def test_half_a_checkpoint_is_told(tmp_path):
    """A file that was cut off is refused as such; one that is not there gives Python's own error."""
    path = tmp_path / "half.ckpt"
    fit(net(), FilterL1Pruning(0.5)).save_checkpoint(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PruningError, match="was not written by torch.save, or only in part"):
        load_from_checkpoint(Net, path)
    with pytest.raises(FileNotFoundError):
        load_from_checkpoint(Net, tmp_path / "absent.ckpt")


def test_a_state_of_another_version_is_told():
    """State that lacks what this version remembers is refused by name, and nothing of it is taken up."""
    callback = FilterL1Pruning(0.5)
    state = callback.state_dict()
    del state["widths"], state["start"]
    with pytest.raises(PruningError, match="FilterL1Pruning: the checkpoint does not hold its start, widths"):
        callback.load_state_dict({**state, "progress": 1.0})
    assert callback.state_dict()["progress"] == 0.0


# One place damaged


def told(saved):
    return saved["state_dict"]._metadata[""]["lightning_prune"]


def ours(saved):
    return next(state for key, state in saved["callbacks"].items() if "Pruning" in key)


def momentum(saved):
    return saved["optimizer_states"][0]["state"][0]


def damaged(kind, damage, path):
    """Write the checkpoint of a run of which most is still to come, with something changed."""

    class Saver(Watch):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    fit(net(), kind(0.5, schedule=Linear(0, 2)), Saver())
    saved = torch.load(path, weights_only=True)
    damage(saved)
    torch.save(saved, path)


RECIPES = {
    "word": lambda saved: saved["state_dict"]._metadata[""].update(lightning_prune="slim"),
    "half": lambda saved: told(saved).pop("attributes"),
    "short": lambda saved: told(saved).update(attributes=[["first", "groups"]]),
    "value": lambda saved: told(saved).update(attributes=[["first", "groups", "eight"]]),
    "masks": lambda saved: told(saved).update(masks={"first.weight": 3}),
}


@pytest.mark.parametrize("damage", RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_cannot_be_read_is_told(damage, tmp_path):
    """Whoever loads it, what stands beside the weights is refused before a shape has changed."""
    path, module = tmp_path / "damaged.ckpt", net()
    damaged(FilterL1Pruning, damage, path)
    before = weights(module)
    for load in (
        lambda: load_from_checkpoint(Net, path),
        lambda: load_state_dict_(module, torch.load(path)["state_dict"]),
        lambda: fit(module, FilterL1Pruning(0.5, schedule=Linear(0, 2)), ckpt_path=path),
    ):
        with pytest.raises(PruningError, match="The pruning metadata in the state dict of the model cannot be read"):
            load()
    assert_same_weights(module, before)


STATES = {
    "progress": (FilterL1Pruning, lambda saved: ours(saved).update(progress="half"), "of it cannot be read.*'half'"),
    "history": (FilterL1Pruning, lambda saved: ours(saved).update(history={}), "of it cannot be read.*'layers'"),
    "start": (
        FilterL1Pruning,
        lambda saved: ours(saved).update(start={"widths": {}}),
        "of it cannot be read.*'layers'",
    ),
    "masks": (IterativeMagnitudePruning, lambda saved: ours(saved).update(masks={"head.weight": 3}), "cannot be read"),
    "another's masks": (
        IterativeMagnitudePruning,
        lambda saved: ours(saved)["masks"].update({"hidden.weight": [torch.zeros(1, dtype=torch.uint8), [2, 4]]}),
        r"a mask of shape \(2, 4\) for hidden.weight, which is of shape \(10, 6\)",
    ),
    "another's momentum": (
        FilterL1Pruning,
        lambda saved: momentum(saved).update(momentum_buffer=torch.ones(9, 2, 3, 3)),
        r"SGD holds momentum_buffer of shape \(9, 2, 3, 3\) for first.weight of shape",
    ),
}


@pytest.mark.parametrize("kind, damage, message", STATES.values(), ids=STATES)
def test_a_state_that_is_damaged_or_anothers_is_told(kind, damage, message, tmp_path):
    """A run is not taken up from it: the error names the callback and what is wrong, and nothing was trained."""
    path = tmp_path / "damaged.ckpt"
    damaged(kind, damage, path)
    watch = Watch()
    with pytest.raises(PruningError, match=f"{kind.__name__}: .*{message}"):
        fit(net(), kind(0.5, schedule=Linear(0, 2)), watch, ckpt_path=path)
    assert not watch.widths  # no batch came


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: saved.update(state_dict=dict(saved["state_dict"])), "the state dict has no pruning metadata"),
        (lambda saved: saved.pop("pytorch-lightning_version"), "does not say which Lightning wrote it"),
    ],
    ids=["copied", "another-library"],
)
def test_checkpoints_that_lost_what_tells_of_them_are_told(change, message, tmp_path):
    """A state dict that was copied, and a file without Lightning's mark, are refused with what they lack."""
    damaged(FilterL1Pruning, change, tmp_path / "lost.ckpt")
    with pytest.raises(PruningError, match=f"load_from_checkpoint: .*{message}"):
        load_from_checkpoint(Net, tmp_path / "lost.ckpt")
