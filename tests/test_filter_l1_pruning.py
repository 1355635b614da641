"""FilterL1Pruning in real runs: what leaves and when, what is logged, and that training goes on as it should."""

import csv
from collections import OrderedDict
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import Cubic, FilterL1Pruning, Linear, OneShot, count_flops
from tests.runs import (
    CLASSES,
    IMAGE,
    WIDTHS,
    Depthwise,
    Known,
    Net,
    assert_agrees_with_shapes,
    assert_same_weights,
    batches,
    fit,
    images,
    net,
    trainer,
    weights,
    widths,
)


class Watch(Callback):
    """Notes, before every batch and after every epoch, what the model looks like."""

    def __init__(self):
        self.widths, self.params, self.flops, self.logged, self.losses = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.widths.append(widths(pl_module))
            self.params.append(sum(p.numel() for p in pl_module.parameters()))
            self.flops.append(count_flops(pl_module, IMAGE).total)

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("prune/")})
        self.losses.append(float(trainer.callback_metrics["loss"]))


def lowest(norms, count):
    """The indices that stay when the ``count`` smallest norms leave."""
    return sorted(range(len(norms)), key=lambda i: float(norms[i]))[count:]


def pruned_before_training(module, **arguments):
    """The module after a cut and not one step."""
    fit(module, FilterL1Pruning(**arguments), max_steps=1, limit_train_batches=1)
    return module


class Still(Known):
    """Learns at rate 0."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


# What leaves


def test_smallest_filters_leave():
    """In each layer the filters with the smallest sum of absolute weights leave; those that stay keep their values."""
    module = net(Still)
    before = weights(module)
    fit(module, FilterL1Pruning(amount=0.5), max_epochs=1)
    stay = {
        name: sorted(lowest(before[f"{name}.weight"].abs().flatten(1).sum(1), n // 2)) for name, n in WIDTHS.items()
    }
    assert torch.equal(module.first.weight, before["first.weight"][stay["first"]])
    assert torch.equal(module.norm.weight, before["norm.weight"][stay["first"]])
    assert torch.equal(module.second.weight, before["second.weight"][stay["second"]][:, stay["first"]])
    assert torch.equal(module.second.bias, before["second.bias"][stay["second"]])
    assert torch.equal(module.hidden.weight, before["hidden.weight"][stay["hidden"]][:, stay["second"]])
    assert torch.equal(module.head.weight, before["head.weight"][:, stay["hidden"]])
    assert torch.equal(module.head.bias, before["head.bias"])


def test_global_scope_compares_layers():
    """With ``scope="global"`` the norms, divided by their layer's mean, are compared across layers."""
    module = net(Still)
    relative = {}
    for name in WIDTHS:
        norms = module.get_submodule(name).weight.detach().abs().flatten(1).sum(1)
        relative |= {(name, i): float(norm / norms.mean()) for i, norm in enumerate(norms)}
    left = sorted(relative, key=relative.get)[12:]
    fit(module, FilterL1Pruning(amount=0.5, scope="global"), max_epochs=1)
    assert widths(module) == {name: sum(layer == name for layer, _ in left) for name in WIDTHS}


@pytest.mark.parametrize("target", ["params", "flops"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", [Net, Depthwise])
def test_budget_is_reached(target, scope, kind):
    """With a target of parameters or FLOPs, training ends at the budget or just below it, as counted."""
    module = net(kind)
    dense = {"params": sum(p.numel() for p in module.parameters()), "flops": count_flops(module, IMAGE).total}
    fit(module, FilterL1Pruning(amount=0.5, target=target, scope=scope, schedule=Cubic(0, 2)))
    left = {"params": sum(p.numel() for p in module.parameters()), "flops": count_flops(module, IMAGE).total}
    assert 0.3 < left[target] / dense[target] <= 0.5
    assert_agrees_with_shapes(module)


def test_amounts_by_pattern():
    """Amounts by pattern hold for the layers they name; the others stay whole."""
    module = net()
    fit(module, FilterL1Pruning(amount={"first": 0.75, "hid*": 0.5}, schedule=Linear(0, 2)))
    assert widths(module) == {"first": 2, "second": 6, "hidden": 5}


def test_ignored_layers_stay():
    """Layers named in ``ignore`` keep all their filters."""
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, ignore=["sec*", "hidden"]))
    assert widths(module) == {"first": 4, "second": 6, "hidden": 10}


def test_widths_are_rounded():
    """With ``round_to`` widths after every cut are multiples of it, and no less is kept than asked."""
    watch = Watch()
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, round_to=4, schedule=Linear(0, 2)), watch)
    assert watch.widths[-1] == widths(module) == {"first": 4, "second": 4, "hidden": 8}
    assert all(width % 4 == 0 or width == WIDTHS[name] for seen in watch.widths for name, width in seen.items())


# When


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
@pytest.mark.parametrize(
    "schedule, first",
    [
        (None, [4, 4, 4, 4, 4]),
        (OneShot(2), [8, 8, 4, 4, 4]),
        (Linear(1, 4), [8, 7, 6, 5, 4]),
        (Linear(0, 3, every=2), [6, 6, 5, 4, 4]),
        (Cubic(0, 2), [5, 4, 4, 4, 4]),
    ],
    ids=str,
)
def test_schedule_sets_the_moment(schedule, first, kind):
    """What is due at an epoch has left before its first batch, of 8 filters half."""
    watch = Watch()
    fit(net(kind), FilterL1Pruning(amount=0.5, schedule=schedule), watch, max_epochs=5)
    assert [seen["first"] for seen in watch.widths] == first


def test_max_steps():
    """A run that is bounded by steps is pruned by epochs, too."""
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)), max_epochs=-1, max_steps=9)
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_endless_data():
    """A loader without a length works."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images())

    module = net()
    made = trainer(FilterL1Pruning(amount=0.5, schedule=Linear(0, 1)), max_steps=10, max_epochs=-1)
    made.fit(module, DataLoader(Endless(), 8))
    assert widths(module)["first"] == 4


# What is logged


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
def test_logged_values_are_those_of_the_model(kind):
    """Every epoch from the first logs params, FLOPs, their shares of the dense model and the share of filters gone."""
    watch = Watch()
    module = net(kind)
    params, flops = sum(p.numel() for p in module.parameters()), count_flops(module, IMAGE).total
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(1, 3)), watch, max_epochs=5)
    assert [logged["prune/params"] for logged in watch.logged] == watch.params
    assert [logged["prune/flops"] for logged in watch.logged] == watch.flops
    for logged, seen in zip(watch.logged, watch.widths, strict=True):
        assert logged["prune/params_kept"] == pytest.approx(logged["prune/params"] / params)
        assert logged["prune/flops_kept"] == pytest.approx(logged["prune/flops"] / flops)
        assert logged["prune/sparsity"] == pytest.approx(1 - sum(seen.values()) / 24)
    assert watch.logged[0]["prune/sparsity"] == 0 and watch.logged[-1]["prune/sparsity"] == pytest.approx(0.5)


def test_loggers_and_monitors_see_the_values(tmp_path):
    """A logger writes them once an epoch; ModelCheckpoint and EarlyStopping can monitor them."""
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="prune/flops_kept", save_top_k=-1, mode="min")
    stop = EarlyStopping("prune/sparsity", mode="max", patience=10, stopping_threshold=0.45)
    logger = CSVLogger(tmp_path)
    made = fit(
        net(), FilterL1Pruning(amount=0.5, schedule=Linear(0, 3)), saved, stop,
        val=True, logger=logger, enable_checkpointing=True, max_epochs=6, log_every_n_steps=1,
    )  # fmt: skip
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("prune/params")]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]  # 0.5 is reached at epoch 3: EarlyStopping stops
    assert made.current_epoch == 4
    sparsities = [float(row["prune/sparsity"]) for row in rows]
    assert sparsities == sorted(sparsities) and sparsities[0] > 0 and sparsities[-1] == pytest.approx(0.5)
    assert [float(score) for score in saved.best_k_models.values()] == pytest.approx(
        [float(row["prune/flops_kept"]) for row in rows]
    )
    assert saved.best_model_path.endswith("epoch=3.ckpt")


def test_table_shows_the_widths(capsys):
    """At the end of training a table shows what became of every layer."""
    fit(net(), FilterL1Pruning(amount=0.5))
    shown = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "Left: 32.7% of params, 31.8% of FLOPs" in shown
    assert "8 → 4" in lines["first"] and "6 → 3" in lines["second"] and "10 → 5" in lines["hidden"]
    assert "33 → 18" in lines["head"] and "5,184 → 2,592" in lines["first"]


# Training goes on


@pytest.mark.parametrize("kind", [Net, Known, Depthwise])
def test_loss_falls(kind):
    """The loss goes on falling while the network becomes smaller."""

    class Trained(kind):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01)

    watch = Watch()
    fit(net(Trained, dropout=0.0), FilterL1Pruning(amount=0.4, schedule=Linear(2, 6)), watch, max_epochs=12)
    assert watch.losses[-1] < 0.6 * watch.losses[0]


def test_pruned_layers_keep_learning():
    """After a cut every parameter still moves, at its new shape."""
    module = net(dropout=0.0)
    fit(module, FilterL1Pruning(amount=0.5), max_epochs=1)
    before = weights(module)
    fit(module, FilterL1Pruning(amount=0.0), max_epochs=2)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_follows(name):
    """From a cut on, training goes on as a network that had been slim all along, with the momentum of what stayed."""
    states = []

    class Trained(Net):
        def configure_optimizers(self):
            return OPTIMIZERS[name](self.parameters())

    class TakeTwin(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                (optimizer,) = trainer.optimizers
                state = {n: dict(optimizer.state[p]) for n, p in pl_module.named_parameters()}
                states.append((weights(pl_module), {n: {k: v.clone() for k, v in s.items()} for n, s in state.items()}))

    module = net(Trained, dropout=0.0)
    module.example_input_array = IMAGE
    fit(module, FilterL1Pruning(amount=0.5, schedule=OneShot(2)), TakeTwin(), max_epochs=4)
    ((start, state),) = states
    twin = Trained(dropout=0.0)
    twin.first, twin.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    twin.second, twin.hidden, twin.head = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(3, 5), nn.Linear(5, CLASSES)
    twin.load_state_dict(start)

    class GiveState(Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            for n, parameter in pl_module.named_parameters():
                optimizer.state[parameter].update(state[n])

    fit(twin, GiveState(), max_epochs=2)
    for key, value in weights(twin).items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_cut_changes_no_more_than_it_must():
    """A unit whose outgoing weights are zero leaves without changing what the network computes."""
    module = net(Known).eval()
    with torch.no_grad():
        module.first.weight[[1, 3, 4, 6]] *= 1e-3
        module.second.weight[:, [1, 3, 4, 6]] = 0
    x = torch.randn(4, *IMAGE.shape[1:])
    expected = module(x)
    module.train()
    made = trainer(FilterL1Pruning(amount={"first": 0.5}), max_epochs=1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    made.fit(module, batches(8))
    module.eval()
    module.norm.running_mean.zero_(), module.norm.running_var.fill_(1.0)
    assert widths(module)["first"] == 4
    torch.testing.assert_close(module(x), expected)


SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "clip-norm": {"gradient_clip_val": 0.1},
    "clip-value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "barebones": {"barebones": True, "enable_model_summary": None, "enable_progress_bar": None, "logger": None,
                  "enable_checkpointing": None, "num_sanity_val_steps": None},
    "deterministic": {"deterministic": True},
    "anomalies": {"detect_anomaly": True},
    "inference-mode-off": {"inference_mode": False},
    "val-within-epoch": {"val_check_interval": 2},
    "limit-batches": {"limit_train_batches": 2},
    "overfit": {"overfit_batches": 1},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "sanity": {"num_sanity_val_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_works_with_the_trainers_settings(setting, kind):
    """Pruning works under each of the Trainer's settings, and the loss stays finite."""
    if setting == "deterministic":
        before = torch.are_deterministic_algorithms_enabled()
    module = net(kind)
    made = fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)), val=True, **SETTINGS[setting])
    if setting == "deterministic":
        torch.use_deterministic_algorithms(before)
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert_agrees_with_shapes(module)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    if setting != "barebones":
        assert made.callback_metrics["prune/sparsity"] == 0.5


def of_plateau(optimizer, monitor):
    return {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "monitor": monitor}


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 2), [0.05, 0.05, 0.005, 0.005, 0.0005]),
        (
            lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 8), "interval": "step"},
            [0.05, 0.05, 0.005, 0.005, 0.0005],
        ),
        (lambda o: of_plateau(o, "prune/flops"), [0.05, 0.05, 0.05, 0.05, 0.05]),  # falls until epoch 3
        (lambda o: of_plateau(o, "prune/sparsity"), [0.05, 0.05, 0.005, 0.0005, 0.00005]),  # rises
    ],
    ids=["epoch", "step", "plateau-of-flops", "plateau-of-sparsity"],
)
def test_learning_rate_schedules_go_on(make, expected):
    """Learning rates follow their schedule, which may watch what is logged of the pruning."""

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": make(optimizer)}

    rates = []

    class Note(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = net(Scheduled)
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 3)), Note(), max_epochs=5)
    assert rates == pytest.approx(expected)
    assert widths(module)["first"] == 4


class Quiet(Known):
    """Logs nothing, which dynamo does not understand."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class CompiledInTheClass(Known):
    forward = torch.compile(Known.forward, backend="eager")


def compiled_whole(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def compiled_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def compiled_part(module):
    module.second = torch.compile(module.second, backend="eager")
    return module


def unchanged(module):
    return module


@pytest.mark.parametrize(
    "kind, compiled",
    [
        (Quiet, compiled_whole),
        (Known, compiled_in_place),
        (Known, compiled_forward),
        (Known, compiled_part),
        (CompiledInTheClass, unchanged),
    ],
)
def test_compiled_models(kind, compiled):
    """A compiled model is pruned as a plain one, and stays compiled."""
    plain, module = net(Known, dropout=0.0), net(kind, dropout=0.0)
    fit(plain, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)))
    given = compiled(module)
    forward, called = module.forward, module._compiled_call_impl
    fit(given, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)))
    for value, found in zip(weights(plain).values(), weights(module).values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert module._compiled_call_impl is called
    assert compiled is compiled_whole or module.forward == forward  # Lightning compiles, and takes back, the whole


def test_beside_the_learning_rate_finder(tmp_path, monkeypatch):
    """LearningRateFinder, which saves and restores the model before training, does not disturb."""
    monkeypatch.chdir(tmp_path)
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 1)), LearningRateFinder(num_training_steps=3))
    assert widths(module)["first"] == 4


# What forward takes


class Parts(Dataset):
    """One example is whatever ``make`` makes of an image and its label."""

    def __init__(self, make):
        self.make, self.images = make, images(16)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.make(*self.images[index])


class Takes(pl.LightningModule):
    """Learns from ``step(module, batch) -> loss``; forward is ``call(module, ...)``."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 8, 3), nn.Linear(8, CLASSES)

    def score(self, x):
        return self.head(F.relu(self.first(x)).mean(dim=(2, 3)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class TakesTensor(Takes):
    def forward(self, x):
        return self.score(x)

    def training_step(self, batch, _):
        return self(batch).square().mean()


class TakesPair(Takes):
    def forward(self, x, y):
        return F.cross_entropy(self.score(x), y)

    def training_step(self, batch, _):
        return self(*batch)


class TakesNames(Takes):
    def forward(self, *, pixels, labels=None):
        scores = self.score(pixels)
        return {"logits": scores, "loss": None if labels is None else F.cross_entropy(scores, labels)}

    def training_step(self, batch, _):
        return self(pixels=batch["pixels"], labels=batch["labels"])["loss"]


class TakesAnyNames(TakesNames):
    def forward(self, **inputs):
        return SimpleNamespace(**super().forward(pixels=inputs["pixels"], labels=inputs.get("labels")))

    def training_step(self, batch, _):
        return self(**batch).loss


class TakesDict(Takes):
    def forward(self, batch):
        return OrderedDict(loss=F.cross_entropy(self.score(batch["pixels"]), batch["labels"]))

    def training_step(self, batch, _):
        return self(batch)["loss"]


class TakesList(Takes):
    def forward(self, x):
        return [self.score(part) for part in x]

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0])[0], batch[1])


class TakesBatch(Takes):
    """Needs more than one example at once."""

    def forward(self, x):
        if len(x) < 2:
            raise ValueError("one is too few")
        return self.score(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])


class Says(Takes):
    def forward(self, batch):
        return self.score(batch[0][0])

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch), batch[1])


KINDS = {
    "tensor": (TakesTensor, lambda x, y: x),
    "pair": (TakesPair, lambda x, y: (x, y)),
    "names": (TakesNames, lambda x, y: {"pixels": x, "labels": y, "index": 3}),
    "any-names": (TakesAnyNames, lambda x, y: {"pixels": x, "labels": y}),
    "dict": (TakesDict, lambda x, y: {"pixels": x, "labels": y}),
    "list": (TakesList, lambda x, y: ([x, x], y)),
    "whole-batch": (TakesBatch, lambda x, y: (x, y)),
    "whole-tuple": (Says, lambda x, y: ((x, x), y)),
}


@pytest.mark.parametrize("kind, make", KINDS.values(), ids=KINDS)
def test_forward_is_found_in_the_first_batch(kind, make):
    """What forward takes is found in the first batch, whether it is a tensor, a tuple or named parts."""
    module = net(kind)
    made = trainer(FilterL1Pruning(amount=0.5), max_epochs=2)
    made.fit(module, DataLoader(Parts(make), 4))
    assert len(module.first.weight) == 4
    assert made.callback_metrics["prune/sparsity"] == 0.5


@pytest.mark.parametrize(
    "inputs", [IMAGE, (IMAGE,), [IMAGE], {"images": IMAGE}], ids=["tensor", "tuple", "list", "dict"]
)
@pytest.mark.parametrize("where", ["argument", "module"])
def test_example_inputs(inputs, where):
    """Example inputs are a tensor, positional inputs or named ones, of the argument or of the module."""
    module = net()
    if where == "module":
        module.example_input_array = inputs
    fit(module, FilterL1Pruning(amount=0.5, example_inputs=inputs if where == "argument" else None))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_argument_wins_over_the_module():
    """FLOPs are those of one call on the callback's own example inputs, where it has any."""
    module = net(Known)
    made = fit(module, FilterL1Pruning(amount=0.0, example_inputs=torch.zeros(3, *IMAGE.shape[1:])))
    assert made.callback_metrics["prune/flops"] == 3 * count_flops(module, IMAGE).total


def test_one_example_of_the_batch_is_counted():
    """FLOPs found on the first batch are those of one example."""
    module = net()
    made = fit(module, FilterL1Pruning(amount=0.0))
    assert made.callback_metrics["prune/flops"] == count_flops(module, IMAGE).total


def test_example_inputs_stay():
    """Pruning does not change the example inputs, nor move them."""
    inputs = torch.randn(2, *IMAGE.shape[1:], dtype=torch.float32)
    before = inputs.clone()
    fit(net(), FilterL1Pruning(amount=0.5, example_inputs=inputs), precision="64-true")
    assert torch.equal(inputs, before) and inputs.dtype == torch.float32


def test_tied_weights_stay_tied():
    """Parameters that were one stay one."""

    class Tied(Net):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.back = nn.Linear(10, 6, bias=False)
            self.again = nn.Linear(10, 6, bias=False)
            self.again.weight = self.back.weight

        def forward(self, images):
            x = F.relu(self.second(F.relu(self.norm(self.first(images))))).mean(dim=(2, 3))
            hidden = F.relu(self.hidden(x))
            return self.head(F.relu(self.hidden(self.back(hidden) + self.again(hidden))))

    module = net(Tied)
    fit(module, FilterL1Pruning(amount=0.5))
    assert module.again.weight is module.back.weight
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_trained_model_is_pruned_and_tuned():
    """Pruning a trained model and training on costs little: the loss returns to where it was."""
    module = net(dropout=0.0)
    before, after = Watch(), Watch()
    fit(module, before, max_epochs=10)
    fit(module, FilterL1Pruning(amount=0.3), after, max_epochs=10)
    assert after.losses[-1] < 1.1 * before.losses[-1] + 0.05


def test_weights_are_the_same_each_time():
    """Two runs from one seed end at the same weights."""
    one, two = net(), net()
    for module in (one, two):
        fit(module, FilterL1Pruning(amount=0.5, target="flops", scope="global", schedule=Cubic(0, 2)))
    assert_same_weights(one, weights(two))
