"""Each group is cut alone, really, and put back to the last bit; what was found becomes files, pictures, amounts."""

import copy
import io
import random
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import nn

from lightning_prune import FilterL1Pruning, PruningError, prune_filters, sensitivity
from lightning_prune.analysis.sensitivity_findings import GroupSensitivity, Sensitivity
from lightning_prune.callbacks.validation import trainer_sensitivity
from lightning_prune.reports import draw_sensitivity, sensitivity_table
from lightning_prune.structure import find_structure, named_tensors, trace
from lightning_prune.surgery import draft, temporarily_cut
from tests import runs
from tests.models import NETS

CUTTABLE = [name for name, net in NETS.items() if net.groups]
SHARES = (0.2, 0.5, 0.7)


def built(name):
    return NETS[name].build().double()


def snapshot(model):
    """Everything that a cut could touch: objects, storages, values, gradients, attributes and modes."""
    tensors = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        place = id(tensor), tensor.data_ptr(), tensor.stride(), tensor.requires_grad, id(tensor.grad)
        tensors[name] = place, tensor.detach().clone(), None if tensor.grad is None else tensor.grad.clone()
    attributes = {
        path: {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)}
        for path, module in model.named_modules()
    }
    return tensors, attributes


def assert_untouched(model, before):
    tensors, attributes = snapshot(model)
    assert attributes == before[1]
    assert tensors.keys() == before[0].keys()
    for name, (place, value, gradient) in tensors.items():
        was_at, was, gradient_was = before[0][name]
        assert place == was_at, name
        torch.testing.assert_close(value, was, rtol=0, atol=0, equal_nan=True)
        assert (gradient is None) == (gradient_was is None)
        assert gradient is None or torch.equal(gradient, gradient_was), name


def with_gradients(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


def half_cut(model, inputs):
    """A cut of half of every group, and its tensors."""
    structure = find_structure(trace(model, inputs))
    keep = {name: np.arange(group.width) % 2 == 0 for name, group in structure.groups.items()}
    cut = draft(model, structure, keep)
    return cut, cut.tensors(model)


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_temporary_cut_is_the_real_one_and_is_taken_back_exactly(name):
    """In the body shapes and attributes are the slim ones; afterwards every object, storage and value is the old."""
    model = with_gradients(built(name))
    before = snapshot(model)
    cut, tensors = half_cut(model, NETS[name].inputs)
    with temporarily_cut(model, cut, tensors):
        own = named_tensors(model)
        assert {name: tuple(own[name].shape) for name in cut.shapes} == cut.shapes
        assert all(getattr(model.get_submodule(a.module), a.name) == a.new for a in cut.attributes)
        assert all(
            isinstance(p, nn.Parameter)
            for module in model.modules()
            for p in module._parameters.values()
            if p is not None
        )
    assert_untouched(model, before)


def test_a_temporary_cut_is_taken_back_when_the_body_raises():
    """An error in the body passes, and the model is whole."""
    model = with_gradients(built("plain"))
    before = snapshot(model)
    cut, tensors = half_cut(model, NETS["plain"].inputs)
    with pytest.raises(KeyboardInterrupt), temporarily_cut(model, cut, tensors):
        raise KeyboardInterrupt
    assert_untouched(model, before)


def squares(inputs):
    """A metric that any model has."""

    def evaluate(model):
        with torch.no_grad():
            return float(model(inputs).square().mean())

    return evaluate


@pytest.mark.parametrize("name", ["plain", "mlp", "flatten", "Projection", "Padded"])
def test_values_equal_those_of_copies_that_are_pruned(name):
    """The metric of each group and share is that of a copy pruned for good, by that share of that group alone."""
    net = NETS[name]
    model, evaluate = built(name).eval(), squares(net.inputs)
    found = sensitivity(model, net.inputs, evaluate, shares=SHARES, progress=False)
    assert [(group.name, group.width) for group in found.groups] == list(net.groups.items())
    assert found.dense == evaluate(model)
    for group in found.groups:
        expected = {}
        for share in SHARES:
            pruned = copy.deepcopy(model)
            report = prune_filters(pruned, net.inputs, amount={group.producers[0]: share})
            left = next(width.after for width in report.groups if width.name == group.name)
            expected[1 - left / group.width] = evaluate(pruned)
        assert group.shares == pytest.approx(tuple(expected), abs=1e-12)
        assert group.values == pytest.approx(tuple(expected.values()), rel=1e-12)


@pytest.mark.parametrize("name", ["plain", "mlp", "Padded"])
def test_the_model_is_untouched(name):
    """Parameters, gradients, BatchNorm statistics, modes and random states are as before, whatever evaluate does."""
    model = with_gradients(built(name))
    model.train()
    next(model.children()).eval()
    before, chance = snapshot(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def evaluate(model):
        model.train()
        return float(model(NETS[name].inputs).sum()) + torch.rand(()).item() + random.random() + np.random.rand()

    sensitivity(model, NETS[name].inputs, evaluate, progress=False)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert random.getstate() == chance[1]
    assert np.array_equal(np.random.get_state()[1], chance[2])


def test_training_goes_on_as_if_nothing_had_been_measured():
    """The next steps of an optimizer with momentum equal those of a twin that was not measured."""
    models = [built("mlp")]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for step in range(4):
            torch.manual_seed(step)
            loss = model(torch.randn(8, 6, dtype=torch.float64)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            if model is models[0]:
                sensitivity(model, NETS["mlp"].inputs, squares(NETS["mlp"].inputs), shares=(0.5,), progress=False)
            optimizer.step()
    runs.assert_same_weights(models[0], models[1].state_dict())


def test_every_evaluation_meets_the_same_chance():
    """What evaluate draws at random is the same each time, so that values differ by the cut alone."""
    model = built("mlp")
    found = sensitivity(
        model, NETS["mlp"].inputs, lambda model: torch.rand(()) + random.random() + np.random.rand(), progress=False
    )
    assert {value for group in found.groups for value in group.values} == {found.dense}


def test_shares_are_those_really_removed():
    """Shares are rounded up to whole units, equal ones are measured once, and one unit stays."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    calls = []
    found = sensitivity(
        model, torch.ones(1, 2), lambda model: calls.append(len(model[0].weight)) or 1.0, progress=False
    )
    assert found.groups[0].shares == (0.25, 0.5, 0.75)
    assert calls == [4, 3, 2, 1]


def test_what_cannot_be_proved_is_skipped_with_its_reason():
    """A group whose cut does not run is named with the reason, and the others are measured."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.fc1(x).relu()
            if self.fc1.out_features < 7:
                raise ValueError("too narrow")
            return self.fc3(self.fc2(x).relu())

    model = Narrow()
    before = snapshot(model)
    x = torch.randn(4, 3)
    found = sensitivity(model, x, squares(x), shares=(0.5,), progress=False)
    assert [group.name for group in found.groups] == ["fc2"]
    assert found.skipped.keys() == {"fc1"}
    assert "too narrow" in found.skipped["fc1"]
    assert_untouched(model, before)
    assert found.amounts(1e9) == {"fc2": 0.5}


# Stopped and continued


def stopping(evaluate, after):
    """Evaluate so many times, then stop."""
    calls = []

    def stop(model):
        calls.append(model)
        if len(calls) > after:
            raise KeyboardInterrupt
        return evaluate(model)

    return stop


def test_a_stopped_analysis_goes_on(tmp_path):
    """The file holds all groups that were finished; continued from it, none is measured again and nothing differs."""
    net, path = NETS["Projection"], tmp_path / "deep" / "found.json"
    model, evaluate = built("Projection"), squares(net.inputs)
    whole = sensitivity(model, net.inputs, evaluate, shares=SHARES, progress=False)
    with pytest.raises(KeyboardInterrupt):  # in the second group
        sensitivity(model, net.inputs, stopping(evaluate, 5), shares=SHARES, path=path, progress=False)
    partial = Sensitivity.from_json(path)
    assert partial.groups == whole.groups[:1]
    left = 1 + sum(len(group.values) for group in whole.groups[1:])  # the whole model is measured again
    again = stopping(evaluate, left)
    assert sensitivity(model, net.inputs, again, shares=SHARES, done=partial, path=path, progress=False) == whole
    assert Sensitivity.from_json(path) == whole
    assert [file.name for file in path.parent.iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"metric": "loss"}, "metric='metric', now it is 'loss'"),
        ({"mode": "min"}, "mode='max', now it is 'min'"),
        ({"criterion": "l2"}, "criterion='l1', now it is 'l2'"),
        ({"shares": (0.4,)}, "asked=\\(0.5,\\), now it is \\(0.4,\\)"),
        ({"evaluate": lambda model: 7.0}, "was 1 and is now 7: the data changed"),
        ({"model": built("plain")}, "weights="),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_question_is_not_continued(change, told):
    """What is done is refused if it is of another model, metric, criterion or data, and the difference is told."""
    given = {"model": built("mlp"), "evaluate": lambda model: 1.0, "shares": (0.5,), "progress": False}

    def ask(model, evaluate, done=None, **arguments):
        inputs = NETS["plain" if isinstance(model[0], nn.Conv2d) else "mlp"].inputs
        return sensitivity(model, inputs, evaluate, done=done, **arguments)

    done = ask(**given)
    with pytest.raises(PruningError, match=told):
        ask(**given | change, done=done)


# Amounts and files


def analysis(*curves, mode="max", dense=0.9, width=10, producers=None):
    """An analysis made by hand: for each group the metric at 10 %, 20 %, ..."""
    tenths = tuple(k / 10 for k in range(1, 10))
    groups = []
    for i, curve in enumerate(curves):
        made = (producers or {}).get(f"layer{i}", (f"layer{i}",))
        groups.append(GroupSensitivity(f"layer{i}", made, width, tenths[: len(curve)], tuple(curve)))
    return Sensitivity("acc", mode, "l1", tenths, "0", dense, tuple(groups), {"odd": "did not run"})


@pytest.mark.parametrize(
    "curve, drop, share",
    [
        ([0.9, 0.88, 0.85, 0.2], 0.05, 0.3),
        ([0.9, 0.7, 0.9, 0.9], 0.05, 0.1),  # a later recovery does not count
        ([0.2, 0.9, 0.9], 0.05, None),
        ([0.95, 0.9, 0.89], 0.0, 0.2),
        ([0.9, float("nan"), 0.9], 0.5, 0.1),
        ([], 0.5, None),
    ],
)
def test_amounts_are_the_largest_shares_within_the_drop(curve, drop, share):
    """A share counts if it and all smaller ones stay within the drop; groups that may lose nothing are left out."""
    assert analysis(curve).amounts(drop) == ({} if share is None else {"layer0": share})


def test_amounts_of_a_metric_where_lower_is_better():
    """With mode min the metric may rise by the drop."""
    assert analysis([0.5, 1.0, 1.2, 0.1], mode="min").amounts(0.1) == {"layer0": 0.2}


def test_a_drop_is_a_number_from_zero():
    """Negative drops and NaN are refused."""
    for drop in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="how much worse"):
            analysis([0.9]).amounts(drop)


def test_amounts_name_groups_by_paths_that_name_no_other():
    """A path that another group has, too, is avoided; where there is no other path, both get the smaller amount."""
    producers = {"layer0": ("shared", "own"), "layer1": ("shared", "mine"), "layer2": ("qkv",), "layer3": ("qkv",)}
    found = analysis([0.9, 0.9], [0.9], [0.9, 0.9, 0.9], [0.9, 0.9], producers=producers)
    assert found.amounts(0.01) == {"own": 0.2, "mine": 0.1, "qkv": 0.2}
    found = analysis([0.9, 0.9], [0.9], producers={"layer0": ("block",), "layer1": ("block.conv",)})
    assert found.amounts(0.01) == {"block": 0.1, "block.conv": 0.1}


def test_pruning_takes_the_amounts():
    """What amounts() gives is what prune_filters and FilterL1Pruning take, and exactly those units leave."""
    model, x = runs.net(runs.Known), torch.randn(4, 2, runs.SIDE, runs.SIDE)
    found = sensitivity(model.eval(), runs.IMAGE, squares(x), mode="min", progress=False)
    amounts = found.amounts(found.dense)
    expected = {g.name: g.width - round(amounts.get(g.name, 0) * g.width) for g in found.groups}
    assert set(expected.values()) != set(runs.WIDTHS.values())
    pruned = copy.deepcopy(model)
    prune_filters(pruned, runs.IMAGE, amount=amounts)
    assert runs.widths(pruned) == expected
    runs.fit(model, FilterL1Pruning(amount=amounts), max_epochs=1)
    assert runs.widths(model) == expected


def test_json_round_trip(tmp_path):
    """What is read equals what was written; another file is refused by name."""
    found = analysis([0.9, 1 / 3], [0.1])
    found.to_json(tmp_path / "found.json")
    assert Sensitivity.from_json(tmp_path / "found.json") == found
    for content in ("{}", "[]", "no json", '{"groups": [{"name": 1}]}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="other.json: no sensitivity analysis"):
            Sensitivity.from_json(tmp_path / "other.json")


def test_yaml_holds_the_amounts(tmp_path):
    """The block reads as amount: {path: share}, also where paths look like numbers; what may not leave is a comment."""
    found = analysis([0.9, 0.9], [0.1], [0.9], producers={"layer0": ("0",), "layer2": ("1.0",)})
    found.to_yaml(tmp_path / "amounts.yaml", drop=0.01)
    assert yaml.safe_load((tmp_path / "amounts.yaml").read_text()) == {"amount": {"0": 0.2, "1.0": 0.1}}
    assert '# "layer1": nothing' in (tmp_path / "amounts.yaml").read_text()
    analysis([0.1]).to_yaml(tmp_path / "none.yaml", drop=0.01)
    assert yaml.safe_load((tmp_path / "none.yaml").read_text()) == {"amount": {}}


# Refusals


@pytest.mark.parametrize(
    "arguments, error, told",
    [
        ({"shares": (0.5, 1.0)}, ValueError, "between 0 and 1"),
        ({"shares": ()}, ValueError, "between 0 and 1"),
        ({"mode": "higher"}, ValueError, "'max' where a higher"),
        ({"criterion": "l3"}, ValueError, "choose one of"),
        ({"criterion": "taylor"}, ValueError, "batches"),
        ({"ignore": ["nothing*"]}, ValueError, "names no module"),
        ({"ignore": ["*"]}, PruningError, "Nothing is left to prune"),
        ({"evaluate": lambda model: {"acc": 1}}, TypeError, "returned dict; it must return the metric, one number"),
        ({"evaluate": lambda model: torch.ones(2)}, TypeError, "returned Tensor; it must return"),
        ({"evaluate": lambda model: float("nan")}, PruningError, "of the whole model is NaN"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, told):
    """What no analysis can be made of fails at once, and says what is allowed."""
    model = built("mlp")
    given = {"evaluate": lambda model: 1.0, "progress": False} | arguments
    with pytest.raises(error, match=told):
        sensitivity(model, NETS["mlp"].inputs, **given)


# With a Trainer


def test_trainer_sensitivity_is_what_validation_says():
    """Values are those that trainer.validate gives for pruned copies; lower is better for what is called a loss."""
    model, data = runs.net(), runs.batches(16)
    found = trainer_sensitivity(
        runs.trainer(limit_val_batches=1), model, data, metric="val_loss", shares=(0.5,), progress=False
    )
    assert found.mode == "min"
    assert [group.name for group in found.groups] == list(runs.WIDTHS)
    for group in found.groups:
        pruned = copy.deepcopy(model)
        prune_filters(pruned, runs.IMAGE, amount={group.name: 0.5})
        trainer = runs.trainer(limit_val_batches=1)
        trainer.validate(pruned, data, verbose=False)
        assert group.values == (float(trainer.callback_metrics["val_loss"]),)


def test_a_trainer_keeps_its_callbacks_and_writes_nothing(tmp_path, capsys):
    """Loggers, progress bar and pruning rest during the analysis, and are back afterwards."""
    pruning, bar, logger = FilterL1Pruning(amount=0.5), TQDMProgressBar(), CSVLogger(tmp_path)
    trainer = runs.trainer(pruning, bar, logger=logger, enable_progress_bar=True, default_root_dir=tmp_path)
    callbacks, model = list(trainer.callbacks), runs.net()
    before = runs.weights(model)
    trainer_sensitivity(trainer, model, runs.batches(16), metric="val_loss", shares=(0.5,), progress=False)
    assert trainer.callbacks == callbacks and trainer.loggers == [logger]
    assert list(tmp_path.rglob("metrics.csv")) == []
    assert "Validation" not in "".join(capsys.readouterr())
    runs.assert_same_weights(model, before)


def test_an_unknown_metric_is_refused_with_those_that_are_logged():
    """Before anything is cut, the names that validation logs are listed, and one that is near."""
    with pytest.raises(PruningError, match="metric='val_los': validation logs val_loss. Did you mean 'val_loss'?"):
        trainer_sensitivity(runs.trainer(), runs.net(), runs.batches(8), metric="val_los", progress=False)


# Pictures and tables


@pytest.mark.parametrize("count, mode", [(1, "max"), (30, "max"), (70, "max"), (5, "min")])
def test_a_picture_is_saved(tmp_path, count, mode):
    """One curve or seventy: a PNG is there, and one curve that falls far does not squeeze the others flat."""
    sign = 1 if mode == "max" else -1
    flat = [[0.9 - sign * 0.001 * i * k for k in range(9)] for i in range(count - 1)]
    found = analysis(*flat, [0.9 - sign * 0.8] * 9, mode=mode)
    draw_sensitivity(found, tmp_path / "deep" / "found.png")
    assert (tmp_path / "deep" / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="lightning-prune\\[plots\\]"):
        draw_sensitivity(analysis([0.9]), tmp_path / "found.png")


def test_the_table_lists_every_group():
    """Groups, what may leave of them, and those that were skipped with the reason."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(sensitivity_table(analysis([0.9, 0.8, 0.1], [0.9, 0.9, 0.9]), drop=0.15))
    text = console.export_text()
    for words in ("layer0", "20%", "layer1", "30%", "skipped: did not run", "higher is better"):
        assert words in text
