"""The command ``lightning-prune``: one file for each of its commands, which read options and print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_prune.cli import export, inspect, report, sensitivity
from lightning_prune.model.errors import PruningError

__all__ = ["main"]

_COMMANDS = {"inspect": inspect, "sensitivity": sensitivity, "report": report, "export": export}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options, rest = _parser().parse_known_args(args)
    sys.path.insert(0, os.getcwd())
    try:
        _COMMANDS[options.command].run(options, rest)
    except PruningError as error:
        sys.exit(f"lightning-prune {options.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-prune", description="Look at a model before and after pruning it.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in _COMMANDS.items():
        told = {"help": command.TOLD.partition("\n")[0], "description": command.TOLD}
        raw = argparse.RawDescriptionHelpFormatter
        command.add_arguments(commands.add_parser(name, **told, allow_abbrev=False, formatter_class=raw))
    return parser
