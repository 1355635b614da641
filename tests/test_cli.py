"""Pruning from the command line and from YAML, by LightningCLI."""

import re

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_prune import Cubic, FilterL1Pruning, FilterPruning, Linear, OneShot, load_from_checkpoint
from lightning_prune.algorithms.schedules import FewUnits
from tests.runs import Depthwise, Net, assert_same_weights, batches, trainer, weights, widths

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "max_epochs": 3,
}


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return batches()


def run(*args, module=Net, **arguments):
    """What ``python main.py ...`` runs; returns the trainer's pruning callbacks and the module."""
    torch.manual_seed(0)
    cli = LightningCLI(module, Data, args=list(args), trainer_defaults=QUIET, save_config_callback=None, **arguments)
    return [c for c in cli.trainer.callbacks if isinstance(c, FilterL1Pruning | FilterPruning)], cli.model


def configured(folder, *callbacks):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": list(callbacks)}}))
    return path


SCHEDULES = {
    "full": ({"class_path": "lightning_prune.Cubic", "init_args": {"start": 0, "end": 2}}, Cubic(0, 2)),
    "short": ({"class_path": "Linear", "init_args": {"start": 0, "end": 2, "every": 2}}, Linear(0, 2, 2)),
    "name": ("OneShot", OneShot()),
    "null": (None, OneShot()),
}


@pytest.mark.parametrize("given, schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", ["lightning_prune.FilterL1Pruning", "FilterL1Pruning"], ids=["full", "short"])
def test_yaml(name, given, schedule, tmp_path):
    """YAML names callback and schedule by full or short class path, with their arguments below."""
    callback = {"class_path": name, "init_args": {"amount": 0.5, "schedule": given}}
    (found,), module = run("fit", "--config", str(configured(tmp_path, callback)))
    assert repr(found) == repr(FilterL1Pruning(amount=0.5, schedule=schedule))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_yaml_of_a_criterion_of_ones_own(tmp_path):
    """A criterion is a name or an import path; limits may go by pattern."""
    arguments = {
        "amount": 0.5,
        "criterion": "tests.runs.largest_weight",
        "min_width": {"*": 2, "hidden": 8},
        "max_amount": {"first": 0.25},
        "recalibrate": 2,
        "schedule": {"class_path": "FewUnits", "init_args": {"units": 4}},
    }
    callback = {"class_path": "FilterPruning", "init_args": arguments}
    (found,), module = run("fit", "--config", str(configured(tmp_path, callback)))
    assert repr(found) == repr(FilterPruning(**{**arguments, "schedule": FewUnits(4)}))
    assert widths(module) == {"first": 6, "second": 3, "hidden": 8}


@pytest.mark.parametrize("criterion", ["random", "tests.test_cli.smallest_last"])
def test_yaml_of_a_criterion_for_weights(criterion, tmp_path):
    """A criterion of single weights is a name or an import path, too."""
    callback = {"class_path": "IterativeMagnitudePruning", "init_args": {"amount": 0.5, "criterion": criterion}}
    _, module = run("fit", "--config", str(configured(tmp_path, callback)))
    assert int((module.hidden.weight == 0).sum()) == 30


def smallest_last(weight):
    return -weight.abs()


def test_yaml_patterns(tmp_path):
    """Amounts and ignored layers may be patterns of module paths; several callbacks stand in a list."""
    (one, two), module = run(
        "fit", "--config",
        str(
            configured(
                tmp_path,
                {"class_path": "FilterL1Pruning", "init_args": {"amount": {"first": 0.5}, "ignore": ["head"]}},
                {"class_path": "FilterL1Pruning", "init_args": {"amount": {"hid*": 0.2}}},
            )
        ),
    )  # fmt: skip
    assert (one.amount, one.ignore, two.amount) == ({"first": 0.5}, ["head"], {"hid*": 0.2})
    assert widths(module) == {"first": 4, "second": 6, "hidden": 8}


def test_yaml_of_masks(tmp_path):
    """Masks are asked for in the same way, rounds and rewinding with their numbers."""
    schedule = {"class_path": "Geometric", "init_args": {"start": 1, "end": 2}}
    arguments = {"amount": 0.5, "scope": "layer", "schedule": schedule, "rewind_to": 0, "control": "shuffle"}
    callback = {"class_path": "IterativeMagnitudePruning", "init_args": arguments}
    _, module = run("fit", "--config", str(configured(tmp_path, callback)))
    assert int((module.second.weight == 0).sum()) == 216


def test_command_line():
    """Everything can be said on the command line."""
    (found,), module = run(
        "fit",
        "--trainer.callbacks+=FilterL1Pruning",
        "--trainer.callbacks.amount=0.5",
        "--trainer.callbacks.target=flops",
        "--trainer.callbacks.scope=global",
        "--trainer.callbacks.round_to=2",
        "--trainer.callbacks.ignore=[hidden]",
        "--trainer.callbacks.schedule=Cubic",
        "--trainer.callbacks.schedule.start=0",
        "--trainer.callbacks.schedule.end=2",
        "--trainer.callbacks+=ModelSummary",
    )
    assert repr(found) == repr(
        FilterL1Pruning(0.5, target="flops", scope="global", round_to=2, ignore=["hidden"], schedule=Cubic(0, 2))
    )
    assert widths(module)["hidden"] == 10 > widths(module)["first"]


def test_command_line_patterns():
    """A dict of amounts may stand on the command line."""
    (found,), _ = run("fit", "--trainer.callbacks+=FilterL1Pruning", '--trainer.callbacks.amount={"first": 0.5}')
    assert found.amount == {"first": 0.5}


def test_command_line_over_yaml(tmp_path):
    """The command line overrides the file."""
    path = configured(tmp_path, {"class_path": "FilterL1Pruning", "init_args": {"amount": 0.25}})
    (found,), _ = run("fit", "--config", str(path), "--trainer.callbacks.amount=0.5")
    assert found.amount == 0.5


def test_help(capsys):
    """The help of the callback explains every argument and lists what may be chosen."""
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks.help=FilterL1Pruning")
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("amount", "target", "scope", "schedule", "ignore", "round_to", "example_inputs"):
        assert f"--trainer.callbacks.{name}" in shown
    for words in (
        "{filters,params,flops,latency}",
        "{layer,global}",
        "Fraction, in [0, 1), of ``target`` that is pruned",
        "lightning_prune.OneShot, lightning_prune.Linear, lightning_prune.Cubic",
        "Widths are rounded up to multiples of this, in channels (heads times their width).",
    ):
        assert words in shown


def test_help_of_a_schedule(capsys):
    """So does the help of a schedule."""
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks+=FilterL1Pruning", "--trainer.callbacks.schedule.help=Cubic")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Epoch or optimizer step (counted from 0) of the first pruning step." in shown
    assert "Epochs or optimizer steps between two pruning steps." in shown


@pytest.mark.parametrize(
    "argument, told",
    [
        ("target=speed", "Literal['filters', 'params', 'flops', 'latency']"),
        ("scope=all", "Literal['layer', 'global']"),
        ("amonut=0.5", "Option 'amonut' is not accepted"),
        ("amount=half", "amount"),
        ("round_to=1.5", "round_to"),
        ("schedule=Cubci", "Cubci"),
    ],
)
def test_bad_values_are_told(argument, told, capsys):
    """What cannot be parsed is refused with the argument, the value and what is allowed."""
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks+=FilterL1Pruning", f"--trainer.callbacks.{argument}")
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, told",
    [
        (
            "amount=30.0",
            "FilterL1Pruning(amount=30.0): amount is the fraction that leaves and must lie in [0, 1)",
        ),
        ("round_to=0", "FilterL1Pruning(round_to=0)"),
        ("amount={first: 1.5}", "FilterL1Pruning(amount={'first': 1.5})"),
    ],
)
def test_values_out_of_range_are_told(argument, told):
    """What is out of range is refused in the callback's own words."""
    with pytest.raises(ValueError, match=re.escape(told)):
        run("fit", "--trainer.callbacks+=FilterL1Pruning", f"--trainer.callbacks.{argument}")


def test_whole_numbers_of_units_come_from_the_command_line():
    """An amount without a point is a number of units, alone or by pattern, as in code."""
    for argument, expected in (("amount=3", (5, 3)), ("amount={first: 3}", (5, 6))):
        _, module = run("fit", "--trainer.callbacks+=FilterL1Pruning", f"--trainer.callbacks.{argument}")
        assert (module.first.out_channels, module.second.out_channels) == expected


def test_configuration_round_trip(capsys, tmp_path):
    """The configuration that is printed makes the same run."""
    given = ["--trainer.callbacks+=FilterL1Pruning", "--trainer.callbacks.amount=0.5"]
    schedule = ["--trainer.callbacks.schedule=Linear", "--trainer.callbacks.schedule.start=0"]
    with pytest.raises(SystemExit):
        run("fit", *given, *schedule, "--trainer.callbacks.schedule.end=1", "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    (found,), _ = run("fit", "--config", str(path))
    assert repr(found) == repr(FilterL1Pruning(0.5, schedule=Linear(0, 1)))


@pytest.mark.parametrize("subclass", [False, True], ids=["class", "class_path"])
def test_checkpoints_of_such_runs_load(subclass, tmp_path):
    """Checkpoints of a run from the command line load outside it, and can be tested from the command line."""
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    arguments = {"subclass_mode_model": True} if subclass else {}
    given = ["--trainer.callbacks+=FilterL1Pruning", "--trainer.callbacks.amount=0.5"]
    chosen = ["--model=tests.runs.Depthwise"] if subclass else []
    module = pl.LightningModule if subclass else Depthwise
    torch.manual_seed(0)
    cli = LightningCLI(
        module, Data, args=["fit", *given, *chosen], save_config_callback=None, **arguments,
        trainer_defaults=QUIET | {"enable_checkpointing": True, "callbacks": [save]},
    )  # fmt: skip
    loaded = load_from_checkpoint(module, tmp_path / "epoch=2.ckpt")
    assert type(loaded) is type(cli.model)
    assert_same_weights(loaded, weights(cli.model))
    fresh = Depthwise()
    trainer(FilterL1Pruning(0.5)).test(fresh, batches(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert_same_weights(fresh, weights(cli.model))
