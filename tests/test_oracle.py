"""The oracle against brute force, and how criteria are set beside it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError
from lightning_prune.analysis.criterion_comparison import compare_criteria, correlate, oracle
from lightning_prune.model.calls import run
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery import cut_, draft
from tests.models import NETS
from tests.runs import IMAGE, Net, images

# Networks whose numbers do not change when a unit leaves but through what reads it
NETWORKS = (
    "plain mlp flatten grouped many_groups shuffle Projection Concat Padded Shared transposed Bare Bilinear".split()
)


def loss(model, batch):
    return run(model, batch).sin().square().mean()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(seed=0):
    """A small network that has learned its noisy images, in eval mode, and batches of them."""
    torch.manual_seed(seed)
    model, data = Net(dropout=0.0), images(96).tensors
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model.eval(), list(zip(data[0].split(32), data[1].split(32), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_oracle_is_what_a_real_cut_of_one_unit_does(name):
    """For every unit, the oracle's figure is the change of the loss when that unit alone is cut out of a copy."""
    torch.manual_seed(0)
    model, inputs = NETS[name].build().double().eval(), NETS[name].inputs
    structure = find_structure(trace(model, inputs))
    batches = [inputs, tuple(x + 0.5 for x in inputs) if isinstance(inputs, tuple) else inputs + 0.5]
    found = oracle(model, structure, batches, loss)
    whole = sum(loss(model, batch) for batch in batches) / 2
    for group in structure.groups.values():
        assert found[group.name].shape == (group.width,)
        for unit in range(group.width):
            keep = torch.ones(group.width, dtype=torch.bool).numpy()
            keep[unit] = False
            slim = copy.deepcopy(model)
            cut = draft(slim, structure, {group.name: keep})
            cut_(slim, cut, cut.tensors(slim), [])
            left = sum(loss(slim, batch) for batch in batches) / 2
            torch.testing.assert_close(found[group.name][unit], (left - whole).abs().detach(), atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("fails", [False, True], ids=["ends-well", "loss-raises"])
def test_oracle_leaves_the_model_bit_for_bit(fails):
    """Weights, gradients, statistics, modes and random numbers are as before, also when the loss raises half-way."""
    model, inputs = NETS["Projection"].build().double(), NETS["Projection"].inputs
    structure = find_structure(trace(model, inputs))
    model.conv1.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, calls = copy.deepcopy(model), []

    def watched(model, batch):
        calls.append(None)
        if fails and len(calls) == 7:
            raise ZeroDivisionError
        return loss(model, batch) + 0 * torch.rand(())

    state = torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            oracle(model, structure, [inputs], watched)
    else:
        oracle(model, structure, [inputs], watched)
        assert len(calls) == 1 + 4 + 5 + 6
    assert torch.equal(torch.get_rng_state(), state)
    for p, was in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, was) and torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_correlation_with_itself_and_its_reverse():
    """Equal orders correlate with 1, reversed ones with -1, whatever the scale."""
    truth = {"a": torch.tensor([0.1, 0.4, 0.2, 0.9]), "b": torch.tensor([1.5, 1.2, 3.0])}
    same = correlate({name: value.exp() for name, value in truth.items()}, truth)
    reverse = correlate({name: -value for name, value in truth.items()}, truth)
    assert (same.per_layer, same.all_layers) == pytest.approx((1, 1), abs=1e-5)
    assert (reverse.per_layer, reverse.all_layers) == pytest.approx((-1, -1), abs=1e-5)


def test_correlation_by_hand():
    """Layers are averaged; all units together are ranked as they come, and with each layer divided by its l2 norm."""
    truth = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
    found = correlate({"a": torch.tensor([300.0, 600.0, 900.0]), "b": torch.tensor([6.0, 5.0, 4.0])}, truth)
    assert found.per_layer == pytest.approx(0, abs=1e-5)
    # 1 - 6 sum d^2 / (n (n^2 - 1)); ranks 4 5 6 3 2 1, then 1 3 6 5 4 2 of .27 .53 .80 .68 .57 .46
    assert found.all_layers == pytest.approx(1 - 6 * (9 + 9 + 9 + 1 + 9 + 25) / 210, abs=1e-5)
    assert found.all_layers_l2 == pytest.approx(1 - 6 * (0 + 1 + 9 + 1 + 1 + 16) / 210, abs=1e-5)


def test_ties_share_their_rank():
    """Scores that tie share their mean rank; where all tie, nothing is foretold."""
    truth = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    half = correlate({"a": torch.tensor([0.0, 0.0, 1.0, 1.0])}, truth)
    assert half.per_layer == pytest.approx(2 / 5**0.5, abs=1e-5)  # Pearson's of ranks 1.5 1.5 3.5 3.5
    flat = correlate({"a": torch.ones(4)}, truth)
    assert (flat.per_layer, flat.all_layers, flat.all_layers_l2) == (0, 0, 0)


def test_criteria_side_by_side():
    """On a trained network, expanding the loss foretells the oracle well, and chance does not; nothing is changed."""
    model, batches = trained()
    before = copy.deepcopy(model)
    names = ["taylor_activations", "taylor", "l1", "random"]
    found = compare_criteria(model, IMAGE, batches=batches, loss=cross_entropy, criteria=names, progress=False)
    assert list(found) == names
    assert found["taylor_activations"].all_layers_l2 > 0.6 > 0.5 > abs(found["random"].all_layers_l2)
    assert found["taylor_activations"].per_layer > found["random"].per_layer
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    "batches, names, told", [([None], ["l1", "best"], "'best'.*choose of 'l1'"), ([], ["l1"], "no batch came")]
)
def test_what_cannot_be_compared_is_refused_before_units_are_silenced(batches, names, told):
    """Unknown criteria and missing data are refused before the oracle runs over the batches."""
    with pytest.raises((ValueError, PruningError), match=told):
        compare_criteria(
            nn.Linear(2, 2), torch.zeros(1, 2), batches=batches, loss=cross_entropy, criteria=names, progress=False
        )


def test_ignored_layers_are_left_out():
    """What ignore= names is not silenced, and where nothing is left, that is said."""
    model, batches = trained()
    calls = []

    def counted(model, batch):
        calls.append(None)
        return cross_entropy(model, batch)

    compare_criteria(
        model, IMAGE, batches=batches[:1], loss=counted, criteria=["l1"], ignore=["first", "hidden"], progress=False
    )
    assert len(calls) == 1 + 6
    with pytest.raises(PruningError, match="Nothing is left to prune"):
        compare_criteria(
            model, IMAGE, batches=batches, loss=cross_entropy, ignore=["first", "second", "hidden"], progress=False
        )
    with pytest.raises(ValueError, match="names no module"):
        compare_criteria(model, IMAGE, batches=batches, loss=cross_entropy, ignore=["third"], progress=False)


def test_a_unit_without_readers_is_silenced_where_it_is_made():
    """Where nothing sums over a group, what makes it is silenced."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    inputs = torch.randn(5, 4, dtype=torch.float64)
    structure = find_structure(trace(model, inputs))
    group = structure.groups["0"]
    made = tuple(slot for slot in group.slots if slot.role != "consumer")
    structure.groups["0"] = type(group)(group.name, group.width, made, group.changes_statistics)
    found = oracle(model, structure, [inputs], loss)["0"]
    assert (found > 0).all()
