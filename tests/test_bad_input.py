"""What `prune_filters` refuses: with an error that says what to do, and the model bit for bit as it was."""

import copy
import math

import pytest
import torch
from torch import nn, optim

from lightning_prune import PruningError, prune_filters, prune_layers, prune_weights
from tests.models import IMAGE, NETS, ROWS


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 2)
    ).double()


def snapshot(model, optimizer):
    return {
        "repr": repr(model),
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "identities": [id(p) for p in model.parameters()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [p.grad.clone() for p in model.parameters()],
        "state": [copy.deepcopy(optimizer.state[p]) for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_same(found, expected):
    if torch.is_tensor(expected):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def assert_refused(error, match, inputs=IMAGE, model=None, **arguments):
    """The call raises the error, and leaves model, gradients, optimizer state and random numbers as they were."""
    model = (model or network()).train()
    optimizer = optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=match):
        prune_filters(model, inputs, **{"optimizer": optimizer} | arguments)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    "amount, match",
    [
        (30.0, r"amount=30.0.*must lie in .* Write 0\.3 to remove 30 %"),
        (-1, r"amount=-1\).*must lie in \[0, 1\)"),
        (1.0, r"amount=1\.0\).*must lie in \[0, 1\)"),
        (-0.1, r"amount=-0\.1\).*must lie in \[0, 1\)"),
        (math.nan, r"amount=nan\).*must lie in \[0, 1\)"),
        (math.inf, r"amount=inf\).*must lie in \[0, 1\)"),
        ({"0": 30.0}, r"amount=\{'0': 30.0\}\).*Write 0\.3"),
    ],
    ids=str,
)
def test_amounts_out_of_range_are_refused(amount, match):
    """An amount is a fraction below one; percent are recognised."""
    assert_refused(ValueError, match, amount=amount)


@pytest.mark.parametrize("amount", [True, "0.3", None, [0.3], {"0": True}, {"0": "half"}], ids=str)
def test_amounts_of_other_types_are_refused(amount):
    """An amount is a number or a mapping of numbers."""
    assert_refused(TypeError, "amount is a fraction or a whole number", amount=amount)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"target": "flop"}, r"target='flop'\): choose one of 'filters', 'params', 'flops'"),
        ({"scope": "local"}, r"scope='local'\): choose one of 'layer', 'global'"),
        ({"criterion": "l3"}, r"criterion='l3'\): choose one of 'l1', 'l2'"),
        ({"round_to": 0}, r"round_to=0\)"),
        ({"round_to": 2.0}, r"round_to=2\.0\)"),
        ({"amount": {"0": 0.5}, "target": "flops"}, "amounts by pattern are of each layer's filters"),
    ],
    ids=str,
)
def test_unknown_words_are_refused(arguments, match):
    """Targets, scopes, criteria and roundings that do not exist are refused with those that do."""
    assert_refused(ValueError, match, **arguments)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("arguments", [{"amount": {"enkoder": 0.5}}, {"ignore": ["enkoder"]}], ids=["amount", "ignore"])
def test_unknown_patterns_are_refused_with_what_is_near(arguments):
    """A pattern that names nothing is refused, with the paths that look like it."""
    assert_refused(ValueError, "enkoder.*names no module.*Near it: encoder", ROWS, Named().double(), **arguments)


def test_patterns_of_what_stays_are_refused():
    """An amount for channels that cannot leave is refused, with the reason why they stay."""
    assert_refused(PruningError, "amount.*'5'.*stay .*reaches the model's output", amount={"5": 0.5})


def test_contradicting_patterns_are_refused():
    """Two amounts for channels that leave together are refused, with the layers that make them."""
    model = NETS["Projection"].build().double()
    match = "'conv2' asks for 0.5 and 'shortcut' for 0.25 of the same channels.*made by conv2, shortcut"
    assert_refused(ValueError, match, model=model, amount={"conv2": 0.5, "shortcut": 0.25})


@pytest.mark.parametrize(
    "how", [{"ignore": ["*"]}, {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()}], ids=str
)
def test_nothing_left_to_prune_is_refused(how):
    """Where every channel stays the error says so and why."""
    assert_refused(PruningError, "Nothing is left to prune in Sequential: every channel stays .*weight: ", **how)


def test_a_model_that_fails_is_refused():
    """A model that does not run on the example inputs is refused with what it raised."""
    assert_refused(PruningError, "does not run on the example inputs in eval mode .RuntimeError: ", inputs=ROWS)
    assert_refused(PruningError, "does not run on the example inputs in eval mode .TypeError: ", inputs={"y": IMAGE})


def test_inputs_of_other_types_are_refused():
    """Example inputs are a tensor, a tuple or a mapping."""
    assert_refused((TypeError, PruningError), "pass a tensor, a tuple of positional inputs or a dict", inputs=3)


@pytest.mark.parametrize("target", ["params", "flops"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_unreachable_budgets_are_refused(target, scope):
    """A budget beyond what can be cut is refused, with the most that can."""
    match = rf"amount=0\.999 of the {target} cannot go: .*\d\d\.\d% would be gone"
    assert_refused(PruningError, match, amount=0.999, target=target, scope=scope)


def test_more_filters_than_can_leave_are_refused():
    """With scope="global" no more filters can be asked for than leave each layer one."""
    assert_refused(
        PruningError, r"amount=0\.99 of the filters cannot go: .*85\.7% would be gone", amount=0.99, scope="global"
    )


@pytest.mark.parametrize(
    "criterion", [lambda w: w.sum(), lambda w: w.sum(0), lambda w: w.abs(), lambda w: w.flatten(1).sum(1)[:-1]],
    ids=["one number", "inputs", "weights", "too few"],
)  # fmt: skip
def test_criteria_of_wrong_shapes_are_refused(criterion):
    """A function that does not give one score per filter is refused, with the layer and both shapes."""
    assert_refused(
        ValueError, r"criterion: for 0\.weight, \(8, 3, 3, 3\), it gave .*one per filter, \(8,\)", criterion=criterion
    )


def test_criteria_that_give_no_tensor_are_refused():
    """A function that gives something else than a tensor is refused."""
    assert_refused(TypeError, "criterion: for 0.weight, it gave float", criterion=lambda w: w.abs().sum().item())


def test_criteria_that_fail_leave_the_model():
    """An exception of the user's function passes through and the model is as it was."""

    def criterion(weight):
        raise KeyError("mine")

    assert_refused(KeyError, "mine", criterion=criterion)


@pytest.mark.parametrize("prune", [prune_filters, prune_layers, prune_weights])
def test_optimizers_of_another_kind_or_model_are_refused(prune):
    """An optimizer that could not follow is refused: a name, or that of a model that was built before."""
    model, other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Linear(4, 2)
    inputs = () if prune is prune_weights else (torch.randn(1, 4),)
    with pytest.raises(TypeError, match="pass an optimizer of torch"):
        prune(model, *inputs, amount=0.5, optimizer="adam")
    with pytest.raises(ValueError, match="SGD trains no parameter of Sequential"):
        prune(model, *inputs, amount=0.5, optimizer=torch.optim.SGD(other.parameters(), 0.1))


def test_models_without_values_are_refused():
    """On the meta device there is nothing to score."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(PruningError, match="has parameters on the meta device"):
        prune_filters(model, torch.randn(1, 4, device="meta"), amount=0.5)


@pytest.mark.parametrize("model", [nn.Linear, torch.zeros(2)], ids=["class", "tensor"])
def test_models_of_other_types_are_refused(model):
    """A class is no model."""
    with pytest.raises(TypeError, match="pass a torch.nn.Module"):
        prune_filters(model, torch.randn(1, 4), amount=0.5)
