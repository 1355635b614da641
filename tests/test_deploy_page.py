"""Pages quote what the benchmarks behind them wrote: the deploy page, the gallery, the reproductions."""

import json
import re
from pathlib import Path

from benchmarks import deploy

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_benchmark():
    """Every table of the page is what ``python -m benchmarks.deploy --show`` prints, and no figure is missing."""
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    stored = json.loads(deploy.RESULTS.read_text())
    rows = stored["rows"]
    assert {row["state"] for row in rows} == set(deploy.STATES) and len({row["form"] for row in rows}) == 10
    assert all(row["bytes"] and row["ms_1"] and row["ms_32"] for row in rows)
    assert deploy.table(rows).strip() in page
    assert deploy.table_of_widths(stored["widths"]).strip() in page


def test_the_gallery_shows_the_runs_of_its_script():
    """Under each picture are the first lines of its report, above it the callbacks of the script."""
    page = (ROOT / "docs" / "gallery.md").read_text()
    script = "".join((ROOT / "benchmarks" / "gallery.py").read_text().split())
    reports = json.loads((ROOT / "benchmarks" / "gallery.json").read_text())
    assert re.findall(r"\(images/(.+?)\.png\)", page) == list(reports)
    for name, lines in reports.items():
        assert "\n".join(f"* {line}" for line in lines) in page
        assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size < 60_000
    for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL):
        assert "".join(block.split()) in script


def test_every_section_of_the_benchmarks_is_on_one_page():
    """The pages of reproductions together hold benchmarks/README.md, each section once, and name no other."""
    headings = re.findall(r"^##? (.+)$", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE)
    pages = [path.read_text() for path in sorted((ROOT / "docs" / "reproductions").glob("*.md"))]
    named = [
        name for page in pages for name in re.findall(r"^<!-- benchmarks/README\.md: (.+) -->$", page, re.MULTILINE)
    ]
    assert sorted(named) == sorted(headings)
