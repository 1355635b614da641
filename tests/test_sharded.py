"""Single weights are pruned where FSDP2 or tensor parallelism split them, as they are in one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune import PruningError, load_from_checkpoint
from lightning_prune.callbacks.engine.sharding import load_as_before_, take_shapes_before_loading_
from lightning_prune.model.shards import missing_of_torch
from tests.sharded_runs import CASES, REFUSED, Deep, Lit, data, network, strategy, trainer


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes saved of all runs."""
    if missing := missing_of_torch():
        pytest.skip(f"torch {torch.__version__} lacks {missing}, which split models need")
    out = tmp_path_factory.mktemp("sharded")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    here |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    here |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharded_runs", out], env=here | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), said[0][-3000:] + said[1][-3000:]
    return out


def alone(case, **options):
    """The same run in one process."""
    module = network(case)
    loader = DataLoader(data(), 32)
    trainer(case, devices=1).fit(module, loader, loader, **options)
    return module


@pytest.mark.parametrize(
    "name",
    [
        *(f"fsdp-{case}" for case in CASES if case not in (*REFUSED, "by-outputs", "one-shot")),
        "tp-layer",
        "tp-global",
        "tp-rewinding",
    ],
)
def test_same_weights_are_pruned_as_in_one_process(results, name):
    """The same zeros, to the last one, and weights equal but for the order of sums."""
    expected, found = alone(name.partition("-")[2]).state_dict(), torch.load(results / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value == 0, found[key] == 0), key
        assert torch.allclose(value, found[key], atol=1e-4), key


@pytest.mark.parametrize(
    "kind",
    [
        "file", "folder", "slim-file", "slim-folder", "deep-file", "deep-folder", "taylor-file", "rewinding-folder",
    ],
)  # fmt: skip
def test_a_resumed_run_ends_as_the_whole_one(results, kind):
    """From a file of the whole and from a folder of shards."""
    whole, resumed = torch.load(results / f"{kind}s"), torch.load(results / f"resumed-{kind}")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_one_process_goes_on_where_two_stopped(results):
    """A file that two processes saved is resumed by one, with its masks."""
    module = alone("global", ckpt_path=results / "file" / "epoch=1.ckpt")
    whole = torch.load(results / "files")
    for key, value in module.state_dict().items():
        assert torch.equal(value == 0, whole[key] == 0), key
        assert torch.allclose(value, whole[key], atol=1e-4), key


def test_one_process_loads_what_two_have_cut(results):
    """A file that two processes saved of a slim model is loaded by its class alone, and resumed by one."""
    path = results / "slim-file" / "epoch=2.ckpt"
    saved, whole = torch.load(path)["state_dict"], torch.load(results / "slim-files")
    assert saved["net.0.weight"].shape == (22, 8)
    for key, value in load_from_checkpoint(Lit, path).state_dict().items():
        assert torch.equal(value, saved[key]), key
    module = alone("filters", ckpt_path=path)
    for key, value in module.state_dict().items():
        assert torch.allclose(value, whole[key], atol=1e-4), key


def test_layers_leave_that_two_processes_agree_on(results):
    """A file of a model that lost layers is loaded by its class alone, and the guard brings layers back."""
    path = results / "deep-file" / "epoch=2.ckpt"
    saved = torch.load(path)["state_dict"]
    assert 0 < len(saved) < len(Deep().state_dict())
    for key, value in load_from_checkpoint(Deep, path).state_dict().items():
        assert torch.equal(value, saved[key]), key
    assert torch.load(results / "fsdp-layers-guarded").keys() == Deep().state_dict().keys()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tp-filters", "tensor parallelism splits channels"),
        ("tp-layers", "tensor parallelism splits channels"),
        ("tp-one-shot", "tensor parallelism splits channels"),
        ("shuffled", "Run controls under"),
    ],
)
def test_what_cannot_be_done_is_refused(results, name, told):
    """Before training starts, with what to do instead."""
    assert told in (results / name).read_text()


@pytest.mark.parametrize("case", ["filters", "layer"])
def test_a_torch_that_is_too_old_is_refused(case, monkeypatch):
    """Before a process is started, whatever is pruned, with what is missing."""
    monkeypatch.setattr("lightning_prune.callbacks.engine.sharding.missing_of_torch", lambda: "this and that")
    run = trainer(case, devices=2, strategy=strategy("fsdp", False))
    pruning, module = run.callbacks[0], Lit()
    with pytest.raises(PruningError, match=r"needs \(this and that\)\. Install torch 2\.7 or newer"):
        pruning.setup(run, module, "fit")


def test_what_replaced_the_loading_of_a_strategy_stays():
    """Another stand-in for ``load_checkpoint`` is there again after a run, and stays where nothing is split."""
    run = trainer("layer", devices=1)
    run.strategy.load_checkpoint = mine = run.strategy.load_checkpoint
    take_shapes_before_loading_("here", run, Lit())
    assert run.strategy.load_checkpoint is not mine
    load_as_before_(run)
    assert run.strategy.load_checkpoint is mine
    load_as_before_(run)
    assert run.strategy.load_checkpoint is mine


@pytest.mark.parametrize(
    "told",
    [{}, {"shapes": 3, "recipe": {}}, {"shapes": {"net.0.weight": ["a", 2]}, "recipe": {}},
     {"shapes": {"net.0.weight": [-1, 8]}, "recipe": {}}, {"shapes": {"net.0.weight": [10**9, 10**9]}, "recipe": {}}],
    ids=str,
)  # fmt: skip
def test_damaged_shapes_are_refused(tmp_path, told, monkeypatch):
    """Before anything of their size is made, with what to do."""
    monkeypatch.setattr("lightning_prune.callbacks.engine.sharding.is_model_parallel", lambda trainer: True)
    run = trainer("layer", devices=1)
    torch.save({"lightning_prune": told}, tmp_path / "damaged.ckpt")
    take_shapes_before_loading_("here", run, Lit())
    with pytest.raises(PruningError, match="damaged. Load an earlier checkpoint"):
        run.strategy.load_checkpoint(tmp_path / "damaged.ckpt")


def test_a_criterion_that_draws_at_random_prunes_as_much(results):
    """Which units ``output_change`` prunes depends on what it draws; how many does not."""
    expected, found = alone("by-outputs").state_dict(), torch.load(results / "fsdp-by-outputs")
    assert [value.shape for value in found.values()] == [value.shape for value in expected.values()]


def test_second_order_pruning_chooses_nearly_the_same(results):
    """The order of sums can turn a close choice among weights; as many are zeroed, and nearly the same ones."""
    expected, found = alone("one-shot").state_dict(), torch.load(results / "fsdp-one-shot")
    weights = [key for key, value in expected.items() if value.dim() > 1]
    same = sum(int(((expected[key] == 0) == (found[key] == 0)).sum()) for key in weights)
    assert [int((found[key] == 0).sum()) for key in weights] == [int((expected[key] == 0).sum()) for key in weights]
    assert same >= 0.95 * sum(expected[key].numel() for key in weights)
