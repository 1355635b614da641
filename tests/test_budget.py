"""How scores and a target become a plan."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import PruningError, count_flops, prune_filters
from lightning_prune.measure.footprint import Footprint, measure, saved_by_one_unit
from lightning_prune.pruning.budget import Budget, Dense, per_saving, select_units
from lightning_prune.pruning.scoring import score_units
from lightning_prune.structure import find_structure, trace
from tests.architectures import INPUTS, architectures, build
from tests.models import ROWS

MODEL = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)).double()
STRUCTURE = find_structure(trace(MODEL, ROWS))
SCORES = {"0": torch.arange(8.0), "2": torch.arange(12.0).flip(0)}
DENSE = Dense({"0": 8, "2": 12}, measure(MODEL, STRUCTURE, {}))


def planned(amount, target="filters", scope="layer", round_to=1, scores=SCORES, dense=DENSE, **limits):
    return select_units(
        STRUCTURE, scores, amount, Budget(target, scope, round_to, **limits), dense=dense,
        footprint=lambda keep: measure(MODEL, STRUCTURE, keep),
    )  # fmt: skip


def left(keep):
    return [int(keep[name].sum()) for name in ("0", "2")]


def test_footprints_are_arithmetic():
    """Parameters and multiply-adds of two rows through three linear layers, before and after a cut."""
    assert measure(MODEL, STRUCTURE, {}) == Footprint(56 + 108 + 26, 2 * (48 + 96 + 24))
    keep = {"0": np.arange(8) < 5, "2": np.arange(12) < 3}
    assert measure(MODEL, STRUCTURE, keep) == Footprint(35 + 18 + 8, 2 * (30 + 15 + 6))


@given(amount=st.floats(0, 1, exclude_max=True))
def test_the_lowest_of_every_layer_leave(amount):
    """With scope="layer" the share of each group leaves, lowest scores first, and one unit stays at least."""
    keep = planned(amount)
    assert left(keep) == [max(1, n - math.ceil(amount * n - 1e-9)) for n in (8, 12)]
    assert keep["0"].tolist() == sorted(keep["0"].tolist())
    assert keep["2"].tolist() == sorted(keep["2"].tolist(), reverse=True)


@given(first=st.floats(0, 0.9), second=st.floats(0, 0.9))
def test_amounts_count_from_the_start(first, second):
    """A plan on a model that was cut already goes on to the amount of what was there at first."""
    dense = Dense({"0": 16, "2": 12}, DENSE.footprint)  # half of the first layer has gone before
    keep = planned({"0": first, "2": second}, dense=dense)
    assert left(keep) == [min(8, max(1, 16 - math.ceil(16 * first - 1e-9))), 12 - math.ceil(12 * second - 1e-9)]


@settings(deadline=None, max_examples=30)
@given(
    amounts=st.tuples(st.floats(0, 0.75), st.floats(0, 0.75)),
    target=st.sampled_from(["filters", "params", "flops"]),
    scope=st.sampled_from(["layer", "global"]),
)
def test_larger_amounts_keep_a_subset(amounts, target, scope):
    """What a larger amount keeps a smaller one keeps too, for every target and scope."""
    less, more = (planned(amount, target, scope) for amount in sorted(amounts))
    assert all((more[name] <= less[name]).all() for name in less)


@settings(deadline=None, max_examples=30)
@given(amount=st.floats(0, 0.75), target=st.sampled_from(["params", "flops"]), round_to=st.integers(1, 5))
def test_budgets_hold(amount, target, round_to):
    """The plan costs no more than the budget, also with rounded widths."""
    try:
        keep = planned(amount, target, round_to=round_to)
    except PruningError:
        assert round_to > 1
        return
    assert getattr(measure(MODEL, STRUCTURE, keep), target) <= (1 - amount) * getattr(DENSE.footprint, target) * (
        1 + 1e-9
    )
    assert all(n % round_to == 0 or n == width for n, width in zip(left(keep), (8, 12), strict=True))


def test_equal_scores_leave_exactly_as_many():
    """Ties do not let more or fewer leave than asked."""
    ties = {"0": torch.zeros(8), "2": torch.zeros(12)}
    for scope in ("layer", "global"):
        assert sum(left(planned(0.5, scope=scope, scores=ties))) == 10


def test_scores_that_are_not_numbers_leave_first():
    """NaN counts as the lowest score."""
    scores = {**SCORES, "0": torch.tensor([math.nan, *range(7)])}
    for scope in ("layer", "global"):
        assert not planned(0.1, scope=scope, scores=scores)["0"][0]


def test_what_cannot_be_reached_is_refused():
    """Beyond what one unit per group leaves, the error says how much can go, group by group."""
    with pytest.raises(PruningError, match=r"amount=0\.95 of the params cannot go.*93\.2% would be gone") as refused:
        planned(0.95, "params")
    told = str(refused.value).splitlines()
    # of 190 parameters the first group's seven units hold 7 * (6 + 1 + 12), of 336 multiply-adds 7 * 2 * (6 + 12)
    assert told[-2:] == [
        "  0: 8 units, 1 stay (one unit stays); the others hold 70.0% of the params, 75.0% of the FLOPs",
        "  2: 12 units, 1 stay (one unit stays); the others hold 63.7% of the params, 65.5% of the FLOPs",
    ]


@pytest.mark.parametrize("target", ["filters", "params", "flops"])
def test_limits_make_budgets_unreachable(target):
    """What limits keep cannot go: the error says which limit keeps how many units of which group."""
    with pytest.raises(PruningError, match=f"amount=0.7 of the {target} cannot go: with no more than min_width") as no:
        planned(0.7, target, scope="global", min_width={"0": 7}, max_amount={"2": 0.5})
    assert "0: 8 units, 7 stay (min_width=7)" in str(no.value)
    assert "2: 12 units, 6 stay (max_amount=0.5)" in str(no.value)


LIMITS = st.fixed_dictionaries(
    {"round_to": st.integers(1, 4), "min_width": st.integers(1, 6), "max_amount": st.floats(0.1, 1.0)}
)


def one_by_one(structure, scores, allowed, cost, scope, limits):
    """Take the lowest unit of all that may leave, again and again, until the cost is allowed; None if it never is."""
    left = {name: group.width for name, group in structure.groups.items()}
    dense = dict(left)

    def keep():
        found = {}
        for name, width in left.items():
            rounded = min(dense[name], -(-width // limits["round_to"]) * limits["round_to"])
            found[name] = np.isin(np.arange(dense[name]), np.argsort(scores[name], kind="stable")[::-1][:rounded])
        return found

    while cost(keep()) > allowed * (1 + 1e-9):
        free = [
            name
            for name, width in left.items()
            if width - 1 >= max(1, limits["min_width"])
            and dense[name] - width + 1 <= limits["max_amount"] * dense[name] + 1e-9
        ]
        if not free:
            return None
        if scope == "global":
            lowest = min(free, key=lambda name: np.sort(scores[name])[dense[name] - left[name]])
        else:
            lowest = min(free, key=lambda name: (dense[name] - left[name] + 1) / dense[name])
        left[lowest] -= 1
    return keep()


@settings(deadline=None, max_examples=40)
@given(
    stages=architectures(most=3),
    amount=st.floats(0, 0.95),
    target=st.sampled_from(["filters", "params", "flops"]),
    scope=st.sampled_from(["layer", "global"]),
    limits=LIMITS,
    seed=st.integers(0, 9),
)
def test_plans_are_those_of_one_unit_after_another(stages, amount, target, scope, limits, seed):
    """Every plan is what taking unit by unit ends at: the budget is reached within one unit, inside all limits."""
    if target == "filters" and scope == "layer":
        return  # each layer's own share: see above
    model = build(stages)
    structure = find_structure(trace(model, INPUTS))
    if not structure.groups or any(group.channels > 1 for group in structure.groups.values()):
        return  # limits count channels, and steps of several of them are made up for: see test_steps.py
    random = np.random.default_rng(seed)
    scores = {name: random.permutation(group.width) + random.random() for name, group in structure.groups.items()}
    whole = measure(model, structure, {})

    def cost(keep):
        if target == "filters":
            return sum(int(stays.sum()) for stays in keep.values())
        return getattr(measure(model, structure, keep), target)

    dense = Dense({name: group.width for name, group in structure.groups.items()}, whole)
    total = cost({name: np.ones(width, dtype=bool) for name, width in dense.widths.items()})
    allowed = total - math.ceil(amount * total - 1e-9) if target == "filters" else (1 - amount) * total
    expected = one_by_one(structure, scores, allowed, cost, scope, limits)
    arguments = {
        "dense": dense,
        "footprint": lambda keep: measure(model, structure, keep),
    }
    tensors = {name: torch.from_numpy(score) for name, score in scores.items()}
    if expected is None:
        with pytest.raises(PruningError, match="cannot go"):
            select_units(structure, tensors, amount, Budget(target, scope, **limits), **arguments)
    else:
        keep = select_units(structure, tensors, amount, Budget(target, scope, **limits), **arguments)
        assert {name: stays.tolist() for name, stays in keep.items()} == {
            name: stays.tolist() for name, stays in expected.items()
        }


@given(amount=st.floats(0, 1, exclude_max=True), limits=LIMITS, by_group=st.booleans())
def test_each_layers_share_stops_at_its_limits(amount, limits, by_group):
    """Amounts of each layer's filters take what the limits let go and no more."""
    keep = planned({"0": amount, "2": amount} if by_group else amount, **limits)
    for name, dense in (("0", 8), ("2", 12)):
        asked = dense - math.ceil(amount * dense - 1e-9)
        least = max(1, limits["min_width"], dense - math.floor(limits["max_amount"] * dense + 1e-9))
        rounded = -(-max(asked, least) // limits["round_to"]) * limits["round_to"]
        assert int(keep[name].sum()) == min(dense, rounded)


def test_limits_by_pattern():
    """Limits may go by pattern of module paths: the strictest of those that name a layer holds; unknown names fail."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    x = torch.ones(1, 6)
    slim = copy.deepcopy(model)
    report = prune_filters(slim, x, 0.9, min_width={"*": 2, "2": 5}, max_amount={"0": 0.5, "4": 0.5})
    assert {width.name: width.after for width in report.groups} == {"0": 4, "2": 5}
    with pytest.raises(ValueError, match=r"min_width\['3'\] names no module that produces channels"):
        prune_filters(copy.deepcopy(model), x, 0.5, min_width={"3": 2})


@settings(deadline=None, max_examples=15)
@given(stages=architectures(most=3), amount=st.floats(0, 0.8), target=st.sampled_from(["params", "flops"]))
def test_what_is_counted_after_the_cut_is_within_the_budget(stages, amount, target):
    """What is counted anew on the slim model keeps the budget that was planned from the groups."""
    model = build(stages)
    try:
        report = prune_filters(model, INPUTS, amount, criterion="random", target=target, scope="global")
    except PruningError:  # beyond what can go: see above
        return
    counted = {"params": sum(p.numel() for p in model.parameters()), "flops": count_flops(model, INPUTS).total}
    before = {"params": report.params_before, "flops": report.flops_before}
    assert counted[target] <= (1 - amount) * before[target] * (1 + 1e-9)


@pytest.mark.parametrize("target", ["params", "flops"])
def test_scores_per_saving_are_divided_by_what_a_cut_unit_saves(target):
    """Each score is divided by the parameters or multiply-adds that are gone, as counted, once one unit was cut out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    image = torch.zeros(1, 3, 9, 9)
    structure = find_structure(trace(model, image))
    scores = {"0": torch.rand(4), "2": torch.rand(6)}
    saved = saved_by_one_unit(model, structure)
    found = per_saving(scores, saved, target)
    for name, width in (("0", 4), ("2", 6)):
        report = prune_filters(copy.deepcopy(model), image, {name: 1 / width})
        saved = getattr(report, f"{target}_before") - getattr(report, f"{target}_after")
        torch.testing.assert_close(found[name], scores[name] / saved)
    assert per_saving(scores, saved, "filters") is scores


@settings(deadline=None, max_examples=30)
@given(stages=architectures(most=4))
def test_what_one_unit_saves_is_what_the_whole_model_then_costs_less(stages):
    """Asking each group alone tells what measuring the whole model without one of its units does."""
    model = build(stages)
    structure = find_structure(trace(model, INPUTS))
    whole = measure(model, structure, {})
    for name, saved in saved_by_one_unit(model, structure).items():
        slim = measure(model, structure, {name: np.arange(structure.groups[name].width) > 0})
        assert saved == Footprint(whole.params - slim.params, whole.flops - slim.flops)


def test_units_that_save_nothing_leave_last():
    """A unit that a budget is not helped by scores infinity."""
    found = per_saving(SCORES, {"0": Footprint(0, 0), "2": Footprint(0, 2)}, "flops")
    assert (found["0"] == math.inf).all()
    torch.testing.assert_close(found["2"], SCORES["2"] / 2)


@pytest.mark.parametrize("criterion", ["taylor", "l2"])
def test_losses_are_weighed_by_what_they_save(criterion):
    """Units leave in the order of loss per multiply-add saved where scores are losses, else in that of the scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=3), nn.Flatten(), nn.Linear(32, 1))
    image = torch.randn(4, 2, 9, 9)
    structure = find_structure(trace(model, image))
    data = {"batches": [image], "loss": lambda model, batch: model(batch).square().mean()}
    scores = {name: score.numpy() for name, score in score_units(model, structure, criterion, **data).items()}
    if (
        criterion == "taylor"
    ):  # a unit of the first layer: 49 positions, 4 of the second; a unit of that: 4, and a weight
        scores = {"0": scores["0"] / (49 * 18 + 4 * 9 * 8), "2": scores["2"] / (4 * 9 * 6 + 4)}

    def cost(keep):
        return measure(model, structure, keep).flops

    expected = one_by_one(
        structure, scores, 0.6 * cost({}), cost, "global", {"round_to": 1, "min_width": 1, "max_amount": 1}
    )
    report = prune_filters(model, image, 0.4, criterion=criterion, target="flops", scope="global", **data)
    kept = {"0": report.kept["0.weight"][0], "2": report.kept["2.weight"][0]}
    assert {name: list(units) for name, units in kept.items()} == {
        name: stays.nonzero()[0].tolist() for name, stays in expected.items()
    }
