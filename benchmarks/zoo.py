"""Prunes every network of a zoo by the same fraction beside torch-pruning: which are right, and how much is removed.

    python -m benchmarks.zoo                              # torchvision; needs torchvision and torch-pruning
    python -m benchmarks.zoo --zoo timm                   # one network of every family; needs timm
    python -m benchmarks.zoo --zoo transformers           # small configurations; needs transformers
    python -m benchmarks.zoo --zoo others                 # networks as people write them, graph networks, YOLOv8
    python -m benchmarks.zoo --models resnet18 swin_t     # some of them

Weights are random, with random statistics and affine parameters, so that no two channels look alike; what is
initialised near zero (LayerScale, zero matrices) gets ordinary values, so that no branch is hidden. Each network runs
in a process of its own. Results are printed and written to ``zoo-NAME.json`` beside this file, network by network.
Networks that are there already are not run again unless they are named.

``ours`` passes where the output shapes are as they were and at least 15 % of the parameters are removed.
``torch_pruning``, told which layers make the outputs, passes on the same terms; it verifies nothing. ``checked``
prunes once more, in float64, and compares the float outputs of every module with those of the full network, pruned
units silenced (``benchmarks/comparison.py``); it passes where none differs. Seconds are of this process's CPU, the
median of ``--repeats`` runs on new networks after one that warms up.
"""

import argparse
import contextlib
import copy
import importlib
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

with contextlib.suppress(ImportError):  # where torchvision was built for another device; before Lightning imports it
    importlib.import_module("torchvision_cpu")

from benchmarks.comparison import Comparison, compare, in_double, with_ordinary_sizes_
from benchmarks.zoos import ZOOS, Inputs
from lightning_prune.model.calls import run, tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.filters import prune_filters
from lightning_prune.pruning.plan import count_params
from lightning_prune.surgery import find_groups

HERE = Path(__file__).parent
AMOUNT = 0.3
ENOUGH = 0.85
"""Share of the parameters that may be left for a network to pass."""
SLOW = 4.0
"""Seconds from which a run is not repeated."""

Found = dict[str, Any]


def randomised(model: nn.Module) -> nn.Module:
    """Set statistics, affine parameters and what is near zero to random values; return the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if name.endswith(("weight", "running_var")) else 0.2 * noise - 0.1)
    return with_ordinary_sizes_(model).eval()


def ours(model: nn.Module, inputs: Inputs) -> Found:
    """Cut a network and say what is left, what was proved, what stays, and what it took."""
    start = time.process_time()
    report = prune_filters(model, inputs, AMOUNT)
    seconds = time.process_time() - start
    reasons: dict[str, int] = {}
    for pin in report.pinned:
        reasons[pin.reason] = reasons.get(pin.reason, 0) + 1
    kept = report.params_after / report.params_before
    return {"kept": kept, "proof": report.proof, "stays": reasons, "seconds": seconds}


def torch_pruning(model: nn.Module, inputs: Inputs) -> Found:
    """Prune a network with torch-pruning, all but what makes its outputs, and say what it took."""
    library = importlib.import_module("torch_pruning")
    before = count_params(model)
    importance = library.importance.GroupMagnitudeImportance(p=1)
    made = {tensor.shape[d] for tensor in tensors_in(run(model, inputs)) for d in (1, -1) if tensor.dim() > 1}
    last = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) in made]
    start = time.process_time()
    library.pruner.BasePruner(model, inputs, importance, pruning_ratio=AMOUNT, ignored_layers=last[-2:]).step()
    return {"seconds": time.process_time() - start, "kept": count_params(model) / before}


def checked(model: nn.Module, inputs: Inputs) -> Found:
    """Prune a network and compare every module's output with that of the full network, pruned units silenced.

    Numbers change, rightly, where a statistic runs across the pruned units. Where such groups make the difference, the
    network is compared once more with these groups kept, and they are named as not compared.
    """
    full = copy.deepcopy(model)
    pruned, found = _compared(model, inputs, ())
    if not found.wrong or not (mixed := _with_statistics(copy.deepcopy(full), inputs)):
        return {**pruned, **found.told()}
    try:
        _, rest = _compared(full, inputs, mixed)
    except PruningError:  # nothing else is prunable
        rest = Comparison()
    return {**pruned, **rest.told(), "not compared": mixed, "differ with these": found.told()["wrong"]}


def _compared(model: nn.Module, inputs: Inputs, ignore: Sequence[str]) -> tuple[Found, Comparison]:
    """Prune a network; return what is left and the seconds, and how it compares with the full one."""
    full = copy.deepcopy(model)
    start = time.process_time()
    report = prune_filters(model, inputs, AMOUNT, ignore=ignore)
    seconds = time.process_time() - start
    left = {"kept": report.params_after / report.params_before, "seconds": seconds, "proof": report.proof}
    return left, compare(full, model, report.kept, inputs)


def _with_statistics(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the producers of the groups across whose units a statistic runs, and of those linked to them."""
    structure = find_groups(model, inputs)
    mixed = {name for name, group in structure.groups.items() if group.changes_statistics}
    mixed |= {name for link in structure.links if mixed & set(link) for name in link}
    return sorted({path for name in mixed for path in structure.groups[name].producers})


def tried(method: Callable[[nn.Module, Inputs], Found], build: Callable[[], tuple[nn.Module, Inputs]]) -> Found:
    """Run one method on a new network, and say what came out of it or why nothing did."""
    torch.manual_seed(0)
    model, inputs = build()
    model = randomised(model)
    with torch.no_grad():
        run(model, inputs)
        start = time.process_time()
        shapes = [tensor.shape for tensor in tensors_in(run(model, inputs))]
        forward = time.process_time() - start
    try:
        found = method(model, inputs)
        with torch.no_grad():
            same = [tensor.shape for tensor in tensors_in(run(model, inputs))] == shapes
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400], "passes": False}
    passes = found["wrong outputs"] == 0 if "wrong outputs" in found else found["kept"] <= ENOUGH
    passes = passes and same
    return {**found, "same shapes": same, "passes": passes, "forward": forward}


def repeated(
    repeats: int, method: Callable[[nn.Module, Inputs], Found], build: Callable[[], tuple[nn.Module, Inputs]]
) -> Found:
    """Run one method again and again, if it comes to an end and soon enough, and take the median of its times."""
    found = tried(method, build)
    if "error" in found or found["seconds"] > SLOW:
        return found
    times = [tried(method, build)["seconds"] for _ in range(repeats)]
    return {**found, "seconds": statistics.median(times or [found["seconds"]])}


def compared(zoo: str, name: str, method: str, limit: float, repeats: int) -> Found:
    """Try a method on one network, in a process of its own."""
    fork = multiprocessing.get_context("fork")  # libraries are imported once
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=tell, args=(sender, zoo, name, method, repeats))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            found: Found = receiver.recv()
            return found
        return {"error": f"not done in {limit:g} seconds", "passes": False}
    except EOFError:
        process.join()
        return {"error": f"died with exit code {process.exitcode}", "passes": False}
    finally:
        process.kill()
        process.join()


def tell(sender: Connection, zoo: str, name: str, method: str, repeats: int) -> None:
    """Try a method on one network and send what came of it."""
    build = partial(ZOOS[zoo].build, name)
    if method == "checked":
        repeats, build = 0, partial(doubled, build)
    sender.send(repeated(repeats, METHODS[method], build))


def doubled(build: Callable[[], tuple[nn.Module, Inputs]]) -> tuple[nn.Module, Inputs]:
    """Build a network in float64, or in float32 where an operator of it takes no other."""
    model, inputs = in_double(*build())
    try:
        with torch.no_grad():
            run(model.eval(), inputs)
    except RuntimeError:
        return build()
    return model, inputs


METHODS: dict[str, Callable[[nn.Module, Inputs], Found]] = {
    "ours": ours,
    "torch_pruning": torch_pruning,
    "checked": checked,
}


PRUNERS = ("ours", "torch_pruning")


def table(results: dict[str, Found]) -> Table:
    """Lay out what both kept of every network, and whether ours is right."""
    passed = {method: sum(r[method]["passes"] for r in results.values() if method in r) for method in METHODS}
    ratios = sorted(ratio for row in results.values() if (ratio := ratio_of(row)) is not None)
    caption = f"pass: ours {passed['ours']}, torch-pruning {passed['torch_pruning']}; in brackets: does not pass"
    caption += f"; every module's output right: {passed['checked']} of {sum('checked' in r for r in results.values())}"
    if ratios:
        caption += f"; median ratio of the seconds {statistics.median(ratios):.2f} ({len(ratios)} networks)"
    found = Table(title=f"{AMOUNT:.0%} of the channels of {len(results)} networks", caption=caption)
    for column in ("network", "kept, ours", "theirs", "seconds, ours", "theirs", "ratio", "outputs", "proved"):
        found.add_column(column, justify="left" if column in ("network", "outputs", "proved") else "right")
    for name, row in results.items():
        seconds = [row.get(method, {}).get("seconds") for method in PRUNERS]
        ratio = "" if (both := ratio_of(row)) is None else f"{both:.2f}"
        kept = [told(row[method]) if method in row else "" for method in PRUNERS]
        right = compared_in_words(row["checked"]) if "checked" in row else ""
        proof = row.get("ours", {}).get("proof", "")
        found.add_row(name, *kept, *(f"{s:.1f}" if s else "" for s in seconds), ratio, right, proof)
    return found


def ratio_of(row: Found) -> float | None:
    """Return our seconds by theirs, where both came to an end."""
    ours, theirs = (row.get(method, {}).get("seconds") for method in PRUNERS)
    return ours / theirs if ours and theirs else None


def told(found: Found) -> str:
    """Say in a word what came of a network."""
    if "error" in found:
        return f"({found['error'].partition(':')[0]})"
    kept = f"{found['kept']:.1%}"
    return kept if found["passes"] else f"({kept})" if found["same shapes"] else f"({kept}, other shapes)"


def compared_in_words(found: Found) -> str:
    """Return how many outputs were equal, and how many differed or were not compared."""
    if "error" in found:
        return f"({found['error'].partition(':')[0]})"
    words = [f"{found['equal outputs']} equal"]
    words += [f"{count} {name}" for name in ("scaled", "skipped", "wrong") if (count := found.get(f"{name} outputs"))]
    if "not compared" in found:
        words.append(f"{len(found['not compared'])} layers with statistics not compared")
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", choices=ZOOS, default="torchvision")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one network and one method")
    parser.add_argument("--repeats", type=int, default=0, help="timed runs after the first; 0 times that one")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = HERE / f"zoo-{arguments.zoo}.json"
    results: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.models or ZOOS[arguments.zoo].names():
        row = results.setdefault(name, {})
        for method in arguments.methods:
            if arguments.models or method not in row:
                row[method] = compared(arguments.zoo, name, method, arguments.limit, arguments.repeats)
                path.write_text(json.dumps(results, indent=1) + "\n")
                words = compared_in_words if method == "checked" else told
                print(name, method, words(row[method]), flush=True)
    Console(width=140).print(table(results))


if __name__ == "__main__":
    main()
