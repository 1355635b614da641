"""Prunes AlexNet and VGG-16 at the rates of Han et al. 2015, Tables 4 and 5, each by one call, layer by layer.

    python -m benchmarks.han2015_imagenet

The networks have random weights, since ImageNet's are not at hand: what is compared is how many weights and FLOPs the
paper's rates leave in each layer, how long the call takes, what memory it needs beyond the model, and the bytes of the
sparse file. The paper's FLOPs also leave out products with activations that are zero, which random weights cannot
tell; ours leave out those with weights that are zero. Writes ``han2015_imagenet.json`` beside this file.
"""

import argparse
import json
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.scale import resident
from lightning_prune import count_flops, prune_weights, save_sparse

RESULTS = Path(__file__).with_suffix(".json")
KEPT = {  # share of each layer's weights that stays
    "AlexNet": {
        "conv1": 0.84, "conv2": 0.38, "conv3": 0.35, "conv4": 0.37, "conv5": 0.37, "fc1": 0.09, "fc2": 0.09,
        "fc3": 0.25,
    },
    "VGG-16": {
        "conv1_1": 0.58, "conv1_2": 0.22, "conv2_1": 0.34, "conv2_2": 0.36, "conv3_1": 0.53, "conv3_2": 0.24,
        "conv3_3": 0.42, "conv4_1": 0.32, "conv4_2": 0.27, "conv4_3": 0.34, "conv5_1": 0.35, "conv5_2": 0.29,
        "conv5_3": 0.36, "fc6": 0.04, "fc7": 0.04, "fc8": 0.23,
    },
}  # fmt: skip
PAPER = {"AlexNet": (61e6, 6.7e6), "VGG-16": (138e6, 10.3e6)}  # parameters, before and after
VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def alexnet() -> nn.Sequential:
    """Return AlexNet as Caffe has it, with two groups in three of its convolutions; for images of 227x227 pixels.

    References:
        Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(3, 96, 11, 4)
    layers["pool1"] = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2))
    layers["conv2"] = nn.Conv2d(96, 256, 5, padding=2, groups=2)
    layers["pool2"] = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2))
    layers["conv3"] = nn.Conv2d(256, 384, 3, padding=1)
    layers["relu3"] = nn.ReLU()
    layers["conv4"] = nn.Conv2d(384, 384, 3, padding=1, groups=2)
    layers["relu4"] = nn.ReLU()
    layers["conv5"] = nn.Conv2d(384, 256, 3, padding=1, groups=2)
    layers["pool5"] = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten())
    return nn.Sequential(layers | classifier(256 * 6 * 6, 1))


def vgg16() -> nn.Sequential:
    """Return VGG-16, for images of 224x224 pixels.

    References:
        Simonyan & Zisserman, Very Deep Convolutional Networks, ICLR 2015 (arXiv:1409.1556).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for stage, widths in enumerate(VGG16_WIDTHS, start=1):
        for number, width in enumerate(widths, start=1):
            layers[f"conv{stage}_{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{stage}_{number}"] = nn.ReLU()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers | classifier(channels * 7 * 7, 6))


def classifier(inputs: int, first: int) -> OrderedDict[str, nn.Module]:
    """Return three linear layers, named from a first number on."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (ins, outs) in enumerate(((inputs, 4096), (4096, 4096), (4096, 1000)), start=first):
        layers[f"fc{number}"] = nn.Linear(ins, outs)
        if outs != 1000:
            layers[f"relu_fc{number}"] = nn.ReLU()
    return layers


NETWORKS = {"AlexNet": (alexnet, 227), "VGG-16": (vgg16, 224)}


def pruned(name: str) -> dict[str, Any]:
    """Prune one network at the paper's rates and measure what is left."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    net = build().eval()
    products = count_flops(net, torch.zeros(1, 3, size, size)).by_module
    parameters = sum(p.numel() for p in net.parameters())
    before = resident("VmRSS")
    start = time.perf_counter()
    prune_weights(net, {layer: 1 - kept for layer, kept in KEPT[name].items()})
    seconds = time.perf_counter() - start
    grown = resident("VmHWM") - before
    layers = {}
    for layer in KEPT[name]:
        weight = net.get_submodule(layer).weight
        layers[layer] = {"weights": weight.numel(), "left": int(weight.count_nonzero()), "products": products[layer]}
    with tempfile.TemporaryDirectory() as folder:
        stored = save_sparse(net, Path(folder) / "net.safetensors")
    gone = sum(of["weights"] - of["left"] for of in layers.values())
    return {
        "layers": layers, "parameters": parameters, "parameters_left": parameters - gone, "seconds": seconds,
        "memory": grown / (4 * parameters), "bytes_before": stored.bytes_before, "bytes_after": stored.bytes_after,
    }  # fmt: skip


def table_of(name: str, found: dict[str, Any]) -> Table:
    """Lay out the layers as the paper does: weights, FLOPs, and what is left of both."""
    table = Table("layer", "weights", "FLOPs", "weights left", "paper", "FLOPs left", title=name)
    whole = left = 0.0
    for layer, of in found["layers"].items():
        share = of["left"] / of["weights"]
        whole += 2 * of["products"]
        left += 2 * of["products"] * share
        flops = f"{2 * of['products'] / 1e6:,.0f}M", f"{2 * of['products'] * share / 1e6:,.0f}M"
        table.add_row(
            layer, f"{of['weights'] / 1e3:,.0f}K", flops[0], f"{share:.1%}", f"{KEPT[name][layer]:.0%}", flops[1]
        )
    table.add_section()
    counts = f"{found['parameters'] / 1e6:.1f}M", f"{found['parameters_left'] / 1e6:.2f}M"
    paper = f"{PAPER[name][1] / 1e6:.1f}M"
    table.add_row(
        "all", counts[0], f"{whole / 1e6:,.0f}M", counts[1], paper, f"{left / 1e6:,.0f}M ({left / whole:.0%})"
    )
    after, before = (found[f"bytes_{when}"] / 1e6 for when in ("after", "before"))
    fewer, theirs = found["parameters"] / found["parameters_left"], PAPER[name][0] / PAPER[name][1]
    table.caption = (
        f"{fewer:.1f} times fewer (paper: {theirs:.1f}); {found['seconds']:.1f} s, {found['memory']:.2f} times the "
        f"model's memory beyond it; sparse file {after:.1f} MB of {before:.1f} MB"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    results = {name: pruned(name) for name in NETWORKS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, found in results.items():
        Console().print(table_of(name, found))


if __name__ == "__main__":
    main()
