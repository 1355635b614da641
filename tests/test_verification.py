"""What a cut is verified by: sizes, counts and the numbers of every operator, in every type and mode, on any inputs."""

import copy
import types
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError, load_state_dict_
from lightning_prune.model.calls import Instead
from lightning_prune.pruning.filters import prune_filters
from lightning_prune.surgery import Disproof, Proof, draft, find_groups, verify

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4)) * 3


def kept(report, name, dim=0):
    """Return which indices of a parameter were kept."""
    return report.kept[name][dim]


def silenced(model, report):
    """Return a copy of the full model with zeros wherever the report says that indices were pruned."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, dims in report.kept.items():
            parameter = model.get_parameter(name)
            for dim, indices in dims.items():
                gone = np.setdiff1d(np.arange(parameter.shape[dim]), indices.numpy())
                parameter.index_fill_(dim, torch.from_numpy(gone), 0.0)
    return model


class GroupNorm(nn.Module):
    """A norm of one's own, whose number of groups is held somewhere."""

    def __init__(self, groups, channels, held):
        super().__init__()
        self.held, self.num_groups = held, groups
        self.config = types.SimpleNamespace(groups=groups)
        self.options = {"groups": groups}
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        count = {
            "attribute": self.num_groups,
            "config": self.config.groups,
            "dict": self.options["groups"],
            "literal": 4,
        }[self.held]
        return F.group_norm(x, count, self.weight, self.bias)


@pytest.mark.parametrize("held", ["attribute", "config", "dict", "literal"])
def test_groups_of_a_functional_norm_are_those_of_the_full_model(held):
    """Each group that is left is normalised by itself, whether the number of groups follows or each loses alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), GroupNorm(4, 16, held), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    full = copy.deepcopy(model)
    report = prune_filters(model, IMAGE, 0.5)
    left = kept(report, "0.weight")
    made = full[0](IMAGE)
    groups = [F.group_norm(made[:, left[left // 4 == group]], 1) for group in range(4) if (left // 4 == group).any()]
    expected = F.conv2d(torch.cat(groups, 1).relu(), full[3].weight[:, left], full[3].bias)
    torch.testing.assert_close(model(IMAGE), expected)
    assert model[0].out_channels == 8


STATISTICS = {
    "layer norm": lambda t: (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True) + 1e-5).sqrt(),
    "softmax": lambda t: t.softmax(1),
    "l2": lambda t: F.normalize(t, dim=1),
    "max": lambda t: t - t.amax(1, keepdim=True),
}
PIECES = {
    "first four": (lambda y: (y[:, :4], y[:, 4:]), [4, 12]),
    "last four": (lambda y: (y[:, :-4], y[:, -4:]), [12, 4]),
    "split": (lambda y: y.split(8, 1), [8, 8]),
    "split with sizes": (lambda y: y.split([4, 12], 1), [4, 12]),
    "half": (lambda y: y.chunk(2, 1), [8, 8]),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("pieces", PIECES)
def test_statistics_of_pieces_run_over_what_is_left_of_each(statistic, pieces):
    """A statistic over a piece that code takes by a number is one over those channels of this piece that are left."""
    (take, sizes), apply = PIECES[pieces], STATISTICS[statistic]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.o(torch.cat([apply(piece) for piece in take(self.a(x))], 1))

    torch.manual_seed(0)
    model = Net().double().eval()
    full, image = copy.deepcopy(model), IMAGE.double()
    try:
        report = prune_filters(model, image, 0.5)
    except PruningError:
        assert pieces in ("split", "split with sizes")  # all of whose channels a number in the code counts
        return
    left = kept(report, "a.weight")
    made, bounds = full.a(image), np.cumsum([0, *sizes])
    own = [left[(left >= start) & (left < stop)] for start, stop in pairwise(bounds)]
    expected = torch.cat([apply(made[:, indices]) for indices in own], 1)
    torch.testing.assert_close(model(image), F.conv2d(expected, full.o.weight[:, left], full.o.bias))


class Attention(nn.Module):
    """Attention whose heads are counted in a config, behind a scale."""

    def __init__(self, scale=1.0, tail="numbers"):
        super().__init__()
        self.config, self.tail, self.n_layers = types.SimpleNamespace(heads=4), tail, 4
        self.e, self.qkv, self.p = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.scale, self.o = nn.Parameter(torch.full((16,), scale)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.e(x)
        b, t, _ = x.shape
        q, k, v = (part.reshape(b, t, self.config.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        z = self.o(x + self.scale * self.p(y))
        return {
            "numbers": lambda: z,
            "positions": lambda: z.argmax(-1),
            "no numbers": lambda: z * float("nan"),
            "complex": lambda: torch.complex(z, -z),
            "loss": lambda: z.square().mean(),
        }[self.tail]()


class Literal(Attention):
    """The same with a number in the code, beside an attribute that happens to equal it."""

    def forward(self, x):
        x = self.e(x)
        b, t, _ = x.shape
        q, k, v = (part.reshape(b, t, 4, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        return self.o(x + self.scale * self.p(y))


SETTINGS = {
    "as it is": (1.0, TOKENS, torch.float32, "numbers"),
    "a scale of 1e-6": (1e-6, TOKENS, torch.float32, "numbers"),
    "a scale of zero": (0.0, TOKENS, torch.float32, "numbers"),
    "bfloat16": (1.0, TOKENS, torch.bfloat16, "numbers"),
    "float16": (1.0, TOKENS, torch.float16, "numbers"),
    "zeros": (1.0, torch.zeros(2, 5, 8), torch.float32, "numbers"),
    "ones": (1.0, torch.ones(2, 5, 8), torch.float32, "numbers"),
    "one token": (1.0, TOKENS[:, :1], torch.float32, "numbers"),
    "positions": (1.0, TOKENS, torch.float32, "positions"),
    "no numbers": (1.0, TOKENS, torch.float32, "no numbers"),
    "complex": (1.0, TOKENS, torch.float32, "complex"),
    "loss": (1.0, TOKENS, torch.float32, "loss"),
}


@pytest.mark.parametrize("kind", [Attention, Literal])
@pytest.mark.parametrize("setting", SETTINGS)
def test_heads_are_read_at_their_width_whatever_hides_it(setting, kind):
    """Neither small scales, rounding, dull inputs nor outputs without numbers let heads of another width pass."""
    scale, example, dtype, tail = SETTINGS[setting]
    torch.manual_seed(0)
    model = kind(scale, tail)
    with torch.no_grad():
        model.qkv.weight.mul_(3)
    model = model.to(dtype).eval()
    full = copy.deepcopy(model)
    report = prune_filters(model, example.to(dtype), 0.5, ignore=["e", "o"])
    assert model.n_layers == 4
    pair = [net.double() for net in (model, silenced(full, report))]
    for net in pair:
        net.tail = "numbers"
        net.scale.data.fill_(1.0)
    # queries that were scaled to compensate a narrower head are rounded to the type of the model
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-6)
    torch.testing.assert_close(*(net(TOKENS.double()) for net in pair), rtol=0, atol=tolerance)


def test_a_config_that_models_share_changes_for_the_pruned_one_alone():
    """Of two models built from one config, the other goes on; a state dict brings the number into a third."""
    config = types.SimpleNamespace(heads=4, inner={"unused": 4})

    def build():
        model = Attention().eval()
        model.config = config
        return model

    model, twin, third = build(), build(), build()
    model.tails = nn.ModuleList([nn.Identity()])
    model.tails[0].config = config
    prune_filters(model, TOKENS, 0.5, ignore=["e", "o"])
    assert (model.config.heads, model.tails[0].config.heads, config.heads) == (2, 2, 4)
    assert twin(TOKENS).shape == (2, 5, 5)
    del model.tails
    load_state_dict_(third, model.state_dict())
    torch.testing.assert_close(third(TOKENS), model(TOKENS))
    assert third.config.heads == 2 and config.heads == 4


def gpt(depth, literal=False):
    """Return a language model as it is freshly initialised, with weights of 0.02."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 4
            self.n1, self.n2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.qkv, self.p, self.up, self.down = (
                nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32),
            )  # fmt: skip

        def forward(self, x):
            b, t, _ = x.shape
            shape = (b, t, 4, 8) if literal else (b, t, 4, -1)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.n1(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
            x = x + self.p(y)
            return x + self.down(F.gelu(self.up(self.n2(x))))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 32), *(Block() for _ in range(depth)), nn.Linear(32, 20))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0, 0.02)
    return model.eval()


def test_a_fresh_language_model_is_cut_rightly_in_every_layer():
    """Where each attention adds next to nothing to a stream, each is nevertheless read at its own width."""
    ids = torch.randint(0, 20, (2, 6))
    model = gpt(12)
    full = copy.deepcopy(model)
    report = prune_filters(model, ids, 0.5, ignore=["0"])
    assert all(block.qkv.out_features == 48 for block in model[1:-1])
    pair = [net.double() for net in (model, silenced(full, report))]
    for net in pair:
        for name, parameter in net.named_parameters():
            if "qkv" in name or name.endswith("p.weight"):
                parameter.data.mul_(30)
    torch.testing.assert_close(*(net(ids) for net in pair), rtol=1e-6, atol=1e-6)


def test_refusals_of_many_blocks_cost_no_more_than_one():
    """Blocks of a kind that cannot be cut are found out together: how often the model runs does not hang on depth."""
    runs = []
    for depth in (2, 8):
        model = gpt(depth, literal=True)
        count = 0

        def counting(*_):
            nonlocal count
            count += 1

        model.register_forward_pre_hook(counting)
        report = prune_filters(model, torch.randint(0, 20, (2, 6)), 0.5, ignore=["0"])
        assert all(block.qkv.out_features == 96 and block.up.out_features == 32 for block in model[1:-1])
        assert any("[2, 6, 4, 8]" in pin.reason for pin in report.pinned)
        runs.append(count)
    assert runs[0] == runs[1]


class Detector(nn.Module):
    """Selects boxes by score, and no example has one above the threshold."""

    def __init__(self):
        super().__init__()
        self.a, self.box, self.score = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1)
        nn.init.constant_(self.score.bias, -9.0)

    def forward(self, x):
        y = self.a(x).relu()
        score = self.score(y).flatten()
        boxes = self.box(y).permute(0, 2, 3, 1).reshape(-1, 4)
        return boxes[(score > 0).nonzero().squeeze(1)]


def test_what_reaches_an_empty_tensor_is_kept():
    """What a selection that selects nothing would have met was not seen, so it is kept, and the report says why."""
    torch.manual_seed(0)
    model = Detector().eval()
    report = prune_filters(model, IMAGE, 0.5)
    model.score.bias.data.fill_(9.0)
    assert model(IMAGE).shape == (128, 4) and model.a.out_channels == 8
    assert any(pin.tensor == "box.weight" and "empty on the example" in pin.reason for pin in report.pinned)


class Tasks(nn.Module):
    """Two heads of equal shape that read different features, of which the example runs one."""

    def __init__(self, together):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        heads = nn.Linear(16, 4), nn.Linear(16, 4)
        self.heads = nn.ModuleList(heads) if together else None
        self.first, self.second = (None, None) if together else heads

    def forward(self, x, task=0):
        h = self.a(x).relu()
        first, second = self.heads or (self.first, self.second)
        return second(h.mean((2, 3))) if task else first(self.b(h).relu().mean((2, 3)))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_head_that_did_not_run_keeps_its_shape(scope, together):
    """Nothing is known of what a head that did not run would read, so it is not cut like one beside it that did."""
    torch.manual_seed(0)
    model = Tasks(together).eval()
    report = prune_filters(model, IMAGE, 0.5, scope=scope)
    idle = "heads.1" if together else "second"
    assert model.get_parameter(f"{idle}.weight").shape == (4, 16)
    assert any(pin.tensor == f"{idle}.weight" and "never ran" in pin.reason for pin in report.pinned)


class Auxiliary(nn.Module):
    """Heads that train mode alone runs, on features of their own."""

    def __init__(self, classes, norm):
        super().__init__()
        self.l1, self.l2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(16, classes), nn.Linear(16, 5)])

    def forward(self, x):
        a = self.norm(self.l1(x)).relu()
        b = self.l2(a).relu()
        return (self.heads[0](a), self.heads[1](b)) if self.training else self.heads[1](b)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("classes", [5, 7])
def test_what_train_mode_alone_runs_is_cut_with_what_it_reads(classes, norm, rows):
    """A head that runs in training only loses the columns of the channels that it reads."""
    torch.manual_seed(0)
    model = Auxiliary(classes, norm).eval()
    full, x = copy.deepcopy(model), torch.randn(6, 8)
    report = prune_filters(model, x[:rows], 0.5)
    statistics = {name: buffer.clone() for name, buffer in full.named_buffers()}
    for name, buffer in model.named_buffers():
        own = statistics[name]
        for dim, indices in report.kept.get(name, {}).items():
            own = own.index_select(dim, indices)
        assert torch.equal(buffer, own)  # though train mode was run
    left = kept(report, "l1.weight")
    assert torch.equal(kept(report, "heads.0.weight", 1), left)
    aux = model.train()(x)[0]
    hidden = full.train().norm(full.l1(x)).relu()[:, left]
    torch.testing.assert_close(aux, F.linear(hidden, full.heads[0].weight[:, left], full.heads[0].bias))


class Sliced(nn.Module):
    """Takes a number of channels that differs in train mode, by operators that run in both modes."""

    def __init__(self):
        super().__init__()
        self.a, self.o, self.p = nn.Linear(8, 16), nn.Linear(12, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.a(x)
        z = self.o(y[:, :12])
        return z + self.p(y[:, :4]) if self.training else z


def test_what_train_mode_takes_by_the_same_operators_is_seen():
    """A slice that only train mode takes, beside one that both modes take, fixes what it counts."""
    torch.manual_seed(0)
    model, x = Sliced().double().eval(), torch.randn(5, 8).double()
    full = copy.deepcopy(model)
    try:
        report = prune_filters(model, x, 0.5)
    except PruningError:
        return
    for net in (model, full):
        net.train()
    if report.kept:
        torch.testing.assert_close(model(x), silenced(full, report)(x))


class Scores(nn.Module):
    """Attention that divides its scores by a number made from the head width, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.e, self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.p, self.o = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.e(x)
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, 4, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        width = q.shape[-1]
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2)
            scores = {
                "divided": lambda: scores / width**0.5,
                "multiplied": lambda: scores * width**-0.5,
                "tensor": lambda: scores / torch.sqrt(torch.tensor(width).float()),
                "width": lambda: scores / width,
            }[self.way]()
            y = scores.softmax(-1) @ v
        return self.o(x + self.p(y.transpose(1, 2).reshape(b, t, -1)))


@pytest.mark.parametrize("way", ["fused", "divided", "multiplied", "tensor", "width"])
def test_numbers_made_from_widths_are_compensated(way):
    """Where heads become narrower, queries are scaled so that the scores stay what they were with the rest silenced."""
    torch.manual_seed(0)
    model = Scores(way).double().eval()
    full = copy.deepcopy(model)
    report = prune_filters(model, TOKENS.double(), 0.5, ignore=["e"])
    assert model.q.out_features == 8 and "q.weight" in report.scaled and not report.constants
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), silenced(full, report)(x), rtol=1e-6, atol=1e-7)


class Added(nn.Module):
    """A number made from a width that is added, not multiplied: no weight can compensate it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(1, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.o((a * b).sum(-1, keepdim=True) + a.shape[-1])


def test_a_number_that_cannot_be_compensated_is_no_silent_change():
    """What adds a number made from the width is not cut."""
    model = Added().double().eval()
    with pytest.warns(UserWarning, match="a number that it takes becomes 6, not 12"):
        report = prune_filters(model, torch.randn(4, 8).double(), 0.5)
    assert model.a.out_features == 12 and not report.kept


CONSTANTS = {
    "half a mask": lambda c: torch.cat([torch.ones(c // 2), torch.zeros(c - c // 2)]),
    "written into": lambda c: torch.zeros(c).index_fill_(0, torch.arange(c // 2), 1.0),
    "drawn with a generator": lambda c: torch.randn(c, generator=torch.Generator().manual_seed(1)),
    "counted": lambda c: torch.arange(c).float(),
    "spaced": lambda c: torch.linspace(0, 1, c),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_channels_that_code_makes_anew_are_those_of_the_channels(name):
    """A constant for each channel that follows the width, but not the channels that were kept, is not let pass."""
    make = CONSTANTS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.o(y * make(y.shape[1]).to(y).view(1, -1, 1, 1))

    torch.manual_seed(0)
    model = Net().double().eval()
    full, image = copy.deepcopy(model), IMAGE.double()
    try:
        report = prune_filters(model, image, 0.5)
    except PruningError:
        return
    if report.kept:
        torch.testing.assert_close(model(image), silenced(full, report)(image))


def test_random_numbers_do_not_stand_in_the_way():
    """Dropout that is always on, noise and stochastic depth are drawn alike for both models."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            y = F.dropout(self.a(x), 0.3, True)
            y = y + torch.randn_like(y) + torch.rand(y.shape)
            return self.o(y * torch.empty_like(y).bernoulli_(0.7))

    model = Noisy().eval()
    state = torch.get_rng_state()
    prune_filters(model, IMAGE, 0.5)
    assert model.a.out_channels == 6 and torch.equal(state, torch.get_rng_state())


def test_a_loss_as_the_only_output_hides_nothing():
    """Where a step is traced that returns a loss alone, each operator before it is compared."""
    torch.manual_seed(0)
    model = Attention().double().eval()
    full = copy.deepcopy(model)

    def step(net, batch):
        return net(batch).square().mean()

    report = prune_filters(model, Instead(step, (TOKENS.double(),)), 0.5, ignore=["e", "o"])
    torch.testing.assert_close(model(TOKENS.double()), silenced(full, report)(TOKENS.double()))
    assert report.proved and model.qkv.out_features == 24


def planted(model, structure, cut, kind):
    """Return a cut with an error in it, and its slim tensors."""
    kept = {name: dict(dims) for name, dims in cut.kept.items()}
    tensors = cut.tensors(model)
    if kind == "other indices":
        kept["2.weight"][1] = (kept["2.weight"][1] + 1) % 12
        kept["2.weight"][1] = kept["2.weight"][1].sort().values
    if kind == "another order":
        tensors["2.weight"] = tensors["2.weight"].flip(1)
    if kind == "a scaled row":
        tensors["2.weight"][1] *= 1.1
    if kind == "statistics of others":
        kept["1.running_mean"] = {0: torch.arange(12 - len(cut.kept["1.running_mean"][0]), 12)}
    attributes = cut.attributes if kind != "a stale attribute" else ()
    wrong = type(cut)(cut.keep, kept, cut.shapes, attributes)
    if kind in ("other indices", "statistics of others"):
        tensors = wrong.tensors(model)
    return wrong, tensors


@pytest.mark.parametrize(
    "kind", ["none", "other indices", "another order", "a scaled row", "statistics of others", "a stale attribute"]
)
def test_planted_errors_are_found(kind):
    """A cut is disproved if indices, their order, values, statistics or attributes are others than they should be."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(12)  # fresh statistics, zeros and ones, show nothing by themselves
    model = nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.Conv2d(12, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)).eval()
    structure = find_groups(model, IMAGE)
    keep = {
        "0": np.arange(12) % 3 > 0,
        "2": np.repeat([True, True, False], 1 if structure.groups["2"].width == 3 else 2),
    }
    cut, tensors = planted(model, structure, draft(model, structure, keep), kind)
    found = verify(model, structure, cut, lambda: tensors)
    assert isinstance(found, Proof if kind == "none" else Disproof)


def test_nothing_of_the_model_moves_while_a_cut_is_verified():
    """Parameters that a forward pass writes, in train mode too, inputs and caches are as before."""

    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 2)
            self.seen = []

        def forward(self, x):
            with torch.no_grad():
                self.k.weight.mul_(0.9).add_(self.q.weight, alpha=0.1)
                x.mul_(2.0) if self.training else x
            self.seen.append(len(x))
            return self.o(self.q(x) + self.k(x))

    model, x = Momentum(), torch.randn(4, 8)
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    structure = find_groups(model, x)
    cut = draft(model, structure, {name: np.arange(6) > 2 for name in structure.groups})
    verify(model, structure, cut, lambda: cut.tensors(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, given) and model.seen == [] and model.training


def test_a_request_that_is_met_does_not_warn():
    """Verification prints and warns nothing where all is well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_filters(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(4, 8), 0.5)


@pytest.mark.parametrize("width", [4000, 4100, 6000, 9000])
def test_wide_layers_are_compared_as_narrow_ones_are(width):
    """A width beyond what one projection keeps may fall below it in the slim model; both are projected alike."""
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
    x = torch.randn(3, 8)
    report = prune_filters(model, x, 0.5)
    assert report.proved and model[0].out_features == width // 2


class Frames(nn.Module):
    """Convolutions whose output lies in memory as (batch, channels, time) when linear layers read it."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 16, 3, padding=1), norm
        self.query, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.query(self.norm(self.conv(x).transpose(1, 2))))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(16), nn.GELU()], ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("frames", [1, 5])
def test_linear_layers_read_what_does_not_lie_in_one_piece(norm, frames):
    """torch takes other operators for such inputs, and what lies how is another thing once units have gone."""
    torch.manual_seed(0)
    model = Frames(copy.deepcopy(norm)).eval()
    x = torch.randn(2, 3, frames)
    full = copy.deepcopy(model)
    report = prune_filters(model, x, 0.5)
    assert report.proved and model.conv.out_channels == model.query.out_features == 8
    if not isinstance(norm, nn.LayerNorm):  # whose statistics are of fewer channels in the slim model
        torch.testing.assert_close(model(x), silenced(full, report)(x))
