"""Holds the count of the label trace against fvcore's."""

from lightning_prune.measure.flops import count_flops
from lightning_prune.measure.footprint import count_traced
from lightning_prune.structure import find_structure, trace


def assert_counts_agree(model, inputs, structure=None, keep=None):
    """Trace and fvcore find the same multiply-adds, in the model and in every module of it.

    With ``structure`` and ``keep`` the trace is one of the model before it was cut.
    """
    if structure is None:
        structure = find_structure(trace(model, inputs))
    traced, counted = count_traced(model, structure, keep or {}), count_flops(model, inputs)
    assert traced.total == counted.total == sum(traced.by_operator.values())
    assert traced.by_module == counted.by_module
