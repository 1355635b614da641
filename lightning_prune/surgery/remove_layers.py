"""Removes layers of a model for good, so that its state dicts and configs say so; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.model.calls import ExampleInputs, modules_of, numbers_in, run, same_draws
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.surgery.layer_lists import ClosedList, close_lists_, follow_depth, open_lists_
from lightning_prune.surgery.recipe import recipe_of
from lightning_prune.surgery.resize import all_or_nothing, with_wrapped
from lightning_prune.surgery.skipped import take_out_

__all__ = ["close_gaps_", "open_gaps_", "remove_layers_"]


def remove_layers_(model: nn.Module, skips: Mapping[str, dict[str, Any]], optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove layers: their parameters, buffers and what optimizers hold of them. Interrupted, it removes nothing.

    Args:
        model: The model.
        skips: Path of a layer -> what is returned in its place.
        optimizers: The optimizers that train the model.
    """
    optimizers = with_wrapped(optimizers)
    with all_or_nothing(model, optimizers):
        take_out_(model, skips, optimizers)
        recipe_of(model).needed = True


def close_gaps_(model: nn.Module, example_inputs: ExampleInputs) -> str:
    """Remove pass-throughs from the lists of Hugging Face models, where the config can say that they are gone.

    Then ``save_pretrained`` writes what ``from_pretrained`` builds. Layers behind a removed one move up by one name.

    Args:
        model: The model, with pass-throughs in the places of removed layers.
        example_inputs: What it runs on, to verify that it computes the same.

    Returns:
        Why configs cannot say which layers were removed; empty if they do.
    """
    with all_or_nothing(model):
        open_gaps_(model)
        followed = follow_depth(model)
        if not followed.gaps:
            return followed.inexpressible
        expected = _outputs(model, example_inputs)
        close_lists_(model, followed.gaps, followed.changes)
        found = _outputs(model, example_inputs)
        if not _are_alike(expected, found):
            open_gaps_(model)
            return (
                f"{type(model).__name__} computes something else once removed layers are taken out of "
                f"{', '.join(followed.gaps)}. Save the state dict by torch.save, build the model as it was built and "
                "load it by load_state_dict_."
            )
        recipe_of(model).needed = True
        return followed.inexpressible


def open_gaps_(model: nn.Module) -> None:
    """Put pass-throughs back in the places of layers that were taken out of lists: all names are as at the start."""
    open_lists_(model, [path for path, module in modules_of(model) if isinstance(module, ClosedList)])


def _outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[torch.Tensor]:
    """Return copies of the numbers that a model returns."""
    with undisturbed(model, example_inputs), same_draws():
        found = numbers_in(run(model, example_inputs))
    return [tensor.detach().clone() for tensor in found if tensor.numel()]


def _are_alike(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Return whether two runs gave the same; layers may have other entries in a cache, so the order may be another."""
    left = list(found)
    for one in expected:
        for place, other in enumerate(left):
            if one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5):
                del left[place]
                break
        else:
            return False
    return not left
