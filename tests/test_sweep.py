"""The command `lightning-prune sweep`, and the comparison of several runs by `lightning-prune report`."""

import csv
import json

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_prune import cli
from lightning_prune.cli import sweep
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import History, Moment
from lightning_prune.reports.comparison import compare_runs
from tests import runs


class Swept(runs.Known):
    """A module that brings its own data, and logs an accuracy."""

    def train_dataloader(self):
        return DataLoader(runs.images(), 8)

    def val_dataloader(self):
        return runs.batches(16, seed=8)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "tests.test_sweep.Swept"},
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "FilterL1Pruning",
                "init_args": {"amount": 0.1, "schedule": {"class_path": "OneShot", "init_args": {"at": 1}}},
            }
        ],
    },
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_runs_are_trained_once_and_compared(config, tmp_path, capfd, monkeypatch):
    """Each run has its amount, criterion and folder; the same command again trains only what is not finished."""
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "sweep"
    command = ["sweep", "--config", config, "--amounts", "0.3", "0.6", "--criteria", "taylor", "--out", out]
    cli.main(list(map(str, command)))
    for amount, hidden in (("0.3", 7), ("0.6", 4)):
        history = History.from_json(out / f"taylor-{amount}" / "pruning.json")
        assert history.layers["hidden"].now.width == hidden and "criterion='taylor'" in history.callbacks[0]
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["taylor-0.6", "taylor-0.3"]
    assert rows[0]["front"] == "front" and all(0 <= float(row["pruned"]) <= 1 for row in rows)
    assert "taylor-0.6 & " in (out / "runs.tex").read_text()

    first = out / "taylor-0.3" / "pruning.json"
    before = first.stat().st_mtime_ns
    stopped = json.loads((out / "taylor-0.6" / "pruning.json").read_text())
    (out / "taylor-0.6" / "pruning.json").write_text(json.dumps({**stopped, "stopped": "Ctrl-C"}))
    checkpoint = sweep.latest_checkpoint(out / "taylor-0.6")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2
    cli.main(list(map(str, [*command, "--trainer.max_epochs", "4"])))
    assert first.stat().st_mtime_ns == before
    again = History.from_json(out / "taylor-0.6" / "pruning.json")
    assert not again.stopped and again.layers["hidden"].now.width == 4
    assert [moment.epoch for moment in again.moments if moment.metrics] == [
        0,
        1,
        2,
        3,
    ]  # it went on


def test_commands_are_printed(config, tmp_path, capsys):
    """--print trains nothing: one command a line, each with a config of its own."""
    out = tmp_path / "sweep"
    given = ["--config", config, "--amounts", "0.3", "0.5", "--criteria", "l1", "obs", "--out", out, "--print"]
    cli.main(["sweep", *map(str, given), "--trainer.max_epochs", "9"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.endswith("run.yaml --trainer.max_epochs 9") for line in lines)
    assert not list(out.rglob("*.ckpt"))
    own = yaml.safe_load((out / "obs-0.5" / "run.yaml").read_text())["trainer"]
    assert own["callbacks"][0]["class_path"] == "lightning_prune.FilterPruning"
    assert own["callbacks"][0]["init_args"]["criterion"] == "obs" and own["callbacks"][0]["init_args"]["amount"] == 0.5
    assert own["logger"][0]["init_args"]["version"] == "obs-0.5"


@pytest.mark.parametrize(
    "callbacks, message",
    [([], "has 0 pruning callbacks"), ([{"class_path": "OBSOneShot"}], "has one criterion")],
)
def test_configs_that_cannot_be_swept_are_refused(callbacks, message, tmp_path, capsys):
    """A config without a pruning callback, or with one that has a criterion of its own, is refused."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "trainer": {"callbacks": callbacks}}))
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--config", str(path), "--amounts", "0.3", "--criteria", "l1", "--out", str(tmp_path / "o")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "amounts, criteria, message",
    [
        (["0.3", "1.5"], [], "FilterL1Pruning(amount=1.5): amount is"),
        (["0.3", "nan"], [], "FilterL1Pruning(amount=nan)"),
        (["0.3"], ["l1", "l3"], "FilterPruning(criterion='l3'): choose one of"),
        (["half"], [], "invalid number value: 'half'"),
    ],
)
def test_a_sweep_is_refused_before_its_first_run(amounts, criteria, message, config, tmp_path, capsys, monkeypatch):
    """What the last of its runs would be refused for is said before the first is trained."""
    monkeypatch.setattr(sweep.subprocess, "run", lambda *_: pytest.fail("a run was started"))
    command = ["sweep", "--config", str(config), "--out", str(tmp_path / "out"), "--amounts", *amounts]
    with pytest.raises(SystemExit):
        cli.main([*command, *(["--criteria", *criteria] if criteria else [])])
    assert message in capsys.readouterr().err


def test_amounts_may_be_whole_numbers(config, tmp_path, capsys):
    """As everywhere, ``2`` is two filters of each layer; ``2.0`` would be refused."""
    cli.main(["sweep", "--config", str(config), "--amounts", "2", "--print", "--out", str(tmp_path / "out")])
    own = yaml.safe_load((tmp_path / "out" / "2" / "run.yaml").read_text())["trainer"]
    assert own["callbacks"][0]["init_args"]["amount"] == 2 and isinstance(
        own["callbacks"][0]["init_args"]["amount"], int
    )


def history(kept, value, name="val_acc"):
    dense = Moment(0, 4, {"prune/flops_kept": 1.0}, {name: 0.9})
    left = {"prune/flops_kept": kept, "prune/params_kept": kept / 2}
    return History(moments=[dense, Moment(1, 8, left, {}), Moment(2, 12, left, {name: value})])


def test_the_front_is_that_of_brute_force():
    """A run is on the front where no other keeps no more and is better, whether high or low metrics are good."""
    generator = torch.Generator().manual_seed(0)
    for name, sign in (("val_acc", 1), ("val_loss", -1)):
        points = torch.rand(30, 2, generator=generator).mul(8).round().div(8).tolist()
        found = compare_runs({str(n): history(*point, name) for n, point in enumerate(points)})
        for run in found.runs:
            kept, value = points[int(run.name)]
            assert (run.kept["FLOPs"], run.pruned, run.dense) == (kept, value, 0.9)
            beaten = any(
                (other[0] <= kept and sign * other[1] > sign * value)
                or (other[0] < kept and sign * other[1] >= sign * value)
                for other in points
            )
            if run.on_front:
                assert not beaten
            elif not beaten:  # of equal runs one is marked
                assert points.count([kept, value]) > 1


def test_runs_without_a_common_metric_are_refused():
    """A metric that a run did not log is named."""
    with pytest.raises(PruningError, match="b logged no val_acc"):
        compare_runs({"a": history(0.5, 0.8), "b": history(0.5, 0.8, "other")})
    with pytest.raises(PruningError, match="cannot be compared"):
        compare_runs({"a": History(), "b": History()})


def test_several_runs_are_reported(tmp_path, capsys, monkeypatch):
    """The table, CSV, LaTeX and picture of several runs; --latency is for one."""
    monkeypatch.setenv("COLUMNS", "160")
    for name, kept, value in (("a", 0.5, 0.8), ("b", 0.7, 0.7)):
        history(kept, value).to_json(tmp_path / name / "pruning.json")
    cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert "★" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["runs.csv", "runs.png", "runs.tex"]
    assert (tmp_path / "out" / "runs.csv").read_text().splitlines()[1:] == [
        "a,0.2500,0.5000,0.9,0.8,front",
        "b,0.3500,0.7000,0.9,0.7,",
    ]
    everything = [tmp_path / "a", tmp_path / "b", *(tmp_path / "out").iterdir()]  # as a shell expands sweep/*
    cli.main(["report", *map(str, everything)])
    assert "2 runs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--latency"])
