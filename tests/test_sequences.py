"""Attention and recurrent networks: heads and hidden units leave whole, and the numbers in the code follow."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_prune.pruning.filters import prune_filters
from lightning_prune.structure import find_structure, trace
from tests.architectures import randomised
from tests.sequences import ATTENTION, HEAD, HEADS, RECURRENT, TOKENS, WIDTH
from tests.silencing import assert_equal_to_rounding, silenced


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_are_units(name):
    """However attention is written, a head with its rows of q, k and v and its columns of the output is one unit."""
    case = ATTENTION[name]
    structure = find_structure(trace(case.build(), TOKENS))
    assert {path: group.width for path, group in structure.groups.items() if path in case.heads} == case.heads
    linked = {group for link in structure.links for group in link}
    assert case.heads.keys() <= linked if case.tied else not linked


@pytest.mark.parametrize("name", ATTENTION)
def test_half_the_heads_leave(name):
    """Half the heads leave, attributes follow, and the slim model gives outputs of the same shape."""
    case = ATTENTION[name]
    model = case.build()
    shape = model(TOKENS).shape
    report = prune_filters(model, TOKENS, 0.5)
    after = {group.name: group.after for group in report.groups}
    assert {path: after[path] for path in case.heads} == {path: heads // 2 for path, heads in case.heads.items()}
    assert model(TOKENS).shape == shape
    for module in model.modules():
        assert getattr(module, "num_heads", HEADS // 2) == HEADS // 2
        if isinstance(module, nn.MultiheadAttention):
            assert module.embed_dim == module.kdim == module.vdim == module.out_proj.in_features == WIDTH // 2
            assert module.in_proj_weight.shape == (3 * WIDTH // 2, WIDTH // 2) and module.head_dim == HEAD


@pytest.mark.parametrize("name", [name for name, case in ATTENTION.items() if not case.tied])
def test_removing_heads_is_silencing_them(name):
    """Without some heads, attention computes what it does when nothing reads those heads."""
    case = ATTENTION[name]
    model = case.build()
    full = copy.deepcopy(model)
    report = prune_filters(model, TOKENS, dict.fromkeys(case.heads, 0.5))
    assert report.kept
    with torch.no_grad():
        assert_equal_to_rounding(model(TOKENS), silenced(full, report.kept)(TOKENS), 1e-10)


def test_a_cut_transformer_of_torch_is_one_built_that_small():
    """A cut encoder computes what an encoder of its width and heads computes with its weights."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    model = randomised(nn.Sequential(nn.Linear(5, WIDTH), nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 3)))
    prune_filters(model, TOKENS, 0.5)
    layer = nn.TransformerEncoderLayer(WIDTH // 2, HEADS // 2, 16, batch_first=True)
    twin = nn.Sequential(nn.Linear(5, WIDTH // 2), nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH // 2, 3))
    twin.double().eval().load_state_dict(model.state_dict())
    for mode in (torch.no_grad(), torch.enable_grad()):  # with the fast path and without
        with mode:
            assert_equal_to_rounding(model(TOKENS), twin(TOKENS))


def test_linked_groups_keep_one_share():
    """Heads and the stream that their width derives from keep the same share, the largest within the amount."""
    model = ATTENTION["derived"].build()
    report = prune_filters(model, TOKENS, 0.3, scope="global")
    shares = {group.after / group.before for group in report.groups if group.before in (HEADS, WIDTH)}
    assert len(shares) == 1 and shares < {0.25, 0.5, 0.75}


class Experts(nn.Module):
    """Each token goes to one of four experts, which the data chooses."""

    def __init__(self):
        super().__init__()
        self.enter, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)) for _ in range(4))

    def forward(self, x):
        chosen = x[:, 0, 0].gt(0).long() if len(x) < 3 else torch.arange(4)
        x = self.enter(x)
        return self.out(x + sum(self.experts[i](x) for i in chosen.unique()))


def test_experts_that_did_not_run_are_cut_like_those_that_did():
    """A mixture of experts runs on data that comes to experts whom the example inputs did not come to."""
    model = randomised(Experts())
    report = prune_filters(model, TOKENS, 0.5)
    assert {group.name: group.after for group in report.groups}["enter"] == WIDTH // 2
    assert model(torch.randn(4, 7, 5, dtype=torch.float64)).shape == (4, 7, 3)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("amount", [0.3, 0.95])
def test_removing_hidden_units_is_silencing_them(name, amount):
    """The slim recurrent network computes what the full one does when nothing reads the units that are gone."""
    model = randomised(RECURRENT[name]())
    full = copy.deepcopy(model)
    report = prune_filters(model, TOKENS, amount)
    hidden = next(group for group in report.groups if group.before == 12)
    assert hidden.after == max(1, 12 - math.ceil(12 * amount))
    with torch.no_grad():
        assert_equal_to_rounding(model(TOKENS), silenced(full, report.kept)(TOKENS), 1e-10)


@pytest.mark.parametrize("name", [name for name in RECURRENT if "cell" not in name])
def test_a_cut_recurrent_layer_is_one_built_that_small(name):
    """Sizes, projection and flat weights of a cut layer are those of a new one that takes its state dict."""
    model = randomised(RECURRENT[name]())
    prune_filters(model, TOKENS, 0.5)
    cut = model.rnn
    sizes = {n: getattr(cut, n) for n in ("num_layers", "batch_first", "bidirectional")}
    sizes |= {"proj_size": cut.proj_size} if cut.proj_size else {}
    sizes |= {"nonlinearity": cut.nonlinearity} if isinstance(cut, nn.RNN) else {}
    twin = type(cut)(cut.input_size, cut.hidden_size, **sizes).double()
    twin.load_state_dict(cut.state_dict())
    x = torch.randn(2, 7, cut.input_size, dtype=torch.float64)
    assert_equal_to_rounding(cut(x)[0], twin(x)[0])
    assert all(a is b for a, b in zip(cut._flat_weights, cut.parameters(), strict=True))
