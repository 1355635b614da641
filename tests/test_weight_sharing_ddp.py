"""Two processes share values as one: the same values for the same weights after every step, and after a resume."""

import json

import pytest

from tests.in_processes import seen_by_both

SCRIPT = """
    import json, sys
    from pathlib import Path

    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from lightning_prune import IterativeMagnitudePruning, OneShot
    from lightning_prune.callbacks import WeightSharing
    from tests.runs import Net, images, trainer

    folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    WEIGHTS = "first", "second", "hidden", "head"


    class Compare(Callback):
        def __init__(self):
            self.apart, self.values, self.moved, self.last = [], [], [], None

        def on_train_batch_end(self, trainer, pl_module, *_):
            flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            both = trainer.strategy.all_gather(flat)
            self.apart.append(float((both[0] - both[1]).abs().max()))
            self.values.append([len(getattr(pl_module, name).weight.unique()) for name in WEIGHTS])
            self.moved.append(self.last is not None and not torch.equal(self.last, flat))
            self.last = flat


    def run(seed, *callbacks, ckpt_path=None):
        torch.manual_seed(seed)
        module, compare = Net(dropout=0.0), Compare()
        made = trainer(
            IterativeMagnitudePruning(0.5, schedule=OneShot(1)), WeightSharing(bits=2, epoch=2), compare, *callbacks,
            strategy=DDPStrategy(process_group_backend="gloo", **case["ddp"]), devices=2, max_epochs=4,
            enable_checkpointing=bool(callbacks), **case["trainer"],
        )
        made.fit(module, DataLoader(images(64), 8), ckpt_path=ckpt_path)
        return made, module, compare


    made, module, compare = run(0, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    _, other, resumed = run(5, ckpt_path=str(folder / "epoch=2.ckpt"))
    same = all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters()))
    found = {
        "apart": compare.apart + resumed.apart, "values": compare.values, "moved": compare.moved,
        "resumed": resumed.values, "same": same,
    }
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(found))
"""
CASES = {
    "static-graph": {"ddp": {"static_graph": True}},
    "clipped": {"trainer": {"gradient_clip_val": 0.1}, "ddp": {"gradient_as_bucket_view": True}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_processes_share_values_as_one(case, tmp_path):
    """Weights stay equal and few-valued on both processes, the values move, and a resumed run ends alike."""
    settings = {"ddp": {}, "trainer": {}} | CASES[case]
    one, other = seen_by_both(SCRIPT, tmp_path, json.dumps(settings))
    assert one == other
    assert set(one["apart"]) == {0.0}
    assert one["same"]
    steps = len(one["values"]) // 4
    assert all(count > 5 for counts in one["values"][: 2 * steps] for count in counts)
    assert all(count <= 5 for counts in one["values"][2 * steps :] for count in counts)  # and zero, which is pruned
    assert sum(one["moved"][2 * steps :]) >= steps  # with accumulation every second batch moves them
    assert one["resumed"] == one["values"][3 * steps :]
