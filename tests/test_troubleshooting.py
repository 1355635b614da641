"""The page of messages knows every error of ours."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def raised():
    """Every place that raises PruningError with words of its own, and these."""
    for path in sorted((ROOT / "lightning_prune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "PruningError":
                words = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
                text = "…".join(word for word in words if isinstance(word, str))
                if re.search(r"\w+ \w+", text):  # else it only hands a message on
                    yield pytest.param(text, id=f"{path.stem}:{node.lineno}")


FRAGMENTS = [
    fragment for row in re.findall(r"^\| (.+?) \| ", PAGE, re.MULTILINE) for fragment in re.findall(r"`([^`]+)`", row)
]


@pytest.mark.parametrize("message", raised())
def test_every_message_is_on_the_page(message):
    """Some words of each message stand in the first column."""
    assert any(fragment in message for fragment in FRAGMENTS), message


def test_every_entry_is_met():
    """What the page says of messages of ours is raised somewhere."""
    own = PAGE.index("## When a run starts")
    source = "\n".join(path.read_text() for path in (ROOT / "lightning_prune").rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that lie on several lines
    for fragment in FRAGMENTS:
        if PAGE.find(f"`{fragment}`", own) > 0:
            assert fragment in plain, fragment
