"""Single weights are pruned where FSDP2 or tensor parallelism split them, as they are in one process."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

SHARED = '''
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import IterativeMagnitudePruning, Linear

EPOCHS = 4


class Lit(pl.LightningModule):
    """A network whose layers are of sizes that two processes cannot halve evenly, but for those of tensor parallelism."""

    def __init__(self, how="one"):
        super().__init__()
        self.how = how
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 12), nn.LayerNorm(12), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def configure_model(self):
        if self.how == "fsdp":
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        if self.how == "tp":
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            plan = {"4": ColwiseParallel(), "6": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, 8, generator=generator), torch.randint(0, 3, (32,), generator=generator))


CASES = {
    "layer": dict(amount=0.7),
    "global": dict(amount=0.7, scope="global"),
    "pattern": dict(pattern="2:4", parameters=["net.0", "net.4"]),
    "clipped": dict(amount={"net.0": 0.5, "net.4": 0.9}),
}


def trainer(case, folder=None, **options):
    pruning = IterativeMagnitudePruning(schedule=Linear(1, 3), **CASES[case])
    saving = [] if folder is None else [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    clip = 0.1 if case == "clipped" else None
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[pruning, *saving], enable_checkpointing=folder is not None,
        gradient_clip_val=clip, **quiet, **options,
    )
'''

SCRIPT = """
import sys
from pathlib import Path
from lightning.pytorch.strategies import ModelParallelStrategy


def strategy(how, folders):
    sizes = (2, 1) if how == "fsdp" else (1, 2)
    return ModelParallelStrategy(
        *sizes, save_distributed_checkpoint=folders, process_group_backend="gloo"
    )


def run(name, case, how, folder=None, folders=False, ckpt_path=None):
    run = trainer(case, folder, devices=2, strategy=strategy(how, folders))
    module = Lit(how)
    run.fit(module, DataLoader(data(), 16 if how == "fsdp" else 32), ckpt_path=ckpt_path)
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in module.state_dict().items()}
    if run.is_global_zero:
        torch.save({key: value.detach().clone() for key, value in whole.items()}, out / name)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for case in CASES:
        run(f"fsdp-{case}", case, "fsdp")
    run("tp-layer", "layer", "tp")
    run("tp-global", "global", "tp")
    run("files", "global", "fsdp", out / "file", False)
    run("folders", "global", "fsdp", out / "folder", True)
    run("resumed-file", "global", "fsdp", ckpt_path=out / "file" / "epoch=1.ckpt")
    run("resumed-folder", "global", "fsdp", folders=True, ckpt_path=out / "folder" / "epoch=1.ckpt")
"""

exec(SHARED)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes saved of all runs."""
    out = tmp_path_factory.mktemp("sharded")
    (out / "run.py").write_text(SHARED + SCRIPT)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    here |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    here |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, out / "run.py", out], env=here | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), said[0][-3000:] + said[1][-3000:]
    return out


def alone(case, **options):
    """The same run in one process."""
    module = Lit()
    trainer(case, devices=1).fit(module, DataLoader(data(), 32), **options)
    return module


@pytest.mark.parametrize(
    "name", [*(f"fsdp-{case}" for case in ("layer", "global", "pattern", "clipped")), "tp-layer", "tp-global"]
)
def test_same_weights_are_pruned_as_in_one_process(results, name):
    """The same zeros, to the last one, and weights equal but for the order of sums."""
    expected, found = alone(name.partition("-")[2]).state_dict(), torch.load(results / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value == 0, found[key] == 0), key
        assert torch.allclose(value, found[key], atol=1e-4), key


@pytest.mark.parametrize("kind", ["file", "folder"])
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
