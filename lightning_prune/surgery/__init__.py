"""Cuts units out of parameters, buffers, attributes and optimizer state, each cut proved before it is made."""

from lightning_prune.surgery.attributes import AttributeChange, set_attributes_, shape_attributes
from lightning_prune.surgery.cut import Cut, cut_, draft
from lightning_prune.surgery.prove import Disproof, comparable, prove, prove_structure
from lightning_prune.surgery.recipe import (
    RECIPE,
    PackedMasks,
    Recipe,
    drop_unused_recipe_,
    recipe_of,
    resize_,
    take_shapes_,
)
from lightning_prune.surgery.resize import Kept, narrowed, replace_tensors_
from lightning_prune.surgery.snapshot import restore_, take_snapshot
from lightning_prune.surgery.temporary import temporarily_cut

__all__ = [
    "AttributeChange", "Cut", "Disproof", "Kept", "PackedMasks", "RECIPE", "Recipe", "comparable", "cut_",
    "draft", "drop_unused_recipe_", "narrowed", "prove", "prove_structure", "recipe_of", "replace_tensors_", "resize_",
    "restore_", "set_attributes_", "shape_attributes", "take_shapes_", "take_snapshot", "temporarily_cut",
]  # fmt: skip
