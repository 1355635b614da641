"""Weights become zero while a model trains, and stay so for everyone who looks."""

import copy
import inspect
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import lightning_prune
from lightning_prune import (
    Cubic,
    FewUnits,
    FilterL1Pruning,
    Geometric,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
    load_from_checkpoint,
    masks_on,
    prune_weights,
)
from tests.runs import Net, assert_same_weights, batches, fit, net, trainer, weights
from tests.test_callback_contract import arguments_of, global_hooks, hooks_of

SIZES = {"first.weight": 144, "second.weight": 432, "hidden.weight": 60, "head.weight": 30}
TOTAL = sum(SIZES.values())


def pruning(**arguments):
    return IterativeMagnitudePruning(**{"amount": 0.8, "schedule": Linear(0, 1), **arguments})


def zeros(module):
    """How many entries of each weight are exactly zero."""
    return {name: int((module.get_parameter(name) == 0).sum()) for name in SIZES}


class Zeros(Callback):
    """Counts zeros wherever another callback may look."""

    def __init__(self):
        self.seen = []

    def note(self, trainer, pl_module, *_):
        self.seen.append((trainer.current_epoch, sum(zeros(pl_module).values())))

    on_train_batch_start = on_before_backward = on_before_zero_grad = on_train_batch_end = note
    on_validation_batch_start = on_validation_end = on_train_epoch_end = on_train_end = note

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        state = checkpoint["state_dict"]
        self.seen.append((trainer.current_epoch, sum(int((state[name] == 0).sum()) for name in SIZES)))


class WithAdam(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1, fused=True)


class Two(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self, lr=0.05, dropout=0.0):
        super().__init__(lr, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        images, labels = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(images), labels))
            optimizer.step()

    def configure_optimizers(self):
        early = [*self.first.parameters(), *self.norm.parameters()]
        late = [*self.second.parameters(), *self.hidden.parameters(), *self.head.parameters()]
        return torch.optim.SGD(early, self.hparams.lr, momentum=0.9), torch.optim.Adam(late, 0.01)


RUNS = {
    "plain": (Net, [], {}),
    "adam": (WithAdam, [], {}),
    "clipped": (Net, [], {"gradient_clip_val": 0.1}),
    "accumulated": (Net, [], {"accumulate_grad_batches": 3}),
    "bf16": (Net, [], {"precision": "bf16-mixed"}),
    "two optimizers": (Two, [], {}),
    "ema": (Net, [lambda: EMAWeightAveraging(decay=0.9)], {}),
    "swa": (Net, [lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)], {}),
    "gradients masked": (Net, [], {"mask_gradients": True}),
}


@pytest.mark.parametrize("kind, others, arguments", RUNS.values(), ids=RUNS)
def test_zeros_for_everyone(kind, others, arguments, tmp_path):
    """At every forward, in validation, in checkpoints and in other callbacks masked weights are exactly zero."""
    arguments = dict(arguments)
    own = {"mask_gradients": arguments.pop("mask_gradients")} if "mask_gradients" in arguments else {}
    module, first, last = net(kind), Zeros(), Zeros()
    callbacks = [first, *(make() for make in others), pruning(schedule=Linear(1, 2), **own), last]
    saver = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(module, *callbacks, saver, val=True, max_epochs=4, enable_checkpointing=True, **arguments)
    gone = [0, int(0.4 * TOTAL), int(0.8 * TOTAL), int(0.8 * TOTAL)]
    for callback in (first, last):
        assert len(callback.seen) > 40
        assert all(count == gone[min(epoch, 3)] for epoch, count in callback.seen if epoch)
    assert sum(zeros(module).values()) == gone[-1]
    for name, stays in masks_on(module).items():
        assert not module.get_parameter(name).detach()[~stays].signbit().any()


SCHEDULES = {
    "one shot": (OneShot(1), [0, 0.8, 0.8, 0.8]),
    "linear": (Linear(0, 2), [0.8 / 3, 1.6 / 3, 0.8, 0.8]),
    "cubic": (Cubic(0, 1), [0.7, 0.8, 0.8, 0.8]),
    "geometric": (Geometric(1, 2), [0, 1 - 0.2**0.5, 0.8, 0.8]),
    "steps": (Linear(4, 12, every=8, by="steps"), [0, 0.4, 0.4, 0.8]),
}


@pytest.mark.parametrize("schedule, shares", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_is_absolute(scope, schedule, shares):
    """After each cut exactly the share that the schedule says is zero, of all weights there are, and logged."""
    seen = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")}
            seen.append((zeros(pl_module), values))

    module = net()
    fit(module, pruning(schedule=schedule, scope=scope), Note(), max_epochs=4)
    params = sum(p.numel() for p in module.parameters())
    for (counts, values), share in zip(seen, shares, strict=True):
        layers = {name: int(size * share + 1e-6) for name, size in SIZES.items()}
        assert counts == layers if scope == "layer" else sum(counts.values()) == int(TOTAL * share + 1e-6)
        gone = sum(counts.values())
        assert values == pytest.approx(
            {
                "prune/weight_sparsity": gone / TOTAL,
                "prune/sparsity": gone / TOTAL,
                "prune/nonzero": params - gone,
                "prune/nonzero_kept": 1 - gone / params,
            }
        )


def test_amounts_by_pattern():
    """Layers may have amounts of their own, by pattern; what none names stays dense, and so do biases and norms."""
    module = net()
    fit(module, pruning(amount={"h*": 0.5, "head": 0.1}, schedule=None))
    assert zeros(module) == {"first.weight": 0, "second.weight": 0, "hidden.weight": 30, "head.weight": 3}
    assert module.norm.weight.all() and module.hidden.bias.all()


def test_lenet_300_100_in_rounds():
    """20 % of what is left leaves per round, of the output layer 10 %: 51.3, 21.1, 7.0, 3.6 and 1.9 % are left."""

    class LeNet(Net):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

        def training_step(self, batch, batch_idx):
            return self.out(self.two(self.one(torch.ones(1, 784)))).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    class Left(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            own = [pl_module.one.weight, pl_module.two.weight, pl_module.out.weight]
            self.seen[trainer.global_step - 1] = sum(int(w.count_nonzero()) for w in own) / sum(w.numel() for w in own)

    left = Left()
    amounts = {"one": 1 - 0.8**18, "two": 1 - 0.8**18, "out": 1 - 0.9**18}
    rounds = Geometric(1, 18, by="steps")
    fit(LeNet(), pruning(amount=amounts, scope="layer", schedule=rounds), left, max_epochs=5)
    found = [round(100 * left.seen[number], 1) for number in (3, 7, 12, 15, 18)]
    assert found == [51.3, 21.1, 7.0, 3.6, 1.9]


def test_n_of_m():
    """Of every four neighbouring inputs two stay in the end, on the way there three; where fours do not fit, all."""
    seen = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            fours = pl_module.second.weight.detach().movedim(1, -1).reshape(-1, 4)
            seen.append(set(fours.count_nonzero(dim=1).tolist()))

    module = net()
    with pytest.warns(UserWarning, match="first.weight stays dense: its 2 inputs are no multiple of 4"):
        fit(module, pruning(amount=None, pattern="2:4", schedule=Linear(1, 2)), Note())
    assert seen == [{4}, {3}, {2}]
    assert zeros(module) == {"first.weight": 0, "second.weight": 216, "hidden.weight": 0, "head.weight": 0}


def test_embeddings_are_left_out_by_name():
    """Weights that stay dense though one might look for them are named in a warning."""

    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(3, 10)
            self.head.weight = self.embedding.weight

    module = net(Tied)
    with pytest.warns(UserWarning, match="head.weight stays dense: it is tied to an embedding"):
        fit(module, pruning())
    assert module.head.weight.all()


# Gradients


def test_clipping_sees_what_is_left():
    """With clipping, the weights that are left go the way of a model that has no others, and only then differ."""

    class Twin(Net):
        """The same zeros, by a product in the forward pass."""

        def forward(self, images):
            held = {name: self.get_parameter(name) * self.held[name] for name in SIZES}
            return torch.func.functional_call(Plain.make(self), held, images)

    class Plain:
        @staticmethod
        def make(module):
            return _Forward(module)

    start = net(dropout=0.0)
    keep = prune_weights(start, 0.8).keep
    clipped, twin = net(dropout=0.0), net(Twin, dropout=0.0)
    twin.held = {name: stays.float() for name, stays in keep.items()}
    fit(clipped, pruning(schedule=None), gradient_clip_val=0.05)
    fit(twin, gradient_clip_val=0.05)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(clipped.state_dict()[name], value * twin.held.get(name, 1), rtol=1e-5, atol=1e-6)
    other = net(dropout=0.0)
    fit(other, pruning(schedule=None, mask_gradients=False), gradient_clip_val=0.05)
    assert not torch.allclose(other.second.weight, clipped.second.weight, rtol=1e-3)


class _Forward(nn.Module):
    """Net's own forward pass as a module of the same parameters, for ``functional_call``."""

    def __init__(self, module):
        super().__init__()
        for name, part in module.named_children():
            setattr(self, name, part)

    def forward(self, images):
        return Net.forward(self, images)


@pytest.mark.parametrize(
    "kind, masked", [(torch.optim.Adam, False), (torch.optim.Adafactor, True)], ids=["Adam", "Adafactor"]
)
def test_gradients_are_masked_where_optimizers_look_further(kind, masked):
    """Gradients are masked for optimizers that look at more than each weight by itself; else left alone."""
    seen = []

    class Other(Net):
        def configure_optimizers(self):
            return kind(self.parameters(), 0.01)

        def on_before_optimizer_step(self, optimizer):
            seen.append(bool(self.second.weight.grad[self.second.weight == 0].any()))

    fit(net(Other), pruning(schedule=None), max_epochs=1)
    assert set(seen) == {not masked}


# Rounds


class Rewound(Callback):
    """Notes the run as it stands before the first step of every epoch, behind ours."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            (optimizer,) = trainer.optimizers
            momentum = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
            (config,) = trainer.lr_scheduler_configs
            self.seen.append(
                {
                    "weights": weights(pl_module),
                    "momentum": [buffer.clone() for buffer in momentum],
                    "lr": optimizer.param_groups[0]["lr"],
                    "scheduler": copy.deepcopy(config.scheduler.state_dict()),
                }
            )


class Falling(Net):
    """Its learning rate falls at every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


@pytest.mark.parametrize("step", [0, 4])
def test_every_round_starts_where_the_first_did(step):
    """After a cut weights, biases, BatchNorm, momentum, learning rate and its scheduler are those of that step."""
    module, rewound = net(Falling, dropout=0.0), Rewound()
    fit(module, pruning(schedule=Geometric(2, 3), rewind_to=step), rewound, max_epochs=5)
    early = rewound.seen[step // 4]
    gone = [0, 0, 1 - 0.2**0.5, 0.8, 0.8]
    for epoch in (2, 3):
        found = rewound.seen[epoch]
        keep = {name: found["weights"][name] != 0 for name in SIZES}
        assert sum(int((~stays).sum()) for stays in keep.values()) == int(gone[epoch] * TOTAL)
        for name, value in found["weights"].items():
            assert torch.equal(value, early["weights"][name] * keep[name] if name in keep else early["weights"][name])
        assert (found["lr"], found["scheduler"]) == (early["lr"], early["scheduler"])
        names = [name for name, _ in module.named_parameters()]
        assert len(found["momentum"]) == len(early["momentum"])
        for name, now, was in zip(names, found["momentum"], early["momentum"], strict=False):
            assert torch.equal(now, was * keep[name] if name in keep else was)
    assert rewound.seen[4]["lr"] < early["lr"]


def test_a_round_is_the_training_of_its_ticket():
    """A round ends where a training ends that starts from the ticket: the initial weights within the masks."""
    module = net(dropout=0.0)
    fit(module, pruning(schedule=OneShot(2), rewind_to=0), max_epochs=4)
    ticket = net(dropout=0.0)
    lightning_prune.apply_masks_(ticket, masks_on(module))
    fit(ticket, IterativeMagnitudePruning(0.0), max_epochs=2)
    assert_same_weights(ticket, weights(module))


def test_the_average_starts_anew_with_a_round():
    """An average of weights forgets the rounds before."""
    averaging, seen = EMAWeightAveraging(decay=0.9), []

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                seen.append((weights(averaging._average_model.module), int(averaging._average_model.n_averaged)))

    early = net()
    initial = weights(early)
    fit(early, averaging, pruning(schedule=OneShot(1), rewind_to=0), Note())
    ((average, count),) = seen
    assert count == 0
    assert torch.equal(average["second.bias"], initial["second.bias"])
    assert int((average["second.weight"] == 0).sum()) == zeros(early)["second.weight"]


def test_controls():
    """The last round of a control has other weights in the same masks, or as many weights of each layer elsewhere."""
    runs = {}
    for control in (None, "reinitialize", "shuffle"):
        seen = Rewound()
        fit(net(Falling), pruning(schedule=Linear(1, 2), rewind_to=0, control=control), seen, max_epochs=4)
        runs[control] = [each["weights"] for each in seen.seen]
    ticket, anew, shuffled = (runs[control][2] for control in (None, "reinitialize", "shuffle"))
    for run in runs.values():
        assert all(torch.equal(run[1][name], value) for name, value in runs[None][1].items())
    for name in SIZES:
        assert torch.equal(anew[name] != 0, ticket[name] != 0)
        assert not (anew[name] == ticket[name])[ticket[name] != 0].any()
        assert (shuffled[name] != 0).sum() == (ticket[name] != 0).sum()
        both = (shuffled[name] != 0) & (ticket[name] != 0)
        assert torch.equal(shuffled[name][both], ticket[name][both])
    assert not torch.equal(shuffled["second.weight"] != 0, ticket["second.weight"] != 0)


# Checkpoints


class Goes(torch.utils.data.DataLoader):
    """Batches in a fixed order, that go on inside an epoch where a checkpoint was saved."""

    def __init__(self, dataset, batch_size):
        super().__init__(dataset, batch_size)
        self.seen = 0

    def __iter__(self):
        self.seen %= len(self)
        for batch in list(super().__iter__())[self.seen :]:
            self.seen += 1
            yield batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


KINDS = {
    "gradual": (Falling, {"schedule": Cubic(7, 23, every=8, by="steps")}, []),
    "rounds": (Falling, {"schedule": Geometric(2, 4), "rewind_to": 5}, []),
    "shuffled": (Falling, {"schedule": Linear(1, 4), "rewind_to": 0, "control": "shuffle"}, []),
    "2:4": (WithAdam, {"amount": None, "pattern": "2:4", "schedule": Linear(1, 4, every=3)}, []),
    "ema": (Falling, {"schedule": Linear(1, 4)}, [lambda: EMAWeightAveraging(decay=0.9)]),
}


@pytest.mark.parametrize("kind, arguments, others", KINDS.values(), ids=KINDS)
def test_killed_at_every_tenth_step(kind, arguments, others, tmp_path):
    """From a checkpoint of every tenth step, in any round, a run ends at the weights and masks of the whole run."""

    def run(module, *callbacks, ckpt_path=None):
        made = trainer(*(make() for make in others), pruning(**arguments), *callbacks, max_epochs=6,
                       enable_checkpointing=bool(callbacks))  # fmt: skip
        torch.manual_seed(1 if ckpt_path is None else 2)
        made.fit(module, Goes(batches(64).dataset, 8), ckpt_path=ckpt_path)

    whole = net(kind, dropout=0.0)
    run(whole, ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=10))
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(paths) == 4
    for path in paths:
        torch.load(path, weights_only=True)
        resumed = net(kind, seed=5, dropout=0.0)
        run(resumed, ckpt_path=path)
        assert_same_weights(resumed, weights(whole))
        assert all(torch.equal(stays, masks_on(whole)[name]) for name, stays in masks_on(resumed).items())
        assert masks_on(resumed).keys() == masks_on(whole).keys()


def test_masks_are_bits_in_a_checkpoint(tmp_path):
    """A checkpoint holds one bit for each weight, in its own state and beside the weights, and no other mask."""
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit(net(), pruning(), saver, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = next(value for key, value in saved["callbacks"].items() if key.startswith("IterativeMagnitude"))
    for masks in (state["masks"], saved["state_dict"]._metadata[""]["lightning_prune"]["masks"]):
        assert {name: len(bits) for name, (bits, _) in masks.items()} == {n: -(-s // 8) for n, s in SIZES.items()}


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_loaded_model_keeps_its_zeros(weights_only, tmp_path):
    """What is loaded outside a Trainer, from weights alone, too, is held by the next callback, whatever its amount."""
    module = net()
    fit(module, pruning()).save_checkpoint(tmp_path / "one.ckpt", weights_only=weights_only)
    loaded = load_from_checkpoint(Net, tmp_path / "one.ckpt")
    gone = {name: loaded.get_parameter(name) == 0 for name in SIZES}
    fit(loaded, IterativeMagnitudePruning(0.0))
    assert zeros(loaded) == zeros(module)
    fit(loaded, IterativeMagnitudePruning(0.9))
    assert sum(zeros(loaded).values()) == int(0.9 * TOTAL)
    assert not any(loaded.get_parameter(name)[where].any() for name, where in gone.items())


def test_zeros_that_no_callback_is_about_are_held():
    """Masks that lie on the model are held, on weights that the callback is not to prune, too."""
    module = net()
    prune_weights(module, {"second": 0.5})
    fit(module, pruning(amount={"head": 0.5}))
    assert zeros(module) == {"first.weight": 0, "second.weight": 216, "hidden.weight": 0, "head.weight": 15}


def test_a_second_fit_goes_on():
    """A second fit with the same callback neither compounds nor lets zeros grow back; another model starts anew."""
    module, callback = net(), pruning()
    fit(module, callback)
    before = zeros(module)
    fit(module, callback)
    assert zeros(module) == before
    other = net(seed=1)
    fit(other, callback, max_epochs=2)
    assert sum(zeros(other).values()) == int(0.8 * TOTAL)


# Beside others


@pytest.mark.parametrize("then, left", [("stop", 0.4), ("halve", 0.6)])
def test_a_guard_takes_masks_back(then, left):
    """A guard gives back the weights of a cut that did harm, with their optimizer state, and the masks before it."""

    class Judged(Net):
        def validation_step(self, batch, batch_idx):
            gone = sum(zeros(self).values()) / TOTAL
            self.log("score", 1.0 if gone < 0.7 else 0.0)

    module = net(Judged)
    callback, seen = pruning(schedule=Linear(1, 2)), Zeros()
    fit(module, callback, seen, MetricGuard("score", 0.1, then=then), val=True, max_epochs=6)
    counts = [count for _, count in seen.seen]
    assert max(counts) == int(0.8 * TOTAL)
    assert sum(zeros(module).values()) == int(left * TOTAL + 1e-6)
    assert sum(int((~stays).sum()) for stays in masks_on(module).values()) == int(left * TOTAL + 1e-6)


def test_two_callbacks_share_a_model():
    """Two callbacks part a model between them, each with its schedule; what is logged is about both; both resume."""
    one, other = pruning(amount={"first": 0.5}), pruning(amount=0.25, ignore=["first", "head"], schedule=OneShot(2))
    module = net()
    made = fit(module, one, other)
    counts = zeros(module)
    assert counts["first.weight"] == 72 and counts["head.weight"] == 0
    assert counts["second.weight"] + counts["hidden.weight"] == 123
    assert made.callback_metrics["prune/weight_sparsity"] == pytest.approx((72 + 123) / (144 + 492))
    assert masks_on(module).keys() == {"first.weight", "second.weight", "hidden.weight"}


def test_rewinding_brings_back_no_zero_of_another():
    """Where one of two callbacks rewinds, weights that the other has masked stay zero at every forward pass."""

    class Watched(Net):
        def training_step(self, batch, batch_idx):
            if self.current_epoch:
                assert int((self.first.weight == 0).sum()) == 72
            return super().training_step(batch, batch_idx)

    first = pruning(amount={"first": 0.5}, schedule=OneShot(1))
    fit(net(Watched), first, pruning(amount={"second": 0.5}, schedule=OneShot(2), rewind_to=0), max_epochs=4)


def test_a_layer_without_weights_is_told():
    """Where nothing is left of a layer, a warning names it."""

    class Faint(Net):
        def __init__(self, lr=0.05, dropout=0.0):
            super().__init__(lr, dropout)
            with torch.no_grad():
                self.head.weight.mul_(1e-9)

    with pytest.warns(UserWarning, match="nothing is left of head.weight"):
        fit(net(Faint), pruning(schedule=None), max_epochs=1)


def test_overlapping_callbacks_are_refused():
    """Two callbacks about one weight are refused, with both named."""
    with pytest.raises(PruningError, match=r"amount=0.2.*amount=\{'head': 0.5\}.*both prune head.weight"):
        fit(net(), pruning(amount=0.2), pruning(amount={"head": 0.5}))


def zeros_by_filter(values):
    """How often each pattern of zeros is found among the filters of the first layer."""
    return Counter(tuple((row == 0).flatten().tolist()) for row in values["first.weight"])


@pytest.mark.parametrize("order", [1, -1])
def test_masks_follow_cuts(order, tmp_path):
    """Where another callback removes filters, masks lose the same rows and columns, and go on to hold; it resumes."""

    def made():
        masking = pruning(amount=0.5, scope="layer", schedule=OneShot(0))
        return (masking, FilterL1Pruning({"first": 0.5}, schedule=OneShot(2)))[::order]

    seen = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = weights(pl_module)

    module = net(dropout=0.0)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trained = fit(module, *made(), Note(), saver, max_epochs=4, enable_checkpointing=True)
    assert zeros_by_filter(seen[1]) >= zeros_by_filter(seen[2])
    for epoch in (2, 3):
        found = masks_on(module)
        assert found["second.weight"].shape == (6, 4, 3, 3)
        for name, stays in found.items():
            assert not seen[epoch][name][~stays].any()
    metrics = trained.callback_metrics
    gone = sum(int((~stays).sum()) for stays in masks_on(module).values())
    left = sum(p.numel() for p in module.parameters()) - gone
    assert (float(metrics["prune/nonzero"]), float(metrics["prune/nonzero_kept"])) == pytest.approx((left, left / 701))
    assert metrics["prune/sparsity"] == pytest.approx(4 / 24)  # of the filters, which the other callback speaks of
    resumed = net(seed=5, dropout=0.0)
    fit(resumed, *made(), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=4)
    assert_same_weights(resumed, weights(module))


# Refused runs


class Sharded(SingleDeviceStrategy):
    @property
    def restore_checkpoint_after_setup(self):
        return True


class WithLBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


REFUSED = {
    "shards": (Net, {}, lambda: [], {"strategy": Sharded()}, "Sharded splits parameters into shards"),
    "LBFGS": (WithLBFGS, {}, lambda: [], {}, "LBFGS runs the model several times within a step"),
    "ModelPruning": (Net, {}, lambda: [ModelPruning("l1_unstructured")], {}, "one masks what the other wraps"),
    "pattern": (
        Net, {"amount": None, "pattern": "2:4"}, lambda: [FilterL1Pruning(0.5)], {}, "no longer keeps to the pattern",
    ),
    "rewound cuts": (Net, {"rewind_to": 0}, lambda: [FilterL1Pruning(0.5)], {}, "and FilterL1Pruning contradict"),
    "rewound guard": (Net, {"rewind_to": 0}, lambda: [MetricGuard("loss", 1)], {}, "and MetricGuard contradict"),
    "rewound SWA": (
        Net, {"rewind_to": 0}, lambda: [StochasticWeightAveraging(0.1)], {},
        "and StochasticWeightAveraging contradict",
    ),
    "late": (Net, {"rewind_to": 5, "schedule": OneShot(1)}, lambda: [], {}, "at step 4, comes before"),
}  # fmt: skip


@pytest.mark.slow
def test_spawned_processes_are_refused():
    """Strategies that train in other processes, from which the masks cannot return, are refused."""
    with pytest.raises(Exception, match="(?s)IterativeMagnitudePruning: DDPStrategy trains in processes"):
        fit(net(), pruning(), strategy="ddp_spawn", devices=2)


@pytest.mark.parametrize("kind, arguments, others, run, match", REFUSED.values(), ids=REFUSED)
def test_runs_that_cannot_be_are_refused(kind, arguments, others, run, match):
    """What cannot work is refused before the first step, and the model stays as it was."""
    module = net(kind)
    before = weights(module)
    with pytest.raises(PruningError, match=match):
        fit(module, pruning(**arguments), *others(), **run)
    assert_same_weights(module, before)


def test_a_past_step_cannot_be_rewound_to(tmp_path):
    """A run that is taken up later than the step to rewind to, without having passed it, is refused."""
    fit(net()).save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(PruningError, match=r"rewind_to=0\): training starts at step 12"):
        fit(net(), pruning(schedule=OneShot(4), rewind_to=0), ckpt_path=tmp_path / "dense.ckpt", max_epochs=6)


ARGUMENTS = {
    "percent": ({"amount": 80}, r"IterativeMagnitudePruning\(amount=80\).*Write 0.8"),
    "both": ({"pattern": "2:4"}, "Give one of both"),
    "pattern": ({"amount": None, "pattern": "4:4"}, "IterativeMagnitudePruning: pattern='4:4'"),
    "scope": ({"scope": "local"}, "scope='local'"),
    "rewind": ({"rewind_to": -1}, "rewind_to=-1"),
    "rewind before": ({"rewind_to": 9, "schedule": OneShot(8, by="steps")}, "the first cut, at step 8"),
    "control": ({"rewind_to": 0, "control": "random"}, "choose 'reinitialize', 'shuffle' or None"),
    "control alone": ({"control": "shuffle"}, "Give rewind_to, too"),
    "units": ({"schedule": FewUnits(2)}, "it counts filters and neurons, and weights leave here"),
    "gradients": ({"mask_gradients": "always"}, "choose True, False or 'auto'"),
}


@pytest.mark.parametrize("arguments, match", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_make_no_sense_are_refused(arguments, match):
    """Arguments are refused at construction, with the value found."""
    with pytest.raises(ValueError, match=match):
        pruning(**arguments)


# The contract of every callback


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"amount": {"a.*": 0.5}, "scope": "layer", "ignore": ["c"], "mask_gradients": True},
        {"amount": 0.9, "schedule": Geometric(2, 8, 2), "parameters": ["a"], "rewind_to": 3, "control": "shuffle"},
        {"pattern": "2:4"},
    ],
)
def test_repr_rebuilds(arguments):
    """The printed form is a call that makes an equal callback, and each argument an attribute of its name."""
    callback = IterativeMagnitudePruning(**arguments)
    rebuilt = eval(repr(callback), dict(vars(lightning_prune)))
    assert arguments_of(rebuilt) == arguments_of(callback)
    for name, value in arguments.items():
        assert getattr(callback, name) == value
    assert list(inspect.signature(IterativeMagnitudePruning).parameters) == list(arguments_of(callback))


def test_pickles_with_what_it_knows():
    """A callback comes back from pickle and from a deep copy with arguments and state, in a run, too."""
    seen = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pickled = pickle.dumps(trainer.callbacks[0])
            assert b"tests.runs" not in pickled  # not the model
            seen.append(pickle.loads(pickled))

    callback = pruning()
    fit(net(), callback, Copy(), max_epochs=2)
    for other in (seen[-1], pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert repr(other) == repr(callback)
        assert repr(other.state_dict()) == repr(callback.state_dict())
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == callback.state_dict().keys()


def test_nothing_changes_but_the_zeros():
    """Names, parameters and modules are the same after a run; no hook stays but the recipe, none on optimizers."""
    everywhere, module = global_hooks(), net()
    keys, parameters, modules = list(module.state_dict()), dict(module.named_parameters()), dict(module.named_modules())
    made = fit(module, pruning())
    assert list(module.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    assert all(part is modules[path] for path, part in module.named_modules())
    assert [(path, name) for path, name, _ in hooks_of(module)] == [("", "_state_dict_hooks")]
    assert not made.optimizers[0]._optimizer_step_post_hooks
    assert global_hooks() == everywhere


def test_a_run_that_fails_leaves_no_hooks():
    """When training fails, optimizers are let go, and the zeros are still zero."""

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 7:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module, made = net(Fails), trainer(pruning())
    with pytest.raises(ZeroDivisionError):
        made.fit(module, batches())
    assert not made.optimizers[0]._optimizer_step_post_hooks
    assert [(path, name) for path, name, _ in hooks_of(module)] == [("", "_state_dict_hooks")]
    assert sum(zeros(module).values()) == int(0.8 * TOTAL)


def test_amount_0_changes_nothing():
    """With nothing to prune a run ends bit for bit where it ends without the callback, and nothing stays on."""
    alone, watched = net(), net()
    fit(alone, val=True)
    after = torch.get_rng_state()
    fit(watched, pruning(amount=0.0), val=True)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_weights(watched, weights(alone))
    assert hooks_of(watched) == []


@pytest.mark.parametrize("control", [None, "reinitialize", "shuffle"])
def test_cuts_draw_no_random_numbers(control):
    """No cut, no rewinding and no control takes a random number from the training."""
    ends = []
    for callbacks in ([], [pruning(schedule=Linear(1, 2), rewind_to=0, control=control)]):
        fit(net(), *callbacks)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
