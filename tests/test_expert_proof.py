"""What is verified before experts leave, and what is not called proved."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import PruningError
from lightning_prune.pruning.experts import prune_experts
from lightning_prune.surgery import remove_experts as surgery
from tests.mixtures import WIDTH, Mixture, net

X = torch.randn(40, 4)


class LossAlone(nn.Module):
    """Returns a loss, and holds its router itself, so that nothing else tells what a mixture computes."""

    def __init__(self, wrong):
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.wrong, self.score, self.parts = wrong, nn.Linear(WIDTH, 6), nn.Parameter(torch.randn(6, WIDTH, WIDTH))

    def forward(self, x):
        gates = self.score(self.stem(x)).softmax(-1)
        outputs = torch.einsum("te,tw,ewv->tv", gates, self.stem(x), self.parts)
        return (outputs.square().mean() + self.wrong * gates.shape[-1]) * 1.0


def test_a_loss_alone_must_be_the_same():
    """Where a single number is all that is returned, it is compared as it is."""
    assert prune_experts(LossAlone(0), X, 0.5, criterion="random").proved
    with pytest.raises(PruningError, match="something else"):
        prune_experts(LossAlone(1), X, 0.5, criterion="random")
    with pytest.raises(PruningError, match="returns no numbers on the batches"):
        prune_experts(LossAlone(0), X, 0.5)


class Reordered(Mixture):
    """Adds to each expert's output its place among all, which no tensor holds."""

    def expert(self, number, x):
        return super().expert(number, x) + number


@pytest.mark.parametrize("kind", [Reordered], ids=lambda kind: kind.__name__)
def test_what_goes_by_numbers_of_experts_is_kept(kind):
    """A mixture whose code goes by the number of an expert computes something else: it is kept, with the reason."""
    model = nn.Sequential(nn.Linear(4, WIDTH), kind(), Mixture())
    with pytest.warns(UserWarning, match="prune_experts: 1: it returns something else"):
        report = prune_experts(model, X, 0.5)
    assert [group.name for group in report.groups] == ["2"] and report.reached == 0.25
    assert len(model[1].experts) == 6
    assert "something else" in report.pinned[0].reason


class Outside(nn.Module):
    """What lies behind the mixture reads how many experts there are."""

    def __init__(self):
        super().__init__()
        self.mixture, self.table = Mixture(), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.mixture(x) + self.table[len(self.mixture.experts) - 1]


def test_the_rest_of_the_model_is_verified():
    """Code behind a mixture that reads its size is run; nothing changes where it computes something else."""
    model = Outside()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(3, WIDTH)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match="Outside cannot lose experts, since of what lies outside of mixtures"):
        prune_experts(model, torch.randn(20, WIDTH), 0.5, optimizer=optimizer)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(optimizer.state) and all(p.shape == s["momentum_buffer"].shape for p, s in optimizer.state.items())
    assert not any(hook for module in model.modules() for hook in module._state_dict_hooks.values())


def test_kept_experts_that_no_input_chose_are_not_called_proved():
    """With a correction that never lets an expert win, nothing was compared of it."""
    model = net(gate="corrected", style="fused")
    with torch.no_grad():
        model[1].router.correction.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0, 0.0, 0.0]))
    report = prune_experts(model, X, 2)
    assert not report.proved and "chosen by no input" in report.proof


@pytest.mark.parametrize("style", ["loop", "fused", "stacked"])
def test_half_precision_and_equal_scores(style):
    """A router of zeros, weights of bfloat16 and a scale of 1e-6 behind the mixture hide nothing."""

    class Hidden(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.mixture, self.scale = kind(style=style), nn.Parameter(torch.full((WIDTH,), 1e-6))
            nn.init.zeros_(self.mixture.router.score.weight)

        def forward(self, x):
            return x + self.mixture(x) * self.scale

    model = Hidden(Mixture).bfloat16()
    report = prune_experts(model, torch.randn(30, WIDTH, dtype=torch.bfloat16), 0.5)
    assert report.proved and report.groups[0].after == 3
    if style != "fused":
        with pytest.raises(PruningError, match="something else"):
            prune_experts(Hidden(Reordered).bfloat16(), torch.randn(30, WIDTH, dtype=torch.bfloat16), 0.5)


class Early(nn.Module):
    """Goes past its router where the inputs are small."""

    def __init__(self):
        super().__init__()
        self.mixture = Mixture()

    def forward(self, x):
        return self.mixture(x) if x[0, 0] > 0.4 else x


class EarlyMixture(Mixture):
    def forward(self, x):
        return super().forward(x) if x[0, 0] > 0.4 else x


def test_a_router_that_runs_now_and_then_proves_nothing():
    """Where the inputs decide whether the router runs, it is not seen in every run, and nothing leaves."""
    x = torch.randn(10, WIDTH).abs() + 1
    assert prune_experts(Early(), x, 0.5).proved  # the mixture itself always routes
    with pytest.raises(PruningError, match="not multiplied with the inputs in every run"):
        prune_experts(nn.Sequential(EarlyMixture()), x, 0.5)


@pytest.mark.parametrize("style", ["loop", "stacked", "fused", "fused_dense"])
@pytest.mark.parametrize("gate", ["softmax", "corrected"])
def test_planted_errors_are_caught(style, gate, monkeypatch):
    """Rows of any one tensor, or modules, that are not those of the kept experts are refused, each by itself."""
    model = net(style=style, gate=gate, router="biased")
    before = copy.deepcopy(model.state_dict())
    cut = surgery.cut_
    for broken in ["score.weight", "score.bias", "correction", "up", "up_bias", "down"]:

        def rolled(root, plan, tensors, optimizers=(), broken=broken):
            tensors = {n: t.roll(1, 0) if n.endswith(f".{broken}") or n == broken else t for n, t in tensors.items()}
            cut(root, plan, tensors, optimizers)

        present = any(name.endswith(f".{broken}") and "experts" not in name for name in before)
        with monkeypatch.context() as patched:
            patched.setattr(surgery, "cut_", rolled)
            if present and (gate, broken) != ("softmax", "correction"):
                with pytest.raises(PruningError, match="something else"):
                    prune_experts(model, X, 0.5)
    if not style.startswith("fused"):
        keep = surgery.keep_experts_
        with monkeypatch.context() as patched:
            patched.setattr(surgery, "keep_experts_", lambda container, kept: keep(container, kept[::-1]))
            with pytest.raises(PruningError, match="something else"):
                prune_experts(model, X, 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert prune_experts(model, X, 0.5).proved
