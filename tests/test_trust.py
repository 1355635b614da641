"""Runs are not lost: killed, fed nonsense, pruned for long, under whatever the Trainer offers; a sample of each."""

import itertools
import sys

import pytest
from lightning.pytorch.callbacks import Callback

from benchmarks.trust.cells import alone, try_cells
from benchmarks.trust.fuzz import KINDS, attempts
from benchmarks.trust.kills import kill_runs
from benchmarks.trust.runs import CALLBACKS, Batches, Net, trainer
from benchmarks.trust.soak import soak
from lightning_prune import FilterL1Pruning, OneShot


@pytest.mark.parametrize(
    "cases, every",
    [(["l1"], ("epoch",)), pytest.param(list(CALLBACKS), ("epoch", "step"), marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_killed_runs_end_where_the_others_end(cases, every):
    """Killed anywhere and taken up again, a run ends at the same bits; every file it left can be loaded."""
    found = kill_runs(cases, 2, seed=1, every=every)
    assert not found.lost
    assert found.tried.total() >= 2 * len(cases) and found.checkpoints > found.runs


@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_works_or_is_refused(kind, examples):
    """Whatever is asked for, a run works or is refused in words, with the model whole and no hook on it."""
    assert attempts(kind, examples).total() >= examples


@pytest.mark.parametrize("every", [149, pytest.param(7, marks=pytest.mark.slow)], ids=["few", "many"])
def test_settings_beside_each_other(every):
    """Under precisions, callbacks, optimizers and what else a step may do, runs prune, and resume to the last bit."""
    found = try_cells(itertools.islice(alone(), every // 2, None, every))
    assert not found.failures
    assert found.passed + len(found.fail_anyway) == found.tried and found.passed > 0.9 * found.tried


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)], ids=["forty", "thousand"])
@pytest.mark.parametrize("case, width", [("cuts", 8), ("masks", None)])
def test_nothing_gathers(case, width, times):
    """Cut after cut and mask after mask the number of objects stays, old weights are freed, and hooks stay as many."""
    seen = soak(case, times)
    assert seen["width"] == (width or times + 8)
    half = seen["objects"][len(seen["objects"]) // 2 :]
    # One object a cut, which the history of the run notes; before Python 3.11 its attributes are a second one.
    noted = 1 if sys.version_info >= (3, 11) else 2
    assert max(half) - min(half) <= noted * times // 2 + 8
    assert not any(seen["old storages alive"])
    assert len(set(seen["hooks"])) == 1
    kinds = {name.rpartition(".")[2] for name in seen["left behind"]}
    assert kinds == {"_state_dict_hooks", "_load_state_dict_pre_hooks"}  # the recipe of a model that was pruned
    assert len(set(seen["left behind"])) == len(seen["left behind"])
    assert times < 1000 or seen["memory"][-1] - seen["memory"][len(seen["memory"]) // 2] < 4 * 2**20


def test_loaders_of_ones_own_stay_where_they_are():
    """Batches that are read beside the training leave a loader that counts what it gave where it was."""

    class Places(Callback):
        def __init__(self, loader):
            self.loader, self.seen = loader, []

        def on_train_batch_start(self, *_):
            self.seen.append((self.loader.epoch, self.loader.given))

    seen = []
    for recalibrate in (0, 2):
        loader = Batches(7)
        places = Places(loader)
        pruning = FilterL1Pruning(0.5, schedule=OneShot(2, by="steps"), recalibrate=recalibrate)
        trainer(pruning, places, max_epochs=2).fit(Net(), loader)
        seen.append(places.seen)
    assert seen[0] == seen[1] and len(seen[0]) == 8
