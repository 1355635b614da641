"""LightningModules as people write them: every callback prunes the network that was meant, and files tell it.

The default run takes each layout once, with another callback each time, and each callback at least twice; the slow one
takes all of both.
"""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    Linear,
    OBSOneShot,
    OneShot,
    TaylorFilterPruning,
    load_from_checkpoint,
    load_state_dict_,
    prune_filters,
    prune_obs,
    prune_weights,
    slim_loading,
)
from lightning_prune.surgery.masks import masks_on
from tests.runs import trainer

HIDDEN = 16


def mlp(out=3):
    return nn.Sequential(nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out))


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(3, (32,), generator=generator)), batch_size=8)


class Base(pl.LightningModule):
    """A network inside a LightningModule, the commonest layout."""

    pruned = ("net",)  # where the networks are that shall be pruned
    aside = ()  # what shall stay as it was, bit by bit

    def __init__(self):
        super().__init__()
        self.build()

    def build(self):
        self.net = mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01, momentum=0.9)


class Inside(Base):
    """A network inside a network."""

    pruned = ("model.backbone",)

    def build(self):
        self.model = nn.ModuleDict({"backbone": mlp(HIDDEN), "head": nn.Linear(HIDDEN, 3)})

    def forward(self, x):
        return self.model["head"](self.model["backbone"](x))


class Several(Base):
    """A list of networks."""

    pruned = ("nets.0", "nets.1")

    def build(self):
        self.nets = nn.ModuleList([mlp(), mlp()])

    def forward(self, x):
        return sum(net(x) for net in self.nets)


class Shared(Base):
    """One network under two names."""

    def build(self):
        self.net = self.encoder = mlp()


class Gan(Base):
    """A generator and a discriminator with an optimizer each; the generator is pruned."""

    pruned, aside = ("generator",), ("discriminator",)
    named = "generator"

    def build(self):
        self.generator, self.discriminator = mlp(8), mlp(1)
        self.automatic_optimization = False

    def forward(self, x):
        return self.generator(x)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(self.discriminator(self(batch[0]).detach()).mean())
        first.zero_grad()
        self.manual_backward(-self.discriminator(self(batch[0])).mean())
        first.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.01) for net in (self.generator, self.discriminator)]


class Distilled(Base):
    """A student that learns from a frozen teacher."""

    aside = ("teacher",)

    def build(self):
        self.net, self.teacher = mlp(), mlp().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), self.teacher(batch[0]))


class Untrained(Distilled):
    """A teacher that is not frozen, but that no optimizer has."""

    def build(self):
        self.net, self.teacher = mlp(), mlp()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), self.teacher(batch[0]).detach())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9)


class Averaged(Base):
    """An averaged copy of another network."""

    aside = ("average",)

    def build(self):
        self.net, self.average = mlp(), AveragedModel(mlp())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.01)


class Distance(torchmetrics.Metric):
    """A metric with a network of its own."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.add_state("total", torch.tensor(0.0), "sum")

    def update(self, x):
        self.total += self.net(x).square().mean()

    def compute(self):
        return self.total


class Measured(Base):
    """A metric with a network beside the one that is trained."""

    aside = ("metric.net",)

    def build(self):
        self.net, self.metric = mlp(), Distance().requires_grad_(False)


class Compiled(Base):
    """A part that is compiled."""

    pruned = ("net._orig_mod",)

    def build(self):
        self.net = torch.compile(mlp(), backend="eager")


class Manual(Base):
    """Manual optimization."""

    def build(self):
        super().build()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Late(Base):
    """A network that is built when the Trainer asks for it."""

    def build(self):
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = mlp()


class Tied(Base):
    """An encoder and a decoder with one weight."""

    def build(self):
        self.net = nn.Sequential(nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN))
        self.net[3].weight = self.net[2].weight
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x):
        return self.head(self.net(x))


class Otherwise(Base):
    """A step that trains more than forward runs."""

    def build(self):
        self.net, self.beside = mlp(), nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.beside(self(batch[0])), batch[1])


class Without(Base):
    """No forward at all."""

    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


LAYOUTS = [
    Base, Inside, Several, Shared, Gan, Distilled, Untrained, Averaged, Measured, Compiled, Manual, Late, Tied,
    Otherwise, Without,
]  # fmt: skip
CALLBACKS = {
    "l1": lambda **more: FilterL1Pruning(0.5, schedule=OneShot(1), **more),
    "l2": lambda **more: FilterPruning(0.5, criterion="l2", schedule=Linear(0, 1), **more),
    "taylor": lambda **more: TaylorFilterPruning(0.5, schedule=OneShot(1), **more),
    "magnitude": lambda **more: IterativeMagnitudePruning(0.5, schedule=Linear(0, 1), **more),
    "obs": lambda **more: OBSOneShot(0.5, batches=1, epoch=1, **more),
}
PAIRS = [(layout, name) for layout in LAYOUTS for name in CALLBACKS]
QUICK = {(layout, list(CALLBACKS)[which % len(CALLBACKS)]) for which, layout in enumerate(LAYOUTS)}


def at(module, path):
    return module.get_submodule(path)


def zeros(net):
    return sum(int((p == 0).sum()) for p in net.parameters() if p.dim() > 1)


def assert_pruned(module, by_masks):
    """Half of every network that is meant has gone: of its weights, or of its hidden units."""
    for path in module.pruned:
        net = at(module, path)
        if by_masks:
            sizes = [p.numel() for p in net.parameters() if p.dim() > 1]
            assert zeros(net) == sum(-(-size // 2) for size in sizes)
        else:
            assert net[0].out_features == HIDDEN // 2


def assert_same(module, other):
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert {name: mask.tolist() for name, mask in masks_on(module).items()} == {
        name: mask.tolist() for name, mask in masks_on(other).items()
    }


def built(layout):
    torch.manual_seed(0)
    module = layout()
    module.configure_model()
    return module


def fresh(layout):
    torch.manual_seed(3)
    return layout()


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}", marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in PAIRS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layouts(layout, name, tmp_path):
    """The network is pruned, what is aside stays bit by bit, and every way to load gives the same module."""
    by_masks = name in ("magnitude", "obs")
    module = built(layout)
    before = {path: copy.deepcopy(at(module, path).state_dict()) for path in layout.aside}
    more = {"module": layout.named} if hasattr(layout, "named") else {}
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(CALLBACKS[name](**more), saving, max_epochs=2, enable_checkpointing=True).fit(module, data())
    assert_pruned(module, by_masks)
    for path, state in before.items():
        after = at(module, path).state_dict()
        assert all(torch.equal(value, after[key]) for key, value in state.items())

    path = tmp_path / "epoch=1.ckpt"
    resumed = fresh(layout)  # by the Trainer, in another process's place
    trainer(CALLBACKS[name](**more), max_epochs=2).fit(resumed, data(), ckpt_path=path)
    assert_same(module, resumed)
    tested = fresh(layout)
    trainer(CALLBACKS[name](**more)).test(tested, data(), ckpt_path=path, verbose=False)
    assert_same(module, tested)
    assert_same(module, load_from_checkpoint(layout, path))

    other = fresh(layout)
    other.configure_model()
    for where in layout.pruned:  # a part by itself, as people hand networks over
        buffer = io.BytesIO()
        torch.save(at(module, where).state_dict(), buffer)
        buffer.seek(0)
        load_state_dict_(at(other, where), torch.load(buffer, weights_only=True))
        assert_same(at(module, where), at(other, where))
    third = fresh(layout)
    third.configure_model()
    with slim_loading():
        third.load_state_dict(module.state_dict())
    assert_same(module, third)


FUNCTIONS = {
    "filters": lambda net, x: prune_filters(net, x, 0.5, progress=False),
    "weights": lambda net, x: prune_weights(net, 0.5),
    "obs": lambda net, x: prune_obs(net, 0.5, batches=[x], progress=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", [Inside, Several, Shared, Distilled, Late])
@pytest.mark.filterwarnings("ignore")
def test_functions_prune_parts_of_layouts(layout, name):
    """A network that plain functions pruned trains on inside its module, pruned, and loads like it."""
    module = built(layout)
    for path in layout.pruned:
        FUNCTIONS[name](at(module, path), torch.randn(16, 8))
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    other = fresh(layout)
    other.configure_model()
    load_state_dict_(other, module.state_dict())
    assert_same(module, other)
    held = zeros(module)
    trainer(IterativeMagnitudePruning(0.1), max_epochs=1).fit(module, data())
    assert {key: value.shape for key, value in module.state_dict().items()} == shapes
    assert name == "filters" or zeros(module) >= held


# Two callbacks on two parts


class Two(Base):
    """Two networks of one class."""

    pruned = ("first", "second")

    def build(self):
        self.first, self.second = mlp(), mlp()

    def forward(self, x):
        return self.first(x) + self.second(x)


PAIRED = {
    "filters": lambda first, second: (FilterL1Pruning(0.5, module=first), FilterL1Pruning(0.25, module=second)),
    "weights": lambda first, second: (
        IterativeMagnitudePruning(0.5, module=first),
        IterativeMagnitudePruning(0.25, module=second),
    ),
    "both": lambda first, second: (FilterL1Pruning(0.5, module=first), IterativeMagnitudePruning(0.25, module=second)),
}


@pytest.mark.parametrize("kind", PAIRED)
@pytest.mark.filterwarnings("ignore")
def test_two_callbacks_on_two_parts(kind, tmp_path):
    """Each is logged by its path; keys of their states are those paths, given as a module or as a path."""
    module = built(Two)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(*PAIRED[kind](module.first, module.second), saving, max_epochs=2, enable_checkpointing=True)
    run.fit(module, data())
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    if kind == "filters":
        assert (module.first[0].out_features, module.second[0].out_features) == (8, 12)
        for part in ("first", "second"):
            params = sum(p.numel() for p in getattr(module, part).parameters())
            assert logged[f"prune/params/{part}"] == params
        whole = sum(p.numel() for p in built(Two).parameters())
        assert logged["prune/params_kept"] == pytest.approx(sum(p.numel() for p in module.parameters()) / whole)
    if kind == "weights":
        assert logged["prune/weight_sparsity/first"] == pytest.approx(0.5, abs=0.01)
        assert logged["prune/weight_sparsity/second"] == pytest.approx(0.25, abs=0.01)
        assert logged["prune/weight_sparsity"] == pytest.approx(0.375, abs=0.01)
    keys = [key for key in torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"] if "Pruning" in key]
    assert len(keys) == 2 and all(f"'module': ['{part}']" in " ".join(keys) for part in ("first", "second"))
    resumed = fresh(Two)
    again = PAIRED[kind]("first", "second")
    trainer(*again, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(module, resumed)


@pytest.mark.filterwarnings("ignore")
def test_another_part_is_refused_on_resume(tmp_path):
    """Amounts are relative to a part: a resumed run that names another is refused, with both."""
    module = built(Two)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(FilterL1Pruning(0.5, module="first"), saving, max_epochs=1, enable_checkpointing=True).fit(module, data())
    with pytest.raises(Exception, match=r"module=\['first'\], and this run has module=\['second'\]"):
        trainer(FilterL1Pruning(0.5, module="second"), max_epochs=2).fit(
            fresh(Two), data(), ckpt_path=tmp_path / "epoch=0.ckpt"
        )
