"""The figures on the page about deployment are those that the benchmark wrote."""

import json
from pathlib import Path

from benchmarks import deploy

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_benchmark():
    """Every table of the page is what ``python -m benchmarks.deploy --show`` prints."""
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    rows = json.loads(deploy.RESULTS.read_text())["rows"]
    assert {row["state"] for row in rows} == set(deploy.STATES) and len({row["form"] for row in rows}) == 9
    assert deploy.table(rows).strip() in page
