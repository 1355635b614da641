"""Every way to load, under every callback, of every kind of checkpoint: it is loaded whole, or refused with advice."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    LayerPruning,
    OBSOneShot,
    OneShot,
    PruningError,
    TaylorFilterPruning,
    load_state_dict_,
    slim_loading,
)
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.skipped import removed_layers
from tests.runs import (
    IMAGE,
    WIDTHS,
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
from tests.test_layer_pruning import Deep

CALLBACKS = {
    "filter-l1": (Net, lambda amount: FilterL1Pruning(amount)),
    "taylor": (Net, lambda amount: TaylorFilterPruning(amount, schedule=OneShot(1))),
    "filters-obs": (Net, lambda amount: FilterPruning(amount, criterion="obs", batches=1, repair=True)),
    "layers": (Deep, lambda amount: LayerPruning(amount)),
    "magnitude": (Net, lambda amount: IterativeMagnitudePruning(amount)),
    "obs": (Net, lambda amount: OBSOneShot(amount, batches=1, epoch=1)),
}
MASKS = ("magnitude", "obs")


def fitted(kind, *callbacks, seed=0):
    """A module after two epochs of training."""
    module = net(kind, seed=seed, dropout=0.0)
    fit(module, *callbacks, max_epochs=2, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return module


SLOW = ("taylor", "filters-obs", "obs")  # they load as the first of their kind does


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CALLBACKS]
)
def case(request, tmp_path_factory):
    """Of one callback: its name, the class of module, how it is made, and the modules that were saved, by kind."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    kind, callback = CALLBACKS[name]

    def save(which, *callbacks, seed):
        return fitted(kind, *callbacks, ModelCheckpoint(folder, which), seed=seed)

    saved = {
        "dense": save("dense", seed=11),
        "whole": save("whole", callback(0.0), seed=12),
        "same": save("same", callback(0.5), seed=13),
        "other": save("other", callback(0.25), seed=14),
    }
    for which in ("dense", "other"):
        # what is left when a state dict goes through a dict or a file of tensors
        file = torch.load(folder / f"{which}.ckpt", weights_only=True)
        file["state_dict"] = dict(file["state_dict"])
        torch.save(file, folder / f"{which}-copied.ckpt")
        saved[f"{which}-copied"] = saved[which]
        # as a loader that knows nothing of callbacks, and as Lightning's own tests write them
        bare = {"state_dict": OrderedDict(file["state_dict"]), "pytorch-lightning_version": "2.5.0"}
        torch.save(bare, folder / f"{which}-bare.ckpt")
        saved[f"{which}-bare"] = saved[which]
    made = callback(0.5)
    into = {
        "fresh": (net(kind, seed=5, dropout=0.0), callback(0.5)),
        "pruned": (fitted(kind, made, seed=6), made),
    }
    return name, saved, into, folder


KINDS = ["dense", "whole", "same", "other", "dense-copied", "other-copied", "dense-bare", "other-bare"]


def by_trainer(verb):
    def load(module, path, callback):
        data = batches() if verb != "predict" else DataLoader(torch.zeros(2, *IMAGE.shape[1:]))
        getattr(trainer(callback), verb)(module, data, ckpt_path=path)

    return load


def by_attribute(module, path, callback):
    made = trainer(callback)
    made.ckpt_path = path
    made.test(module, batches(), verbose=False)


def by_name(module, path, callback):
    saver = ModelCheckpoint(path.parent)
    saver.best_model_path = str(path)
    trainer(callback, saver, enable_checkpointing=True).test(module, batches(), ckpt_path="best", verbose=False)


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def by_slim_loading(module, path, _):
    with slim_loading():
        module.load_state_dict(state_of(path))


WAYS = {
    "validate": by_trainer("validate"),
    "test": by_trainer("test"),
    "predict": by_trainer("predict"),
    "attribute": by_attribute,
    "best": by_name,
    "load_state_dict": lambda module, path, _: module.load_state_dict(state_of(path)),
    "load_state_dict_": lambda module, path, _: load_state_dict_(module, state_of(path)),
    "slim_loading": by_slim_loading,
}


def misfits(module, path):
    """Names of tensors that are there on one side alone, or have another shape there."""
    own, saved = module.state_dict(), state_of(path)
    return {n for n in own.keys() | saved.keys() if n not in own or n not in saved or own[n].shape != saved[n].shape}


def failure_of(load):
    """Return the error that loading ends in, if it does."""
    try:
        load()
    except RuntimeError as error:
        return error
    return None


def assert_loaded_or_refused(module, load, path, source, told):
    """It is loaded whole, as whatever tells its shape must be, or refused with a name, advice, and nothing changed."""
    apart, before, recipe = misfits(module, path), weights(module), str(module.state_dict()._metadata)
    shapes = apart & before.keys() & state_of(path).keys()
    error = failure_of(load)
    if isinstance(error, PruningError):
        assert apart and not told
        assert any(name in str(error) for name in apart), error
        assert re.search(r"recipe=|build a|Load what was", str(error)), error
        assert_same_weights(module, before)
        assert str(module.state_dict()._metadata) == recipe
        return False
    if error is not None:  # of torch, which alone knows whether names must be the same
        assert apart and not shapes and not told and re.search(r"(Missing|Unexpected) key", str(error)), error
        return False
    assert_same_weights(module, weights(source))
    assert_agrees_with_shapes(module)
    assert removed_layers(module).keys() == removed_layers(source).keys()
    with torch.no_grad():
        assert torch.equal(module.eval()(IMAGE + 1), source.eval()(IMAGE + 1))
    if told:
        own, expected = masks_on(module), masks_on(source)
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    return True


@pytest.mark.parametrize("into", ["fresh", "pruned"])
@pytest.mark.parametrize("way", WAYS)
def test_loading(case, way, into):
    """Nothing is loaded in part, and what does not fit is refused by us with a name, both shapes and advice."""
    _, saved, bases, folder = case
    base, callback = bases[into]
    for which in KINDS:
        if way == "load_state_dict" and into == "fresh":
            continue  # nothing of ours is on such a module
        module, path = copy.deepcopy(base), folder / f"{which}.ckpt"
        apart, told = misfits(module, path), which in ("whole", "same", "other")
        loaded = assert_loaded_or_refused(
            module, lambda m=module, p=path: WAYS[way](m, p, callback), path, saved[which], told
        )
        assert loaded or apart, which


def reached(name, module):
    """The shares of filters, of layers or of weights that are gone, of each layer that may be pruned."""
    if name == "layers":
        return [len(removed_layers(module)) / 4]
    if name in MASKS:
        return [float((module.get_parameter(each).detach() == 0).double().mean()) for each in WEIGHTS]
    return [1 - width / WIDTHS[layer] for layer, width in widths(module).items()]


WEIGHTS = ("first.weight", "second.weight", "hidden.weight", "head.weight")


@pytest.mark.parametrize("into", ["fresh", "pruned"])
def test_fitting(case, into):
    """A run that starts from any checkpoint ends with as much removed as was asked, or is refused before it starts."""
    name, _, bases, folder = case
    for which in [kind for kind in KINDS if not kind.endswith("-bare")]:  # Lightning refuses to fit from those
        module, callback = copy.deepcopy(bases[into])
        path = folder / f"{which}.ckpt"
        apart, before = misfits(module, path), weights(module)
        error = failure_of(lambda m=module, c=callback, p=path: fit(m, c, ckpt_path=p, max_epochs=4))
        if error is None:
            assert all(share >= 0.5 for share in reached(name, module)), (which, reached(name, module))
            assert name == "layers" or all(share <= 0.6 for share in reached(name, module))
            continue
        assert apart and (which == "dense" or which.endswith("-copied"))
        if isinstance(error, PruningError):
            assert_same_weights(module, before)
        else:
            assert "key(s)" in str(error)


@pytest.mark.parametrize("name", ["layers", *MASKS])
def test_fitting_again(name, tmp_path):
    """A callback that has done its part starts anew where its module goes on from a checkpoint without its state."""
    kind, made = CALLBACKS[name]
    dense = fitted(kind, ModelCheckpoint(tmp_path, "dense"), seed=11)
    callback = made(0.5)
    module = fitted(kind, callback, seed=6)
    fit(module, callback, ckpt_path=tmp_path / "dense.ckpt", max_epochs=4)
    assert all(0.5 <= share <= 0.6 for share in reached(name, module))
    if name == "magnitude":  # the smallest of what was loaded, not of what was there
        size, weight = dense.head.weight.numel(), dense.head.weight.detach()
        smallest = weight.abs() <= weight.abs().flatten().kthvalue(-(-size // 2)).values
        assert torch.equal(module.head.weight == 0, smallest)
