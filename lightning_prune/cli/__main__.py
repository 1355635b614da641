"""Runs the command line as ``python -m lightning_prune.cli``."""

from lightning_prune.cli import main

main()
