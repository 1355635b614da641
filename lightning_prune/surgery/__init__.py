"""Cuts units out of parameters, buffers, attributes and optimizer state, each cut proved before it is made."""

from lightning_prune.surgery.attributes import AttributeChange, held_number, set_attributes_, shape_attributes
from lightning_prune.surgery.configs import config_fields, follow_configs
from lightning_prune.surgery.cut import Cut, SlimValues, cut_, draft
from lightning_prune.surgery.recipe import (
    Recipe,
    drop_unused_recipe_,
    recipe_of,
    resize_,
    take_shapes_,
    take_told_,
)
from lightning_prune.surgery.recipe_part import RECIPE, PackedMasks, Told, checked, recipes_in
from lightning_prune.surgery.reference_run import Constant
from lightning_prune.surgery.rehearse import find_groups, rehearsed
from lightning_prune.surgery.resize import Kept, narrowed, replace_tensors_
from lightning_prune.surgery.snapshot import restore_, take_snapshot
from lightning_prune.surgery.temporary import temporarily_cut
from lightning_prune.surgery.timm_numbers import follow_timm
from lightning_prune.surgery.verify import Disproof, Proof, compensated, verify

__all__ = [
    "AttributeChange", "Constant", "Cut", "Disproof", "Kept", "PackedMasks", "Proof", "RECIPE", "Recipe",
    "SlimValues", "Told", "checked", "compensated", "config_fields", "cut_", "draft", "drop_unused_recipe_",
    "find_groups", "follow_configs", "follow_timm", "held_number", "narrowed", "recipe_of", "recipes_in",
    "rehearsed", "replace_tensors_", "resize_", "restore_", "set_attributes_", "shape_attributes", "take_shapes_",
    "take_told_", "take_snapshot", "temporarily_cut", "verify",
]  # fmt: skip
