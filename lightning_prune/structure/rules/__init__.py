"""Coupling rules: how each operator passes labels from its inputs to its outputs."""

from lightning_prune.structure.rules import contraction as contraction
from lightning_prune.structure.rules import frozen_sizes as frozen_sizes
from lightning_prune.structure.rules import losses as losses
from lightning_prune.structure.rules import movement as movement
from lightning_prune.structure.rules import normalization as normalization
from lightning_prune.structure.rules import pooling as pooling
from lightning_prune.structure.rules import reduction as reduction
from lightning_prune.structure.rules import split_and_join as split_and_join
from lightning_prune.structure.rules import views as views
from lightning_prune.structure.rules.by_trial import tested as tested
from lightning_prune.structure.rules.pointwise import is_pointwise as is_pointwise
from lightning_prune.structure.rules.pointwise import pointwise as pointwise_rule
from lightning_prune.structure.rules.table import Call, Dims, Rule, coupling_rule, reduces, rule_for, tensors_among

__all__ = [
    "Call", "Dims", "Rule", "coupling_rule", "is_pointwise", "pointwise_rule", "reduces", "rule_for",
    "tensors_among", "tested",
]  # fmt: skip
