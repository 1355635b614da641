"""Dependency tracing: which channels of a model must be pruned together."""

from lightning_prune.structure.groups import ChannelGroup, Keep, Slot, Structure, find_structure
from lightning_prune.structure.pinned import Pinned
from lightning_prune.structure.rules import Call, coupling_rule
from lightning_prune.structure.tensor_names import named_tensors
from lightning_prune.structure.trace import trace

__all__ = [
    "Call", "ChannelGroup", "Keep", "Pinned", "Slot", "Structure", "coupling_rule", "find_structure", "named_tensors",
    "trace",
]  # fmt: skip
