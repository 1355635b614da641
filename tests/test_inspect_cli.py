"""The command `lightning-prune`: what it prints and writes for the YAML of a LightningCLI run, and how it refuses."""

import dataclasses
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import lightning_prune
from lightning_prune import FilterL1Pruning, cli
from lightning_prune.analysis.sensitivity_findings import Sensitivity
from lightning_prune.reports import group_costs
from lightning_prune.structure import find_structure, trace
from tests import runs

SCRIPT = """
import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from torch import nn

from tests import runs


class Net(runs.Net):
    def __init__(self, lr: float = 0.1, scale: int = 1):
        super().__init__(lr)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return runs.batches(16, self.batch_size)

    def val_dataloader(self):
        return runs.batches(16, self.batch_size, seed=8)


def mlp(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


class Choosing(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


def choosing() -> nn.Sequential:
    return Choosing(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def tokens() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 2))


def bracketed() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("[/x]", nn.Linear(4, 6))
    model.add_module("y", nn.Linear(6, 2))
    return model


if __name__ == "__main__":
    LightningCLI(Net, Data)
"""
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "callbacks": [{"class_path": "lightning_prune.FilterL1Pruning", "init_args": {"amount": 0.5}}],
    },
    "data": {"batch_size": 8},
    "model": {"lr": "1e-1"},
    "ckpt_path": None,
}
CLASSES = ["--model_class", "cli_script.Net", "--data_class", "cli_script.Data"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a training script and its YAML, as the current one."""
    (tmp_path / "cli_script.py").write_text(SCRIPT)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")
    yield tmp_path
    sys.modules.pop("cli_script", None)


def text_of(capsys) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def sensitivity(*arguments, metric="val_acc", out="found"):
    cli.main(["sensitivity", "--config", "run.yaml", "--metric", metric, "--out", out, "--shares", "0.5", *arguments])


def refusal(capsys, run, *arguments):
    """The one line that a command ends with, and exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert stop.value.code == 2 and line.startswith("lightning-prune ")
    return line


def assert_complete(found):
    assert [group.name for group in found.groups] == list(runs.WIDTHS)
    assert all(group.shares == (0.5,) for group in found.groups)


def test_sensitivity_of_a_run(folder, capsys):
    """From the YAML that a run is trained with come JSON, picture, amounts and a table; its callbacks stay out."""
    sensitivity(*CLASSES, "--drop", "1")
    assert_complete(Sensitivity.from_json(folder / "found" / "sensitivity.json"))
    assert (folder / "found" / "sensitivity.png").stat().st_size > 1000
    amounts = yaml.safe_load((folder / "found" / "amounts.yaml").read_text())["amount"]
    assert amounts == dict.fromkeys(runs.WIDTHS, 0.5)
    text = text_of(capsys)
    assert all(word in text for word in [*runs.WIDTHS, "val_acc", "50%", "amounts.yaml"])
    assert not (folder / "lightning_logs").exists()


def test_sensitivity_of_single_weights(folder, capsys):
    """With ``--weights`` single weights of each layer go, and what is written names amounts for each."""
    sensitivity(*CLASSES, "--weights", "--drop", "1")
    amounts = yaml.safe_load((folder / "found" / "amounts.yaml").read_text())["amount"]
    assert amounts == {f"{name}.weight": 0.5 for name in ("first", "second", "hidden", "head")}
    assert "--criterion l1 scores units" in refusal(capsys, sensitivity, *CLASSES, "--weights", "--criterion", "l1")


def test_sensitivity_is_of_the_checkpoint(folder):
    """With --ckpt_path the weights of a checkpoint are judged, of a pruned one in its own shapes."""
    model = runs.net(runs.Known)
    trainer = runs.fit(model, FilterL1Pruning(amount={"first": 0.5}), max_epochs=1)
    trainer.save_checkpoint(folder / "slim.ckpt")
    sensitivity(*CLASSES, "--ckpt_path", "slim.ckpt", metric="val_loss")
    found = Sensitivity.from_json(folder / "found" / "sensitivity.json")
    assert {group.name: group.width for group in found.groups} == {**runs.WIDTHS, "first": 4}
    assert found.mode == "min"
    validating = runs.trainer()
    validating.validate(model, runs.batches(16, seed=8), verbose=False)
    assert found.dense == pytest.approx(float(validating.callback_metrics["val_loss"]), rel=1e-5)


def test_a_stopped_sensitivity_goes_on(folder, monkeypatch):
    """When the JSON is there, groups in it are not measured again."""
    sensitivity(*CLASSES)
    path = folder / "found" / "sensitivity.json"
    whole = Sensitivity.from_json(path)
    marked = dataclasses.replace(whole.groups[0], values=(0.123,))
    dataclasses.replace(whole, groups=(marked,)).to_json(path)
    sensitivity(*CLASSES)
    assert Sensitivity.from_json(path) == dataclasses.replace(whole, groups=(marked, *whole.groups[1:]))


def test_classes_may_stand_in_the_yaml_and_options_follow(folder, capsys):
    """A YAML with class_path needs no --model_class; --trainer.*, --model.*, --data.* are as for LightningCLI."""
    config = CONFIG | {
        "model": {"class_path": "cli_script.Net", "init_args": {"lr": 0.1}},
        "data": {"class_path": "cli_script.Data"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({"fit": config}))
    sensitivity("--trainer.limit_val_batches", "1", "--data.batch_size", "4", "--model.lr", "0.5", "--ignore", "first")
    found = Sensitivity.from_json(folder / "found" / "sensitivity.json")
    assert [group.name for group in found.groups] == ["second", "hidden"]
    assert round(4 * found.dense, 6) == round(4 * found.dense)  # of four images


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            [*CLASSES, "--metric", "val_ac"],
            "'val_ac': validation logs val_acc, val_loss. Did you mean 'val_acc'?",
        ),
        ([*CLASSES, "--metric", "f1"], "metric='f1': validation logs val_acc, val_loss. Choose one of these"),
        ([], "run.yaml gives arguments for model, but no class. Name the class that your script names: --model_class"),
        ([*CLASSES, "--model_class", "cli_script.Nett"], "cli_script.Nett cannot be imported"),
        (["--ignore", "*", *CLASSES], "Nothing is left to prune in Net"),
        (["--ignore", "conv", *CLASSES], "ignore='conv' names no module of Net"),
        (["--drop", "-1", *CLASSES], "--drop -1: must be 0 or more"),
        (["--shares", "1.5", *CLASSES], "(shares=[1.5])"),
        (["--ckpt_path", "no.ckpt", *CLASSES], "no.ckpt does not exist"),
        (["--ckpt_path", "run.yaml", *CLASSES], "run.yaml cannot be read as a checkpoint"),
        (["--ckpt_path", "other.ckpt", *CLASSES], "other.ckpt does not fit Net"),
    ],
)
def test_sensitivity_refuses(arguments, told, folder, capsys):
    """What cannot be done is told in one line, without a traceback."""
    torch.save({"state_dict": {"elsewhere": torch.ones(1)}}, folder / "other.ckpt")
    assert told in refusal(capsys, sensitivity, *arguments)


def test_errors_of_the_users_own_code_keep_their_traceback(folder):
    """A ValueError from the script is a bug there, which a line without a place would hide."""
    script = SCRIPT.replace("images, labels = batch", "raise ValueError('mine')")
    (folder / "cli_script.py").write_text(script)
    with pytest.raises(ValueError, match="mine"):
        sensitivity(*CLASSES)


def test_inspect_a_run(capsys):
    """Groups with their widths, parameters and FLOPs are listed, and what stays with the reason."""
    cli.main(["inspect", "--config", "run.yaml", *CLASSES])
    text = text_of(capsys)
    assert "3 channel groups can be pruned" in text
    assert all(name in text and str(width) in text for name, width in runs.WIDTHS.items())
    assert "head.weight, dimension 0" in text and "reaches the model's output" in text


@pytest.mark.parametrize(
    "config", [{"trainer": {"max_epochs": 1}}, {"model": None}, {}], ids=["trainer", "null", "empty"]
)
def test_a_config_without_a_model_is_refused_by_name(config, folder, capsys):
    """A YAML that says nothing of the model needs --model_class, and says so; with it, it will do."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    line = refusal(capsys, cli.main, ["inspect", "--config", "run.yaml"])
    assert "run.yaml does not name a model" in line and "--model_class my_script.MyModel" in line
    cli.main(["inspect", "--config", "run.yaml", *CLASSES])


def test_inspect_a_module(capsys):
    """--model takes what makes a module, class or function, and its arguments; --yaml prints a block for amount=."""
    cli.main(["inspect", "--model", "cli_script.mlp", "--model.width", "9", "--input_shape", "1,4"])
    text = text_of(capsys)
    assert "1 channel groups can be pruned" in text and " 9 " in text
    cli.main(["inspect", "--model", "cli_script.mlp", "--input_shape", "1,4", "--yaml"])
    assert yaml.safe_load(capsys.readouterr().out) == {"amount": {"0": 0.0}}


def test_inspect_names_code_that_goes_by_numbers(capsys):
    """Under what stays it says of which modules only one path was seen."""
    cli.main(["inspect", "--model", "cli_script.choosing", "--input_shape", "1,4"])
    assert "Code that branches on values of its input, of which only the path taken was traced: the model." in text_of(
        capsys
    )


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "give either --config or --model"),
        (["--model", "cli_script.mlp", "--config", "run.yaml"], "give either --config or --model"),
        (["--model", "cli_script.mlp"], "--model needs --input-shape, such as 1,3,32,32"),
        (["--model", "cli_script.mlp", "--input_shape", "1,5"], "does not run on such inputs"),
        (["--model", "cli_script.mlp", "--input-shape", "1,4", "--ignore", "9"], "ignore='9' names no module"),
        (["--model", "cli_script.mlp", "--input-shape", "1,4", "--min-width", "{'9': 2}"], "min_width['9'] names no"),
        (["--model", "cli_script.mlp", "--input-shape", "1,4", "--min-width", "{"], "'{' is not valid YAML"),
        (["--model", "cli_script.mlp", "--input-shape", "1,4", "--tokens", "0"], "'0' must be a whole number from 1"),
        (["--config", "no.yaml"], "argument --config: no.yaml does not exist"),
        (["--config", "broken.yaml"], "broken.yaml is not valid YAML"),
        (["--config", "list.yaml"], "list.yaml holds list, not a config of LightningCLI"),
    ],
)
def test_inspect_refuses(arguments, told, folder, capsys):
    """What is missing or wrong is told in one line."""
    (folder / "broken.yaml").write_text("model: [")
    (folder / "list.yaml").write_text("- model")
    assert told in refusal(capsys, cli.main, ["inspect", *arguments])


@pytest.mark.parametrize("command", ["inspect", "sensitivity"])
def test_a_missing_extra_is_named(command, capsys, monkeypatch):
    """Without jsonargparse the command says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    more = ["--metric", "val_acc", "--out", "found"] if command == "sensitivity" else []
    line = refusal(capsys, cli.main, [command, "--config", "run.yaml", *CLASSES, *more])
    assert "pip install 'lightning-prune[cli]'" in line


def test_inspect_a_model_of_tokens(capsys):
    """With --tokens the inputs are token ids; options may be written with dashes."""
    cli.main(["inspect", "--model", "cli_script.tokens", "--input-shape", "2,5", "--tokens", "11"])
    assert "1 channel groups can be pruned" in text_of(capsys)


def test_the_version_is_printed(capsys):
    """--version prints the version of the package."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.split() == ["lightning-prune", version("lightning-prune")]


def test_names_with_brackets_are_printed(capsys):
    """Names of modules are no markup."""
    model = ["inspect", "--model", "cli_script.bracketed", "--input-shape", "1,4"]
    cli.main([*model, "--max-amount", "{'[[]/x[]]': 0.5}"])
    assert text_of(capsys).count("[/x]") > 1


def test_inspect_tells_what_can_go(capsys):
    """A table says of every group how many units may leave inside the limits, and what keeps the others."""
    model = ["inspect", "--model", "cli_script.mlp", "--model.width", "9", "--input_shape", "1,4"]
    cli.main([*model, "--min_width", "3"])
    text = text_of(capsys)
    assert "At most" in text and "min_width=3" in text and " 6 " in text
    cli.main([*model, "--max_amount", "{'0': 0.5}", "--round_to", "2"])
    text = text_of(capsys)
    assert "round_to=2" in text and " 3 " in text  # of nine, four may leave, and six is even
    for limit in (["--min_width", "0"], ["--max_amount", "2"]):
        assert f"inspect({limit[0][2:]}=" in refusal(capsys, cli.main, [*model, *limit])


def test_a_shape_that_is_none_is_told_with_an_example(capsys):
    """What is no shape is refused in the words of the option."""
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--model", "cli_script.mlp", "--input_shape", "a,b"])
    text = text_of(capsys)
    assert "argument --input_shape: 'a,b' is not a shape; write sizes as 1,3,32,32" in text
    assert "_shape value" not in text


@pytest.mark.parametrize("command", ["sensitivity", "inspect", "report"])
def test_help_needs_no_manual(command, capsys):
    """--help names every option, says where classes come from and ends with a call that works."""
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = text_of(capsys)
    for words in (
        "--config",
        "--model_class",
        "LightningCLI(MyModel, MyData)",
        "--trainer.limit_val_batches",
        "example",
    ):
        assert words in text


def test_the_module_runs_as_a_program():
    """The command works as a program of its own, too."""
    root = Path(lightning_prune.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune.cli", "--help"], cwd=root, capture_output=True, text=True, check=True
    )
    assert "sensitivity" in done.stdout and "inspect" in done.stdout


def test_costs_of_a_group_are_those_of_its_units():
    """Each unit takes its filter, its bias and its column of the next layer along."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    costs = group_costs(model, find_structure(trace(model, torch.ones(3, 4))))
    assert {name: tuple(cost) for name, cost in costs.items()} == {"0": (10 * (4 + 1 + 2), 3 * 10 * (4 + 2))}
