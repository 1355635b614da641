"""Buffers that state dicts do not have are cut, and cut again in every model that a state dict is loaded into."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune import Prunable, PruningError, load_sparse_, load_state_dict_, prune_filters, save_sparse
from lightning_prune.surgery import restore_, take_snapshot
from lightning_prune.surgery.loading import recipe_json, slim_loading


class Positions(Prunable, nn.Module):
    def __init__(self, length=9, width=16):
        super().__init__()
        self.a, self.o = nn.Linear(8, width), nn.Linear(width, 5)
        self.register_buffer("table", torch.arange(float(length * width)).view(1, length, width), persistent=False)

    def forward(self, x):
        return self.o((self.a(x) + self.table[:, : x.shape[1]].cos()).relu())


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Positions()

    def forward(self, x):
        return self.inner(x)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def by_json(model, source, path):
    load_state_dict_(model, dict(source.state_dict()), recipe=recipe_json(source))


def by_file(model, source, path):
    save_sparse(source, path)
    load_sparse_(model, path)


def by_torch(model, source, path):
    torch.save(source.state_dict(), path)
    load_state_dict_(model, torch.load(path, weights_only=True))


def by_other_code(model, source, path):
    with slim_loading():
        model.load_state_dict(source.state_dict())


LOADERS = [by_json, by_file, by_torch, by_other_code, lambda m, s, _: load_state_dict_(m, s.state_dict())]


@pytest.fixture(params=[Positions, Holder])
def stages(request):
    """Models of the same class: dense, pruned, and pruned again."""
    torch.manual_seed(0)
    found = [request.param()]
    for amount in (0.25, 0.5):
        found.append(copy.deepcopy(found[-1]))
        prune_filters(found[-1], X, amount, progress=False)
    return found


@pytest.mark.parametrize("load", LOADERS)
def test_a_model_loads_any_other_stage(stages, load, tmp_path):
    """A dense, a slim and a fatter model compute after loading what the model does that was saved."""
    for source in stages[1:]:
        for start in stages:
            model = copy.deepcopy(start)
            load(model, source, tmp_path / "file")
            assert torch.equal(model(X), source(X))


def test_prunable_modules_load_by_themselves(stages):
    """A module that is ``Prunable`` cuts its buffers when it loads what was pruned."""
    slim = stages[-1].inner if isinstance(stages[-1], Holder) else stages[-1]
    model = Positions()
    model.load_state_dict(slim.state_dict())
    assert torch.equal(model(X), slim(X))


def test_snapshots_bring_buffers_back(stages):
    """A model that was rolled back computes, and saves, what it did then."""
    model = stages[-1]
    for before, after in pairwise(stages):
        model = copy.deepcopy(after)
        restore_(model, (), take_snapshot(before, ()))
        fresh = type(before)()
        load_state_dict_(fresh, model.state_dict())
        assert torch.equal(model(X), before(X))
        assert torch.equal(fresh(X), before(X))


def test_buffers_of_other_lengths_are_cut_too():
    """Where the constructor made more positions, the channels are those that were kept."""
    torch.manual_seed(0)
    source = Positions(9)
    kept = prune_filters(source, X, 0.5, progress=False).kept["table"][2]
    model = Positions(20)
    load_state_dict_(model, source.state_dict())
    assert torch.equal(model.table, Positions(20).table[:, :, kept])


def test_buffers_that_were_made_slim_stay():
    """A buffer of the slim size, which the constructor made, is not cut."""
    torch.manual_seed(0)
    source = Positions()
    prune_filters(source, X, 0.5, progress=False)
    model = Positions(width=8)
    load_state_dict_(model, source.state_dict())
    assert torch.equal(model.table, Positions(width=8).table)


@pytest.mark.parametrize(
    "entry",
    [["table", 2, 16, [3, 1]], ["table", 2, 4, [5]], ["table", -1, 16, [1]], [3, 2, 16, [1]], ["table", 2, 16, []]],
)
def test_damaged_entries_are_refused(entry):
    """Indices that no cut leaves raise, and the model stays as it is."""
    torch.manual_seed(0)
    source, model = Positions(), Positions()
    prune_filters(source, X, 0.5, progress=False)
    told = json.loads(recipe_json(source))
    told[""]["buffers"] = [entry]
    with pytest.raises(PruningError, match="cannot be read"):
        load_state_dict_(model, dict(source.state_dict()), recipe=json.dumps(told))
    assert model.a.out_features == 16
