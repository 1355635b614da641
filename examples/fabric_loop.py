"""Train on scikit-learn's digits with Lightning Fabric and prune filters; wrappers and optimizer follow.

python examples/fabric_loop.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Cubic, prune_filters


def main() -> None:
    """Train with Fabric, prune before some epochs, and print what is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    test = torch.arange(len(y)) % 5 == 0
    data = fabric.setup_dataloaders(DataLoader(TensorDataset(x[~test], y[~test]), batch_size=64, shuffle=True))

    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    adam = torch.optim.AdamW(net.parameters(), 2e-3)
    model, optimizer = fabric.setup(net, adam)  # the wrappers train, the originals are pruned
    dense = sum(parameter.numel() for parameter in net.parameters())
    schedule = Cubic(start=1, end=options.epochs - 3)

    for epoch in range(options.epochs):
        left = sum(parameter.numel() for parameter in net.parameters()) / dense
        due = schedule(epoch, amount=0.8)
        if due > 1 - left:
            prune_filters(net, x[:1], amount=1 - (1 - due) / left, target="params", optimizer=adam)
        model.train()
        for inputs, targets in data:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
    with torch.inference_mode():
        accuracy = (model.eval()(x[test]).argmax(dim=1) == y[test]).float().mean()
    left = sum(parameter.numel() for parameter in net.parameters()) / dense
    widths = [part.out_features for part in net if isinstance(part, nn.Linear)]
    print(f"{accuracy:.1%} right with {left:.1%} of the parameters, widths {widths}")


if __name__ == "__main__":
    main()
