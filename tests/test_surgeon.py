"""Optimal Brain Surgeon on whole small nets: what it foretells, where it stops, and that it finds minimal nets."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError
from lightning_prune.measure.curvature import outer_product_rows
from lightning_prune.pruning.exact import prune_exact

XOR = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=torch.float64)
TARGETS = (XOR[:, :1] != XOR[:, 1:]).double()


def linear(outputs=2):
    """A linear layer at the minimum of its squared error."""
    model, x = nn.Linear(6, outputs).double(), torch.randn(60, 6, dtype=torch.float64)
    y = torch.randn(60, outputs, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1).double()], dim=1), y).solution
    with torch.no_grad():
        model.weight.copy_(best[:6].T)
        model.bias.copy_(best[6])
    return model, [(x[:40], y[:40]), (x[40:], y[40:])]


def test_predicted_rises_are_the_measured_ones_on_quadratic_losses():
    """With a quadratic loss every removal raises it by what was predicted, to 1e-6."""
    model, batches = linear()
    report = prune_exact(model, batches=batches, loss=F.mse_loss, amount=0.9, alpha=1e-8)
    losses = [report.details.loss_before, *(removal.loss for removal in report.details.removals)]
    assert len(report.details.removals) == 13
    for removal, before, after in zip(report.details.removals, losses, losses[1:], strict=False):
        assert after - before == pytest.approx(removal.predicted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy], ids=["squared error", "cross-entropy"])
def test_outer_products_are_the_hessian_of_a_linear_model(loss):
    """Where outputs are linear in the weights, the outer products are the loss's own Hessian."""
    model, x = nn.Linear(4, 3).double(), torch.randn(20, 4, dtype=torch.float64)
    y = torch.randint(3, (20,)) if loss is F.cross_entropy else torch.randn(20, 3, dtype=torch.float64)
    rows, examples = outer_product_rows(model, [(x[:8], y[:8]), (x[8:], y[8:])], loss, ["weight", "bias"])

    def of(vector):
        return loss(F.linear(x, vector[:12].view(3, 4), vector[12:]), y)

    vector = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(rows.T @ rows / examples, torch.autograd.functional.hessian(of, vector))


def trained_xor(seed):
    """A trained net of two hidden units, or None where training ends elsewhere than at a solution."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(XOR), TARGETS) + 1e-5 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model if solves(model) else None


def solves(model):
    with torch.no_grad():
        return bool(((model(XOR) > 0.5) == (TARGETS > 0.5)).all())


def test_limits_stop_the_surgeon():
    """Removal stops before the limit that is met first, and what was tried beyond it is undone."""
    model, batches = linear(1)
    free = prune_exact(copy.deepcopy(model), batches=batches, loss=F.mse_loss)
    assert (free.params_after, free.details.stopped) == (0, "amount reached")
    third = free.details.removals[2]
    limit = {"max_loss": 1e-12 + third.loss, "max_rise": 1e-12 + third.predicted}
    for name, value in limit.items():
        slim = copy.deepcopy(model)
        report = prune_exact(slim, batches=batches, loss=F.mse_loss, **{name: value})
        assert [r.entry for r in report.details.removals] == [r.entry for r in free.details.removals[:3]]
        assert sum(int((p == 0).sum()) for p in slim.parameters()) == 3
        assert report.details.removals[-1].loss == pytest.approx(
            sum(F.mse_loss(slim(x), y).item() * len(x) for x, y in batches) / 60
        )
    refusing = prune_exact(copy.deepcopy(model), batches=batches, loss=F.mse_loss, accept=lambda model: False)
    assert not refusing.details.removals


def test_removal_goes_on_where_masks_left_off():
    """What had left stays out, and counts towards the amount."""
    model, batches = linear()
    first = prune_exact(model, batches=batches, loss=F.mse_loss, amount=0.3)
    second = prune_exact(model, batches=batches, loss=F.mse_loss, amount=0.6, masks=first.kept)
    assert (len(first.details.removals), len(second.details.removals)) == (5, 4)  # 0.3 and 0.6 of 14
    assert not {r[:2] for r in first.details.removals} & {r[:2] for r in second.details.removals}
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in second.kept.items())


def test_the_surgeon_keeps_xor_solved_longer_than_magnitude():
    """From trained starts, more weights of an XOR net leave by OBS, before it fails, than by magnitude."""
    nets = [net for net in map(trained_xor, range(3)) if net is not None]
    assert len(nets) >= 2
    left = {
        method: sum(
            prune_exact(
                copy.deepcopy(net), batches=[(XOR, TARGETS)], loss=F.mse_loss, method=method, accept=solves
            ).params_after
            for net in nets
        )
        for method in ("obs", "magnitude")
    }
    assert left["obs"] < left["magnitude"]


@pytest.mark.parametrize("asked", [{"amount": 2.0}, {"method": "obx"}, {"alpha": 0.0}], ids=str)
def test_bad_arguments_are_refused(asked):
    """Arguments out of range are refused by name."""
    model, batches = linear()
    with pytest.raises(ValueError, match=next(iter(asked))):
        prune_exact(model, batches=batches, loss=F.mse_loss, **asked)


def test_nets_too_large_are_refused():
    """A Hessian of all weights that would not fit into memory is refused, with the way out."""
    with pytest.raises(PruningError, match="prune_obs"):
        prune_exact(nn.Linear(200, 200), batches=[], loss=F.mse_loss)


def test_half_precision_leaves_what_double_does():
    """A net in half precision loses the same weights as its double, computed in float32 or better."""
    model, batches = linear()
    half = copy.deepcopy(model).to(torch.bfloat16)
    twin = copy.deepcopy(half).double()  # the same rounded weights
    found = [
        prune_exact(net, batches=[(x.to(dtype), y.to(dtype)) for x, y in batches], loss=F.mse_loss, amount=0.3)
        for net, dtype in ((half, torch.bfloat16), (twin, torch.float64))
    ]
    assert [r[:2] for r in found[0].details.removals] == [r[:2] for r in found[1].details.removals]
    assert half.weight.dtype == torch.bfloat16


def test_a_loss_that_is_no_number_is_refused():
    """With NaN among weights or data nothing can be told, and nothing is removed."""
    model, batches = linear()
    batches[0][0][0, 0] = float("nan")
    before = model.weight.detach().clone()
    with pytest.raises(PruningError, match="the loss on the batches is nan"):
        prune_exact(model, batches=batches, loss=F.mse_loss, amount=0.3)
    assert torch.equal(model.weight, before)
