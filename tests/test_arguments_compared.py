"""Every argument of every callback is compared with that of the checkpoint that a run goes on from."""

import inspect
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    LayerPruning,
    Linear,
    MetricGuard,
    OBSOneShot,
    PruningError,
    TaylorFilterPruning,
    callbacks,
)
from lightning_prune.callbacks import DistillFromDense, ExpertPruning, LearningRateRewinding, WeightSharing
from tests.runs import Net, fit, net
from tests.test_expert_pruning import Experts
from tests.test_layer_pruning import Deep

PRUNING = {
    FilterL1Pruning: {"amount": 0.25},
    TaylorFilterPruning: {"amount": 0.25, "schedule": Linear(1, 5)},
    FilterPruning: {"amount": 0.25, "criterion": "taylor", "schedule": Linear(1, 5)},
    LayerPruning: {"amount": 0.25},
    ExpertPruning: {"amount": 0.25},
    IterativeMagnitudePruning: {"amount": 0.25},
    OBSOneShot: {"amount": 0.25, "batches": 1, "epoch": 1},
}
BESIDE = {
    MetricGuard: {"monitor": "val_loss", "drop": 9.0},
    LearningRateRewinding: {},
    DistillFromDense: {},
    WeightSharing: {},
}
OTHERS = {
    "amount": 0.5, "target": "params", "scope": "global", "schedule": Linear(3, 4), "ignore": ["first"],
    "round_to": 2, "min_width": 3, "max_amount": 0.9, "uniform": True, "recalibrate": 1, "trace": "training_step",
    "form": "activations", "flops_penalty": 0.01, "criterion": "l2", "batches": 2, "repair": True, "min_layers": 2,
    "mask_gradients": True, "parameters": ["hidden"], "pattern": "2:4", "epoch": 3, "solver": "exact",
    "sequential": True, "damping": 0.1, "drop": 8.0, "mode": "max", "patience": 2, "then": "halve", "to": 9,
    "weight": 0.5, "loss": "mse", "temperature": 3.0, "class_dim": 1, "features": ["hidden"], "feature_weight": 2.0,
    "rewind_to": 11, "control": "shuffle", "module": ["first"], "fade_steps": 2, "bits": 4, "layers": True,
    "min_experts": 3,
}  # fmt: skip
FOR_ONE = {
    (LayerPruning, "criterion"): "taylor",
    (LayerPruning, "ignore"): ["blocks.0"],
    (LayerPruning, "module"): ["blocks"],
    (ExpertPruning, "criterion"): "magnitude",
    (ExpertPruning, "ignore"): ["mixtures.0"],
    (ExpertPruning, "module"): ["mixtures"],
    (IterativeMagnitudePruning, "criterion"): "random",
    (IterativeMagnitudePruning, "amount"): {"hidden": 0.5},
}
MAKES = {LayerPruning: Deep, ExpertPruning: Experts}
TOGETHER = {
    "control": {"rewind_to": 0},
    "pattern": {"amount": None},
    "parameters": {},
    "fade_steps": {"schedule": Linear(3, 5)},
    "layers": {"target": "flops"},
}
"""Arguments that both runs have where one is changed, since it makes no sense without."""

SETTLED = {"example_inputs", "report", "monitor"}
"""What is looked at, not how; and the name of a guard's state, so that another one is another guard."""


def cases():
    """One callback for each argument, and all others as slow tests."""
    seen = set()
    for kind in (*PRUNING, *BESIDE):
        for name in inspect.signature(kind).parameters:
            if name not in SETTLED:
                marks = [pytest.mark.slow] * (name in seen)
                yield pytest.param(kind, name, id=f"{kind.__name__}-{name}", marks=marks)
                seen.add(name)


class Stop(Callback):
    """Ends a run once it has begun: all that is compared was compared then."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


class Scheduled(Net):
    """The network of the runs, with a learning-rate schedule."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


def with_others(kind, **given):
    """The callback, and what it needs beside it."""
    if kind in BESIDE:
        return [FilterL1Pruning(0.25), kind(**{**BESIDE[kind], **given})]
    return [kind(**{**PRUNING[kind], **given})]


@pytest.mark.parametrize("kind, name", cases())
def test_a_changed_argument_is_told(kind, name, tmp_path):
    """A run that goes on with one argument changed says so, once, with both values; or refuses it by its name."""
    together = TOGETHER.get(name, {})
    before = with_others(kind, **together)
    value = FOR_ONE.get((kind, name), OTHERS[name])
    after = with_others(kind, **{**together, name: value})
    was = getattr(before[-1], name)
    assert was != getattr(after[-1], name)
    make = Deep if kind is LayerPruning or name == "layers" else MAKES.get(kind, Scheduled)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(net(make, dropout=0.0), *before, saver, val=True, max_epochs=6, enable_checkpointing=True)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(
                net(make, seed=5, dropout=0.0),
                *after,
                Stop(),
                val=True,
                ckpt_path=tmp_path / "epoch=1.ckpt",
                max_epochs=6,
            )
        except PruningError as error:
            told = [str(error)]
    told += [str(each.message) for each in caught if "other arguments than in the checkpoint" in str(each.message)]
    assert told, "nothing was said"
    assert f"{name}=" in told[0]
    if "other arguments" in told[0]:
        assert len(told) == 1
        was = list(was) if isinstance(was, tuple) else was
        assert f"{name}={was!r} is now" in told[0] or f"{name}={was} is now" in told[0] or name == "module"


@pytest.mark.parametrize("kind", [*PRUNING, *BESIDE], ids=lambda kind: kind.__name__)
def test_equal_arguments_say_nothing(kind, tmp_path):
    """A run that goes on as it began warns of nothing."""
    make = MAKES.get(kind, Scheduled)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(net(make, dropout=0.0), *with_others(kind), saver, val=True, max_epochs=6, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            net(make, dropout=0.0),
            *with_others(kind),
            Stop(),
            val=True,
            ckpt_path=tmp_path / "epoch=1.ckpt",
            max_epochs=6,
        )
    assert not [each for each in caught if "other arguments" in str(each.message)]


def test_all_callbacks_are_walked():
    """Every exported callback that keeps arguments of ours in checkpoints is here."""
    ours = {getattr(callbacks, name) for name in callbacks.__all__}
    lightnings = {kind for kind in ours if kind.__name__ in ("PruningCheckpoint", "PruningEarlyStopping")}
    assert ours - lightnings == {*PRUNING, *BESIDE}
