"""Plants errors in right cuts and counts how many of those that change what some operator computes the proof catches.

    python -m benchmarks.proof --errors 10000 --processes 2

An error counts if it has an effect: a plain run of the wrong slim model in float64, on random weights of ordinary size,
differs from that of the right one in the output of at least one operator, or it does not run. The proof is not asked.
Prints planted, effective, caught and missed by kind of error and by setting, and writes them with every miss, by name,
into ``proof.json`` beside this file.
"""

import argparse
import dataclasses
import json
import multiprocessing
import random
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.planted.effects import Reference
from benchmarks.planted.errors import planted
from benchmarks.planted.subjects import (
    CASES,
    GPT_SETTING,
    SETTINGS,
    Planted,
    Subject,
    gpts,
    networks,
    subject_of,
)
from lightning_prune import PruningError
from lightning_prune.pruning.plan import plan_filters
from lightning_prune.surgery import Cut, Disproof, find_groups, verify
from tests.programs import DTYPES, draw

RESULTS = Path(__file__).with_suffix(".json")


def tried(subject: Subject, setting: str, seed: int) -> list[dict[str, Any]]:
    """Cut one network, plant errors, and return a row for each: what it was, its effect, and if it was caught."""
    r = random.Random(seed)
    model = subject.build()
    try:
        structure = find_groups(model, subject.example)
        if not structure.groups:
            return []
        scores = {
            name: torch.tensor([r.random() for _ in range(group.width)]) for name, group in structure.groups.items()
        }
        plan = plan_filters(model, subject.example, structure, scores, r.choice((0.3, 0.5)))
    except PruningError:
        return []
    except Exception as failure:
        why = f"pruning raised {type(failure).__name__}: {failure}"
        return [row(setting, subject, Planted("the cut itself", "", Cut({}, {}, {}, ())), why, False)]
    # Errors are planted in cuts as they are verified first: without what compensates numbers made from widths.
    structure, cut = plan.structure, replace(plan.cut, scales={})
    if not cut.kept:
        return []
    reference = Reference(subject, model, cut)
    if subject.program is not None and reference.misjudged(Planted("", "", cut), reference.slim):
        return [row(setting, subject, Planted("the cut itself", "", cut), "wrong from the start", False)]
    rows = []
    for error in [Planted("none: the right cut", "", cut), *planted(subject, model, structure, cut, r)]:
        harmless = error.kind.startswith("none") or (error.edit is not None and writes_the_same(error, model))
        effect = "" if harmless else reference.changes(error)
        try:
            caught = isinstance(verify(model, structure, error.cut, lambda e=error: e.tensors(model)), Disproof)
        except Exception as failure:  # it would stop the run, not go on with a wrong model; still no verdict
            caught, effect = False, effect and f"{effect}; the proof raised {type(failure).__name__}: {failure}"
        rows.append(row(setting, subject, error, effect, caught))
    return rows


def writes_the_same(error: Planted, model: nn.Module) -> bool:
    """Say whether an error in what is written leaves every value as it was, as among equal weights."""
    wrong, right = error.tensors(model), error.cut.tensors(model)
    return all(wrong[name].shape == right[name].shape and torch.equal(wrong[name], right[name]) for name in right)


def row(setting: str, subject: Subject, error: Planted, effect: str, caught: bool) -> dict[str, Any]:
    return {
        "setting": setting, "kind": error.kind, "network": subject.name, "where": error.where, "effect": effect,
        "caught": caught,
    }  # fmt: skip


def task(number: int) -> list[dict[str, Any]]:
    """Try the network of a number: first the small ones and the cases, then random programs in every setting."""
    fixed = fixed_subjects()
    if number < len(fixed):
        setting, subject = fixed[number]
    else:
        names = list(SETTINGS)
        setting = names[number % len(names)]
        program = SETTINGS[setting](draw(random.Random(number)))
        subject = subject_of(program)
    return tried(subject, setting, number)


@cache
def fixed_subjects() -> list[tuple[str, Subject]]:
    """Return the networks that are always there, with their settings."""
    found: list[tuple[str, Subject]] = []
    for setting in ("float32", "bfloat16", "float64"):
        found += [(setting, subject) for subject in networks(DTYPES[setting])]
    for setting, change in SETTINGS.items():
        for name, program in CASES.items():
            tail = program.tail if setting in ("float32", "bfloat16", "float64", "LayerScale 1e-6") else None
            changed = change(program)
            found.append((setting, subject_of(dataclasses.replace(changed, tail=tail or changed.tail), name)))
    return found + [(GPT_SETTING, subject) for subject in gpts()]


def start() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def plant(least: int, processes: int, first: int = 0, progress: Console | None = None) -> list[dict[str, Any]]:
    """Plant errors until so many of them have an effect."""
    rows: list[dict[str, Any]] = []
    effective, batch, begun = 0, 16 * processes, time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start) as pool:  # which says so when a process dies
        while effective < least:
            for found in pool.map(task, range(first, first + batch)):
                rows += found
            first += batch
            effective = sum(bool(r["effect"]) for r in rows)
            if progress:
                missed = sum(bool(r["effect"]) and not r["caught"] for r in rows)
                progress.print(f"{effective} errors, {missed} missed, {time.monotonic() - begun:.0f} seconds")
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Counter]]:
    """Count by kind and setting: planted, effective, caught, missed."""
    found: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for r in rows:
        for setting in (r["setting"], "all"):
            cell = found[r["kind"]][setting]
            cell["planted"] += 1
            if r["effect"]:
                cell["effective"] += 1
                cell["caught" if r["caught"] else "missed"] += 1
            elif r["caught"]:
                cell["refused without effect"] += 1
    return {kind: dict(cells) for kind, cells in found.items()}


def table(counted: dict[str, dict[str, Counter]]) -> Table:
    settings = [*SETTINGS, GPT_SETTING]
    laid = Table(title="Errors that change an operator's output: caught / effective")
    for column in ("error", "planted", "effective", "caught", "missed", *settings):
        laid.add_column(column, justify="left" if column == "error" else "right")
    total: dict[str, Counter] = defaultdict(Counter)
    for kind, cells in counted.items():
        if kind.startswith("none"):
            continue
        laid.add_row(kind, *cells_of(cells, settings))
        for setting, cell in cells.items():
            total[setting].update(cell)
    laid.add_section()
    laid.add_row("all", *cells_of(total, settings))
    right = counted.get("none: the right cut", {}).get("all", Counter())
    laid.caption = f"Right cuts tried beside them: {right['planted']}, refused: {right['refused without effect']}"
    return laid


def cells_of(cells: Mapping[str, Counter], settings: list[str]) -> list[str]:
    whole = cells.get("all", Counter())
    each = [cells.get(setting, Counter()) for setting in settings]
    shares = [f"{c['caught']}/{c['effective']}" if c["effective"] else "" for c in each]
    return [*(str(whole[name]) for name in ("planted", "effective", "caught", "missed")), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=int, default=10_000, help="how many errors with an effect, at least")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(width=160)
    begun = time.monotonic()
    rows = plant(arguments.errors, arguments.processes, arguments.first, console)
    counted = summary(rows)
    console.print(table(counted))
    missed = [r for r in rows if r["effect"] and not r["caught"]]
    for r in missed[:100]:
        console.print(f"missed: {r['kind']}: {r['where']} in {r['network'][:100]}: {r['effect']}", markup=False)
    told = {
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - begun),
        "counts": counted,
        "missed": missed,
    }
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
