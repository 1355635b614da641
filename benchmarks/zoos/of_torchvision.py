"""Which networks torchvision brings, and how to build each with random weights; cuts nothing."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build", "names"]


def names() -> list[str]:
    """List classification, segmentation and video; detection calls operators that a build without a GPU lacks."""
    models = importlib.import_module("torchvision.models")
    kinds = (models, models.segmentation, models.video)
    return [name for kind in kinds for name in models.list_models(module=kind)]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network with random weights, and an image or a film."""
    models = importlib.import_module("torchvision.models")
    kind = models.get_model_builder(name).__module__.split(".")[2]
    arguments: dict[str, Any] = {"weights_backbone": None} if kind == "segmentation" else {}
    model = models.get_model(name, weights=None, **arguments)
    if kind == "video":
        side = 224 if name.startswith(("mvit", "swin", "s3d")) else 112
        return model, torch.randn(1, 3, 16, side, side)
    side = 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, side, side)
