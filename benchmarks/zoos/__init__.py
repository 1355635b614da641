"""Which networks the zoos hold, and how to build each with random weights and small inputs; cuts nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.zoos import of_others, of_timm, of_torchvision, of_transformers

__all__ = ["ZOOS", "Inputs", "Zoo"]

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Zoo:
    """Names of networks, and how to build one with its example inputs."""

    names: Callable[[], list[str]]
    build: Callable[[str], tuple[nn.Module, Inputs]]


ZOOS = {
    "torchvision": Zoo(of_torchvision.names, of_torchvision.build),
    "timm": Zoo(of_timm.names, of_timm.build),
    "transformers": Zoo(of_transformers.names, of_transformers.build),
    "others": Zoo(of_others.names, of_others.build),
}
