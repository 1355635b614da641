"""Modules written to catch a wrong cut: none is cut wrongly, and no right cut of them is refused."""

import warnings

import pytest

from tests import (  # noqa: F401 - register their cases
    cases_attributes,
    cases_blind,
    cases_empty,
    cases_inference,
    cases_numbers,
    cases_operators,
    cases_siblings,
    cases_training,
    cases_widths,
    cases_writes,
    cases_written,
)
from tests.cases import CASES, judged

TABLES = {"blind": 8, "constants": 8, "operators": 8, "widths": 8, "writes": 8, "numbers": 61}
"""Kinds whose cases differ in one line, of which only one in so many is run by default."""
FEW = [name for i, (name, chosen) in enumerate(CASES.items()) if i % TABLES.get(chosen.kind, 1) == 0]
REST = [name for name in CASES if name not in FEW]


def assert_right(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = judged(name)
    assert verdict.outcome in (("right",) if CASES[name].most else ("right", "whole")), f"{name}: {verdict}"


@pytest.mark.parametrize("name", FEW)
def test_a_module_is_cut_rightly_or_not_at_all(name):
    """What is cut computes what the rest of the full model does; where a right cut is expected, it is made."""
    assert_right(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_the_other_modules_are_cut_rightly_or_not_at_all(name):
    """The same for all lines of the tables."""
    assert_right(name)
