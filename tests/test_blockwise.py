"""Second-order pruning block by block gives what it gives when the whole model runs, with one block at a time."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_prune import prune_obs
from lightning_prune.algorithms.solvers import SOLVERS
from lightning_prune.measure.blocks import find_chain
from lightning_prune.measure.calibration import Calibration
from lightning_prune.model.spool import Spool
from lightning_prune.pruning import blockwise, obs


class Cache:
    """Remembers what its layers were given, so that a second call finds more than the first."""

    def __init__(self):
        self.seen = {}

    def update(self, layer, x):
        self.seen[layer] = self.seen.get(layer, 0) + 1
        return self.seen[layer]


class Block(nn.Module):
    def __init__(self, width, layer, bare=False, log=None):
        super().__init__()
        self.layer, self.bare, self.log = layer, bare, log
        self.mix, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden, scale=None, cache=None):
        number = cache.update(self.layer, hidden)
        if self.log is not None:
            self.log.append(self.layer)
        x = hidden + torch.tanh(self.mix(hidden)) * scale / number
        x = x + self.down(torch.relu(self.up(x)))
        return x if self.bare else (x, number)


class Decoder(nn.Module):
    """Blocks between two other layers, which take a mask and a cache beside what flows.

    With ``bare`` they return one tensor, with ``skips`` a path leads round them, with ``logged`` each reads how many
    ran before it.
    """

    def __init__(self, width=6, depth=3, skips=False, shared=False, bare=False, logged=False):
        super().__init__()
        self.begin, self.end = nn.Linear(5, width), nn.Linear(width, 4)
        self.log = [] if logged else None
        self.blocks = nn.ModuleList([Block(width, layer, bare, self.log) for layer in range(depth)])
        if shared:
            self.blocks[1].mix.weight = self.blocks[0].mix.weight
        self.skips = skips

    def forward(self, x):
        x, cache, first = self.begin(x), Cache(), None
        if self.log is not None:
            self.log.clear()
        scale = torch.linspace(0.5, 1.5, x.shape[1])[:, None]
        for block in self.blocks:
            x = block(x, scale=scale if self.log is None else scale + len(self.log), cache=cache)
            x = x if block.bare else x[0]
            first = x if first is None else first
        return self.end(x + first if self.skips else x)


def note_runs(module, path):
    """Add a byte to a file whenever a module runs: what is written to files, no sandbox takes back."""

    def write(*_):
        with path.open("ab") as file:
            file.write(b".")

    module.register_forward_hook(write)


def made(**how):
    torch.manual_seed(0)
    return Decoder(**how).eval(), [torch.randn(4, 7, 5) for _ in range(3)]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("solver", ["exact", "admm"])
@pytest.mark.parametrize("how", [{}, {"bare": True}, {"bare": True, "logged": True}])
def test_blocks_one_by_one_are_as_the_whole_model(sequential, solver, how, monkeypatch):
    """Weights, masks and errors are those of the way that runs the whole model for every layer."""
    model, batches = made(**how)
    whole = copy.deepcopy(model)
    report = prune_obs(model, 0.5, batches=batches, sequential=sequential, solver=solver, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(obs, "stages_of", lambda surgery, names: None)
        expected = prune_obs(whole, 0.5, batches=batches, sequential=sequential, solver=solver, progress=False)
    assert list(report.kept) == list(expected.kept)
    for name, kept in expected.kept.items():
        assert torch.equal(report.kept[name], kept), name
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(report.details, expected.details, strict=True):
        assert one.name == other.name and one.error == pytest.approx(other.error, rel=1e-3, abs=1e-5)


def test_each_block_runs_by_itself(tmp_path):
    """How often a block runs does not grow with the number of blocks."""
    runs = {}
    for depth in (3, 6):
        model, batches = made(depth=depth)
        note_runs(model.blocks[0], tmp_path / str(depth))
        prune_obs(model, 0.5, batches=batches, sequential=True, progress=False, solver="blocked")
        runs[depth] = (tmp_path / str(depth)).stat().st_size
    assert runs[3] == runs[6] > 0


def test_what_blocks_are_called_with_is_found_without_running_them(tmp_path):
    """Where blocks return one tensor, each runs once for every batch, and thrice more to find what it consists of."""
    model, batches = made(bare=True)
    note_runs(model.blocks[1].mix, tmp_path / "runs")
    prune_obs(model, 0.5, batches=batches, ignore=["begin", "end"], progress=False, solver="blocked")
    assert (tmp_path / "runs").stat().st_size == len(batches) + 3


def test_blocks_that_others_feel_run_to_find_what_each_is_called_with():
    """A block that changes what the next is called with is not passed over; both ways tell the same calls."""
    assert not find_chain(made(bare=True, logged=True)[0], Calibration(made()[1])).bare
    model, batches = made(bare=True)
    chain = find_chain(model, Calibration(batches))
    assert chain.bare
    told, expected = (each.begin(Calibration(batches)) for each in (chain, replace(chain, bare=False)))
    assert all(torch.equal(a, b) for a, b in zip(told.hidden, expected.hidden, strict=True))
    for ours, theirs in zip(told.calls, expected.calls, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.kwargs["scale"], other.kwargs["scale"])
            assert one.kwargs["cache"].seen == other.kwargs["cache"].seen
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", [{"skips": True}, {"shared": True}, {"skips": True, "bare": True}])
def test_models_that_are_no_chain_are_run_as_a_whole(how):
    """Blocks that share weights or are read elsewhere are no chain, and the model is pruned anyhow."""
    model, batches = made(**how)
    assert find_chain(model, Calibration(batches)) is None
    assert prune_obs(model, 0.5, batches=batches, sequential=True, progress=False).reached == pytest.approx(
        0.5, abs=0.01
    )


class Optional(nn.Module):
    """A layer with a norm that may be None, as a place of its container."""

    def __init__(self, norm=None):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 2), norm)

    def forward(self, x):
        for part in self.parts:
            x = x if part is None else part(x)
        return x


def test_places_without_a_block_are_passed_over():
    """A container may hold None where a block is optional."""
    assert prune_obs(Optional(), 0.5, batches=[torch.randn(64, 5)], progress=False).reached == 0.5


def test_blocks_are_found():
    """The blocks that hold most weights are found, and the model is as it was, hooks included."""
    model, batches = made()
    before = copy.deepcopy(model.state_dict())
    chain = find_chain(model, Calibration(batches))
    assert chain.paths == ("blocks.0", "blocks.1", "blocks.2") and chain.place == 0
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_spool_gives_back_what_it_got(dtype):
    """Tensors come back from the file as they were, also one that was written twice."""
    spool = Spool()
    tensors = {"a": torch.randn(3, 4).mul(9).to(dtype), "b": torch.randn(5).mul(9).to(dtype).view(5, 1).T}
    for name in ("a", "b", "a"):
        spool[name] = tensors[name]
    assert list(spool) == ["a", "b"]
    assert all(torch.equal(spool[name], tensor) and spool[name].dtype == dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("sequential", [False, True])
def test_hessians_of_one_block_at_a_time_are_held(sequential, monkeypatch):
    """Those of earlier blocks are gone as soon as the next one begins, without waiting for garbage to be collected."""
    held, alive = [], []
    solve = blockwise._solved_block

    def watched(surgery, stages, number, *flows):
        alive.append(sum(solver() is not None for solver in held))
        return solve(surgery, stages, number, *flows)

    class Noted(SOLVERS["exact"]):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            held.append(weakref.ref(self))

    monkeypatch.setattr(blockwise, "_solved_block", watched)
    monkeypatch.setitem(SOLVERS, "exact", Noted)
    model, batches = made(depth=3)
    gc.disable()
    try:
        prune_obs(
            model, 0.5, batches=batches, ignore=["begin", "end"], sequential=sequential, solver="exact", progress=False
        )
    finally:
        gc.enable()
    assert len(held) == 9
    assert alive == [0, 0, 0]
