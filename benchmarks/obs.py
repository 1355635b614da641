"""One-shot pruning without retraining: magnitude beside second-order surgery, on weights and on filters.

    python -m benchmarks.obs weights --data ../data --depth 20
    python -m benchmarks.obs filters --data ../data --depth 20
    python -m benchmarks.obs layers --data ../data --depth 20
    python -m benchmarks.obs speed --size 4096

``weights`` and ``filters`` give accuracy on test images, ``layers`` the error of layers beside the exact solver's,
``speed`` the blocked solver beside a Cholesky factorisation and a triangular solve. Each writes what it prints, as it
goes, into ``obs-<what>-<depth>.json`` beside this file.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.data import Batches, cifar10, data_module
from benchmarks.models import resnet_cifar
from benchmarks.training import accuracy
from lightning_prune import prune_filters, prune_obs, prune_weights
from lightning_prune.algorithms.solvers import SOLVERS, damped, rise
from lightning_prune.algorithms.solvers.blocked import factor
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import gather_grams
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import call_on

ONE_IMAGE = torch.zeros(1, 3, 32, 32)


def weights(arguments: argparse.Namespace, note: Callable[..., None]) -> None:
    """Accuracy of a trained ResNet with ever more of its weights zeroed at once."""
    model, calibration, test = _trained(arguments)
    note("dense", 0.0, accuracy=accuracy(model, test))
    ways: dict[str, Callable[[nn.Module, float], Any]] = {
        "magnitude, one threshold": lambda m, amount: prune_weights(m, amount, scope="global"),
        "magnitude, by layer": lambda m, amount: prune_weights(m, amount, scope="layer"),
    }
    for solver in arguments.solvers:
        ways[f"{solver}, by layer"] = partial(_by_surgery, calibration, solver, "layer", False)
        ways[f"{solver}, split"] = partial(_by_surgery, calibration, solver, "global", False)
    if arguments.sequential:
        ways["admm, split, sequential"] = partial(_by_surgery, calibration, "admm", "global", True)
    for amount in arguments.amounts:
        for name, prune in ways.items():
            if not any(part in name for part in arguments.ways):
                continue
            pruned = copy.deepcopy(model)
            start = time.process_time()
            prune(pruned, amount)
            spent = time.process_time() - start
            note(name, amount, accuracy=accuracy(pruned, test), cpu_seconds=spent)


def _by_surgery(
    batches: list[Tensor], solver: str, scope: str, sequential: bool, model: nn.Module, amount: float
) -> None:
    prune_obs(model, batches=batches, amount=amount, solver=solver, scope=scope, sequential=sequential)


def filters(arguments: argparse.Namespace, note: Callable[..., None]) -> None:
    """Accuracy of a trained ResNet, some of its FLOPs cut at once, with repair and without."""
    model, calibration, test = _trained(arguments)
    note("dense", 0.0, accuracy=accuracy(model, test))
    one = calibration[0][:1]
    ways: dict[str, Callable[[nn.Module, float], Any]] = {
        "l1, by layer, as cut": lambda m, amount: prune_filters(m, one, amount, criterion="l1", target="flops"),
        "l1, by layer, repaired": lambda m, amount: prune_filters(
            m, one, amount, target="flops", batches=calibration, repair=True
        ),
        "obs, by layer, repaired": lambda m, amount: prune_filters(
            m, one, amount, criterion="obs", target="flops", batches=calibration
        ),
        "obs, split, repaired": lambda m, amount: prune_filters(
            m, one, amount, criterion="obs", target="flops", scope="global", batches=calibration
        ),
    }
    for amount in arguments.amounts:
        for name, prune in ways.items():
            if not any(part in name for part in arguments.ways):
                continue
            pruned = copy.deepcopy(model)
            start = time.process_time()
            prune(pruned, amount)
            spent = time.process_time() - start
            note(name, amount, accuracy=accuracy(pruned, test), cpu_seconds=spent)


def layers(arguments: argparse.Namespace, note: Callable[..., None]) -> None:
    """Error of every layer at half of its weights, beside the exact greedy solver's; and each solver's time."""
    model, calibration, _ = _trained(arguments)
    products = find_products(model, calibration[0], call_on)
    grams = gather_grams(model, products, list(products.readings), Calibration(calibration))
    for name, gram in grams.items():
        rows = gram.reading.rows(model.get_parameter(name).detach()).double()
        hessian = damped(gram.hessian, 0.01)
        errors, seconds = {}, {}
        for solver, solve in SOLVERS.items():
            start = time.process_time()
            new, _ = solve(rows, hessian).solve(rows.numel() // 2)
            seconds[solver] = time.process_time() - start
            errors[solver] = float(rise(new - rows, hessian).sum())
        shares = {solver: error / errors["exact"] for solver, error in errors.items()}
        note(name, 0.5, **shares, **{f"{solver}_cpu_seconds": spent for solver, spent in seconds.items()})


def speed(arguments: argparse.Namespace, note: Callable[..., None]) -> None:
    """Rate of the blocked solver at half of a wide layer's weights beside its limit, in turns."""
    size = arguments.size
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 2 * size, generator=generator) * torch.rand(size, 1, generator=generator)
    hessian = damped((inputs @ inputs.T / (2 * size))[None], 0.01)
    rows = torch.randn(1, size, size, generator=generator)
    right = rows[0].T.contiguous()
    times: dict[str, list[float]] = {"factor": [], "blocked": [], "cholesky and solve": []}
    for _ in range(arguments.turns):
        times["factor"].append(_timed(lambda: factor(hessian)))
        times["blocked"].append(_timed(lambda: SOLVERS["blocked"](rows, hessian).solve(size * size // 2)))
        times["cholesky and solve"].append(
            _timed(lambda: torch.linalg.solve_triangular(torch.linalg.cholesky(hessian[0]), right, upper=False))
        )
    # Multiply-adds, two FLOPs each: n^3 / 6 a factor, n^3 / 2 a triangular solve of n columns, as much for a sweep of n
    # rows; n^3 for each of three passes of the fit, beside five products in each of their blocks of 128 columns.
    fit = 3 * (1 + 5 * 128 / size)
    work = {"factor": 1 / 6, "blocked": 1 / 6 + 1 / 2 + fit, "cholesky and solve": 1 / 6 + 1 / 2}
    for name, spent in times.items():
        note(name, 0.5, seconds=median(spent), gflops=2 * work[name] * size**3 / median(spent) / 1e9)


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _trained(arguments: argparse.Namespace) -> tuple[nn.Module, list[Tensor], Batches]:
    model = resnet_cifar(arguments.depth)
    model.load_state_dict(data_module(arguments.data).resnet_cifar10(arguments.depth))
    images, _ = cifar10(arguments.data, "train", parts=1)
    test_images, labels = cifar10(arguments.data, "test", parts=-(-arguments.test_images // 5000))
    test = Batches(test_images[: arguments.test_images], labels[: arguments.test_images], 500)
    return model.eval(), list(images[: arguments.images].split(128)), test


WHAT = {"weights": weights, "filters": filters, "layers": layers, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--data")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--images", type=int, default=512, help="calibration images, without labels")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--solvers", nargs="+", default=["blocked", "admm"])
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--ways", nargs="+", default=[""], help="only rows whose names hold one of these")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    given = {name: value for name, value in vars(arguments).items() if name != "data"}
    suffix = arguments.size if arguments.what == "speed" else arguments.depth
    target = Path(__file__).with_name(f"obs-{arguments.what}-{suffix}.json")

    def note(name: str, amount: float, **values: float) -> None:
        rows.append({"name": name, "amount": amount, **values})
        told = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        Console().print(f"{amount:>5.0%}  {name:<28} {told}")
        target.write_text(json.dumps({"arguments": given, "rows": rows}, indent=1))

    WHAT[arguments.what](arguments, note)


if __name__ == "__main__":
    main()
