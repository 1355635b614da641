"""plan_filters: what will be cut is known, and verified, before anything of the model changes."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import prune_weights
from lightning_prune.measure.footprint import Footprint
from lightning_prune.pruning.budget import Budget, Dense
from lightning_prune.pruning.plan import plan_filters
from lightning_prune.pruning.scoring import score_units
from lightning_prune.surgery import find_groups, recipe_of
from lightning_prune.surgery.masks import masks_on

X = torch.randn(4, 6)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))


def planned(model, amount, budget=None, **more):
    structure = find_groups(model, X)
    return plan_filters(model, X, structure, score_units(model, structure, "l1"), amount, budget, **more)


@pytest.mark.parametrize("target", ["filters", "params", "flops"])
def test_a_plan_foretells_what_applying_it_reaches(target):
    """Planning changes nothing; applying the plan reaches what it says, and leaves what it says."""
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    plan = planned(model, 0.5, Budget(target, "global"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.asked == 0.5 <= plan.reached
    slim = {name: tensor.clone() for name, tensor in plan.tensors.items()}
    report = plan.apply_()
    assert (report.asked, report.reached) == pytest.approx((plan.asked, plan.reached))
    assert report.groups == plan.widths
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in slim.items())
    gone = {
        "filters": 1 - (model[0].out_features + model[2].out_features) / 28,
        "params": 1 - sum(p.numel() for p in model.parameters()) / sum(v.numel() for v in before.values()),
        "flops": 1 - report.flops_after / report.flops_before,
    }
    assert report.reached == pytest.approx(gone[target])


def test_amounts_are_relative_to_the_dense_model():
    """Plans in steps end at the widths of one plan; a limit on units in all stops them on the way."""
    in_steps = mlp()
    dense = Dense({"0": 16, "2": 12}, Footprint(sum(p.numel() for p in in_steps.parameters()), 0))
    planned(in_steps, 0.5, dense=dense).apply_()
    limited = planned(in_steps, 0.75, dense=dense, at_most=17)
    assert sum(width.after for width in limited.widths) == 28 - 17
    planned(in_steps, 0.75, dense=dense).apply_()
    assert (in_steps[0].out_features, in_steps[2].out_features) == (4, 3)


def test_a_group_of_one_unit_counts():
    """A group that an earlier step left one unit of is no group any more, and what it lost counts as reached."""
    model = mlp()
    dense = Dense({"0": 16, "2": 12}, Footprint(1, 1))
    planned(model, {"0": 15 / 16}, dense=dense).apply_()
    plan = planned(model, 0.5, Budget(scope="global"), dense=dense)
    assert plan.reached == pytest.approx(15 / 28)
    assert not plan.cut.kept


def test_masks_and_metadata_follow():
    """Weight masks that the model carries are cut like their weights, and its state dict says that it was cut."""
    model = mlp()
    prune_weights(model, 0.5)
    before = masks_on(model)["2.weight"]
    plan = planned(model, 0.5)
    kept = plan.cut.kept["2.weight"]
    plan.apply_()
    assert torch.equal(masks_on(model)["2.weight"], before[kept[0]][:, kept[1]])
    assert recipe_of(model).needed
