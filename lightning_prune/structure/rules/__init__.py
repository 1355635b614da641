"""What each operator does to labels: one table, filled by the files of this folder."""

from lightning_prune.structure.rules import contraction, movement, normalization, pointwise
from lightning_prune.structure.rules.movement import unknown
from lightning_prune.structure.rules.pointwise import pointwise as pointwise_rule
from lightning_prune.structure.rules.table import Call, Dims, Rule, coupling_rule, rule_for, tensors_among

__all__ = ["Call", "Dims", "Rule", "coupling_rule", "pointwise_rule", "rule_for", "tensors_among", "unknown"]

del contraction, movement, normalization, pointwise
