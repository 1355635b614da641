"""Training on a real GPU: precision, fused optimizers, compiled code, memory layout, several processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    OBSOneShot,
    TaylorFilterPruning,
    prune_filters,
    prune_weights,
)
from lightning_prune.surgery.semi_structured import to_semi_structured_
from tests import runs
from tests.simulated_device.nets import Conv, loss, made
from tests.simulated_device.walk import ENTRIES, same

CALLBACKS = {
    "filter-l1": lambda: FilterL1Pruning(0.4),
    "taylor": lambda: TaylorFilterPruning(0.4),
    "taylor-activations": lambda: TaylorFilterPruning(0.4, form="activations"),
    "obd": lambda: FilterPruning(0.4, criterion="obd", batches=1),
    "obs": lambda: FilterPruning(0.4, criterion="obs", batches=1, repair=True),
    "magnitude": lambda: IterativeMagnitudePruning(0.5),
    "2:4": lambda: IterativeMagnitudePruning(pattern="2:4"),
    "obs-weights": lambda: OBSOneShot(0.5, batches=2),
}
OPTIMIZERS = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, fused=True),
    "foreach Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, foreach=True),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_all_does_what_it_does_on_the_cpu(device, name):
    """Every criterion, solver, callback, function and command does on a GPU what it does on the CPU."""
    expected, found = ENTRIES[name]("cpu"), ENTRIES[name](device)
    if "refused: " in str(expected)[:12]:
        return
    assert same(expected, found, numbers=False)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks_prune_in_every_precision(device, make, precision):
    """Each callback prunes under each precision, with finite weights afterwards."""
    if device == "cpu" and precision == "16-mixed":
        pytest.skip("the CPU has no scaler for float16")
    if precision == "bf16-true" and make in (CALLBACKS["obs-weights"], CALLBACKS["obs"]):
        pytest.skip("second-order solvers are tested in float32")
    module = runs.net()
    dense = sum(int(parameter.count_nonzero()) for parameter in module.parameters())
    runs.fit(module, make(), accelerator=device, precision=precision)
    assert sum(int(parameter.count_nonzero()) for parameter in module.parameters()) < 0.9 * dense
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_next_step_is_that_of_a_slim_twin(device, make):
    """After a cut the optimizer steps as one that had trained a slim model with the same state."""
    model, example, batches = made("conv", device)
    optimizer = make(model.parameters())
    loss(model, batches[0]).backward()
    optimizer.step()
    prune_filters(model, example, 0.4, optimizer=optimizer, progress=False)
    twin = copy.deepcopy(model)
    other = make(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, own in ((model, optimizer), (twin, other)):
        own.zero_grad()
        loss(one, batches[1]).backward()
        own.step()
    for one, another in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, another)


def test_capturable_adam_is_cut(cuda):
    """The state of an optimizer that CUDA graphs may capture follows, its step counter on the GPU too."""
    model, example, batches = made("conv", cuda)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, capturable=True)
    loss(model, batches[0]).backward()
    optimizer.step()
    prune_filters(model, example, 0.4, optimizer=optimizer, progress=False)
    optimizer.zero_grad()
    loss(model, batches[1]).backward()
    optimizer.step()
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["step"].is_cuda


def test_a_slim_model_is_captured_in_a_graph(cuda):
    """A CUDA graph of the pruned model replays what the model returns."""
    model, example, _ = made("conv", cuda)
    prune_filters(model, example, 0.4, progress=False)
    model.eval()
    with torch.no_grad():
        expected = model(example)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(example)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(example)
        graph.replay()
    torch.testing.assert_close(found, expected)


def test_a_compiled_model_is_pruned_and_compiled_again(device):
    """After a cut, compiled code is that of the slim model."""
    model, example, batches = made("conv", device)
    compiled = torch.compile(model)
    loss(compiled, batches[0]).backward()
    prune_filters(compiled, example, 0.4, progress=False)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(example), model(example), rtol=1e-3, atol=1e-4)


def test_memory_layout_is_kept(device):
    """Weights that lie in channels_last still do after a cut."""
    torch.manual_seed(0)
    model = Conv().to(device).to(memory_format=torch.channels_last)
    example = torch.randn(1, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    prune_filters(model, example, 0.4, progress=False)
    assert model.second.weight.is_contiguous(memory_format=torch.channels_last)
    assert model(example).isfinite().all()


def test_sparse_kernels_return_what_dense_ones_do(cuda):
    """Layers that keep to 2:4 run on sparse tensor cores, where the GPU has them, with the same outputs."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no sparse tensor cores")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to(cuda).half().eval()
    prune_weights(model, pattern="2:4")
    x = torch.randn(128, 256, device=cuda, dtype=torch.float16)
    with torch.no_grad():
        expected = model(x)
        assert to_semi_structured_(model).faster
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_random_generators_are_left_as_found(cuda):
    """Tracing, verifying and scoring leave the device's random numbers as they were."""
    model, example, batches = made("conv", cuda)
    state = torch.get_device_module(cuda).get_rng_state()
    prune_filters(model, example, 0.4, criterion="obd_hutchinson", batches=batches, loss=loss, progress=False)
    assert torch.equal(state, torch.get_device_module(cuda).get_rng_state())


SCRIPT = """
import sys
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning_prune import FilterL1Pruning, PruningError, TaylorFilterPruning
from tests import runs

module = runs.net()
if sys.argv[1] == "ddp":
    trainer = runs.fit(module, TaylorFilterPruning(0.4), accelerator="cuda", devices=2, strategy="ddp")
    size = torch.tensor(float(sum(parameter.numel() for parameter in module.parameters())), device=module.device)
    assert trainer.strategy.reduce(size, reduce_op="sum") == 2 * size and runs.widths(module)["second"] < 6
else:
    sharded = FSDPStrategy(sharding_strategy="FULL_SHARD")
    try:
        runs.fit(module, FilterL1Pruning(0.4), accelerator="cuda", devices=2, strategy=sharded)
    except PruningError as error:
        assert "FSDP" in str(error), error
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes(two_gpus, how, tmp_path):
    """Under DDP with NCCL both processes prune alike; under FSDP a callback prunes, or says before that it cannot."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script), how],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
