"""Two processes remove the same experts, scored on the batches of both, and stay equal."""

import json

import pytest

from tests import in_processes

SCRIPT = """
    import json, sys
    from pathlib import Path

    import torch
    from torch.utils.data import DataLoader, Subset

    from lightning_prune import Linear
    from lightning_prune.callbacks import ExpertPruning
    from tests.runs import IMAGE, images, net, trainer
    from tests.test_expert_pruning import Experts, counts

    folder, criterion = Path(sys.argv[1]), sys.argv[2]
    found = {}

    class Seen(Experts):
        def on_train_epoch_end(self):
            found[self.current_epoch] = [w.double().sum().item() for w in self.parameters()], counts(self)

    class Noting(ExpertPruning):
        def on_train_epoch_start(self, trainer, pl_module):
            before = [m.router.score.weight.detach().clone() for m in pl_module.mixtures]
            super().on_train_epoch_start(trainer, pl_module)
            for place, (m, old) in enumerate(zip(pl_module.mixtures, before)):
                rows = [int((old == row).all(1).nonzero()[0, 0]) for row in m.router.score.weight]
                found[f"kept {trainer.current_epoch} {place}"] = rows

    module = net(Seen)
    callback = Noting(4, criterion=criterion, schedule=Linear(1, 2), batches=2, example_inputs=IMAGE, report=False)
    made = trainer(callback, max_epochs=3, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true")
    torch.manual_seed(1)
    made.fit(module, DataLoader(images(32), 4))
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("criterion", ["reap", "random"])
def test_processes_remove_the_same_experts(criterion, tmp_path):
    """Weights are equal after each epoch, and as many experts are left as the schedule asks for."""
    first, second = in_processes.seen_by_both(SCRIPT, tmp_path, criterion)
    assert json.dumps(first) == json.dumps(second)
    assert [first[str(epoch)][1] for epoch in range(3)] == [[6, 6], [4, 4], [2, 2]]
