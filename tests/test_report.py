"""What a run that prunes leaves behind: its history, in the callback, in checkpoints, in the terminal and as files."""

import csv
import json
import math
import re
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from PIL import Image
from rich.console import Console

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OBSOneShot,
    OneShot,
    PruningError,
)
from lightning_prune.algorithms.schedules import FewUnits
from lightning_prune.callbacks.engine import reporting
from lightning_prune.reports import Decision, History, LayerChange, LayerCost, draw_run, headline, run_tables
from lightning_prune.reports.run_files import run_page
from lightning_prune.reports.run_summary import main_metric, stages, staying, still_learning
from tests import runs
from tests.runs import Watch, fit, net, widths


class Metrics(Watch):
    """Notes what every validation logged."""

    def __init__(self):
        super().__init__()
        self.validated = []

    def on_validation_end(self, trainer, pl_module):
        self.validated.append({"val_loss": float(trainer.callback_metrics["val_loss"])})


def logged(folder):
    return CSVLogger(folder, name="run", version=0)


def test_history_tells_what_left_when_and_what_validation_said():
    """Each cut is a moment with the FLOPs that a count finds; each validation is one with what it logged alone."""
    module, callback, watch = net(), FilterL1Pruning(0.5, schedule=Linear(1, 2)), Metrics()
    fit(module, watch, callback, val=True)
    history = callback.history
    assert [m.metrics for m in history.moments if m.metrics] == watch.validated
    cuts = [m for m in history.moments if not m.metrics]
    assert [(m.epoch, m.step) for m in cuts] == [(0, 0), (1, 4), (2, 8)]
    assert [m.left["prune/flops"] for m in cuts] == watch.flops
    assert [m.left["prune/params"] for m in cuts] == watch.params
    for name, width in runs.WIDTHS.items():
        assert (history.layers[name].before.width, history.layers[name].now.width) == (width, widths(module)[name])
    assert staying(history) == {"reaches the model's output": ["head.weight"]}
    assert history.model == "Net" and history.callbacks == [
        "FilterL1Pruning(amount=0.5, schedule=Linear(start=1, end=2, every=1, by='epochs'))"
    ]


def test_stages_hold_the_first_and_the_last_validation_between_two_cuts():
    """Right after a cut a metric is that of the wounded model, before the next that of the healed one."""
    history = History()
    for moment, left, metrics in ((0, 1.0, (0.5, 0.9)), (2, 0.6, (0.7, 0.8, 0.85)), (5, 0.4, ())):
        history.note_left(moment, 10 * moment, {"prune/flops_kept": left})
        for i, value in enumerate(metrics):
            history.note_metrics(moment + i, 10 * (moment + i + 1), {"acc": value})
    found = [(s.epoch, s.left["prune/flops_kept"], s.first.get("acc"), s.last.get("acc")) for s in stages(history)]
    assert found == [(0, 1.0, 0.5, 0.9), (2, 0.6, 0.7, 0.85), (5, 0.4, None, None)]


def test_a_report_is_left_in_the_folder_of_the_logger(tmp_path, capsys):
    """The terminal shows tables; the log folder holds the history as JSON, a page that needs no network, a picture."""
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 2))
    fit(net(), callback, val=True, logger=logged(tmp_path))
    folder = tmp_path / "run" / "version_0"
    assert History.from_json(folder / "pruning.json") == callback.history
    assert (folder / "pruning.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "pruning.html").read_text()
    assert all(word in page for word in [*runs.WIDTHS, "val_loss", "8 → 4", "reaches the model&#x27;s output"])
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(', page)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("8 → 4", "Pruning steps", "Not prunable", "val_loss"))
    assert "version_0/pruning.html" in re.sub(r"\s", "", shown)


def test_the_picture_shows_what_the_history_says():
    """Lines are what was left and the metric at each step, bars the widths; the metric ends each stage at its cost."""
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 2))
    fit(net(), callback, val=True)
    history = callback.history
    figure = draw_run(history)
    axes = {(part.get_xlabel(), part.get_ylabel()): part for part in figure.axes}
    (flops,) = [line for line in axes["optimizer steps", "kept, %"].lines if line.get_label() == "FLOPs"]
    assert list(flops.get_ydata()[1:]) == [100 * moment.left["prune/flops_kept"] for moment in history.moments]
    assert list(flops.get_xdata()[1:]) == [moment.step for moment in history.moments]
    losses = [(m.step, m.metrics["val_loss"]) for m in history.moments if m.metrics]
    assert [tuple(point) for point in axes["", "val_loss"].lines[0].get_xydata()] == losses
    ends = [(100 * s.left["prune/flops_kept"], s.last["val_loss"]) for s in stages(history)]
    assert still_learning(history)  # so that the dense point is drawn apart, and the curve begins after it
    dense, curve = axes["FLOPs kept, %", "val_loss"].lines
    assert [[tuple(point) for point in line.get_xydata()] for line in (dense, curve)] == [ends[:1], ends[1:]]
    heights = [bar.get_height() for bar in axes["", "width"].patches]
    changes = history.layers.values()
    assert heights == [change.before.width for change in changes] + [change.now.width for change in changes]


def test_points_of_the_picture_tell_their_values(tmp_path):
    """Where the page puts the values of a validation, the picture has a dark point; the words are the history's."""
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 2))
    fit(net(), callback, val=True, logger=logged(tmp_path))
    page = (tmp_path / "run" / "version_0" / "pruning.html").read_text()
    points = re.findall(r'<i style="left:([\d.]+)%;top:([\d.]+)%" title="(.*?)"></i>', page)
    seen = [moment for moment in callback.history.moments if moment.metrics]
    with Image.open(tmp_path / "run" / "version_0" / "pruning.png") as file:
        picture = file.convert("L")
    for (left, top, words), moment in zip(points, seen, strict=True):
        kept = f"{moment.left['prune/flops_kept']:.1%} of the FLOPs"
        assert f"epoch {moment.epoch}, step {moment.step}: val_loss {moment.metrics['val_loss']:.4g}" in words
        assert kept in words
        x, y = round(float(left) / 100 * picture.width), round(float(top) / 100 * picture.height)
        around = picture.crop((x - 1, y - 1, x + 2, y + 2)).getextrema()
        assert around[0] < 100  # of 255: the point is dark, the background white


@pytest.mark.parametrize("error, raised", [(KeyboardInterrupt, SystemExit), (MemoryError, MemoryError)])
def test_a_run_that_is_stopped_is_reported(error, raised, tmp_path, capsys):
    """Ctrl-C and errors leave the files of what was cut so far, and say what stopped it; above errors no tables."""

    class Stopper(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6:
                raise error

    class Saver(ModelCheckpoint):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    module, callbacks = (
        net(),
        (
            FilterL1Pruning(0.5, schedule=Linear(1, 3)),
            IterativeMagnitudePruning(0.5, schedule=OneShot(3), scope="global"),
        ),
    )
    with pytest.raises(raised):
        fit(
            module,
            *callbacks,
            Stopper(),
            Saver(tmp_path),
            enable_checkpointing=True,
            val=True,
            max_epochs=4,
            logger=logged(tmp_path),
        )
    found = History.from_json(tmp_path / "run" / "version_0" / "pruning.json")
    assert found.stopped == f"{error.__name__} in epoch 1, after step 6"
    assert [moment.epoch for moment in found.moments if not moment.metrics] == [0, 1]
    assert found.layers["first"].now.width == widths(module)["first"] == 6
    assert f"Stopped by {found.stopped}." in (tmp_path / "run" / "version_0" / "pruning.html").read_text()
    assert ("Pruning steps" in capsys.readouterr().out) == (error is KeyboardInterrupt)
    again = (
        FilterL1Pruning(0.5, schedule=Linear(1, 3)),
        IterativeMagnitudePruning(0.5, schedule=OneShot(3), scope="global"),
    )
    fit(net(), *again, val=True, max_epochs=4, ckpt_path=tmp_path / "stopped.ckpt", logger=logged(tmp_path))
    assert again[-1].history.stopped == ""


def test_what_is_refused_leaves_no_report(tmp_path):
    """A run that did not begin has nothing to tell."""
    with pytest.raises(PruningError):
        fit(net(), FilterL1Pruning(0.999, target="flops"), logger=logged(tmp_path))
    assert not list(tmp_path.rglob("pruning.*"))


def test_a_logger_of_ones_own_gets_files_beside_its_checkpoints(tmp_path):
    """Whatever says where it saves and what the run is called has the report there."""

    class Own(Logger):
        name, version, save_dir = "mine", 3, str(tmp_path)

        def log_metrics(self, metrics, step=None):
            pass

        def log_hyperparams(self, params):
            pass

    fit(net(), FilterL1Pruning(0.5), logger=Own())
    assert (tmp_path / "mine" / "version_3" / "pruning.html").exists()


def test_without_a_logger_nothing_is_written(tmp_path, monkeypatch):
    """A run that logs nowhere leaves no file."""
    monkeypatch.chdir(tmp_path)
    fit(net(), FilterL1Pruning(0.5), val=True)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_page_says_what_is_missing(tmp_path, monkeypatch):
    """There is no picture then, everything else, and a word on how to get it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fit(net(), FilterL1Pruning(0.5), logger=logged(tmp_path))
    folder = tmp_path / "run" / "version_0"
    assert {path.name for path in folder.glob("pruning*")} == {"pruning.json", "pruning.html"}
    page = (folder / "pruning.html").read_text()
    assert "lightning-prune[plots]" in page and "<img" not in page


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch):
    """A full disk at the very end is warned of, and training ends well."""

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(reporting, "files_of_run", full)
    with pytest.warns(UserWarning, match=r"CSVLogger: OSError\('no space left'\)"):
        trainer = fit(net(), FilterL1Pruning(0.5), logger=logged(tmp_path))
    assert trainer.state.finished


def test_masks_are_told_weight_by_weight(tmp_path):
    """Of every weight the report says how many entries are left, and which weights stay dense, and why."""
    module = net()
    callback = IterativeMagnitudePruning(pattern="4:8")
    with pytest.warns(UserWarning, match="stays dense"):
        fit(module, callback, logger=logged(tmp_path))
    zeros = {name: int((parameter == 0).sum()) for name, parameter in module.named_parameters()}
    assert {w.name: w.size - w.stays for w in callback.history.weights} == {"second.weight": zeros["second.weight"]}
    assert set(callback.history.dense) == {"first.weight", "hidden.weight", "head.weight"}
    page = (tmp_path / "run" / "version_0" / "pruning.html").read_text()
    assert "50.0%" in page and "its 6 inputs are no multiple of 8" in page


def test_code_that_goes_by_numbers_is_named(capsys, monkeypatch):
    """Where a module's path hangs on numbers of its input, the report says that only the one taken was seen."""

    class Choosing(runs.Net):
        def forward(self, images):
            return super().forward(images if images.sum() < 1e9 else -images)

    monkeypatch.setenv("COLUMNS", "200")
    callback = FilterL1Pruning(0.5)
    fit(Choosing(), callback)
    assert callback.history.branching == ["the model"] and callback.history.layers["second"].now.width == 3
    assert "path that the example inputs took" in " ".join(capsys.readouterr().out.split())


def test_one_report_for_all_callbacks(capsys):
    """Of several callbacks the last keeps the history of all: layers and weights, in one report."""
    first, last = FilterL1Pruning(0.5), IterativeMagnitudePruning(0.5, scope="global")
    fit(net(), first, last)
    assert first.history == last.history and set(last.history.layers) > set(runs.WIDTHS)
    assert {"prune/flops_kept", "prune/nonzero_kept"} <= set(last.history.left)
    assert len(last.history.weights) == 4 and capsys.readouterr().out.count("Kept:") == 2


def test_a_resumed_run_has_the_whole_history(tmp_path):
    """A run that stops and goes on in a new process has the history of one that never stopped."""

    def made():
        return FilterL1Pruning(0.5, schedule=Linear(1, 3))

    whole, save = made(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(net(dropout=0.0), whole, save, val=True, max_epochs=5, enable_checkpointing=True)
    resumed = made()
    fit(net(seed=3, dropout=0.0), resumed, val=True, max_epochs=5, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.history == whole.history and len(stages(whole.history)) == 4


def test_a_second_fit_has_its_own_moments():
    """Another training of the same model counts from the start, and so does its history; widths are of the first."""
    module, callback = net(), FilterL1Pruning(0.5)
    fit(module, callback, val=True)
    fit(module, callback, val=True)
    steps = [moment.step for moment in callback.history.moments]
    assert steps == sorted(steps) and steps[0] == 0
    assert callback.history.layers["first"].before.width == 8


def test_a_cut_that_a_guard_takes_back_is_told_as_such():
    """What is left rises again in the history, when the guard judges as training ends, too."""
    callback = FilterL1Pruning(0.5, schedule=OneShot(1))
    guard = MetricGuard("val_loss", 0.0, mode="min", patience=1)

    class Worse(runs.Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    fit(net(Worse), callback, guard, val=True, max_epochs=2)
    assert [stage.left["prune/params_kept"] == 1.0 for stage in stages(callback.history)] == [True, False, True]


def test_a_cut_after_the_last_step_is_told_and_logged(tmp_path):
    """Where weights leave after training, report and logger say what is left then."""
    callback = OBSOneShot(0.5, batches=2, scope="global")
    fit(net(), callback, val=True, logger=logged(tmp_path))
    assert [stage.left["prune/weight_sparsity"] for stage in stages(callback.history)] == [0.0, 0.5]
    rows = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    assert dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))["prune/weight_sparsity"] == "0.5"


def test_histories_survive_json(tmp_path):
    """A file says what the history says, without metrics that are no numbers; another file is refused by its name."""
    history = History("Net", ["a"], "on cpu")
    history.note_left(0, 0, {"prune/flops_kept": 1.0})
    history.note_metrics(0, 4, {"good": 0.5, "bad": math.nan})
    history.to_json(tmp_path / "deep" / "pruning.json")
    found = History.from_json(tmp_path / "deep" / "pruning.json")
    assert found.moments[1].metrics == {"good": 0.5}
    assert found == History.from_plain(json.loads(json.dumps(found.to_plain())))
    (tmp_path / "other.json").write_text('{"model": 3}')
    with pytest.raises(PruningError, match=r"other.json holds no history"):
        History.from_json(tmp_path / "other.json")


def test_names_are_escaped_on_the_page():
    """What comes from the run cannot break the page."""
    history = History("<b>", ["f(x='<i>')"], "on {cpu} [/x]", dense={"<s>": "[/because]"})
    for step, kept in ((0, 1.0), (5, 0.5)):
        history.note_left(0, step, {"prune/flops_kept": kept})
        history.note_metrics(0, step + 1, {"<u> [/mm]": 1.0})
    page = run_page(history, None)
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>", "<s>"))
    assert all(text in page for text in ("&lt;u&gt; [/mm]", "&lt;s&gt;", "[/because]", "on {cpu} [/x]"))


@pytest.mark.parametrize("name", ["err [/mm]", "[bold]", "a:smile:b", "loss $x", "iou [a]/[b]"])
def test_any_name_is_printed_as_it_is(name, capsys, monkeypatch):
    """Brackets, colons and dollar signs in the names of modules and metrics are no markup."""
    monkeypatch.setenv("COLUMNS", "300")
    cost = LayerCost(8, 16, 32), LayerCost(4, 8, 16)
    history = History(layers={name: LayerChange(*cost)}, stopped=name, measured=name)
    for step, kept in ((0, 1.0), (5, 0.5)):
        left = {"prune/flops_kept": kept, "prune/params_kept": kept, "prune/latency_kept": kept}
        history.note_left(0, step, left)
        history.note_metrics(0, step + 1, {name: kept})
    for table in run_tables(history):
        Console().print(table)
    assert capsys.readouterr().out.count(name) == 4  # of the latency, the layer, the metric and what stopped the run
    draw_run(history).canvas.draw()


def test_many_cuts_fit_into_a_terminal():
    """Of many stages a dozen are shown, the first and the last among them, and the table says so."""
    callback = FilterL1Pruning(0.7, schedule=FewUnits(1), example_inputs=runs.IMAGE)
    fit(net(), callback, val=True, max_epochs=10)
    assert len(stages(callback.history)) == callback.member.strategy.units > 12
    (table,) = [table for table in run_tables(callback.history) if str(table.title) == "Pruning steps"]
    assert run_tables(callback.history, whole=True)[1].row_count == len(stages(callback.history))
    assert table.row_count == 12 and f"12 of {callback.member.strategy.units} are shown" in str(str(table.caption))
    assert next(table.columns[1].cells) == "0"


def test_a_metric_that_is_no_loss_is_drawn_first():
    """Among the metrics the picture prefers an accuracy to a loss."""
    history = History()
    history.note_metrics(0, 0, {"val_loss": 1.0, "val_acc": 0.5})
    assert main_metric(history) == "val_acc"


def test_histories_in_checkpoints_load_safely(tmp_path):
    """The history in a checkpoint is plain."""
    save = ModelCheckpoint(tmp_path, save_last=True)
    callback = FilterL1Pruning(0.5)
    fit(net(), callback, save, val=True, enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert History.from_plain(state["history"]) == callback.history


def test_the_headline_sets_what_was_asked_against_what_was_reached(tmp_path, capsys):
    """Of each callback: what it was asked, by whatever target, and what a count finds; on the page and above tables."""
    module = net()
    total = sum(parameter.numel() for parameter in module.parameters())
    prunable = module.first.weight.numel() + module.second.weight.numel()
    callbacks = (
        FilterL1Pruning(0.5, target="params"),
        IterativeMagnitudePruning({"first": 0.5, "second": 0.25}),
    )
    assert prunable < total
    fit(module, *callbacks, val=True, logger=logged(tmp_path))
    units, weights = callbacks[0].history.goals
    left = sum(parameter.numel() for parameter in module.parameters())
    assert (units.callback, units.target, units.asked) == ("FilterL1Pruning", "params", 0.5)
    assert units.reached == pytest.approx(1 - left / total) and units.reached >= 0.5
    sizes = {name: getattr(module, name).weight.numel() for name in ("first", "second")}
    asked = (0.5 * sizes["first"] + 0.25 * sizes["second"]) / sum(sizes.values())
    zeros = sum(int((getattr(module, name).weight == 0).sum()) for name in sizes)
    assert weights.asked == pytest.approx(asked) and weights.reached == pytest.approx(zeros / sum(sizes.values()))
    told = f"asked to prune 50.0% of the parameters, pruned {units.reached:.1%} ({1 - units.reached:.1%} kept)."
    line = f"FilterL1Pruning: {told}"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "run" / "version_0" / "pruning.html").read_text()


def test_the_headline_says_what_the_dense_model_scored():
    """The metric before the first pruning step, at the end, and the difference; or that it is not known."""

    def history(dense, *pruned):
        made = History()
        for step, (kept, value) in enumerate([(1.0, dense), *((0.5, value) for value in pruned)]):
            made.note_left(0, step, {"prune/flops_kept": kept})
            if value is not None:
                made.note_metrics(0, step, {"acc": value})
        return made

    assert headline(history(0.9, 0.8, 0.875)) == ["acc: 0.9 dense, 0.875 pruned, difference -0.025."]
    assert headline(history(0.2, 0.875))[0].endswith("The dense model was still learning when pruning began.")
    assert headline(history(None, 0.8)) == ["acc: 0.8 pruned; the dense model was not validated in this run."]
    taken_back = history(0.9, 0.5)
    taken_back.note_left(0, 2, {"prune/flops_kept": 1.0, "prune/latency_kept": 0.97})
    taken_back.note_metrics(0, 2, {"acc": 0.85})
    for nothing_pruned, value in [(history(0.9), 0.9), (taken_back, 0.85)]:
        assert headline(nothing_pruned) == [f"acc: {value}; nothing of the model is pruned."]


def test_a_step_rolled_back_at_the_end_leaves_the_metric_of_before():
    """The weights are those that were validated before the step, so the headline tells their metric."""
    history = History()
    for step, (kept, value) in enumerate([(1.0, 0.9), (0.6, 0.85), (0.4, 0.3), (0.6, None)]):
        history.note_left(0, step, {"prune/flops_kept": kept})
        if value is not None:
            history.note_metrics(0, step, {"acc": value})
    assert headline(history) == []  # whatever else made it larger again was not validated
    history.decisions.append(Decision(0, 3, False, "acc 0.3"))
    assert headline(history) == ["acc: 0.9 dense, 0.85 pruned, difference -0.05."]


def test_what_a_guard_decided_is_in_the_history(tmp_path):
    """Steps that were kept and steps that were taken back, when and why."""
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 3))
    fit(net(Falling), callback, MetricGuard("score", 0.5, mode="max"), val=True, max_epochs=5, logger=logged(tmp_path))
    found = [(decision.epoch, decision.kept) for decision in callback.history.decisions]
    assert found == [(2, True), (3, False)]
    assert callback.history.decisions[1].why == "score 0, more than 0.5 behind the best, 1"
    assert callback.history.decisions[1].why in (tmp_path / "run" / "version_0" / "pruning.html").read_text()
    values = {moment.step: moment.metrics["score"] for moment in callback.history.moments if moment.metrics}
    marked = {line.get_label(): line.get_xydata().tolist() for line in draw_run(callback.history).axes[0].lines}
    for kept, label in ((True, "guard: step kept"), (False, "guard: rolled back")):
        steps = [decision.step for decision in callback.history.decisions if decision.kept == kept]
        assert marked[label] == [[step, values[step]] for step in steps]


class Falling(runs.Net):
    """Its score falls in epoch 2."""

    def validation_step(self, batch, batch_idx):
        self.log("score", 1.0 if self.current_epoch < 2 else 0.0)


def test_the_history_keeps_the_facts_of_the_run(monkeypatch):
    """Date, versions, seed and time are noted, and equal runs stay equal histories."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    callback = FilterL1Pruning(0.5)
    fit(net(), callback)
    facts = callback.history.facts
    assert facts["seed"] == "7" and facts["torch"] == torch.__version__ and facts["training time"].startswith("0:00")
    dense, now = callback.history.weights_bytes
    assert dense == sum(t.nbytes for t in (*net().parameters(), *net().buffers())) > now


def test_pruning_steps_are_tables_for_papers_and_spreadsheets(tmp_path):
    """CSV and LaTeX hold what was kept and the metric at the end of each stage; names are escaped for LaTeX."""
    callback = FilterL1Pruning(0.5, schedule=Linear(1, 2))
    fit(net(), callback, val=True, logger=logged(tmp_path))
    folder, found = tmp_path / "run" / "version_0", stages(callback.history)
    with open(folder / "pruning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [stage.step for stage in found]
    kept = [stage.left["prune/flops_kept"] for stage in found]
    assert [float(row["FLOPs kept"]) for row in rows] == pytest.approx(kept, abs=1e-4)
    losses = [stage.last["val_loss"] for stage in found]
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(losses, rel=1e-5)
    table = (folder / "pruning.tex").read_text()
    assert r"val\_loss \\" in table and table.count(r" \\") == 1 + len(found)
