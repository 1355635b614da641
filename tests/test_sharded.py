"""Single weights are pruned where FSDP2 or tensor parallelism split them, as they are in one process."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune import PruningError, load_from_checkpoint
from lightning_prune.callbacks.engine.sharding import load_as_before_, take_shapes_before_loading_
from lightning_prune.measure.footprint import Footprint
from lightning_prune.model.shards import missing_of_torch, undo_parallelize_module_
from lightning_prune.pruning.budget import Budget, Dense
from lightning_prune.surgery import find_groups
from tests.sharded_runs import (
    BOTH,
    CASES,
    MISFITS,
    MORE,
    TENSOR_PARALLEL,
    Decoder,
    Deep,
    Lit,
    data,
    network,
    strategy,
    trainer,
)

SPLIT = ("net.1.up.weight", "net.1.attention.q.weight")  # along the dimension of their outputs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes saved of all runs."""
    return results_of(tmp_path_factory, "fsdp", 2)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """What two processes saved of runs under tensor parallelism."""
    return results_of(tmp_path_factory, "tp", 2)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What four processes saved of runs under FSDP2 and tensor parallelism."""
    return results_of(tmp_path_factory, "both", 4)


def results_of(tmp_path_factory, which, count):
    if missing := missing_of_torch():
        pytest.skip(f"torch {torch.__version__} lacks {missing}, which split models need")
    out = tmp_path_factory.mktemp("sharded")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    here |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    here |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    here |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharded_runs", out, which], env=here | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in map(str, range(count))
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "".join(text[-3000:] for text in said)
    return out


def alone(case, **options):
    """The same run in one process."""
    module = network(case)
    loader = DataLoader(data(case), 32)
    trainer(case, devices=1).fit(module, loader, loader, **options)
    return module


@pytest.mark.parametrize(
    "name",
    [
        *(f"fsdp-{case}" for case in CASES if not case.startswith(("tokens", "by-outputs", "one-shot", *MISFITS))),
        *(f"tp-{case}" for case in TENSOR_PARALLEL),
    ],
)
def test_same_weights_are_pruned_as_in_one_process(results, name, monkeypatch):
    """The same zeros, to the last one, and weights equal but for the order of sums."""
    assert_same_as_alone(results, name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"tp-{case}" for case in MORE])
def test_same_units_are_pruned_under_tensor_parallelism(parallel, name, monkeypatch):
    """With every criterion that is supported, repair, guards and sequence parallelism."""
    assert_same_as_alone(parallel, name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"both-{case}" for case in BOTH])
def test_same_units_are_pruned_under_both(both, name, monkeypatch):
    """FSDP2 splits what tensor parallelism has split."""
    assert_same_as_alone(both, name, monkeypatch)


def assert_same_as_alone(results, name, monkeypatch):
    how, _, case = name.partition("-")
    if how != "fsdp":  # one process that keeps as many units as two can share
        monkeypatch.setattr("lightning_prune.callbacks.engine.unit_removal.tensor_parallel_size", lambda trainer: 2)
    expected, found = alone(case).state_dict(), torch.load(results / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value == 0, found[key] == 0), key
        assert torch.allclose(value, found[key], atol=1e-4), key
    if how != "fsdp":
        assert all(len(found[key]) % 2 == 0 for key in SPLIT if key in found), name


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
        ("tp-layers", "plans name layers"),
        ("tp-activations", "no process sees all activations"),
        ("tp-taylor-activations", "Score by weights"),
        ("tp-heads", "configure_model of Heads changes net.1.attention.heads from 4 to 2"),
        ("tp-listed", "configure_model of Listed changes net.1.attention.counted[0] from 4 to 2"),
        ("tp-hidden", "does not compute the same whole and split"),
    ],
)
def test_what_cannot_be_done_is_refused(results, name, told):
    """Before training starts, with what to do instead."""
    assert told in (results / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("heads", "Leave heads as it is"),
        ("listed", "Leave counted[0] as it is"),
        ("hidden", "does not compute the same whole and split"),
        ("hooked", "Set hooks in __init__"),
        ("once", "without a guard that returns early"),
        ("parts", "does not compute the same whole and split"),
    ],
)
def test_modules_that_are_others_as_a_whole_are_refused(parallel, name, told):
    """Whatever their code does in ``configure_model``."""
    assert told in (parallel / f"tp-{name}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tokens", "tokens-taylor", "tokens-repaired"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_runs_under_tensor_parallelism_resume(parallel, case, kind):
    """As the whole run ends, from before and after a cut; under FSDP2, too."""
    whole = torch.load(parallel / f"{case}-{kind}s")
    for epoch in (1, 2):
        resumed = torch.load(parallel / f"resumed-{case}-{kind}-{epoch}")
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), epoch
    other = torch.load(parallel / f"fsdp-from-{case}-{kind}")
    assert all(torch.allclose(value, other[key], atol=1e-4) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_runs_under_both_resume(both, kind):
    """From a file of the whole and from a folder of shards."""
    whole, resumed = torch.load(both / f"both-{kind}s"), torch.load(both / f"resumed-both-{kind}")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.slow
def test_one_process_loads_what_was_cut_under_tensor_parallelism(parallel):
    """A file of a slim model is loaded by its class alone."""
    path = parallel / "tokens-file" / "epoch=2.ckpt"
    saved = torch.load(path)["state_dict"]
    assert saved["net.1.up.weight"].shape != (24, 16)
    for key, value in load_from_checkpoint(Decoder, path).state_dict().items():
        assert torch.equal(value, saved[key]), key


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
    assert_nearly_the_same("one-shot", results / "fsdp-one-shot")


@pytest.mark.slow
def test_second_order_pruning_under_tensor_parallelism(parallel):
    """Likewise."""
    assert_nearly_the_same("tokens-one-shot", parallel / "tp-tokens-one-shot")


def assert_nearly_the_same(case, path):
    expected, found = alone(case).state_dict(), torch.load(path)
    weights = [key for key, value in expected.items() if value.dim() > 1]
    same = sum(int(((expected[key] == 0) == (found[key] == 0)).sum()) for key in weights)
    assert [int((found[key] == 0).sum()) for key in weights] == [int((expected[key] == 0).sum()) for key in weights]
    assert same >= 0.95 * sum(expected[key].numel() for key in weights)


@pytest.mark.parametrize(("round_to", "parts"), [(1, 2), (4, 3), (3, 2), (8, 4)])
def test_units_are_shared_evenly_by_processes(round_to, parts):
    """Numbers of units are multiples of the processes, also of heads; numbers of channels are those of ``round_to``."""
    net = network("tokens")
    structure = find_groups(net, torch.zeros(1, 5, dtype=torch.long))
    dense = Dense({name: group.width for name, group in structure.groups.items()}, Footprint(1, 1))
    blocks, least = Budget(round_to=round_to, parts=parts).blocks_and_least(structure, dense)
    assert {structure.groups[name].channels for name in least} == {1, 4}  # heads among them
    for block in blocks:
        for name, widths in zip(block.members, block.widths.T, strict=True):
            group = structure.groups[name]
            fewer = widths[widths < group.width]
            assert (fewer % parts == 0).all()
            assert (fewer * group.channels % round_to == 0).all()


def test_hooks_of_tensor_parallelism_alone_are_taken_off():
    """Others stay, and are named where they ran behind one of these, so that they can go there again."""
    from torch.distributed.tensor import distribute_module

    with one_process() as mesh:
        net = torch.nn.Linear(2, 2)
        first = net.register_forward_hook(lambda *_: None)
        between = {"input_fn": lambda module, inputs, mesh: inputs, "output_fn": lambda module, outputs, mesh: outputs}
        distribute_module(net, mesh, **between)
        last = net.register_forward_hook(lambda *_: None, always_call=True)
        later = undo_parallelize_module_(net)
        assert list(net._forward_hooks) == [first.id, last.id]
        assert not net._forward_pre_hooks
        assert [key for _, key in later] == [last.id]
        distribute_module(net, mesh)  # torch refuses a second call on what it knows


@contextmanager
def one_process():
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()
