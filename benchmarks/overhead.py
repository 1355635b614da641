"""Measures what gathering scores costs a training step: bare, Taylor on weights, Taylor on activations.

    python -m benchmarks.overhead

The three take turns, each on its own copy of ResNet-20; figures are medians of the ratios of neighbouring steps, which
a busy machine disturbs least. They are printed and written into ``overhead.json`` beside this file.
"""

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.models import resnet_cifar
from lightning_prune.pruning.scoring import accumulator_for
from lightning_prune.surgery import find_groups

RESULTS = Path(__file__).with_suffix(".json")
CRITERIA = {"weights": "taylor", "activations": "taylor_activations"}
GOALS = {"weights": 1.05, "activations": 1.15}


def stepper(model: nn.Module, form: str, hooks: ExitStack) -> Callable[[Tensor, Tensor], float]:
    """Return a training step that gathers as the callback does, and tells its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    parameters = dict(model.named_parameters())
    device = next(model.parameters()).device
    structure = find_groups(model, torch.zeros(1, 3, 32, 32, device=device))
    accumulator = accumulator_for(CRITERIA[form]) if form in CRITERIA else None
    if accumulator is not None:
        hooks.enter_context(accumulator.watch(model, structure))

    def step(images: Tensor, labels: Tensor) -> float:
        _settle(device)
        begin = perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        if accumulator is not None:
            accumulator.before_backward(loss)
        loss.backward()
        if accumulator is not None:
            accumulator.after_backward()
            accumulator.before_step({name: parameter.grad for name, parameter in parameters.items()})
        optimizer.step()
        _settle(device)
        return perf_counter() - begin

    return step


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(steps: int, batch: int, device: str) -> dict:
    """Let the three take turns, and compare each step with the bare one of the same turn."""
    torch.manual_seed(0)
    dense = resnet_cifar(20).to(device).train()
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    with ExitStack() as hooks:
        turns = {form: stepper(copy.deepcopy(dense), form, hooks) for form in ("bare", *GOALS)}
        seconds: dict[str, list[float]] = {form: [] for form in turns}
        for turn in range(steps + 2):
            order = list(turns) if turn % 2 else list(turns)[::-1]
            took = {form: turns[form](images, labels) for form in order}
            if turn >= 2:  # the first two warm up
                for form, value in took.items():
                    seconds[form].append(value)
    ratios = {
        form: median(own / bare for own, bare in zip(seconds[form], seconds["bare"], strict=True)) for form in GOALS
    }
    return {
        "network": "ResNet-20",
        "batch_size": batch,
        "steps": steps,
        "device": device,
        "threads": torch.get_num_threads(),
        "bare_step_ms": 1e3 * median(seconds["bare"]),
        "ratios": ratios,
    }


def main() -> None:
    """Read the command line, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="turns measured")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.steps, options.batch_size, options.device)
    table = Table(
        "gathering", "step / bare step", "goal", title=f"ResNet-20, bare step {result['bare_step_ms']:.0f} ms"
    )
    for form, ratio in result["ratios"].items():
        table.add_row(f"Taylor on {form}", f"{ratio:.3f}", f"{GOALS[form]:.2f}")
    Console().print(table)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
