"""The command ``sensitivity``: what each layer can lose before a metric falls."""

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

__all__ = ["TOLD", "add_arguments", "run"]

TOLD = f"""\
Cut each channel group alone by several shares, validate, take the cut back.

Nothing is retrained, and each cut is the real one. Writes sensitivity.json (a stopped run goes on from it),
sensitivity.png and amounts.yaml (ready for a pruning callback's init_args) into --out.

{RUN}
example:
  lightning-prune sensitivity --config run.yaml --ckpt_path best.ckpt --metric val_acc --drop 0.01 --out sensitivity
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run_options(parser, required=True)
    add = parser.add_argument
    add("--ignore", nargs="+", default=[], help="patterns of modules whose channels stay")
    add("--metric", required=True, help="name under which validation logs the metric")
    add("--mode", choices=("max", "min"), help="which is better; by default min if the name says loss or error")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--drop", type=float, default=0.01, help="how much worse the metric may be (default: 0.01)")
    add("--shares", type=float, nargs="+", default=TENTHS, help="shares that leave (default: 0.1 0.2 ... 0.9)")
    add("--weights", action="store_true", help="zero single weights, layer by layer, instead of cutting channels")
    add(
        "--criterion", choices=[*(name for name, make in CRITERIA.items() if not make().needs), "magnitude"],
        help="what says which leave first (default: l1; with --weights: magnitude, or random)",
    )  # fmt: skip


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Measure, write the files, print the table."""
    import_matplotlib()  # what is missing is told before hours are spent
    if (options.criterion or "random") not in (("magnitude", "random") if options.weights else CRITERIA):
        raise PruningError(
            f"--criterion {options.criterion} scores {'units' if options.weights else 'single weights'}."
        )
    trainer, model, datamodule = load_run(options, rest)
    if options.ckpt_path is not None:
        load_weights_(model, options.ckpt_path)
    results = options.out / "sensitivity.json"
    analyse: Any = trainer_weight_sensitivity if options.weights else trainer_sensitivity
    found = analyse(
        trainer, model, datamodule, metric=options.metric, mode=options.mode, shares=options.shares,
        criterion=options.criterion or ("magnitude" if options.weights else "l1"), ignore=options.ignore, path=results,
        done=Sensitivity.from_json(results) if results.exists() else None,
    )  # fmt: skip
    found.to_json(results)
    draw_sensitivity(found, options.out / "sensitivity.png")
    found.to_yaml(options.out / "amounts.yaml", options.drop)
    console = Console()
    console.print(sensitivity_table(found, options.drop))
    console.print(f"Written: {results}, sensitivity.png and amounts.yaml beside it.", soft_wrap=True)
