"""prune_obs on whole models: what leaves, what the others become, and what is left alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from lightning_prune import PruningError, prune_obs
from lightning_prune.algorithms.solvers import SOLVERS
from lightning_prune.measure.calibration import Calibration
from lightning_prune.pruning.obs import Asked, plan_obs


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(),
        nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 4),
    ).double()  # fmt: skip


def images(count=4):
    return [torch.randn(32, 3, 6, 6, dtype=torch.float64) for _ in range(count)]


def moved(model, other, batches):
    with torch.no_grad():
        return float(sum((model.eval()(x) - other.eval()(x)).square().sum() for x in batches))


def by_magnitude(model, amount):
    """The model with the same share of every layer's smallest weights zeroed."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                smallest = parameter.abs().flatten().argsort()[: round(amount * parameter.numel())]
                parameter.view(-1)[smallest] = 0
    return model


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("asked", [{"scope": "global"}, {}, {"scope": "global", "sequential": True}], ids=str)
def test_outputs_move_less_than_by_magnitude(solver, asked):
    """Exactly half of all weights are zero, and on other data of the kind the outputs move less than by magnitude."""
    dense, model = net(), None
    model = copy.deepcopy(dense)
    report = prune_obs(model, batches=images(), solver=solver, **asked)
    weights = [p for p in model.parameters() if p.dim() > 1]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == total // 2
    assert report.reached == 0.5
    for name, keep in report.kept.items():
        assert torch.equal(model.get_parameter(name) != 0, keep)
    others = images()
    assert moved(model, dense, others) < 0.5 * moved(by_magnitude(dense, 0.5), dense, others)


def test_a_layer_becomes_the_best_on_what_it_keeps():
    """Without damping, a linear layer's weights are the least-squares solution for its old outputs, to 1e-8."""
    layer, x = nn.Linear(12, 3, bias=False).double(), torch.randn(200, 12, dtype=torch.float64)
    y = (x @ layer.weight.T).detach()
    report = prune_obs(layer, batches=[x], amount=0.4, solver="exact", damping=0.0, scope="global")
    for row, target, keep in zip(layer.weight, y.T, report.kept["weight"], strict=True):
        expected = torch.linalg.lstsq(x[:, keep], target[:, None]).solution[:, 0]
        torch.testing.assert_close(row[keep].detach(), expected, rtol=1e-8, atol=1e-10)
    lost = (x @ layer.weight.T - y).square().sum() / y.square().sum()
    assert report.details[0].error == pytest.approx(lost.item(), rel=1e-6)


@pytest.mark.parametrize("sequential", [False, True])
def test_biases_and_running_means_make_up_for_the_mean(sequential):
    """With a bias, or a BatchNorm behind it alone, a layer becomes the least-squares fit with an intercept."""
    x = 3 + torch.randn(300, 10, dtype=torch.float64)
    for model in (nn.Linear(10, 3), nn.Sequential(nn.Linear(10, 3, bias=False), nn.BatchNorm1d(3))):
        model = model.double().eval()
        before = model(x).detach()
        report = prune_obs(
            model,
            batches=[x[:100], x[100:]],
            amount=0.4,
            solver="exact",
            damping=0.0,
            sequential=sequential,
            scope="global",
        )
        for row, keep in enumerate(next(iter(report.kept.values()))):
            design = torch.cat([x[:, keep], torch.ones(300, 1, dtype=torch.float64)], dim=1)
            fit = design @ torch.linalg.lstsq(design, before[:, row : row + 1]).solution
            torch.testing.assert_close(model(x)[:, row].detach(), fit[:, 0], rtol=1e-8, atol=1e-8)


def test_a_batch_norm_that_shares_its_input_makes_up_for_nothing():
    """Where something else reads what BatchNorm reads, its running mean stays."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

        def forward(self, x):
            x = self.linear(x)
            return self.norm(x) + x

    model = Shared().eval()
    prune_obs(model, batches=[1 + torch.randn(50, 6)], amount=0.5, scope="global")
    assert not model.norm.running_mean.any()


def test_a_later_layer_aims_at_what_the_whole_model_gave():
    """One after the other, the last layer is the least-squares map from what it now sees to the outputs of before."""
    model, x = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)).double(),
        torch.randn(99, 6).double(),
    )
    before = model(x).detach()
    report = prune_obs(model, batches=[x], amount={"0": 0.5, "2": 0.25}, solver="exact", sequential=True, damping=0.0)
    seen = model[1](model[0](x)).detach()
    for row, target, keep in zip(model[2].weight, before.T, report.kept["2.weight"], strict=True):
        expected = torch.linalg.lstsq(seen[:, keep], target[:, None]).solution[:, 0]
        torch.testing.assert_close(row[keep].detach(), expected, rtol=1e-7, atol=1e-9)
    lost = (model(x) - before).square().sum() / before.square().sum()
    assert report.details[1].error == pytest.approx(lost.item(), rel=1e-6)


@pytest.mark.parametrize("sequential", [False, True])
def test_processes_that_see_parts_of_the_data_do_as_one_that_sees_all(sequential):
    """Sums over the data are added up over processes, so each of them works out what one would on all batches."""
    model, batches = net().eval(), images(8)
    asked = Asked(0.5, "admm", "global", None, sequential, 0.01, (), progress=False)
    barrier, parts = Barrier(2), {}

    def process(rank):
        def over_processes(total):
            parts[rank] = total
            barrier.wait(timeout=60)
            both = parts[0] + parts[1]
            barrier.wait(timeout=60)
            return both

        own = batches[rank::2]  # where outputs are compared, it is on the first batches
        return plan_obs(copy.deepcopy(model), Calibration(own, over_processes=over_processes), asked)

    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(process, range(2)))
    alone = plan_obs(model, Calibration(batches), asked)
    for plan in plans:
        torch.testing.assert_close(plan.tensors, alone.tensors)
        assert [fit.left for fit in plan.layers] == [fit.left for fit in alone.layers]


def test_layers_that_matter_less_lose_more():
    """Split by what outputs lose, a layer whose inputs hardly vary loses more than the layer beside it."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.faint = nn.Linear(10, 4), nn.Linear(10, 4)

        def forward(self, x):
            return self.loud(x) + self.faint(0.01 * x)

    report = prune_obs(Two(), batches=[torch.randn(200, 10)], amount=0.5, scope="global")
    left = {layer.name: layer.left for layer in report.details}
    assert left["loud.weight"] + left["faint.weight"] == 40
    assert left["faint.weight"] < 10


def test_patterns_hold_along_input_channels():
    """A pattern of 2:4 leaves, at each place of a kernel, two of every four input channels; the rest is told."""
    model = net()
    report = prune_obs(model, batches=images(), pattern="2:4")
    assert (model[5].weight.reshape(16, -1, 4) != 0).sum(dim=-1).eq(2).all()
    skipped = {pin.tensor: pin.reason for pin in report.pinned}
    assert set(skipped) == {"0.weight", "3.weight"}
    assert all("blocks of 2:4" in reason for reason in skipped.values())
    conv = nn.Conv2d(8, 5, 3)
    prune_obs(conv, batches=[torch.randn(16, 8, 5, 5)], pattern="2:4")
    assert (conv.weight.reshape(5, 2, 4, 3, 3) != 0).sum(dim=2).eq(2).all()


def test_shares_by_pattern():
    """Each layer loses what its pattern says; what no pattern names, or ignore does, stays to the last bit."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    report = prune_obs(model, batches=images(), amount={"5": 0.75}, ignore=["7"])
    assert {name: layer for name, *layer in report.details}["5.weight"][:2] == [16 * 128, 16 * 32]
    assert {pin.tensor: pin.reason for pin in report.pinned} == {
        "0.weight": "named in no pattern of amount=",
        "3.weight": "named in no pattern of amount=",
        "7.weight": "named in ignore=",
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in ("5.weight", "5.bias"))


def test_nothing_else_of_the_model_changes():
    """Mode, statistics, gradients, hooks and the random state are as before, and parameters are the same objects."""
    model = net().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    own = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    buffers, state = {name: b.clone() for name, b in model.named_buffers()}, torch.get_rng_state()
    batches = images(1)
    state = torch.get_rng_state()
    prune_obs(model, batches=batches, scope="global")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == own
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_stay():
    """A weight that an embedding looks up too is left alone, by name and with the reason."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.body(self.embed(tokens)).relu())

    model = Tied()
    report = prune_obs(model, batches=[torch.randint(9, (8, 12))], amount=0.5, scope="global")
    assert list(report.kept) == ["body.weight"]
    assert "aten.embedding" in {pin.tensor: pin.reason for pin in report.pinned}["embed.weight"]
    assert model.head.weight is model.embed.weight


def test_memory_can_be_bounded(monkeypatch):
    """Where the Hessians of all layers do not fit into memory together, they are gathered in parts, to the same end."""
    model, batches = net(), images()
    parted = copy.deepcopy(model)
    whole = prune_obs(model, batches=batches, scope="global")
    monkeypatch.setattr("lightning_prune.pruning.layerwise._MEMORY", 1)
    assert [layer.left for layer in prune_obs(parted, batches=batches, scope="global").details] == [
        layer.left for layer in whole.details
    ]
    for a, b in zip(model.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_singular_hessians_are_refused_and_the_model_is_left():
    """Fewer examples than weights and no damping: the model stays as it was."""
    model = nn.Linear(20, 3)
    before = model.weight.detach().clone()
    with pytest.raises(PruningError, match="^weight: The Hessian, 20 x 20, is singular.*damping=.*ignore="):
        prune_obs(model, batches=[torch.randn(5, 20)], damping=0.0, solver="exact", scope="global")
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "asked, error",
    [
        ({"amount": 1.0}, "must lie in"),
        ({"pattern": "4:2"}, "2:4"),
        ({"solver": "exakt"}, "choose one of 'exact'"),
        ({"scope": "net"}, "'layer', 'global'"),
        ({"damping": -1}, "mean diagonal"),
        ({"ignore": ["nine"]}, "names no module"),
        ({"amount": {"nine": 0.5}}, "amount='nine' names no module"),
        ({"amount": {}}, "it names nothing"),
        ({"amount": {"5": 0.5, "*": 0.1}}, "Give it one amount"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused(asked, error):
    """What no model could make sense of is refused with what is allowed."""
    with pytest.raises(ValueError, match=error):
        prune_obs(net(), batches=images(1), **asked)


def test_batches_that_the_model_does_not_take_are_refused():
    """Batches with labels are refused with a word on how to say what of them goes in."""
    with pytest.raises(PruningError, match=r"does not run on the first batch .*forward=lambda model, batch"):
        prune_obs(net(), batches=[(batch, torch.zeros(1)) for batch in images(1)], scope="global")


def test_no_data_is_refused():
    """Without batches there is nothing to keep outputs on."""
    with pytest.raises(PruningError, match="No batch came"):
        prune_obs(net(), batches=[], scope="global")
