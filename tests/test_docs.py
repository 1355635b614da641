"""The README and the documentation do what they say."""

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

import lightning_prune
from lightning_prune.callbacks.engine.engine import Engine
from lightning_prune.callbacks.engine.unit_removal import UnitRemoval

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {
    "executorch",
    "openvino",
    "torchao",
}  # runtimes that no extra installs; whoever has them, tests their blocks
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), start=1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_code_runs(block, tmp_path, monkeypatch):
    """Each block runs by itself, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(block, "block", "exec"), {"__name__": "block"})
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_it_names_exist(page):
    """Links to files of the project lead somewhere."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def anchors(page):
    """The anchors of a page's headings, as mkdocs makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        made = re.search(r"\{ *#([\w-]+) *\}", words)
        found.add(made[1] if made else re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headings_that_it_names_exist(page):
    """Links to a heading, of this page or of another, lead to one."""
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        other = page.parent / target if target else page
        assert anchor in anchors(other), (target, anchor)


def test_every_page_is_in_the_navigation():
    """No page of the documentation is left without a way to it."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation, page


def test_every_public_name_is_documented():
    """The API page names everything that the package exports."""
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^::: lightning_prune\.(\w+)$", page, re.MULTILINE)) == set(lightning_prune.__all__)


def test_the_way_of_amount_is_the_code():
    """Each of its ten calls is made in the file of one before it, and its source is shown where it links to."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    way = re.findall(r"^\d+\. \[`[\w.]+`\]\[(lightning_prune[\w.]+)\]", page, re.MULTILINE)
    assert len(way) == 10
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE)
    assert shown == way
    start = lightning_prune.FilterL1Pruning, Engine, UnitRemoval  # the callback, what drives it, what it does
    files = [inspect.getsource(inspect.getmodule(part)) for part in start]
    for name in way:
        call = resolve_name(name)
        called = re.compile(rf"(?<!def )(?<!class )\b{call.__name__}\(")
        assert any(called.search(source) for source in files), name
        files.append(inspect.getsource(inspect.getmodule(call)))
