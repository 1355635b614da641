"""Layers and filters under one budget: what is tried, what is chosen, and that all of it is made or nothing."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError, load_state_dict_, prune_filters, prune_layers
from lightning_prune.surgery.pass_through import Skipped

WIDTH = 8


class Block(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.down.weight.data.mul_(gain)
        self.down.bias.data.mul_(gain)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def net(gains=(1.0, 1.0, 1.0, 1.0, 1.0)):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), *(Block(gain) for gain in gains), nn.Linear(WIDTH, 3))


BATCHES = [
    (torch.randn(32, 4, generator=torch.Generator().manual_seed(i)), torch.arange(32) % 3) for i in range(2)
]  # fmt: skip
X = BATCHES[0][0]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def without(model, gone):
    return nn.Sequential(*(layer for i, layer in enumerate(copy.deepcopy(model)) if i not in gone))


def blocks_gone(model):
    return {i for i, layer in enumerate(model) if isinstance(layer, Skipped)}


def test_layers_leave_where_they_do_nothing():
    """Where blocks add nothing they make up the budget, and outputs are what they were."""
    model = net([1.0, 1e-6, 1.0, 1e-6, 1.0])
    before = model(X)
    share = sum(p.numel() for p in model[2].parameters()) / sum(p.numel() for p in model.parameters())
    report = prune_filters(model, X, 2 * share - 1e-6, target="params", layers=True, progress=False)
    assert {layer.path for layer in report.removed} == {"2", "4"} and report.proved
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-4)
    assert [tried.layers for tried in report.tried] == [0, 1, 2]


def test_filters_leave_where_every_layer_matters():
    """Where filters repeat each other and blocks do not, filters make up the budget."""
    model = net([4.0] * 5)
    with torch.no_grad():
        for block in model[1:6]:
            block.down.weight[:, 12:] = 0
            block.up.weight[12:] *= 0.01
    before = model(X)
    report = prune_filters(model, X, 0.3, target="params", ignore=["0"], layers=True, progress=False)
    assert not report.removed and not blocks_gone(model)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0.1)


@pytest.mark.parametrize("target", ["params", "flops"])
@pytest.mark.parametrize("given", [{}, {"batches": BATCHES, "loss": loss}], ids=["outputs", "loss"])
def test_the_best_of_what_was_tried_is_made(target, given):
    """The budget is reached, and the loss of what is made is the lowest in the table, measured on the model itself."""
    model = net()
    dense = copy.deepcopy(model)
    report = prune_filters(model, X, 0.45, target=target, layers=True, progress=False, **given)
    params = sum(parameter.numel() for parameter in model.parameters())
    assert report.params_after == params and report.params_before == sum(p.numel() for p in dense.parameters())
    gone = {"params": 1 - params / report.params_before, "flops": 1 - report.flops_after / report.flops_before}[target]
    assert report.reached == pytest.approx(gone) and gone >= 0.45
    assert len(report.removed) == len(blocks_gone(model))
    made = next(tried for tried in report.tried if tried.layers == len(report.removed))
    assert made.lost == min(tried.lost for tried in report.tried)
    assert made.by_layers + made.by_filters == pytest.approx(gone, abs=1e-6)
    with torch.no_grad():
        if given:
            lost = sum(float(loss(model, batch)) for batch in BATCHES) / 2
        else:
            lost = float((model(X) - dense(X)).square().mean())
    assert made.lost == pytest.approx(lost, rel=1e-4)
    for tried in report.tried[1:]:  # what layers alone save, from twins without them
        assert tried.by_layers > 0
    other = copy.deepcopy(dense)
    load_state_dict_(other, model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("amount", [0.1, 0.6])
def test_the_optimizer_goes_on_as_if_the_model_had_been_slim(amount):
    """Its state follows both kinds of units: the next step is that of an optimizer made for a copy."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loss(model, BATCHES[0]).backward()
    optimizer.step()
    arguments = {"batches": BATCHES, "loss": loss, "repair": True, "optimizer": optimizer}
    prune_filters(model, X, amount, target="params", layers=True, progress=False, **arguments)
    assert len(optimizer.state) == len(list(model.parameters()))
    twin = copy.deepcopy(model)
    other = torch.optim.Adam(twin.parameters(), 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, stepping in ((model, optimizer), (twin, other)):
        stepping.zero_grad()
        loss(one, BATCHES[1]).backward()
        stepping.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_layers_may_be_needed(monkeypatch):
    """What filters alone cannot reach is refused for them, and layers make it possible."""
    monkeypatch.setattr("lightning_prune.pruning.filters.time_without", lambda m, x, skips, whole: 1 - 0.2 * len(skips))
    monkeypatch.setattr("lightning_prune.pruning.plan.latency_kept", lambda *_: 1.0)
    model = net()
    report = prune_filters(model, X, 0.4, target="latency", layers=True, progress=False)
    assert len(report.removed) == 2 and report.latency_kept == pytest.approx(0.6)
    assert all(tried.refused for tried in report.tried[:2]) and not report.tried[2].refused


def test_what_fails_changes_nothing(monkeypatch):
    """If the filters cannot be removed once the layers are, the layers are back, with their state and gradients."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loss(model, BATCHES[0]).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr("lightning_prune.pruning.layers_and_filters.close_gaps_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_filters(model, X, 0.45, target="params", layers=True, optimizer=optimizer, progress=False)
    assert list(model.state_dict()) == list(before[0])
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert after.keys() == before[1]["state"].keys()
    for key, state in before[1]["state"].items():
        assert torch.equal(state["exp_avg"], after[key]["exp_avg"])


def test_limits_hold_for_both():
    """What is named in ignore keeps its channels and stays as a layer; modules name themselves."""
    model = net()
    report = prune_filters(model, X, 0.5, target="params", layers=True, ignore=[model[1], "2"], progress=False)
    assert not blocks_gone(model) & {1, 2} and model[1].up.out_features == model[2].up.out_features == 3 * WIDTH
    assert report.reached >= 0.5


@pytest.mark.parametrize("limit", [{"min_width": 4}, {"max_amount": 0.5}], ids=str)
@pytest.mark.parametrize("pattern", ["2", "2.up", "*.up", "[2-4]"])
def test_limits_may_name_layers_that_leave(limit, pattern):
    """A limit of a layer that is removed holds until then, and no copy without the layer is refused for its name."""
    model = net([1.0, 1e-6, 1.0, 1.0, 1.0])
    limits = {name: {pattern: value} for name, value in limit.items()}
    report = prune_filters(model, X, 0.3, target="params", layers=True, progress=False, **limits)
    assert not any(tried.refused for tried in report.tried) and 2 in blocks_gone(model)
    with pytest.raises(ValueError, match="names no module"):
        prune_filters(net(), X, 0.3, target="params", layers=True, progress=False, min_width={"9": 4})


@pytest.mark.parametrize(
    "given, told",
    [({"target": "filters"}, "share one amount"), ({"target": "params", "amount": {"1": 0.5}}, "amounts by pattern")],
    ids=str,
)
def test_what_has_no_common_unit_is_refused(given, told):
    """A number of filters says nothing of layers, and amounts by pattern are of filters."""
    model = net()
    with pytest.raises(ValueError, match=told):
        prune_filters(model, X, **{"amount": 0.3, **given}, layers=True)
    assert not blocks_gone(model)
    narrow = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(PruningError, match="No layer of Sequential can be removed"):
        prune_filters(narrow, torch.randn(2, 3), 0.3, target="params", layers=True)


class Returning(nn.Module):
    """Residual blocks whose scores are returned in some form."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.form(self.leave(x))


COMPLEX = {
    "spectrum": torch.fft.rfft,
    "conjugate": lambda scores: torch.fft.rfft(scores).conj(),
    "adjoint": lambda scores: torch.complex(scores, scores).mH,
}


@pytest.mark.parametrize("form", COMPLEX)
def test_complex_outputs_are_compared(form):
    """What is lost without layers is the distance of complex outputs, and layers leave where that is the criterion."""
    torch.manual_seed(0)
    model, x = Returning(COMPLEX[form]), torch.randn(4, 6)
    slim = copy.deepcopy(model)
    report = prune_filters(slim, x, 0.5, target="params", layers=True, batches=[x])
    distance = (slim(x) - model(x)).abs().square().sum() / torch.view_as_real(model(x).resolve_conj()).numel()
    least = min(split.lost for split in report.tried)
    assert least > 0 and least == pytest.approx(float(distance), rel=1e-4)
    scored = prune_layers(copy.deepcopy(model), x, amount=0.25, criterion="output_change", batches=[x])
    moved = {}
    for number, block in enumerate(model.blocks):
        handle = block.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        changed = model(x)
        handle.remove()
        moved[f"blocks.{number}"] = float((changed - model(x)).abs().square().sum())
    assert [layer.path for layer in scored.removed] == [min(moved, key=moved.get)]


@pytest.mark.parametrize("settings", [{"layers": True}, {"criterion": "output_change"}], ids=["split", "criterion"])
def test_outputs_that_cannot_be_compared_are_refused(settings):
    """Choices have no distance, so nothing is decided by them, and the model is as it was."""
    torch.manual_seed(0)
    model, x = Returning(lambda scores: scores.argmax(-1)), torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())
    prune = partial(prune_filters, target="params") if "layers" in settings else prune_layers
    with pytest.raises(PruningError, match="returns no numbers on the batches"):
        prune(model, x, amount=0.5, batches=[x], **settings)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
