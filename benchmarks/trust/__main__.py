"""Looks for ways to lose a run, and prints how many it tried.

    python -m benchmarks.trust kills [--runs 5] [--seed 0]     # kill -9, take up again, compare to the last bit
    python -m benchmarks.trust cells [--every 1]               # precision x callback x optimizer, in one process
    python -m benchmarks.trust ddp [--processes 2]             # strategy x callback, in several
    python -m benchmarks.trust fuzz [--examples 100]           # nonsense: arguments, models, YAML, files
    python -m benchmarks.trust soak [--times 1000]             # cut after cut in one process
    python -m benchmarks.trust                                 # the table of what was found last

Writes ``trust.json`` beside this folder, part by part.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.with_suffix(".json")


def kills(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.trust.kills import as_json, kill_runs
    from benchmarks.trust.runs import CALLBACKS

    found = {}
    for case in options.cases or CALLBACKS:
        found[case] = as_json(kill_runs([case], options.runs, options.seed, folder=options.folder))
        told = found[case]
        Console().print(f"{case}: {told['kills']} kills of {told['runs']} runs, {len(told['lost'])} lost")
    return {
        "tried": sum(case["kills"] for case in found.values()),
        "failed": sum(len(case["lost"]) for case in found.values()),
        "cases": found,
    }


def cells(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.trust.cells import alone, try_cells

    found = try_cells(itertools.islice(alone(), 0, None, options.every))
    return {"tried": found.tried, "failed": len(found.failures), **asdict(found)}


def ddp(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.processes)]
        subprocess.run([*launch, "-m", "benchmarks.trust.cells", str(out)], check=True)
        found = json.loads(out.read_text())
    return {"tried": found["tried"], "failed": len(found["failures"]), "processes": options.processes, **found}


def fuzz(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.trust.fuzz import fuzz_all

    found = fuzz_all(options.examples, options.seed)
    return {
        "tried": sum(sum(kind["ended"].values()) for kind in found.values()),
        "failed": sum(bool(kind["failure"]) for kind in found.values()),
        "kinds": found,
    }


def soak(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.trust.soak import CASES
    from benchmarks.trust.soak import soak as run

    found = {case: run(case, options.times) for case in CASES}
    leaks = [case for case, seen in found.items() if any(seen["old storages alive"]) or len(set(seen["hooks"])) > 1]
    return {"tried": sum(seen["times"] for seen in found.values()), "failed": len(leaks), "cases": found}


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "kills": ("kill -9 and resume: moments", kills),
    "cells": ("precision x callback x optimizer: cells", cells),
    "ddp": ("DDP x callback: cells", ddp),
    "fuzz": ("nonsense fed: cases", fuzz),
    "soak": ("cuts and masks in one process", soak),
}


def table(results: dict[str, Any]) -> Table:
    """Lay out what every part tried."""
    found = Table(title="Ways to lose a run", caption="anyway: fails with no pruning in the run, too")
    for column in ("what", "tried", "failed", "anyway", "command"):
        found.add_column(column, justify="left" if column in ("what", "command") else "right")
    for name, result in results.items():
        anyway = len(result.get("fail_anyway", ()))
        anyway += sum(kind["ended"].get("fails without pruning, too", 0) for kind in result.get("kinds", {}).values())
        cells = map(str, (result["tried"], result["failed"], anyway))
        found.add_row(PARTS[name.split()[0]][0], *cells, result["command"])
    return found


def main() -> None:
    """Read the command line, look, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=list(PARTS))
    parser.add_argument("--runs", type=int, default=5, help="runs to kill, of each callback and way to save")
    parser.add_argument("--cases", nargs="+", help="callbacks to kill, by name; by default all")
    parser.add_argument("--folder", type=Path, help="where killed runs save; by default where temporary files go")
    parser.add_argument("--every", type=int, default=1, help="try every so-manieth cell")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--examples", type=int, default=100, help="cases of each kind of nonsense")
    parser.add_argument("--times", type=int, default=1000, help="cuts, and masks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = PARTS[options.part][1](options) if options.part else None
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if found is not None:
        name = options.part if options.part != "ddp" else f"ddp {options.processes}"
        results[name] = {"command": " ".join(["python -m benchmarks.trust", *sys.argv[1:]]), **found}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=120).print(table(results))


if __name__ == "__main__":
    main()
