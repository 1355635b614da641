"""Random runs that remove experts end, or are refused before a step; from any checkpoint they end where they would."""

import random

import pytest

from lightning_prune import PruningError
from lightning_prune.callbacks import ExpertPruning
from tests.mixtures import GATES, STYLES
from tests.random_runs import SETTINGS, RandomRun, _companions, _others, _schedule
from tests.test_expert_pruning import Experts
from tests.test_random_runs import resumed_alike

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 160))]


def draw_expert_run(seed, folder):
    """Draw two mixtures, how their experts leave, other callbacks and settings of the Trainer."""
    r = random.Random(seed)
    styles, gate = r.choices(STYLES, k=2), r.choice(GATES)
    arguments = {
        "amount": r.choice([0.3, 0.5, 3, 4]),
        "criterion": r.choice(["reap", "frequency", "magnitude", "random"]),
        "schedule": _schedule(r),
        "batches": r.choice([1, 2]),
        "min_experts": r.choice([1, 3]),
        "recalibrate": r.choice([0, 1]),
        "ignore": r.choice([[], [], ["mixtures.1"]]),
    }
    ours = [ExpertPruning(**arguments), *_companions(r, None)]
    r.shuffle(ours)
    settings = {name: r.choice(values) for name, (chance, values) in SETTINGS.items() if r.random() < chance}
    return RandomRun(lambda **given: Experts(**given, styles=styles, gate=gate), ours, _others(r, folder), settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_run_ends_and_can_be_resumed(seed, tmp_path):
    """What differs, or fails, does so with Lightning's callbacks alone, too."""
    folder = tmp_path / "pruned"
    try:
        assert resumed_alike(seed, draw_expert_run, folder) in (True, None)
    except PruningError:
        return
    except Exception:
        try:
            alike = resumed_alike(seed, draw_expert_run, tmp_path / "alone", alone=True)
        except Exception:
            return
        if alike is not False:
            raise
