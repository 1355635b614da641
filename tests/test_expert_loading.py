"""State dicts and optimizers of models without some experts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lightning_prune import PruningError, load_state_dict_
from lightning_prune.pruning.experts import prune_experts
from lightning_prune.surgery.loading import recipe_json
from tests.mixtures import kept_of, net, slim_twin

X = torch.randn(40, 4)


@pytest.mark.parametrize("style", ["loop", "dict", "fused"])
def test_state_dicts_load_both_ways(style):
    """A dense net takes the state dict of a slim one, also with its recipe apart; so does what was pruned before."""
    dense = net(style=style, gate="corrected")
    slim, other = copy.deepcopy(dense), net(style=style, gate="corrected")
    prune_experts(slim, X, 2)
    load_state_dict_(other, slim.state_dict())
    assert torch.equal(other(X), slim(X)) and other[1].experts_now() == 4
    third = net(style=style, gate="corrected")
    load_state_dict_(third, dict(slim.state_dict()), recipe=recipe_json(slim))
    assert torch.equal(third(X), slim(X))
    again = copy.deepcopy(slim)
    prune_experts(again, X, 1)
    load_state_dict_(slim, again.state_dict())
    assert torch.equal(slim(X), again(X))
    load_state_dict_(other, again.state_dict())  # pruned twice, into what was pruned once
    assert torch.equal(other(X), again(X)) and other.state_dict().keys() == again.state_dict().keys()


@pytest.mark.parametrize("style", ["loop", "dict", "fused"])
def test_a_slim_net_becomes_fatter(style):
    """A net that lost more experts takes the state dict of one that lost fewer: there is room again."""
    dense = net(style=style)
    one, two = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_experts(one, X, 1)
    prune_experts(two, X, 3)
    load_state_dict_(two, one.state_dict())
    assert torch.equal(one(X), two(X)) and two[1].experts_now() == 5
    assert one.state_dict().keys() == two.state_dict().keys()


def test_what_was_loaded_is_saved_again():
    """A slim net that was loaded gives state dicts that load, and recipes ask for no more experts than there are."""
    dense = net()
    slim, other, third = copy.deepcopy(dense), net(), net()
    prune_experts(slim, X, 2)
    load_state_dict_(other, slim.state_dict())
    load_state_dict_(third, other.state_dict())
    assert torch.equal(third(X), slim(X))
    state = slim.state_dict()
    state._metadata["1.experts"]["lightning_prune"]["experts"] = 10**9
    with pytest.raises(PruningError, match="Missing key"):
        load_state_dict_(net(), state)
    state._metadata["1.experts"]["lightning_prune"]["experts"] = "many"
    with pytest.raises(PruningError, match="cannot be read"):
        load_state_dict_(net(), state)


@pytest.mark.parametrize("style", ["loop", "dict", "fused"])
def test_the_optimizer_follows(style):
    """The next steps are those of a slim twin with the same state; removed parameters leave their groups."""
    torch.manual_seed(2)
    model = net(style=style)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    y = torch.randn(40, 3)

    def step(model, optimizer):
        optimizer.zero_grad()
        F.mse_loss(model(X), y).backward()
        optimizer.step()

    for _ in range(3):
        step(model, optimizer)
    before = copy.deepcopy(model)
    names = {name: optimizer.state[p] for name, p in model.named_parameters()}
    states = copy.deepcopy(names)
    keep = kept_of(prune_experts(model, X, 0.5, optimizer=optimizer), model)
    twin = slim_twin(before, keep)
    other = torch.optim.Adam(twin.parameters(), 0.01)
    for name, parameter in twin.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["1", "experts"]:
            number = int(parts[2].removeprefix("expert_"))
            parts[2] = parts[2].replace(str(number), str(keep[number]))
        state = states[".".join(parts)]
        sliced = state["exp_avg"].shape != parameter.shape
        other.state[parameter] = {key: t[keep] if sliced and t.dim() else t for key, t in state.items()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)
