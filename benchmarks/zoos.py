"""Which networks other libraries bring, and how to build each with random weights and small inputs; cuts nothing."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ZOOS", "Inputs", "Zoo"]

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Zoo:
    """Names of networks, and how to build one with its example inputs."""

    names: Callable[[], list[str]]
    build: Callable[[str], tuple[nn.Module, Inputs]]


def _torchvision_names() -> list[str]:
    """List classification, segmentation and video; detection calls operators that a build without a GPU lacks."""
    models = importlib.import_module("torchvision.models")
    kinds = (models, models.segmentation, models.video)
    return [name for kind in kinds for name in models.list_models(module=kind)]


def _torchvision(name: str) -> tuple[nn.Module, Tensor]:
    models = importlib.import_module("torchvision.models")
    kind = models.get_model_builder(name).__module__.split(".")[2]
    arguments: dict[str, Any] = {"weights_backbone": None} if kind == "segmentation" else {}
    model = models.get_model(name, weights=None, **arguments)
    if kind == "video":
        side = 224 if name.startswith(("mvit", "swin", "s3d")) else 112
        return model, torch.randn(1, 3, 16, side, side)
    side = 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, side, side)


ZOOS = {"torchvision": Zoo(_torchvision_names, _torchvision)}
