"""prune_filters with repair: filters leave, and what read them becomes the best fit to what it gave with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import PruningError, prune_filters
from lightning_prune.algorithms.solvers import best_on_columns, inverse, rise
from lightning_prune.algorithms.solvers.whole_units import Reader, unit_rises

IMAGE = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


class Residual(nn.Module):
    """A stream that two layers write on and three read; a grouped and a depthwise convolution within the block."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1, groups=2, bias=False)
        self.deep, self.back = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.other, self.head = nn.Conv2d(8, 6, 1), nn.Linear(8 + 6 * 16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.deep(F.relu(self.wide(x)))))
        return self.head(torch.cat([x.mean((2, 3)), F.avg_pool2d(F.relu(self.other(x)), 2).flatten(1)], dim=1))


def residual():
    model = Residual().double()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
    return model.eval()


def images(count=4):
    return [torch.randn(48, 3, 8, 8, dtype=torch.float64) for _ in range(count)]


def moved(model, other, batches):
    with torch.no_grad():
        return float(sum((model(x) - other(x)).square().sum() for x in batches))


@pytest.mark.parametrize("criterion", ["l1", "obs"])
def test_repair_keeps_outputs_nearer(criterion):
    """The same filters cut, outputs on other data move clearly less when what read them is refitted."""
    dense = residual()
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_filters(repaired, IMAGE, 0.25, criterion=criterion, batches=images(), repair=True, damping=1e-4)
    assert report.params_after < report.params_before
    assert not report.skipped
    kept = {name: dims for name, dims in report.kept.items() if name in dict(plain.named_parameters())}
    with torch.no_grad():  # silence what left where it was read, which is what the cut alone does
        for name in ("wide", "back", "other", "head"):
            weight = plain.get_parameter(f"{name}.weight")
            if (left := kept.get(f"{name}.weight", {}).get(1)) is not None:
                weight[:, [i for i in range(weight.shape[1]) if i not in left]] = 0
    others = images()
    assert moved(repaired, dense, others) < 0.7 * moved(plain, dense, others)
    assert all(repair.after <= repair.before for repair in report.repairs)


def test_a_reader_becomes_the_least_squares_fit():
    """Without damping, weight and bias behind the cut are those of least squares for the old outputs, to 1e-8."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    before = model(x).detach()
    report = prune_filters(model, x[:1], 0.5, criterion="obs", batches=[x[:90], x[90:]], damping=0.0)
    seen = torch.cat([model[1](model[0](x)), torch.ones(200, 1, dtype=torch.float64)], dim=1).detach()
    best = torch.linalg.lstsq(seen, before).solution
    torch.testing.assert_close(model[2].weight.detach(), best[:6].T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model[2].bias.detach(), best[6], rtol=1e-8, atol=1e-10)
    lost = (seen @ best - before).square().sum() / (before - model[2].bias.detach()).square().sum()
    assert [repair.name for repair in report.repairs] == ["2.weight"]
    assert report.repairs[0].after < report.repairs[0].before
    assert lost < 1


def test_filters_that_others_make_up_for_leave_first():
    """A filter that doubles another one leaves at no loss, however large its weights: the other takes its part."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 2 * model[0].weight[1], 2 * model[0].bias[1]
        model[2].weight[:, 3] = 5.0
    x = torch.randn(100, 5, dtype=torch.float64)
    before = model(x).detach()
    prune_filters(model, x[:1], 0.25, criterion="obs", batches=[x], damping=1e-9)
    assert model[0].out_features == 3
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-5)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_units_leave_in_the_order_of_brute_force(units, taps, seed):
    """At each step the unit goes without which all readers' best fits together are nearest; the rise is that loss."""
    generator = torch.Generator().manual_seed(seed)
    problems = []
    for rows, scale in ((2, 1.0), (3, 2.5)):
        inputs = torch.randn(units * taps, 40, generator=generator, dtype=torch.float64)
        weights = torch.randn(rows, units * taps, generator=generator, dtype=torch.float64)
        problems.append((weights, inputs @ inputs.T / 40, scale))
    columns = torch.randperm(units * taps, generator=generator).view(units, taps)
    found = unit_rises([Reader(w, inverse(h), columns, scale) for w, h, scale in problems])

    def error(left):
        total = 0.0
        for weights, hessian, scale in problems:
            keep = torch.zeros(units * taps, dtype=torch.bool)
            keep[columns[left].flatten()] = True
            new = torch.zeros_like(weights)
            new[:, keep] = best_on_columns(weights, hessian, keep)
            total += scale * float(rise((new - weights)[None], hessian[None]))
        return total

    left, before, reached = list(range(units)), 0.0, 0.0
    while len(left) > 1:
        errors = {unit: error([u for u in left if u != unit]) for unit in left}
        unit = min(errors, key=errors.get)
        reached = max(reached, errors[unit] - before)
        assert float(found[unit]) == pytest.approx(reached, rel=1e-6)
        left.remove(unit)
        before = errors[unit]
    assert found[left[0]] == torch.inf


def test_the_target_is_reached():
    """A share of the FLOPs is asked for, and that much is gone, proved as any cut is."""
    model = residual()
    report = prune_filters(model, IMAGE, 0.4, criterion="obs", target="flops", scope="global", batches=images(2))
    assert report.flops_after <= 0.6 * report.flops_before
    assert report.proof.startswith("2 groups cut; 18 operators ran")


def test_readers_that_cannot_be_seen_are_told():
    """What sums over channels and is not watched cannot make up for them: by obs they stay, else it is told."""

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(F.relu(torch.einsum("ni,oi->no", self.first(x), self.second.weight.square())))

    x = torch.randn(60, 4)
    model = Squares()
    report = prune_filters(model, x[:1], 0.34, criterion="obs", scope="global", batches=[x])
    assert model.first.out_features == 6
    assert any("cannot be seen" in pin.reason for pin in report.pinned)
    report = prune_filters(Squares(), x[:1], 0.34, scope="global", batches=[x], repair=True)
    assert set(report.skipped) == {"second.weight"}


@pytest.mark.parametrize(
    "asked, error",
    [({"damping": -1.0}, "mean variance"), ({"amount": 1.2}, "must lie in"), ({"criterion": "x"}, "'l1'"),
     ({"batches": None}, "pass batches")],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused(asked, error):
    """What no model could make sense of is refused with what is allowed."""
    with pytest.raises(ValueError, match=error):
        prune_filters(residual(), IMAGE, **{"criterion": "obs", "batches": images(1), **asked})


@pytest.mark.parametrize("dead", [-9.0, 0.7])
def test_inputs_that_never_vary_are_no_reason_to_refuse(dead):
    """Where all that a layer reads is constant, dead or saturated, any weights do: they stay, and its bias makes up."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(0, 0.5), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.fill_(dead)
    batches = [torch.randn(64, 6) for _ in range(2)]
    before = model(batches[0]).detach()
    prune_filters(model, batches[0][:1], 0.5, scope="global", batches=batches, repair=True, ignore=["2"])
    assert model[0].out_features == 4
    torch.testing.assert_close(model(batches[0]), before, atol=1e-4, rtol=1e-4)


def test_a_refused_cut_leaves_the_model_as_it_was():
    """Inputs that depend on each other and no damping: nothing is written."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2)).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match="singular"):
        prune_filters(
            model, torch.zeros(1, 4).double(), 0.3, criterion="obs", batches=[torch.randn(3, 4).double()], damping=0.0
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    prune_filters(model, torch.zeros(1, 4).double(), 0.3)
    assert model[0].out_features == 7


def test_heads_leave_and_are_made_up_for():
    """Whole attention heads leave, and what reads them is refitted, though no module is called for it."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True).double()
    model = nn.Sequential(nn.Linear(5, 16).double(), layer, nn.Linear(16, 3).double()).eval()
    tokens = torch.randn(48, 7, 5, dtype=torch.float64)
    report = prune_filters(model, tokens[:1], {"1.self_attn*": 0.5}, batches=[tokens], repair=True)
    assert layer.self_attn.num_heads == 2
    repairs = {repair.name: repair for repair in report.repairs}
    assert not report.skipped
    assert repairs["1.self_attn.out_proj.weight"].after < 0.5 * repairs["1.self_attn.out_proj.weight"].before


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimizers_state_follows(fused):
    """With repair, too, moments are those of the units that are kept, and the next step goes through."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x, optimizer = torch.randn(64, 6), torch.optim.Adam(model.parameters(), fused=fused)
    model(x).square().mean().backward()
    optimizer.step()
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    report = prune_filters(model, x[:1], 0.5, criterion="obs", batches=[x], optimizer=optimizer, progress=False)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], before[report.kept["0.weight"][0]])
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_obs_repairs_unless_told_not_to():
    """By "obs" weights are refitted, by other criteria not; ``repair`` says otherwise."""
    for criterion, repair, repairs in (("obs", None, 1), ("obs", False, 0), ("l1", None, 0), ("l1", True, 1)):
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        x = torch.randn(64, 6)
        report = prune_filters(model, x[:1], 0.5, criterion=criterion, batches=[x], repair=repair, progress=False)
        assert len(report.repairs) == repairs


def test_batches_with_labels_are_run_by_the_loss():
    """With a loss, batches may hold labels: the same weights are refitted, to the same values, as on inputs alone."""
    one = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    two = copy.deepcopy(one)
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
    prune_filters(one, x[:1], 0.5, criterion="obs", batches=[x], progress=False)
    prune_filters(
        two, x[:1], 0.5, criterion="obs", batches=[(x, y)], progress=False,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )  # fmt: skip
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value)
