"""Weights become zero while a model trains, and stay so for everyone who looks."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

import lightning_prune
from lightning_prune import Cubic, Geometric, IterativeMagnitudePruning, Linear, OneShot, prune_weights
from lightning_prune.surgery.masks import masks_on
from tests.magnitude import SIZES, TOTAL, Two, WithAdam, Zeros, gone_of, pruning, zeros
from tests.newer_lightning import EMAWeightAveraging
from tests.runs import Attentive, Net, assert_same_weights, batches, fit, net, trainer, weights
from tests.test_callback_contract import arguments_of, global_hooks, hooks_of, recipe_hooks

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
    gone = [0, gone_of(0.4), gone_of(0.8), gone_of(0.8)]
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
        layers = {name: gone_of(share, size) for name, size in SIZES.items()}
        assert counts == layers if scope == "layer" else sum(counts.values()) == gone_of(share)
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
    keep = prune_weights(start, 0.8, scope="global").kept
    clipped, twin = net(dropout=0.0), net(Twin, dropout=0.0)
    twin.held = {name: stays.float() for name, stays in keep.items()}
    fit(clipped, pruning(schedule=None), gradient_clip_val=0.05)
    fit(twin, gradient_clip_val=0.05)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(clipped.state_dict()[name], value * twin.held.get(name, 1), rtol=1e-5, atol=1e-6)
    other = net(dropout=0.0)
    fit(other, pruning(schedule=None, mask_gradients=False), gradient_clip_val=0.05)
    assert not torch.allclose(other.hidden.weight, clipped.hidden.weight, rtol=1e-3)


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


# The contract of every callback


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"amount": {"a.*": 0.5}, "scope": "layer", "ignore": ["c"], "mask_gradients": True},
        {"amount": 0.9, "schedule": Geometric(2, 8, 2), "parameters": ["a"], "rewind_to": 3, "control": "shuffle"},
        {"pattern": "2:4"},
        {"criterion": "random"},
    ],
)
def test_repr_rebuilds(arguments):
    """The printed form is a call that makes an equal callback, and each argument an attribute of its name."""
    callback = IterativeMagnitudePruning(**arguments)
    rebuilt = eval(repr(callback), {name: getattr(lightning_prune, name) for name in lightning_prune.__all__})
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
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == recipe_hooks(module)
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
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == recipe_hooks(module)
    assert sum(zeros(module).values()) == gone_of(0.8)


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


def squares(weight):
    """Scores that have the order of magnitudes."""
    return weight.square()


def against_magnitude(weight):
    return -weight.abs()


def test_a_criterion_chooses():
    """A function's scores decide: squares as magnitudes do, and their opposite leaves the smallest."""
    found = {}
    for criterion in ("magnitude", squares, against_magnitude):
        module = net()
        dense = module.first.weight.detach().abs()
        fit(module, pruning(scope="layer", criterion=criterion, schedule=OneShot()), max_epochs=1)
        found[criterion] = masks_on(module)["first.weight"]
    assert torch.equal(found["magnitude"], found[squares])
    kept = found[against_magnitude]
    assert dense[kept].max() < dense[~kept].min() and int((~kept).sum()) == gone_of(0.8, 144)


def test_random_weights_go_step_by_step():
    """A random choice depends on the run's seed alone; what an earlier step chose stays chosen."""
    found = []
    for seed in (1, 1, 2):
        module, steps = net(), []

        class Masks(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, steps=steps):
                steps.append(masks_on(pl_module).get("second.weight"))

        made = trainer(pruning(criterion="random", schedule=Linear(0, 2)), Masks())
        torch.manual_seed(seed)
        made.fit(module, batches())
        assert all((late <= early).all() for early, late in itertools.pairwise(steps))
        assert sum(zeros(module).values()) == gone_of(0.8)
        found.append(steps[-1])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("criterion", ["size", "tests.magnitude.no_such", 3])
def test_unknown_criteria_are_refused(criterion):
    """A name that is none, or something else than a function, is refused when the callback is made."""
    with pytest.raises(ValueError, match=rf"IterativeMagnitudePruning\(criterion={criterion!r}\)"):
        IterativeMagnitudePruning(criterion=criterion)


def test_a_line_for_each_step(caplog):
    """Each pruning step says in one line what it pruned, by the numbers that are logged."""
    with caplog.at_level("INFO"):
        fit(net(), pruning(amount=0.8, schedule=Linear(1, 2)), max_epochs=4)
    said = [record.message for record in caplog.records if "pruned, of" in record.message]
    total = sum(p.numel() for p in net().parameters())
    assert said == [
        f"IterativeMagnitudePruning, before epoch {epoch}, step {4 * epoch}: {gone_of(share) / TOTAL:.1%} of the "
        f"weights pruned, of 80.0% in the end; kept: {(total - gone_of(share)) / total:.1%} of the parameters unmasked."
        for epoch, share in ((1, 0.4), (2, 0.8))
    ]


def test_much_that_was_not_considered_is_warned_of():
    """Where recurrent weights are more than a tenth of the model, a warning names them; named, they are pruned."""
    with pytest.warns(UserWarning, match=r"lstm.weight_ih_l0, lstm.weight_hh_l0. Name them by parameters="):
        fit(net(Attentive), IterativeMagnitudePruning(0.5), max_epochs=1)
    module = net(Attentive)
    fit(module, IterativeMagnitudePruning(0.5, parameters=["lstm"]), max_epochs=1)
    assert int((module.lstm.weight_hh_l0 == 0).sum()) == 4 * 6 * 6 // 2
