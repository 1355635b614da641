"""Which weights ``prune_weights`` zeroes, and how many."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune import PruningError, prune_weights
from lightning_prune.pruning.find_weights import find_weights
from lightning_prune.surgery.masks import masks_on


def mlp(*sizes):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


def gone_of(amount, size):
    """As many as are at least the fraction, and never all."""
    return min(size - 1, math.ceil(amount * size - 1e-9))


def zeros(model):
    return {name: int((p == 0).sum()) for name, p in model.named_parameters()}


class Everything(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 7)
        self.free = nn.Parameter(torch.randn(3, 8))


WEIGHTS = {"conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}


@settings(deadline=None, max_examples=30)
@given(amount=st.floats(0, 0.999), scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 99))
def test_exactly_as_many_leave_as_asked(amount, scope, seed):
    """Of all weights together, or of each, as many leave as the amount is at least, the smallest first."""
    torch.manual_seed(seed)
    model = mlp(5, 7, 3)
    before = copy.deepcopy(model)
    report = prune_weights(model, amount, scope=scope)
    sizes = {"0.weight": 35, "1.weight": 21}
    gone = {name: int((~stays).sum()) for name, stays in report.kept.items()}
    if scope == "global":
        assert sum(gone.values()) == gone_of(amount, 56)
    else:
        assert gone == {name: gone_of(amount, size) for name, size in sizes.items()}
    pools = [list(sizes)] if scope == "global" else [[name] for name in sizes]
    for pool in pools:
        old = torch.cat([before.get_parameter(name).detach().abs()[report.kept[name]] for name in pool])
        left = torch.cat([before.get_parameter(name).detach().abs()[~report.kept[name]] for name in pool])
        assert not len(old) or not len(left) or old.min() >= left.max()
    for name, stays in report.kept.items():
        assert torch.equal(model.get_parameter(name), before.get_parameter(name) * stays)
    assert report.reached == pytest.approx(sum(gone.values()) / 56)


def test_ties_leave_by_index():
    """Of equal weights the first leave, exactly as many as asked."""
    model = nn.Linear(4, 2, bias=False)
    nn.init.constant_(model.weight, 0.3)
    prune_weights(model, 0.375, scope="global")
    assert model.weight.flatten().tolist() == pytest.approx([0, 0, 0, 0.3, 0.3, 0.3, 0.3, 0.3])


@settings(deadline=None, max_examples=20)
@given(amounts=st.lists(st.floats(0, 0.99), min_size=2, max_size=4), scope=st.sampled_from(["global", "layer"]))
def test_amounts_do_not_compound(amounts, scope):
    """A larger amount later is still of all there was; what has gone stays so, whatever the others become."""
    model = mlp(5, 7, 3)
    gone = {}
    for amount in sorted(amounts):
        keep = prune_weights(model, amount, scope=scope).kept
        assert all(not (keep[name] & where).any() for name, where in gone.items())
        gone = {name: ~stays for name, stays in keep.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            for name, stays in keep.items():
                model.get_parameter(name).mul_(stays)  # as hold_masks does in training
    total = sum(int(where.sum()) for where in gone.values())
    expected = [gone_of(max(amounts), size) for size in ([56] if scope == "global" else [35, 21])]
    assert total == sum(expected)


def test_no_number_is_smallest_and_no_mask_lifts():
    """NaN and infinities leave in the order of scores, and never in place of what has gone."""
    model = nn.Linear(8, 1, bias=False)
    prune_weights(model, 0.5, scope="global")
    gone = ~masks_on(model)["weight"]
    with torch.no_grad():
        model.weight[~gone] = torch.tensor([torch.nan, torch.inf, 1.0, 2.0])
    keep = prune_weights(model, 0.625, scope="global").kept["weight"]
    assert int((~keep).sum()) == 5 and not (keep & gone).any()
    assert not model.weight.isnan().any()


def test_default_weights():
    """Weights of linear, convolutional and attention layers; biases, norms, embeddings and other parameters stay."""
    model = Everything()
    assert find_weights(model).found.keys() == WEIGHTS
    prune_weights(model, 0.5, scope="layer")
    found = {name for name, count in zeros(model).items() if count and not name.endswith("bias")}
    assert found == WEIGHTS
    assert not (model.norm.bias.detach() != 0).any()  # as torch makes them


def test_named_parameters():
    """Patterns of modules mean their usual weights; patterns of parameters mean any, embeddings and biases, too."""
    names = {"conv": {"conv.weight"}, "attention": {"attention.in_proj_weight", "attention.out_proj.weight"},
             "*.bias": {"conv.bias", "up.bias", "norm.bias", "attention.out_proj.bias", "head.bias"},
             "embedding.weight": {"embedding.weight"}, "free": {"free"}, "*": WEIGHTS}  # fmt: skip
    for pattern, expected in names.items():
        assert find_weights(Everything(), [pattern]).found.keys() == expected, pattern
    assert find_weights(Everything(), None, ["*.weight"]).found.keys() == {"attention.in_proj_weight"}


def test_what_is_tied_to_an_embedding_stays():
    """A head that shares its weight with the embedding stays dense, and the report says why; unless it is named."""
    model = Everything()
    model.head.weight = model.embedding.weight
    report = prune_weights(model, 0.5, scope="global")
    assert report.kept.keys() == WEIGHTS - {"head.weight"}
    assert {pin.tensor: pin.reason for pin in report.pinned} == {
        "head.weight": "it is tied to an embedding",
        "free": "it is no weight of a linear or convolutional layer",
    }
    assert find_weights(model, ["embedding.weight"]).found.keys() == {"embedding.weight"}


def test_what_is_made_of_other_parameters_stays():
    """The weight of a parametrized layer stays, and the report says why."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    report = prune_weights(model, 0.5, scope="global")
    assert report.kept.keys() == {"1.weight"}
    assert {pin.tensor: pin.reason for pin in report.pinned} == {"0.weight": "it is made of other parameters"}


def test_amounts_by_pattern():
    """Each pattern's amount is of each weight it names; what none names stays; an exact name goes before a pattern."""
    model = mlp(10, 10, 10, 10)
    report = prune_weights(model, {"*": 0.5, "2": 0.9, "1.weight": 0.1})
    assert [(name, size - stays) for name, size, stays in report.groups] == [
        ("0.weight", 50), ("1.weight", 10), ("2.weight", 90),
    ]  # fmt: skip
    model = mlp(10, 10, 10)
    assert [count.name for count in prune_weights(model, {"1": 0.3}).groups] == ["1.weight"]
    assert zeros(model)["0.weight"] == 0


def groups_of_four(weight):
    """The neighbours that hardware multiplies together: a convolution as (out, height, width, in), cut into fours."""
    return weight.detach().permute(0, *range(2, weight.dim()), 1).reshape(-1, 4)


@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 6), nn.Conv2d(8, 5, 3), nn.Conv1d(16, 4, 3, groups=2)], ids=["linear", "conv2d", "groups"]
)
@pytest.mark.parametrize("pattern, left", [("2:4", 2), ("1:4", 1), ("3:4", 3)])
def test_n_of_m(layer, pattern, left):
    """Of every four neighbouring inputs as many are left as the pattern says, and they are the largest."""
    layer = copy.deepcopy(layer)
    before = groups_of_four(layer.weight).abs()
    report = prune_weights(layer, pattern=pattern)
    after = groups_of_four(layer.weight)
    assert (after.count_nonzero(dim=1) == left).all()
    assert torch.equal(after.abs().sort(dim=1).values[:, -left:], before.sort(dim=1).values[:, -left:])
    assert report.reached == 1 - left / 4


def test_n_of_m_of_transposed_convolutions():
    """The inputs of a transposed convolution lie along its first dimension."""
    layer = nn.ConvTranspose2d(8, 3, 2)
    prune_weights(layer, pattern="2:4")
    assert (layer.weight.detach().movedim(0, -1).reshape(-1, 4).count_nonzero(dim=1) == 2).all()


def test_n_of_m_where_groups_do_not_fit():
    """A weight whose inputs are no multiple of M stays dense, and the report says so; if all do, that is refused."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    report = prune_weights(model, pattern="2:4")
    assert report.kept.keys() == {"2.weight"}
    assert {pin.tensor: pin.reason for pin in report.pinned} == {
        "0.weight": "its 3 inputs are no multiple of 4", "1.weight": "its 1 inputs are no multiple of 4",
    }  # fmt: skip
    vectors = prune_weights(model, pattern="2:4", parameters=["2.*"])
    assert vectors.kept.keys() == {"2.weight"} and "2.bias" in {pin.tensor for pin in vectors.pinned}
    with pytest.raises(PruningError, match="no weight has a number of inputs that is a multiple of 4"):
        prune_weights(model[:1], pattern="2:4")


def test_n_of_m_never_lifts_a_mask():
    """What has gone before a pattern is asked for does not come back with it."""
    model = nn.Linear(8, 4)
    first = prune_weights(model, 0.75, scope="global").kept["weight"]
    second = prune_weights(model, pattern="2:4").kept["weight"]
    assert not (second & ~first).any()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_any_criterion(pattern):
    """A function of the user's says what stays, of single weights as of neighbours."""
    model = nn.Linear(4, 1, bias=False)
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    prune_weights(model, None if pattern else 0.5, criterion=lambda weight: scores, pattern=pattern)
    assert (model.weight != 0).tolist() == [[True, False, True, False]]
    with pytest.raises(ValueError, match=r"weight of shape \(1, 4\) got scores of shape \(1,\)"):
        prune_weights(model, 0.5, criterion=lambda weight: weight.sum(dim=1), scope="global")


def test_random_weights_are_those_of_the_seed():
    """The random criterion depends on the seed and leaves the global generator alone."""
    found = []
    for seed in (0, 0, 1):
        model = mlp(8, 8)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(prune_weights(model, 0.5, criterion="random", scope="global").kept["0.weight"])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


REFUSED = {
    "percent": ({"amount": 30.0}, ValueError, r"amount=30.0\): .* Write 0.3 to remove 30 %"),
    "whole": ({"amount": 1.0}, ValueError, r"must lie in \[0, 1\)"),
    "kind": ({"amount": "half"}, TypeError, "amount is a fraction"),
    "by pattern": ({"amount": {"0": -0.1}}, ValueError, "'0': -0.1"),
    "both": ({"amount": 0.5, "pattern": "2:4"}, ValueError, "Give one of both"),
    "pattern": ({"pattern": "4:2"}, ValueError, "prune_weights: pattern='4:2'"),
    "scope": ({"scope": "local"}, ValueError, "scope='local'.*'layer', 'global'"),
    "criterion": ({"criterion": "size"}, ValueError, "criterion='size'.*'magnitude', 'random'"),
    "twice": ({"amount": {"0": 0.5}, "parameters": ["0"]}, ValueError, "amounts by pattern name the parameters"),
    "text": ({"parameters": "0"}, TypeError, r"pass a list of patterns, \['0'\]"),
    "unknown parameter": ({"parameters": ["encoder.weight"]}, ValueError, "'encoder.weight' names no"),
    "unknown ignored": ({"ignore": ["encoder"]}, ValueError, "ignore: 'encoder' names no"),
    "unknown amount": ({"amount": {"encoder": 0.5}}, ValueError, "amount: 'encoder' names no"),
    "contradiction": ({"amount": {"*.weight": 0.5, "0.*": 0.6}}, ValueError, "asks for 0.5 and '0.*' for 0.6"),
    "nothing": ({"ignore": ["0", "1"]}, PruningError, "Nothing is left to prune in Sequential"),
}


@pytest.mark.parametrize("arguments, kind, match", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(arguments, kind, match):
    """Arguments are refused with the value found, and the model stays as it was."""
    model = mlp(4, 4, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=match):
        prune_weights(model, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_without_a_shape_are_refused():
    """A lazy layer that has not run has no weights to choose from."""
    with pytest.raises(PruningError, match=r"0.weight gets its shape only at the first forward pass"):
        prune_weights(nn.Sequential(nn.LazyLinear(4)), 0.5, scope="global")


# Weights of other layers


def conv1d(inputs, outputs):
    """Return a linear layer whose weight is ``(in, out)``, by the name under which transformers has it."""
    made = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})()
    made.weight, made.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))
    return made


def test_parameters_that_were_not_considered_are_named():
    """An LSTM's weights stay, the report names them, and a warning says how much of the model they are."""
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 16), "head": nn.Linear(16, 2), "embedding": nn.Embedding(9, 8)})
    size = sum(parameter.numel() for parameter in model.parameters())
    held = 4 * 16 * (8 + 16) / size
    with pytest.warns(UserWarning, match=f"{held:.0%} of the parameters.*lstm.weight_ih_l0, lstm.weight_hh_l0"):
        report = prune_weights(model, 0.5)
    assert {pin.tensor for pin in report.pinned} == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "embedding.weight"}
    for more in ({"ignore": ["lstm"]}, {"parameters": ["lstm", "head"]}, {"module": "head"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = prune_weights(model, 0.5, **more)
        assert "lstm.weight_ih_l0" not in {pin.tensor for pin in report.pinned}
    assert int((model["lstm"].weight_ih_l0 == 0).sum()) == 4 * 16 * 8 // 2


def test_n_of_m_along_inputs_wherever_they_lie():
    """Two of every four inputs of an ``(in, out)`` weight stay; where no module tells which are inputs, it is dense."""
    model = nn.Sequential(conv1d(16, 10), nn.Linear(8, 8))
    model.free = nn.Parameter(torch.randn(8, 12))
    report = prune_weights(model, pattern="2:4", parameters=["0", "1", "free"])
    groups = model[0].weight.detach().mT.reshape(10, 4, 4)
    assert ((groups != 0).sum(dim=-1) == 2).all() and bool(model.free.all())
    assert "free" in {pin.tensor for pin in report.pinned}
    prune_weights(model, 0.5)
    assert report.kept["0.weight"].shape == (16, 10)
