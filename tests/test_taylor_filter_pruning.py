"""Filters leave by what the loss would change by, from the gradients of the run itself."""

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from lightning_prune import Cubic, Linear, OneShot, TaylorFilterPruning
from lightning_prune.measure.footprint import measure
from lightning_prune.structure import find_structure, trace
from tests.runs import (
    IMAGE,
    Known,
    Net,
    assert_same_weights,
    batches,
    fit,
    net,
    trainer,
    watch_scores,
    weights,
    widths,
)

FORMS = ["weights", "activations"]
READERS = {"first": "second", "second": "hidden", "hidden": "head"}
LAYERS = list(READERS)


class Watched(Net):
    """Keeps what the scores must be made of, found without the library, and the weights around each cut."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.expanded = {name: [] for name in LAYERS}  # per step, by weights
        self.examples = {name: [] for name in LAYERS}  # per backward pass, by example
        self.norms, self.before, self.kept, self.read = [], {}, [], {}

    def forward(self, images):
        x = F.relu(self.norm(self.first(images)))
        self.read["first"] = x
        x = F.relu(self.second(x)).mean(dim=(2, 3))
        self.read["second"] = x
        x = self.drop(F.relu(self.hidden(x)))
        self.read["hidden"] = x
        for value in self.read.values():
            if value.requires_grad:
                value.retain_grad()
        return self.head(x)

    def on_after_backward(self):
        for name, x in self.read.items():
            each = (x.detach() * x.grad).double().flatten(2).sum(2) if x.dim() > 2 else (x.detach() * x.grad).double()
            self.examples[name].append((each * len(x)).abs())

    def on_before_optimizer_step(self, optimizer):
        for name, reader in READERS.items():
            weight = getattr(self, reader).weight
            sums = (weight * weight.grad).detach().double().transpose(0, 1).flatten(1).sum(1)
            self.expanded[name].append(sums.square())

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.norms.append(float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm()))
        self.before = {name: getattr(self, name).weight.detach().clone() for name in LAYERS}

    def on_train_epoch_start(self):
        now = {name: getattr(self, name).weight.detach() for name in LAYERS}
        if self.before and {n: len(w) for n, w in now.items()} != {n: len(w) for n, w in self.before.items()}:
            self.kept.append(self._survivors(now))

    def _survivors(self, now):
        """Which of each layer's filters are left, told by their biases or, without one, by a part that nothing cuts."""
        found = {}
        for name, weight in now.items():
            inputs = found.get({reader: made for made, reader in READERS.items()}.get(name))
            old = self.before[name] if inputs is None else self.before[name][:, inputs]
            found[name] = [int((old - row).flatten(1).abs().sum(1).argmin()) for row in weight]
            assert torch.equal(old[found[name]], weight)
        return found

    def expected(self, form, amount, first=0, last=None):
        """Which filters must stay when the lowest scores of all layers leave."""
        made = self.expanded if form == "weights" else self.examples
        scores = {}
        for name, seen in made.items():
            rows = torch.stack(seen[first:last]).mean(0) if form == "weights" else torch.cat(seen[first:last]).mean(0)
            scores[name] = rows if form == "weights" else rows / rows.norm()
        order = sorted((float(s), name, unit) for name, score in scores.items() for unit, s in enumerate(score))
        left = {name: set(range(len(score))) for name, score in scores.items()}
        count = math.ceil(amount * len(order) - 1e-9)
        for _, name, unit in order:
            if count and len(left[name]) > 1:
                left[name].remove(unit)
                count -= 1
        return {name: sorted(units) for name, units in left.items()}


RUNS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "uneven-accumulate": {"accumulate_grad_batches": 3},
    "clip-norm": {"gradient_clip_val": 1e-3},
    "clip-value": {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
    "double": {"precision": "64-true"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", RUNS)
def test_the_lowest_scores_leave(case, form):
    """What leaves are the units of the lowest scores, whatever the Trainer does with gradients before a step."""
    module = net(Watched)
    fit(module, TaylorFilterPruning(0.4, form=form, scope="global"), **RUNS[case])
    (kept,) = module.kept
    steps = len(module.expanded["first"]) // 3  # of three epochs
    assert kept == module.expected(form, 0.4, last=steps if form == "weights" else 4)
    assert sum(map(len, kept.values())) == 24 - 10
    if case == "clip-norm":
        assert max(module.norms) < 2e-3  # the step was clipped, the scores were not


@pytest.mark.parametrize("form", FORMS)
def test_scores_gather_anew_after_each_cut(form):
    """A later cut looks at what was gathered since the one before it."""
    module = net(Watched)
    fit(module, TaylorFilterPruning(0.5, form=form, schedule=Linear(1, 3), scope="global"), max_epochs=5)
    assert len(module.kept) == 3
    first = module.expected(form, 8 / 24 * 0.5, last=4)
    assert module.kept[0] == first
    second = {n: seen[4:8] for n, seen in (module.expanded if form == "weights" else module.examples).items()}
    assert all(seen[0].shape[-1] == len(first[name]) for name, seen in second.items())


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_other_sizes_count_by_their_examples(form):
    """An example in a short last batch weighs as much as any other, where examples are looked at."""
    module = net(Watched)
    made = trainer(TaylorFilterPruning(0.4, form=form, scope="global"), max_epochs=2)
    torch.manual_seed(1)
    made.fit(module, batches(26))
    assert module.kept == [module.expected(form, 0.4, last=4)]


class Frozen(Watched):
    """The first layer, and what reads it, does not learn."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.first.requires_grad_(False)
        self.norm.requires_grad_(False)
        self.second.requires_grad_(False)
        self.second.bias.requires_grad_(True)

    def on_before_optimizer_step(self, optimizer):
        pass

    def on_after_backward(self):
        pass

    def optimizer_step(self, *args, **kwargs):
        Net.optimizer_step(self, *args, **kwargs)


@pytest.mark.parametrize("form", FORMS)
def test_layers_without_gradients_are_scored_on_batches_of_their_own(form):
    """Where no gradient of the training reaches a layer, losses are taken when the cut is due, and it stays frozen."""
    module = net(Frozen)
    fit(module, TaylorFilterPruning(0.4, form=form, scope="layer"))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 6}
    assert not module.first.weight.requires_grad
    module = net(Frozen)
    fit(module, TaylorFilterPruning(0.4, form=form, scope="layer", ignore=["first"]))
    assert widths(module) == {"first": 8, "second": 3, "hidden": 6}


class Overflows(Known):
    """One batch whose gradients overflow."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if batch_idx == 2 and self.current_epoch == 0 else 1.0)

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(
            epoch, batch_idx, optimizer, closure if batch_idx != 2 else _without_step(optimizer, closure)
        )


def _without_step(optimizer, closure):
    def run():
        closure()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_that_overflows_does_not_count(form):
    """Scores are finite though one batch's gradients were not."""
    callback = TaylorFilterPruning(0.4, form=form, scope="global")
    seen = watch_scores(callback)
    fit(net(Overflows), callback)
    ((scores, gathered),) = seen
    assert all(score.isfinite().all() and (score > 0).any() for score in scores.values())
    per_batch = 1 if form == "weights" else 8
    assert all(count == 3 * per_batch for _, count in gathered.values())


# Training is not disturbed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["plain", "accumulate", "clip-norm", "bf16"])
def test_gathering_does_not_change_the_training(form, case):
    """Until the first cut, training is bit for bit what it is without the callback, random numbers included."""
    states = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states[-1].append((weights(pl_module), torch.get_rng_state()))

    for callbacks in ((), (TaylorFilterPruning(0.5, form=form, schedule=OneShot(3), scope="global"),)):
        states.append([])
        fit(net(), *callbacks, Ends(), max_epochs=4, val=True, **RUNS[case])
    for (expected, random), (found, drawn) in list(zip(*states, strict=True))[:3]:
        assert torch.equal(random, drawn)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sum(v.numel() for v in states[1][3][0].values()) < sum(v.numel() for v in states[0][3][0].values())


@pytest.mark.parametrize("form", FORMS)
def test_only_training_is_gathered(form):
    """Validation, its sanity check, and backward passes of the user's own elsewhere do not count."""
    seen = []

    class Probes(Net):
        def validation_step(self, batch, batch_idx):
            with torch.inference_mode(False), torch.enable_grad():
                images, labels = (part.clone() for part in batch)
                F.cross_entropy(self(images), labels).backward()
            self.zero_grad()

    for kind in (Net, Probes):
        callback = TaylorFilterPruning(0.4, form=form, scope="global")
        seen.append(watch_scores(callback))
        fit(net(kind), callback, val=True, num_sanity_val_steps=2, inference_mode=kind is Net)
    ((_, plain),), ((_, probed),) = seen
    assert all(count == (4 if form == "weights" else 32) for _, count in plain.values())
    for name, (total, count) in plain.items():
        assert count == probed[name][1]
        assert torch.equal(total, probed[name][0])


@pytest.mark.parametrize("ends", ["schedule", "exception", "stop"])
def test_nothing_hangs_on_the_model(ends):
    """Gathering puts no hook on any module, and ends with the last cut, with an exception and with the run."""
    seen = []

    class Looks(Net):
        def training_step(self, batch, batch_idx):
            hooks = [len(part._forward_pre_hooks) + len(part._backward_hooks) for part in self.modules()]
            seen.append((sum(hooks), callback.member.strategy.gathering.gathered() is not None))
            if ends == "exception" and self.global_step == 5:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module, callback = net(Looks), TaylorFilterPruning(0.5, form="activations", schedule=OneShot(2), scope="global")
    if ends == "exception":
        with pytest.raises(ZeroDivisionError):
            fit(module, callback)
    elif ends == "stop":
        fit(module, callback, max_steps=9, max_epochs=-1)
        assert seen == [(0, True)] * 8 + [(0, False)]
    else:
        fit(module, callback, max_epochs=4)
        assert seen == [(0, True)] * 8 + [(0, False)] * 8
    assert callback.member.strategy.gathering.gathered() is None


# Resume


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["epoch-end", "mid-epoch"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(form, where, tmp_path):
    """What was gathered lies in the checkpoint, which loads with weights_only=True, and the run goes on exactly."""

    def pruning():
        return TaylorFilterPruning(0.5, form=form, schedule=Cubic(1, 3), scope="global")

    every = {"every_n_epochs": 1} if where == "epoch-end" else {"every_n_train_steps": 2}
    keeps = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **every)
    module = net(dropout=0.0)
    repeating = batches(16).dataset  # a loader begins anew mid-epoch: let the third batch be the first again
    loader = DataLoader(ConcatDataset([repeating, repeating]), 8)
    trainer(pruning(), keeps, enable_checkpointing=True, max_epochs=4).fit(module, loader)
    paths = sorted(tmp_path.glob("*.ckpt"))
    steps = {torch.load(path, weights_only=True)["global_step"]: path for path in paths}
    assert sorted(steps) == ([4, 8, 12, 16] if where == "epoch-end" else list(range(2, 17, 2)))
    for step, path in steps.items():
        gathered = [s["gathered"] for k, s in torch.load(path, weights_only=True)["callbacks"].items() if "Taylor" in k]
        since = step if step <= 4 else (step - 1) % 4 + 1
        assert (
            gathered == [None]
            if step > 12
            else all(count == since * (1 if form == "weights" else 8) for _, count in gathered[0].values())
        )
        if step < 16:
            resumed = net(dropout=0.0, seed=step)
            trainer(pruning(), max_epochs=4).fit(resumed, loader, ckpt_path=path)
            assert_same_weights(resumed, weights(module))


@pytest.mark.parametrize("form", FORMS)
def test_state_is_a_copy(form):
    """A state that was taken does not follow the sums that go on growing."""
    states = []

    class Takes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            file = io.BytesIO()
            state = pruning.state_dict()["gathered"]
            torch.save(state, file)
            states.append((state, file))

    pruning = TaylorFilterPruning(0.5, form=form, schedule=OneShot(2), scope="global")
    fit(net(), pruning, Takes(), max_epochs=3)
    for state, file in states[:8]:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert all(
            torch.equal(state[name][0], total) and state[name][1] == count for name, (total, count) in saved.items()
        )


# Arguments


@pytest.mark.parametrize("schedule", [OneShot(0), OneShot(), Linear(0, 3), Cubic(0, 2)], ids=repr)
def test_a_cut_before_any_gradient_is_refused(schedule):
    """A schedule that cuts before epoch 1 is refused at construction."""
    if schedule.progress(0) > 0:
        with pytest.raises(ValueError, match="gradients must be seen before the first cut. Start at epoch 1"):
            TaylorFilterPruning(schedule=schedule, scope="global")
    else:
        TaylorFilterPruning(schedule=schedule, scope="global")


@pytest.mark.parametrize("arguments, told", [
    ({"form": "gradients"}, "form='gradients'.*'weights' or 'activations'"),
    ({"flops_penalty": -1.0}, "flops_penalty=-1.0.*0 or more"),
    ({"flops_penalty": math.nan}, "flops_penalty=nan"),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments, told):
    """What the callback adds to the others' arguments is checked at construction."""
    with pytest.raises(ValueError, match=told):
        TaylorFilterPruning(**arguments)


class Costly(Net):
    """The first layer runs on nine times the pixels of the second."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.second = nn.Conv2d(8, 6, 3, stride=3)


@pytest.mark.parametrize("form", FORMS)
def test_a_flops_penalty_moves_cuts_to_costlier_layers(form):
    """With a penalty on FLOPs, layers whose units cost more lose more of them."""
    left = []
    for penalty in (0.0, 1e6):
        module = net(Costly)
        fit(module, TaylorFilterPruning(0.25, form=form, flops_penalty=penalty, scope="global"))
        left.append(widths(module))
    assert left[1] == {"first": 2, "second": 6, "hidden": 10}  # a unit of the first costs most by far
    assert left[0] != left[1]


@pytest.mark.parametrize("penalty", [0.0, 1e-20])
def test_what_is_lost_is_weighed_by_what_is_saved(penalty):
    """Without a penalty, a budget of FLOPs takes first the units that the loss would miss least for what they save."""
    module = net(Watched)
    structure = find_structure(trace(module, IMAGE))
    cost = partial(measure, module, structure)
    names = {name: group.width for name, group in structure.groups.items()}
    whole = cost({}).flops
    saved = {name: whole - cost({name: np.arange(width) > 0}).flops for name, width in names.items()}
    fit(run := net(Watched), TaylorFilterPruning(0.4, target="flops", flops_penalty=penalty, scope="global"))
    scores = {name: torch.stack(run.expanded[name][:4]).mean(0) / (1 if penalty else saved[name]) for name in LAYERS}
    left = {name: np.ones(width, dtype=bool) for name, width in names.items()}
    order = sorted((float(score), name, unit) for name in LAYERS for unit, score in enumerate(scores[name]))
    for _, name, unit in order:
        if cost(left).flops > 0.6 * whole and left[name].sum() > 1:
            left[name][unit] = False
    assert run.kept[0] == {name: stays.nonzero()[0].tolist() for name, stays in left.items()}


class Partly(Watched):
    """The optimizer steps all but the first layer and its norm."""

    def configure_optimizers(self):
        return torch.optim.SGD([*self.second.parameters(), *self.hidden.parameters(), *self.head.parameters()], 0.05)


def test_parameters_that_no_optimizer_steps_do_not_count():
    """Gradients that gather in parameters that no optimizer steps, and so zeroes, are not looked at."""
    module = net(Partly)
    fit(module, TaylorFilterPruning(0.4, scope="global"))
    assert module.kept == [module.expected("weights", 0.4, last=4)]


class Bare(Net):
    """What the hidden layer makes is read by a parameter of no layer."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.mix = nn.Parameter(torch.eye(4, 10))
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        x = F.relu(self.second(F.relu(self.norm(self.first(images))))).mean(dim=(2, 3))
        return self.head(F.linear(F.relu(self.hidden(x)), self.mix).tanh())


@pytest.mark.parametrize("form", FORMS)
def test_units_that_a_bare_parameter_reads(form):
    """What reads a unit need be no layer."""
    module = net(Bare)
    fit(module, TaylorFilterPruning(0.4, scope="layer", form=form))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 6}


class SideBranch(Net):
    """A layer whose outputs the loss does not need."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.side, self.last = nn.Linear(10, 4), nn.Linear(4, 2)

    def forward(self, images):
        x = F.relu(self.second(F.relu(self.norm(self.first(images))))).mean(dim=(2, 3))
        x = F.relu(self.hidden(x))
        self.aside = self.last(F.relu(self.side(x)))
        return self.head(x), self.aside

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("form", FORMS)
def test_units_that_the_loss_does_not_need_leave_first(form):
    """A branch without gradients is worth nothing: it loses all but one of its units, and the run goes on."""
    module = net(SideBranch)
    fit(module, TaylorFilterPruning(0.2, scope="global", form=form))
    assert len(module.side.weight) == 1
    assert sum(widths(module).values()) == 24 - math.ceil(0.2 * 28 - 1e-9) + 3


def test_amounts_scopes_and_targets_are_reached():
    """Budgets hold as for every other criterion."""
    for arguments in (
        {"target": "flops"},
        {"target": "params"},
        {"scope": "layer"},
        {"amount": {"first": 0.5}, "scope": "layer"},
    ):
        module = net()
        made = fit(module, TaylorFilterPruning(**{"amount": 0.5, **arguments}))
        kept = made.callback_metrics
        if "target" in arguments:
            assert kept[f"prune/{arguments['target']}_kept"] <= 0.5
        elif "amount" in arguments:
            assert widths(module) == {"first": 4, "second": 6, "hidden": 10}
        else:
            assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_a_loss_that_is_not_a_number_is_told():
    """A cut that was due and not made, since no gradient was finite, is told as such when training ends."""

    class NoNumber(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    module = net(NoNumber)
    with pytest.warns(UserWarning, match="Another was due, but nothing finite was seen to score by: are losses NaN"):
        fit(module, TaylorFilterPruning(0.5, scope="global"))
    assert widths(module) == {"first": 8, "second": 6, "hidden": 10}
