"""Kills a training at chosen and at random moments, takes it up again, and compares where it ends.

A kill is SIGKILL: nothing of the process runs any more. Places are counted in calls, as Python's profiler sees them, so
that one seed kills at the same points again; kills by the clock fall between them, into code that is not Python.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.trust import runs
from lightning_prune import load_from_checkpoint
from lightning_prune.surgery.masks import masks_on

__all__ = ["PLACES", "Found", "as_json", "differing", "kill_runs"]

PLACES: dict[str, tuple[str, ...]] = {
    "during a cut": ("_structured.py:reach", "_masked.py:reach"),
    "while a cut is written": ("cut.py:cut_", "masks.py:set_masks_", "rewind.py:rewind_"),
    "while one is taken back": ("metric_guard.py:_take_back",),
    "within accumulation": ("runs.py:training_step",),
    "in a step": ("optimizer.py:wrapper",),
    "in validation": ("runs.py:validation_step",),
    "while a checkpoint is written": (
        "model_checkpoint.py:_save_checkpoint",
        "model_checkpoint.py:_save_last_checkpoint",
    ),
    "while one is loaded": ("checkpoint_connector.py:_restore_modules_and_callbacks",),
    "while training starts": ("_pruning.py:on_train_start",),
}
"""What is going on -> functions, as ``file:name``, within whose calls that is."""
ANY_TIME = "at any time"


@dataclass
class Kill:
    """Die in the so-manieth call of one of these functions, after so many calls within it."""

    functions: tuple[str, ...]
    entrance: int
    calls: int

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Watch as a profiler does."""
        if self.entrance > 0:
            if event == "call" and _name(frame) in self.functions:
                self.entrance -= 1
            return
        self.calls -= 1
        if self.calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Clock:
    """Counts calls within every call of the places, so that moments can be drawn from them."""

    lengths: dict[str, list[int]] = field(default_factory=lambda: {place: [] for place in PLACES})
    _inside: dict[str, tuple[FrameType, int]] = field(default_factory=dict)
    _now: int = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Watch as a profiler does."""
        self._now += 1
        if event not in ("call", "return"):
            return
        name = _name(frame)
        for place, functions in PLACES.items():
            if name in functions:
                if event == "call" and place not in self._inside:
                    self._inside[place] = frame, self._now
                elif event == "return" and self._inside.get(place, (None, 0))[0] is frame:
                    self.lengths[place].append(self._now - self._inside.pop(place)[1])


@dataclass
class Found:
    """What came of the kills.

    Attributes:
        tried: Kills by place.
        runs: Runs that were killed, once or several times, and taken up again.
        lost: What went wrong, run by run.
        checkpoints: Files that were read back after a kill.
    """

    tried: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    checkpoints: int = 0


def kill_runs(
    cases: list[str], per_case: int, seed: int, every: tuple[str, ...] = ("epoch", "step"), folder: Path | None = None
) -> Found:
    """Kill runs of every case, each one to three times, and compare how they end with how they end undisturbed.

    Args:
        cases: Names in :data:`benchmarks.trust.runs.CALLBACKS`.
        per_case: Runs of each case, and of each of ``every``.
        seed: What chance starts from.
        every: Whether checkpoints are written after each ``epoch``, or after each optimizer ``step``.
        folder: Where checkpoints are written; by default where temporary files go, too.
    """
    found, chance = Found(), random.Random(seed)
    context = multiprocessing.get_context("forkserver")  # what is imported once serves all runs
    context.set_forkserver_preload(["benchmarks.trust.runs"])
    with tempfile.TemporaryDirectory(dir=folder) as top:
        for case in cases:
            for moments in every:
                whole = Path(top) / f"{case}-{moments}"
                _start(context, whole, case, moments, watch=None).join()
                outcome, seconds = torch.load(whole / "outcome")
                # Killed after its last checkpoint, a run has nothing left to train: what Lightning makes of that.
                _start(context, whole, case, moments, watch=None).join()
                expected = [outcome, torch.load(whole / "outcome")[0]]
                clocked = Path(top) / f"{case}-{moments}-clocked"
                _start(context, clocked, case, moments, watch="clock").join()
                lengths = {**torch.load(clocked / "lengths"), "seconds": seconds}
                for _ in range(per_case):
                    trial = Path(top) / "trial"
                    _try(context, trial, case, moments, expected, lengths, chance, found)
                    shutil.rmtree(trial)
    return found


def _try(
    context: Any,
    folder: Path,
    case: str,
    every: str,
    expected: list[dict[str, Any]],
    lengths: dict[str, Any],
    chance: random.Random,
    found: Found,
) -> None:
    told = f"{case}, saved every {every}:"
    left, seen = chance.randint(1, 3), {}
    found.runs += 1
    while True:
        place, kill = _drawn(lengths, chance) if left else ("", None)
        process = _start(context, folder, case, every, watch=kill)
        if place == ANY_TIME:
            process.join(chance.uniform(0, lengths["seconds"]))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            left -= 1
            found.tried[place] += 1
            told += f" killed {place}{'' if kill is None else f' ({kill.entrance}, {kill.calls})'};"
        try:
            found.checkpoints += _read_back(folder, seen)
        except Exception as error:
            found.lost.append(f"{told} a checkpoint cannot be used: {type(error).__name__}: {error}")
            return
        if process.exitcode == 0:
            break
        if process.exitcode != -signal.SIGKILL:
            found.lost.append(f"{told} it failed when it was taken up: {(folder / 'failure').read_text()}")
            return
    outcome = torch.load(folder / "outcome")[0]
    apart = differing(expected[0], outcome)
    if apart and differing(expected[1], outcome):
        found.lost.append(f"{told} it ended elsewhere: {', '.join(apart[:5])}")


def _drawn(lengths: dict[str, Any], chance: random.Random) -> tuple[str, Kill | None]:
    """Draw a moment: of a place that the undisturbed run came by, or at any time."""
    if chance.random() < 0.3:
        return ANY_TIME, None
    place = chance.choice([place for place in PLACES if lengths[place]])
    entrance = chance.randrange(len(lengths[place]))
    return place, Kill(PLACES[place], entrance + 1, chance.randrange(max(1, lengths[place][entrance])))


def _start(context: Any, folder: Path, case: str, every: str, watch: Any) -> Any:
    process = context.Process(target=_run, args=(folder, case, every, watch))
    process.start()
    return process


def _run(folder: Path, case: str, every: str, watch: Kill | str | None) -> None:
    """Train in a process of its own, and leave what came of it in the folder."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    clock = Clock() if watch == "clock" else None
    start = time.perf_counter()
    sys.setprofile(clock or watch)  # type: ignore[arg-type]
    try:
        done = runs.train(folder, case, every)
    except BaseException as error:
        sys.setprofile(None)
        (folder / "failure").write_text(f"{type(error).__name__}: {error}")
        raise
    sys.setprofile(None)
    torch.save((done, time.perf_counter() - start), folder / "outcome")
    if clock is not None:
        torch.save(clock.lengths, folder / "lengths")


def _read_back(folder: Path, seen: dict[Path, int]) -> int:
    """Load every checkpoint that is new, plainly and into a module, and compare it with what it says of itself."""
    count = 0
    for path in sorted(folder.glob("*.ckpt")):
        written = path.stat().st_mtime_ns
        if seen.get(path) == written:
            continue
        saved = torch.load(path, weights_only=True)["state_dict"]
        module = load_from_checkpoint(runs.Net, path)
        own = module.state_dict()
        assert all(torch.equal(own[name], value) for name, value in saved.items()), "other values"
        assert module.first.out_channels == len(saved["norm.weight"]) == module.second.in_channels, "other widths"
        masks = masks_on(module)
        assert not any(own[name].masked_select(~keep).any() for name, keep in masks.items()), "other zeros"
        seen[path] = written
        count += 1
    return count


def differing(expected: Any, found: Any, name: str = "") -> list[str]:
    """Name the parts of nested dicts and lists that are not equal to the last bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, found) else [name]
    if isinstance(expected, dict):
        if expected.keys() != found.keys():
            return [name]
        return [apart for key in expected for apart in differing(expected[key], found[key], f"{name}.{key}")]
    if isinstance(expected, list):
        if len(expected) != len(found):
            return [name]
        pairs = enumerate(zip(expected, found, strict=True))
        return [apart for i, pair in pairs for apart in differing(*pair, f"{name}[{i}]")]
    return [] if expected == found else [name]


def _name(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"


def as_json(found: Found) -> dict[str, Any]:
    """Return the figures as they are written."""
    return {**asdict(found), "tried": dict(found.tried), "kills": found.tried.total()}
