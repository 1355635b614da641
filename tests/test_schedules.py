"""When how much of the amount is reached."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.schedules import Cubic, Linear, OneShot

SPANS = st.tuples(st.integers(0, 20), st.integers(0, 40), st.integers(1, 7)).map(lambda s: (s[0], s[0] + s[1], s[2]))


@given(span=SPANS, kind=st.sampled_from([Linear, Cubic]))
def test_schedules_rise_from_zero_to_one(span, kind):
    """Nothing is gone before `start`, something from there, exactly everything from `end` on; shares never fall."""
    schedule = kind(*span)
    shares = [schedule(epoch) for epoch in range(schedule.end + 5)]
    assert all(share == 0.0 for share in shares[: schedule.start])
    assert all(share > 0.0 for share in shares[schedule.start :])
    assert all(share == 1.0 for share in shares[schedule.end :])
    assert shares == sorted(shares) and all(share < 1.0 for share in shares[: schedule.end])
    assert schedule.last_epoch == schedule.end


@given(span=SPANS, kind=st.sampled_from([Linear, Cubic]))
def test_cuts_come_every_so_many_epochs(span, kind):
    """Between `start` and `end` the share changes every `every` epochs and at `end`, at no other time."""
    start, end, every = span
    schedule = kind(*span)
    changes = [epoch for epoch in range(end + 5) if schedule(epoch) != (schedule(epoch - 1) if epoch else 0.0)]
    assert changes == sorted({*range(start, end, every), end})


@given(span=SPANS)
def test_linear_steps_are_equal(span):
    """Every cut of a linear schedule takes the same share."""
    start, end, every = span
    epochs = sorted({*range(start, end, every), end})
    shares = [Linear(*span)(epoch) for epoch in epochs]
    assert shares == pytest.approx([(i + 1) / len(epochs) for i in range(len(epochs))])


def test_cubic_is_early():
    """After half of its cuts a cubic schedule has reached 1 - (1 - 1/2)^3 = 0.875 of the amount."""
    assert Cubic(start=0, end=9)(4) == 0.875
    assert Cubic(start=1, end=4)(2) == 0.875


@given(epoch=st.integers(0, 30))
def test_one_shot_is_all_or_nothing(epoch):
    """One shot reaches everything at its epoch, and nothing before."""
    schedule = OneShot(epoch)
    assert [schedule(e) for e in range(epoch + 3)] == [0.0] * epoch + [1.0] * 3
    assert schedule.last_epoch == epoch


@pytest.mark.parametrize("schedule", [OneShot(2), Linear(1, 5, 2), Cubic(0, 3)], ids=repr)
def test_schedules_are_values(schedule):
    """Schedules pickle, compare by value, and their repr rebuilds them."""
    assert pickle.loads(pickle.dumps(schedule)) == schedule == eval(repr(schedule))


@pytest.mark.parametrize(
    "make", [lambda: OneShot(-1), lambda: Linear(-1, 3), lambda: Cubic(4, 3), lambda: Linear(0, 3, 0)],
    ids=["before the first epoch", "negative start", "end before start", "no step"],
)  # fmt: skip
def test_impossible_epochs_are_refused(make):
    """Epochs before the first, ends before starts and steps of nothing are refused at construction."""
    with pytest.raises(ValueError, match="epochs"):
        make()
