"""Random programs pruned in many small steps: what shrinks may come apart, and no step may then end the run."""

import random
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_prune import Cubic, FilterL1Pruning, Linear, OneShot, PruningError
from tests.programs import build, draw, example_of
from tests.runs import Depthwise, assert_agrees_with_shapes, fit, net, trainer, widths

APART = (14, 43, 60, 66, 71, 82, 97)
"""Programs whose groups come apart, or together, as they shrink."""
SOME = pytest.mark.parametrize("seed", [*APART, *(pytest.param(n, marks=pytest.mark.slow) for n in range(100, 400))])


class Still(LightningModule):
    """Holds a network and trains nothing, so that its scores stay what they are."""

    def __init__(self, network, inputs):
        super().__init__()
        self.network, self.example_input_array = network, inputs

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        return 0 * next(iter(self.network.parameters())).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), 0.0)


def pruned(program, schedule, **arguments):
    """The module, the callback and what was warned of, after a run."""
    torch.manual_seed(0)
    module = Still(build(program), example_of(program))
    callback = FilterL1Pruning(schedule=schedule, report=False, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=schedule.end + 1).fit(module, DataLoader([0.0, 0.0]))
    return module, callback, " ".join(str(warning.message) for warning in caught)


@SOME
def test_many_steps_end_where_one_ends_or_say_so(seed):
    """Where the amount goes at once, it goes in five steps, or a warning says what was left out; the run goes on."""
    drawn = random.Random(seed)
    program = draw(drawn)
    arguments = {
        "amount": drawn.choice([0.5, 0.7, 0.8, 0.9]),
        "target": drawn.choice(["filters", "filters", "params", "flops"]),
        "scope": drawn.choice(["layer", "global"]),
    }
    try:
        _, _, short = pruned(program, Linear(1, 1), **arguments)
    except PruningError:
        pytest.skip("nothing of it, or not as much, can be pruned")
    module, callback, told = pruned(program, Linear(1, 5), **arguments)
    module(module.example_input_array)
    (goal,) = callback.history.goals
    said = "asked to prune" in told or "is left out" in told or "asked to prune" in short
    assert goal.reached >= goal.asked - 0.02 or said, (goal, told)
    state = callback.member.strategy.state
    for name, left in state.widths.items():
        assert 1 <= left <= state.start.widths[name], name


def test_a_convolution_left_with_one_group_is_not_cut_inside():
    """Its channels are no units of the dense network; a resumed run knows it, too."""
    module = net(Depthwise)
    fit(module, FilterL1Pruning(0.75, schedule=Cubic(1, 4)), max_epochs=6)
    at_once = net(Depthwise)
    fit(at_once, FilterL1Pruning(0.75, schedule=OneShot(1)), max_epochs=2)
    assert module.grouped.groups == 1
    assert widths(module) == widths(at_once)
    assert_agrees_with_shapes(module)
