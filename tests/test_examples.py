"""The examples run and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def shown(script: str, *args: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / script, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_transformer_loses_heads_and_hidden_units():
    """Of the transformer whole heads and hidden units leave until 60 % of its FLOPs are left."""
    found = re.search(r"([\d.]+)% of the FLOPs left; heads \[(\d), (\d)\]", shown("transformer.py", "--epochs", "12"))
    assert float(found[1]) <= 60.0 and max(int(found[2]), int(found[3])) < 6


@pytest.mark.slow
def test_surgery_keeps_what_magnitude_loses():
    """With nine of ten weights zeroed at once, surgery keeps the accuracy within 5 points; magnitude does not."""
    text = shown("one_shot.py")
    dense = float(re.search(r"dense: ([\d.]+)%", text)[1])
    by_magnitude, by_surgery = map(float, re.search(r"90% +│ ([\d.]+)% +│ ([\d.]+)%", text).groups())
    assert by_surgery > dense - 5 > by_magnitude
