"""Cuts units out of parameters, buffers, attributes and optimizer state, each cut proved before it is made."""

from lightning_prune.surgery.attributes import AttributeChange, set_attributes_, shape_attributes
from lightning_prune.surgery.cut import Cut, cut_, draft
from lightning_prune.surgery.prove import Disproof, prove_numbers, prove_structure
from lightning_prune.surgery.recipe import RECIPE, read_attributes, resize_
from lightning_prune.surgery.resize import Kept, replace_tensors_

__all__ = [
    "RECIPE", "read_attributes", "resize_",
    "AttributeChange", "Cut", "Disproof", "Kept", "cut_", "draft", "prove_numbers", "prove_structure", "replace_tensors_",
    "set_attributes_", "shape_attributes",
]  # fmt: skip
