"""The floors of the house: imports point downwards, and each big dependency is known in one place."""

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_prune
from benchmarks import house

ROOT = Path(lightning_prune.__file__).parent
CONTRIBUTING = (ROOT.parent / "CONTRIBUTING.md").read_text()
FLOORS = {name: int(floor) for floor, name in re.findall(r"^\| (\d+) \| `(\w+)/` \|", CONTRIBUTING, re.MULTILINE)}
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
    """The table in CONTRIBUTING names every folder of the package, one a floor, from the top to the bottom."""
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FLOORS)
    assert list(FLOORS.values()) == list(range(len(FLOORS)))[::-1]
    assert all((ROOT / name / "__init__.py").exists() for name in FLOORS)


def test_no_two_files_have_one_name():
    """A name says which file is meant; each package has an ``__init__.py``."""
    named = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, times in named.items() if times > 1] == []


def test_recipes_name_files_that_exist():
    """Whoever follows CONTRIBUTING finds each file and folder that it names."""
    named = re.findall(r"`((?:lightning_prune|tests|docs|benchmarks)/[\w./-]*)`", CONTRIBUTING)
    assert len(named) > 15
    for path in named:
        assert (ROOT.parent / path).exists(), path


def test_the_house_keeps_within_its_limits():
    """Structure, density and words do not fall back; ``python -m benchmarks.house`` shows them before and now."""
    found = house.count(ROOT.parent)
    over = {name: found[name] for name, limit in house.LIMITS.items() if found[name] > limit}
    under = {name: found[name] for name, limit in house.AT_LEAST.items() if found[name] < limit}
    assert not over and not under


NESTED = """
def total(rows, table):
    flat = [x for row in rows for x in row]  # two loops
    deep = {key: [x for x in row] for key, row in table.items()}
    # a line of its own
    other = flat if flat else deep
    other._cache = self._cache = 1
    return sum(x for x in flat)
"""


def test_the_house_is_counted_right():
    """Of seven lines: four comprehensions, two of them nested, one ternary, two comments, one foreign write."""
    tree = ast.parse(NESTED)
    assert house.density({"": NESTED}, {"": tree}) == {
        "comprehensions": 571.4,
        "nested comprehensions": 285.7,
        "ternaries": 142.9,
        "comment lines": 285.7,
    }
    assert sum(map(house.writes_private, ast.walk(tree))) == 1


def test_floors_and_arrows_are_counted_right():
    """A chain of three rooms has three floors; two files of one room that import one other make one arrow."""
    files = {
        "lightning_prune": "from lightning_prune.c.x import z",
        "lightning_prune.a.x": "",
        "lightning_prune.b.x": "from lightning_prune.a.x import y",
        "lightning_prune.b.y": "from lightning_prune.a.x import y\nfrom lightning_prune.b.x import z",
        "lightning_prune.c.x": "from lightning_prune.b.y import y",
    }
    found = house.structure({name: ast.parse(text) for name, text in files.items()})
    assert list(found.values()) == [3, 3, 2]


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
    """Thirty-two names at most; each is importable, and so is the version."""
    assert len(lightning_prune.__all__) <= 32
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
from lightning_utilities.core import rank_zero
assert rank_zero.log.name.startswith(pl.__name__), rank_zero.log.name
assert pl.__spec__.loader is pl.__loader__ and type(pl.__loader__).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "lightning_prune"]
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_import_brings_in_nothing_else():
    """``import lightning_prune`` alone imports the standard library and itself."""
    run(IMPORT)


def test_plain_pytorch_needs_no_lightning():
    """The functions for plain PyTorch import nothing of Lightning."""
    run(
        "from lightning_prune import load_sparse, prune_filters, prune_obs, prune_weights, sensitivity\n"
        "import sys\n"
        "assert not {'lightning', 'pytorch_lightning'} & sys.modules.keys()"
    )


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_callbacks_are_there_as_soon_as_lightning_is(order):
    """Whatever is imported first, the callbacks are subclasses of both packages' own, where their CLIs find them."""
    run(f"{order}\n{KNOWN}")
