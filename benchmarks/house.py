"""Counts the structure, the density and the words of the package, and what its import costs beside torch's.

    python -m benchmarks.house
    python -m benchmarks.house --root CHECKOUT --save before

Prints the figures of this checkout beside those that ``house.json`` keeps of the package before its redesign. Counts
come from the syntax trees of the files; nothing of the package is run. An import is timed in fresh processes in which
torch and the package take turns; figures are medians.
"""

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix(".json")
PACKAGE = "lightning_prune"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
LITERARY = ("Tell", "Let", "Give", "Take", "Do")
# A test holds these; lower them when the figures fall.
LIMITS = {
    "floors: rooms on the longest chain of imports": 10,
    "rooms: folders and loose modules at the top": 10,
    "arrows: pairs of rooms with imports between them": 39,
    "comprehensions": 46.5,
    "nested comprehensions": 3.0,
    "ternaries": 22.5,
    "methods of FilterPruning, inherited ones too": 24,
    "classes of FilterPruning": 3,
    "super() calls in callbacks": 14,
    "writes to another object's private attributes": 5,
    "docstrings that begin with Tell, Let, Give, Take, Do": 0,
    "public names": 30,
    "lines": 43_000,
}
AT_LEAST = {"comment lines": 23}
IMPORT = """
import time
begin = time.perf_counter()
import {name}
seconds = time.perf_counter() - begin
with open("/proc/self/status") as status:
    (peak,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
print(seconds, peak / 1024)
"""


def sources(root: Path) -> dict[str, str]:
    """Return the text of each file of the package, by dotted module name; a package goes by its folder's name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


def count(root: Path) -> dict[str, float]:
    """Return the figures of a checkout that its text alone tells."""
    texts = sources(root)
    trees = {name: ast.parse(text) for name, text in texts.items()}
    return {**structure(trees), **density(texts, trees), **tower(trees), **words(texts, trees)}


def structure(trees: dict[str, ast.Module]) -> dict[str, float]:
    """Count floors, rooms and arrows; the package's own ``__init__`` is the door, not a room."""
    arrows = set()
    for name, tree in trees.items():
        if name != PACKAGE:
            arrows.update((room(name), room(other)) for other in imported(tree))
    below: dict[str, set[str]] = {room(name): set() for name in trees if name != PACKAGE}
    for one, other in arrows:
        if other in below and other != one:
            below[one].add(other)
    height: dict[str, int] = {}
    for one in TopologicalSorter(below).static_order():
        height[one] = 1 + max((height[other] for other in below[one]), default=0)
    return {
        "floors: rooms on the longest chain of imports": max(height.values()),
        "rooms: folders and loose modules at the top": len(below),
        "arrows: pairs of rooms with imports between them": sum(map(len, below.values())),
    }


def room(name: str) -> str:
    """Return the room of a module: the folder, or the loose module, at the package's top."""
    return name.split(".")[1]


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of the package that a file imports names from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            yield node.module
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)


def density(texts: dict[str, str], trees: dict[str, ast.Module]) -> dict[str, float]:
    """Count what makes lines dense, per 1,000 lines that are not blank."""
    lines = sum(bool(line.strip()) for text in texts.values() for line in text.splitlines())
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    comprehensions = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
    counts = {
        "comprehensions": len(comprehensions),
        "nested comprehensions": sum(map(nested, comprehensions)),
        "ternaries": sum(isinstance(node, ast.IfExp) for node in nodes),
        "comment lines": sum(map(comments, texts.values())),
    }
    return {name: round(1000 * number / lines, 1) for name, number in counts.items()}


def nested(comprehension: ast.expr) -> bool:
    """Return whether a comprehension has a second ``for`` or another comprehension inside."""
    inside = [node for node in ast.walk(comprehension) if isinstance(node, COMPREHENSIONS)]
    return len(inside) > 1 or len(comprehension.generators) > 1


def comments(text: str) -> int:
    """Count the lines with a comment, those behind code too."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def tower(trees: dict[str, ast.Module]) -> dict[str, float]:
    """Count what stands behind the callback with the most arguments, and how classes reach into each other."""
    inside = [node for name, tree in trees.items() if f"{PACKAGE}.callbacks" in name for node in ast.walk(tree)]
    classes = {node.name: node for node in inside if isinstance(node, ast.ClassDef)}
    chain = ["FilterPruning"]
    for name in chain:
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
        chain.extend(base for base in bases if base in classes and base not in chain)
    everywhere = [node for tree in trees.values() for node in ast.walk(tree)]
    return {
        "methods of FilterPruning, inherited ones too": sum(
            isinstance(node, FUNCTIONS) for name in chain for node in classes[name].body
        ),
        "classes of FilterPruning": len(chain),
        "super() calls in callbacks": sum(calls_super(node) for node in inside),
        "writes to another object's private attributes": sum(map(writes_private, everywhere)),
    }


def calls_super(node: ast.AST) -> bool:
    """Return whether a node is a call of ``super``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def writes_private(node: ast.AST) -> bool:
    """Return whether a node assigns to, or deletes, a private attribute of anything but ``self`` and ``cls``."""
    if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
        return False
    private = node.attr.startswith("_") and not node.attr.startswith("__")
    own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
    return private and not own


def words(texts: dict[str, str], trees: dict[str, ast.Module]) -> dict[str, float]:
    """Count docstrings that begin as none should, public names and lines."""
    documented = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    docstrings = [ast.get_docstring(node) or " " for node in documented]
    (public,) = [
        ast.literal_eval(node.value)
        for node in trees[PACKAGE].body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    return {
        "docstrings that begin with Tell, Let, Give, Take, Do": sum(
            docstring.partition(" ")[0] in LITERARY for docstring in docstrings
        ),
        "public names": len(public),
        "lines": sum(text.count("\n") for text in texts.values()),
    }


def imports(root: Path, repeats: int) -> dict[str, float]:
    """Measure ``import torch`` and ``import lightning_prune`` in turns, each in a process of its own."""
    seconds: dict[str, list[float]] = {"torch": [], PACKAGE: []}
    megabytes: dict[str, list[float]] = {"torch": [], PACKAGE: []}
    for turn in range(repeats + 1):
        for name in seconds:
            took, peak = in_a_fresh_process(root, name)
            if turn:  # the first turn fills the disk's cache
                seconds[name].append(took)
                megabytes[name].append(peak)
    return {
        "seconds to import": round(median(seconds[PACKAGE]), 2),
        "the same of torch": round(median(seconds["torch"]), 2),
        "MB after the import": round(median(megabytes[PACKAGE])),
        "MB after torch's": round(median(megabytes["torch"])),
    }


def in_a_fresh_process(root: Path, name: str) -> tuple[float, float]:
    """Return the seconds that an import takes and the peak of memory in MiB."""
    program = [sys.executable, "-c", IMPORT.format(name=name)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, check=True)
    took, peak = done.stdout.split()
    return float(took), float(peak)


def table(before: dict[str, float], now: dict[str, float]) -> Table:
    """Show the figures before and now, and the limits that a test holds."""
    shown = Table("", "before", "now", "limit")
    for name, value in now.items():
        limit = f"≤ {LIMITS[name]}" if name in LIMITS else ""
        if name in AT_LEAST:
            limit = f"≥ {AT_LEAST[name]}"
        shown.add_row(name, str(before.get(name, "")), str(value), limit)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is counted")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each import; 0 leaves imports out")
    parser.add_argument("--save", default="now", help="the name of the figures in house.json")
    options = parser.parse_args()
    root = options.root.resolve()
    now = count(root)
    if options.repeats:
        now.update(imports(root, options.repeats))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[options.save] = now
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    Console(width=110).print(table(results.get("before", {}), now))


if __name__ == "__main__":
    main()
