"""Keeps a network as it was, and compares what another computes with what it would have; knows no schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.engine.step import copied
from lightning_prune.model.calls import modules_of
from lightning_prune.model.errors import PruningError
from lightning_prune.surgery import Cut, restore_, take_snapshot

__all__ = ["Call", "Calls", "Teacher", "channels_of", "followed"]


@dataclass(eq=False)
class Call:
    """One call of a network in a training step.

    Attributes:
        args: Its positional inputs, copied before the network could write into them.
        kwargs: Its keyword inputs, likewise.
        output: What it returned, with its graph.
        features: What the named layers inside it returned, by name.
    """

    args: Any
    kwargs: Any
    output: Any = None
    features: dict[str, Tensor] = field(default_factory=dict)


class Calls:
    """Notes every outermost call of a network while the training step runs.

    Args:
        pl_module: The module that is trained.
        path: The network inside it; None for the outermost that the step calls.
        layers: Layers whose outputs are noted too, by path from the module.
    """

    def __init__(self, pl_module: LightningModule, path: str | None, layers: Iterable[str] = ()) -> None:
        self.paths: set[str] = set()  # of the networks that were called, outermost alone
        self.calls: list[Call] = []
        self._module = pl_module
        self._open: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        networks = _callable_parts(pl_module) if path is None else {path: pl_module.get_submodule(path)}
        for name, network in networks.items():
            self._handles += [
                network.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True),
                network.register_forward_hook(self._after(), always_call=True),
            ]
        for layer in layers:
            self._handles.append(pl_module.get_submodule(layer).register_forward_hook(self._note(layer)))

    def clear(self) -> None:
        """Forget the calls of the last step."""
        self.calls = []
        self._open = []

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def before(network: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._in_step(network):
                return
            if not self._open:
                self.paths.add(path)
                self.calls.append(Call(*copied((args, kwargs))))
            self._open.append(network)

        return torch.compiler.disable(before)

    def _after(self) -> Callable[..., None]:
        def after(network: nn.Module, args: Any, output: Any) -> None:
            if self._open and self._open[-1] is network:
                self._open.pop()
                if not self._open:
                    self.calls[-1].output = output

        return torch.compiler.disable(after)

    def _note(self, layer: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if self._open:
                self.calls[-1].features[layer] = output

        return torch.compiler.disable(note)

    def _in_step(self, network: nn.Module) -> bool:
        """Return whether the training step runs the network, rather than a trace, a validation or a measurement.

        Lightning writes down which hook runs. In several processes its wrapper calls the module in place of the step;
        that call is none of the network.
        """
        if self._module._current_fx_name != "training_step" or not torch.is_grad_enabled():
            return False
        forward = vars(network).get("forward")
        return getattr(forward, "__qualname__", "").rpartition(".")[2] != "wrapped_forward"


class Teacher:
    """A network as it was before the first pruning step: outside the module tree, in eval mode, without gradients.

    Args:
        network: The network; it is copied.
        snapshot: What :meth:`state` gave, if it was another network then.
    """

    def __init__(self, network: nn.Module, snapshot: Mapping[str, Any] | None = None) -> None:
        self.network = copy.deepcopy(network)
        if snapshot is not None:
            restore_(self.network, (), dict(snapshot))
        self.network.requires_grad_(False)
        self.network.eval()
        for _, module in modules_of(self.network):
            module.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return its values, shapes and numbers, as plain dicts and tensors."""
        return take_snapshot(self.network, ())

    @torch.no_grad()
    def answer(self, call: Call, layers: Mapping[str, str]) -> Call:
        """Return what it answers to a call, with the outputs of layers: their name -> their path inside the network."""
        features: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, output: features.update({name: output})

        handles = [self.network.get_submodule(path).register_forward_hook(note(name)) for name, path in layers.items()]
        device = next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_kind(device)):
                output = self.network(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return Call(call.args, call.kwargs, output, features)


def channels_of(where: str, pl_module: nn.Module, layer: str) -> tuple[str, int, int]:
    """Return the tensor that has one entry for each channel of a layer, its dimension, and that of the output.

    Raises:
        PruningError: If the layer has no weight whose entries are its channels.
    """
    modules = dict(modules_of(pl_module))
    if layer not in modules:
        raise PruningError(
            f"{where}(features=[{layer!r}]): {type(pl_module).__name__} has no such module. Name layers by their path."
        )
    module = modules[layer]
    name = f"{layer}.weight"
    if isinstance(module, _ConvTransposeNd):
        return name, 1, 1
    if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) and module.weight is not None:
        return name, 0, 1
    if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        return name, 0, -1
    raise PruningError(
        f"{where}(features=[{layer!r}]): it is a {type(module).__name__}, of which it is not known which channels "
        "are left. Name a convolution, linear or normalization layer inside it."
    )


def followed(kept: Mapping[str, Tensor], places: Mapping[str, tuple[str, int, int]], cut: Cut) -> dict[str, Tensor]:
    """Return, for each layer, which of the teacher's channels are left after a cut; layers without entry are whole."""
    now = dict(kept)
    for layer, (name, dim, _) in places.items():
        stays = cut.kept.get(name, {}).get(dim)
        if stays is not None:
            now[layer] = kept[layer][stays] if layer in kept else stays
    return now


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type  # the CPU's generator is kept in any case


def _callable_parts(pl_module: LightningModule) -> dict[str, nn.Module]:
    """Return the module itself and its outermost parts with weights; containers that nobody calls are opened."""
    found: dict[str, nn.Module] = {"": pl_module}
    left = list(pl_module.named_children())
    while left:
        path, module = left.pop(0)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            left += [(f"{path}.{name}", child) for name, child in module.named_children()]
        elif any(parameter.requires_grad for parameter in module.parameters()):
            found[path] = module
    return found
