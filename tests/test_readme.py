"""The README does what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_every_block_of_code_runs(block):
    """Each block runs by itself, as a reader would paste it."""
    exec(compile(block, "README.md", "exec"), {})


def test_files_that_it_names_exist():
    """Links to files of the project lead somewhere."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
