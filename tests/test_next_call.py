"""Modules that keep tensors for their next call: the slim model computes what the full one does in every call."""

import copy

import pytest
import torch

from lightning_prune import PruningError, prune_filters
from tests.cases import difference, outputs, silenced, tokens
from tests.cases_written import network

# What a module keeps of y, (B, T, 16), and where it begins: (lines of the constructor, lines of the forward pass).
MEMORIES = {
    "read from the second call on": (
        "self.kept = None",
        "if self.kept is not None: y = y + self.g(self.kept)\nself.kept = y.mean((0, 1))",
    ),
    "other channels than before": (
        "self.kept = torch.zeros(16, dtype=torch.float64)",
        "y = y + self.g(self.kept)\nself.kept = y.mean((0, 1))",
    ),
    "a list": (
        "self.kept = []",
        "for h in self.kept: y = y + self.g(h)\nself.kept = [*self.kept, y.mean((0, 1))][-2:]",
    ),
    "a list that grows": (
        "self.kept = []",
        "y = y + sum(self.g(h) for h in self.kept)\nself.kept.append(y.mean((0, 1)))",
    ),
    "a dict": (
        "self.kept = {}",
        "y = y + self.g(self.kept.get('h', y.mean((0, 1))))\nself.kept['h'] = y.mean((0, 1)) * 2",
    ),
    "a buffer": (
        "self.register_buffer('kept', torch.zeros(16, dtype=torch.float64))",
        "y = y + self.g(self.kept)\nself.kept = y.mean((0, 1))",
    ),
    "a mean of all calls": (
        "self.kept = None",
        "h = y.mean((0, 1))\nself.kept = h if self.kept is None else (self.kept + h) / 2\ny = self.g(y - self.kept)",
    ),
    "a weight made once": (
        "self.kept = None",
        "if self.kept is None: self.kept = F.normalize(self.g.weight, dim=1)\ny = F.linear(y, self.kept)",
    ),
    "of a submodule": (
        "self.s = nn.Identity()",
        "h = getattr(self.s, 'kept', None)\ny = y if h is None else y + self.g(h)\nself.s.kept = y.mean((0, 1))",
    ),
}
CUT = {"a weight made once", "a mean of all calls", "read from the second call on", "a list", "a buffer", "a dict"}


@pytest.mark.parametrize("name", MEMORIES)
def test_every_call_of_a_slim_model_is_right(name):
    """A number of calls, one after another, give what the model does whose pruned units are silenced."""
    begin, lines = MEMORIES[name]
    fields = ["self.a, self.g, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)", begin]
    torch.manual_seed(0)
    full = network(fields, ["y = self.a(x)", *lines.split("\n"), "return self.o(y)"])().double().eval()
    slim = copy.deepcopy(full)
    kept = {}
    try:
        kept = prune_filters(slim, tokens().double(), 0.5, progress=False).kept
    except PruningError:
        assert name not in CUT
    assert "a.weight" in kept or name not in CUT
    expected = silenced(full, kept)
    for seed in range(3):
        inputs = tokens(seed=seed).double()
        apart = difference(outputs(expected, inputs, {}, False), outputs(slim, inputs, {}, False))
        assert apart < 1e-9, f"call {seed}: {apart}"


def test_a_model_that_must_be_reset_between_calls_is_traced_on_one():
    """What fails when it is called twice is cut as one call tells."""
    fields = ["self.a, self.o, self.kept = nn.Linear(8, 16), nn.Linear(16, 5), None"]
    body = [
        "if self.kept is not None: raise RuntimeError('reset')",
        "self.kept = self.a(x)",
        "return self.o(self.kept)",
    ]
    model = network(fields, body)()
    prune_filters(model, tokens(), 0.5, progress=False)
    assert model.kept is None
    assert model.a.out_features == 8


def test_calls_are_counted_once():
    """The multiply-adds of a model that is traced on two calls are those of one."""
    fields = ["self.a, self.o, self.kept = nn.Linear(8, 16), nn.Linear(16, 5), None"]
    body = ["y = self.a(x)", "if self.kept is not None: y = y + self.kept", "self.kept = y", "return self.o(y)"]
    report = prune_filters(network(fields, body)(), tokens(), 0.5, progress=False)
    assert report.flops_before == 2 * 5 * (8 * 16 + 16 * 5)
