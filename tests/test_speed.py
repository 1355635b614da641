"""Latency of a pruned model beside the whole one, at several batch sizes, and advice on widths."""

import time
from queue import SimpleQueue

import pytest
import torch
from torch import nn

from lightning_prune import PruningError
from lightning_prune.analysis.latency_comparison import compare_latency
from lightning_prune.reports import latency_advice, latency_table


class Awkward(nn.Module):
    """A hidden layer whose width costs what ``milliseconds`` says of it."""

    def __init__(self, width, milliseconds):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 2)
        self.milliseconds = milliseconds

    def forward(self, x):
        time.sleep(1e-3 * self.milliseconds(len(self.first.weight)))
        return self.second(self.first(x))


def odd(width):
    return 10 if width % 16 == 0 else 30


def compared(width, milliseconds, **options):
    dense, pruned = (Awkward(w, milliseconds) for w in (64, width))
    return compare_latency(dense, pruned, torch.ones(1, 4), progress=False, **options)


def test_times_and_flops_are_those_of_each_version():
    """Seconds are what a call takes, shares are of the dense model, FLOPs what a count finds of each."""
    report = compared(20, lambda width: width / 2, batch_sizes=[3])
    (timing,) = report.timings
    assert list(timing.seconds) == ["dense", "pruned", "round_to=8", "round_to=16", "round_to=32"]
    for version, width in zip(timing.seconds, (64, 20, 24, 32, 32), strict=True):
        assert report.flops[version] == (4 + 2) * width
        assert 1e-3 * width / 2 <= timing.seconds[version] < 1e-3 * width / 2 + 0.05
        assert timing.kept[version] == pytest.approx(width / 64, abs=0.2)


def test_rounder_widths_are_suggested_where_they_are_faster():
    """A multiple that saves time is named, with what it saves and costs; the finest of equals."""
    report = compared(20, odd)
    assert (report.awkward, report.round_to) == ({"first": 20}, 16) and report.saves > 0.4
    told = latency_advice(report)
    assert "20 (first)" in told and "round_to=16" in told and "50.0% of the FLOPs instead of 31.2%" in told


@pytest.mark.parametrize(
    "width, milliseconds, told",
    [(20, lambda width: width / 8, "would not be faster here"), (24, odd, "All widths are multiples of 8")],
    ids=["slower", "round"],
)
def test_rounder_widths_are_not_suggested_elsewhere(width, milliseconds, told):
    """Where rounding up costs time, or widths are round, nothing is suggested."""
    report = compared(width, milliseconds, batch_sizes=[1])
    assert told in latency_advice(report)


def test_a_model_that_lost_nothing_is_told_so():
    """Masks alone change no width."""
    assert "No unit has left" in latency_advice(compared(64, odd, batch_sizes=[1]))


def test_each_batch_size_has_a_row():
    """Examples are repeated up to every size that was asked for."""
    seen = SimpleQueue()  # which is not restored after the runs, as a set would be

    class Sees(Awkward):
        def forward(self, x):
            seen.put(len(x))
            return super().forward(x)

    dense, pruned = (Sees(width, lambda width: 0) for width in (16, 8))
    report = compare_latency(dense, pruned, torch.ones(2, 4), batch_sizes=[1, 5], progress=False)
    assert [timing.batch_size for timing in report.timings] == [1, 5] and {1, 5} <= {
        seen.get() for _ in range(seen.qsize())
    }
    assert latency_table(report).row_count == 3


def test_models_are_left_as_found():
    """Mode, weights and shapes stay, and a batch on which a model does not run is told."""
    dense, pruned = (Awkward(width, lambda width: 0).train() for width in (16, 9))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    dense.register_forward_pre_hook(lambda module, args: 1 / len(args[0]) and None)
    with pytest.raises(PruningError, match="does not run on a batch of 0: "):
        compare_latency(dense, pruned, torch.ones(1, 4), batch_sizes=[0], progress=False)
    assert dense.training and pruned.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
