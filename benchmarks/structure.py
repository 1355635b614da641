"""Times ``prune_filters`` on networks of torchvision and on chains beside torch-pruning and a plain forward pass.

    python -m benchmarks.structure                      # needs torchvision and torch-pruning
    python -m benchmarks.structure --models resnet50    # some of them

Writes what it prints into ``structure.json`` beside this file. Ours is the whole call, FLOPs before and after included,
and its steps are timed on another copy of the network; torch-pruning's is building its dependency graph and pruning
once. A count of the FLOPs by fvcore, which no call needs, is timed by itself. Seconds are of this process's CPU, so
that other work on the machine counts less. Exponents say how the seconds of chains grow with their depth. Memory is the
highest resident one, less what the process held before the network was there, in shares of what the network and one
forward pass of it hold; ``--no-memory`` leaves it out.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # where torchvision was built for another device; before Lightning imports it
    importlib.import_module("torchvision_cpu")

from lightning_prune.measure.flops import count_flops
from lightning_prune.measure.footprint import Footprint, measure
from lightning_prune.pruning.budget import Budget, Dense, select_units
from lightning_prune.pruning.filters import prune_filters
from lightning_prune.pruning.scoring import score_units
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery import Disproof, SlimValues, cut_, draft, verify

RESULTS = Path(__file__).with_suffix(".json")
MODELS = (
    "resnet18", "resnet50", "resnet152", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
    "regnet_y_400mf", "vgg16", "convnext_tiny", "vit_b_16", "swin_t", "transformer-12", "transformer-24",
    "transformer-48", "mlp-200", "mlp-400", "mlp-800", "conv-200", "conv-400", "conv-800",
)  # fmt: skip
"""Networks of torchvision, transformers of so many blocks, and chains of so many layers."""
AMOUNT = 0.5
STEPS = ("groups", "plan", "proof", "cut")


class Blocks(nn.Module):
    """Token embedding, transformer blocks as torch builds them, and a classifier."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 256)
        block = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences of 32 numbers each, ``(N, T, 32)``."""
        return self.head(self.blocks(self.embed(x)).mean(1))


def chain(kind: str, depth: int) -> nn.Module:
    """Build a chain of so many linear layers, or of convolutions with BatchNorm."""
    if kind == "mlp":
        layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(depth)]
        return nn.Sequential(*layers, nn.Linear(64, 1000))
    widths = [3] + [16] * depth
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000))


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network with random weights and random BatchNorm statistics, and its example inputs."""
    torch.manual_seed(0)
    if name.startswith("transformer-"):
        return Blocks(int(name.removeprefix("transformer-"))).eval(), torch.randn(1, 64, 32)
    if name.startswith(("mlp-", "conv-")):
        kind, _, depth = name.partition("-")
        return chain(kind, int(depth)).eval(), torch.randn(1, 64) if kind == "mlp" else torch.randn(1, 3, 16, 16)
    model = getattr(importlib.import_module("torchvision.models"), name)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(1, 3, 224, 224)


def ours(model: nn.Module, x: Tensor) -> float:
    """Prune the model and return the seconds of the whole call."""
    start = time.process_time()
    prune_filters(model, x, AMOUNT, progress=False)
    return time.process_time() - start


def steps(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Cut the model as ``prune_filters`` does and return the seconds of each step."""
    seconds: dict[str, float] = {}
    with timed(seconds, "groups"):
        structure = find_structure(trace(model, x))
    with timed(seconds, "plan"):
        widths = {name: group.width for name, group in structure.groups.items()}
        keep = select_units(
            structure, score_units(model, structure, "l1"), AMOUNT, Budget(),
            dense=Dense(widths, Footprint(0, 0)), footprint=partial(measure, model, structure),
        )  # fmt: skip
        cut = draft(model, structure, keep)
        tensors = SlimValues(cut, model)
    with timed(seconds, "proof"):
        found = verify(model, structure, cut, tensors)
    if isinstance(found, Disproof):
        raise RuntimeError(found.reason)
    with timed(seconds, "cut"):
        cut_(model, cut, tensors())
    return seconds


def torch_pruning(model: nn.Module, x: Tensor) -> float:
    """Prune the model with torch-pruning, all but its classifier, and return the seconds."""
    library = importlib.import_module("torch_pruning")
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    start = time.process_time()
    importance = library.importance.GroupMagnitudeImportance(p=1)
    library.pruner.BasePruner(model, x, importance, pruning_ratio=AMOUNT, ignored_layers=classifier).step()
    return time.process_time() - start


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the CPU seconds that the body takes under a name."""
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def compare(name: str, repeats: int, with_memory: bool) -> dict[str, float]:
    """Time one network, ours and torch-pruning in turns, and return medians in seconds."""
    rows: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        (model, x), row = build(name), {}
        params = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            model(x)
            with timed(row, "forward"):
                model(x)
        with timed(row, "flops"):
            count_flops(model, x)
        gc.collect()  # what one of them leaves behind is not to be cleared in the time of the next
        row["ours"] = ours(model, x)
        gc.collect()
        row |= steps(*build(name))
        other, x = build(name)
        gc.collect()
        row["torch-pruning"] = torch_pruning(other, x)
        rows.append(row)
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}  # the first one warms up
    memory = {f"memory, {method}": in_a_process_of_its_own(name, method) for method in METHODS if with_memory}
    return medians | memory | {
        "ratio": statistics.median(row["ours"] / row["torch-pruning"] for row in rows[1:]),
        "params kept": sum(p.numel() for p in model.parameters()) / params,
        "params kept by torch-pruning": sum(p.numel() for p in other.parameters()) / params,
    }  # fmt: skip


def resident(which: str) -> int:
    """Return this process's resident memory in kilobytes, ``VmRSS`` now or ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def memory(name: str, method: str) -> float:
    """Return the highest memory during a method, in shares of what the network and one forward pass hold."""
    warm, small = build("resnet18")  # what libraries load at their first use is not the network's
    METHODS[method](warm, small[..., ::4, ::4])
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the network fills what the first run left, and weighs nothing
    before = resident("VmRSS")
    model, x = build(name)
    with torch.no_grad():
        forward = highest(lambda: model(x)) - before
    return (highest(lambda: METHODS[method](model, x)) - before) / forward


def highest(run: Callable[[], object]) -> int:
    """Return the highest resident memory during a run, in kilobytes."""
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return resident("VmHWM")


def in_a_process_of_its_own(name: str, method: str) -> float:
    """Measure memory where nothing else has been held before."""
    command = [sys.executable, "-m", "benchmarks.structure", "--memory", name, method]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


METHODS: dict[str, Callable[[nn.Module, Tensor], object]] = {"ours": ours, "torch-pruning": torch_pruning}


def table(results: dict[str, dict[str, float]]) -> Table:
    """Lay out the medians in milliseconds."""
    title = f"One cut of {AMOUNT:.0%} of the channels, milliseconds of CPU (medians)"
    found = Table(title=title, caption="ours: the whole call of prune_filters; FLOPs: one count by fvcore")
    for column in ("network", "forward", "ours", "torch-pruning", "ratio", *STEPS, "FLOPs", "memory", "theirs"):
        found.add_column(column, justify="left" if column == "network" else "right")
    for name, row in results.items():
        times = [f"{1e3 * row[key]:.0f}" for key in ("forward", "ours", "torch-pruning")]
        steps = [f"{1e3 * row[step]:.0f}" for step in STEPS]
        held = [f"{row[key]:.2f}" if (key := f"memory, {method}") in row else "" for method in METHODS]
        found.add_row(name, *times, f"{row['ratio']:.2f}", *steps, f"{1e3 * row['flops']:.0f}", *held)
    return found


def exponents(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Fit how the seconds of a chain grow with its depth: the slope of their logarithms."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("mlp", "conv", "transformer"):
        rows = {int(name.partition("-")[2]): row for name, row in results.items() if name.startswith(f"{kind}-")}
        for method in METHODS if len(rows) > 1 else ():
            depths = torch.tensor([float(depth) for depth in rows]).log()
            seconds = torch.tensor([row[method] for row in rows.values()]).log()
            centred = depths - depths.mean()
            found.setdefault(kind, {})[method] = float((centred * seconds).sum() / centred.square().sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    if arguments.memory:
        print(memory(*arguments.memory))
        return
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads}
    results: dict[str, dict[str, float]] = {}
    for name in arguments.models:
        results[name] = compare(name, arguments.repeats, not arguments.no_memory)
        told = about | {"repeats": arguments.repeats, "seconds": results, "exponents": exponents(results)}
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    Console(width=140).print(table(results))
    print(f"median ratio: {statistics.median(row['ratio'] for row in results.values()):.2f}")
    for kind, fitted in exponents(results).items():
        print(
            f"{kind}: seconds grow with depth to the power of", *[f"{power:.2f} ({by})" for by, power in fitted.items()]
        )


if __name__ == "__main__":
    main()
