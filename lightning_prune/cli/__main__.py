"""Lets ``python -m lightning_prune.cli`` do what the command does."""

from lightning_prune.cli import main

main()
