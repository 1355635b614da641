"""Draws what a trained ResNet-56 loses on CIFAR-10 when one layer is pruned alone, as Fig. 2 of Li et al. 2016 does.

    python -m benchmarks.sensitivity --data ../data

Writes ``sensitivity.json`` and ``sensitivity.png`` beside this file.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from benchmarks.data import Batches, cifar10, data_module
from benchmarks.models import ResNet, resnet_cifar
from lightning_prune.analysis.layer_sensitivity import sensitivity
from lightning_prune.analysis.sensitivity_findings import Sensitivity
from lightning_prune.reports import draw_sensitivity, sensitivity_table

RESULTS = Path(__file__).with_suffix(".json")
EXAMPLE = torch.zeros(1, 3, 32, 32)


@torch.no_grad()
def accuracy_from_first_change(model: ResNet, batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[ResNet], float]:
    """Return a function that measures accuracy and begins at the first block that was cut.

    What enters each block of the whole network is kept in memory, as nothing before a cut changes: half of the work.
    """
    inputs, answers = [], []
    model.eval()
    for images, labels in batches:
        entering = [images, F.relu(model.bn1(model.conv1(images)))]
        for block in _blocks(model):
            entering.append(block(entering[-1]))
        inputs.append(entering[:-1])
        answers.append(labels)
    shapes = [_shapes(part) for part in (model.conv1, *_blocks(model))]

    def accuracy(net: ResNet) -> float:
        now = [_shapes(part) for part in (net.conv1, *_blocks(net))]
        cut = [number for number, (was, is_now) in enumerate(zip(shapes, now, strict=True)) if was != is_now]
        first = min(cut, default=len(now) - 1)
        right = 0
        for entering, labels in zip(inputs, answers, strict=True):
            x = entering[first] if first else F.relu(net.bn1(net.conv1(entering[0])))
            for block in _blocks(net)[max(first - 1, 0) :]:
                x = block(x)
            right += int((net.linear(x.mean(dim=(2, 3))).argmax(dim=1) == labels).sum())
        return right / sum(map(len, answers))

    return accuracy


def _blocks(model: ResNet) -> list[nn.Module]:
    return [*model.layer1, *model.layer2, *model.layer3]


def _shapes(part: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in part.parameters()]


def main() -> None:
    """Read the command line, measure, write the JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py, see benchmarks/README.md")
    parser.add_argument("--images", type=int, default=500, help="how many test images (paper: all 10,000)")
    parser.add_argument("--drop", type=float, default=0.01, help="accuracy that one layer may cost, for the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="go on from the JSON of a run that was stopped")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = resnet_cifar(56)
    model.load_state_dict(data_module(options.data).resnet_cifar10(56))
    images, labels = cifar10(options.data, "test")
    images, labels = images[: options.images], labels[: options.images]
    images = images.to(memory_format=torch.channels_last)  # a third faster on CPUs
    found = sensitivity(
        model.to(memory_format=torch.channels_last),
        EXAMPLE,
        accuracy_from_first_change(model, Batches(images, labels, batch_size=125)),
        metric=f"accuracy on {len(images):,} test images",
        done=Sensitivity.from_json(options.json) if options.resume else None,
        path=options.json,
    )
    picture = options.json.with_suffix(".png")
    draw_sensitivity(found, picture, "ResNet-56 on CIFAR-10: smallest filters pruned away")
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)  # a quarter of the bytes
    Console().print(sensitivity_table(found, options.drop))


if __name__ == "__main__":
    main()
