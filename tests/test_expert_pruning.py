"""ExpertPruning in a run: what every pruning callback promises, with experts of mixtures in place of filters."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prune
from lightning_prune import FilterL1Pruning, Linear, MetricGuard, PruningError, load_from_checkpoint
from lightning_prune.algorithms.schedules import FewUnits
from lightning_prune.callbacks import ExpertPruning
from lightning_prune.reports.run_tables import run_tables
from tests.mixtures import WIDTH, Mixture
from tests.newer_lightning import WeightAveraging, reading
from tests.runs import CLASSES, IMAGE, Net, assert_same_weights, batches, fit, net, weights
from tests.test_callback_contract import arguments_of, global_hooks, hooks_of, recipe_hooks

CALLBACKS = {
    "reap": partial(ExpertPruning, batches=2),
    "frequency": partial(ExpertPruning, criterion="frequency", batches=2, recalibrate=1),
    "magnitude": partial(ExpertPruning, criterion="magnitude"),
    "random": partial(ExpertPruning, criterion="random"),
}
every_kind = pytest.mark.parametrize("kind", CALLBACKS.values(), ids=CALLBACKS)
some_kinds = pytest.mark.parametrize("kind", [CALLBACKS["reap"], CALLBACKS["random"]], ids=["reap", "random"])


class Experts(Net):
    """The network of the runs with two mixtures between its first convolution and its head."""

    def __init__(self, lr=0.05, dropout=0.0, experts=6, styles=("loop", "fused"), gate="softmax"):
        super().__init__(lr, dropout)
        del self.second
        self.hidden = nn.Linear(8, WIDTH)
        self.mixtures = nn.ModuleList(Mixture(experts, style=style, gate=gate, k=2) for style in styles)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images):
        x = F.relu(self.norm(self.first(images))).mean(dim=(2, 3))
        x = self.hidden(x)
        for mixture in self.mixtures:
            x = x + mixture(x)
        return self.head(self.drop(x))


class Fails(Experts):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def counts(module):
    """How many experts each mixture has, by its router, whose rows must agree with the experts."""
    found = []
    for mixture in module.mixtures:
        found.append(len(mixture.router.score.weight))
        assert mixture.experts_now() == found[-1]
        assert len(mixture.up if mixture.style == "fused" else mixture.experts) == found[-1]
    return found


@some_kinds
@pytest.mark.parametrize("after_a_run", [False, True], ids=["new", "after-a-run"])
def test_pickles(kind, after_a_run):
    """A callback comes back from pickle, and from a deep copy, with the same arguments and state."""
    callback = kind(amount=0.25, schedule=Linear(1, 2))
    if after_a_run:
        fit(net(Experts), callback)
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert arguments_of(other) == arguments_of(callback)
        assert repr(other.state_dict()) == repr(callback.state_dict())


@every_kind
def test_repr_rebuilds(kind):
    """The printed form is a call that makes an equal callback, and each argument is an attribute."""
    given = {"amount": 0.4, "schedule": Linear(1, 2), "ignore": ["mixtures.0"], "min_experts": 2}
    callback = kind(**given)
    names = {name: getattr(lightning_prune, name) for name in lightning_prune.__all__}
    rebuilt = eval(repr(callback), {**names, "ExpertPruning": ExpertPruning})
    assert arguments_of(rebuilt) == arguments_of(callback) and repr(rebuilt) == repr(callback)
    assert {name: getattr(callback, name) for name in given} == given


@pytest.mark.parametrize(
    "arguments, error, told",
    [
        ({"amount": 30.0}, ValueError, "amount=30.0.*Write 0.3 to remove 30 %"),
        ({"amount": math.nan}, ValueError, "amount=nan"),
        ({"amount": {"mixtures": 0.5}}, TypeError, "a fraction or a whole number of the experts"),
        ({"criterion": "l1"}, ValueError, "criterion='l1'"),
        ({"batches": 0}, ValueError, "batches=0"),
        ({"recalibrate": -1}, ValueError, "recalibrate=-1"),
        ({"min_experts": True}, ValueError, "min_experts=True"),
        ({"ignore": "head"}, TypeError, r"ignore='head'.*\['head'\]"),
        ({"schedule": 0.5}, TypeError, "schedule=0.5.*OneShot, Linear, Cubic"),
        ({"schedule": FewUnits(3)}, ValueError, "it counts filters, and experts leave here"),
        ({"module": []}, ValueError, "it names no part"),
        ({"trace": "backward"}, ValueError, "trace='backward'"),
        ({"report": 1}, TypeError, "report=1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, told):
    """What no run could make sense of is refused at construction, naming callback, argument and value."""
    with pytest.raises(error, match=told) as raised:
        ExpertPruning(**arguments)
    assert str(raised.value).startswith("ExpertPruning")


@every_kind
def test_experts_leave_gradually(kind):
    """After each epoch of the schedule as many experts are gone as it asks for; logs and optimizer follow."""
    seen = []

    class Watched(Experts):
        def on_train_batch_start(self, batch, batch_idx):  # comes after that of callbacks
            if batch_idx == 0:
                seen.append(counts(self))

    module = net(Watched)
    callback = kind(amount=4, schedule=Linear(1, 2), example_inputs=IMAGE)
    trainer = fit(module, callback, max_epochs=3)
    assert seen == [[6, 6], [4, 4], [2, 2]] and callback.experts == {"mixtures.0": 2, "mixtures.1": 2}
    (optimizer,) = trainer.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    for parameter in module.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    dense, slim = (sum(p.numel() for p in m.parameters()) for m in (Experts(), module))
    metrics = trainer.callback_metrics
    assert float(metrics["prune/experts"]) == 4 and float(metrics["prune/sparsity"]) == pytest.approx(2 / 3)
    assert float(metrics["prune/params"]) == slim
    assert float(metrics["prune/params_kept"]) == pytest.approx(slim / dense)
    assert float(metrics["prune/flops"]) == lightning_prune.count_flops(module, IMAGE).total


def test_a_step_is_that_of_a_mixture_whose_router_cannot_choose_them():
    """Training goes on as in the dense network whose router scores removed experts with minus infinity."""

    class Blocked(Experts):
        """Never removes anything: from epoch 1 on, the rows of experts that left elsewhere are minus infinity."""

        kept: tuple = ()

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                for mixture, kept in zip(self.mixtures, self.kept, strict=True):
                    gone = torch.ones(6, dtype=torch.bool).index_fill(0, kept, False)
                    mixture.router.score.register_forward_hook(
                        lambda module, args, out, gone=gone: out.masked_fill(gone, -torch.inf)
                    )

    slim = net(Experts)
    rows = {}

    class Noting(ExpertPruning):
        def on_train_epoch_start(self, trainer, pl_module):
            before = [mixture.router.score.weight.detach().clone() for mixture in pl_module.mixtures]
            super().on_train_epoch_start(trainer, pl_module)
            for place, (mixture, old) in enumerate(zip(pl_module.mixtures, before, strict=True)):
                new = mixture.router.score.weight
                if len(new) < len(old):
                    rows[place] = torch.tensor([int((old == row).all(1).nonzero()[0, 0]) for row in new])

    fit(slim, Noting(0.5, schedule=lightning_prune.OneShot(1), example_inputs=IMAGE), max_epochs=3)
    blocked = net(Blocked)
    blocked.kept = (rows[0], rows[1])
    fit(blocked, max_epochs=3)
    x = torch.randn(20, *IMAGE.shape[1:])
    torch.testing.assert_close(slim.eval()(x), blocked.eval()(x))
    for place, kept in rows.items():
        mine, other = slim.mixtures[place].router.score, blocked.mixtures[place].router.score
        torch.testing.assert_close(mine.weight, other.weight[kept])


@some_kinds
def test_state_is_plain(kind):
    """The state loads with ``weights_only=True``: numbers, strings, lists, dicts and tensors."""
    callback = kind(amount=0.5)
    fit(net(Experts), callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    other = kind(amount=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert repr(other.state_dict()) == repr(callback.state_dict())


@some_kinds
def test_amount_0_changes_nothing(kind):
    """With nothing to remove, a run ends bit for bit where it ends without the callback: the same random numbers."""
    alone, watched = net(Experts, dropout=0.2), net(Experts, dropout=0.2)
    fit(alone, val=True)
    after = torch.get_rng_state()
    fit(watched, kind(0.0, schedule=Linear(1, 2)), val=True)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_weights(watched, weights(alone))


@pytest.mark.parametrize("amount", [0.0, 0.5], ids=["whole", "cut"])
def test_no_hooks_stay(amount):
    """After a run, or one that failed, nothing hangs on the model but what writes its recipe, if it was cut."""
    everywhere = global_hooks()
    for kind in (Experts, Fails):
        module = net(kind)
        if kind is Fails:
            with pytest.raises(ZeroDivisionError):
                fit(module, ExpertPruning(amount, schedule=Linear(1, 2)))
        else:
            fit(module, ExpertPruning(amount))
        assert sorted((path, name) for path, name, _ in hooks_of(module)) == (recipe_hooks(module) if amount else [])
    assert global_hooks() == everywhere


def test_a_refused_run_leaves_nothing():
    """A run that is refused leaves the model bit for bit as it was, and nothing on it."""
    module = net(Experts)
    before = weights(module)
    with pytest.raises(PruningError, match="ExpertPruning.amount=5.: each token needs 2 experts of mixtures.0, so at"):
        fit(module, ExpertPruning(5))
    with pytest.raises(PruningError, match="prunes alone in its run"):
        fit(module, ExpertPruning(0.25), FilterL1Pruning(0.25))
    with pytest.raises(PruningError, match="No mixture of experts can be pruned in Experts.*named in ignore="):
        fit(module, ExpertPruning(0.25, ignore=["mixtures"]))
    with pytest.raises(PruningError, match="No mixture of experts can be pruned in Net"):
        fit(net(), ExpertPruning(0.25))
    assert hooks_of(module) == [] and counts(module) == [6, 6]
    assert_same_weights(module, before)


@pytest.mark.parametrize("place", ["training_step", "forward"])
def test_code_outside_that_counts_experts_is_refused_on_the_first_batch(place):
    """A loss, or another layer, that needs six experts is found before an epoch is spent."""

    class Counting(Experts):
        def forward(self, images):
            if place == "forward":
                assert len(self.mixtures[0].experts) == 6
            return super().forward(images)

        def training_step(self, batch, batch_idx):
            if place == "training_step":
                share = torch.ones(6) * self.mixtures[0].router(torch.randn(3, WIDTH))[0].new_ones(counts(self)[0])
                assert share.shape == (6,)
            return super().training_step(batch, batch_idx)

    module = net(Counting)
    before = weights(module)
    told = "cannot lose experts, since" if place == "forward" else "training_step runs on the training batch, but not"
    with pytest.raises(PruningError, match=told):
        fit(module, ExpertPruning(0.5, schedule=Linear(2, 2)))
    assert_same_weights(module, before)
    assert hooks_of(module) == []


@every_kind
def test_a_resumed_run_ends_where_the_other_does(kind, tmp_path):
    """Killed before, between or after removals and resumed with a new model, a run ends bit for bit alike."""
    make = partial(kind, amount=4, schedule=Linear(1, 3), example_inputs=IMAGE)
    whole, callback = net(Experts), make()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, callback, saving, max_epochs=5, enable_checkpointing=True)
    assert counts(whole) == [2, 2]
    for epoch in (0, 1, 2, 3):
        other, again = net(Experts, seed=3), make()
        fit(other, again, max_epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_weights(other, weights(whole))
        assert again.history == callback.history
        loaded = load_from_checkpoint(Experts, tmp_path / f"epoch={epoch}.ckpt")
        assert counts(loaded)[0] == [6, 4, 3, 2][epoch]


def test_the_best_checkpoint_may_have_more_experts(tmp_path):
    """Testing an earlier checkpoint, also of the dense model, brings its experts back, with its values."""
    module = net(Experts)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, ExpertPruning(4, schedule=Linear(1, 2)), saving, max_epochs=3, enable_checkpointing=True)
    for epoch, left in ((1, 4), (0, 6), (2, 2), (0, 6)):
        trainer.test(module, batches(), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"), **reading(weights_only=False))
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=False)["state_dict"]
        assert counts(module) == [left, left]
        assert_same_weights(module, state)


@pytest.mark.parametrize("then", ["stop", "halve"])
def test_a_guard_brings_experts_back(then):
    """A removal that does harm is rolled back: experts, values and the optimizer's groups and state are as before."""

    class Judged(Experts):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0 - 0.3 * (counts(self)[0] < 4))

    module = net(Judged)
    guard = MetricGuard("val_acc", drop=0.1, mode="max", then=then)
    callback = ExpertPruning(4, schedule=Linear(1, 2), example_inputs=IMAGE)
    trainer = fit(module, callback, guard, val=True, max_epochs=5)
    assert counts(module) == [4, 4] and callback.experts == {"mixtures.0": 4, "mixtures.1": 4}
    (optimizer,) = trainer.optimizers
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.parameters()}
    for parameter in module.parameters():  # an expert that no token chose has none
        assert optimizer.state[parameter].get("momentum_buffer", parameter).shape == parameter.shape


def test_a_run_that_was_rolled_back_is_that_without_the_removal():
    """After a rollback, weights and momentum are bit for bit those of the epoch before."""
    seen = {}

    class Judged(Experts):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0 - 0.3 * (counts(self)[0] < 6))

        def on_train_epoch_end(self):
            seen[self.current_epoch] = weights(self), copy.deepcopy(self.optimizers().optimizer.state_dict())

    module = net(Judged)
    guard = MetricGuard("val_acc", drop=0.1, mode="max", then="stop")
    trainer = fit(module, ExpertPruning(0.5, schedule=lightning_prune.OneShot(1)), guard, val=True, max_epochs=2)
    before, optimizer = seen[0]
    assert_same_weights(module, before)
    now = trainer.optimizers[0].state_dict()["state"]
    assert now.keys() == optimizer["state"].keys()
    assert all(torch.equal(now[key]["momentum_buffer"], optimizer["state"][key]["momentum_buffer"]) for key in now)


@pytest.mark.parametrize("order", [1, -1], ids=["averaging first", "pruning first"])
def test_averaged_copies_follow(order, tmp_path):
    """A copy that averages weights loses the same experts; a resumed run ends where the uninterrupted one ends."""

    def run(seed, ckpt_path=None):
        module = net(Experts, seed=seed)
        callbacks = [WeightAveraging(), ExpertPruning(4, schedule=Linear(1, 2), example_inputs=IMAGE)][::order]
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(module, *callbacks, saver, max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return module

    whole = run(0)
    expected = weights(whole)
    assert counts(whole) == [2, 2] and torch.isfinite(whole.eval()(IMAGE)).all()
    for epoch in (0, 1, 2):
        resumed = run(5, tmp_path / f"epoch={epoch}.ckpt")
        assert_same_weights(resumed, expected)


def test_the_report_shows_how_many_experts_are_left():
    """Each mixture is a row of the table of layers, whose width is its number of experts; goals count experts."""
    module = net(Experts)
    callback = ExpertPruning(4, schedule=Linear(1, 2))
    fit(module, callback, max_epochs=3)
    history = callback.history
    for path in ("mixtures.0", "mixtures.1"):
        assert (history.layers[path].before.width, history.layers[path].now.width) == (6, 2)
        params = sum(p.numel() for p in module.get_submodule(path).parameters())
        assert history.layers[path].now.params == params
    assert not any(path.startswith("mixtures.0.") for path in history.layers)
    (goal,) = history.goals
    assert goal.target == "experts" and goal.asked == goal.reached == pytest.approx(2 / 3)
    assert [moment.left["prune/experts"] for moment in history.moments] == [12, 8, 4]
    assert run_tables(history)


def test_parts_and_limits():
    """``module=`` and ``ignore=`` choose mixtures, and of each ``min_experts`` are kept."""
    module = net(Experts)
    trainer = fit(module, ExpertPruning(0.5, module="mixtures.1", example_inputs=IMAGE), max_epochs=1)
    assert counts(module) == [6, 3]
    assert float(trainer.callback_metrics["prune/experts"]) == 3
    own = sum(p.numel() for p in module.mixtures[1].parameters())
    assert float(trainer.callback_metrics["prune/params"]) == own
    module = net(Experts)
    fit(module, ExpertPruning(0.5, ignore=["mixtures.1"], example_inputs=IMAGE), max_epochs=1)
    assert counts(module) == [3, 6]
    module = net(Experts)
    fit(module, ExpertPruning(5, min_experts=4, example_inputs=IMAGE), max_epochs=1)
    assert counts(module) == [4, 4]


def test_a_mixture_that_cannot_be_verified_is_kept_and_training_goes_on():
    """It is named in a warning before training, and in the report; the others are pruned."""

    class Reordered(Mixture):
        def expert(self, number, x):
            return super().expert(number, x) + number

    class Some(Experts):
        def __init__(self):
            super().__init__()
            self.mixtures[0] = Reordered()

    module = net(Some)
    callback = ExpertPruning(4, schedule=Linear(1, 2))
    with pytest.warns(UserWarning, match="ExpertPruning: mixtures.0: it returns something else"):
        fit(module, callback, max_epochs=3)
    assert counts(module) == [6, 2] and "something else" in callback.history.dense["mixtures.0"]


def test_a_module_that_is_a_mixture_itself():
    """The router and the experts may be the module's own; it trains on, resumed counts included."""

    class Alone(Net):
        def __init__(self, lr=0.05, dropout=0.0):
            super().__init__(lr, dropout)
            self.router = nn.Linear(72, 6)
            self.experts = nn.ModuleList(nn.Linear(72, CLASSES) for _ in range(6))

        def forward(self, images):
            x = images.flatten(1)
            gates, chosen = self.router(x).softmax(-1).topk(2)
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            return (outputs.gather(1, chosen[..., None].expand(-1, -1, CLASSES)) * gates[..., None]).sum(1)

    module = net(Alone)
    callback = ExpertPruning(0.5, schedule=Linear(1, 2), example_inputs=IMAGE)
    fit(module, callback, max_epochs=3)
    assert len(module.experts) == module.router.out_features == 3 and callback.experts == {"": 3}


@pytest.mark.parametrize("trace", ["training_step", "validation_step"])
def test_steps_are_traced(trace):
    """A module whose forward takes no batch is looked at by its steps."""

    class Steps(Experts):
        def forward(self, images, needed):
            return super().forward(images)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0], None), batch[1])

        def validation_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0], None), batch[1])

    module = net(Steps)
    fit(module, ExpertPruning(0.5, trace=trace), max_epochs=1)
    assert counts(module) == [3, 3]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    """Mixed, half and double precision prune and train."""
    module = net(Experts)
    fit(module, ExpertPruning(0.5, schedule=Linear(1, 2)), max_epochs=3, precision=precision)
    assert counts(module) == [3, 3]
    assert all(torch.isfinite(p).all() for p in module.parameters())
