"""The floors of the house: imports point downwards, and each big dependency is known in one place."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(lightning_prune.__file__).parent
FLOORS = {
    "model": 0,
    "algorithms": 1,
    "structure": 2,
    "surgery": 3,
    "measure": 4,
    "pruning": 5,
    "analysis": 6,
    "reports": 7,
    "callbacks": 8,
    "cli": 9,
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_utilities"}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_never_point_upwards(path):
    """A file imports from its own floor or from floors below."""
    own = FLOORS[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    for name in imported(path):
        if name.startswith("lightning_prune.") and room(name) in FLOORS:
            assert FLOORS[room(name)] <= own, f"{path.name} imports {name} from a floor above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lightning_is_known_on_the_top_floor_alone(path):
    """What is below the callbacks works for plain PyTorch; the one file that imports fvcore is measure/flops.py."""
    tops = {name.partition(".")[0] for name in imported(path)}
    if FLOORS[path.relative_to(ROOT).parts[0].removesuffix(".py")] < FLOORS["callbacks"]:
        assert not tops & LIGHTNING
    if path != ROOT / "measure" / "flops.py":
        assert "fvcore" not in tops


def test_no_files_import_each_other_in_a_circle():
    """In some order each file imports from those before it alone, also for types and inside functions."""
    own = {".".join(("lightning_prune", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    order = TopologicalSorter({name: imported(path) & own.keys() - {name} for name, path in own.items()})
    order.prepare()


def test_every_room_has_a_floor():
    """A new file or folder is given its floor here."""
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(FLOORS)


def test_public_names_exist():
    """Everything that the package lists can be imported, and is listed in order."""
    assert lightning_prune.__all__ == sorted(lightning_prune.__all__)
    assert all(hasattr(lightning_prune, name) for name in lightning_prune.__all__)
