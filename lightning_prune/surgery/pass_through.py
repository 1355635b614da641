"""A module that stands where a layer was removed, and returns what that layer was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.model.output_forms import check_form, filled, value_at
from lightning_prune.structure.skippable import SkippableLayer

__all__ = ["Skipped", "check_skip", "passed", "skip_of"]


class Skipped(nn.Module):
    """Stands where a layer stood, and returns what that layer was given.

    It holds no parameters and no buffers. Plain attributes of the layer, which the code around it may read, are still
    there. The emptied layer is kept aside, so that a checkpoint which has it can be loaded.

    Args:
        layer: The module that was there; its tensors are left as they are.
        skip: What to return, from :func:`skip_of`.
    """

    def __init__(self, layer: nn.Module, skip: dict[str, Any]) -> None:
        super().__init__()
        self.skip = skip
        self.sizes: dict[str, list[int]] = {}  # of the tensors of the layer, once they are emptied
        vars(self)["_layer"] = layer  # beside the modules, so that nothing finds its tensors
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input, or zeros of its shape, in the form of the layer's output."""
        return passed(self.skip, args, kwargs)

    @property
    def layer(self) -> nn.Module:
        """The layer that was here; empty once it was removed."""
        found: nn.Module = vars(self)["_layer"]
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = vars(self).get("_layer")
            if layer is None or name.startswith("__"):
                raise
            if name in layer._parameters or name in layer._buffers:
                return None  # as of a layer that has no bias
            held = getattr(layer, name, None)
            # Plain attributes of the layer, such as its kind of attention; modules have left.
            if held is None or callable(held) or isinstance(held, Tensor | nn.Module):
                raise
            return held

    def _apply(self, fn: Any, recurse: bool = True) -> Skipped:
        """Follow the model to another device or dtype, with the layer that may be brought back."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.layer._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Say what stood here."""
        what = "its input" if self.skip["fill"] == "input" else "zeros"
        return f"{type(self.layer).__name__} was removed; returns {what}"


def skip_of(layer: SkippableLayer, renumber: bool = True) -> dict[str, Any]:
    """Return what a pass-through must know of a layer, as plain data for recipes.

    Args:
        layer: The layer.
        renumber: Whether the layers that stay in its list are numbered anew, where they hold their positions in it (see
            :mod:`lightning_prune.surgery.layer_numbers`).
    """
    return {"source": list(layer.source), "fill": layer.fill, "form": layer.form, "renumber": renumber}


def check_skip(skip: Any) -> None:
    """Refuse what :func:`skip_of` did not make.

    Raises:
        ValueError: Saying what is wrong.
    """
    if not isinstance(skip, dict) or skip.keys() != {"source", "fill", "form", "renumber"}:
        raise ValueError(f"{skip!r} is no removed layer")
    source, fill = skip["source"], skip["fill"]
    if not isinstance(skip["renumber"], bool):
        raise ValueError(f"{skip!r} is no removed layer")
    if fill not in ("input", "zeros") or not isinstance(source, list) or len(source) < 2:
        raise ValueError(f"{skip!r} is no removed layer")
    check_form(skip["form"])


def passed(skip: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what stands in for a layer's output."""
    source = value_at(skip["source"], args, kwargs)
    main = source if skip["fill"] == "input" else torch.zeros_like(source)
    return filled(skip["form"], main, args, kwargs)
