"""What the project says of versions is one truth: pyproject, both constraints files, README, docs and CI agree."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_prune

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
TESTED_EXTRAS = ("cli", "plots", "examples", "test")


def requirements(*extras: str) -> list[Requirement]:
    """Return what the package and its extras need, without the package itself."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines if Requirement(line).name != PROJECT["name"]]


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    return Version(bound.version)


def pinned(name: str) -> dict[str, Version]:
    """Return the versions in a constraints file."""
    versions = {}
    for line in (ROOT / name).read_text().splitlines():
        if not line.startswith("#"):
            package, version = line.split("==")
            versions[package.lower().replace("_", "-")] = Version(version)
    return versions


def bound(name: str) -> Version:
    (found,) = [lower_bound(needed) for needed in requirements(*TESTED_EXTRAS) if needed.name == name]
    return found


def short(version: Version) -> str:
    return f"{version.major}.{version.minor}"


OLDEST_PYTHON = PROJECT["requires-python"].removeprefix(">=")
CLASSIFIED = [
    line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.fullmatch(r".* :: Python :: \d\.\d+", line)
]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())


@pytest.mark.parametrize("requirement", requirements(*TESTED_EXTRAS), ids=lambda requirement: requirement.name)
def test_each_lower_bound_is_a_version_that_is_tested(requirement):
    """``make test-oldest`` installs exactly the lowest version that pyproject allows."""
    assert pinned("constraints-oldest.txt")[requirement.name.lower()] == lower_bound(requirement)


@pytest.mark.parametrize(
    "requirement",
    requirements(*TESTED_EXTRAS, "docs", "lint"),
    ids=lambda requirement: requirement.name,
)
def test_what_make_installs_is_allowed(requirement):
    """Each package is pinned in constraints.txt, at a version that pyproject allows."""
    assert pinned("constraints.txt")[requirement.name.lower()] in requirement.specifier


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_pages_name_the_bounds(page):
    """README and the first page of the docs name the lowest Python, torch and Lightning."""
    named = f"Python {OLDEST_PYTHON}, torch {short(bound('torch'))} and Lightning {short(bound('lightning'))} or newer"
    assert named in " ".join((ROOT / page).read_text().split())


def test_the_readme_names_what_is_tested():
    """The README names the versions of torch and Lightning in constraints.txt."""
    tested = pinned("constraints.txt")
    named = f"torch {short(tested['torch'])} and Lightning {short(tested['lightning'])}"
    assert named in " ".join((ROOT / "README.md").read_text().split())


def test_ci_runs_each_python_that_is_named():
    """CI tests each Python of the classifiers: the lowest with the lowest packages, others as make does."""
    newer = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"]
    (oldest,) = [step["with"] for step in WORKFLOW["jobs"]["oldest"]["steps"] if "with" in step]
    assert oldest["python-version"] == OLDEST_PYTHON
    assert WORKFLOW["jobs"]["oldest"]["steps"][-1]["run"] == "make test-oldest"
    assert [OLDEST_PYTHON, *newer] == CLASSIFIED
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {newer[0]}" in " ".join((ROOT / page).read_text().split())


def test_tools_check_for_the_lowest_python():
    """Ruff, mypy and the Makefile know the lowest Python."""
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + OLDEST_PYTHON.replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == OLDEST_PYTHON
    assert f"OLDEST_PYTHON ?= python{OLDEST_PYTHON}\n" in (ROOT / "Makefile").read_text()


def test_the_version_is_said_once():
    """CITATION.cff and the changelog name the version of the package."""
    assert f"\nversion: {lightning_prune.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {lightning_prune.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
