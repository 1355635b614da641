"""Parameters that modules hold outside of their registry, too: in lists, dicts and attributes that hide them."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import PruningError, prune_filters
from tests.cases import difference, outputs, rows, silenced
from tests.cases_written import network

# How a module holds its weight self.b.weight a second time, and how its code finds it there.
HOLDERS = {
    "a list": ("self.held = [self.b.weight]", "self.held[0]"),
    "a tuple": ("self.held = (3, self.b.weight)", "self.held[1]"),
    "a dict": ("self.held = {'w': self.b.weight}", "self.held['w']"),
    "a list of tuples": ("self.held = [(self.b.weight, self.b.bias)]", "self.held[0][0]"),
    "a dict of lists": ("self.held = {'w': [None, self.b.weight]}", "self.held['w'][1]"),
    "an attribute": ("object.__setattr__(self, 'held', self.b.weight)", "self.held"),
    "another module's list": ("self.o.held = [self.b.weight]", "self.o.held[0]"),
}
STALE = {
    "its values": ("self.held = [self.b.weight.data]", "self.held[0]"),
    "a view": ("self.held = self.b.weight.data.view(12, 16)", "self.held"),
    "a copy": ("self.held = [self.b.weight.detach().clone()]", "self.held[0]"),
    "a buffer of the model": ("self.register_buffer('w', torch.randn(12, 16)); self.held = [self.w]", "self.held[0]"),
}


def built(field, read):
    """Return a network in which a weight is read from where else it is held."""
    fields = ["self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)", field]
    body = ["y = self.b(self.a(x).relu())", f"return self.o(y + F.linear(self.a(x).tanh(), {read}))"]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # from the beginning: a change of type would leave what is held as it was
    try:
        torch.manual_seed(0)
        return network(fields, body)().eval()
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize("name", HOLDERS)
def test_a_held_parameter_is_cut_where_it_is_held(name):
    """A parameter stays the same object in a cut, so that whatever holds it sees what is left of it."""
    model = built(*HOLDERS[name])
    full = built(*HOLDERS[name])
    kept = prune_filters(model, rows().double(), 0.5, progress=False).kept
    assert model.a.out_features == 8
    assert model.b.out_features == 6
    inputs = rows(seed=1).double()
    expected = outputs(silenced(full, kept), inputs, {}, False)
    assert difference(expected, outputs(model, inputs, {}, False)) < 1e-9


@pytest.mark.parametrize("name", STALE)
def test_what_a_cut_does_not_reach_keeps_its_channels(name):
    """Values, views and copies of a tensor would stay as they are: channels that meet them are not pruned."""
    model = built(*STALE[name])
    before = [tuple(parameter.shape) for parameter in model.parameters()]
    found = model(rows().double())
    try:
        kept = prune_filters(model, rows().double(), 0.5, progress=False).kept
    except PruningError:
        kept = {}
    assert not kept or "a.weight" not in kept
    if not kept:
        assert [tuple(parameter.shape) for parameter in model.parameters()] == before
        assert torch.equal(model(rows().double()), found)


def test_recurrent_layers_and_copies_hold_their_own():
    """A deep copy holds copies, which are cut with the copy alone."""
    model = built(*HOLDERS["a list"])
    other = copy.deepcopy(model)
    prune_filters(other, rows().double(), 0.5, progress=False)
    assert other.held[0] is other.b.weight
    assert model.held[0].shape == (12, 16)
    assert isinstance(model.b, nn.Linear)
