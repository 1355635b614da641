"""Running a model leaves no trace: whatever its forward pass changes is as it was, to the last bit."""

import copy
import os
import random
import signal
import threading
import time
import warnings
from contextlib import suppress

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import (
    FilterL1Pruning,
    OneShot,
    PruningError,
    count_flops,
    prune_filters,
    prune_obs,
    recalibrate_batch_norm,
    sensitivity,
)
from lightning_prune.analysis.criterion_comparison import compare_criteria
from lightning_prune.analysis.latency_comparison import compare_latency
from lightning_prune.measure.gradients import batch_gradients
from lightning_prune.model.sandbox import remembered_once, unchanged, undisturbed
from lightning_prune.pruning.fisher import prune_fisher
from lightning_prune.surgery import find_groups
from tests.mutations import MUTATIONS, PRECISION, Mutation, batch_of, made, picture
from tests.test_interruption import Interruption

PRUNED = ("first", "norm", "middle", "head")  # what pruning may change of the networks
ALWAYS = [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def mutations(every, start=0):
    return MUTATIONS[start::every]


def loss(model, batch):
    return F.cross_entropy(model(batch), torch.arange(4) % 3)


def scored(criterion):
    return lambda net, batch: prune_filters(
        net, (batch,), 0.5, criterion=criterion, batches=[(batch,)], loss=lambda m, b: loss(m, b[0]), progress=False
    )


def another():
    with torch.random.fork_rng():
        return made(MUTATIONS[0])


ACTIONS = {
    "count_flops": lambda net, batch: count_flops(net, (batch,)),
    "find_groups": lambda net, batch: find_groups(net, (batch,)),
    "prune_filters": lambda net, batch: prune_filters(net, (batch,), 0.5, progress=False),
    "latency": lambda net, batch: prune_filters(net, (batch,), 0.1, target="latency", progress=False),
    "taylor": scored("taylor"),
    "activations": scored("activation_mean"),
    "second order": scored("obd_hutchinson"),
    "obs": lambda net, batch: prune_obs(net, 0.3, batches=[(batch,)], progress=False),
    "fisher": lambda net, batch: prune_fisher(
        net, 0.3, batches=[(batch["images"], torch.zeros(4))], loss=lambda m, b: m(b[0]).square().mean(),
        ignore=["slow"], progress=False
    ),
    "sensitivity": lambda net, batch: sensitivity(
        net, (batch,), lambda m: float(m(batch_of()).sum()), shares=[0.5], progress=False
    ),
    "compare_criteria": lambda net, batch: compare_criteria(
        net, (batch,), criteria=["l1", "taylor"], batches=[batch], loss=loss, progress=False
    ),
    "compare_latency": lambda net, batch: compare_latency(net, another(), (batch,), progress=False),
    "recalibrate": lambda net, batch: recalibrate_batch_norm(net, [(batch,)]),
}  # fmt: skip
QUICK = ("count_flops", "find_groups", "prune_filters", "taylor", "obs")


def beside(lines, pruned=PRUNED):
    """Return the lines of a picture about everything that pruning leaves alone."""
    own = tuple(f"root0._modules.key '{name}'" for name in pruned)
    return [line for line in lines if not line.startswith(own) and "_state_dict_" not in line]


def attempt(action, net, batch):
    """Do it; a network that cannot be traced or pruned may be refused, which must leave it whole, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action(net, batch)
        except (PruningError, ValueError, RuntimeError, TypeError, IndexError, AttributeError, KeyError):
            return False
    return True


@pytest.mark.parametrize("wide", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("when", ["always", "late", "raises"])
def test_whatever_a_forward_pass_changes_is_undone(wide, when):
    """Nearly three hundred passes that each change something else: network, inputs and process are as they were."""
    assert len(MUTATIONS) > 250
    for mutation in mutations(5, ("always", "late", "raises").index(when)):
        net, batch = made(mutation, wide, when), batch_of()
        before = picture(net, batch)
        with undisturbed(net, batch):
            try:
                net(batch)
                net(batch)
            except (ValueError, RuntimeError, AttributeError, TypeError, KeyError):
                assert when != "always" or "gone" in mutation.name or mutation.name in ("t_", "class of an object")
        assert picture(net, batch) == before, mutation.name


@pytest.mark.parametrize("when", ["always", "late", "raises"])
def test_a_state_that_is_noted_once_is_restored_every_time(when):
    """Inside one block, each of several passes that change something starts from the same state, and leaves it."""
    for mutation in mutations(5, ("always", "late", "raises").index(when) + 1):
        net, batch = made(mutation, when=when), batch_of()
        before, during = picture(net, batch), []
        with remembered_once(net):
            for _ in range(3):
                with undisturbed(net, batch):
                    during.append(picture(net, batch, identities=False))
                    with suppress(ValueError, RuntimeError, AttributeError, TypeError, KeyError):
                        net(batch)
                        net(batch)
                assert picture(net, batch) == before, mutation.name
        assert during[0] == during[1] == during[2], mutation.name


def test_a_body_inside_another_restores_what_it_finds_there():
    """A state that was noted once is that of the model outside of all bodies; inside of one, another is noted."""
    net, batch = made(MUTATIONS[0]), batch_of()
    before = picture(net, batch)
    with remembered_once(net):
        for _ in range(2):
            with undisturbed(net, batch):
                net.count = 7
                for _ in range(2):
                    with undisturbed(net, batch):
                        net.count = 8
                    assert net.count == 7
            assert picture(net, batch) == before


def test_a_block_notes_anew_what_changed_before_it():
    """What a block has noted ends with it: what changes between two blocks stays changed."""
    net, batch = made(MUTATIONS[0]), batch_of()
    for value in (1, 2):
        with torch.no_grad():
            net.first.weight.fill_(value)
        with remembered_once(net), undisturbed(net, batch), torch.no_grad():
            net.first.weight.zero_()
        assert (net.first.weight == value).all()


@pytest.mark.parametrize("every", ALWAYS)
@pytest.mark.parametrize("name", ACTIONS)
def test_no_function_leaves_a_trace(name, every):
    """What runs the model changes of it what it says alone, and nothing of inputs, classes, files or the process."""
    if every > 1:
        every = 41 if name in QUICK else 97 if name != "latency" else 250
    done = 0
    for place, mutation in enumerate(mutations(every, list(ACTIONS).index(name) % every)):
        net, batch = made(mutation, wide=name == "latency" or place % 5 == 4), batch_of()
        before, width = picture(net, batch), len(net.slow.weight)
        done += attempt(ACTIONS[name], net, batch)
        # A forward pass that ties the other encoder to the first makes it one of those that are pruned.
        pruned = PRUNED if len(net.slow.weight) == width else (*PRUNED, "slow")
        assert beside(picture(net, batch), pruned) == beside(before, pruned), mutation.name
    assert done or name == "latency"  # whether so much of it can go, a busy machine decides


@pytest.mark.parametrize("name", ["prune_filters", "count_flops", "obs", "taylor"])
def test_a_refusal_leaves_no_trace(name):
    """A model whose forward fails after it has changed something is refused, and all is as it was."""
    for mutation in mutations(37):
        net, batch = made(mutation, when="raises"), batch_of()
        before = picture(net, batch)
        assert not attempt(ACTIONS[name], net, batch)
        assert picture(net, batch) == before, mutation.name


class Lit(pl.LightningModule):
    """Trains the network of a mutation."""

    def __init__(self, mutation):
        super().__init__()
        self.net = made(mutation)

    def forward(self, batch):
        return self.net(batch)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


class Look(pl.Callback):
    """Draws a picture at the end of the first epoch, before anything is pruned."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            lines = picture(pl_module.net, identities=False)
            self.lines = [line for line in lines if "_state_dict_" not in line]
            trainer.should_stop = True


def trained(mutation, *callbacks):
    """Return what the first epoch of a run leaves of a network, and of the process."""
    pl.seed_everything(1, verbose=False)
    module = Lit(mutation)
    batches = DataLoader([batch_of()] * 3, batch_size=None, collate_fn=copy.deepcopy)
    look = Look()
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[look, *callbacks], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    return look.lines


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("traced", ["forward", "training_step"])
@pytest.mark.parametrize("every", [pytest.param(73, id="some"), pytest.param(2, id="all", marks=pytest.mark.slow)])
def test_a_run_goes_on_as_if_nothing_had_been_traced(every, traced):
    """A callback whose cut is yet to come leaves the training of a network that changes itself as it is without it."""
    compared = 0
    for mutation in mutations(every):
        runs = []
        for callback in (False, False, True):
            pruning = [FilterL1Pruning(0.5, schedule=OneShot(2), trace=traced)] if callback else []
            state = getattr(torch.backends.cudnn, PRECISION), torch.is_grad_enabled(), torch.get_default_dtype()
            with unchanged(*classes_and_globals()), undisturbed(nn.ReLU()), torch.enable_grad():
                try:
                    runs.append(trained(mutation, *pruning))
                except Exception as error:
                    runs.append(type(error).__name__)
            assert state == (
                getattr(torch.backends.cudnn, PRECISION),
                torch.is_grad_enabled(),
                torch.get_default_dtype(),
            )
        if isinstance(runs[0], list) and runs[0] == runs[1] and isinstance(runs[2], list):
            assert runs[2] == runs[0], mutation.name
            compared += 1
    assert compared > len(mutations(every)) / 3


def classes_and_globals():
    return [made(MUTATIONS[0])]


# What a single pass can do beside


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.count = 0
        self.kept = torch.zeros(2)

    def forward(self, x):
        self.count += 1
        self.kept += 1
        return self.linear(x)


def test_scripted_modules_are_restored():
    """Numbers and tensors that TorchScript keeps are as they were."""
    model = torch.jit.script(Scripted())
    with undisturbed(model):
        model(torch.zeros(1, 3))
        assert (model.count, model.kept.tolist()) == (1, [1, 1])
    assert (model.count, model.kept.tolist()) == (0, [0, 0])


def test_large_tensors_are_copied_only_if_written_to():
    """A model that writes nothing costs no memory for its large weights; one that does costs that of what it writes."""
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 500))
    made_here = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.clone.default, torch.ops.aten.cat.default):
                made_here.append(out.nbytes)
            return out

    with Sizes(), undisturbed(model):
        model(torch.zeros(1, 500))
    assert max(made_here) < 2**16
    before = model[0].weight.detach().clone()
    with Sizes(), undisturbed(model):
        model[0].weight.zero_()
    assert made_here.count(before.nbytes) == 1
    assert torch.equal(model[0].weight, before)


def test_inputs_made_in_inference_mode_are_restored():
    """Inputs that an outer inference mode made, which a pass inside it changes, are as they were."""
    with torch.inference_mode():
        images = torch.ones(2, 3)

    class Doubles(nn.Module):
        def forward(self, x):
            with torch.inference_mode():
                x.mul_(2)
            return x.clone()

    with undisturbed(Doubles(), images):
        Doubles()(images)
        assert images.sum() == 12
    assert images.sum() == 6


def test_what_threads_share_is_left_alone():
    """Objects with locks may be written to by other threads meanwhile; of them nothing is taken back."""
    model = nn.Linear(2, 2)
    model.shared = type("Shared", (), {})()
    model.shared.lock, model.shared.count = threading.Lock(), 0
    with undisturbed(model):
        model.shared.count = 1
    assert model.shared.count == 1


def test_a_seed_may_be_set_and_a_device_chosen():
    """The default device, and seeds, are as they were, whatever a pass sets them to."""
    model = nn.Linear(2, 2)
    torch.manual_seed(4)
    expected = torch.rand(3), random.random(), np.random.rand()
    for device in (None, "cpu"):
        torch.manual_seed(4)
        state, numbers = random.getstate(), np.random.get_state()
        torch.set_default_device(device)
        with undisturbed(model):
            torch.manual_seed(9)
            torch.set_default_device("meta")
            random.seed(9)
            np.random.seed(9)
        assert torch.zeros(1).device.type == "cpu"
        assert torch.equal(torch.rand(3), expected[0])
        assert (state, numbers[1].tolist()) == (random.getstate(), np.random.get_state()[1].tolist())
        torch.set_default_device(None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("every", [pytest.param(101, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_an_error_at_any_line_leaves_no_trace(error, every):
    """Raised at any line of the package, restoring included, an error leaves model, inputs and process as they were."""

    def change(net, batch, images):
        net.helper()
        net.items.append(1)
        net.dict.pop("a", None)
        net.slow.weight.data.mul_(2)
        net.big.add_(1)
        net.held.count += 1
        images.add_(1)
        batch["seen"] = 1
        torch.rand(1)
        torch.set_default_dtype(torch.float64)
        torch.set_default_dtype(torch.float32)

    net, batch = made(Mutation("", change), wide=True), batch_of()
    before = picture(net, batch)
    with Interruption(10**9, error) as never, undisturbed(net, batch):
        net(batch)
    lines = 10**9 - never.left
    at = 1
    while True:
        interruption = Interruption(at, error)
        try:
            with interruption, undisturbed(net, batch):
                net(batch)
        except error:
            assert interruption.raised
        if not interruption.raised:
            break
        assert picture(net, batch) == before, at
        at += every
    assert 500 < at <= lines + every  # what was interrupted leaves no work behind for later passes


@pytest.mark.slow  # its moments are of chance, and a signal may reach the test itself
@pytest.mark.parametrize("times", [20, 400])
def test_ctrl_c_at_any_moment_leaves_no_trace(times, request):
    """Real signals, sent again and again at random moments, raise KeyboardInterrupt, and all is as it was."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")

    def change(net, batch, images):
        net.items.append(1)
        net.big.add_(1)
        net.slow.weight.data.mul_(2)
        images.add_(1)

    handler = signal.default_int_handler
    ours = signal.signal(signal.SIGINT, handler)  # a shell ignores the signal for what it runs in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    net, batch = made(Mutation("", change), wide=True), batch_of()
    before, draw = picture(net, batch), random.Random(1)
    interrupted = []

    def go():
        try:
            with undisturbed(net, batch):
                net(batch)
        except KeyboardInterrupt as error:
            interrupted.append(error)

    def send(stop, waits):
        time.sleep(waits)
        for _ in range(3):
            if not stop.is_set():
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.0005)

    for _ in range(times):
        stop = threading.Event()
        sender = threading.Thread(target=send, args=(stop, draw.random() * 0.006))
        with suppress(KeyboardInterrupt):  # of later signals
            sender.start()
            go()
        _settle(stop, sender)
        assert picture(net, batch) == before
        assert signal.getsignal(signal.SIGINT) is handler
    assert interrupted


def _settle(stop, sender):
    """Wait until no more signals come."""
    while True:
        try:
            stop.set()
            sender.join()
            time.sleep(0.001)
        except KeyboardInterrupt:
            continue
        return


def test_gradients_are_taken_where_they_are_wanted():
    """Inside, gradients can still be asked for, and the model's own stay as they were."""
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    with undisturbed(model), torch.enable_grad():
        found = batch_gradients(model, torch.ones(1, 2), lambda m, x: m(x).sum())
        model(torch.ones(1, 2)).sum().backward()
    assert found["weight"].tolist() == [[1, 1]]
    assert model.weight.grad.tolist() == [[1, 1]] and model.bias.grad is None


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_are_copied_where_they_are_updated(kind, training):
    """A norm writes to its statistics in train mode alone, and there they are restored."""
    norm = kind(2**15, affine=False, track_running_stats=True)
    mean, before = norm.running_mean, norm.running_mean.clone()
    with undisturbed(norm):
        norm.train(training)
        norm(torch.randn(2, 2**15, 2, 1))
        assert torch.equal(norm.running_mean, before) != training
    assert norm.running_mean is mean
    assert torch.equal(norm.running_mean, before)
