"""What `count_flops` promises; the models carry the multiply-adds that were worked out for them by hand."""

import logging
import warnings
from collections import namedtuple
from dataclasses import dataclass
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.measure.flops import count_flops, einsum_multiply_adds
from lightning_prune.measure.footprint import count, count_traced
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import find_structure, trace
from tests.counts import assert_counts_agree


class ConvNet(nn.Module):
    """A plain network with modules in modules, one of them never called."""

    inputs = torch.ones(2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential()
        self.body.add_module("conv", nn.Conv2d(3, 4, 3, padding=1))
        self.body.add_module("norm", nn.BatchNorm2d(4))
        self.body.add_module("act", nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 10)
        self.unused = nn.Linear(4, 10)
        conv = 2 * 8 * 8 * 4 * 3 * 9  # batch * height * width * out * in * kernel
        norm = 2 * 8 * 8 * 4 * 2  # scale and shift
        pool = 2 * 8 * 8 * 4
        head = 2 * 4 * 10
        self.flops = {
            "": conv + norm + pool + head,
            "body": conv + norm,
            "body.conv": conv,
            "body.norm": norm,
            "body.act": 0,
            "pool": pool,
            "head": head,
            "unused": 0,
        }
        self.flops_by_operator = {"conv": conv, "batch_norm": norm, "adaptive_avg_pool2d": pool, "linear": head}

    def forward(self, x):
        return self.head(F.dropout(self.pool(self.body(x)).flatten(1), training=self.training))


class Call(nn.Module):
    """A model that is one function of a square parameter and the inputs."""

    def __init__(self, function, size=8):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(size, size))

    def forward(self, *inputs):
        return self.function(self.weight, *inputs)


class Twice(nn.Module):
    """One layer under two names, called three times."""

    inputs = torch.ones(2, 4)

    def __init__(self):
        super().__init__()
        self.flops = {"": 3 * 2 * 4 * 4, "first": 3 * 2 * 4 * 4}
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.first(self.second(self.first(x)))


def assert_total(model, inputs, expected):
    found = count_flops(model, inputs)
    assert found.total == expected
    assert found.total == found.by_module[""] == sum(found.by_operator.values())
    assert not found.uncounted
    assert_counts_agree(model, inputs)
    assert not count_traced(model, find_structure(trace(model, inputs))).uncounted


def state_of(model):
    """All that counting could disturb, flat, by name."""
    state = {"random": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        state |= {f"{name}: values": parameter.detach().clone(), f"{name}: requires_grad": parameter.requires_grad}
        state |= {
            f"{name}: grad": None if grad is None else grad.clone(),
            f"{name}: objects": (id(parameter), id(grad)),
        }
    for name, buffer in model.named_buffers():
        state |= {f"{name}: values": buffer.clone(), f"{name}: object": id(buffer)}
    for name, module in model.named_modules():
        state |= {f"{name}: {key}": id(value) for key, value in vars(module).items()}
        state |= {f"{name}: hooks": [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]}
        state |= {f"{name}: lists": [[id(x) for x in value] for value in vars(module).values() if type(value) is list]}
    return state


def assert_undisturbed(model, before):
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value, name


@pytest.mark.parametrize("model", [ConvNet(), Twice()], ids=["plain", "shared"])
def test_every_module_is_counted_under_its_own_path(model):
    """Each module carries its own multiply-adds and those below it, a shared one under its first path."""
    assert count_flops(model, model.inputs).by_module == model.flops


def test_operators_are_named_as_fvcore_names_them():
    """The count by operator uses fvcore's names and counts normalisation and pooling as fvcore does."""
    model = ConvNet()
    found = count_flops(model, model.inputs)
    assert found.by_operator == model.flops_by_operator
    assert all(type(number) is int for number in [found.total, *found.by_module.values(), *found.by_operator.values()])


def test_a_model_that_multiplies_nothing_costs_nothing():
    """Movement, pointwise operators and reductions count zero, and none is reported as uncounted."""
    assert_total(
        Call(lambda w, x: F.softmax((x * 2 + w).transpose(0, 1).sum(0, keepdim=True), -1)), torch.ones(8, 8), 0
    )
    assert_total(nn.Sequential(nn.PixelShuffle(2), nn.MaxPool2d(2), nn.GELU(), nn.Flatten()), torch.ones(1, 4, 4, 4), 0)


@pytest.mark.parametrize(
    "layer, inputs, expected",
    [
        (nn.Conv1d(4, 6, 3), torch.ones(2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.ones(2, 4, 9, 9), 2 * 4 * 4 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4), torch.ones(2, 4, 5, 5), 2 * 5 * 5 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding="same"), torch.ones(4, 5, 5), 5 * 5 * 6 * 4 * 9),
        (nn.Conv3d(2, 3, 2), torch.ones(2, 3, 3, 3), 2 * 2 * 2 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.ones(2, 4, 5, 5), 2 * 5 * 5 * 4 * 3 * 9),
    ],
    ids=["1d", "grouped", "depthwise", "unbatched", "3d", "transposed"],
)
def test_convolutions(layer, inputs, expected):
    """A convolution costs its weight once at each position: of the output, or of the input where it is transposed."""
    assert_total(layer, inputs, expected)


@pytest.mark.parametrize(
    "function, shapes, expected",
    [
        (lambda w, x: F.linear(x, w), [(3, 2, 8)], 6 * 64),
        (lambda w, x: w @ x, [(8,)], 64),
        (lambda w, x: w @ x, [(5, 8, 3)], 5 * 64 * 3),
        (lambda w, x: torch.mv(w, x), [(8,)], 64),
        (lambda w, x: torch.dot(w[0], x), [(8,)], 8),
        (lambda w, x: torch.inner(x, w), [(3, 8)], 3 * 64),
        (lambda w, x: torch.addmv(x, w, x), [(8,)], 64),
        (lambda w, x: torch.addmm(x, x, w), [(3, 8)], 3 * 64),
        (lambda w, a, b: torch.baddbmm(w, a, b), [(2, 8, 3), (2, 3, 8)], 2 * 8 * 3 * 8),
        (lambda w, a, b: torch.addbmm(w, a, b), [(2, 8, 3), (2, 3, 8)], 2 * 8 * 3 * 8),
        (lambda w, a, b: torch.tensordot(a, b, ([1, 2], [1, 0])), [(2, 3, 4), (4, 3, 5)], 2 * 3 * 4 * 5),
        (lambda w, x: torch.cdist(x, w), [(3, 8)], 3 * 8 * 8),
        (lambda w, x: torch.conv_tbc(x, torch.ones(3, 8, 4), torch.ones(4)), [(6, 2, 8)], 4 * 2 * 4 * 3 * 8),
        (lambda w, x: F.layer_norm(x, (8,)), [(8,)], 4 * 8),
        (lambda w, x: F.rms_norm(x, (8,), w[0]), [(2, 2, 2, 2, 2, 8)], 3 * 32 * 8),
    ],
)
def test_products(function, shapes, expected):
    """Products of matrices, vectors and batches of both cost the output's entries times what each sums over."""
    assert_total(Call(function), tuple(torch.rand(shape) for shape in shapes), expected)


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,jk", [(123, 77), (77, 31)]),
        ("...ij,...jk->...ik", [(2, 1, 3, 4), (5, 4, 6)]),
        ("ab,bc,cd,de->ae", [(3, 4), (4, 5), (5, 6), (6, 7)]),
        ("abx,bcy->ac", [(2, 3, 4), (3, 5, 6)]),
        ("i,j->ij", [(3,), (4,)]),
        ("abc->cab", [(2, 3, 4)]),
    ],
)
def test_einsum_costs_what_torch_runs_for_it(equation, shapes):
    """An einsum counts the multiply-adds of the products that torch makes of it, to the last digit."""
    operands = tuple(torch.rand(shape) for shape in shapes)
    with FlopCounterMode(display=False) as flops:
        torch.einsum(equation, *operands)
    assert_total(Call(lambda w, *x: torch.einsum(equation, *x)), operands, flops.get_total_flops() // 2)


def test_an_einsum_follows_its_path():
    """A path that contracts the last two operands first costs what that order costs."""
    assert einsum_multiply_adds("ab,bc,cd->ad", [[3, 4], [4, 5], [5, 6]], path=[1, 2, 0, 1]) == 4 * 5 * 6 + 3 * 4 * 6


@pytest.mark.parametrize(
    "query, key, value, options",
    [
        ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), {}),
        ((5, 4), (7, 4), (7, 6), {}),
        ((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 6), {"enable_gqa": True}),
        ((9, 2, 3, 5, 4), (9, 2, 3, 5, 4), (9, 2, 3, 5, 6), {"is_causal": True}),
    ],
    ids=["heads", "plain", "grouped-query", "extra-batch"],
)
def test_scaled_dot_product_attention(query, key, value, options):
    """Attention costs (batch and heads of the query) * L * S * (E + Ev), whether it is causal or not."""
    model = Call(lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    expected = torch.Size(query[:-1]).numel() * key[-2] * (key[-1] + value[-1])
    assert_total(model, (torch.rand(query), torch.rand(key), torch.rand(value)), expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention(need_weights, masked):
    """Attention modules cost their four projections and two products, fast path or not."""
    batch, length, width = 2, 5, 8
    layer = nn.MultiheadAttention(width, 4, batch_first=True)
    inputs = {name: torch.rand(batch, length, width) for name in ("query", "key", "value")}
    inputs |= {"need_weights": need_weights, "attn_mask": torch.zeros(length, length) if masked else None}
    assert_total(layer, inputs, 4 * batch * length * width**2 + 2 * batch * length**2 * width)


def test_transformer_encoder_layer():
    """An encoder layer in eval mode counts in full, and the fast path is set as before."""
    batch, length, width, hidden = 2, 5, 8, 32
    attention = 4 * batch * length * width**2 + 2 * batch * length**2 * width
    feed_forward = 2 * batch * length * width * hidden
    norms = 2 * 5 * batch * length * width
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    assert_total(layer, torch.rand(batch, length, width), attention + feed_forward + norms)
    assert torch.backends.mha.get_fastpath_enabled()


STEPS, BATCH, WIDTH, HIDDEN, PROJECTED = 5, 3, 4, 6, 2
POSITIONS = STEPS * BATCH


@pytest.mark.parametrize(
    "layer, expected",
    [
        (nn.LSTM(WIDTH, HIDDEN), POSITIONS * 4 * HIDDEN * (WIDTH + HIDDEN)),
        (nn.GRU(WIDTH, HIDDEN, batch_first=True), POSITIONS * 3 * HIDDEN * (WIDTH + HIDDEN)),
        (nn.RNN(WIDTH, HIDDEN), POSITIONS * HIDDEN * (WIDTH + HIDDEN)),
        (nn.RNN(WIDTH, HIDDEN, nonlinearity="relu", bias=False), POSITIONS * HIDDEN * (WIDTH + HIDDEN)),
        (
            nn.LSTM(WIDTH, HIDDEN, num_layers=2, bidirectional=True),
            POSITIONS * 2 * 4 * HIDDEN * ((WIDTH + HIDDEN) + (2 * HIDDEN + HIDDEN)),
        ),
        (
            nn.LSTM(WIDTH, HIDDEN, proj_size=PROJECTED),
            POSITIONS * (4 * HIDDEN * (WIDTH + PROJECTED) + HIDDEN * PROJECTED),
        ),
    ],
    ids=["lstm", "gru", "rnn-tanh", "rnn-relu", "deep-bidirectional", "projected"],
)
def test_recurrent_layers(layer, expected):
    """A recurrent layer costs each of its matrices once per step of each sequence."""
    assert_total(layer, torch.rand(STEPS, BATCH, WIDTH), expected)


def test_packed_sequences_cost_their_own_lengths():
    """A packed batch costs the sum of its lengths, not the padding."""
    lengths = [5, 3, 1]
    gru = nn.GRU(WIDTH, HIDDEN)
    model = Call(lambda w, x: gru(pack_padded_sequence(x, torch.tensor(lengths)))[1])
    model.gru = gru
    assert_total(model, torch.rand(STEPS, BATCH, WIDTH), sum(lengths) * 3 * HIDDEN * (WIDTH + HIDDEN))


@pytest.mark.parametrize("cell, gates", [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells(cell, gates):
    """A recurrent cell costs its two matrices once per sequence."""
    assert_total(cell(WIDTH, HIDDEN), torch.rand(BATCH, WIDTH), BATCH * gates * HIDDEN * (WIDTH + HIDDEN))


def test_bilinear():
    """A bilinear layer costs the first input times its weight, then the product with the second."""
    batch, first, second, out = 3, 4, 5, 6
    inputs = torch.rand(batch, first), torch.rand(batch, second)
    assert_total(nn.Bilinear(first, second, out), inputs, batch * out * (first * second + second))


Pair = namedtuple("Pair", "left right")


@dataclass
class Report:
    scores: Tensor
    name: str = "a report"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"scores": y, "loss": None},
        lambda y: Report(y),
        lambda y: [(y, 3.0), {"again": [y]}],
        lambda y: Pair(y, "text"),
    ],
    ids=["dict", "dataclass", "nested", "namedtuple"],
)
def test_outputs_may_be_nested(wrap):
    """Whatever a model wraps its tensors in, it counts as if it returned them."""
    assert_total(Call(lambda w, x: wrap(x @ w)), torch.ones(3, 8), 3 * 64)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, *, x, scale=None, flag=False):
        return self.net(x["image"][0]) * scale if flag else x["image"][0]


def test_inputs_may_be_keywords_and_nested():
    """Keyword inputs reach the forward by name, nested as given, with what is no tensor among them."""
    inputs = {"x": {"image": [torch.ones(3, 4)]}, "scale": torch.ones(()), "flag": True}
    found = count_flops(Keywords(), inputs)
    assert found.by_module == {"": 3 * 4 * 2, "net": 3 * 4 * 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision_counts_the_same(dtype):
    """A model in double or half precision costs what it costs in single precision."""
    model = ConvNet().to(dtype)
    assert count_flops(model, model.inputs.to(dtype)).by_module == model.flops


def test_masks_do_not_lower_the_count():
    """Zeros cost what any other number costs, whether written into the weight or put there by a hook."""
    model = ConvNet()
    nn.init.zeros_(model.body.conv.weight)
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    assert count_flops(model, model.inputs).by_module == model.flops


def test_removed_units_lower_the_count():
    """Half the filters cost half."""
    slim, full = (count_flops(nn.Conv2d(3, filters, 3), torch.ones(1, 3, 8, 8)).total for filters in (4, 8))
    assert 2 * slim == full


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        return x @ w


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda w, x: torch.fft.rfft(x @ w), "aten::fft_rfft"),
        (lambda w, x: torch.linalg.multi_dot([x @ w, w, w]), "aten::linalg_multi_dot"),
        (lambda w, x: Product.apply(x @ w, w), "prim::PythonOp.Product"),
    ],
)
def test_what_has_no_rule_is_named(function, name):
    """An operator that may multiply but has no rule is reported by name and number of calls, the rest is counted."""
    found = count_flops(Call(function), torch.rand(3, 8))
    assert found.uncounted == {name: 1}
    assert found.total == 3 * 64


def written_in_place(w, x):
    (x @ w @ w).relu_()
    return x @ w


@pytest.mark.parametrize(
    "function, counted, traced",
    [
        (lambda w, x: Product.apply(x @ w, w), 1, 2),
        (lambda w, x: torch.linalg.multi_dot([x @ w, w, w]), 1, 3),
        (lambda w, x: (x @ w).data @ w, 1, 2),
        (lambda w, x: nn.Parameter(x @ w) @ w, 2, 1),
        (written_in_place, 1, 3),
    ],
    ids=["a function of one's own", "no rule", "data", "a new parameter", "in place, for nothing"],
)
def test_where_fvcore_and_the_trace_differ(function, counted, traced):
    """Calls that hide what they are made of, or from what, from one of the two counters are the known differences.

    fvcore does not see into functions of one's own and operators without a rule, nor what ``.data`` was made of; the
    trace does not see what a new parameter was made of, and counts what nothing uses if something is written into it.
    """
    model, x = Call(function), torch.rand(8, 8)
    structure = find_structure(trace(model, x))
    assert (count_flops(model, x).total, count_traced(model, structure).total) == (counted * 512, traced * 512)
    assert count(model, x, structure).total == traced * 512


def test_what_nothing_returns_costs_nothing():
    """Both counters leave out operators that no output depends on, and keep what is written into an output."""

    def pieces(w, x):
        out, view = torch.zeros(8, 8), x @ w
        view.view(-1).add_((x @ w).flatten())
        out[:4] = (x @ w)[:4]
        x @ w @ w
        return out, view

    model, x = Call(pieces), torch.rand(8, 8)
    assert_counts_agree(model, x)
    assert count_flops(model, x).total == 3 * 512


@pytest.mark.parametrize("name", ["a/b", "/conv1/Conv", "x y"])
def test_module_names_do_not_stop_a_count(name):
    """Where fvcore cannot read the names of modules the label trace counts, and says why."""
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 3))
    model.add_module("head", nn.Linear(3, 2))
    found = count(model, torch.ones(2, 4))
    assert found.by_module == {"": 2 * (12 + 6), name: 24, "head": 12}
    assert ("fvcore cannot" in found.counted) == ("/" in name)


class Restless(ConvNet):
    """A network that writes on itself, on its inputs and on the random state with each forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.cached = []

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.cached.append(x)
        return super().forward(x.add_(torch.rand(())))


def test_counting_leaves_the_model_as_it_was():
    """Parameters, gradients, statistics, modes, hooks, attributes and random state are bit for bit the same."""
    model = Restless()
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    model.body.norm.eval()
    model.head.weight.requires_grad_(False)
    seen = Mock(return_value=None)
    model.pool.register_forward_hook(seen)
    inputs, before = torch.rand(2, 3, 8, 8), state_of(model)
    given = inputs.clone()
    assert count_flops(model, inputs).by_module == model.flops
    assert_undisturbed(model, before)
    assert torch.equal(inputs, given)
    assert seen.called  # Hooks are called, as in any forward.


def test_counting_in_train_mode_is_counting_in_eval_mode():
    """BatchNorm costs what it costs in eval mode, whatever mode the model is in, and its statistics stay."""
    model = ConvNet().train()
    before = state_of(model)
    assert count_flops(model, model.inputs).by_module == model.flops
    assert_undisturbed(model, before)


def test_counting_says_nothing(caplog, capsys):
    """No warning, no log line and no output, not even about operators without a rule and layers never called."""

    def chatty(w, x):
        return torch.fft.rfft(x @ w) if int(x.shape[0]) == 3 else x  # The tracer warns of both.

    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        count_flops(ConvNet(), ConvNet.inputs)
        count_flops(Call(chatty), torch.rand(3, 8))
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_counting_under_inference_mode():
    """Inference mode around the count changes nothing, even where the inputs were made in it."""
    model = ConvNet().train()
    before = state_of(model)
    with torch.inference_mode():
        assert count_flops(model, torch.ones(2, 3, 8, 8)).by_module == model.flops
    assert_undisturbed(model, before)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_model_may_hide_its_state():
    """What a model's own state_dict leaves out or adds is none of the count's business."""

    class Adapter(ConvNet):
        def state_dict(self, *args, **kwargs):
            return {"note": "only text"}

    model = Adapter()
    assert count_flops(model, model.inputs).by_module == model.flops


@pytest.mark.parametrize(
    "compiled", [lambda net: torch.compile(net, backend="eager"), lambda net: net.compile() or net]
)
def test_a_compiled_layer_counts_like_the_layer(compiled):
    """Compiled modules are counted as what they were compiled from, and stay compiled."""
    model = nn.Sequential(compiled(nn.Linear(4, 2)))
    before = dict(vars(model[0]))
    assert_total(model, torch.ones(3, 4), 3 * 4 * 2)
    assert vars(model[0]) == before


def test_a_lightning_module_counts_like_its_forward(tmp_path):
    """A LightningModule with its trainer attached costs what its forward costs."""
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ConvNet()

        def forward(self, x):
            return self.net(x)

    model = Lit()
    model.trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, barebones=False
    )
    flops = count_flops(model, ConvNet.inputs).by_module
    below = {f"net.{name}".rstrip("."): number for name, number in model.net.flops.items()}
    assert flops == {"": below["net"]} | below


def test_a_model_that_fails_is_refused_with_its_own_reason():
    """A model that does not take the inputs raises PruningError from its own exception, and is left as it was."""
    model = ConvNet().train()
    before = state_of(model)
    with pytest.raises(
        PruningError, match=r"count_flops: ConvNet fails on the example inputs: .* Pass other"
    ) as refusal:
        count_flops(model, torch.ones(2, 5, 8, 8))
    assert isinstance(refusal.value.__cause__, RuntimeError)
    assert_undisturbed(model, before)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_cannot_be_traced_is_refused():
    """A model that runs but returns no tensor raises PruningError and says so."""
    with pytest.raises(PruningError, match="runs on the example inputs, but torch.jit cannot trace it: .*no tensor"):
        count_flops(Call(lambda w, x: 3.0), torch.ones(3, 8))


def test_inputs_of_another_kind_are_refused():
    """What is neither tensor, tuple nor mapping raises TypeError."""
    with pytest.raises(TypeError, match="example_inputs: got str"):
        count_flops(ConvNet(), "an image")


@pytest.mark.parametrize("width", [4, 64, 256])
def test_large_weights_are_counted_as_small_ones(width):
    """The multiply-adds of convolutions and linear layers, by their formulas, however large their weights are."""
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(16 * width, 2))
    expected = 36 * 27 * width + 16 * 9 * width * width + 32 * width
    assert count_flops(model, torch.randn(1, 3, 8, 8)).total == expected
