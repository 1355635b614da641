"""Whole experts leave mixtures: found by shapes, scored, verified against slim twins built by hand, loaded again."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import PruningError
from lightning_prune.pruning.experts import prune_experts
from tests.mixtures import GATES, NUMBERS, ROUTERS, STYLES, WIDTH, gates_of, kept_of, net, slim_twin

X = torch.randn(40, 4)

# Each style with each router, and each gate, number of chosen experts, and way to hold their number in turn.
CASES = []
for place, (style, router) in enumerate([(style, router) for style in STYLES for router in ROUTERS]):
    gate, number = GATES[place % len(GATES)], NUMBERS[place % len(NUMBERS)]
    CASES.append(
        {"style": style, "router": router, "gate": gate, "k": 1 + place % 3, "shared": place % 2 == 0, "number": number}
    )


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_pruned_mixtures_equal_slim_twins(settings):
    """The pruned net has the tensors, and returns the outputs, of one that was built with fewer experts."""
    torch.manual_seed(0)
    model = net(**settings)
    dense = copy.deepcopy(model)
    report = prune_experts(model, X, 0.5)
    keep = kept_of(report, model)
    assert report.proved and (report.groups[0].before, report.groups[0].after) == (6, 3) == (6, len(keep))
    twin = slim_twin(dense, keep)
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in twin.state_dict().items()
    }
    assert model[1].experts_now() == (
        6 if settings["style"] == "fused_columns" and settings["number"] != "length" else 3
    )
    x = torch.randn(50, 4)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), twin.train(training)(x))
    assert report.params_after == sum(p.numel() for p in twin.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("settings", CASES[::3], ids=lambda settings: "-".join(map(str, settings.values())))
def test_reap_is_its_formula(settings):
    """The experts that leave have the lowest mean, over their tokens, of gate times norm of output; written out."""
    torch.manual_seed(1)
    model = net(**settings)
    batches = [torch.randn(64, 4), torch.randn(30, 4)]
    hidden = model[0](torch.cat(batches)).detach()
    with torch.no_grad():
        gates = gates_of(model[1], hidden)
        reap = torch.zeros(6)
        for expert in range(6):
            tokens = gates[:, expert] > 0
            norms = model[1].expert(expert, hidden[tokens]).norm(dim=1) * gates[tokens, expert]
            reap[expert] = norms.mean() if tokens.any() else 0
    most = (gates > 0).sum(0)
    for criterion, scores in {"reap": reap, "frequency": most}.items():
        pruned = copy.deepcopy(model)
        keep = kept_of(prune_experts(pruned, X[:4], 2, criterion=criterion, batches=batches), pruned)
        assert set(scores[keep].tolist()) == set(scores.topk(4)[0].tolist()), criterion


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("style", ["loop", "fused"])
def test_experts_as_many_as_the_width(style, router):
    """A width that is the number of experts is not taken for it, nor the columns of a router for its rows."""
    model = net(WIDTH, style=style, router=router, shared=True)
    dense = copy.deepcopy(model)
    model[1].width = WIDTH
    report = prune_experts(model, X, 0.5)
    torch.testing.assert_close(model(X), slim_twin(dense, kept_of(report, model))(X))
    assert report.proved and model[1].width == WIDTH and model[1].shared.down.weight.shape[0] == WIDTH


def test_as_many_are_kept_as_a_token_needs():
    """The message says how many can leave."""
    with pytest.raises(PruningError, match=r"each token needs 2 experts of 1, so at most 4 of 6 can be removed"):
        prune_experts(net(k=2), X, 5)
    for experts in (5, 7):  # as many as a matrix of the experts has rows
        with pytest.raises(
            PruningError, match=f"each token needs 2 experts of 1, so at most {experts - 2} of {experts}"
        ):
            prune_experts(net(experts, k=2, shared=True), X, experts - 1)
    with pytest.raises(PruningError, match="leaves nothing where there are 6 experts of 1"):
        prune_experts(net(k=2), X, 6)
    model = net(style="dense", k=6)
    with pytest.raises(PruningError, match="each token needs 6"):
        prune_experts(model, X, 1)


def test_refusals():
    """Arguments out of range, models without mixtures and ignored ones are refused before anything runs."""
    with pytest.raises(ValueError, match="must lie in"):
        prune_experts(net(), X, 1.5)
    with pytest.raises(TypeError, match="amount"):
        prune_experts(net(), X, {"1": 0.5})
    with pytest.raises(ValueError, match="'reap', 'frequency', 'magnitude', 'random'"):
        prune_experts(net(), X, criterion="best")
    with pytest.raises(PruningError, match="No mixture of experts can be pruned in Sequential"):
        prune_experts(nn.Sequential(nn.Linear(4, 4)), X)
    with pytest.raises(PruningError, match="named in ignore="):
        prune_experts(net(), X, ignore=["1"])
    with pytest.raises(PruningError, match="does not run on the example inputs"):
        prune_experts(net(), torch.randn(3, 3))


def test_random_leaves_other_experts_by_seed_and_nothing_is_nothing():
    """Random scores follow torch's seed; an amount of 0 removes nothing."""
    kept = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model = net()
        kept.add(tuple(kept_of(prune_experts(model, X, 3, criterion="random"), model)))
    assert len(kept) > 2
    model = net()
    assert prune_experts(model, X, 0.0).reached == 0 and len(model[1].experts) == 6


class Blocked(nn.Module):
    """A router whose logits of some experts are minus infinity."""

    def __init__(self, router, gone):
        super().__init__()
        self.router, self.gone = router, gone

    def forward(self, x):
        return self.router(x).index_fill(-1, self.gone, -torch.inf)


@pytest.mark.parametrize("criterion", ["reap", "frequency", "magnitude", "random"])
@pytest.mark.parametrize("style", STYLES)
def test_pruned_mixtures_are_those_whose_router_cannot_choose(style, criterion):
    """By brute force: the dense net with logits of minus infinity for removed experts returns the same."""
    torch.manual_seed(3)
    model = net(style=style, router="biased", gate="renormalised")
    dense, x = copy.deepcopy(model), torch.randn(60, 4)
    kept = kept_of(prune_experts(model, X, 3, criterion=criterion), model)
    gone = torch.tensor([number for number in range(6) if number not in kept])
    dense[1].router.score = Blocked(dense[1].router.score, gone)
    torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize("style", ["loop", "dict", "fused"])
def test_magnitude_is_the_norm_of_weights(style):
    """The experts that leave have the smallest weights; batches are not read."""
    model = net(style=style)
    with torch.no_grad():
        for number, scale in enumerate([1.0, 0.1, 1.0, 0.2, 1.0, 1.0]):
            if style == "fused":
                model[1].up[number] *= scale
                model[1].down[number] *= scale
            else:
                for weight in list(model[1].experts.children())[number].parameters():
                    weight *= scale
    report = prune_experts(model, X, 2, criterion="magnitude", batches=iter([None]))
    assert kept_of(report, model) == [0, 2, 4, 5]


def test_parts_and_the_least_number_of_experts():
    """``module=`` prunes and counts the mixtures in it; of each ``min_experts`` are kept, in groups too."""
    model = nn.Sequential(net(8), net(4)[1:], nn.Linear(3, 4), net(6))
    model[1] = nn.Linear(3, 3)
    dense = sum(p.numel() for p in model[3].parameters())
    report = prune_experts(model, X, 5, module=model[3], min_experts=4)
    assert [(group.name, group.before, group.after) for group in report.groups] == [("3.1", 6, 4)]
    assert report.params_before == dense and report.params_after == sum(p.numel() for p in model[3].parameters())
    assert any(pin.tensor == "0.1" and "outside of module=" in pin.reason for pin in report.pinned)
    model = nn.Sequential(net(8), nn.Linear(3, 4), net(4))
    report = prune_experts(model, X, 0.5, min_experts=3)
    assert [group.after for group in report.groups] == [4, 3]
    with pytest.raises(PruningError, match="pass min_experts=2"):
        prune_experts(net(), X, 5)
    with pytest.raises(ValueError, match="min_experts=0"):
        prune_experts(net(), X, min_experts=0)
