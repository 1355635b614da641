"""When schedules ask for how much."""

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.algorithms.schedules import Cubic, Geometric, Linear, OneCycle, OneShot

GRADUAL = [Linear, Cubic, Geometric, OneCycle]
SPANS = st.tuples(st.integers(0, 20), st.integers(0, 40), st.integers(1, 7)).map(lambda s: (s[0], s[0] + s[1], s[2]))
AMOUNTS = st.floats(0.01, 0.99)


@given(span=SPANS, kind=st.sampled_from(GRADUAL), amount=AMOUNTS)
def test_schedules_rise_from_zero_to_the_amount(span, kind, amount):
    """Nothing is gone before `start`, something from there, the exact amount from `end` on; it never falls."""
    schedule = kind(*span)
    gone = [schedule(moment, amount) for moment in range(schedule.end + 5)]
    assert all(share == 0.0 for share in gone[: schedule.start])
    assert all(share > 0.0 for share in gone[schedule.start :])
    assert all(share == amount for share in gone[schedule.end :])
    assert gone == sorted(gone) and all(share < amount for share in gone[: schedule.end])
    assert schedule.last == schedule.end


@given(span=SPANS, kind=st.sampled_from(GRADUAL))
def test_cuts_come_every_so_many_moments(span, kind):
    """Between `start` and `end` the share changes every `every` moments and at `end`, at no other time."""
    start, end, every = span
    schedule = kind(*span)
    changes = [m for m in range(end + 5) if schedule.progress(m) != (schedule.progress(m - 1) if m else 0.0)]
    assert changes == sorted({*range(start, end, every), end})


@given(span=SPANS)
def test_linear_steps_are_equal(span):
    """Every cut of a linear schedule takes the same share."""
    start, end, every = span
    moments = sorted({*range(start, end, every), end})
    shares = [Linear(*span)(moment, 1.0) for moment in moments]
    assert shares == pytest.approx([(i + 1) / len(moments) for i in range(len(moments))])


def test_cubic_is_early():
    """After half of its cuts a cubic schedule has reached 1 - (1 - 1/2)^3 = 0.875 of the amount."""
    assert Cubic(start=0, end=9)(4, 1.0) == 0.875
    assert Cubic(start=1, end=4)(2, 0.5) == 0.4375


@given(span=SPANS, amount=AMOUNTS)
def test_geometric_cuts_take_the_same_share_of_what_is_left(span, amount):
    """From one cut to the next a geometric schedule multiplies what is left by one number."""
    start, end, every = span
    moments = sorted({*range(start, end, every), end})
    left = [1.0, *(1 - Geometric(*span)(moment, amount) for moment in moments)]
    ratios = [after / before for before, after in itertools.pairwise(left)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_geometric_gives_the_rounds_of_the_lottery_tickets():
    """Rounds of 20 % leave 51.2, 21.0, 6.9, 3.5 and 1.8 % of the weights after 3, 7, 12, 15 and 18 of them."""
    schedule = Geometric(start=1, end=18)
    left = {cuts: 100 * (1 - schedule(cuts, amount=1 - 0.8**18)) for cuts in (3, 7, 12, 15, 18)}
    assert left == pytest.approx({3: 51.2, 7: 20.97, 12: 6.87, 15: 3.52, 18: 1.80}, abs=0.005)


def test_one_cycle_is_slow_at_both_ends():
    """Of a hundred cuts, those from the 33rd to the 66th of a one-cycle schedule take most of the amount."""
    schedule = OneCycle(start=0, end=99)
    assert schedule(65, 1.0) - schedule(32, 1.0) > 0.7 > schedule(32, 1.0) + 1 - schedule(65, 1.0)


@given(moment=st.integers(0, 30))
def test_one_shot_is_all_or_nothing(moment):
    """One shot reaches everything at its moment, and nothing before."""
    schedule = OneShot(moment)
    assert [schedule(m, 0.5) for m in range(moment + 3)] == [0.0] * moment + [0.5] * 3
    assert schedule.last == moment


@pytest.mark.parametrize(
    "schedule", [OneShot(2), OneShot(9, by="steps"), Linear(1, 5, 2), Cubic(0, 3), Geometric(1, 9, 2, by="steps")],
    ids=repr,
)  # fmt: skip
def test_schedules_are_values(schedule):
    """Schedules pickle, compare by value, and their repr rebuilds them."""
    assert pickle.loads(pickle.dumps(schedule)) == schedule == eval(repr(schedule))
    assert Linear(1, 5) != Cubic(1, 5) and Linear(1, 5) != Linear(1, 5, by="steps")


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: OneShot(-1), "epochs are counted from 0"),
        (lambda: OneShot(-1, by="steps"), "steps are counted from 0"),
        (lambda: Linear(-1, 3), "0 <= start <= end"),
        (lambda: Cubic(4, 3), "0 <= start <= end"),
        (lambda: Linear(0, 3, 0, by="steps"), "steps must satisfy .* every >= 1"),
        (lambda: OneCycle(0, 3, by="batches"), "by='batches' must be 'epochs' or 'steps'"),
    ],
)
def test_impossible_moments_are_refused(make, told):
    """Moments before the first, ends before starts, steps of nothing and unknown counts are refused at construction."""
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize("make", [lambda: OneShot(0.5), lambda: Linear(1, "4"), lambda: Cubic(True, 4)])
def test_moments_are_whole_numbers(make):
    """What counts no epochs or steps is refused by name."""
    with pytest.raises(TypeError, match="must be a whole number"):
        make()
