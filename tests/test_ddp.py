"""Two processes prune as one: the same filters leave at the same moment, and the weights stay equal."""

import json

import pytest

from tests import in_processes

SCRIPT = """
    import json, sys, time
    from pathlib import Path

    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    import lightning_prune
    from tests.runs import Depthwise, Known, Net, images, trainer, widths

    folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])


    class Manual(Net):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.automatic_optimization = False


    class Slow(Net):
        # On the first process alone narrow layers take less time.
        def forward(self, images):
            if self.global_rank == 0 and not self.training:
                time.sleep(4e-4 * sum(widths(self).values()))
            return super().forward(images)


    class Rogue(Net):
        # One process goes its own way.
        def on_train_batch_end(self, *_):
            if self.global_rank == 1 and self.global_step == 7:
                self.second.weight.data[0, 0, 0, 0] += 1e-6


    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return iter([images(self.count)[i] for i in range(self.count)])


    class Uneven(Net):
        # The second process has a batch less.
        def train_dataloader(self):
            count = 32 - 8 * self.global_rank
            return DataLoader(Stream(count) if case["stream"] else images(count), 8)


    class Sized(Net):
        # Each process sees images of another size.
        def on_before_batch_transfer(self, batch, dataloader_idx):
            size = 6 + 2 * self.global_rank
            return torch.nn.functional.interpolate(batch[0], size=(size, size)), batch[1]


    def pruning():
        schedule = lightning_prune.Linear(1, 3)
        kind, arguments = getattr(lightning_prune, case["callback"]), case["arguments"]
        target = {} if case["target"] is None else {"target": case["target"]}
        return kind(amount=0.5, scope="layer", schedule=schedule, **target, **arguments)


    class Compare(Callback):
        def __init__(self):
            self.widths, self.apart, self.losses, self.flops, self.statistics = [], [], [], [], []

        def compare(self, trainer, pl_module):
            flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            sizes = trainer.strategy.all_gather(torch.tensor([len(flat)])).flatten().tolist()
            assert len(set(sizes)) == 1, sizes
            both = trainer.strategy.all_gather(flat)
            self.apart.append(float((both[0] - both[1]).abs().max()))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.compare(trainer, pl_module)
            if batch_idx == 0:
                self.widths.append(list(widths(pl_module).values()))
                both = trainer.strategy.all_gather(pl_module.norm.running_mean)
                self.statistics.append(float((both[0] - both[1]).abs().max()))

        def on_train_epoch_end(self, trainer, pl_module):
            self.compare(trainer, pl_module)
            self.flops.append(float(trainer.callback_metrics["prune/flops"]))
            self.losses.append(float(trainer.strategy.reduce(trainer.callback_metrics["loss"])))


    compare = Compare()
    torch.manual_seed(0)
    kinds = {kind.__name__: kind for kind in (Net, Known, Depthwise, Rogue, Sized, Slow, Manual, Uneven)}
    module = kinds[case["kind"]](dropout=0.0, lr=0.1)
    made = trainer(
        pruning(),
        compare,
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        strategy=DDPStrategy(process_group_backend="gloo", **case["ddp"]),
        devices=2,
        enable_checkpointing=True,
        max_epochs=8,
        **case["trainer"],
    )
    made.fit(module, None if case["kind"] == "Uneven" else DataLoader(images(64), 8, shuffle=True))
    resumed = Compare()
    if case["resume"]:
        torch.manual_seed(5)
        other = type(module)(dropout=0.0, lr=0.1)
        again = trainer(
            pruning(),
            resumed,
            strategy=DDPStrategy(process_group_backend="gloo", **case["ddp"]),
            devices=2,
            max_epochs=8,
            **case["trainer"],
        )
        again.fit(other, DataLoader(images(64), 8, shuffle=True), ckpt_path=str(folder / "epoch=1.ckpt"))
        assert widths(other) == widths(module)
        made.test(module, DataLoader(images(16), 8), ckpt_path=str(folder / "epoch=0.ckpt"), verbose=False)
        assert list(widths(module).values()) == [8, 6, 10]
    result = {"widths": compare.widths, "flops": compare.flops, "losses": compare.losses}
    result["apart"] = compare.apart + resumed.apart
    result["statistics"] = compare.statistics
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(result))
"""


def ended(
    folder,
    *,
    kind="Net",
    callback="FilterL1Pruning",
    target="filters",
    ddp=None,
    resume=False,
    arguments=None,
    stream=False,
    **trainer,
):
    """Run the script in two processes."""
    case = {"kind": kind, "callback": callback, "target": target, "resume": resume, "trainer": trainer}
    case |= {"ddp": ddp or {}, "arguments": arguments or {}, "stream": stream}
    return in_processes.ended(SCRIPT, folder, str(folder), json.dumps(case))


def run(folder, **case):
    """Run the script and return what each process saw."""
    done = ended(folder, **case)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def assert_one_run(ranks, last=(4, 3, 5), fell=0.8):
    one, other = ranks
    assert one["widths"] == other["widths"]
    assert one["widths"][0] == [8, 6, 10]
    assert last is None or one["widths"][-1] == list(last)
    assert set(one["apart"]) == {0.0}
    assert one["losses"] == other["losses"]
    assert one["flops"] == other["flops"]
    assert one["losses"][-1] < fell * one["losses"][0] < float("inf")


def test_processes_prune_as_one(tmp_path):
    """After every step and cut the processes hold equal weights; the loss falls, and widths are those asked."""
    ranks = run(tmp_path)
    assert_one_run(ranks)
    assert ranks[0]["widths"][:4] == [[8, 6, 10], [6, 5, 8], [5, 4, 6], [4, 3, 5]]


CASES = {
    "unused-parameters": {"ddp": {"find_unused_parameters": True}},
    "static-graph": {"ddp": {"static_graph": True}},
    "bucket-views": {"ddp": {"gradient_as_bucket_view": True}},
    "resume": {"resume": True},
    "example_input_array": {"kind": "Known", "target": "flops", "resume": True},
    "depthwise": {"kind": "Depthwise", "target": "flops", "resume": True},
    "other-sizes": {"kind": "Sized", "target": "flops"},
    "fade": {"arguments": {"fade_steps": 5}, "resume": True},
    "fade-taylor": {"callback": "TaylorFilterPruning", "arguments": {"fade_steps": 3}, "resume": True},
    "taylor-weights": {"callback": "TaylorFilterPruning", "resume": True},
    "taylor-activations": {"callback": "TaylorFilterPruning", "arguments": {"form": "activations"}, "resume": True},
    "apoz": {"callback": "FilterPruning", "arguments": {"criterion": "apoz"}, "resume": True},
    "obd": {"callback": "FilterPruning", "arguments": {"criterion": "obd", "batches": 2}, "resume": True},
    "obs": {
        "callback": "FilterPruning",
        "arguments": {"criterion": "obs", "batches": 2, "repair": True},
        "resume": True,
    },
    "recalibrate": {"arguments": {"recalibrate": 2}, "resume": True},
    "latency": {"kind": "Slow", "target": "latency", "resume": True},
    "manual": {"kind": "Manual", "callback": "TaylorFilterPruning", "resume": True},
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_settings(case, tmp_path):
    """The same holds under DDP's settings, with budgets, after a resume and with what the Trainer offers."""
    last = None if "target" in CASES[case] else (4, 3, 5)
    # A third of the steps; and a network whose loss stays above 0.9 of the first when it is trained whole, too.
    fell = 1.0 if case in ("accumulate", "depthwise") else 0.8
    ranks = run(tmp_path, **CASES[case])
    assert_one_run(ranks, last, fell)
    if case == "latency":  # of 24 units that take equal time half, less what the forward pass takes anyway
        assert 10 <= sum(ranks[0]["widths"][-1]) <= 13
    if case == "recalibrate":  # after the cuts before epochs 1, 2 and 3
        assert ranks[0]["statistics"][1:4] == [0.0] * 3 and ranks[0]["statistics"][4] > 0


@pytest.mark.slow
def test_processes_that_part_are_stopped_at_the_next_cut(tmp_path):
    """Where one process changed a weight on its own, the next cut says so, and which; training would never have."""
    done = ended(tmp_path, kind="Rogue")
    assert done.returncode != 0
    assert "FilterL1Pruning: after a cut the processes hold different models" in done.stderr
    assert "with other values. Something differs between processes" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stream, told", [(False, "processes have 4, 3 batches"), (True, "after 3 batches, 50%")])
@pytest.mark.parametrize("callback", ["TaylorFilterPruning", "IterativeMagnitudePruning"])
def test_uneven_data_is_refused_before_anyone_waits(callback, stream, told, tmp_path):
    """Where loaders say how long they are before the first step, else as soon as one of them has ended."""
    done = ended(tmp_path, kind="Uneven", callback=callback, target=None, stream=stream, use_distributed_sampler=False)
    assert done.returncode != 0
    assert f"{callback}: {told}" in done.stderr and "limit_train_batches" in done.stderr
