"""What takes long shows how far it has come, where somebody looks."""

import io
import re
from functools import partial

import pytest
import rich
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from lightning_prune import PruningError, prune_filters, prune_obs, sensitivity
from lightning_prune.analysis.latency_comparison import compare_latency
from lightning_prune.model.progress_bars import counted
from lightning_prune.pruning import plan
from lightning_prune.pruning.exact import prune_exact
from lightning_prune.pruning.fisher import prune_fisher

IMAGES = torch.randn(32, 3, 6, 6)
BATCHES = [(IMAGES, torch.randint(4, (32,)))] * 3
POINTS = [(torch.randn(16, 6), torch.randn(16, 3))]


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    ).eval()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


CALLS = {
    r"latency \d+% .*\d+/\?": lambda **shown: prune_filters(convolutions(), IMAGES, 0.3, target="latency", **shown),
    "batches .*3/3": lambda **shown: prune_filters(
        convolutions(), IMAGES[:1], 0.3, criterion="taylor", batches=BATCHES, loss=loss, **shown
    ),
    "groups scored .*2/2": lambda **shown: prune_filters(
        convolutions(), IMAGES[:1], criterion="obs", batches=[IMAGES], **shown
    ),
    "layers refitted .*1/1": lambda **shown: prune_filters(
        convolutions(), IMAGES[:1], criterion="obs", batches=[IMAGES], ignore=["0"], **shown
    ),
    "blocks pruned .*100%": lambda **shown: prune_obs(convolutions(), batches=[IMAGES], amount=0.2, **shown),
    "weights .*2/2": lambda **shown: prune_fisher(
        nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), batches=BATCHES, loss=loss, **shown
    ),
    r"weights \(loss [\d.]+\) .*10/10": lambda **shown: prune_exact(
        nn.Linear(6, 3), batches=POINTS, loss=F.mse_loss, amount=10 / 21, **shown
    ),
}
LAST, BLOCKS = list(CALLS.values())[-1], CALLS["blocks pruned .*100%"]


def by_flops(model, example_inputs, structure, keep, whole):
    """In the place of a latency: the share of the multiply-adds."""
    return structure.flops(keep) / structure.flops({})


def shown(call, monkeypatch, terminal=True, **arguments):
    """Everything that a call writes, without what moves the cursor."""
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_terminal=terminal, width=100))
    call(**arguments)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", rich.get_console().file.getvalue())


@pytest.mark.parametrize("said, call", CALLS.items(), ids=CALLS)
def test_long_calls_show_how_far_they_are(said, call, monkeypatch):
    """In a terminal a bar says what is done; whoever asks for none gets none."""
    torch.manual_seed(0)
    monkeypatch.setattr(plan, "latency_kept", by_flops)
    assert re.search(said, shown(call, monkeypatch))
    assert not shown(call, monkeypatch, progress=False).strip()


def test_nothing_is_written_into_a_file(monkeypatch):
    """Where the output is no terminal it stays as it was, to the last line."""
    small = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(2, 4)
    compared = partial(compare_latency, small[0], small[0], small[1], batch_sizes=[2])
    for call in (LAST, BLOCKS, partial(sensitivity, *small, lambda net: 1.0), compared):
        assert shown(call, monkeypatch, terminal=False) == ""


def test_a_bar_goes_when_something_fails(monkeypatch):
    """An error takes the bar away with it: the next one is not refused, and nothing goes on writing."""

    def failing(model, batch):
        raise PruningError("of the loss")

    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_terminal=True, width=100))
    with pytest.raises(PruningError, match="of the loss") as held:
        prune_filters(convolutions(), IMAGES[:1], 0.2, criterion="taylor", batches=BATCHES, loss=failing)
    assert rich.get_console()._live_stack == [] and held.value.__traceback__ is not None
    with counted("more", 2, True) as advance:
        advance()
