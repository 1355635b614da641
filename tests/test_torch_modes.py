"""Calls inside ``torch.inference_mode`` and autocast do what they do outside, and what is pruned can be trained."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune as lp
from lightning_prune.pruning.exact import prune_exact
from lightning_prune.pruning.fisher import prune_fisher
from tests.runs import fit, net

X = torch.randn(8, 6)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def loss(model, batch):
    return model(batch).square().mean()


def masks():
    return {"0.weight": torch.arange(96).view(16, 6) % 2 == 0}


SLIM = mlp()
lp.prune_filters(SLIM, X, 0.5, progress=False)

CALLS = {
    "filters": lambda model, x: lp.prune_filters(model, x, 0.5, progress=False),
    "filters by gradients": lambda model, x: lp.prune_filters(
        model, x, 0.5, criterion="taylor", batches=[x], loss=loss, progress=False
    ),
    "filters and repair": lambda model, x: lp.prune_filters(
        model, x, 0.5, criterion="obs", batches=[x], progress=False
    ),
    "weights": lambda model, x: lp.prune_weights(model, 0.5, scope="global"),
    "weights by second order": lambda model, x: lp.prune_obs(
        model, batches=[x], amount=0.5, progress=False, scope="global"
    ),
    "weights by Fisher": lambda model, x: prune_fisher(model, batches=[x], loss=loss, amount=0.5, progress=False),
    "weights one by one": lambda model, x: prune_exact(
        model, batches=[(x, x[:, :3].clone())], loss=F.mse_loss, amount=0.02, progress=False
    ),
    "given masks": lambda model, x: lp.apply_masks_(model, masks()),
    "statistics": lambda model, x: lp.recalibrate_batch_norm(model, [x]),
    "a state dict": lambda model, x: lp.load_state_dict_(model, SLIM.state_dict()),
    "sensitivity": lambda model, x: lp.sensitivity(model, x, lambda net: net(x).sum(), shares=(0.5,), progress=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_pruned_in_inference_mode_trains(call):
    """The call does the same inside the mode as outside, on data made there too, and what is left can be trained."""
    found = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        torch.manual_seed(0)
        model = mlp()
        with mode():
            call(model, X.clone())  # a tensor of the mode
        found.append(model)
    outside, inside = (model.state_dict() for model in found)
    assert outside.keys() == inside.keys()
    assert all(torch.equal(outside[name], inside[name]) for name in outside)
    assert not any(tensor.is_inference() for tensor in [*found[1].parameters(), *found[1].buffers()])
    before = found[1][0].weight.detach().clone()
    optimizer = torch.optim.SGD(found[1].parameters(), 0.1)
    loss(found[1].train(), X).backward()
    optimizer.step()
    assert not torch.equal(found[1][0].weight, before)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"statistics"}))
def test_autocast_changes_nothing(name):
    """The call does the same inside autocast as outside, and no cast of a weight from before it is used behind it."""
    torch.manual_seed(0)
    plain, cast = mlp(), mlp()
    cast.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    CALLS[name](plain.eval(), X)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        cast.eval()(X)  # which remembers casts of the weights
        CALLS[name](cast, X)
        assert torch.is_autocast_enabled("cpu")
        inside = cast(X)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in cast.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(X), inside)


def test_statistics_are_those_of_autocast():
    """BatchNorm is recalibrated by the numbers that it will see."""
    torch.manual_seed(0)
    plain, cast = mlp(), mlp()
    cast.load_state_dict(plain.state_dict())
    lp.recalibrate_batch_norm(plain, [X])
    with torch.autocast("cpu", torch.bfloat16):
        lp.recalibrate_batch_norm(cast, [X])
    assert not torch.equal(plain[1].running_mean, cast[1].running_mean)
    assert torch.allclose(plain[1].running_mean, cast[1].running_mean, atol=0.02)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_models_made_in_inference_mode_are_refused_untouched(call):
    """A model of tensors that cannot be trained is refused before anything changes, and the advice given works."""
    with torch.inference_mode():
        model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lp.PruningError, match=r"the first is 0\.weight\) were made inside torch\.inference_mode"):
        call(model, X)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    call(model, X)


@pytest.mark.parametrize(
    "callback",
    [lp.FilterL1Pruning(0.5), lp.IterativeMagnitudePruning(0.5, scope="global"), lp.OBSOneShot(0.5, scope="global")],
)
def test_runs_of_models_made_in_inference_mode_are_refused(callback):
    """Callbacks refuse such a model before training starts."""
    with torch.inference_mode():
        model = net()
    with pytest.raises(lp.PruningError, match=r"made inside torch\.inference_mode"):
        fit(model, callback, max_epochs=2)


@pytest.mark.parametrize("prune", [
    lambda model, batches: lp.prune_obs(model, 0.5, batches=batches),
    lambda model, batches: lp.prune_filters(model, batches[0], 0.5, criterion="obs", batches=batches),
], ids=["weights", "filters"])  # fmt: skip
def test_a_forward_in_autocast_is_refused_with_what_to_do(prune):
    """The casts hide products from what looks at a layer's inputs; criteria that need none of them work."""

    class Casting(nn.Sequential):
        def forward(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(images)

    model = Casting(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(16, 8) for _ in range(2)]
    with pytest.raises(lp.PruningError, match="casts it to another type.*leave autocast to the Trainer's precision"):
        prune(model, batches)
    lp.prune_filters(model, batches[0], 0.5)
    assert model[0].out_features == 8
