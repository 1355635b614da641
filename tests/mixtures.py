"""Mixtures of experts as people write them, and slim ones built by hand."""

import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN = 7, 5
STYLES = ["loop", "index_add", "stacked", "dense", "dict", "fused", "fused_dense", "fused_columns"]
ROUTERS = ["linear", "biased", "parameter", "transposed", "columns"]
GATES = ["softmax", "softmax_of_chosen", "renormalised", "sigmoid", "corrected"]
NUMBERS = ["attribute", "config", "length", "dict"]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Router(nn.Module):
    """Gates and numbers of the chosen experts of each token."""

    def __init__(self, experts, kind, gate, k):
        super().__init__()
        self.kind, self.gate, self.k = kind, gate, k
        if kind in ("linear", "biased"):
            self.score = nn.Linear(WIDTH, experts, bias=kind == "biased")
        else:
            shape = (WIDTH, experts) if kind == "columns" else (experts, WIDTH)
            self.weight = nn.Parameter(torch.randn(shape) * 0.5)
        if gate == "corrected":
            self.register_buffer("correction", torch.randn(experts) * 0.1)

    def logits(self, x):
        if self.kind in ("linear", "biased"):
            return self.score(x)
        if self.kind == "parameter":
            return F.linear(x, self.weight)
        return x @ self.weight if self.kind == "columns" else x @ self.weight.t()

    def forward(self, x):
        logits = self.logits(x)
        if self.gate == "softmax_of_chosen":
            top, chosen = logits.topk(self.k, dim=-1)
            return top.softmax(-1), chosen
        scores = logits.sigmoid() if self.gate in ("sigmoid", "corrected") else logits.softmax(-1)
        chosen = (scores + self.correction if self.gate == "corrected" else scores).topk(self.k, dim=-1)[1]
        gates = scores.gather(-1, chosen)
        return (gates / gates.sum(-1, keepdim=True) if self.gate != "softmax" else gates), chosen


class Mixture(nn.Module):
    def __init__(self, experts=6, style="loop", router="linear", gate="softmax", k=2, shared=False, number="attribute"):
        super().__init__()
        self.style, self.number, self.k = style, number, k
        self.settings = {"style": style, "router": router, "gate": gate, "k": k, "shared": shared, "number": number}
        if number == "attribute":
            self.count = experts
        if number == "config":
            self.config = SimpleNamespace(n_experts=experts, width=WIDTH)
        if number == "dict":
            self.hparams = {"n_experts": experts}
        self.router = Router(experts, router, gate, k)
        if style.startswith("fused"):
            self.up = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) * 0.4)
            self.up_bias = nn.Parameter(torch.randn(experts, HIDDEN) * 0.1)
            self.down = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) * 0.4)
        elif style == "dict":
            self.experts = nn.ModuleDict({f"expert_{number}": Expert() for number in range(experts)})
        else:
            self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.shared = Expert() if shared else None

    def experts_now(self):
        if self.number == "attribute":
            return self.count
        if self.number == "config":
            return self.config.n_experts
        if self.number == "dict":
            return self.hparams["n_experts"]
        return len(self.up) if self.style.startswith("fused") else len(self.experts)

    def expert(self, number, x):
        if self.style.startswith("fused"):
            return (x @ self.up[number] + self.up_bias[number]).relu() @ self.down[number]
        return self.experts[f"expert_{number}" if self.style == "dict" else number](x)

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        gates, chosen = self.router(x)
        out = getattr(self, f"by_{self.style}")(x, gates, chosen)
        if self.shared is not None:
            out = out + self.shared(x)
        return out.reshape(shape)

    def by_loop(self, x, gates, chosen):
        out = torch.zeros_like(x)
        for number in range(self.experts_now()):
            token, place = torch.where(chosen == number)
            if token.numel():
                out[token] += gates[token, place, None] * self.expert(number, x[token])
        return out

    by_dict = by_loop

    def by_fused(self, x, gates, chosen):
        out = torch.zeros_like(x)
        for number, own in enumerate(F.one_hot(chosen, self.experts_now()).permute(2, 1, 0)):
            place, token = own.nonzero(as_tuple=True)
            out.index_add_(0, token, self.expert(number, x[token]) * gates[token, place, None])
        return out

    def by_index_add(self, x, gates, chosen):
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.experts_now())
        for number, expert in enumerate(self.experts):
            token, place = mask[:, :, number].nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x[token]) * gates[token, place, None])
        return out

    def by_stacked(self, x, gates, chosen):
        outputs = torch.stack([self.expert(number, x) for number in range(self.experts_now())], dim=1)
        return (outputs[torch.arange(len(x))[:, None], chosen] * gates[..., None]).sum(1)

    def by_dense(self, x, gates, chosen):
        weights = x.new_zeros(len(x), self.experts_now()).scatter(1, chosen, gates)
        return sum(weights[:, number, None] * expert(x) for number, expert in enumerate(self.experts))

    def by_fused_dense(self, x, gates, chosen):
        weights = x.new_zeros(len(x), self.experts_now()).scatter(1, chosen, gates)
        hidden = (torch.einsum("tw,ewh->teh", x, self.up) + self.up_bias).relu()
        return torch.einsum("te,teh,ehw->tw", weights, hidden, self.down)

    def by_fused_columns(self, x, gates, chosen):
        up, bias, down = self.up[chosen], self.up_bias[chosen], self.down[chosen]
        hidden = (torch.einsum("tw,tkwh->tkh", x, up) + bias).relu()
        return (torch.einsum("tkh,tkhw->tkw", hidden, down) * gates[..., None]).sum(1)


def net(experts=6, **settings):
    """A mixture between two layers."""
    return nn.Sequential(nn.Linear(4, WIDTH), Mixture(experts, **settings), nn.Linear(WIDTH, 3))


def gates_of(mixture, x):
    """Gates of all experts for each token, zero where they were not chosen, written out."""
    gates, chosen = mixture.router(x)
    whole = torch.zeros(len(x), mixture.experts_now(), dtype=x.dtype)
    for token, place in itertools.product(range(len(x)), range(gates.shape[1])):
        whole[token, chosen[token, place]] += gates[token, place]
    return whole


def slim_twin(model, keep):
    """Build the net with fewer experts from its constructor, and copy the tensors of those that are kept."""
    settings = dict(model[1].settings)
    twin = net(len(keep), **settings)
    source, own = model.state_dict(), {}
    for name, tensor in twin.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["1", "experts"]:
            number = int(parts[2].removeprefix("expert_"))
            parts[2] = parts[2].replace(str(number), str(keep[number]))
            own[name] = source[".".join(parts)]
        elif source[name].shape == tensor.shape and "router" not in name:
            own[name] = source[name]
        elif settings["router"] == "columns" and name == "1.router.weight":
            own[name] = source[name][:, keep]
        else:
            own[name] = source[name][keep]
    twin.load_state_dict(own)
    return twin


def kept_of(report, model):
    """Numbers of the experts that a report says are kept."""
    return next(iter(next(iter(report.kept.values())).values())).tolist()
