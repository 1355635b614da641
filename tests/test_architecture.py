"""The floors of the house: imports point downwards, and each big dependency is known in one place."""

import ast
import subprocess
import sys
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
    """Everything that the package lists can be imported, is listed in order, and is known to type checkers alike."""
    assert lightning_prune.__all__ == sorted(lightning_prune.__all__)
    for name in lightning_prune.__all__:
        assert getattr(lightning_prune, name).__name__ == name
    seen = {
        node.module.removeprefix("lightning_prune."): tuple(alias.name for alias in node.names)
        for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_prune.")
    }
    assert seen == lightning_prune._HOMES
    assert sorted(name for names in seen.values() for name in names) == lightning_prune.__all__


def test_public_names_are_few():
    """Thirty names at most; each is importable, and so is the version."""
    assert len(lightning_prune.__all__) <= 30
    assert dir(lightning_prune) == sorted([*lightning_prune.__all__, "__version__"])
    with pytest.raises(AttributeError, match="module 'lightning_prune' has no attribute 'prune'"):
        lightning_prune.prune  # noqa: B018


IMPORT = """
import sys
import lightning_prune
brought = {name.partition(".")[0] for name in sys.modules}
assert not brought & {"torch", "numpy", "lightning", "pytorch_lightning", "fvcore", "rich", "matplotlib"}, brought
"""
ORDERS = {
    "lightning after": "import lightning_prune; import lightning.pytorch as pl",
    "lightning before": "import lightning.pytorch as pl; import lightning_prune",
    "pytorch_lightning after": "import lightning_prune; import pytorch_lightning as pl",
    "pytorch_lightning before": "import pytorch_lightning as pl; import lightning_prune",
    "a submodule first": "import lightning_prune.callbacks.filter_l1; import lightning.pytorch as pl",
    "looked for first": """
import importlib.util, lightning_prune
assert importlib.util.find_spec("pytorch_lightning").loader.is_package("pytorch_lightning")
import pytorch_lightning as pl
""",
}
KNOWN = """
import sys
import lightning.pytorch, pytorch_lightning
callbacks = sys.modules["lightning_prune.callbacks"]
for kind in [getattr(callbacks, name) for name in callbacks.__all__]:
    assert issubclass(kind, lightning.pytorch.Callback) and issubclass(kind, pytorch_lightning.Callback), kind
assert pl.__spec__.loader is pl.__loader__ and type(pl.__loader__).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "lightning_prune"]
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_import_brings_in_nothing_else():
    """``import lightning_prune`` alone imports the standard library and itself."""
    run(IMPORT)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_callbacks_are_there_as_soon_as_lightning_is(order):
    """Whatever is imported first, the callbacks are subclasses of both packages' own, where their CLIs find them."""
    run(f"{order}\n{KNOWN}")
