"""The comparison at half the FLOPs: runs are made once, kept as they end, and only leaders get further seeds."""

import json

import pytest
import torch
from torch import nn

from benchmarks.budgets import unit_costs
from benchmarks.half_flops import METHODS, ONE_IMAGE, Method, Results, contenders, method_of, ours, run_all, table
from benchmarks.models import resnet_cifar
from lightning_prune import count_flops

SETTINGS = {"depth": 20}


def made(cuts):
    """Stand in for cutting and tuning: every method is as good as its place in the list, and cuts are counted."""

    def cut(method, seed):
        cuts.append((method, seed))
        return nn.Linear(1, 1), {"flops_left": 0.5, "params_left": 0.6, "after_cut": METHODS.index(method) / 100}

    return cut, lambda slim, seed, taught: 0.5 + seed / 1000


def test_a_stopped_comparison_goes_on(tmp_path):
    """What the file holds is not run again; what is missing is, seed by seed."""
    path, cuts = tmp_path / "found.json", []
    cut, tune = made(cuts)

    def stops(slim, seed, taught):
        if len(cuts) == 3:
            raise KeyboardInterrupt
        return tune(slim, seed, taught)

    with pytest.raises(KeyboardInterrupt):
        run_all(Results(path, SETTINGS), 2, 1, cut, stops)
    assert [method_of(run) for run in json.loads(path.read_text())["runs"]] == list(METHODS[:2])
    run_all(Results(path, SETTINGS), 2, 1, cut, tune)
    runs = json.loads(path.read_text())["runs"]
    assert [(method_of(run), run["seed"]) for run in runs[: len(METHODS)]] == [(method, 0) for method in METHODS]
    assert [run["seed"] for run in runs[len(METHODS) :]] == [1, 1]  # the leader of either library
    assert len(cuts) == len(runs) + 1  # the one that was stopped
    assert table(runs, "all").row_count == len(METHODS)


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    """A file of runs made otherwise is refused."""
    Results(tmp_path / "found.json", SETTINGS).add(METHODS[0], seed=0, fine_tuned=0.5)
    with pytest.raises(ValueError, match="move it away"):
        Results(tmp_path / "found.json", {"depth": 56})


def test_leaders_are_the_best_of_each_library_with_the_first_seed():
    """Further seeds go to the methods that did best with the first, as many of each library."""
    accuracies = {method: i / 100 for i, method in enumerate(METHODS)}
    runs = [
        {**m._asdict(), "seed": seed, "fine_tuned": a if not seed else 0}
        for m, a in accuracies.items()
        for seed in (0, 1)
    ]
    for library in ("ours", "torch-pruning"):
        own = [method for method in METHODS if method.library == library]
        assert [m for m in contenders(runs, 2) if m.library == library] == own[:-3:-1]  # the best first


@pytest.mark.parametrize("groups", ["all", "inner"])
def test_ours_is_half_the_flops(groups):
    """The cut ends at half the FLOPs; with inner channels alone, the stream that all blocks add to stays whole."""
    dense = resnet_cifar(20)
    slim = ours(dense, Method("ours", "l1", "global", groups), [])
    assert 0.47 < count_flops(slim, ONE_IMAGE).total / count_flops(dense, ONE_IMAGE).total <= 0.5
    assert (slim.conv1.out_channels == 16) is (groups == "inner")


def test_what_one_more_unit_would_save():
    """For every group, the multiply-adds that are gone with one of its units."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert unit_costs(model, torch.zeros(1, 5)) == [5 + 3, 4 + 2]
