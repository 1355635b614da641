"""The command `lightning-prune report`: shows a run again, from whatever it left, and measures its model."""

import re

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_prune import FilterL1Pruning, Linear, cli
from tests import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The log folder of a run from the command line: report, config and checkpoints."""
    logger = CSVLogger(tmp_path_factory.mktemp("logs"), name=None, version="run")
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 2), example_inputs=runs.IMAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        save = ModelCheckpoint(f"{logger.log_dir}/checkpoints", save_last=True)
        runs.fit(runs.net(runs.Known), callback, save, val=True, logger=logger, enable_checkpointing=True)
    folder = type(tmp_path_factory.getbasetemp())(logger.log_dir)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "tests.test_report_cli.Validated"}}))
    return folder


class Validated(runs.Known):
    """A module that brings its own data."""

    def val_dataloader(self):
        return runs.batches(16, seed=8)


def shown(capsys, *arguments):
    cli.main(["report", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_run_is_shown_again_from_whatever_it_left(run, capsys, monkeypatch):
    """Folder, JSON and checkpoint tell the same; a folder without a report is told from its latest checkpoint."""
    monkeypatch.setenv("COLUMNS", "160")
    texts = {
        shown(capsys, path)
        for path in (run, run / "pruning.json", run / "checkpoints" / "last.ckpt", run / "checkpoints")
    }
    (text,) = texts
    assert all(word in text for word in ("first", "8 → 4", "Pruning steps", "val_loss", "reaches the model's output"))


def test_a_report_is_written_where_asked(run, tmp_path, capsys):
    """--out takes the page, the picture and the history, the same as the run's own."""
    shown(capsys, run / "checkpoints" / "last.ckpt", "--out", tmp_path / "out")
    pages = [(folder / "pruning.html").read_text() for folder in (tmp_path / "out", run)]
    # checkpoints do not hold when and where they were made
    assert re.sub("<dl>.*</dl>", "<dl></dl>", pages[1]) == pages[0] != pages[1]
    assert (tmp_path / "out" / "pruning.png").exists()


def test_latency_is_measured_of_the_run(run, capsys, monkeypatch):
    """The model is made from the run's config, its pruned shapes from the latest checkpoint."""
    monkeypatch.setenv("COLUMNS", "200")
    text = shown(capsys, run, "--latency", "--batch_sizes", "2", "7")
    assert re.search(r"│ +2 │ +[\d.]+ ms", text) and re.search(r"│ +7 │ +[\d.]+ ms", text)
    flops = [runs.count_flops(model, runs.IMAGE).total for model in (runs.Known(), slim())]
    assert f"{flops[0]:,}" in text and f"{flops[1]:,} ({flops[1] / flops[0]:.0%})" in text
    assert "4 (first), 3 (second), 5 (hidden)" in text


def test_a_dense_checkpoint_is_not_timed_as_the_pruned_one(run, tmp_path, capsys):
    """A checkpoint from before the first pruning step is refused, with what to give instead."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    path = tmp_path / "best.ckpt"
    torch.save({**saved, "state_dict": runs.Known().state_dict()}, path)
    with pytest.raises(SystemExit) as stop:
        shown(capsys, run, "--latency", "--ckpt_path", path)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "best.ckpt holds the dense model" in told and "Give --ckpt_path" in told


def test_latency_of_a_model_by_import_path(run, capsys):
    """Without a config, --model and --input_shape make it."""
    arguments = ["--latency", "--batch_sizes", "1", "--model", "tests.runs.Net", "--input_shape", "1,2,6,6"]
    assert "Latency, measured on cpu" in shown(capsys, run / "checkpoints" / "last.ckpt", *arguments)


def slim():
    model = runs.net(runs.Known)
    runs.fit(model, FilterL1Pruning(0.5), max_epochs=1)
    return model


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["nowhere"], "nowhere does not exist. Give a log folder, a checkpoint or pruning.json"),
        (["empty"], "empty holds neither pruning.json nor a checkpoint"),
        (["weights.ckpt"], "weights.ckpt has no pruning history"),
        (["notes.txt"], "notes.txt cannot be read as a checkpoint"),
        (["pruning.json", "--latency"], "there is no config.yaml in"),
        (["pruning.json", "--latency", "--ckpt_path", "no.ckpt"], "no.ckpt does not exist, or is not a file"),
        (["pruning.json", "--batch_size", "2"], "unknown arguments: --batch_size 2"),
        (["pruning.json", "--latency", "--model", "tests.runs.Net", "--input_shape", "1,2,6,6"], "Give --ckpt-path"),
        (["pruning.json", "--trainer.devices", "2"], "unknown arguments: --trainer.devices 2"),
    ],
)
def test_what_cannot_be_shown_is_told(arguments, told, run, tmp_path, monkeypatch, capsys):
    """What is missing is said in one line, with what to give, and the exit status is 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "pruning.json").write_text((run / "pruning.json").read_text())
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    if "--latency" in arguments:
        (tmp_path / "weights.ckpt").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("lightning-prune report: ") and told in line
