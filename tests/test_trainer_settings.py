"""Pruning works under each of the Trainer's settings, for compiled models, and beside the learning rate finder."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_prune import FilterL1Pruning, Linear
from tests.runs import WIDTHS, Known, Net, assert_agrees_with_shapes, batches, fit, net, trainer, weights, widths

SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "clip-norm": {"gradient_clip_val": 0.1},
    "clip-value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "barebones": {"barebones": True, "enable_model_summary": None, "enable_progress_bar": None, "logger": None,
                  "enable_checkpointing": None, "num_sanity_val_steps": None},
    "deterministic": {"deterministic": True},
    "anomalies": {"detect_anomaly": True},
    "inference-mode-off": {"inference_mode": False},
    "val-within-epoch": {"val_check_interval": 2},
    "limit-batches": {"limit_train_batches": 2},
    "overfit": {"overfit_batches": 1},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "sanity": {"num_sanity_val_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_works_with_the_trainers_settings(setting, kind):
    """Pruning works under each of the Trainer's settings, and the loss stays finite."""
    if setting == "deterministic":
        before = torch.are_deterministic_algorithms_enabled()
    module = net(kind)
    made = fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)), val=True, **SETTINGS[setting])
    if setting == "deterministic":
        torch.use_deterministic_algorithms(before)
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert_agrees_with_shapes(module)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    if setting != "barebones":
        assert made.callback_metrics["prune/sparsity"] == 0.5


class Quiet(Known):
    """Logs nothing, which dynamo does not understand."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class CompiledInTheClass(Known):
    forward = torch.compile(Known.forward, backend="eager")


def compiled_whole(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def compiled_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def compiled_part(module):
    module.second = torch.compile(module.second, backend="eager")
    return module


def unchanged(module):
    return module


@pytest.mark.parametrize(
    "kind, compiled",
    [
        (Quiet, compiled_whole),
        (Known, compiled_in_place),
        (Known, compiled_forward),
        (Known, compiled_part),
        (CompiledInTheClass, unchanged),
    ],
)
def test_compiled_models(kind, compiled):
    """A compiled model is pruned as a plain one, and stays compiled."""
    plain, module = net(Known, dropout=0.0), net(kind, dropout=0.0)
    fit(plain, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)))
    given = compiled(module)
    forward, called = module.forward, module._compiled_call_impl
    fit(given, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)))
    for value, found in zip(weights(plain).values(), weights(module).values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert module._compiled_call_impl is called
    assert compiled is compiled_whole or module.forward == forward  # Lightning compiles, and takes back, the whole


def test_beside_the_learning_rate_finder(tmp_path, monkeypatch):
    """LearningRateFinder, which saves and restores the model before training, does not disturb."""
    monkeypatch.chdir(tmp_path)
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 1)), LearningRateFinder(num_training_steps=3))
    assert widths(module)["first"] == 4


def test_a_tuner_that_only_tries_settings_is_no_run_without_batches(tmp_path, monkeypatch, recwarn):
    """It trains nothing that is kept, prunes nothing, and nobody is warned of that."""
    monkeypatch.chdir(tmp_path)
    module = net()
    made = trainer(FilterL1Pruning(amount=0.5, schedule=Linear(0, 1)))
    Tuner(made).lr_find(module, batches(), num_training=3)
    assert widths(module) == WIDTHS
    assert not any("trained no batch" in str(warning.message) for warning in recwarn)
