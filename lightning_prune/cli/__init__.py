"""The command ``lightning-prune``: one file for each subcommand."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_prune import __version__
from lightning_prune.cli import export, inspect, report, sensitivity, sweep
from lightning_prune.model.errors import PruningError

__all__ = ["main", "parser"]

_COMMANDS = {"inspect": inspect, "sensitivity": sensitivity, "report": report, "export": export, "sweep": sweep}
_PACKAGE = str(Path(__file__).parents[1])


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if args is None else args
    options, rest = parser().parse_known_args([_underscored(argument) for argument in given])
    sys.path.insert(0, os.getcwd())  # where import paths such as my_script.Net are looked up
    try:
        _COMMANDS[options.command].run(options, rest)
    except PruningError as error:
        _stop(f"lightning-prune {options.command}", str(error))
    except (ImportError, ValueError) as error:
        # Those that this package raises are messages to the user. Those of the user's code keep their traceback.
        *_, innermost = traceback.extract_tb(error.__traceback__)
        if not innermost.filename.startswith(_PACKAGE):
            raise
        _stop(f"lightning-prune {options.command}", str(error))


def _underscored(argument: str) -> str:
    """Return an option such as ``--input-shape`` with underscores, as Lightning spells its own."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or "." in name:  # --model.some-key names an argument of the user's
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


def _stop(where: str, message: str) -> NoReturn:
    """Print an error on one line and exit with status 2."""
    print(f"{where}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print an error on one line, without the usage of thirty options."""
        _stop(self.prog, f"{message}. See {self.prog} --help.")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with all commands; tools that complete options in shells read it."""
    made = _Parser(
        prog="lightning-prune", description="Inspect a model before and after pruning it.", allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=f"lightning-prune {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in _COMMANDS.items():
        summary = command.DESCRIPTION.partition("\n")[0]
        subparser = commands.add_parser(
            name, help=summary, description=command.DESCRIPTION, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_arguments(subparser)
    return made
