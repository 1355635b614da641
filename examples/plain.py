"""Train on scikit-learn's digits in a plain PyTorch loop and prune filters; the optimizer's state follows.

python examples/plain.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_prune import prune_filters

CUTS = {3: 0.3, 5: 0.5, 7: 0.65}  # epoch -> fraction of the dense model's FLOPs to remove before it


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    """Train, prune three times, and print a line per epoch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    test = torch.arange(len(y)) % 5 == 0
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    left = 1.0
    for epoch in range(options.epochs):
        order = torch.randperm(int((~test).sum()))
        batches = [(x[~test][rows], y[~test][rows]) for rows in order.split(64)]
        if epoch in CUTS:
            report = prune_filters(
                model, x[:1],
                amount=1 - (1 - CUTS[epoch]) / left,  # relative to the model as it is now
                target="flops", scope="global", criterion="taylor", batches=batches[:8], loss=loss, optimizer=optimizer,
            )  # fmt: skip
            left *= report.flops_after / report.flops_before
        for batch in batches:
            optimizer.zero_grad()
            loss(model.train(), batch).backward()
            optimizer.step()
        with torch.inference_mode():
            accuracy = (model.eval()(x[test]).argmax(dim=1) == y[test]).float().mean()
        widths = [part.out_channels for part in model if isinstance(part, nn.Conv2d)]
        print(f"epoch {epoch:2d}: {accuracy:.1%} right, {left:.1%} of the FLOPs left, widths {widths}")


if __name__ == "__main__":
    main()
