"""Whole experts leave mixtures of many kinds: noisy, grouped, with a capacity; soft ones are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError
from lightning_prune.pruning.experts import prune_experts
from tests.mixtures import WIDTH, kept_of

X = torch.randn(40, 4)


class Switch(nn.Module):
    """Top-1 routing by argmax, with a loss that balances experts."""

    def __init__(self, experts=6, scale="experts"):
        super().__init__()
        self.num_experts, self.scale = experts, scale
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        top, chosen = gates.max(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            own = chosen == number
            out[own] = top[own, None] * expert(x[own])
        share = F.one_hot(chosen, self.num_experts).to(x.dtype).mean(0)
        balance = (share * gates.mean(0)).sum() * self.num_experts
        return out, (balance if self.scale == "experts" else gates.std(dim=-1).mean())


class Balanced(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.stem, self.mixture = nn.Linear(4, WIDTH), Switch(**settings)

    def forward(self, x):
        return self.mixture(self.stem(x))


def test_a_balancing_loss_follows_the_number_of_experts():
    """The loss that Switch Transformers return counts experts; of one that changes otherwise nothing is claimed."""
    model = Balanced()
    report = prune_experts(model, X, 0.5)
    assert report.proved and model.mixture.num_experts == 3
    model = Balanced(scale="deviation")
    report = prune_experts(model, X, 0.5)
    assert not report.proved and "mixture: it returns a single number" in report.proof


class Noisy(nn.Module):
    """Noisy top-k gating: a second matrix scales noise, in train mode alone (Shazeer et al. 2017)."""

    def __init__(self, experts=6):
        super().__init__()
        self.gate, self.noise = nn.Parameter(torch.randn(WIDTH, experts)), nn.Parameter(torch.randn(WIDTH, experts))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))
        self.loss = None

    def forward(self, x):
        logits = x @ self.gate
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(x @ self.noise)
        top, chosen = logits.topk(2)
        weights = torch.full_like(logits, -torch.inf).scatter(1, chosen, top).softmax(-1)
        self.loss = weights.sum(0).var()  # keeps its graph: such tensors cannot be copied
        return sum(weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


def test_a_matrix_that_only_train_mode_reads_follows():
    """Noise has an entry for each expert, too; the pruned mixture trains."""
    model = nn.Sequential(nn.Linear(4, WIDTH), Noisy())
    model(X).sum().backward()
    report = prune_experts(model, X, 0.5)
    keep = kept_of(report, model)
    assert report.proved and model[1].noise.shape == model[1].gate.shape == (WIDTH, 3) and len(keep) == 3
    model.train()(X).sum().backward()


class NoisyRouter(nn.Module):
    """The router of a widely read tutorial (makeMoE), which adds noise in eval mode, too."""

    def __init__(self, experts):
        super().__init__()
        self.route, self.noise = nn.Linear(WIDTH, experts), nn.Linear(WIDTH, experts)

    def forward(self, x):
        logits = self.route(x)
        noisy = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        top, indices = noisy.topk(2, dim=-1)
        return torch.full_like(noisy, float("-inf")).scatter(-1, indices, top).softmax(-1), indices


class Tutorial(nn.Module):
    def __init__(self, experts=6):
        super().__init__()
        self.router, self.top_k = NoisyRouter(experts), 2
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, WIDTH), nn.Dropout(0.1)) for _ in range(experts)
        )

    def forward(self, x):
        gates, indices = self.router(x)
        out, flat, flat_gates = torch.zeros_like(x), x.view(-1, x.size(-1)), gates.view(-1, gates.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            if mask.any():
                rows = mask.view(-1)
                out[mask] += (expert(flat[rows]) * flat_gates[rows, i].unsqueeze(1)).squeeze(1)
        return out


def test_noise_in_eval_mode():
    """A router that always adds noise is pruned with the matrix of its noise; scores compare runs of the same noise."""
    model = nn.Sequential(nn.Linear(4, WIDTH), Tutorial())
    x = torch.randn(2, 20, 4)
    with torch.no_grad():
        for number in (1, 4):
            model[1].experts[number][2].weight.mul_(0.01)
            model[1].experts[number][2].bias.zero_()
    report = prune_experts(model, x, 2)
    assert report.proved and kept_of(report, model) == [0, 2, 3, 5]
    assert model[1].router.noise.out_features == model[1].router.route.out_features == 4
    model.train()(x).sum().backward()


class Grouped(nn.Module):
    """The router of DeepSeek-V3: sigmoids with a correction, the best of the experts in the best groups."""

    def __init__(self, experts=8, groups=2, best_groups=1, k=2):
        super().__init__()
        self.experts_, self.groups, self.best_groups, self.k = experts, groups, best_groups, k
        self.weight = nn.Parameter(torch.randn(experts, WIDTH))
        self.register_buffer("correction", torch.randn(experts) * 0.1)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, WIDTH))

    def forward(self, x):
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores + self.correction
        of_groups = choice.view(-1, self.groups, self.experts_ // self.groups).topk(2, dim=-1)[0].sum(-1)
        best = of_groups.topk(self.best_groups, dim=-1)[1]
        mask = torch.zeros_like(of_groups).scatter_(1, best, 1)
        mask = mask.unsqueeze(-1).expand(-1, self.groups, self.experts_ // self.groups).reshape(-1, self.experts_)
        chosen = choice.masked_fill(~mask.bool(), -torch.inf).topk(self.k, dim=-1)[1]
        gates = scores.gather(1, chosen)
        gates = gates / gates.sum(-1, keepdim=True)
        return torch.einsum("tk,tw,tkwv->tv", gates.to(x.dtype), x, self.up[chosen])


def test_groups_stay_equal():
    """Experts leave each group of a grouped router alike; where too few would be left in a group, nothing leaves."""
    model = nn.Sequential(nn.Linear(4, WIDTH), Grouped())
    dense = copy.deepcopy(model)
    keep = kept_of(prune_experts(model, X, 3), model)  # rounded up to four
    assert [sum(number < 4 for number in keep), sum(number >= 4 for number in keep)] == [2, 2]
    twin = Grouped(4)
    own = dense[1].state_dict()
    twin.load_state_dict({name: tensor[keep] for name, tensor in own.items()})
    torch.testing.assert_close(model(X), twin(dense[0](X)))
    with pytest.raises(PruningError, match="No experts of Sequential can be removed"):
        prune_experts(nn.Sequential(nn.Linear(4, WIDTH), Grouped(k=3)), X, 4)


class Soft(nn.Module):
    """Soft-MoE: each slot is a mean over all inputs, weighed by scores (arXiv 2308.00951)."""

    def __init__(self, experts=6, slots=1):
        super().__init__()
        shape = (WIDTH, experts) if slots == 1 else (WIDTH, experts, slots)
        self.phi = nn.Parameter(torch.randn(shape))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))

    def forward(self, x):
        logits = torch.einsum("tw,wes->tes", x, self.phi.reshape(WIDTH, len(self.experts), -1))
        slots = torch.einsum("tes,tw->esw", logits.softmax(0), x)
        outputs = torch.stack([expert(slots[number]) for number, expert in enumerate(self.experts)])
        combine = logits.flatten(1).softmax(1).view_as(logits)
        return torch.einsum("tes,esw->tw", combine, outputs)


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_mixtures_are_refused(slots):
    """Experts of a soft mixture are chosen by no one: the message says so, and the model is as it was."""
    model = nn.Sequential(nn.Linear(4, WIDTH), Soft(slots=slots))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        PruningError, match="soft mixtures" if slots == 1 else "No experts of Sequential can be removed"
    ):
        prune_experts(model, X, 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_multi_gate_mixture_loses_rows_of_all_gates():
    """Several gates over one list of experts (Ma et al. 2018) follow together."""

    class MultiGate(nn.Module):
        def __init__(self, experts=6):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))
            self.gates = nn.ModuleList(nn.Linear(WIDTH, experts) for _ in range(2))

        def forward(self, x):
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            return [(gate(x).softmax(-1)[..., None] * outputs).sum(1) for gate in self.gates]

    model = nn.Sequential(nn.Linear(4, WIDTH), MultiGate())
    assert prune_experts(model, X, 0.5).proved
    assert [gate.out_features for gate in model[1].gates] == [3, 3] == [len(model[1].experts), 3]


class Dispatched(nn.Module):
    """Fused experts with a capacity: places in the queue of each expert by sums over tokens (GShard)."""

    def __init__(self, experts=6, capacity=4):
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.gating = nn.Parameter(torch.randn(WIDTH, experts))
        self.up, self.down = nn.Parameter(torch.randn(experts, WIDTH, 9)), nn.Parameter(torch.randn(experts, 9, WIDTH))

    def forward(self, x):
        gates = torch.einsum("bnd,de->bne", x, self.gating).softmax(-1)
        top, chosen = gates.max(dim=-1)
        mask = F.one_hot(chosen, self.experts).to(x.dtype)
        place = (mask.cumsum(1) - mask) * mask
        mask = mask * (place < self.capacity)
        queue = F.one_hot(place.sum(-1).long().clamp(max=self.capacity - 1), self.capacity).to(x.dtype)
        combine = (top * mask.sum(-1))[..., None, None] * mask[..., None] * queue[..., None, :]
        sent = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(x.dtype))
        outputs = torch.einsum("ebch,ehd->ebcd", torch.einsum("ebcd,edh->ebch", sent, self.up).relu(), self.down)
        balance = (mask.mean(1) * gates.mean(1)).mean() * float(self.experts**2)
        return torch.einsum("ebcd,bnec->bnd", outputs, combine), balance


def test_experts_with_a_capacity():
    """Tokens beyond the capacity of an expert are dropped in the dense and in the slim mixture alike."""
    model = nn.Sequential(nn.Linear(4, WIDTH), Dispatched())
    dense, x = copy.deepcopy(model), torch.randn(3, 20, 4)
    report = prune_experts(model, x, 0.5)
    keep, twin = kept_of(report, model), Dispatched(3)
    own = {
        name: tensor[:, keep] if name == "gating" else tensor[keep] for name, tensor in dense[1].state_dict().items()
    }
    twin.load_state_dict(own)
    for one, two in zip(model(x), twin(dense[0](x)), strict=True):
        torch.testing.assert_close(one, two)
    assert report.proved and model[1].experts == 3
