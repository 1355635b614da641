"""Trains what a YAML of LightningCLI describes, for scripts that name their classes or none: one run of a sweep."""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fit`` of LightningCLI: ``python -m lightning_prune.cli.fit --config run.yaml``."""
    from lightning.pytorch.cli import LightningCLI

    import lightning_prune  # noqa: F401  # registers the short names of the callbacks

    sys.path.insert(0, os.getcwd())  # where import paths are looked up
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model_class")
    parser.add_argument("--data_class")
    options, rest = parser.parse_known_args(args)
    model_class = options.model_class and pkgutil.resolve_name(options.model_class)
    data_class = options.data_class and pkgutil.resolve_name(options.data_class)
    LightningCLI(model_class, data_class, args=["fit", *rest])


if __name__ == "__main__":
    main()
