"""The command ``inspect``: which channels can be cut, what they cost, which stay and why."""

from __future__ import annotations

import argparse
import json

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from lightning_prune.analysis.sensitivity_findings import amount_paths
from lightning_prune.cli.runs import RUN, add_model_options, add_run_options, load_weights_, model_and_inputs
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import budget_by_group, check_arguments, with_ignored
from lightning_prune.pruning.budget import Budget
from lightning_prune.reports import group_costs, group_table, pinned_table, room_table
from lightning_prune.structure import Structure
from lightning_prune.surgery import find_groups

__all__ = ["TOLD", "add_arguments", "run"]

TOLD = f"""\
Show which channels can be cut, what they cost, which stay and why.

Nothing is cut. Give --config (a run), or --model (any class or function that makes a torch.nn.Module; its arguments
follow as --model.width 64) with --input_shape.

{RUN}
examples:
  lightning-prune inspect --config run.yaml
  lightning-prune inspect --model torchvision.models.resnet18 --input_shape 1,3,224,224
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run_options(parser, required=False)
    add_model_options(parser)
    add = parser.add_argument
    add("--ignore", nargs="+", default=[], help="patterns of modules whose channels stay")
    add("--min_width", type=yaml.safe_load, default=1, help="channels that stay, such as 8 or '{\"layer1*\": 8}'")
    add("--max_amount", type=yaml.safe_load, default=1.0, help="largest fraction of a layer that may leave, likewise")
    add("--round_to", type=int, default=1, help="widths are multiples of this")
    add("--yaml", action="store_true", help="print nothing but a block for amount=, to be filled in")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the channel groups and what stays."""
    limits = Budget(round_to=options.round_to, min_width=options.min_width, max_amount=options.max_amount)
    try:
        check_arguments(
            "inspect", 0.0, "l1", "filters", "layer", options.round_to, options.min_width, options.max_amount
        )
    except ValueError as error:
        raise PruningError(str(error)) from error
    model, inputs = model_and_inputs(options, rest)
    if options.ckpt_path is not None:
        load_weights_(model, options.ckpt_path)
    structure = with_ignored(model, find_groups(model, inputs), options.ignore)
    console = Console()
    if options.yaml:
        console.out(_block(structure), highlight=False)
        return
    console.print(group_table(structure, group_costs(model, structure)))
    console.print(room_table(model, structure, budget_by_group(model, structure, limits)))
    if structure.pinned:
        console.print(pinned_table(structure))


def _block(structure: Structure) -> str:
    """Return an ``amount:`` for YAML, zero for every group."""
    paths = amount_paths({name: group.producers for name, group in structure.groups.items()})
    widths = {path: structure.groups[name].width for name, path in paths.items()}
    return "\n  ".join(["amount:", *(f"{json.dumps(path)}: 0.0  # of {width} units" for path, width in widths.items())])
