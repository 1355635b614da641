"""Two processes mask as one: the same weights go at the same moment, and all values stay equal."""

import json
import math

import pytest

from tests.in_processes import seen_by_both

SCRIPT = """
    import json, sys
    from pathlib import Path

    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from lightning_prune import Geometric, IterativeMagnitudePruning
    from tests.runs import Net, images, trainer

    folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    WEIGHTS = "first", "second", "hidden", "head"


    class Compare(Callback):
        def __init__(self):
            self.apart, self.zeros = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            both = trainer.strategy.all_gather(flat)
            self.apart.append(float((both[0] - both[1]).abs().max()))
            self.zeros.append(sum(int((getattr(pl_module, name).weight == 0).sum()) for name in WEIGHTS))


    def run(seed, *callbacks, ckpt_path=None):
        torch.manual_seed(seed)
        module, compare = Net(dropout=0.0), Compare()
        made = trainer(
            IterativeMagnitudePruning(0.8, schedule=Geometric(1, 3), **case["arguments"]), compare, *callbacks,
            strategy=DDPStrategy(process_group_backend="gloo", **case["ddp"]), devices=2, max_epochs=5,
            enable_checkpointing=bool(callbacks), **case["trainer"],
        )
        made.fit(module, DataLoader(images(64), 8), ckpt_path=ckpt_path)
        return made, module, compare


    made, module, compare = run(0, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    _, other, resumed = run(5, ckpt_path=str(folder / "epoch=1.ckpt"))
    same = all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters()))
    found = {"apart": compare.apart + resumed.apart, "zeros": compare.zeros, "resumed": resumed.zeros, "same": same}
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(found))
"""
SIZES = (144, 432, 60, 30)  # weights of the network's layers
CASES = {
    "rounds": {"arguments": {"rewind_to": 2}},
    "clipped": {"trainer": {"gradient_clip_val": 0.1}, "ddp": {"gradient_as_bucket_view": True}},
    "static-graph": {"ddp": {"static_graph": True}},
    "control": {"arguments": {"rewind_to": 0, "control": "reinitialize"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_processes_mask_as_one(case, tmp_path):
    """After every step, cut and rewinding the processes hold equal weights and zeros; a resumed run ends alike."""
    settings = {"arguments": {}, "ddp": {}, "trainer": {}} | CASES[case]
    one, other = seen_by_both(SCRIPT, tmp_path, json.dumps(settings))
    assert one == other
    assert set(one["apart"]) == {0.0} and one["same"]
    steps = len(one["zeros"]) // 5
    gone = [1 - 0.2 ** (pruning / 3) for pruning in (0, 1, 2, 3, 3)]
    assert one["zeros"][::steps] == [sum(math.ceil(share * size - 1e-9) for size in SIZES) for share in gone]
    assert one["resumed"] == one["zeros"][2 * steps :]
