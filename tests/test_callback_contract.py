"""What every pruning callback promises, whatever its criterion."""

import copy
import inspect
import io
import math
import pickle
from functools import partial

import pytest
import torch

import lightning_prune
from lightning_prune import Cubic, FilterL1Pruning, FilterPruning, Linear, OneShot, PruningError, TaylorFilterPruning
from tests.runs import (
    IMAGE,
    Depthwise,
    Known,
    Net,
    assert_agrees_with_shapes,
    assert_same_weights,
    fit,
    net,
    weights,
    widths,
)

CALLBACKS = {
    "filter-l1": FilterL1Pruning,
    "taylor-weights": TaylorFilterPruning,
    "taylor-activations": partial(TaylorFilterPruning, form="activations", scope="global"),
    "apoz": partial(FilterPruning, criterion="apoz"),
    "obd": partial(FilterPruning, criterion="obd", batches=1),
    "obs": partial(FilterPruning, criterion="obs", batches=1, repair=True),
    "own": partial(FilterPruning, criterion="tests.runs.largest_weight", recalibrate=1),
}

pytestmark = pytest.mark.parametrize("kind", CALLBACKS.values(), ids=CALLBACKS)


def name_of(kind):
    return getattr(kind, "func", kind).__name__


def arguments_of(callback):
    return {name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters}


def hooks_of(module):
    """Every hook of every module, by the dict that holds it."""
    return [
        (path, name, hook)
        for path, part in module.named_modules()
        for name, hooks in vars(part).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for hook in hooks.values()
    ]


def recipe_hooks(module):
    """The hooks that write and read the recipe of a pruned model, as :func:`hooks_of` names them."""
    kinds = ("_load_state_dict_pre_hooks", "_state_dict_hooks")
    return sorted((path, kind) for path, _ in module.named_modules() for kind in kinds)


def global_hooks():
    found = vars(torch.nn.modules.module)
    return [len(value) for name, value in found.items() if name.startswith("_global") and isinstance(value, dict)]


class Fails(Net):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_list_is_complete(kind):
    """Every exported callback that prunes keeps the contract."""
    exported = [getattr(lightning_prune.callbacks, name) for name in lightning_prune.callbacks.__all__]
    listed = {getattr(kind, "func", kind) for kind in CALLBACKS.values()}
    assert listed == {callback for callback in exported if "round_to" in inspect.signature(callback).parameters}


@pytest.mark.parametrize("after_a_run", [False, True], ids=["new", "after-a-run"])
def test_pickles(kind, after_a_run):
    """A callback comes back from pickle, and from a deep copy, with the same arguments and state."""
    callback = kind(amount=0.25, schedule=Cubic(1, 2))
    if after_a_run:
        fit(net(), callback)
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert arguments_of(other) == arguments_of(callback)
        assert other.state_dict().keys() == callback.state_dict().keys()
        assert other.state_dict()["progress"] == callback.state_dict()["progress"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"amount": 0.5, "target": "flops", "scope": "global", "schedule": Cubic(1, 4, 2), "round_to": 8},
        {"amount": {"a.*": 0.5, "b": 0.0}, "scope": "layer", "ignore": ["c", "d.*"], "schedule": Linear(1, 3)},
        {"amount": 0, "schedule": OneShot(3)},
    ],
    ids=["defaults", "all", "patterns", "nothing"],
)
def test_repr_rebuilds(kind, arguments):
    """The printed form is a call that makes an equal callback."""
    callback = kind(**arguments)
    rebuilt = eval(repr(callback), {name: getattr(lightning_prune, name) for name in lightning_prune.__all__})
    assert arguments_of(rebuilt) == arguments_of(callback)
    assert repr(rebuilt) == repr(callback)


def test_arguments_are_attributes(kind):
    """Each argument is a public attribute of its name, and stays what was given."""
    given = {
        "amount": 0.4,
        "target": "params",
        "scope": "global",
        "schedule": Linear(1, 2),
        "ignore": ["head"],
        "round_to": 2,
        "example_inputs": IMAGE,
        "min_width": 2,
        "max_amount": {"first": 0.7},
        "recalibrate": 2,
    }
    callback = kind(**given)
    fit(net(), callback)
    assert {name: getattr(callback, name) for name in given} == given


@pytest.mark.parametrize(
    "arguments, error, told",
    [
        ({"amount": 30.0}, ValueError, "amount=30.0.*Write 0.3 to remove 30 %"),
        ({"amount": 1.0}, ValueError, r"amount=1.0.*\[0, 1\)"),
        ({"amount": -0.1}, ValueError, "amount=-0.1"),
        ({"amount": math.nan}, ValueError, "amount=nan"),
        ({"amount": True}, TypeError, "amount=True"),
        ({"amount": "0.3"}, TypeError, "amount='0.3'"),
        ({"amount": None}, TypeError, "amount=None"),
        ({"amount": {"first": 1.5}}, ValueError, "'first': 1.5"),
        ({"amount": {"first": "half"}}, TypeError, "'first': 'half'"),
        ({"amount": {"first": 0.5}, "target": "flops"}, ValueError, "target='flops'"),
        ({"target": "speed"}, ValueError, "target='speed'.*'filters', 'params', 'flops', 'latency'"),
        ({"scope": "everywhere"}, ValueError, "scope='everywhere'.*'layer', 'global'"),
        ({"round_to": 0}, ValueError, "round_to=0"),
        ({"round_to": 2.0}, ValueError, "round_to=2.0"),
        ({"round_to": True}, ValueError, "round_to=True"),
        ({"min_width": 0}, ValueError, "min_width=0"),
        ({"min_width": {"first": 1.5}}, ValueError, "min_width=.*1.5"),
        ({"max_amount": 1.5}, ValueError, "max_amount=1.5"),
        ({"max_amount": {"first": -1}}, ValueError, "max_amount=.*-1"),
        ({"recalibrate": -1}, ValueError, "recalibrate=-1"),
        ({"ignore": "head"}, TypeError, r"ignore='head'.*\['head'\]"),
        ({"schedule": 0.5}, TypeError, "schedule=0.5.*OneShot, Linear, Cubic"),
        ({"schedule": Cubic}, TypeError, "schedule="),
        ({"schedule": {"start": 1}}, TypeError, "schedule="),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(kind, arguments, error, told):
    """What no run could make sense of is refused at construction, naming callback, argument and value."""
    with pytest.raises(error, match=told) as raised:
        kind(**arguments)
    assert str(raised.value).startswith(name_of(kind))


@pytest.mark.parametrize("module_kind", [Net, Known])
def test_state_is_plain(kind, module_kind):
    """The state loads with ``weights_only=True``: numbers, strings, lists, dicts and tensors."""
    callback = kind(amount=0.5)
    fit(net(module_kind), callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = kind(amount=0.5)
    other.load_state_dict(loaded)
    assert repr(other.state_dict()) == repr(callback.state_dict())


def test_state_does_not_follow_the_callback(kind):
    """A state that was taken stays as it was while the run goes on."""
    callback = kind(amount=0.5, schedule=Linear(1, 2))
    fit(net(), callback, max_epochs=3)
    state = callback.state_dict()
    before = copy.deepcopy(state)
    other = kind(amount=0.5, schedule=Linear(1, 2))
    other.load_state_dict(state)
    other.member.strategy.state.widths.clear()
    other.member.strategy.state.refused["x"] = "why"
    assert repr(state) == repr(before)


@pytest.mark.parametrize("module_kind", [Net, Known, Depthwise])
def test_names_and_identities_stay(kind, module_kind):
    """Parameters, modules and state dicts keep names and identity; only shapes change."""
    module = net(module_kind)
    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    keys = list(module.state_dict())
    attributes = {path: set(vars(part)) for path, part in modules.items()}
    fit(module, kind(amount=0.5, scope="layer"))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert_agrees_with_shapes(module)
    assert list(module.state_dict()) == keys
    assert list(dict(module.named_modules())) == list(modules)
    for path, part in module.named_modules():
        assert part is modules[path]
        assert set(vars(part)) <= attributes[path] | {"_fabric", "_metric_attributes"}
    for name, parameter in module.named_parameters():
        assert parameter is parameters[name]


def test_optimizer_keeps_its_parameters(kind):
    """The optimizer goes on with the same parameters, and its state has their shapes."""
    module = net()
    trainer = fit(module, kind(amount=0.5, schedule=Linear(1, 2)))
    (optimizer,) = trainer.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    for parameter in module.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


@pytest.mark.parametrize("module_kind", [Net, Known], ids=["first-batch", "example_input_array"])
def test_amount_0_changes_nothing(kind, module_kind):
    """With nothing to remove, a run ends bit for bit where it ends without the callback: the same random numbers."""
    alone, watched = net(module_kind), net(module_kind)
    fit(alone, val=True)
    after = torch.get_rng_state()
    fit(watched, kind(amount=0.0, schedule=Linear(1, 2)), val=True)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_weights(watched, weights(alone))


@pytest.mark.parametrize("module_kind", [Net, Known], ids=["first-batch", "example_input_array"])
def test_a_cut_draws_no_random_numbers(kind, module_kind):
    """A cut takes no random number from the training."""
    drawn = []

    class Watched(module_kind):
        def on_train_batch_start(self, batch, batch_idx):  # comes after that of callbacks
            drawn.append(torch.get_rng_state())

    fit(net(Watched, dropout=0.0), kind(amount=0.0))
    alone = list(drawn)
    drawn.clear()
    fit(net(Watched, dropout=0.0), kind(amount=0.5, schedule=Linear(1, 2)))
    assert len(drawn) == len(alone) and all(map(torch.equal, drawn, alone))


def test_modes_stay(kind):
    """Train mode, frozen parameters and BatchNorm statistics are as they were before a cut."""
    seen = []

    class Watched(Known):
        def on_train_batch_start(self, batch, batch_idx):  # comes after that of callbacks
            if batch_idx == 0:
                seen.append(
                    (
                        [part.training for part in self.modules()],
                        [p.requires_grad for p in self.parameters()],
                        int(self.norm.num_batches_tracked),
                        bool((self.norm.running_mean == 0).all()),
                    )
                )

    module = net(Watched)
    module.drop.eval()
    module.first.weight.requires_grad_(False)
    training, frozen = [part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]
    fit(module, kind(amount=0.5, schedule=Linear(1, 2)), max_epochs=3)
    assert seen == [(training, frozen, 4 * epoch, epoch == 0) for epoch in range(3)]


@pytest.mark.parametrize("module_kind", [Net, Known, Depthwise])
def test_no_hooks_stay(kind, module_kind):
    """After a run nothing hangs on the model but, if it was cut, what writes its recipe into its state dicts."""
    everywhere = global_hooks()
    module = net(module_kind)
    fit(module, kind(amount=0.0))
    assert hooks_of(module) == []
    callback = kind(amount=0.5)
    fit(module, callback)
    fit(module, callback)
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == recipe_hooks(module)
    assert global_hooks() == everywhere


@pytest.mark.parametrize("amount", [0.0, 0.5], ids=["whole", "cut"])
def test_no_hooks_stay_after_an_exception(kind, amount):
    """When training fails, no more hangs on the model than after a run that ends well."""
    everywhere = global_hooks()
    module = net(Fails)
    with pytest.raises(ZeroDivisionError):
        fit(module, kind(amount=amount, schedule=Linear(1, 2)))
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == (recipe_hooks(module) if amount else [])
    assert global_hooks() == everywhere
    assert_agrees_with_shapes(module)


def test_a_refused_run_leaves_nothing(kind):
    """A run that is refused leaves the model bit for bit as it was, and nothing on it."""
    module = net()
    before = weights(module)
    with pytest.raises(PruningError):
        fit(module, kind(amount=0.99, target="params", ignore=["first", "second"]))
    assert hooks_of(module) == []
    assert_same_weights(module, before)
    assert all(part.training for part in module.modules())


def test_pruned_model_pickles(kind):
    """A pruned model survives pickle and a deep copy, and both go on writing recipes."""
    module = net(Depthwise)
    fit(module, kind(amount=0.5))
    module.trainer = None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_weights(other, weights(module))
        assert str(other.state_dict()._metadata) == str(module.state_dict()._metadata)
