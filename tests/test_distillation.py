"""DistillFromDense trains as a training step does that adds the loss of distillation by hand."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
    TaylorFilterPruning,
)
from lightning_prune.callbacks import DistillFromDense

EPOCHS, BATCHES = 4, 4


class Lit(pl.LightningModule):
    """A network inside a module; calls are made on the network, on forward, or on both."""

    def __init__(self, net=None, how="net"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12), nn.Tanh(),
            nn.Linear(12, 3),
        ) if net is None else net  # fmt: skip
        self.how = how
        self.scores = [0.9] * EPOCHS

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy((self if self.how == "forward" else self.net)(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.scores[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class ByHand(Lit):
    """The same, with the loss of distillation in its training step."""

    def __init__(self, start, weight=1.0, temperature=2.0, layers=(), **kwargs):
        super().__init__(**kwargs)
        self.start, self.weight, self.temperature, self.layers = start, weight, temperature, layers
        self.teacher = []  # in a list, so that it is no part of the module

    def training_step(self, batch, batch_idx):
        seen, taught = {}, {}
        handles = [self.net[i].register_forward_hook(lambda m, a, out, i=i: seen.update({i: out})) for i in self.layers]
        answer = self.net(batch[0])
        loss = F.cross_entropy(answer, batch[1])
        if self.teacher:
            teacher = self.teacher[0]
            handles += [
                teacher[i].register_forward_hook(lambda m, a, out, i=i: taught.update({i: out})) for i in self.layers
            ]
            with torch.no_grad():
                target = (teacher(batch[0]).float() / self.temperature).softmax(-1)
            log_p = (answer.float() / self.temperature).log_softmax(-1)
            divergence = (target * (target.log() - log_p)).sum(-1).mean()
            loss = loss + self.weight * self.temperature**2 * divergence
            if self.layers:
                gaps = []
                for i in self.layers:
                    wanted = taught[i][:, kept_rows(teacher, self.net, i)]
                    gaps.append((seen[i] - wanted).square().mean() / wanted.square().mean())
                loss = loss + sum(gaps) / len(gaps)
        for handle in handles:
            handle.remove()
        return loss


class Keep(pl.Callback):
    """Copies the network just before an epoch's pruning."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.teacher = [copy.deepcopy(pl_module.net).eval().requires_grad_(False)]


def kept_rows(teacher, net, layer):
    """The rows with the largest L1 norms, as many as are left: those that FilterL1Pruning keeps."""
    norms = teacher[layer].weight.abs().sum(1)
    return norms.topk(len(net[layer].weight)).indices.sort().values


def loader(size=8):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size * BATCHES, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(0, 3, (size * BATCHES,), generator=generator)), size)


def fit(module, *callbacks, epochs=EPOCHS, ckpt_path=None, **kwargs):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    torch.manual_seed(3)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**options, **kwargs})
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def assert_equal(ours, by_hand, exactly=True):
    for mine, other in zip(ours.net.parameters(), by_hand.net.parameters(), strict=True):
        assert torch.equal(mine, other) if exactly else torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


PRUNING = {
    "filters": partial(FilterL1Pruning, amount=0.5, schedule=OneShot(2), ignore=["net.4"]),
    "taylor": partial(TaylorFilterPruning, amount=0.5, schedule=Linear(2, 3)),
    "masks": partial(IterativeMagnitudePruning, 0.5, schedule=OneShot(2)),
}


@pytest.mark.parametrize("how", ["net", "forward"])
@pytest.mark.parametrize("pruning", PRUNING.values(), ids=PRUNING)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_equals_a_step_with_the_loss_by_hand(pruning, how, options):
    """Weights after training are those of a training step that adds the divergence itself."""
    ours, by_hand = Lit(how=how), ByHand(2, weight=0.7, temperature=3.0)
    fit(by_hand, Keep(2), pruning(), **options)
    trainer = fit(ours, pruning(), DistillFromDense(weight=0.7, temperature=3.0), **options)
    assert_equal(ours, by_hand, exactly=False)
    assert trainer.callback_metrics["prune/distillation"] > 0


def test_features_are_compared_on_kept_channels():
    """The outputs of layers follow the teacher's on the channels that are left, relative to its mean square."""
    ours, by_hand = Lit(), ByHand(2, layers=(0, 4))
    fit(by_hand, Keep(2), FilterL1Pruning(amount=0.5, schedule=OneShot(2)))
    distillation = DistillFromDense(features=["net.0", "net.4"])
    fit(ours, FilterL1Pruning(amount=0.5, schedule=OneShot(2)), distillation)
    assert ours.net[0].out_features == 8
    assert_equal(ours, by_hand, exactly=False)


def test_kept_channels_are_followed_through_several_cuts():
    """After each of several cuts the rows that are left are rows of the teacher."""

    class Still(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    module, distillation = Still(), DistillFromDense(features=["net.0", "net.1", "net.4"])
    fit(module, FilterPruning(criterion="random", amount=0.6, schedule=Linear(1, 3)), distillation)
    kept = distillation._state.kept
    for layer in (0, 4):
        teacher = distillation.teacher[layer]
        assert torch.equal(module.net[layer].weight[:, 0], teacher.weight[kept[f"net.{layer}"]][:, 0])
    assert torch.equal(kept["net.0"], kept["net.1"])


def test_nothing_else_changes():
    """With a weight of zero, a run ends at the same bits as without the callback, in the same random state."""
    alone, beside = Lit(), Lit()
    fit(alone, PRUNING["filters"]())
    state = torch.get_rng_state()
    distillation = DistillFromDense(weight=0.0, features=["net.0"], feature_weight=0.0)
    fit(beside, PRUNING["filters"](), distillation)
    assert torch.equal(state, torch.get_rng_state())
    assert_equal(beside, alone)
    assert beside.state_dict().keys() == alone.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in beside.modules())


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    """The teacher is in the checkpoint, at its own size, and built again from a module that is slim."""
    kinds = [partial(FilterL1Pruning, amount=0.5, schedule=Linear(1, 3)), partial(DistillFromDense, features=["net.0"])]
    whole, second = (Lit(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))) for _ in range(2))
    second.load_state_dict(whole.state_dict())
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, *[kind() for kind in kinds], saving, enable_checkpointing=True)
    resumed = [kind() for kind in kinds]
    fit(second, *resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed[1].teacher[0].out_features == 16
    assert_equal(second, whole)


def test_pruning_before_the_first_step():
    """The network is found at the first step, though it was copied before it."""
    module, distillation = Lit(how="forward"), DistillFromDense()
    fit(module, FilterL1Pruning(amount=0.5), distillation)
    assert isinstance(distillation.teacher, Lit)
    module, distillation = Lit(), DistillFromDense()
    fit(module, FilterL1Pruning(amount=0.5), distillation)
    assert isinstance(distillation.teacher, nn.Sequential)
    assert distillation.teacher[0].out_features == 16


def test_a_rollback_is_followed():
    """Where a guard takes a cut back, all of the teacher's channels are compared again."""
    module, distillation = Lit(), DistillFromDense(features=["net.0"])
    module.scores = [0.9, 0.5, 0.9, 0.9]
    fit(module, FilterL1Pruning(amount=0.5, schedule=OneShot(1)), MetricGuard("score", 0.1), distillation)
    assert module.net[0].out_features == 16
    assert distillation._state.kept == {}


def test_scaled_losses(monkeypatch):
    """Where losses are scaled against underflow, the added loss is scaled alike."""
    plain, scaled = Lit(), Lit()
    callbacks = lambda: (PRUNING["masks"](), DistillFromDense(weight=2.0))  # noqa: E731
    fit(plain, *callbacks(), plugins=[MixedPrecision("bf16-mixed", "cpu")])
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(scaled, *callbacks(), plugins=[plugin])
    assert_equal(scaled, plain, exactly=False)


class Two(Lit):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x, names=()):
        return {"loss": None, "logits": self.inner(x), "names": names}


class OfDict(Lit):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(x=batch[0], names=["a"])["logits"], batch[1])


def test_logits_in_a_mapping():
    """A network may take keywords and return its logits in a mapping, as those of Hugging Face do."""
    trainer = fit(
        OfDict(Dict()), FilterL1Pruning(amount=0.5, schedule=OneShot(1), trace="training_step"), DistillFromDense()
    )
    assert trainer.callback_metrics["prune/distillation"] > 0


def test_a_loss_of_ones_own():
    """A function gets whatever the pruned and the dense network return."""
    seen = []

    def distance(student, teacher):
        seen.append((student["names"], teacher["names"]))
        return (student["logits"] - teacher["logits"]).abs().mean()

    pruning = FilterL1Pruning(amount=0.5, schedule=OneShot(1), trace="training_step")
    fit(OfDict(Dict()), pruning, DistillFromDense(loss=distance))
    assert seen[0] == (["a"], ["a"])


@pytest.mark.parametrize(
    ("module", "callback", "told"),
    [
        (Two, DistillFromDense(), "calls net and other. Pass module="),
        (Manual, DistillFromDense(), "optimizes manually"),
        (Lit, DistillFromDense(module="nets"), "has no such part. It has net"),
        (Lit, DistillFromDense(features=["net.9"]), "has no such module"),
        (Lit, DistillFromDense(features=["net.2"]), "Name a convolution, linear or normalization layer"),
    ],
)
def test_refusals_say_what_to_do(module, callback, told):
    """What cannot be distilled is refused with a way out."""
    with pytest.raises(PruningError, match=told):
        fit(module(), FilterL1Pruning(amount=0.5), callback)


def test_refuses_to_stand_alone():
    """Without a pruning callback there is no dense network to keep."""
    with pytest.raises(PruningError, match="no callback prunes"):
        fit(Lit(), DistillFromDense())


@pytest.mark.parametrize(
    "arguments",
    [{"weight": -1}, {"temperature": 0}, {"loss": "cosine"}, {"features": "net.0"}, {"feature_weight": float("inf")}],
    ids=str,
)
def test_arguments_are_checked(arguments):
    """What makes no sense is refused when the callback is made."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DistillFromDense(**arguments)


def test_a_compiled_network():
    """A network that was compiled is watched and copied like another."""
    module = Lit(torch.compile(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), backend="eager"))
    trainer = fit(module, FilterL1Pruning(amount=0.5, schedule=OneShot(1)), DistillFromDense())
    assert trainer.callback_metrics["prune/distillation"] > 0


def test_pickles():
    """A callback that was used goes to another process without the model."""
    distillation = DistillFromDense()
    fit(Lit(), PRUNING["filters"](), distillation)
    assert pickle.loads(pickle.dumps(distillation)).weight == 1.0


TWO_PROCESSES = """
    import sys
    import lightning.pytorch as pl, torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_prune import FilterL1Pruning, OneShot
    from lightning_prune.callbacks import DistillFromDense
    from tests.test_distillation import Lit


    def trained(devices, how):
        torch.manual_seed(0)
        module = Lit(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), how=how)
        data = TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
        options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        strategy = "ddp" if devices == 2 else "auto"
        trainer = pl.Trainer(max_epochs=4, accelerator="cpu", devices=devices, strategy=strategy, **options,
            callbacks=[FilterL1Pruning(amount=0.5, schedule=OneShot(1)), DistillFromDense()])
        trainer.fit(module, DataLoader(data, 32 // devices))
        return trainer, module


    if __name__ == "__main__":
        trainer, module = trained(int(sys.argv[1]), sys.argv[2])
        if trainer.is_global_zero:
            torch.save(module.state_dict(), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["net", "forward"])
def test_two_processes_end_where_one_does(tmp_path, how):
    """Each process answers to its own batches; gradients are averaged as ever."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    for devices in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, script, devices, how, tmp_path / devices], env=environment, check=True, timeout=300
        )
    one, two = (torch.load(tmp_path / devices) for devices in ("1", "2"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name
