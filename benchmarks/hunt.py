"""Hunts for wrong cuts: prunes random programs and compares each with an oracle that shares no code with the library.

    python -m benchmarks.hunt --programs 20000 --seed 1 --processes 2
    python -m benchmarks.hunt --only 225 --seed 1     # one program again, made as simple as it stays wrong

Prints what came of them by kind of module and of output, and writes it with every wrong program into ``hunt.json``
beside this file. A program that is printed can be pasted into Python: ``tests.programs.build(Program(...))``.
"""

import argparse
import json
import multiprocessing
import random
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.programs import Program, Stage, build, draw, example_of  # noqa: F401 - names that printed programs use
from tests.verdicts import judge, shrunk, told

RESULTS = Path(__file__).with_suffix(".json")
OUTCOMES = ("right", "whole", "wrong", "error")
"""What comes of a program: cut rightly, kept whole for a reason, cut wrongly, or not judged: the oracle failed."""


@dataclass
class Tally:
    """Programs by outcome, and rows of weights before and after and as asked for."""

    outcomes: Counter = field(default_factory=Counter)
    before: int = 0
    after: int = 0
    asked: float = 0.0

    def add(self, outcome: str, before: int, after: int, amount: float) -> None:
        self.outcomes[outcome] += 1
        self.before, self.after, self.asked = self.before + before, self.after + after, self.asked + before * amount

    def plain(self) -> dict[str, Any]:
        return {**self.outcomes, "rows_before": self.before, "rows_after": self.after, "rows_asked": round(self.asked)}

    def cells(self) -> list[str]:
        counts = [str(self.outcomes[outcome]) for outcome in OUTCOMES]
        shares = ["", ""]
        if self.before:
            shares = [f"{(self.before - self.after) / self.before:.0%}", f"{self.asked / self.before:.0%}"]
        return [str(sum(self.outcomes.values())), *counts, *shares]


def program(seed: int, index: int) -> Program:
    """Draw the program of a number."""
    return draw(random.Random(seed * 1_000_003 + index))


def judged(seed: int, index: int) -> dict[str, Any]:
    """Judge one program and return the verdict as plain data."""
    drawn = program(seed, index)
    try:
        verdict = judge(drawn)
    except Exception as error:  # the oracle's own fault, never counted as right
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return {"index": index, "program": drawn, "outcome": "error", "why": why, "rows": {}, "followed": False}
    return {"index": index, "program": drawn, **asdict(verdict)}


def start() -> None:
    """Prepare a process: one thread each, and no warnings about what is refused."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def hunt(seed: int, indices: range, processes: int, progress: Console | None = None) -> list[dict[str, Any]]:
    """Judge many programs, in order."""
    begun, found = time.monotonic(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start) as pool:  # which says so when a process dies
        for result in pool.map(partial(judged, seed), indices, chunksize=8):
            found.append(result)
            if result["outcome"] in ("wrong", "error") and progress:
                progress.print(f"{result['index']}: {result['outcome']}: {result['why']}", markup=False)
            if len(found) % 500 == 0 and progress:
                rate = len(found) / (time.monotonic() - begun)
                progress.print(f"{len(found)} programs, {rate:.1f} a second, {tally(found).outcomes}", markup=False)
    return found


def tally(found: Iterable[dict[str, Any]]) -> Tally:
    """Count all programs together."""
    total = Tally()
    for result in found:
        pairs = (result["rows"] or {}).values()
        total.add(result["outcome"], sum(b for b, _ in pairs), sum(a for _, a in pairs), result["program"].amount)
    return total


def by_stage(found: Iterable[dict[str, Any]]) -> dict[str, Tally]:
    """Count by the kinds of modules in a program, with the rows of those modules alone."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for result in found:
        for i, stage in enumerate(result["program"].stages):
            before, after = (result["rows"] or {}).get(f"s{i}", (0, 0))
            tallies[stage.kind].add(result["outcome"], before, after, result["program"].amount)
    return dict(sorted(tallies.items()))


def by(name: str, found: Iterable[dict[str, Any]]) -> dict[str, Tally]:
    """Count by one of the fields of a program."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in found:
        groups[str(getattr(result["program"], name))].append(result)
    return {key: tally(group) for key, group in sorted(groups.items())}


def table(title: str, tallies: dict[str, Tally]) -> Table:
    laid = Table(title=title)
    for column in ("", "programs", *OUTCOMES, "rows cut", "asked"):
        laid.add_column(column, justify="left" if not column else "right")
    for name, row in tallies.items():
        laid.add_row(name, *row.cells())
    return laid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--only", type=int, help="judge the program of this number again, make it simpler, print its code"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(width=120)
    start()
    if arguments.only is not None:
        result = judged(arguments.seed, arguments.only)
        if result["outcome"] == "wrong":
            simple = shrunk(result["program"])
            result |= {"program": simple, "why": judge(simple).why}
        console.print(told(result["program"], f"{result['outcome']}: {result['why']}"), markup=False, soft_wrap=True)
        return
    begun = time.monotonic()
    indices = range(arguments.first, arguments.first + arguments.programs)
    found = hunt(arguments.seed, indices, arguments.processes, console)
    total = tally(found)
    sections = {"stage": by_stage(found)} | {name: by(name, found) for name in ("tail", "example", "dtype", "scope")}
    for name, tallies in sections.items():
        console.print(table(f"By {name}", tallies | {"all": total}))
    faults = [result for result in found if result["outcome"] in ("wrong", "error")]
    told_of = {
        "torch": torch.__version__,
        "seed": arguments.seed,
        "programs": len(found),
        "seconds": round(time.monotonic() - begun),
        "outcomes": dict(total.outcomes),
        "rows_cut": (total.before - total.after) / max(total.before, 1),
        "rows_asked": total.asked / max(total.before, 1),
        "constants_followed": sum(result["followed"] for result in found),
        "by": {name: {key: row.plain() for key, row in rows.items()} for name, rows in sections.items()},
        "faults": [{"index": r["index"], "why": r["why"], "program": repr(r["program"])} for r in faults],
    }
    arguments.out.write_text(json.dumps(told_of, indent=1) + "\n")
    if faults:
        raise SystemExit(f"{len(faults)} programs are wrong or could not be judged; see {arguments.out}")


if __name__ == "__main__":
    main()
