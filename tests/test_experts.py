"""Whole experts leave mixtures: found by shapes, scored, verified against slim twins built by hand, loaded again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError, load_state_dict_
from lightning_prune.pruning.experts import prune_experts
from lightning_prune.surgery import experts as surgery
from lightning_prune.surgery.loading import recipe_json
from tests.mixtures import GATES, NUMBERS, ROUTERS, STYLES, WIDTH, Mixture, gates_of, net, slim_twin

X = torch.randn(40, 4)

# Each style with each router, and each gate, number of chosen experts, and way to hold their number in turn.
CASES = []
for place, (style, router) in enumerate([(style, router) for style in STYLES for router in ROUTERS]):
    gate, number = GATES[place % len(GATES)], NUMBERS[place % len(NUMBERS)]
    CASES.append(
        {"style": style, "router": router, "gate": gate, "k": 1 + place % 3, "shared": place % 2 == 0, "number": number}
    )


def kept_of(report, model):
    """Numbers of the experts that a report says are kept."""
    return next(iter(next(iter(report.kept.values())).values())).tolist()


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


class LossAlone(Balanced):
    """Returns a loss, and holds its router itself, so that nothing else tells what a mixture computes."""

    def __init__(self, wrong):
        super().__init__()
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


class Scaled(Mixture):
    """Divides by the number of experts, which a tuple hides."""

    def __init__(self, experts=6):
        super().__init__(experts)
        self.sizes = (experts, WIDTH)

    def forward(self, x):
        return super().forward(x) / self.sizes[0] + torch.zeros(self.sizes).sum()


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
