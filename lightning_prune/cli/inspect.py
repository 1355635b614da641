"""The command ``inspect``: channel groups, their cost and limits, and channels that cannot be pruned."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from lightning_prune.analysis.sensitivity_findings import amount_paths
from lightning_prune.cli.runs import RUN, add_model_options, add_run_options, load_weights_, model_and_inputs
from lightning_prune.pruning.arguments import budget_by_group, check_arguments, with_ignored
from lightning_prune.pruning.budget import Budget
from lightning_prune.reports import group_costs, group_table, pinned_table, room_table
from lightning_prune.structure import Structure
from lightning_prune.surgery import find_groups

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = f"""\
Show which channels can be pruned, what they cost, and which cannot be pruned and why.

Nothing is pruned. Give --config (a run), or --model (any class or function that returns a torch.nn.Module; its
arguments follow as --model.width 64) with --input-shape.

{RUN}
examples:
  lightning-prune inspect --config run.yaml
  lightning-prune inspect --model torchvision.models.resnet18 --input-shape 1,3,224,224
  lightning-prune inspect --model my_script.language_model --input-shape 1,128 --tokens 50257
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run_options(parser, required=False)
    add_model_options(parser)
    add = parser.add_argument
    add("--ignore", nargs="+", default=[], help="patterns of modules not to prune")
    add("--min_width", type=_yaml, default=1, help="least channels of a layer, such as 8 or '{\"layer1*\": 8}'")
    add("--max_amount", type=_yaml, default=1.0, help="largest fraction of a layer to prune, likewise")
    add("--round_to", type=int, default=1, help="widths are multiples of this")
    add("--yaml", action="store_true", help="print nothing but a block for amount=, to fill in")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the channel groups, and the channels that cannot be pruned."""
    limits = Budget(round_to=options.round_to, min_width=options.min_width, max_amount=options.max_amount)
    check_arguments("inspect", 0.0, "l1", "filters", "layer", options.round_to, options.min_width, options.max_amount)
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
    """Return a YAML block of ``amount:``, zero for every group."""
    producers = {name: group.producers for name, group in structure.groups.items()}
    lines = {}
    for name, path in amount_paths(producers).items():
        lines[path] = f"  {json.dumps(path)}: 0.0  # of {structure.groups[name].width} units"
    return "\n".join(["amount:", *lines.values()])


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML") from error
