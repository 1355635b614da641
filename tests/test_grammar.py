"""One grammar of arguments: the table in the documentation holds for every function and callback that prunes."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn.utils import prune as torch_prune

from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    LayerPruning,
    Linear,
    OBSOneShot,
    OneShot,
    TaylorFilterPruning,
    prune_filters,
    prune_layers,
    prune_obs,
    prune_weights,
    sensitivity,
)
from lightning_prune.algorithms.schedules import FewUnits
from lightning_prune.analysis.criterion_comparison import compare_criteria
from lightning_prune.analysis.weight_sensitivity import weight_sensitivity
from lightning_prune.callbacks import ExpertPruning
from lightning_prune.callbacks.validation import trainer_sensitivity, trainer_weight_sensitivity
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.exact import prune_exact
from lightning_prune.pruning.experts import prune_experts
from lightning_prune.pruning.fisher import prune_fisher
from lightning_prune.pruning.report_types import Report, WeightReport
from tests.runs import IMAGE, Known, assert_same_weights, fit, net, weights

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "arguments.md"
UNITS = [
    prune_filters,
    sensitivity,
    trainer_sensitivity,
    compare_criteria,
    FilterL1Pruning,
    FilterPruning,
    TaylorFilterPruning,
]
WEIGHTS = [
    prune_weights,
    prune_obs,
    prune_fisher,
    prune_exact,
    weight_sensitivity,
    trainer_weight_sensitivity,
    IterativeMagnitudePruning,
    OBSOneShot,
]
LAYERS = [prune_layers, LayerPruning]
EXPERTS = [prune_experts, ExpertPruning]
EVERYTHING = [*UNITS, *WEIGHTS, *LAYERS, *EXPERTS]
KINDS = {"units": UNITS, "weights": WEIGHTS, "layers": LAYERS, "experts": EXPERTS}
# One small net, pruned to the end: there is no layer by itself, and 1.0 means until a limit is met.
OF_THEIR_OWN = {(prune_exact, "amount"), (prune_exact, "loss"), (prune_fisher, "amount")}
BY_POSITION = {"model", "example_inputs", "amount"}


def table():
    """Read the rows of the page: argument, where it counts, default and meaning."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (?:`(.+?)`)? ?\| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return [(name, where, default, meaning.replace("`", "")) for name, where, default, meaning in rows]


TABLE = table()


def rows_of(subject):
    """Return the rows that hold for a function or callback, by argument."""
    kinds = {
        "all",
        next(kind for kind, those in KINDS.items() if subject in those),
        "callbacks" if inspect.isclass(subject) else "functions",
    }
    return {name: (default, meaning) for name, where, default, meaning in TABLE if where in kinds}


def documented(subject):
    """Return what the docstring says of each argument, on one line."""
    lines = inspect.getdoc(subject).split("\nArgs:\n")[1].split("\n\n")[0].splitlines()
    found, name = {}, ""
    for line in lines:
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, line = start.groups()
        found[name] = f"{found.get(name, '')} {line.strip()}".strip().replace("`", "")
    return found


@pytest.mark.parametrize("subject", EVERYTHING, ids=lambda subject: subject.__name__)
def test_arguments_stand_in_one_order(subject):
    """Every shared argument is where the table has it, and by keyword only behind model, inputs and amount."""
    parameters = inspect.signature(subject).parameters
    order = list(rows_of(subject))
    shared = [name for name in parameters if name in order]
    assert shared == sorted(shared, key=order.index)
    for name in shared:
        kind = parameters[name].kind
        if name not in BY_POSITION:
            assert kind is inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize("subject", EVERYTHING, ids=lambda subject: subject.__name__)
def test_arguments_have_one_default_and_one_meaning(subject):
    """Defaults are those of the table, unless required, and docstrings begin with its sentences."""
    said = documented(subject)
    for name, parameter in inspect.signature(subject).parameters.items():
        if name not in rows_of(subject) or (subject, name) in OF_THEIR_OWN:
            continue
        default, meaning = rows_of(subject)[name]
        if default and parameter.default is not inspect.Parameter.empty and name != "example_inputs":
            assert parameter.default == ast.literal_eval(default), name
        assert said[name].startswith(meaning), name


def test_every_argument_of_several_is_in_the_table():
    """What two functions or callbacks share is in the table, but for what measuring sensitivity is about."""
    of_sensitivity = {"evaluate", "shares", "metric", "mode", "done", "path", "trainer", "data", "dtype", "solver"}
    counts = {}
    for subject in EVERYTHING:
        for name in inspect.signature(subject).parameters:
            counts[name] = counts.get(name, 0) + 1
    several = {name for name, count in counts.items() if count > 1} - of_sensitivity
    assert several == {name for name, *_ in TABLE if counts[name] > 1}


def test_reports_share_their_fields():
    """A report of weights has the fields of a report of units, and one more for what only its method knows."""
    assert {field.name for field in fields(WeightReport)} - {"details"} <= {field.name for field in fields(Report)}


# One rounding rule


def mlp():
    return nn.Sequential(nn.Linear(5, 35), nn.ReLU(), nn.Linear(35, 7, bias=False), nn.ReLU(), nn.Linear(7, 1))


X = torch.randn(40, 5)


def loss(model, batch):
    return model(batch).square().mean()


def zeros(model, path):
    return int((model.get_submodule(path).weight == 0).sum())


@pytest.mark.parametrize("amount", [0.5, {"0": 0.5}, {"0": 0.5, "2": 0.0}], ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_half_of_35_units_are_18(amount, scope):
    """Of 35 neurons half are 18, layer by layer under any scope, by weights or by obs."""
    if amount == 0.5 and scope == "global":
        return
    for more in ({}, {"criterion": "obs", "batches": [X]}):
        model = mlp()
        prune_filters(model, X[:1], amount, scope=scope, progress=False, **more)
        assert model[0].out_features == 35 - 18


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_half_of_245_weights_are_123(scope):
    """Of 245 weights half are 123, whichever function zeroes them, layer by layer under any scope."""
    calls = {
        "magnitude": lambda model, amount: prune_weights(model, amount, scope=scope),
        "obs": lambda model, amount: prune_obs(model, amount, scope=scope, batches=[X], progress=False),
    }
    for call in calls.values():
        model = mlp()
        call(model, {"2": 0.5})
        assert (zeros(model, "2"), zeros(model, "0")) == (123, 0)
    for call in calls.values():
        model = mlp()
        call(model, 0.5)
        whole = [zeros(model, path) for path in ("0", "2", "4")]
        assert sum(whole) == (88 + 123 + 4 if scope == "layer" else 214)  # of 175, 245 and 7, or of 427
    model = mlp()
    prune_fisher(model, 0.5, batches=[X], loss=loss, parameters=["2"], progress=False)
    assert zeros(model, "2") == 123


@pytest.mark.parametrize("amount", [0.5, {"hidden": 0.5}], ids=str)
def test_callbacks_round_alike(amount):
    """In a run the numbers are those of the functions: half of 5 neurons are 3, half of 5 * 12 weights 30."""
    module = net(Known)
    width = module.hidden.out_features
    fit(module, FilterL1Pruning(amount, schedule=OneShot(0)), max_epochs=1)
    assert module.hidden.out_features == width - -(-width // 2)
    for callback in (IterativeMagnitudePruning(amount), OBSOneShot(amount)):
        module = net(Known)
        size = module.hidden.weight.numel()
        fit(module, callback, max_epochs=1)
        assert zeros(module, "hidden") == -(-size // 2)


def test_a_fraction_never_removes_all():
    """One weight of a layer is kept under every fraction below 1."""
    model = nn.Linear(2, 2)
    prune_weights(model, 0.99)
    assert zeros(nn.Sequential(model), "0") == 3


# Whole numbers


def every_call(amount):
    """Every function and callback that takes an amount of units or weights, given this one."""
    return [
        lambda: prune_filters(mlp(), X, amount),
        lambda: prune_weights(mlp(), amount),
        lambda: prune_obs(mlp(), amount, batches=[X]),
        lambda: prune_fisher(mlp(), amount, batches=[X], loss=loss),
        lambda: FilterL1Pruning(amount),
        lambda: FilterPruning(amount),
        lambda: TaylorFilterPruning(amount),
        lambda: IterativeMagnitudePruning(amount),
        lambda: OBSOneShot(amount),
        lambda: LayerPruning(amount),
        lambda: ExpertPruning(amount),
    ]


@pytest.mark.parametrize("amount", [1.0, 30.0, 2.5, -3])
def test_amounts_that_are_neither_are_refused_alike(amount):
    """No function or callback takes a float from 1, or a number below 0; what to write is said."""
    for call in every_call(amount):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\), or a whole number from 1\.") as refused:
            call()
        assert ("Write 0.3 to remove 30 %, or 30 without a point" in str(refused.value)) == (amount == 30.0)
        assert ("or 1 without a point" in str(refused.value)) == (amount == 1.0)


def test_truth_is_no_amount():
    """True, which is an int to Python, is refused."""
    for call in every_call(True):
        with pytest.raises(TypeError, match="is a fraction or a whole number"):
            call()


def torch_zeros(model, count, scope):
    """What torch.nn.utils.prune, which takes whole numbers too, sets to zero of the weights of all layers."""
    layers = [(model[place], "weight") for place in (0, 2, 4)]
    if scope == "global":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=count)
    else:
        for layer, name in layers:
            torch_prune.l1_unstructured(layer, name, amount=count)
    return [layer.weight == 0 for layer, _ in layers]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whole_numbers_of_weights_are_those_of_torch(count, scope):
    """The very weights that torch prunes, given the same whole number, are zeroed: of each layer, or of all."""
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    report = prune_weights(model, count, scope=scope)
    expected = torch_zeros(twin, count, scope)
    found = [model[place].weight == 0 for place in (0, 2, 4)]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert (report.asked, report.reached) == pytest.approx((count * (3 if scope == "layer" else 1) / 427,) * 2)


def test_whole_numbers_of_weights_by_other_methods():
    """By obs, by Fisher, by pattern and in the exact search so many weights are zero."""
    for scope, expected in (("layer", [6, 6, 6]), ("global", [6])):
        model = mlp()
        prune_obs(model, 6, scope=scope, batches=[X], progress=False)
        found = [zeros(model, path) for path in ("0", "2", "4")]
        assert sum(found) == sum(expected) and (scope == "global" or found == expected)
    model = mlp()
    prune_fisher(model, 11, batches=[X], loss=loss, progress=False)
    assert sum(zeros(model, path) for path in ("0", "2", "4")) == 11
    for call in (
        lambda model: prune_weights(model, {"0": 9, "2": 0.5}),
        lambda model: prune_obs(model, {"0": 9, "2": 0.5}, batches=[X], progress=False),
    ):
        model = mlp()
        call(model)
        assert [zeros(model, path) for path in ("0", "2", "4")] == [9, 123, 0]
    model = nn.Linear(4, 2)
    batches = [(torch.randn(30, 4), torch.randn(30, 2))]
    assert len(prune_exact(model, 3, batches=batches, loss=nn.functional.mse_loss).details.removals) == 3


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whole_numbers_of_units(count, scope):
    """So many neurons leave every layer, or all layers together: those with the lowest scores."""
    for more in ({}, {"criterion": "obs", "batches": [X]}):
        model = mlp()
        model[2].weight.data.abs_().add_(1)  # of all layers together, those of the first leave
        report = prune_filters(model, X[:1], count, scope=scope, progress=False, **more)
        widths = [model[0].out_features, model[2].out_features]
        assert 42 - sum(widths) == count * (2 if scope == "layer" else 1)
        assert scope == "global" or widths == [35 - count, 7 - count]
        assert (report.asked, report.reached) == pytest.approx(((42 - sum(widths)) / 42,) * 2)
    model = mlp()
    prune_filters(model, X[:1], {"0": count, "2": 0.5}, scope=scope)
    assert [model[0].out_features, model[2].out_features] == [35 - count, 3]


def test_whole_numbers_that_leave_nothing_are_refused():
    """A number as large as a layer is refused with the layers; the model is unchanged."""
    model = mlp()
    before = [parameter.clone() for parameter in model.parameters()]
    for call, told in (
        (lambda: prune_filters(model, X[:1], 7), r"amount=7 leaves nothing where there are 7 units of \S+\. Ask"),
        (lambda: prune_filters(model, X[:1], 42, scope="global"), "there are 42 units"),
        (lambda: prune_filters(model, X[:1], {"2": 8}), "there are 7 units"),
        (lambda: prune_weights(model, 7), "there are 7 weights of 4.weight"),
        (lambda: prune_weights(model, 427, scope="global"), "there are 427 weights"),
        (lambda: prune_obs(model, {"4": 7}, batches=[X], progress=False), "7 weights of 4.weight"),
        (lambda: prune_fisher(model, 427, batches=[X], loss=loss, progress=False), "there are 427 weights"),
    ):
        with pytest.raises(PruningError, match=told):
            call()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    for target in ("params", "flops", "latency"):
        with pytest.raises(ValueError, match="a whole number counts filters"):
            prune_filters(model, X, 3, target=target)
        with pytest.raises(ValueError, match="a whole number counts filters"):
            FilterPruning(3, target=target)


RUN = {"max_epochs": 4}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("schedule", [OneShot(0), Linear(0, 3), Cubic(0, 3), FewUnits(2, by="epochs")], ids=str)
def test_whole_numbers_of_units_in_a_run(schedule, scope):
    """Whatever the schedule, so many have left at its end: 3 of each of three layers, or 3 in all."""
    module = net(Known)
    done = fit(module, FilterL1Pruning(3, scope=scope, schedule=schedule), **{**RUN, "max_epochs": 6})
    left = module.first.out_channels, module.second.out_channels, module.hidden.out_features
    assert sum(left) == 24 - (9 if scope == "layer" else 3) and (scope == "global" or left == (5, 3, 7))
    assert done.callback_metrics["prune/sparsity"] == pytest.approx(1 - sum(left) / 24)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whole_numbers_of_weights_in_a_run(scope):
    """Weights reach the number step by step, and a linear schedule has half of it half-way."""
    counts = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(sum(zeros(pl_module, name) for name in ("first", "second", "hidden", "head")))

    module = net(Known)
    pruning = IterativeMagnitudePruning(8, scope=scope, schedule=Linear(0, 3))
    fit(module, pruning, Count(), **RUN)
    whole = 32 if scope == "layer" else 8
    assert counts == [whole // 4, whole // 2, whole * 3 // 4, whole]
    module = net(Known)
    fit(module, OBSOneShot(8, scope=scope, batches=1), **RUN)
    assert sum(zeros(module, name) for name in ("first", "second", "hidden", "head")) == whole


@pytest.mark.parametrize("make", [FilterL1Pruning, IterativeMagnitudePruning], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whole_numbers_resume(make, scope, tmp_path):
    """A run that is stopped half-way and resumed ends with the same weights as one that is not stopped."""

    def pruning():
        return make(5, scope=scope, schedule=Linear(0, 3))

    whole, again = net(Known, dropout=0.0), net(Known, dropout=0.0)
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, pruning(), saved, enable_checkpointing=True, **RUN)
    fit(again, pruning(), ckpt_path=tmp_path / "epoch=1.ckpt", **RUN)
    assert_same_weights(again, weights(whole))


def test_a_whole_number_of_layers():
    """``prune_layers`` and ``LayerPruning`` remove so many layers, at once or step by step."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return x + self.out(self.hidden(x).relu())

    class Deep(Known):
        def __init__(self):
            super().__init__()
            self.deep = nn.Sequential(nn.Linear(3, 4), Block(), Block(), Block(), Block(), nn.Linear(4, 3))

        def forward(self, images):
            return self.deep(super().forward(images))

    report = prune_layers(Deep().deep, torch.randn(8, 3), 3, progress=False)
    assert len(report.removed) == 3 and report.asked == report.reached == 0.75
    module = net(Deep)
    done = fit(module, LayerPruning(3, module="deep", schedule=Linear(0, 2)), **RUN)
    assert sum(isinstance(layer, Block) for layer in module.deep) == 1
    assert done.callback_metrics["prune/sparsity"] == 0.75
    with pytest.raises(PruningError, match="amount=4 leaves nothing where there are 4 layers"):
        prune_layers(Deep().deep, torch.randn(8, 3), 4)


# Modules instead of paths


def test_modules_are_named_by_themselves():
    """A module of the model does what its path does, in every argument that names parts of the model."""
    one, two = mlp(), mlp()
    two.load_state_dict(one.state_dict())
    found = [
        prune_filters(one, X, {one[0]: 0.5, one[2]: 0.3}, min_width={one[0]: 20}, max_amount={one[2]: 0.2}),
        prune_filters(two, X, {"0": 0.5, "2": 0.3}, min_width={"0": 20}, max_amount={"2": 0.2}),
    ]
    assert found[0].groups == found[1].groups
    prune_filters(one, X, 0.5, ignore=[one[0]])
    prune_filters(two, X, 0.5, ignore=["0"])
    prune_weights(one, 0.5, parameters=[(one[0], "bias"), one[2]])
    prune_weights(two, 0.5, parameters=["0.bias", "2"])
    prune_weights(one, {one[4]: 0.5}, ignore=[one[0]])
    prune_weights(two, {"4": 0.5}, ignore=["0"])
    prune_obs(one, 0.7, batches=[X], ignore=[one[2]], parameters=[one[0], one[2]], progress=False)
    prune_obs(two, 0.7, batches=[X], ignore=["2"], parameters=["0", "2"], progress=False)
    assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items() if "." in name)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"ignore": [nn.Linear(2, 2)]}, "ignore: this Linear is not part of the Sequential"),
        ({"min_width": {nn.Linear(2, 2): 3}}, "min_width: this Linear is not part of"),
        ({"amount": {nn.Linear(2, 2): 0.5}}, "amount: this Linear is not part of"),
    ],
)
def test_foreign_modules_are_refused(given, told):
    """A module that is not part of the model, such as one of its copies, is refused."""
    with pytest.raises(ValueError, match=told):
        prune_filters(mlp(), X, **given)
    model = mlp()
    with pytest.raises(ValueError, match="ignore: this Sequential is the whole model"):
        prune_filters(model, X, ignore=[model])


def test_one_module_is_no_list():
    """A single pattern or module where a list is expected is refused: its letters, or children, are not meant."""
    model = mlp()
    for ignore in ("0", model):
        with pytest.raises(TypeError, match="pass a list of patterns"):
            prune_filters(model, X, ignore=ignore)
        with pytest.raises(TypeError, match="pass a list of patterns"):
            prune_weights(model, ignore=ignore)


def test_callbacks_take_modules():
    """Callbacks find modules inside the LightningModule that they prune."""
    module = net(Known)
    width = module.second.out_channels
    fit(module, FilterL1Pruning({module.first: 0.5}, ignore=[module.second], example_inputs=IMAGE), max_epochs=1)
    assert module.second.out_channels == width
    module = net(Known)
    fit(module, IterativeMagnitudePruning(parameters=[(module.hidden, "weight")]), max_epochs=1)
    assert zeros(module, "hidden") == -(-module.hidden.weight.numel() // 2)
    assert zeros(module, "second") == 0


# A part of the model


class Two(nn.Module):
    """Two networks, the second on the outputs of the first."""

    def __init__(self):
        super().__init__()
        self.net, self.other = mlp(), nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x):
        return self.other(self.net(x))


@pytest.mark.parametrize("target", ["filters", "params", "flops"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_part_is_pruned_as_if_it_were_alone(target, scope):
    """Units and counts of a part are those of the part by itself; what lies outside, or is tied to it, is kept."""
    whole, alone = Two(), mlp()
    alone.load_state_dict(whole.net.state_dict())
    reports = [prune_filters(whole, X[:1], 0.4, target=target, scope=scope, module=part) for part in ("net",)]
    expected = prune_filters(alone, X[:1], 0.4, target=target, scope=scope)
    found = reports[0]
    assert [width[1:] for width in found.groups] == [width[1:] for width in expected.groups]
    assert (found.params_before, found.params_after) == (expected.params_before, expected.params_after)
    assert (found.flops_before, found.flops_after) == (expected.flops_before, expected.flops_after)
    assert found.reached == pytest.approx(expected.reached)
    assert whole.other[0].out_features == 40
    assert all(torch.equal(one, two) for one, two in zip(whole.net.parameters(), alone.parameters(), strict=True))


def test_what_is_tied_to_the_outside_of_a_part_is_kept():
    """A channel group that reaches beyond the part stays, with the reason."""
    model = mlp()
    report = prune_filters(model, X[:1], 0.5, module=["2", model[3], "4"])
    assert (model[0].out_features, model[2].out_features) == (35, 3)
    reasons = {pin.tensor: pin.reason for pin in report.pinned}
    assert reasons["0.weight"] == "it is tied to 0.weight, which is outside of module="


def test_weights_of_a_part():
    """Half of the weights of a part are zero, across its layers, and none outside."""
    for call in (
        lambda model: prune_weights(model, 0.5, scope="global", module="net"),
        lambda model: prune_weights(model, 0.5, scope="global", module=model.net),
        lambda model: prune_obs(model, 0.5, scope="global", batches=[X], module=["net"], progress=False),
    ):
        model = Two()
        report = call(model)
        assert sum(zeros(model, f"net.{path}") for path in (0, 2, 4)) == 214 and report.reached == 214 / 427
        assert not zeros(model, "other.0") and not zeros(model, "other.2")


@pytest.mark.parametrize("given, told", [
    ("nets", "names no module of Two.* net"), (mlp(), "module: this Sequential is not part"), ([], "names no part"),
])  # fmt: skip
def test_parts_that_are_none_are_refused(given, told):
    """Unknown paths, foreign modules and empty lists are refused alike."""
    for call in (
        lambda: prune_filters(Two(), X, module=given),
        lambda: prune_weights(Two(), module=given),
        lambda: prune_obs(Two(), batches=[X], module=given),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    with pytest.raises(ValueError, match="latency is measured of the whole"):
        prune_filters(Two(), X, module="net", target="latency")
    with pytest.raises(TypeError, match="pass the path of a module"):
        FilterL1Pruning(module=3)


class Pair(Known):
    """The network of the runs as a part of another."""

    def __init__(self):
        super().__init__()
        self.net, self.wide = Known(), nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 3))

    def forward(self, images):
        return super().forward(images) + self.wide(self.net(images))


@pytest.mark.parametrize(
    "make",
    [FilterL1Pruning, FilterPruning, TaylorFilterPruning, IterativeMagnitudePruning, OBSOneShot],
    ids=lambda kind: kind.__name__,
)
def test_callbacks_prune_a_part(make):
    """A callback prunes the part that is named, by half of its own widths or weights, and logs the part's share."""
    module = net(Pair)
    done = fit(module, make(0.5, module="net"), max_epochs=2)
    assert module.first.out_channels == 8 and not zeros(module, "first")
    assert not zeros(module, "wide.0") and module.wide[0].out_features == 50
    if make in (IterativeMagnitudePruning, OBSOneShot):
        assert zeros(module, "net.first") == module.net.first.weight.numel() // 2
        return
    assert (module.net.first.out_channels, module.net.hidden.out_features) == (4, 5)
    dense, slim = (sum(p.numel() for p in part.parameters()) for part in (Known(), module.net))
    assert done.callback_metrics["prune/params_kept"] == pytest.approx(slim / dense)
