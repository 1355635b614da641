"""FilterPruning takes any criterion: what leaves are the units that it scores lowest, found without the library."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    Linear,
    OneShot,
    PruningError,
    TaylorFilterPruning,
    prune_filters,
)  # fmt: skip
from tests.runs import (
    IMAGE,
    WIDTHS,
    Known,
    Net,
    assert_same_weights,
    batches,
    fit,
    largest_weight,
    net,
    weights,
    widths,
)


class Noted(Net):
    """Keeps each layer's activations of the training steps, and its weights around the cut."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.seen = {name: [] for name in WIDTHS}
        self.before, self.training_now = {}, False

    def forward(self, images):
        x = F.relu(self.norm(self.first(images)))
        self.note("first", x)
        x = F.relu(self.second(x)).mean(dim=(2, 3))
        self.note("second", x)
        x = self.drop(F.relu(self.hidden(x)))
        self.note("hidden", x)
        return self.head(x)

    def note(self, name, x):
        if self.training_now:
            self.seen[name].append(x.detach().double().transpose(0, 1).flatten(1))

    def training_step(self, batch, batch_idx):
        self.training_now = self.current_epoch == 0
        loss = super().training_step(batch, batch_idx)
        self.training_now = False
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.current_epoch == 0:
            self.before = {name: getattr(self, name).bias.detach().clone() for name in ("second", "hidden")}


def left(module, look):
    """Which units of the layers with biases were left after the cut, told by their biases."""
    found = {}
    for name, before in module.before.items():
        now = look.biases[name]
        found[name] = [int((before - value).abs().argmin()) for value in now]
        assert torch.equal(before[found[name]], now)
    return found


class Look(Callback):
    """Notes biases before the first step of an epoch, after what was due has left."""

    def __init__(self, epoch):
        self.epoch, self.biases = epoch, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            self.biases = {name: getattr(pl_module, name).bias.detach().clone() for name in ("second", "hidden")}


def highest(scores, amount=0.5):
    count = len(scores) - math.ceil(amount * len(scores) - 1e-9)
    return sorted(torch.argsort(scores, stable=True)[len(scores) - count :].tolist())


MOMENTS = {
    "activation_mean": lambda x: x.mean(1),
    "activation_std": lambda x: x.std(1, unbiased=False),
    "apoz": lambda x: (x != 0).double().mean(1),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("criterion", MOMENTS)
def test_activations_of_the_training_steps(criterion, accumulate):
    """Criteria of activations look at every forward pass of the training, and at nothing else: no validation."""
    module, look = net(Noted), Look(1)
    fit(module, FilterPruning(0.5, criterion=criterion), look, val=True, num_sanity_val_steps=2,
        accumulate_grad_batches=accumulate)  # fmt: skip
    expected = {name: highest(MOMENTS[criterion](torch.cat(seen, dim=1))) for name, seen in module.seen.items()}
    assert left(module, look) == {name: expected[name] for name in ("second", "hidden")}


def test_second_derivatives_of_training_batches():
    """OBD looks at the first training batches when a cut is due: here, ½ h w² over what leaves with each unit."""
    module = net(Noted, dropout=0.3)
    module.eval()
    images, labels = (torch.cat(parts) for parts in zip(*list(batches())[:2], strict=True))
    own = dict(module.named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in own.items()}
    for x, y in zip(images, labels, strict=True):
        loss = F.cross_entropy(module(x[None]), y[None])
        for (name, _), gradient in zip(own.items(), torch.autograd.grad(loss, list(own.values())), strict=True):
            fisher[name] += gradient.square() / len(images)
    saliency = {name: (0.5 * fisher[name] * p.detach().square()).double() for name, p in own.items()}
    scores = (
        saliency["hidden.weight"].sum(1) + saliency["hidden.bias"] + saliency["head.weight"].sum(0),
        saliency["second.weight"].sum((1, 2, 3)) + saliency["second.bias"] + saliency["hidden.weight"].sum(0),
    )
    before = {name: getattr(module, name).bias.detach().clone() for name in ("second", "hidden")}
    module.train()
    look = Look(0)
    fit(module, FilterPruning(0.5, criterion="obd", batches=2), look, max_epochs=1)
    module.before = before
    assert left(module, look) == {"second": highest(scores[1]), "hidden": highest(scores[0])}


class Measured(Net):
    """Counts, logs and draws in its training step."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.accuracy = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.accuracy.update(loss.detach())
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": loss}


@pytest.mark.parametrize("criterion", ["obd", "obd_hutchinson"])
def test_looking_at_losses_does_not_count(criterion):
    """Steps taken to look at their loss log nothing, count in no metric and draw nothing from the training."""
    seen = []
    for callbacks in ((), (FilterPruning(0.0, criterion=criterion, schedule=Linear(1, 2)),)):
        module = net(Measured)
        made = fit(module, *callbacks, max_epochs=3)
        values = {name: float(v) for name, v in made.callback_metrics.items() if not name.startswith("prune/")}
        seen.append((values, weights(module), torch.get_rng_state()))
    (values, plain, drawn), (found, watched, drew) = seen
    assert values == found and torch.equal(drawn, drew)
    assert all(torch.equal(watched[name], value) for name, value in plain.items())


def test_named_criteria_are_the_callbacks_of_their_names():
    """l1 and taylor prune what FilterL1Pruning and TaylorFilterPruning prune."""
    for one, other in (
        (FilterPruning(0.5, criterion="l1", target="flops"), FilterL1Pruning(0.5, target="flops")),
        (FilterPruning(0.5, criterion="taylor", scope="global"), TaylorFilterPruning(0.5, scope="global")),
        (
            FilterPruning(0.5, criterion="taylor_activations", scope="global"),
            TaylorFilterPruning(0.5, form="activations", scope="global"),
        ),
    ):
        modules = [net(), net()]
        for module, callback in zip(modules, (one, other), strict=True):
            fit(module, callback)
        assert_same_weights(modules[0], weights(modules[1]))


def test_norms_and_chance():
    """l2 keeps the filters of the largest squared weights, bn_scale those of the largest scale; random is seeded."""
    module = net(Known, lr=0.0)
    torch.nn.init.uniform_(module.norm.weight)
    before = weights(module)
    fit(module, FilterPruning(0.5, criterion="l2"), max_epochs=1)
    assert torch.equal(
        module.second.bias, before["second.bias"][highest(before["second.weight"].square().flatten(1).sum(1))]
    )
    module = net(Known, lr=0.0)
    module.load_state_dict(before)
    fit(module, FilterPruning(0.5, criterion="bn_scale", ignore=["second", "hidden"]), max_epochs=1)
    assert torch.equal(module.norm.weight, before["norm.weight"][highest(before["norm.weight"])])
    one, two = net(), net()
    for module in (one, two):
        fit(module, FilterPruning(0.5, criterion="random"))
    assert_same_weights(one, weights(two))


@pytest.mark.parametrize("criterion, scope", [("obs", "global"), ("l1", "layer")])
def test_what_reads_the_units_makes_up_for_them(criterion, scope):
    """With repair, a run leaves the network that prune_filters makes of the first training batches."""
    module = net(Known, lr=0.0)
    twin = copy.deepcopy(module)
    seen = [x for x, _ in list(batches())[:3]]
    report = prune_filters(
        twin, IMAGE, 0.4, criterion=criterion, target="flops", scope=scope, batches=seen, repair=True
    )
    callback = FilterPruning(0.4, criterion=criterion, target="flops", scope=scope, batches=3, repair=True)
    fit(module, callback, max_epochs=1)
    assert widths(module) != WIDTHS
    assert callback.repairs == report.repairs
    for name, weight in weights(twin).items():
        if "running" not in name and "tracked" not in name:  # training moved these
            torch.testing.assert_close(weights(module)[name], weight)


@pytest.mark.parametrize("criterion", [largest_weight, "tests.runs.largest_weight"], ids=["function", "import-path"])
def test_a_criterion_of_ones_own(criterion):
    """A function of a weight is a criterion, given as such or by its import path."""
    module = net(Known, lr=0.0)
    before = weights(module)
    fit(module, FilterPruning(0.5, criterion=criterion), max_epochs=1)
    assert torch.equal(module.second.bias, before["second.bias"][highest(largest_weight(before["second.weight"]))])


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"criterion": "l3"}, "criterion='l3'.*'l1', 'l2', 'bn_scale'.*import path"),
        ({"criterion": "tests.runs.largest"}, "criterion='tests.runs.largest'.*cannot be imported"),
        ({"criterion": "tests.runs.WIDTHS"}, "criterion='tests.runs.WIDTHS'"),
        ({"criterion": 3}, "criterion=3"),
        ({"batches": 0}, "batches=0"),
        (
            {"criterion": "apoz", "schedule": OneShot(0)},
            "activations must be seen before the first cut. Start at epoch 1",
        ),
        ({"criterion": "taylor", "schedule": OneShot(0, by="steps")}, "gradients must be seen.*Start at step 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, told):
    """What the callback adds to the others' arguments is checked at construction."""
    with pytest.raises(ValueError, match=told):
        FilterPruning(**arguments)


class Silent(Net):
    """Its training step gives no loss."""

    def training_step(self, batch, batch_idx):
        return None


def test_a_step_without_a_loss_is_named():
    """Criteria of the loss need a training step that returns one."""
    with pytest.raises(PruningError, match="Silent.training_step returned None"):
        fit(net(Silent), FilterPruning(0.5, criterion="obd"))


class Numbers(Net):
    """Its training step has a name of its own for the number of the batch."""

    def training_step(self, batch, i):
        return super().training_step(batch, i)


def test_a_training_step_names_its_arguments_as_it_likes():
    """Criteria of the loss call the training step with what Lightning calls it with, whatever its arguments' names."""
    usual, own = net(dropout=0.0), net(Numbers, dropout=0.0)
    for model in (usual, own):
        fit(model, FilterPruning(0.5, criterion="obd"))
    assert_same_weights(own, weights(usual))


@pytest.mark.parametrize("criterion", ["activation_std", "obd", "taylor"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(criterion, tmp_path):
    """What was gathered goes on after a resume, and what is read anew is the same."""

    def pruning():
        return FilterPruning(0.5, criterion=criterion, schedule=Linear(2, 4, every=2), batches=2)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    whole = net(dropout=0.0)
    fit(whole, pruning(), saver, max_epochs=6, enable_checkpointing=True)
    for step in range(4, 24, 4):
        resumed = net(dropout=0.0, seed=step)
        fit(resumed, pruning(), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=6)
        assert_same_weights(resumed, weights(whole))
    assert widths(whole) == {"first": 4, "second": 3, "hidden": 5}


def test_gathering_leaves_nothing_on_the_model():
    """The hooks that watch activations are gone with the last cut."""
    module = net()
    fit(module, FilterPruning(0.5, criterion="apoz"))
    assert not any(part._forward_pre_hooks for part in module.modules())
