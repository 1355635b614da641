"""LeNets pruned at once on MNIST: error against sparsity by magnitude and by OBS, and after a short retraining.

    python -m benchmarks.obs_lenet --data DIR

Each network is trained densely, once a seed. Copies are pruned without labels and tested as they are; at the
sparsities that L-OBS reports (Lee et al. 2019, Table 1) they are trained on with the zeros held, and tested again.
Results go into ``obs_lenet.json`` beside this file as they come, and what is there is not run again.
"""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches
from benchmarks.han2015 import SNIP, Run, begin, command_line, train
from benchmarks.training import accuracy
from lightning_prune import IterativeMagnitudePruning, prune_obs, prune_weights

RESULTS = Path(__file__).with_suffix(".json")
AMOUNTS = (0.5, 0.7, 0.8, 0.9, 0.95)
RETRAINED = {"LeNet-300-100": 0.985, "LeNet-5": 0.99}  # where L-OBS has 2.0 and 2.1 % errors
PASSES = 2  # of retraining, over the training images
SLOW = "exact, split"  # one seed has to do
Prune = Callable[[nn.Module, list[Tensor], float], object]


def by_magnitude(scope: str) -> Prune:
    """Zero the smallest weights."""
    return lambda net, _, amount: prune_weights(net, amount, scope=scope)


def by_surgery(solver: str, scope: str, sequential: bool = False) -> Prune:
    """Zero weights by second-order surgery, layer by layer."""
    return lambda net, batches, amount: prune_obs(
        net, batches=batches, amount=amount, solver=solver, scope=scope, sequential=sequential, progress=False
    )


WAYS: dict[str, Prune] = {
    "magnitude, by layer": by_magnitude("layer"),
    "magnitude, one threshold": by_magnitude("global"),
    SLOW: by_surgery("exact", "global"),
    "admm, by layer": by_surgery("admm", "layer"),
    "admm, split": by_surgery("admm", "global"),
    "admm, split, sequential": by_surgery("admm", "global", sequential=True),
}


def retrained(net: nn.Module, batches: Batches, lr: float) -> nn.Module:
    """Train on, what is zero staying zero."""
    net = copy.deepcopy(net)
    train(net, batches, PASSES, lr, [IterativeMagnitudePruning(0.0, scope="global")])
    return net


def table(name: str, found: dict[str, dict[str, float]]) -> Table:
    """Mean errors and their spread over the seeds, way by way."""
    rows = Table("error, %", *(f"{amount:.1%}" for amount in columns(name)), title=f"{name} on MNIST, pruned at once")
    for way in ("dense", *WAYS, *(f"{way}, retrained" for way in WAYS)):
        cells = []
        for amount in columns(name):
            own = [seed[key] for seed in found.values() if (key := f"{way} {amount}") in seed]
            spread = f" ± {stdev(own):.2f}" if len(own) > 1 else ""
            cells.append(f"{mean(own):.2f}{spread}" if own else "")
        if any(cells):
            rows.add_row(way, *cells)
    sparsity, error = SNIP["L-OBS"][name]
    rows.caption = f"L-OBS, retrained, {sparsity} %: {error}"
    return rows


def columns(name: str) -> tuple[float, ...]:
    """Return the sparsities of a table; 0 is the dense network."""
    return 0.0, *AMOUNTS, RETRAINED[name]


def main() -> None:
    """Read the command line, train, prune, print the tables, write the JSON."""
    parser = command_line(__doc__, 3, RESULTS, threads=1)
    parser.add_argument("--images", type=int, default=1024, help="training images, without labels, that OBS looks at")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate")
    options, data, results = begin(parser)
    batches = list(data[0][: options.images].split(128))
    tests = Batches(*data[2:], 1000)

    for name, seed in itertools.product(options.networks, range(options.seeds)):
        run = Run(name, seed, data, options.lr)
        found = results.setdefault(name, {}).setdefault(str(seed), {})

        def note(key: str, net: nn.Module, found: dict = found) -> None:
            found[key] = round(100 * (1 - accuracy(net, tests)), 2)
            options.json.write_text(json.dumps(results, indent=1) + "\n")

        if "dense 0.0" not in found:
            note("dense 0.0", run.dense())
        for amount, (way, prune) in itertools.product(columns(name)[1:], WAYS.items()):
            again = f"{way}, retrained {amount}" if amount == RETRAINED[name] else None
            if (way == SLOW and seed) or (f"{way} {amount}" in found and (again is None or again in found)):
                continue
            net = copy.deepcopy(run.dense())
            prune(net, batches, amount)
            note(f"{way} {amount}", net)
            if again:
                on = Batches(data[0], data[1], 128, train=True, seed=seed + 2000, crop=False)
                note(again, retrained(net, on, options.lr / 2))
    for name in options.networks:
        Console().print(table(name, results[name]))


if __name__ == "__main__":
    main()
