"""What a whole call leaves behind, holds at once, and does not run twice."""

import gc
import sys
import types
import weakref
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune import prune_filters, prune_obs
from lightning_prune.model.calls import walked_once
from lightning_prune.model.object_graph import ObjectGraph
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure import find_structure, named_tensors, trace
from lightning_prune.structure.labels import Ledger, Ran
from lightning_prune.surgery import Disproof, SlimValues, draft, verify
from lightning_prune.surgery.resize import narrowed, taken


def chain():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()


def test_a_call_leaves_nothing_to_collect():
    """What a call traced and copied is gone when it returns, though no collection of garbage has run."""
    prune_filters(chain(), torch.randn(1, 3, 8, 8), progress=False)  # what libraries keep is made by now
    model = chain()
    gc.collect()
    held = traced()  # by other tests
    gc.disable()
    try:
        report = prune_filters(model, torch.randn(1, 3, 8, 8), progress=False)
        left = [value for value in traced() if not any(value is other for other in held)]
    finally:
        gc.enable()
    assert report.groups and not left


def traced():
    return [value for value in gc.get_objects() if type(value) in (Ledger, Ran, ObjectGraph)]


def test_names_follow_tensors_that_are_added_in_a_walk():
    """Inside a walk, tensors that a module gains or that replace others are found."""
    model = chain()
    with walked_once(model):
        assert list(named_tensors(model)) == [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
        model[1].register_buffer("more", torch.ones(2))
        model[0].bias = nn.Parameter(torch.ones(16))
        assert named_tensors(model)["1.more"] is model[1].more
        assert named_tensors(model)["0.bias"] is model[0].bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4), (2, 3, 4, 5)])
def test_indices_are_taken_as_index_select_does(dtype, shape):
    """Along every dimension, in every type and layout, with indices that are repeated too."""
    tensor = (torch.randn(shape) * 10).to(dtype)
    for dim, size in enumerate(shape):
        for given in (tensor, tensor.transpose(0, -1)):
            indices = torch.tensor([size - 1, 0, 0])
            expected = given.index_select(dim if given is tensor else _turned(dim, len(shape)), indices)
            found = taken(given, dim if given is tensor else _turned(dim, len(shape)), indices)
            assert found.dtype is dtype and torch.equal(found, expected)
    assert torch.equal(narrowed(tensor, {0: torch.tensor([1])}), tensor[1:2])


def _turned(dim, rank):
    return {0: rank - 1, rank - 1: 0}.get(dim, dim)


SOURCE = """
import torch
from torch import nn

class StochasticDepth(nn.Module):
    def forward(self, x):
        SEEN.put(self.training)
        if not self.training:
            return x
        return x * torch.empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(0.5).div_(0.5)
"""


def stochastic(module, monkeypatch):
    """Return a class as torchvision has it, in a Python module of this name, and the modes that it ran in."""
    seen = SimpleQueue()  # which is not restored after the runs, as a list would be
    made = types.ModuleType(module)
    made.SEEN = seen
    exec(SOURCE, vars(made))  # functions and classes say that they are of that module
    monkeypatch.setitem(sys.modules, module, made)
    return made.StochasticDepth, seen


@pytest.mark.parametrize(("module", "modes"), [("torchvision.ops.stochastic_depth", 1), ("of_a_user", 3)])
def test_stochastic_depth_is_not_traced_in_train_mode(module, modes, monkeypatch):
    """A known class that scales examples at random runs once; one that may do anything runs in train mode, too."""
    kind, seen = stochastic(module, monkeypatch)
    model = nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 2)).eval()
    structure = find_structure(trace(model, torch.randn(1, 4)))
    assert {name: group.width for name, group in structure.groups.items()} == {"0": 8}
    ran = [seen.get() for _ in range(seen.qsize())]
    assert any(ran) == (module == "of_a_user") and len(ran) < modes + 1


def test_a_known_class_with_another_forward_is_traced_in_train_mode(monkeypatch):
    """What replaces its forward may do anything."""
    kind, seen = stochastic("torchvision.ops.stochastic_depth", monkeypatch)
    own = kind.forward
    kind.forward = lambda self, x: own(self, x) if self.training else x
    trace(nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 2)).eval(), torch.randn(1, 4))
    assert seen.get_nowait()


@pytest.mark.parametrize("value", [float("nan"), 1e-30, 2.0])
def test_small_vectors_are_restored_to_the_last_bit(value):
    """Whatever is written to one of many, by an operator or behind torch's back; the others stay as they are."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).eval()
    model[1].weight.data[0] = float("nan")
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with undisturbed(model):
        model[0].running_mean.fill_(value)
        model[1].bias.detach().numpy()[1] = value
    for name, tensor in model.state_dict().items():
        assert torch.equal(_bytes(tensor), _bytes(before[name])), name


def _bytes(tensor):
    return tensor.view(torch.uint8) if tensor.dim() else tensor


class Held(TorchDispatchMode):
    """Counts the bytes that are held at once of what operators make."""

    def __init__(self, *others):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in others}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, storage, nbytes):
        self.known.discard(storage)
        self.now -= nbytes


def test_second_order_pruning_holds_few_copies_of_a_wide_layer():
    """Its Hessian in double precision, and what solving takes; not the temporaries of products as well."""
    layer, batch = nn.Linear(512, 512), torch.randn(256, 512)
    with Held(batch, *layer.parameters()) as held:
        prune_obs(layer, 0.5, batches=[batch], progress=False)
    assert held.most < 11 * layer.weight.nbytes


@pytest.mark.parametrize("indices", [[3, 1], [-1, 2], [0, 16], [0, 0, 1], [2]])
def test_indices_that_a_cut_would_keep_are_those_of_its_channels(indices):
    """Unsorted, negative, repeated and other indices are refused before anything runs, also where no unit is left."""
    model = chain()
    structure = find_structure(trace(model, torch.randn(1, 3, 8, 8)))
    for count in (0, 2):
        cut = draft(model, structure, {"0": np.arange(16) < count})
        wrong = replace(cut, kept=cut.kept | {"0.bias": {0: torch.tensor(indices)}})
        found = verify(model, structure, wrong, SlimValues(wrong, model))
        assert isinstance(found, Disproof) and found.reason.startswith("0.bias would keep other indices")
