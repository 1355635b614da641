"""On a pretended accelerator, which refuses what CUDA refuses, all does what it does on the CPU.

What comes out is compared with what comes out on the CPU. One quick test runs each criterion, solver, callback and
function once, since a process that knows the accelerator takes seconds to start; the slow ones run everything.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lightning_prune import callbacks, cli
from tests.simulated_device import functions, lightning_runs, walk
from tests.simulated_device.accelerator import DEVICE
from tests.simulated_device.build import built, why_not

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-prune-tests"
PRODUCTS_OF_ALL_STEPS = ("lstm", "gru")
"""Layers of which the CPU multiplies all steps at once, and accelerators one by one: examples are told apart there."""

NEARLY_EQUAL_UNITS = ("callback FilterPruning(obs)",)
"""Where losses of two units lie so near each other that another precision chooses the other one."""

SEARCHES = ("solver admm on attention", "solver admm, amount")
"""Solvers of many steps, which rounding leads to other masks with the same error of the outputs."""

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def process():
    """A process that knows the accelerator."""
    library = built(CACHE)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, initializer=walk.start, initargs=(library,)) as pool:
        yield pool


def assert_same_as_on_the_cpu(process, name: str, float64: bool) -> None:
    expected = process.submit(walk.run, name, "cpu", float64).result()
    found = process.submit(walk.run, name, DEVICE, float64).result()
    by_example = name.startswith("criterion") and name.endswith(PRODUCTS_OF_ALL_STEPS)
    if by_example and "examples cannot be told apart" in str(expected.found):
        assert found.found[0]
        return
    other_choice = name in SEARCHES or (not float64 and name in NEARLY_EQUAL_UNITS)
    assert walk.same(expected.found, found.found, numbers=not (found.drew or by_example or other_choice))
    assert not found.moved, "the random generator of the device is not as it was"


def test_each_kind_runs_without_float64(process):
    """On a device without float64, as Apple's, each criterion, solver, callback and function does what it should."""
    differ = {}
    for name in walk.core():
        try:
            assert_same_as_on_the_cpu(process, name, float64=False)
        except Exception as error:  # also what the process raised
            differ[name] = error
    assert not differ


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(walk.ENTRIES.keys() - set(walk.core())))
def test_all_runs_without_float64(process, name):
    """On a device without float64, so does everything else."""
    assert_same_as_on_the_cpu(process, name, float64=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", walk.ENTRIES)
def test_all_runs_with_float64(process, name):
    """On a device with float64, as NVIDIA's, all does what it does on the CPU."""
    assert_same_as_on_the_cpu(process, name, float64=True)


def test_every_function_is_called():
    """Each exported function has an entry; ``coupling_rule`` touches no tensor."""
    called = {name.removeprefix("public ") for name in walk.ENTRIES if name.startswith("public ")}
    assert functions.public_functions() == called | {"coupling_rule"}
    assert functions.analyses() == functions.ANALYSIS.keys()
    assert functions.pruners() == functions.PRUNING.keys()
    # A sweep trains by commands in processes of their own, which know no pretended accelerator.
    assert lightning_runs.COMMANDS.keys() == cli._COMMANDS.keys() - {"sweep"}
    assert all(f"callback {name}" in walk.ENTRIES for name in callbacks.__all__)


def test_mixed_devices_are_refused(process):
    """The accelerator refuses what CUDA refuses, or these tests would show nothing."""
    assert process.submit(walk.refusals).result() == ["devices", "generator", "float64"]
