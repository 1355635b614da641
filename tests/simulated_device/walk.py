"""Runs one entry on the CPU and on the pretend accelerator, in a process that knows it, and compares what came out."""

import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_prune import callbacks
from lightning_prune.model.devices import widest_float
from tests.simulated_device import functions, lightning_runs
from tests.simulated_device.accelerator import DEVICE, load, without_float64

ENTRIES = {**functions.entries(), **lightning_runs.entries()}


def core() -> list[str]:
    """Return the entries that the quick tests run: each criterion, solver, callback and function, once."""
    families = (
        "criterion l1 on", "target flops", "target filters", "weights", "layers", "public", "checkpoints",
        "command export", "sandbox",
    )  # fmt: skip
    by_class = {f"callback {name}" for name in callbacks.__all__}
    chosen = []
    for name in ENTRIES:
        once = name in by_class or name.startswith(families)
        once = once or (name.startswith("criterion") and name.endswith("on conv"))
        once = once or (name.startswith("solver") and name.endswith(", amount"))
        if once and "latency" not in name and "sensitivity" not in name:
            chosen.append(name)
    return chosen


class Outcome(NamedTuple):
    """What came out of an entry on a device."""

    found: Any
    drew: bool  # random numbers, on the device
    moved: bool  # whether the device's random generator is not as it was


def start(library: Path) -> None:
    """Prepare a process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    load(library)


def run(name: str, device: str, float64: bool) -> Outcome:
    """Run an entry on a device."""
    widest_float.cache_clear()
    state, draws = torch.get_device_module(DEVICE).get_rng_state(), torch.ops.simulated.drawn()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not float64:
            stack.enter_context(without_float64())
        found = ENTRIES[name](device)
    moved = not torch.equal(state, torch.get_device_module(DEVICE).get_rng_state())
    return Outcome(found, torch.ops.simulated.drawn() > draws, moved)


def same(expected: Any, found: Any, numbers: bool) -> bool:
    """Return whether two outcomes agree: numbers, where they are to be compared, to a percent."""
    if isinstance(expected, float) and isinstance(found, float):
        return not numbers or math.isclose(expected, found, rel_tol=0.01, abs_tol=1e-3)
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(same(expected[key], found[key], numbers) for key in expected)
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        return len(expected) == len(found) and all(map(same, expected, found, [numbers] * len(expected)))
    return expected == found


def refusals() -> list[str]:
    """Return what the device refuses, of all that it should."""
    here, there = torch.ones(2), torch.ones(2, device=DEVICE)
    seen = []
    for name, attempt in {
        "devices": lambda: here + there,
        "generator": lambda: there.normal_(generator=torch.Generator()),
        "float64": lambda: there.double(),
    }.items():
        with without_float64():
            try:
                attempt()
            except (RuntimeError, TypeError):
                seen.append(name)
    return seen
