"""The runs of tests/test_sharded.py: in one process, and, as a program, in two that split the weights."""

import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    LayerPruning,
    Linear,
    MetricGuard,
    OBSOneShot,
    OneShot,
    PruningError,
    TaylorFilterPruning,
)

EPOCHS = 4


class Lit(pl.LightningModule):
    """A network whose layers are of odd sizes, but for those that tensor parallelism halves."""

    def __init__(self, how="one"):
        super().__init__()
        self.how = how
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 33),
            nn.ReLU(),
            nn.Linear(33, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )

    def configure_model(self):
        if "tp" in self.how:
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            plan = {"4": ColwiseParallel(), "6": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if "fsdp" in self.how:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)
        self.log("epoch_score", float(self.current_epoch != 2), sync_dist=True)  # bad after the pruning step alone

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(12, 21), nn.ReLU(), nn.Linear(21, 12))

    def forward(self, x):
        return x + self.inner(x)


class Deep(Lit):
    """A network of blocks, each of which can leave."""

    def __init__(self, how="one"):
        super().__init__(how)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), *[Residual() for _ in range(5)], nn.Linear(12, 3))

    def configure_model(self):
        if self.how == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for layer in (*self.net, self.net):  # whatever stands where a layer was
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Attention(nn.Module):
    """Attention that reads from shapes how many heads it has."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm_1, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Decoder(Lit):
    """A transformer whose activations tensor parallelism splits along the sequence, outside of its products."""

    def __init__(self, how="one"):
        super().__init__(how)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(11, 16), Block(), Block(), nn.LayerNorm(16), nn.Linear(16, 11))

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            SequenceParallel,
            parallelize_module,
        )

        if "tp" in self.how:
            cut = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
            plan = {
                "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "3": SequenceParallel(),
                "4": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            }
            for block in "12":
                plan |= {f"{block}.{name}": SequenceParallel() for name in ("norm_1", "norm_2")}
                plan |= {
                    f"{block}.attention": PrepareModuleInput(**cut),
                    f"{block}.up": ColwiseParallel(input_layouts=Shard(1)),
                }
                plan |= {f"{block}.attention.{name}": ColwiseParallel() for name in "qkv"}
                plan |= {
                    f"{block}.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.o", "down")
                }
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if "fsdp" in self.how:
            for layer in (*self.net, self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)


class Heads(Decoder):
    """A transformer that needs to be told how many heads it has."""

    def __init__(self, how="one"):
        super().__init__(how)
        for block in self.net[1:3]:
            block.attention = CountedAttention()

    def configure_model(self):
        super().configure_model()
        for block in self.net[1:3]:
            self.change(block.attention)

    def change(self, attention):
        attention.heads //= 2


class CountedAttention(Attention):
    def __init__(self):
        super().__init__()
        self.heads, self.counted, self.told = 4, [4], lambda: 4

    def forward(self, x):
        heads = min(self.heads, self.counted[0], self.told())
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Listed(Heads):
    """The same, in a list; runs as a whole, and computes something else."""

    def change(self, attention):
        attention.counted[0] = 2


class Hidden(Heads):
    """The same, in a function, where nobody looks."""

    def change(self, attention):
        attention.told = lambda: 2


class Hooked(Decoder):
    """A transformer to which every call adds a hook."""

    def configure_model(self):
        super().configure_model()
        self.net[1].attention.register_forward_hook(lambda *_: None)


class Once(Decoder):
    """A transformer that is split once."""

    def configure_model(self):
        if not hasattr(self, "done"):
            super().configure_model()
            self.done = True


class Parts(Decoder):
    """A transformer that returns each process's part of its outputs."""

    def configure_model(self):
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"4": ColwiseParallel()})

    def training_step(self, batch, batch_idx):
        return self(batch[0]).logsumexp(-1).mean()


MISFITS = {"heads": Heads, "hidden": Hidden, "listed": Listed, "hooked": Hooked, "once": Once, "parts": Parts}
"""Modules whose whole model is another one than the split one."""


def network(case, how="one"):
    kinds = {"layers": Deep, "tokens": Decoder, **MISFITS}
    return kinds.get(case.partition("-")[0], Lit)(how)


def data(case=""):
    generator = torch.Generator().manual_seed(1)
    if case.startswith(("tokens", *MISFITS)):
        return TensorDataset(torch.randint(0, 11, (32, 9), generator=generator))
    return TensorDataset(torch.randn(32, 8, generator=generator), torch.randint(0, 3, (32,), generator=generator))


STEPS = Linear(1, 3)
CASES = {
    "layer": partial(IterativeMagnitudePruning, 0.7, schedule=STEPS),
    "global": partial(IterativeMagnitudePruning, 0.7, scope="global", schedule=STEPS),
    "pattern": partial(IterativeMagnitudePruning, pattern="2:4", parameters=["net.0", "net.4"], schedule=STEPS),
    "clipped": partial(IterativeMagnitudePruning, {"net.0": 0.5, "net.4": 0.9}, schedule=STEPS),
    "one-shot": partial(OBSOneShot, 0.5, batches=2, epoch=2),
    "filters": partial(FilterL1Pruning, 0.5, schedule=STEPS),
    "params": partial(FilterPruning, 0.5, criterion="l2", target="params", scope="global", schedule=STEPS),
    "by-outputs": partial(FilterPruning, 0.4, criterion="output_change", batches=2, schedule=OneShot(2)),
    "second-order": partial(FilterPruning, 0.4, criterion="taylor_second_order", batches=2, schedule=OneShot(2)),
    "diagonal": partial(FilterPruning, 0.4, criterion="obd", batches=2, schedule=OneShot(2)),
    "guarded": partial(FilterL1Pruning, 0.5, schedule=OneShot(2)),
    "taylor": partial(TaylorFilterPruning, 0.5, schedule=STEPS),
    "two": lambda: (
        TaylorFilterPruning({"net.0": 0.5}, schedule=OneShot(2)),
        FilterL1Pruning({"net.4": 0.5}, schedule=OneShot(1)),
    ),
    "masked-and-cut": lambda: (
        IterativeMagnitudePruning(0.5, schedule=Linear(2, 3)),
        FilterL1Pruning(0.5, schedule=OneShot(1)),
    ),
    "taylor-by-flops": partial(TaylorFilterPruning, 0.4, target="flops", scope="global", schedule=STEPS),
    "taylor-activations": partial(TaylorFilterPruning, 0.5, form="activations", schedule=STEPS),
    "activations": partial(FilterPruning, 0.5, criterion="activation_std", schedule=STEPS),
    "rewinding": partial(IterativeMagnitudePruning, 0.7, schedule=STEPS, rewind_to=1),
    "shuffled": partial(IterativeMagnitudePruning, 0.5, schedule=OneShot(2), rewind_to=0, control="shuffle"),
    "drawn": partial(IterativeMagnitudePruning, 0.5, schedule=OneShot(2), rewind_to=0, control="reinitialize"),
    "layers": partial(LayerPruning, 3, batches=2, schedule=STEPS),
    "layers-by-taylor": partial(LayerPruning, 0.5, criterion="taylor", target="flops", batches=2, schedule=OneShot(2)),
    "layers-repaired": partial(LayerPruning, 2, batches=2, schedule=OneShot(2), repair=True),
    "layers-guarded": partial(LayerPruning, 2, batches=2, schedule=OneShot(2)),
    "tokens": partial(FilterL1Pruning, 0.4, schedule=STEPS),
    **dict.fromkeys(
        ("heads", "listed", "hidden", "hooked", "once", "parts"), partial(FilterL1Pruning, 0.4, schedule=STEPS)
    ),
    "tokens-taylor": partial(TaylorFilterPruning, 0.4, target="params", scope="global", schedule=STEPS),
    "tokens-repaired": partial(FilterPruning, 0.4, criterion="obs", batches=2, schedule=OneShot(2), repair=True),
    "tokens-one-shot": partial(OBSOneShot, 0.5, batches=2, epoch=2),
    "tokens-weights": partial(IterativeMagnitudePruning, 0.6, scope="global", schedule=STEPS),
    "repaired": partial(FilterPruning, 0.4, criterion="obs", batches=2, schedule=OneShot(2)),
}


TENSOR_PARALLEL = ("layer", "global", "rewinding", "drawn", "taylor", "masked-and-cut", "tokens")
"""What runs under tensor parallelism in every test run."""
MORE = (
    "filters", "params", "second-order", "diagonal", "guarded", "two", "taylor-by-flops", "repaired", "shuffled",
    "pattern", "tokens-taylor", "tokens-repaired", "tokens-weights",
)  # fmt: skip
"""What else does."""
BOTH = ("filters", "taylor", "tokens", "tokens-taylor", "tokens-repaired", "tokens-weights", "drawn")
"""What runs under FSDP2 and tensor parallelism at once."""
REFUSED = ("layers", "activations", "taylor-activations")
"""What tensor parallelism does not allow."""


def trainer(case, folder=None, **options):
    made = CASES[case]()
    pruning = made if isinstance(made, tuple) else (made,)
    guard = [MetricGuard("epoch_score", drop=0.1, mode="max")] if "guarded" in case else []
    saving = [] if folder is None else [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    clip = 0.1 if case == "clipped" else None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[*pruning, *guard, *saving],
        enable_checkpointing=folder is not None,
        gradient_clip_val=clip,
        **quiet,
        **options,
    )


def strategy(how, folders):
    sizes = {"fsdp": (2, 1), "tp": (1, 2), "fsdp+tp": (2, 2)}[how]
    return ModelParallelStrategy(*sizes, save_distributed_checkpoint=folders, process_group_backend="gloo")


def run(name, case, how, folder=None, folders=False, ckpt_path=None):
    run = trainer(case, folder, devices=4 if how == "fsdp+tp" else 2, strategy=strategy(how, folders))
    module = network(case, how)
    loader = DataLoader(data(case), 16 if "fsdp" in how else 32)
    run.fit(module, loader, loader, ckpt_path=ckpt_path)
    whole = {key: getattr(value, "full_tensor", value.clone)() for key, value in module.state_dict().items()}
    if run.is_global_zero:
        torch.save(whole, out / name)


def refused(name, case, how):
    try:
        run(name, case, how)
    except PruningError as error:
        (out / name).write_text(str(error))


def run_fsdp():
    of_lit = [name for name in CASES if not name.startswith(("tokens", *MISFITS))]
    for case in of_lit:
        run(f"fsdp-{case}", case, "fsdp")
    for case in TENSOR_PARALLEL:
        run(f"tp-{case}", case, "tp")
    for case in (*REFUSED, "heads", "listed", "hidden"):
        refused(f"tp-{case}", case, "tp")
    run("rewinding-folders", "rewinding", "fsdp", out / "rewinding-folder", True)
    run("resumed-rewinding-folder", "rewinding", "fsdp", ckpt_path=out / "rewinding-folder" / "epoch=1.ckpt")
    run("slim-files", "filters", "fsdp", out / "slim-file", False)
    run("slim-folders", "filters", "fsdp", out / "slim-folder", True)
    run("deep-files", "layers", "fsdp", out / "deep-file", False)
    run("deep-folders", "layers", "fsdp", out / "deep-folder", True)
    run("resumed-deep-file", "layers", "fsdp", ckpt_path=out / "deep-file" / "epoch=2.ckpt")
    run("resumed-deep-folder", "layers", "fsdp", folders=True, ckpt_path=out / "deep-folder" / "epoch=1.ckpt")
    run("taylor-files", "taylor", "fsdp", out / "taylor-file", False)
    run("resumed-taylor-file", "taylor", "fsdp", ckpt_path=out / "taylor-file" / "epoch=1.ckpt")
    run("resumed-slim-file", "filters", "fsdp", ckpt_path=out / "slim-file" / "epoch=2.ckpt")
    run("resumed-slim-folder", "filters", "fsdp", folders=True, ckpt_path=out / "slim-folder" / "epoch=2.ckpt")
    run("files", "global", "fsdp", out / "file", False)
    run("folders", "global", "fsdp", out / "folder", True)
    run("resumed-file", "global", "fsdp", ckpt_path=out / "file" / "epoch=1.ckpt")
    run("resumed-folder", "global", "fsdp", folders=True, ckpt_path=out / "folder" / "epoch=1.ckpt")


def run_tensor_parallel():
    for case in (*MORE, "tokens-one-shot"):
        run(f"tp-{case}", case, "tp")
    for case in MISFITS:
        refused(f"tp-{case}", case, "tp")
    for case in ("tokens", "tokens-taylor", "tokens-repaired"):
        for kind in ("file", "folder"):
            folder, folders = out / f"{case}-{kind}", kind == "folder"
            run(f"{case}-{kind}s", case, "tp", folder, folders)
            for epoch in (1, 2):
                path = folder / f"epoch={epoch}.ckpt"
                run(f"resumed-{case}-{kind}-{epoch}", case, "tp", folders=folders, ckpt_path=path)
            # nothing is left to prune, so that it does not matter of what widths are multiples
            run(f"fsdp-from-{case}-{kind}", case, "fsdp", folders=folders, ckpt_path=folder / "epoch=3.ckpt")


def run_both():
    for case in BOTH:
        run(f"both-{case}", case, "fsdp+tp")
    run("both-files", "tokens-taylor", "fsdp+tp", out / "both-file", False)
    run("resumed-both-file", "tokens-taylor", "fsdp+tp", ckpt_path=out / "both-file" / "epoch=1.ckpt")
    run("both-folders", "tokens-taylor", "fsdp+tp", out / "both-folder", True)
    run("resumed-both-folder", "tokens-taylor", "fsdp+tp", folders=True, ckpt_path=out / "both-folder" / "epoch=1.ckpt")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    {"fsdp": run_fsdp, "tp": run_tensor_parallel, "both": run_both}[sys.argv[2]]()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter
