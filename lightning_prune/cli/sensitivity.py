"""The command ``sensitivity``: how much of each layer can be pruned before a metric falls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_prune.analysis.layer_sensitivity import TENTHS
from lightning_prune.analysis.sensitivity_findings import Sensitivity
from lightning_prune.callbacks.validation import trainer_sensitivity, trainer_weight_sensitivity
from lightning_prune.cli.runs import RUN, add_run_options, load_run, load_weights_
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.scoring import CRITERIA
from lightning_prune.reports import draw_sensitivity, import_matplotlib, sensitivity_table

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = f"""\
Prune each channel group alone by several fractions, validate, and undo the pruning.

Nothing is retrained, and channels are really removed. Writes sensitivity.json (from which a stopped analysis
continues), sensitivity.png and amounts.yaml (for a pruning callback's init_args) to --out.

{RUN}
example:
  lightning-prune sensitivity --config run.yaml --ckpt_path best.ckpt --metric val_acc --drop 0.01 --out sensitivity
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run_options(parser, required=True)
    add = parser.add_argument
    add("--module", nargs="+", help="paths of modules: this part of the model alone is analysed")
    add("--ignore", nargs="+", default=[], help="patterns of modules not to prune")
    add("--metric", required=True, help="name under which validation logs the metric")
    add("--mode", choices=("max", "min"), help="which is better; by default min if the name says loss or error")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--drop", type=float, default=0.01, help="how much worse the metric may become (default: 0.01)")
    add("--shares", type=float, nargs="+", default=TENTHS, help="fractions to prune (default: 0.1 0.2 ... 0.9)")
    add("--weights", action="store_true", help="zero single weights, layer by layer, instead of pruning channels")
    names = [name for name, make in CRITERIA.items() if not make().needs]
    criteria = "criterion that ranks units (default: l1); with --weights: magnitude (the default) or random"
    add("--criterion", choices=[*names, "magnitude"], help=criteria)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Measure, write the files, print the table."""
    import_matplotlib()  # if it is missing, stop before hours are spent
    if options.drop < 0:
        raise PruningError(f"--drop {options.drop:g}: must be 0 or more. It is how much worse the metric may become.")
    criterion = options.criterion or ("magnitude" if options.weights else "l1")
    if options.weights and criterion not in ("magnitude", "random"):
        raise PruningError(f"--criterion {criterion} scores units. Choose magnitude or random with --weights.")
    if not options.weights and criterion not in CRITERIA:
        raise PruningError(f"--criterion {criterion} scores single weights. Add --weights, or choose another.")
    trainer, model, datamodule = load_run(options, rest)
    if options.ckpt_path is not None:
        load_weights_(model, options.ckpt_path)
    results = options.out / "sensitivity.json"
    analyse: Any = trainer_weight_sensitivity if options.weights else trainer_sensitivity
    found = analyse(
        trainer, model, datamodule, metric=options.metric, mode=options.mode, shares=options.shares,
        criterion=criterion, module=options.module, ignore=options.ignore, path=results,
        done=Sensitivity.from_json(results) if results.exists() else None,
    )  # fmt: skip
    found.to_json(results)
    draw_sensitivity(found, options.out / "sensitivity.png")
    found.to_yaml(options.out / "amounts.yaml", options.drop)
    console = Console()
    console.print(sensitivity_table(found, options.drop))
    written = f"Written to {options.out}: sensitivity.json, sensitivity.png and amounts.yaml."
    console.print(written, soft_wrap=True, markup=False)
