"""Weights that share values: chosen well and reproducibly, trained as values, stored as codes to the last bit."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    MetricGuard,
    OneShot,
    PruningError,
    hold_masks,
    load_sparse,
    load_sparse_,
    prune_weights,
    save_sparse,
)
from lightning_prune.algorithms.k_means import share_values
from lightning_prune.callbacks import WeightSharing
from lightning_prune.model.byte_streams import compress, decompress, distances, places
from lightning_prune.pruning.sharing import share_weights
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.shared_values import hold_shared
from tests.runs import Net, assert_same_weights, fit, net, weights

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def lloyd(values, count):
    """K-means written out over all pairs, from centres spread evenly over the range."""
    values = values.double()
    centres = torch.linspace(float(values.min()), float(values.max()), count, dtype=torch.float64)
    while True:
        nearest = (values[:, None] - centres[None]).abs().argmin(dim=1)  # of equally near ones the lower
        moved = torch.stack([values[nearest == k].mean() if (nearest == k).any() else centres[k] for k in range(count)])
        if torch.allclose(moved, centres, rtol=0, atol=1e-14):
            return centres[nearest.unique()]
        centres = moved


@pytest.mark.parametrize("count", [2, 3, 8, 32])
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_k_means(count, seed):
    """Sorted values and searches give what k-means over all pairs of values and centres gives."""
    values = torch.rand(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    found, codes = share_values(values, count)
    torch.testing.assert_close(found, lloyd(values, count), rtol=0, atol=1e-12)
    assert torch.equal((values[:, None] - found[None]).abs().argmin(dim=1), codes)


def test_centres_are_not_left_where_pruning_left_no_value():
    """What magnitude pruning keeps has two narrow clumps; all centres are used, and errors fall accordingly."""
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    values = values[values.abs() > 0.9]
    found, codes = share_values(values, 32)
    assert len(found) == 32
    error, evenly = (values - found[codes]).square().mean(), (0.1 / 16) ** 2 / 12  # of 16 equal intervals a side
    assert error < 1.1 * evenly
    assert len(lloyd(values, 32)) < 8


@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(0, 300),
    count=st.sampled_from([1, 2, 32, 256]),
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["normal", "equal", "few", "huge"]),
    seed=st.integers(0, 99),
)
def test_each_value_goes_to_the_nearest_centre(size, count, dtype, kind, seed):
    """Of whatever dtype and spread, each value has the nearest of at most ``count`` distinct centres, all in use."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    shapes = {"normal": values, "equal": values * 0 + 3, "few": (2 * values).round(), "huge": values * 1e4}
    values = shapes[kind].to(dtype)
    before = torch.random.get_rng_state()
    found, codes = share_values(values, count)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.dtype == dtype and len(found) <= count and len(found.unique()) == len(found)
    assert torch.equal(codes.unique(), torch.arange(len(found)))
    away = (values.double()[:, None] - found.double()[None]).abs()
    assert size == 0 or torch.equal(away[torch.arange(size), codes], away.min(dim=1).values)
    assert len(values.unique()) > count or torch.equal(found[codes], values)


@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(0, 3000),
    share=st.sampled_from([0.0, 0.5, 0.99, 0.9995, 1.0]),
    values=st.sampled_from([1, 2, 32, 256]),
    seed=st.integers(0, 99),
)
def test_streams_come_back(size, share, values, seed):
    """Places and codes of any density come back, and streams never take more than a byte beside the plain ones."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(size, generator=generator) >= share
    codes = torch.randint(values, (size,), generator=generator)
    for numbers, most in ((distances(present), size), (codes, size)):
        stream = compress(numbers)
        assert len(stream) <= 1 + len(numbers)
        assert torch.equal(decompress(stream, most), numbers.to(torch.uint8))
    assert torch.equal(places(distances(present), size), present)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_pruned_and_shared_weights_come_back_in_the_original_class(dtype, order, tmp_path):
    """Masks, tied weights, an empty and an all-equal layer: all weights are those that were shared, bit by bit."""

    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 0))
        model[2].weight = model[1].weight
        nn.init.constant_(model[0].weight, 0.25)
        return model.to(dtype)

    model = made(0).to(memory_format=order)
    prune_weights(model, {"1": 0.9})
    keep = {name: mask.clone() for name, mask in masks_on(model).items()}
    report = share_weights(model, bits={"0": 4, "1": 3, "3": 2})
    assert [(one.name, one.values) for one in report.weights][::2] == [("0.weight", 1), ("3.weight", 0)]
    assert report.weights[1].entries == 230 and report.weights[1].values <= 8
    assert len(model[1].weight.unique()) == 1 + report.weights[1].values
    assert torch.equal(model[1].weight != 0, keep["1.weight"])
    expected = copy.deepcopy(model.state_dict())
    stored = {one.name: one for one in save_sparse(model, tmp_path / "it.safetensors").tensors}
    assert stored["1.weight"].form == "shared" and stored["1.weight"].entries == 230
    assert stored["1.weight"].bytes_after <= 230 * 3 // 8 + 230 + 8 * 8 + 8
    other = made(1)
    load_sparse_(other, tmp_path / "it.safetensors")
    assert_same_weights(other, expected)
    assert torch.equal(masks_on(other)["1.weight"], keep["1.weight"])
    assert other[2].weight is other[1].weight


def test_bytes_are_those_of_entropy():
    """Codes and places take no more than a tenth above the entropy of independent ones."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(32, (20_000,), generator=generator)
    assert len(compress(codes)) <= 1.1 * 20_000 * 5 / 8
    present = torch.rand(250_000, generator=generator) < 0.08
    p = float(present.float().mean())
    entropy = -p * torch.tensor(p).log2() - (1 - p) * torch.tensor(1 - p).log2()
    assert len(compress(distances(present))) <= 1.1 * 250_000 * float(entropy) / 8


def test_columns_are_stored_where_whole_ones_are_pruned(tmp_path):
    """Inputs that no weight reads, such as the margin of images, cost next to nothing."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(1, 5, (300, 784), generator=generator).float()
    value[:, torch.arange(784) % 28 < 14] = 0
    (stored,) = save_sparse({"w": value}, tmp_path / "it").tensors
    codes = 300 * 392 * 2 / 8
    assert stored.form == "shared" and stored.bytes_after < 1.2 * codes
    assert torch.equal(load_sparse(tmp_path / "it")["w"], value)


def test_zeros_with_a_sign_and_nan_come_back(tmp_path):
    """A stored value is a pattern of bits: minus zero, infinities and NaN are values like others."""
    value = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0]).repeat(50)
    (stored,) = save_sparse({"w": value}, tmp_path / "it").tensors
    assert stored.form == "shared" and stored.values == 5
    assert torch.equal(load_sparse(tmp_path / "it")["w"].view(torch.int32), value.view(torch.int32))


def test_large_tensors_of_one_value_can_be_read_again(tmp_path):
    """What is stored never stands for so much that it is refused as made to fill memory."""
    state = {"ones": torch.ones(3000, 9000), "zeros": torch.zeros(10, 3_000_000), "w": torch.zeros(30_000_000)}
    state["w"][-1] = 1
    save_sparse(state, tmp_path / "it")
    assert all(torch.equal(value, state[name]) for name, value in load_sparse(tmp_path / "it").items())


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(64, 6, generator=generator, dtype=torch.float64), torch.randint(3, (64,), generator=generator)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).to(dtype)


class Tables(nn.Module):
    """The same network made slim by hand: parameters are the values, and weights are looked up in them."""

    def __init__(self, model, report):
        super().__init__()
        self.layers = {"0": model[0], "2": model[2]}
        self.biases = nn.ParameterList([nn.Parameter(layer.bias.detach().clone()) for layer in self.layers.values()])
        self.codes = [report.codes[f"{path}.weight"].long() for path in self.layers]
        self.values = nn.ParameterList()
        for layer, codes in zip(self.layers.values(), self.codes, strict=True):
            centres = [layer.weight.detach()[codes == code][0] for code in range(1, int(codes.max()) + 1)]
            self.values.append(nn.Parameter(torch.stack(centres)))

    def weight(self, which):
        return torch.cat([self.values[which].new_zeros(1), self.values[which]])[self.codes[which]]

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.weight(0), self.biases[0])), self.weight(1), self.biases[1])


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.05),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.002),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("amount", [None, 0.7])
def test_training_is_that_of_a_table_of_values(make, amount):
    """Any optimizer that treats entries alike trains the values as if they were the only parameters there are."""
    x, y = data()
    model = network()
    optimizer = make(model.parameters())
    for _ in range(3):  # what the optimizer remembers of single weights must not count
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    if amount is not None:
        prune_weights(model, amount, optimizer=optimizer)
    report = share_weights(model, bits=2, optimizer=optimizer)
    twin = Tables(model, report)
    for layer in (model[0], model[2]):
        optimizer.state.pop(layer.bias, None) if make is not OPTIMIZERS["adagrad"] else [
            value.zero_() for value in optimizer.state[layer.bias].values()
        ]
    other = make(twin.parameters())
    with hold_shared(model, optimizer, report.codes):
        for _ in range(20):
            for net_, opt in ((model, optimizer), (twin, other)):
                opt.zero_grad()
                for part in range(2):  # accumulated
                    F.cross_entropy(net_(x[part::2]), y[part::2]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                opt.step()
    for which, layer in enumerate((model[0], model[2])):
        torch.testing.assert_close(layer.weight.detach(), twin.weight(which).detach(), rtol=1e-9, atol=1e-11)
        kept = report.codes[f"{2 * which}.weight"] > 0
        assert len(layer.weight.detach()[kept].unique()) <= 4 and not layer.weight.detach()[~kept].any()
    assert not model[0].weight._backward_hooks  # nothing is left behind


def test_masks_may_be_held_beside():
    """Within both contexts pruned weights stay zero and the others share values, in 16 bits, too."""
    x, y = data()
    model = network(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    prune_weights(model, 0.8)
    report = share_weights(model, bits=3)
    with hold_masks(model, optimizer), hold_shared(model, optimizer, report.codes):
        for _ in range(5):
            F.cross_entropy(model(x.bfloat16()), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, codes in report.codes.items():
        weight = model.get_parameter(name).detach()
        assert not weight[codes == 0].any()
        assert all(len(weight[codes == code].unique()) == 1 for code in range(1, int(codes.max()) + 1))


def test_wrong_arguments_are_refused():
    """Bits out of range, patterns that name nothing, weights that are not finite and foreign codes are refused."""
    for bits in (0, 9, True, 2.5, {"0": 0}, {}):
        with pytest.raises(ValueError, match="bits="):
            share_weights(network(), bits)
    with pytest.raises(ValueError, match="names no module"):
        share_weights(network(), {"nowhere": 3})
    model = network()
    before = copy.deepcopy(model.state_dict())
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(PruningError, match=r"2\.weight holds NaN"):
        share_weights(model)
    assert torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(ValueError, match="fit no parameter"), hold_shared(model, [], {"3.weight": torch.ones(1)}):
        pass


# In a run


def shares(module, bits):
    """Every weight of a layer has few values beside zero."""
    found = [module.get_parameter(f"{name}.weight").detach() for name in ("first", "second", "hidden", "head")]
    return all(len(weight[weight != 0].unique()) <= 2**bits for weight in found)


def test_a_run_prunes_shares_and_trains_on(tmp_path):
    """Values are shared when pruning is done, move with the training, and are stored as codes from the checkpoint."""
    module = net()
    pruning = IterativeMagnitudePruning(0.5, schedule=OneShot(1))
    sharing = WeightSharing(bits=2)
    fit(module, pruning, sharing, max_epochs=4)
    assert shares(module, 2) and not module.first.weight._backward_hooks
    for one in sharing.report.weights:
        weight = module.get_parameter(one.name).detach()
        assert one.entries == int(weight.count_nonzero()) and one.values <= 4
    early = net()
    fit(early, IterativeMagnitudePruning(0.5, schedule=OneShot(1)), WeightSharing(bits=2), max_epochs=2)
    assert not torch.equal(early.hidden.weight.unique(), module.hidden.weight.unique())  # the values were trained
    forms = {one.name: one.form for one in save_sparse(module, tmp_path / "it").tensors}
    assert forms["second.weight"] == "shared"


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_resumed_runs_are_the_same_to_the_bit(arguments, tmp_path):
    """A run that is killed in the middle of fine-tuning goes on as one that was not."""

    def callbacks():
        return IterativeMagnitudePruning(0.5, schedule=OneShot(1)), WeightSharing(bits=2, epoch=2)

    whole = net(dropout=0.0)
    fit(whole, *callbacks(), max_epochs=5, **arguments)
    first = net(dropout=0.0)
    fit(first, *callbacks(), max_epochs=3, **arguments).save_checkpoint(tmp_path / "it.ckpt")
    second = net(seed=9, dropout=0.0)
    fit(second, *callbacks(), max_epochs=5, ckpt_path=tmp_path / "it.ckpt", **arguments)
    assert_same_weights(second, weights(whole))
    state = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert any("codes" in own for own in state["callbacks"].values())


class ByHand(Net):
    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_is_the_same():
    """Where the module steps by itself, values are shared and trained just as well."""
    by_hand, automatic = net(ByHand), net(Net, dropout=0.0)
    for module in (by_hand, automatic):
        fit(module, WeightSharing(bits=2, epoch=1))
    assert shares(by_hand, 2)
    for name, value in weights(automatic).items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])


def test_dense_weights_share_values_without_a_pruning_callback():
    """Nothing need be pruned; filters that are removed leave before values are shared."""
    module = net()
    fit(module, WeightSharing(bits=3, ignore=["head"]))
    assert len(module.hidden.weight.unique()) <= 8 and len(module.head.weight.unique()) > 8
    slim = net()
    fit(slim, FilterL1Pruning(0.5, schedule=OneShot(1)), WeightSharing(bits=3))
    assert len(slim.hidden.weight) == 5 and shares(slim, 3)


def test_a_rolled_back_pruning_step_ends_sharing():
    """Where a guard takes the last pruning step back, values are chosen anew once pruning is done."""
    module = net()
    guard = MetricGuard("val_loss", drop=0.0, mode="min")
    sharing = WeightSharing(bits=2)
    fit(module, FilterL1Pruning(0.8, schedule=OneShot(1)), guard, sharing, val=True, max_epochs=4)
    assert len(module.first.weight) == 8 and shares(module, 2)


def test_what_never_happened_is_told():
    """A run that ends before values could be shared says so."""
    with pytest.warns(UserWarning, match="no epoch began in which weights could share values"):
        fit(net(), WeightSharing(bits=2, epoch=7))


def test_the_callback_pickles_and_prints():
    """It comes back from pickle and from its printed form, and its state loads with weights alone."""
    callback = WeightSharing(bits={"first": 4}, epoch=3)
    assert repr(eval(repr(callback))) == repr(callback) == repr(pickle.loads(pickle.dumps(callback)))
    fit(net(), WeightSharing(bits=2))
    buffer = io.BytesIO()
    torch.save(callback.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == callback.state_dict()
    with pytest.raises(ValueError, match="epoch=-1"):
        WeightSharing(epoch=-1)
