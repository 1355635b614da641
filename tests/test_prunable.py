"""Modules that load what pruning has left of them."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    Linear,
    Prunable,
    PruningError,
    load_state_dict_,
    prune_filters,
    prune_weights,
)
from lightning_prune.surgery.masks import masks_on
from tests.runs import (
    IMAGE,
    Attentive,
    Depthwise,
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


class Slimming(Prunable, Net):
    """A module of the user's that names the mixin."""


class SlimmingDepthwise(Prunable, Depthwise):
    """The same, of numbers that shapes do not tell."""


class SlimmingAttentive(Prunable, Attentive):
    """The same, of heads."""


@pytest.mark.parametrize("kind", [Slimming, SlimmingDepthwise, SlimmingAttentive])
@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights-only"])
def test_the_class_loads_its_own_checkpoints(kind, weights_only, tmp_path):
    """``MyModule.load_from_checkpoint`` gives the slim module, of its class, with its hyperparameters."""
    module = net(kind, lr=0.03)
    fit(module, FilterL1Pruning(0.5)).save_checkpoint(tmp_path / "slim.ckpt", weights_only=weights_only)
    loaded = kind.load_from_checkpoint(tmp_path / "slim.ckpt", map_location="cpu")
    assert type(loaded) is kind and loaded.hparams.lr == 0.03
    assert_same_weights(loaded, weights(module))
    assert_agrees_with_shapes(loaded)


def test_a_trainer_without_callbacks_of_ours_tests_it(tmp_path):
    """Shapes are taken where no pruning callback is there, and masks come with them."""
    module = net(Slimming)
    callbacks = FilterL1Pruning({"first": 0.5}), IterativeMagnitudePruning(0.5, parameters=["head"], scope="global")
    fit(module, *callbacks).save_checkpoint(tmp_path / "slim.ckpt")
    other = net(Slimming, seed=5)
    trainer().test(other, batches(), ckpt_path=tmp_path / "slim.ckpt", verbose=False)
    assert_same_weights(other, weights(module))
    assert torch.equal(masks_on(other)["head.weight"], masks_on(module)["head.weight"])


def test_a_foreign_state_is_still_refused():
    """A state dict that no pruning made and that does not fit is refused whole; for missing keys torch refuses it."""
    module = net(Slimming)
    state = copy.deepcopy(module.state_dict())
    state["first.weight"] = state["first.weight"][:4]
    with pytest.raises(PruningError, match="size mismatch for first.weight.*no pruning metadata"):
        module.load_state_dict(state)
    del state["first.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state)
    assert module.load_state_dict(state, strict=False).missing_keys == ["first.weight"]


@pytest.mark.parametrize(
    "change", [lambda s: s.pop("hidden.weight"), lambda s: s.update({"hidden.weight": torch.ones(3)})]
)
def test_a_broken_state_leaves_a_module_that_runs(change):
    """Where a slim state lacks a weight, or has one of another rank, loading fails and the shapes stay as they were."""
    slim, module = net(Slimming), net(Slimming)
    fit(slim, FilterL1Pruning(0.5), max_epochs=1)
    state = slim.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match="hidden.weight"):
        module.load_state_dict(state)
    assert widths(module) == {"first": 8, "second": 6, "hidden": 10}
    assert_agrees_with_shapes(module)


def test_named_too_late_is_refused():
    """Behind the module the mixin would not be heard: the class cannot be defined."""
    with pytest.raises(TypeError, match=r"class Late: Prunable stands behind.*class Late\(Prunable, LightningModule\)"):

        class Late(pl.LightningModule, Prunable):
            pass


def test_plain_modules_may_name_it():
    """It is no matter of Lightning's."""

    class Plain(Prunable, nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    one, other = Plain(), Plain()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.layer.weight, other.layer.weight)


# Without a run


def plain(kind, seed=0):
    torch.manual_seed(seed)
    return kind().eval(), torch.randn(2, *IMAGE.shape[1:])


def cut(model, images):
    prune_filters(model, images, amount=0.5)


def cut_and_repair(model, images):
    prune_filters(model, images, 0.5, criterion="obs", batches=[torch.randn(64, *IMAGE.shape[1:])])


def cut_twice(model, images):
    prune_filters(model, images, amount=0.25)
    prune_filters(model, images, amount=0.3)


@pytest.mark.parametrize(
    "kind, prune",
    [(Net, cut), (Depthwise, cut), (Attentive, cut), (Depthwise, cut_twice), (Attentive, cut_and_repair)],
)
def test_what_plain_pytorch_cut_loads_into_a_full_model(kind, prune, tmp_path):
    """The state dict of a model cut outside of any run gives its outputs from a full-size one, through a file, too."""
    model, images = plain(kind)
    dense = sum(parameter.numel() for parameter in model.parameters())
    prune(model, images)
    torch.save(model.state_dict(), tmp_path / "slim.pt")
    other, _ = plain(kind, seed=1)
    parameters = list(other.parameters())
    load_state_dict_(other, torch.load(tmp_path / "slim.pt", weights_only=True))
    assert torch.equal(other(images), model(images))
    assert sum(parameter.numel() for parameter in other.parameters()) < dense
    assert all(now is before for now, before in zip(other.parameters(), parameters, strict=True))
    assert_agrees_with_shapes(other)


def test_the_class_loads_what_plain_pytorch_cut():
    """``Prunable`` takes it as it takes what a run has left."""
    model, images = plain(SlimmingAttentive)
    cut(model, images)
    other, _ = plain(SlimmingAttentive, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("load", [load_state_dict_, lambda model, state: model.load_state_dict(state)])
def test_a_part_that_was_cut_alone_is_loaded_within_the_whole(load):
    """Where a model's backbone alone was pruned, the whole model's state dict tells of it."""

    class Whole(Prunable, nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = Attentive(), nn.Linear(3, 2)

        def forward(self, images):
            return self.head(self.backbone(images))

    model, images = plain(Whole)
    cut(model.backbone, images)
    other, _ = plain(Whole, seed=1)
    load(other, model.state_dict())
    assert torch.equal(other(images), model(images))


def test_masks_follow_a_plain_cut():
    """A model that carries masks carries them, and tells of them, after filters have left."""
    model, images = plain(Net)
    prune_weights(model, 0.5, scope="global")
    before = masks_on(model)
    report = prune_filters(model, images, amount=0.5)
    for name, stays in masks_on(model).items():
        for dim, index in report.kept.get(name, {}).items():
            before[name] = before[name].index_select(dim, index)
        assert torch.equal(stays, before[name])
    other, _ = plain(Net, seed=1)
    load_state_dict_(other, model.state_dict())
    assert masks_on(other).keys() == before.keys() == masks_on(model).keys()


def test_nothing_cut_leaves_nothing_behind():
    """A model that lost nothing carries nothing of ours."""
    model, images = plain(Net)
    prune_filters(model, images, amount=0.0)
    assert not model._state_dict_hooks


@pytest.mark.parametrize(
    "lose", [dict, lambda state: {name: value[:1] for name, value in state.items() if value.dim()}]
)
def test_a_state_that_tells_nothing_is_refused(lose):
    """A copy that lost what shapes do not tell is refused before anything is written; one that fits is loaded."""
    model, images = plain(Depthwise)
    cut(model, images)
    other, _ = plain(Depthwise, seed=1)
    before = copy.deepcopy(weights(other))
    with pytest.raises(
        PruningError, match=r"load_state_dict_: .* in the state dict.*save model.state_dict\(\) as it is"
    ):
        load_state_dict_(other, lose(model.state_dict()))
    assert_same_weights(other, before)
    load_state_dict_(other, dict(plain(Depthwise)[0].state_dict()))
    assert_same_weights(other, weights(plain(Depthwise)[0]))


# Processes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
@pytest.mark.parametrize("kind", [FilterL1Pruning, IterativeMagnitudePruning])
def test_a_slim_model_comes_back_from_other_processes(kind, strategy):
    """Under strategies that train in processes of their own, such modules return slim, with their masks, and run."""
    module = net(Slimming)
    made = fit(module, kind(0.5, schedule=Linear(1, 2)), strategy=strategy, devices=2)
    if kind is FilterL1Pruning:
        assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    else:
        assert sum(int((~keep).sum()) for keep in masks_on(module).values()) == 333  # half of 666
        assert not module.head.weight[~masks_on(module)["head.weight"]].any()
    assert_agrees_with_shapes(module)
    assert made.callback_metrics["prune/sparsity"] == pytest.approx(0.5)
    trainer().test(module, batches(), verbose=False)
