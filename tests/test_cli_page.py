"""The page of the command line lists what ``--help`` does: every command, every option, in its words."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune import __version__, cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "cli.md").read_text()


def commands():
    """The parser of each command, by name."""
    for action in cli.parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def row(action):
    """One line of a table: option, what it takes, and its help."""
    name = "`" + (", ".join(action.option_strings).replace("_", "-") or action.metavar) + "`"
    takes = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if not action.option_strings:
        takes = ""
    if action.choices:
        takes = ", ".join(map(str, action.choices))
    if action.nargs == "+":
        takes += " ..."
    return f"| {name} | {takes} | {action.help} |"


def tables():
    """The table of each command, as the page has it."""
    found = {}
    for name, command in commands().items():
        rows = [row(action) for action in command._actions if action.dest != "help"]
        found[name] = "\n".join(["| option | takes | meaning |", "| --- | --- | --- |", *rows])
    return found


@pytest.mark.parametrize("name", list(commands()))
def test_every_option_is_on_the_page(name):
    """Under the heading of a command stands its table, which is what its parser says now."""
    section = PAGE.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    assert tables()[name] in section
    assert {line for line in section.splitlines() if line.startswith("| `")} == set(tables()[name].splitlines()[2:])


def test_no_command_is_missing():
    """The page has a heading for each command, and for no other."""
    assert re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE) == list(commands())


def test_every_command_line_on_the_page_parses():
    """Each line that begins with lightning-prune is accepted, down to the files, which need not be there."""
    lines = re.findall(r"^lightning-prune (.+)$", PAGE, re.MULTILINE)
    assert len(lines) >= len(commands())
    known = {option for command in commands().values() for option in command._option_string_actions}
    for line in lines:
        words = line.split(" #")[0].split()
        assert words[0] in commands() or words == ["--version"], line
        for word in words[1:]:
            if word.startswith("--") and "." not in word:
                assert word.replace("-", "_").replace("__", "--", 1) in known, line


def test_version():
    """``lightning-prune --version`` prints the version of the package."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune.cli", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == f"lightning-prune {__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete(shell):
    """What shtab makes of the parser completes commands and options."""
    shtab = pytest.importorskip("shtab")
    script = shtab.complete(cli.parser(), shell)
    assert all(word in script for word in ("sensitivity", "--input_shape", "--external_data"))
