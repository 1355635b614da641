"""Masks and cuts that lie on a part of a model are seen by whoever reads the model, and the other way round."""

import copy
import io
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    OneShot,
    PruningError,
    TaylorFilterPruning,
    apply_masks_,
    hold_masks,
    load_from_checkpoint,
    load_sparse_,
    load_state_dict_,
    prune_filters,
    prune_obs,
    prune_weights,
    save_sparse,
    slim_loading,
)
from lightning_prune.algorithms.selection import number_to_prune
from lightning_prune.cli.runs import load_weights_
from lightning_prune.pruning.exact import prune_exact
from lightning_prune.pruning.fisher import prune_fisher
from lightning_prune.surgery.loading import recipe_json
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.semi_structured import to_semi_structured_

WEIGHTS = 8 * 16 + 16 * 16 + 16 * 3
DATA = DataLoader(TensorDataset(torch.randn(32, 8), torch.arange(32) % 3), 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Lit(pl.LightningModule):
    """The commonest layout: a network inside a LightningModule."""

    def __init__(self, network=None):
        super().__init__()
        self.net = network or net()

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def trainer(*callbacks, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"max_epochs": 2, "accelerator": "cpu", **quiet, **settings}, callbacks=list(callbacks))


def zeros(model):
    return sum(int((weight == 0).sum()) for weight in model.parameters() if weight.dim() > 1)


def masked(model):
    prune_weights(model, 0.6, scope="global")


def slim(model):
    prune_filters(model, torch.randn(1, 8), 0.5)


def masked_and_slim(model):
    masked(model)
    slim(model)


PRUNED = {"masked": masked, "slim": slim, "both": masked_and_slim}
WHERE = {
    "the part before": lambda prune, network: (prune(network), Lit(network))[1],
    "the part within": lambda prune, network: (lit := Lit(network), prune(lit.net))[0],
    "the whole": lambda prune, network: (lit := Lit(network), prune(lit))[0],
}


def by_sparse_file(lit, folder):
    other = Lit()
    save_sparse(lit, folder / "weights.safetensors")
    load_sparse_(other, folder / "weights.safetensors")
    return other


def by_state_dict(lit, folder):
    other = Lit()
    torch.save(lit.state_dict(), folder / "weights.pt")
    load_state_dict_(other, torch.load(folder / "weights.pt", weights_only=True))
    return other


def by_part(lit, folder):
    other = Lit()
    torch.save(lit.net.state_dict(), folder / "weights.pt")
    load_state_dict_(other.net, torch.load(folder / "weights.pt", weights_only=True))
    return other


def by_part_in_sparse_file(lit, folder):
    other = net()
    save_sparse(lit.net, folder / "weights.safetensors")
    load_sparse_(other, folder / "weights.safetensors")
    return Lit(other)


def by_command_line(lit, folder):
    other = Lit()
    torch.save(lit.state_dict(), folder / "weights.pt")
    load_weights_(other, folder / "weights.pt")
    return other


def by_recipe(lit, folder):
    other = Lit()
    load_state_dict_(other, dict(lit.state_dict()), recipe=recipe_json(lit))
    return other


def by_code_of_others(lit, folder):
    save_model(lit.net, folder / "weights.safetensors", {"recipe": recipe_json(lit.net)})
    with safe_open(folder / "weights.safetensors", "pt") as file:
        recipe = file.metadata()["recipe"]
    network = net()
    with slim_loading(recipe):
        load_model(network, folder / "weights.safetensors")
    return Lit(network)


def by_checkpoint(lit, folder):
    made = trainer(max_epochs=1, limit_train_batches=0)
    made.strategy.connect(lit)
    made.save_checkpoint(folder / "lit.ckpt")
    return load_from_checkpoint(Lit, folder / "lit.ckpt")


def by_trainer(lit, folder):
    made = trainer(max_epochs=1, limit_train_batches=0)
    made.strategy.connect(lit)
    made.save_checkpoint(folder / "lit.ckpt")
    other = Lit()
    trainer(FilterL1Pruning(0.5)).test(other, DATA, ckpt_path=folder / "lit.ckpt", verbose=False)
    return other


READERS = [
    by_sparse_file, by_state_dict, by_part, by_part_in_sparse_file, by_command_line, by_recipe, by_code_of_others,
    by_checkpoint, by_trainer,
]  # fmt: skip


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("prune", PRUNED.values(), ids=PRUNED)
@pytest.mark.filterwarnings("ignore")
def test_every_reader_sees_what_lies_on_a_part(prune, where, tmp_path):
    """However it is saved and loaded, a model has the weights, shapes and masks of the one that was pruned."""
    lit = where(prune, net())
    expected = {name: tensor.clone() for name, tensor in lit.state_dict().items()}
    keep = masks_on(lit)
    assert keep.keys() == {f"net.{name}" for name in masks_on(lit.net)}
    assert bool(keep) is (prune is not slim)
    for reader in READERS:
        other = reader(lit, tmp_path)
        found = other.state_dict()
        assert found.keys() == expected.keys(), reader
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), reader
        assert other.net[0].out_features == len(expected["net.0.weight"]), reader
        assert {n: m.tolist() for n, m in masks_on(other).items()} == {n: m.tolist() for n, m in keep.items()}, reader
        optimizer = torch.optim.AdamW(other.parameters(), 0.1)
        if keep:
            before = zeros(other)
            with hold_masks(other, optimizer):
                other(torch.randn(4, 8)).sum().backward()
                optimizer.step()
            assert zeros(other) == before > 0, reader


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_runs_hold_what_lies_on_a_part(where):
    """A run of a smaller amount keeps every zero that it finds; one that goes further counts them."""
    for callback, expected in (
        (IterativeMagnitudePruning(0.3, scope="global"), number_to_prune(0.6, WEIGHTS)),
        (IterativeMagnitudePruning({"net.4": 0.5}), number_to_prune(0.6, WEIGHTS)),
        (IterativeMagnitudePruning(0.8, scope="global", schedule=OneShot(1)), number_to_prune(0.8, WEIGHTS)),
    ):
        lit = where(masked, net())
        trainer(callback).fit(lit, DATA)
        assert zeros(lit) == expected


class Wrapped(nn.Module):
    """A layer beside which another learns."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        self.beside = nn.Linear(8, 16, bias=False)

    def forward(self, inputs):
        return self.base(inputs) + self.beside(inputs)


def with_wrapped_layer(model):
    model[0] = Wrapped(model[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: nn.Sequential(model, nn.Linear(3, 3)),
        lambda model: model[0],
        with_wrapped_layer,
    ],
    ids=["itself", "compiled", "on several devices", "in another", "a part", "around a layer"],
)
def test_masks_are_held_whatever_is_around_them(wrap):
    """Zeros stay zero in training, whatever the pruned model was put into."""
    model = net()
    keep = prune_weights(model, 0.6, scope="global").kept
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    with hold_masks(wrapped, optimizer):
        for _ in range(2):
            wrapped(torch.randn(16, 8)).square().sum().backward()
            optimizer.step()
    held = [p for name, p in wrapped.named_parameters() if "beside" not in name and p.dim() > 1]
    masks = [mask for mask in keep.values() if any(p.shape == mask.shape for p in held)]
    assert sum(int((p == 0).sum()) for p in held) >= sum(int((~mask).sum()) for mask in masks[: len(held)])
    assert all(not p.detach()[~m].any() for p, m in zip(held, keep.values(), strict=False))


def test_nothing_to_hold_is_refused():
    """A model without masks is refused, as are masks for another; those given for a compiled one are its own."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(PruningError, match="Sequential carries no masks"), hold_masks(model, optimizer):
        pass
    with (
        pytest.raises(ValueError, match="has no parameter of this name"),
        hold_masks(model, optimizer, {"9.weight": 1}),
    ):
        pass
    keep = {"0.weight": torch.rand(16, 8) > 0.5}
    with hold_masks(torch.compile(model, backend="eager"), optimizer, keep):
        assert zeros(model) == int((~keep["0.weight"]).sum())


LOADS = {
    "load_state_dict": lambda model, dense: model.load_state_dict(dense),
    "a plain dict": lambda model, dense: model.load_state_dict(dict(dense)),
    "load_state_dict_": lambda model, dense: load_state_dict_(model, dense),
    "in place": lambda model, dense: [p.data.copy_(dense[name]) for name, p in model.named_parameters()],
    "drawn anew": lambda model, dense: [layer.reset_parameters() for layer in model if isinstance(layer, nn.Linear)],
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_dense_weights_end_the_masks(load):
    """Once weights are dense again no mask is told, and what is asked for next is what happens."""
    model = net()
    dense = copy.deepcopy(model.state_dict())
    prune_weights(model, 0.8)
    load(model, dense)
    assert zeros(model) == 0
    assert masks_on(model) == {}
    prune_weights(model, 0.3, scope="global")
    assert zeros(model) == number_to_prune(0.3, WEIGHTS)


OBS = partial(prune_obs, progress=False)
X = [torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
AGAIN = {
    "weights": lambda model, amount: prune_weights(model, amount, scope="global"),
    "obs exact": lambda model, amount: prune_obs(
        model, amount, batches=X, scope="global", solver="exact", progress=False
    ),
    "obs admm": lambda model, amount: OBS(model, amount, batches=X, scope="global"),
    "obs blocked": lambda model, amount: prune_obs(
        model, amount, batches=X, scope="global", solver="blocked", progress=False
    ),
    "obs layers": lambda model, amount: OBS(model, amount, batches=X, scope="layer"),
    "obs in turn": lambda model, amount: prune_obs(
        model, amount, batches=X, scope="global", sequential=True, progress=False
    ),
    "fisher": lambda model, amount: prune_fisher(
        model, amount, batches=X, loss=lambda model, batch: model(batch).square().mean(), progress=False
    ),
}


@pytest.mark.parametrize("amount", [0.3, 0.7])
@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_what_is_zero_stays_zero_in_second_order_pruning(again, amount):
    """A call keeps every zero of the one before and counts it: 2:4 at first, then as many more as are asked for."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    prune_weights(model, pattern="2:4")
    before = {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    again(model, amount)
    after = {name: model.get_parameter(name) == 0 for name in before}
    assert all(after[name][gone].all() for name, gone in before.items())
    assert sum(int(gone.sum()) for gone in after.values()) == number_to_prune(max(amount, 0.5), 256)
    assert {name: (~mask).tolist() for name, mask in masks_on(model).items()} == {
        n: g.tolist() for n, g in after.items()
    }


def test_what_is_zero_stays_zero_in_exact_pruning():
    """Pruning weight by weight goes on from the masks that are there, and is undone if ``accept`` fails."""
    model = nn.Linear(8, 2)
    apply_masks_(model, {"weight": torch.arange(16).view(2, 8) % 2 == 0})
    before = copy.deepcopy(model.state_dict())
    batches = [(x, torch.randn(32, 2)) for x in X]

    def fails(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prune_exact(model, batches=batches, loss=F.mse_loss, accept=fails, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = prune_exact(model, 0.6, batches=batches, loss=F.mse_loss, progress=False)
    assert not model.weight.detach()[:, 1::2].any()
    assert report.params_after == 18 - 11
    assert prune_exact(
        model, batches=batches, loss=F.mse_loss, accept=lambda _: False, progress=False
    ).details.stopped.startswith("accept")


def test_what_is_zero_stays_zero_where_readers_are_refitted():
    """Layers that are refitted after a cut keep their zeros, and change what is left to make up for them."""
    model = net()
    prune_weights(model, 0.5)
    keep = masks_on(model)
    before = copy.deepcopy(model)
    report = prune_filters(model, X[0][:1], 0.3, criterion="obs", scope="global", batches=X, progress=False)
    kept = report.kept
    for name, mask in keep.items():
        for dim, indices in kept.get(name, {}).items():
            mask = mask.index_select(dim, indices)
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert torch.equal(masks_on(model)[name], mask)
    assert any(repair.after < repair.before for repair in report.repairs)
    assert before[0].out_features > model[0].out_features


def test_the_best_checkpoint_is_loaded_into_the_model_at_hand(tmp_path):
    """After a run ``load_state_dict`` takes a checkpoint of the run, fatter than the model is by now."""

    class Best(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "best.ckpt")

    lit = Lit()
    trainer(TaylorFilterPruning(0.5), Best()).fit(lit, DATA)
    assert lit.net[0].out_features < 16
    saved = torch.load(tmp_path / "best.ckpt", weights_only=False)["state_dict"]
    lit.load_state_dict(saved)
    assert lit.net[0].out_features == 16
    assert all(torch.equal(value, saved[name]) for name, value in lit.state_dict().items())


def test_loading_passes_keywords_on():
    """A module whose ``load_state_dict`` takes keywords alone is loaded, too."""

    class Keywords(nn.Sequential):
        def load_state_dict(self, state_dict, **kwargs):
            state_dict = dict(state_dict)
            state_dict.pop("fc.bias", None)
            return super().load_state_dict(state_dict, **kwargs)

    pruned, other = (Keywords(*net()) for _ in range(2))
    slim(pruned)
    load_state_dict_(other, pruned.state_dict(), strict=False)
    assert other[0].out_features == 8
    third = nn.Sequential(*net())
    with slim_loading():
        third.load_state_dict(state_dict=other.state_dict(), strict=True)
    assert third[0].out_features == 8


class One(nn.Sequential):
    """Takes no ``strict``."""

    def load_state_dict(self, state_dict):
        return super().load_state_dict(state_dict)


class Named(nn.Sequential):
    """Takes its arguments by name, and copies the state dict, which loses the metadata."""

    def load_state_dict(self, state_dict, *, strict=True, assign=False):
        return super().load_state_dict(state_dict.copy(), strict=strict, assign=assign)


class Silent(nn.Sequential):
    """Drops what does not fit, and returns nothing."""

    def load_state_dict(self, saved, strict=False):
        own = self.state_dict()
        super().load_state_dict({key: v for key, v in saved.items() if v.shape == own[key].shape}, strict=False)


@pytest.mark.parametrize("kind", [One, Named, Silent])
def test_whatever_the_arguments_of_their_own_loader(kind):
    """Functions of ours call it by what it takes; where it loses the metadata, other code needs the recipe."""
    pruned, other, third = (kind(*net()) for _ in range(3))
    slim(pruned)
    load_state_dict_(other, pruned.state_dict())
    with slim_loading(recipe=recipe_json(pruned)) if kind is Named else slim_loading():
        if kind is not Silent:  # which drops it before anything of ours is called
            third.load_state_dict(pruned.state_dict())
    loaded = [other] if kind is Silent else [other, third]
    for module in loaded:
        assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in module.state_dict().items())


def to_sparse(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)


def to_csr(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)


def to_float8(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def to_quantized(layer):
    quantized = torch.quantize_per_tensor(layer.weight.detach(), 0.01, 0, torch.qint8)
    layer.weight = nn.Parameter(quantized, requires_grad=False)


class Opaque(torch.Tensor):
    """A tensor of another package, that refuses most operators, as quantized weights do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("masked_fill", "to_dense", "any", "dequantize", "float"):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def to_opaque(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Opaque), requires_grad=False)


CONVERSIONS = {
    "sparse": to_sparse,
    "csr": to_csr,
    "float8": to_float8,
    "quantized": to_quantized,
    "opaque": to_opaque,
    "meta": lambda layer: layer.to("meta"),
    "half": lambda layer: layer.half(),
    "complex": lambda layer: layer.to(torch.complex64),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "deleted": lambda layer: delattr(layer, "weight"),
    "of another shape": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(3, 2))),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.filterwarnings("ignore")
def test_whatever_weights_become_a_state_dict_can_be_taken(convert):
    """Masked weights may be converted to anything: state dicts and what reads masks go on without an error."""
    model = net()
    masked(model)
    convert(model[2])
    state = model.state_dict()
    torch.save(state, io.BytesIO())
    others = [name for name in masks_on(model) if name != "2.weight"]
    assert others == ["0.weight", "4.weight"]
    assert to_semi_structured_(model).faster == ()


def test_converted_weights_are_refused_by_name():
    """Weights of a kind that cannot be scored or stored compactly are named, with what they are."""
    model = net()
    to_sparse(model[2])
    with pytest.raises(PruningError, match="2.weight is a tensor of torch.float32, torch.sparse_coo"):
        prune_weights(model, 0.5)
    with pytest.raises(PruningError, match="'2.weight' is torch.sparse_coo, and only dense tensors can be kept"):
        save_sparse(model, "never")
