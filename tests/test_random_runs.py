"""Random runs end, or are refused by name before a step; from any checkpoint they end where they would have ended."""

import pytest
import torch

from lightning_prune import PruningError
from tests.random_runs import EPOCHS, ByHand, RandomRun, draw_run
from tests.runs import batches, images, trainer

QUICK = (*range(12), 136, 163, 320, 425, 471)
SEEDS = [*QUICK, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(400, 700))]


def fitted(run: RandomRun, other_weights, callbacks, **arguments):
    """The state of a module after a run, by name."""
    torch.manual_seed(1)
    torch.rand(int(other_weights))  # the seed stays what it is
    module = run.module(dropout=0.0)
    settings = {"enable_checkpointing": True, "max_epochs": EPOCHS, **run.settings}
    made = trainer(*callbacks, **settings)
    try:
        made.fit(module, batches(), batches(16, seed=9), **arguments)
    except PruningError:
        first_epoch = made.current_epoch == 0 and run.module is ByHand  # what optimizers show that take turns
        assert made.global_step == 0 or first_epoch, "refused, but only after steps were spent"
        raise
    with torch.no_grad():
        module.eval()(images(4).tensors[0].to(next(module.parameters()).dtype))
    return {name: value.clone() for name, value in module.state_dict().items()}


def resumed_alike(seed, draw, folder, alone=False):
    """Whether the run ends from its middle checkpoint where it ended before; None if it has too few checkpoints.

    With ``alone``, only Lightning's callbacks take part.
    """
    run = draw(seed, folder)
    whole = fitted(run, False, run.others if alone else run.callbacks)
    paths = sorted(folder.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    if len(paths) < 3:
        return None
    again = draw(seed, folder / "again")
    found = fitted(again, True, again.others if alone else again.callbacks, ckpt_path=paths[len(paths) // 2])
    return found.keys() == whole.keys() and all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_run_ends_and_can_be_resumed(seed, tmp_path):
    """What differs, or fails, does so with Lightning's callbacks alone, too."""
    folder = tmp_path / "pruned"
    try:
        assert resumed_alike(seed, draw_run, folder) in (True, None)
    except PruningError:
        return
    except Exception:
        folder = tmp_path / "alone"
        try:
            alike = resumed_alike(seed, draw_run, folder, alone=True)
        except Exception:
            return
        if alike is not False:
            raise
