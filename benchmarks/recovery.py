"""Compares ways to recover while a trained ResNet-20 loses half its FLOPs: at once, fading, in steps, with a teacher.

    python -m benchmarks.recovery --data DIR [--seeds 2]      # torch-pruning for its row

Every run starts from the same trained network and takes as many optimizer steps over the same images, with a learning
rate that falls to zero along a cosine. ``TaylorFilterPruning`` gathers its scores in the first steps. Results go into
``recovery.json`` beside this file as they come, and what is there is not run again.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.data import Batches, cifar10, data_module
from benchmarks.half_flops import ONE_IMAGE, SCORED, Method, torch_pruning
from benchmarks.models import resnet_cifar
from benchmarks.training import Classifier, accuracy
from lightning_prune import Cubic, OneShot, TaylorFilterPruning, count_flops
from lightning_prune.callbacks import DistillFromDense

RESULTS = Path(__file__).with_suffix(".json")
FIRST = 40  # steps that gather scores before the first pruning step
HALF = {"amount": 0.5, "target": "flops", "scope": "global", "report": False}
PEER = "torch-pruning, Taylor, at once"


def callbacks(arm: str, steps: int) -> list[pl.Callback]:
    """Return the callbacks of one arm."""
    if arm in ("dense, trained on", PEER):
        return []
    how = arm.removesuffix(", distilled")
    last = FIRST + 2 * steps // 5
    if how == "at once":
        found: list[pl.Callback] = [TaylorFilterPruning(**HALF, schedule=OneShot(at=FIRST, by="steps"))]
    elif how == "fading":
        found = [TaylorFilterPruning(**HALF, schedule=OneShot(at=last, by="steps"), fade_steps=last - FIRST)]
    else:
        schedule = Cubic(start=FIRST, end=last, every=(last - FIRST) // 4, by="steps")
        found = [TaylorFilterPruning(**HALF, schedule=schedule)]
    if arm != how:
        found.append(DistillFromDense())
    return found


ARMS = (
    "dense, trained on", "at once", "at once, distilled", "fading", "fading, distilled", "in four steps",
    "in four steps, distilled", PEER,
)  # fmt: skip


def run(net: nn.Module, arm: str, batches: Batches, epochs: int, lr: float) -> None:
    """Train one network in place, pruning it meanwhile."""
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=callbacks(arm, epochs * len(batches)),
    )  # fmt: skip
    trainer.fit(Classifier(net.train(), lr=lr, anneal=True), batches)


def table_of(results: dict[str, dict[str, dict[str, float]]], settings: dict[str, float]) -> Table:
    """Lay out the mean over the seeds of every arm."""
    seen = settings["images"] * settings["epochs"]
    table = Table("", "FLOPs left", "accuracy", "of each seed", title=f"ResNet-20, {seen:,.0f} training images seen")
    for arm, by_seed in results.items():
        own = [f"{of['accuracy']:.2%}" for of in by_seed.values()]
        flops, right = (mean(of[key] for of in by_seed.values()) for key in ("flops_left", "accuracy"))
        table.add_row(arm, f"{flops:.1%}", f"{right:.2%}", ", ".join(own))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder, see README.md")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--train-parts", type=int, default=2, help="parts of 5,000 training images")
    parser.add_argument("--test-parts", type=int, default=2, help="parts of 5,000 test images")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dense = resnet_cifar(20)
    dense.load_state_dict(data_module(options.data).resnet_cifar10(20))
    images, labels = cifar10(options.data, "train", options.train_parts)
    test = Batches(*cifar10(options.data, "test", options.test_parts), batch_size=250)
    scored = list(Batches(images[:SCORED], labels[:SCORED], batch_size=128))
    settings = {"images": len(images), "epochs": options.epochs, "lr": options.lr, "tested": len(test.images)}
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"settings": settings, "runs": {}}
    if found["settings"] != settings:
        raise SystemExit(f"{RESULTS} holds runs of {found['settings']}; move it away to run {settings}.")
    whole = count_flops(dense, ONE_IMAGE).total
    for seed in range(options.seeds):
        for arm in options.arms:
            own = found["runs"].setdefault(arm, {})
            if str(seed) in own:
                continue
            torch.manual_seed(seed)
            net = copy.deepcopy(dense)
            if arm == PEER:
                net = torch_pruning(dense, Method("torch-pruning", "taylor", "global", "inner"), scored)
            run(net, arm, Batches(images, labels, 128, train=True, seed=seed), options.epochs, options.lr)
            own[str(seed)] = {
                "flops_left": count_flops(net, ONE_IMAGE).total / whole,
                "accuracy": accuracy(net, test),
            }
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(arm, seed, own[str(seed)], flush=True)
    Console(width=120).print(table_of(found["runs"], settings))


if __name__ == "__main__":
    main()
