"""The source distribution holds all that the tests need, and the wheel all that the package needs."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(__file__).parents[1]
NAME = f"lightning_prune-{lightning_prune.__version__}"
FOLDERS = ("lightning_prune", "tests", "benchmarks", "docs", "examples", ".github")
LEFT_BEHIND = ("__pycache__", "lightning_logs", "checkpoints", "digits")

pytest.importorskip("hatchling")


def files_of(folder: str) -> set[str]:
    """Return the files in a folder of the project, without what runs leave there."""
    paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path) for path in paths if not set(path.parts) & set(LEFT_BEHIND)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Return the folder with both distributions."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def unpacked(built) -> Path:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        archive.extractall(built)
    return built / NAME


def test_the_source_distribution_is_complete(unpacked):
    """Each file that a test, an example or a page needs is in the source distribution."""
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    expected = {"conftest.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    expected |= {"constraints.txt", "constraints-oldest.txt", "CONTRIBUTING.md", "mkdocs.yml"}
    for folder in FOLDERS:
        expected |= files_of(folder)
    assert expected - packed == set()
    assert packed - expected <= {"PKG-INFO", ".gitignore"}


def test_the_wheel_is_complete(built):
    """The wheel holds the package with its marker for type checkers, the licence and the command, and no tests."""
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
        commands = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    package = {name for name in names if not name.startswith(f"{NAME}.dist-info/")}
    assert package == files_of("lightning_prune") and "lightning_prune/py.typed" in package
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert "lightning-prune = lightning_prune.cli:main" in commands
    assert (metadata["Name"], metadata["Version"]) == ("lightning-prune", lightning_prune.__version__)


def test_the_wheel_imports_alone(built):
    """The package imports from the wheel, with no file of the project beside it."""
    wheel = built / f"{NAME}-py3-none-any.whl"
    script = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import lightning_prune, torch; from torch import nn; "
        "model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)); "
        "lightning_prune.prune_filters(model, torch.randn(1, 4), 0.5, progress=False); "
        "print(lightning_prune.__file__, model[0].out_features)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=built, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{wheel}/lightning_prune/__init__.py", "4"]


@pytest.mark.parametrize(
    "tests",
    [
        ["tests/test_versions.py", "tests/test_architecture.py", "tests/test_resume_changed.py"],
        pytest.param(
            ["tests/test_docs.py", "tests/test_cut.py", "tests/test_cli.py", "tests/test_ddp.py", "lightning_prune"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["few", "more"],
)
def test_tests_run_from_the_source_distribution(unpacked, tests):
    """The tests pass in an unpacked source distribution, which is no git repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
