"""Compact files: as small as promised, and back to the last bit."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    OneShot,
    PruningError,
    load_sparse,
    load_sparse_,
    prune_weights,
    save_sparse,
)
from lightning_prune.cli import main
from lightning_prune.surgery import semi_structured
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.semi_structured import to_semi_structured_
from tests.runs import Depthwise, Net, assert_agrees_with_shapes, fit, net, weights


def lenet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def as_bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def assert_bit_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(as_bits(found[name].reshape(-1)), as_bits(value.reshape(-1))), name


def test_lenet_300_100_at_90_percent(tmp_path):
    """With 90 % of its weights gone LeNet-300-100 takes at most a fifth of its dense bytes, and comes back."""
    model, path = lenet(), tmp_path / "model.safetensors"
    keep = prune_weights(model, 0.9, scope="global").kept
    report = save_sparse(model, path)
    assert report.bytes_before == 4 * sum(p.numel() for p in model.parameters())
    assert report.bytes_after == path.stat().st_size <= report.bytes_before / 5
    other = lenet()
    load_sparse_(other, path)
    assert_bit_equal(other.state_dict(), model.state_dict())
    assert all(torch.equal(stays, keep[name]) for name, stays in masks_on(other).items())
    assert masks_on(other).keys() == keep.keys()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    share=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    seed=st.integers(0, 99),
)
def test_any_tensor_comes_back_to_the_last_bit(shape, share, dtype, seed, tmp_path_factory):
    """Of whatever shape, empty ones too, dtype and zeros, signed ones, infinities and NaN, a tensor comes back."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > share)
    if value.numel() > 3:
        value.view(-1)[:4] = torch.tensor([torch.nan, -0.0, torch.inf, 0.0])
    value = (value.nan_to_num(posinf=9) if not dtype.is_floating_point else value).to(dtype)
    path = tmp_path_factory.mktemp("sparse") / "one.safetensors"
    report = save_sparse({"a.b": value, "c": value.clone()}, path)
    assert_bit_equal(load_sparse(path), {"a.b": value, "c": value})
    assert all(stored.bytes_after <= stored.bytes_before for stored in report.tensors)


@pytest.mark.parametrize("share, form", [(0.0, "dense"), (0.8, "bitmask"), (0.97, "csr")])
def test_the_smallest_form_is_taken(share, form, tmp_path):
    """Few zeros are stored densely, many as a bitmask, almost all by row and column; sizes are those of the formula."""
    value = torch.rand(50, 200, generator=torch.Generator().manual_seed(0)) + 1
    value.view(-1)[: int(share * 10_000)] = 0
    (stored,) = save_sparse({"w": value}, tmp_path / "one").tensors
    left = 10_000 - int(share * 10_000)
    sizes = {"dense": 40_000, "bitmask": 4 * left + 1250, "csr": 5 * left + 4 * 51}
    assert (stored.form, stored.bytes_after) == (form, min(sizes.values())) == (form, sizes[form])


def test_tied_tensors_are_stored_once(tmp_path):
    """A tensor with two names is stored under one, and comes back under both."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = save_sparse(model, tmp_path / "tied")
    assert [stored.name for stored in report.tensors] == ["0.weight", "0.bias", "1.bias"]
    assert_bit_equal(load_sparse(tmp_path / "tied"), model.state_dict())


def test_no_code_is_in_the_file(tmp_path):
    """The file is plain safetensors: tensors that anyone can read, and JSON."""
    model = lenet()
    prune_weights(model, 0.9, scope="global")
    save_sparse(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {"0.weight//values", "0.weight//columns", "0.weight//begins", "0.bias//values"} <= set(file.keys())
        assert json.loads(file.metadata()["lightning_prune"])["tensors"]["0.weight"]["form"] == "csr"


def test_a_model_that_was_cut_and_masked(tmp_path):
    """Shapes, numbers on modules and masks of a pruned module come back in one of the original class."""
    module = net(Depthwise)
    masking = IterativeMagnitudePruning(0.7, schedule=OneShot(1), scope="global")
    fit(module, masking, FilterL1Pruning(0.5, schedule=OneShot(2)))
    save_sparse(module, tmp_path / "slim.safetensors")
    other = net(Depthwise, seed=3)
    load_sparse_(other, tmp_path / "slim.safetensors")
    assert_bit_equal(weights(other), weights(module))
    assert_agrees_with_shapes(other)
    assert masks_on(other).keys() == masks_on(module).keys()
    assert all(torch.equal(stays, masks_on(module)[name]) for name, stays in masks_on(other).items())


def test_what_cannot_be_stored_is_refused(tmp_path):
    """Something that is no tensor, and a file of another origin, are refused."""
    with pytest.raises(PruningError, match="'extra' is dict, and only tensors can be kept"):
        save_sparse({"extra": {}}, tmp_path / "one")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(PruningError, match="was not written by save_sparse"):
        load_sparse(tmp_path / "other")
    (tmp_path / "junk").write_bytes(b"no header of safetensors")
    with pytest.raises(PruningError, match="junk is no safetensors file"):
        load_sparse(tmp_path / "junk")


@pytest.mark.parametrize("weights_only", [False, True])
def test_command_line(weights_only, tmp_path, capsys):
    """``lightning-prune export`` turns a checkpoint into a compact file and prints bytes before and after."""
    module = net()
    fit(module, IterativeMagnitudePruning(0.9, scope="global")).save_checkpoint(
        tmp_path / "one.ckpt", weights_only=weights_only
    )
    out = tmp_path / "one.safetensors"
    main(["export", "--ckpt_path", str(tmp_path / "one.ckpt"), "--out", str(out)])
    told = re.search(r"([\d,]+) bytes before, ([\d,]+) after", capsys.readouterr().out)
    dense = sum(value.nbytes for value in module.state_dict().values())
    assert [int(number.replace(",", "")) for number in told.groups()] == [dense, out.stat().st_size]
    other = net(Net, seed=3)
    load_sparse_(other, out)
    assert_bit_equal(weights(other), weights(module))


def test_two_of_four_where_no_hardware_helps():
    """On a device without sparse tensor cores weights stay as they are, and a warning says they run no faster."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
    prune_weights(model, pattern="2:4", ignore=["3"])
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="2 weights that keep to 2:4 stay dense and run no faster here"):
        found = to_semi_structured_(model)
    assert found.faster == ()
    assert found.dense["0.weight"] == "PyTorch multiplies weights of Conv2d densely"
    assert "it lies on cpu" in found.dense["2.weight"]
    assert_bit_equal(model.state_dict(), before)


def test_what_sparse_tensor_cores_get_is_what_pruning_left(monkeypatch):
    """PyTorch packs two of four by its own code; unpacked, every weight is back, bit by bit. It only asks for a GPU."""
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).half()
    prune_weights(model, pattern="2:4")
    before = copy.deepcopy(model.state_dict())
    packing = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(semi_structured, "_hindrance", lambda module, weight: None)
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(packing, "_validate_device_dim_dtype_shape", lambda tensor: None)
    found = to_semi_structured_(model)
    assert found == (("0.weight", "2.weight"), {})
    for name in found.faster:
        weight = model.get_parameter(name)
        assert isinstance(weight, packing) and weight.packed.numel() == before[name].numel() // 2
        assert_bit_equal({name: weight.to_dense()}, {name: before[name]})


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="no sparse tensor cores"
)
def test_sparse_tensor_cores_give_the_same_outputs():
    """On a GPU that has them, outputs are those of the dense weights, to half precision, and convolutions stay."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 64))
    prune_weights(model, pattern="2:4")
    model, x = model.half().cuda(), torch.randn(32, 8, 8, 8).half().cuda()
    with torch.no_grad():
        before = model(x)
        with pytest.warns(UserWarning, match="1 weights that keep to 2:4 stay dense"):
            found = to_semi_structured_(model)
        assert found.faster == ("2.weight", "4.weight")
        torch.testing.assert_close(model(x), before, atol=1e-2, rtol=1e-2)
