"""MONK's problems and XOR by Optimal Brain Surgeon, beside Optimal Brain Damage, magnitude and what the paper reports.

    python -m benchmarks.hassibi1993 --data ../data --seeds 20

Every net is trained with weight decay from several starts until it solves its training set as well as the paper's did.
Then weights leave one by one while it does so still; where one removal spoils it, a short training of what is left may
mend that (rows "and mended"), else the net stands as it was before. For XOR every order of removals is tried beside
that, each with the surgeon's step for what is left. Writes ``hassibi1993.json`` as it goes.
"""

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import data_module
from lightning_prune.algorithms.solvers.brain_surgeon import inverse_of_outer_products
from lightning_prune.measure.curvature import outer_product_rows
from lightning_prune.pruning.exact import prune_exact

METHODS = ("obs", "obd", "magnitude")
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A training set, what net shall solve it, and what the paper reports.

    Attributes:
        train: Inputs ``(N, n)`` and targets ``(N, 1)``.
        test: Likewise.
        hidden: Hidden units.
        solved: Share of the training set that counts as solved.
        paper: Weights before and after, accuracy on training and test set, as printed.
        decay: Weight decay.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    hidden: int
    solved: float
    paper: str
    decay: float


def problems(folder: str) -> dict[str, Problem]:
    """Read the MONK's problems, and make XOR."""
    load = data_module(folder)
    square = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=torch.float64)
    xor = square, (square.sum(dim=1, keepdim=True) == 1).double()
    found = {"XOR": Problem(xor, xor, 2, 1.0, "finds the right weight to remove", 1e-5)}
    told = {1: (3, 1.0, "58 -> 14, 100/100"), 2: (2, 1.0, "39 -> 15, 100/100"), 3: (2, 0.934, "39 -> 4, 93.4/97.2")}
    for number, (hidden, solved, paper) in told.items():
        sets = [load.monks(number, split) for split in ("train", "test")]
        train, test = ((torch.from_numpy(x).double(), torch.from_numpy(y).double()[:, None]) for x, y in sets)
        found[f"MONK {number}"] = Problem(train, test, hidden, solved, paper, 3e-4)
    return found


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(((model(data[0]) > 0.5) == (data[1] > 0.5)).double().mean())


def train(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, decay: float, masks: Masks | None = None) -> None:
    """Minimise squared error and weight decay; masked weights stay at zero."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(data[0]), data[1]) + decay * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        for name, mask in (masks or {}).items():
            model.get_parameter(name).grad.mul_(mask)
        return loss

    optimizer.step(closure)


def trained(problem: Problem, seed: int) -> tuple[nn.Module, int]:
    """Train from ever new starts until the training set is solved, and return how many it took."""
    torch.manual_seed(seed)
    for start in range(1, 1001):
        first, last = nn.Linear(problem.train[0].shape[1], problem.hidden), nn.Linear(problem.hidden, 1)
        model = nn.Sequential(first, nn.Sigmoid(), last, nn.Sigmoid()).double()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)
        train(model, problem.train, 400, problem.decay)
        if accuracy(model, problem.train) >= problem.solved:
            return model, start
    raise RuntimeError("No start in a thousand solves the training set; try less weight decay.")


def prune(model: nn.Module, problem: Problem, method: str, mend: Callable[[nn.Module, Masks], None] | None) -> int:
    """Remove weights while the training set stays solved, and return how many are left."""
    masks: Masks | None = None
    count = sum(p.numel() for p in model.parameters())
    good = partial(_solves, problem)
    while True:
        report = prune_exact(model, batches=[problem.train], loss=F.mse_loss, method=method, masks=masks, accept=good)
        masks = report.kept
        if mend is None or not report.params_after:
            return report.params_after
        tried = copy.deepcopy(model)
        gone = (count - report.params_after + 1) / count
        further = prune_exact(tried, batches=[problem.train], loss=F.mse_loss, amount=gone, method=method, masks=masks)
        mend(tried, further.kept)
        if not good(tried):
            return report.params_after
        model.load_state_dict(tried.state_dict())
        masks = further.kept


def fewest_by_force(model: nn.Module, problem: Problem) -> int:
    """Return how many weights are left where no order of more removals, without training, leaves the set solved."""
    count = sum(p.numel() for p in model.parameters())
    nets = [(model, torch.ones(count, dtype=torch.bool))]
    for gone in range(1, count + 1):
        nets = [_without(net, left, which, problem) for net, left in nets for which in left.nonzero().flatten()]
        if not any(_solves(problem, net) for net, _ in nets):
            return count - gone + 1
    return 0


def _without(model: nn.Module, left: Tensor, which: Tensor, problem: Problem) -> tuple[nn.Module, Tensor]:
    """Remove one given weight; the others make up for it as well as the Hessian tells."""
    rows, examples = outer_product_rows(model, [problem.train], F.mse_loss, [n for n, _ in model.named_parameters()])
    inverse = inverse_of_outer_products(rows[:, left].double(), examples, 1e-4)
    values = nn.utils.parameters_to_vector(model.parameters()).detach()
    at = int(left[:which].sum())
    values[left] -= values[which] / inverse[at, at] * inverse[:, at]
    slim, left = copy.deepcopy(model), left.clone()
    left[which] = False
    nn.utils.vector_to_parameters(values * left, slim.parameters())
    return slim, left


def _solves(problem: Problem, model: nn.Module) -> bool:
    return accuracy(model, problem.train) >= problem.solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="problems, by name")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = Path(__file__).with_suffix(".json")
    results: dict[str, dict] = json.loads(path.read_text()) if arguments.only and path.exists() else {}
    told = {name: value for name, value in vars(arguments).items() if name != "data"}
    for name, problem in problems(arguments.data).items():
        if arguments.only and name not in arguments.only:
            continue
        mend = partial(_mend, problem)
        rows: dict[str, list] = {f"{m}{' and mended' if way else ''}": [] for m in METHODS for way in (None, mend)}
        dense, forced = [], []
        for seed in range(arguments.seeds):
            model, starts = trained(problem, seed)
            count = sum(p.numel() for p in model.parameters())
            dense.append([count, accuracy(model, problem.train), accuracy(model, problem.test), starts])
            if count < 10:
                forced.append(fewest_by_force(model, problem))
            for method, way in itertools.product(METHODS, (None, mend)):
                slim = copy.deepcopy(model)
                left = prune(slim, problem, method, way)
                row = [left, accuracy(slim, problem.train), accuracy(slim, problem.test)]
                rows[f"{method}{' and mended' if way else ''}"].append(row)
            results[name] = {
                "paper": problem.paper,
                "dense": dense,
                "rows": rows,
                "by force": forced,
                "arguments": told,
            }
            path.write_text(json.dumps(results, indent=1))
        Console().print(table(name, results[name]))


def _mend(problem: Problem, model: nn.Module, masks: Masks) -> None:
    train(model, problem.train, 200, problem.decay, masks)


def table(name: str, result: dict) -> Table:
    """One problem: weights left and accuracies, over all seeds."""
    found = Table(title=f"{name}; the paper's OBS: {result['paper']} (train/test %)")
    found.add_column("method")
    for heading in ("weights: least", "median", "most", "train %", "test %", "test % of the least"):
        found.add_column(heading, justify="right")
    for method, seeds in {"dense": result["dense"], **result["rows"]}.items():
        left = [seed[0] for seed in seeds]
        best = max(seed[2] for seed in seeds if seed[0] == min(left))
        means = [100 * statistics.mean(seed[i] for seed in seeds) for i in (1, 2)]
        cells = [min(left), statistics.median(left), max(left), *(f"{m:.1f}" for m in means), f"{100 * best:.1f}"]
        found.add_row(method, *map(str, cells))
    if forced := result.get("by force"):
        found.caption = f"fewest weights that any order of removals leaves, by seed: {forced}"
    return found


if __name__ == "__main__":
    main()
