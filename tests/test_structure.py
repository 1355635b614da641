"""What a trace finds: channel groups, what is pinned and why, costs; and that it leaves the model undisturbed."""

import copy
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as torch_module

from lightning_prune import PruningError, coupling_rule
from lightning_prune.model.calls import run, tensors_in
from lightning_prune.pruning.filters import prune_filters
from lightning_prune.structure import find_structure, trace
from lightning_prune.structure.choices import connected
from lightning_prune.structure.rules.table import RULES
from tests.architectures import INPUTS, NORMS, architectures, build
from tests.counts import assert_counts_agree
from tests.models import IMAGE, NETS, ROWS, ChannelShuffle


def structure_of(model, inputs):
    return find_structure(trace(model, inputs))


def widths(model, inputs):
    return {name: group.width for name, group in structure_of(model, inputs).groups.items()}


@pytest.mark.parametrize("name", NETS)
def test_groups_are_those_expected(name):
    """Of every network the groups have the names and widths that it carries."""
    net = NETS[name]
    assert widths(net.build().double(), net.inputs) == net.groups


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.stays])
def test_what_stays_has_a_reason(name):
    """What cannot leave is reported by parameter with its reason: operator and module, or why its cut was refused."""
    net = NETS[name]
    report = prune_filters(net.build().double(), net.inputs, amount=0.5)
    reasons = {pin.tensor: pin.reason for pin in report.pinned}
    for tensor, words in net.stays.items():
        assert words in reasons[tensor]


def test_an_option_a_shortcut_pins_exactly_its_padded_channels():
    """Of the eight channels that a padded shortcut meets, those that meet padding stay, the others can leave."""
    pin = next(p for p in structure_of(NETS["Padded"].build().double(), IMAGE).pinned if p.tensor == "conv2.weight")
    assert (pin.count, pin.size, pin.dim) == (4, 8, 0)


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.flops or net.params])
def test_costs_agree_with_arithmetic(name):
    """FLOPs and parameters of a network are those worked out by hand."""
    net = NETS[name]
    model = net.build().double()
    if net.flops is not None:
        assert structure_of(model, net.inputs).flops({}) == net.flops
    if net.params is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == net.params


@pytest.mark.parametrize("name", NETS)
def test_predicted_flops_equal_counted_ones(name):
    """FLOPs predicted from labels equal those that fvcore counts, before a cut and after it, module by module."""
    net = NETS[name]
    model = net.build().double()
    assert_prediction_holds(model, net.inputs, structure_of(model, net.inputs), 0.4)


def assert_prediction_holds(model, inputs, structure, amount):
    assert_counts_agree(model, inputs, structure, {})
    report = prune_filters(model, inputs, amount)
    keep = {}
    for name, group in structure.groups.items():
        slot = group.slots[0]
        left = report.kept.get(slot.tensor, {}).get(slot.dim, torch.arange(len(slot.units)))
        keep[name] = np.isin(np.arange(group.width), slot.units[left.numpy()])
    assert structure.flops(keep) == report.flops_after
    assert_counts_agree(model, inputs, structure, keep)


@settings(deadline=None, max_examples=15)
@given(stages=architectures(norms=tuple(NORMS), most=4), amount=st.floats(0.05, 0.95))
def test_predicted_flops_equal_counted_ones_in_random_architectures(stages, amount):
    """FLOPs predicted from labels equal those that fvcore counts, whatever the architecture."""
    model = build(stages)
    assert_prediction_holds(model, INPUTS, structure_of(model, INPUTS), amount)


def state_of(model):
    """Everything of a model that a trace could disturb."""
    return {
        "training": [module.training for module in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(module).items()} for module in model.modules()],
        "tensors": {n: (id(t), t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "hooks": [
            [len(h) for k, h in vars(module).items() if k.endswith("_hooks")] for module in model.modules()
        ],
    }  # fmt: skip


def assert_same_state(model, before):
    after = state_of(model)
    assert before.keys() == after.keys()
    for key in ("training", "attributes", "hooks"):
        assert after[key] == before[key]
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1].nan_to_num(), value.nan_to_num())


def global_hooks():
    return [
        len(hooks) for name, hooks in vars(torch_module).items() if name.startswith("_global_") and "_hooks" in name
    ]


@pytest.mark.parametrize("name", NETS)
def test_a_trace_leaves_everything_undisturbed(name):
    """Modes, random state, buffers, attributes, hooks (also global ones) and fast paths are as they were."""
    net = NETS[name]
    model = net.build().double().train()
    for child in list(model.children())[:1]:
        child.eval()
    before, rng, hooks = state_of(model), torch.get_rng_state(), global_hooks()
    fast = torch.backends.mha.get_fastpath_enabled()
    trace(model, net.inputs)
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert global_hooks() == hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled()


def test_a_trace_that_fails_leaves_everything_undisturbed():
    """A model that does not run raises PruningError that names the failure, and is left as it was."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Linear(4, 2)).double()
    before, hooks = state_of(model), global_hooks()
    with pytest.raises(PruningError, match="Sequential does not run on the example inputs in eval mode .RuntimeError"):
        trace(model, ROWS)
    assert_same_state(model, before)
    assert global_hooks() == hooks


def test_example_inputs_keep_their_values():
    """A model that works in place does not change the example inputs that a trace runs on."""
    inputs = torch.ones(2, 6)
    trace(nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)), inputs)
    assert torch.equal(inputs, torch.ones(2, 6))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_connected_finds_the_components_of_a_graph(data):
    """Components agree with a union-find that walks pair by pair; pairs with an inactive end do not count."""
    size = data.draw(st.integers(1, 30))
    atom = st.integers(0, size - 1)
    pairs = data.draw(st.lists(st.tuples(atom, atom), max_size=40))
    active = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    cut = data.draw(st.integers(0, len(pairs)))
    parts = [np.array(part, dtype=np.int64).reshape(-1, 2) for part in (pairs[:cut], pairs[cut:])]
    root = list(range(size))
    for a, b in pairs:
        if active[a] and active[b]:
            low, high = sorted((root[a], root[b]))
            root = [low if r == high else r for r in root]
    assert connected(size, [(part[:, 0], part[:, 1]) for part in parts], active).tolist() == root


class Function(nn.Module):
    """A linear layer of twelve channels, a function, and whatever reads its result."""

    def __init__(self, function, read):
        super().__init__()
        self.fc, self.function, self.out = nn.Linear(6, 12), function, nn.Linear(read, 2)

    def forward(self, x):
        return self.out(self.function(self.fc(x)))


RULE_CASES = {
    "transpose twice": (lambda x: x.t().mT.mT.t(), 12, 12),
    "movedim": (lambda x: x[:, None].movedim(2, 0).permute(1, 2, 0)[:, 0], 12, 12),
    "interleave": (lambda x: x.repeat_interleave(2, 1), 24, 12),
    "repeat": (lambda x: x.repeat(1, 2), 24, 12),
    "roll": (lambda x: x.roll(5, 1), 12, None),
    "halves": (lambda x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :], 6, 6),
    "every second": (lambda x: x[:, ::2] * x[:, 1::2], 6, 6),
    "thirds": (lambda x: torch.stack(x.chunk(3, 1)).sum(0), 4, 4),
    "stack": (lambda x: torch.stack([x, x.relu()], 2).flatten(1), 24, 12),
    "outer": (lambda x: torch.einsum("bi,bj->bij", x, x).sum(1), 12, 12),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros(1).to(x)), 12, 12),
    "maximum": (lambda x: torch.maximum(x, -x), 12, 12),
    "own norm": (lambda x: x / x.norm(dim=1, keepdim=True), 12, 12),
    "softmax": (lambda x: x.softmax(1), 12, 12),
    "sum of all but one": (lambda x: x.sum(0, keepdim=True).expand(2, -1), 12, 12),
    "single index": (lambda x: x[:, 3:4], 1, None),
    "sort": (lambda x: x.sort(1).values, 12, None),
    "cumsum": (lambda x: x.cumsum(1), 12, None),
    "index": (lambda x: x[:, [3, 1, 2]], 3, None),
    "fold": (lambda x: F.fold(x[..., None], (2, 1), (2, 1)).flatten(1), 12, 6),
    "windows in memory": (lambda x: x.as_strided((len(x), 2, x.shape[1]), (x.shape[1], 0, 1)).flatten(1), 24, 12),
    "beyond what is shown": (lambda x: x[:1].as_strided(x.shape, x.stride()), 12, None),
    "a fixed piece": (lambda x: torch.cat(x.split([2, 10], 1)[::-1], 1), 12, 2),
    "pooled singly": (lambda x: F.avg_pool2d(x[:, None, None], (1, 1)).flatten(1), 12, 12),
    "pooled by two": (lambda x: F.max_pool2d(x[:, None, None], (1, 2)).flatten(1), 6, None),
    "constant": (lambda x: x + torch.arange(12).to(x), 12, None),
}


@pytest.mark.parametrize("case", RULE_CASES)
def test_operators_pass_labels_on(case):
    """Through each operator as many units can leave as there are independent channels, or none."""
    function, read, width = RULE_CASES[case]
    assert widths(Function(function, read).double(), ROWS) == ({} if width is None else {"fc": width})


@pytest.mark.parametrize(
    "function, operator",
    [
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x[:, [3, 1, 2]], "index"),
        (lambda x: torch.fft.rfft(x).real, "fft"),
    ],
    ids=["cumsum", "index", "fft"],
)
def test_a_reason_names_the_operator(function, operator):
    """Channels that an operator pins carry the name of that operator in their reason."""
    model = Function(function, function(torch.zeros(1, 12)).shape[1]).double()
    pins = structure_of(model, ROWS).pinned
    assert operator in next(pin.reason for pin in pins if pin.tensor == "fc.weight")


class Stream(nn.Module):
    """Two layers that write on a stream that is the output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return x + self.second(x.relu())


def test_a_reason_tells_what_channels_are_tied_to():
    """Channels that no pin lies on carry the reason of those that they go with."""
    reasons = {pin.tensor: pin.reason for pin in structure_of(Stream().double(), ROWS).pinned}
    plain, tied = "reaches the model's output", "tied to channels that cannot be pruned: reaches the model's output"
    assert reasons == {"first.weight": plain, "second.weight": tied}


def test_the_softmax_of_attention_changes_statistics():
    """Groups that a statistic runs across say so, others do not."""
    groups = structure_of(NETS["layer_norm"].build().double(), NETS["layer_norm"].inputs).groups
    assert all(group.changes_statistics for group in groups.values())
    assert not structure_of(NETS["plain"].build().double(), IMAGE).groups["0"].changes_statistics


def test_slots_tell_roles():
    """A weight's output dimension produces, the next weight's input dimension consumes, a bias follows."""
    group = structure_of(NETS["plain"].build().double(), IMAGE).groups["0"]
    roles = {(slot.tensor, slot.dim): slot.role for slot in group.slots}
    followers = {(f"1.{name}", 0): "follower" for name in ("weight", "bias", "running_mean", "running_var")}
    assert roles == {("0.weight", 0): "producer", ("0.bias", 0): "follower", ("3.weight", 1): "consumer", **followers}
    assert group.producers == ("0",)


def test_units_of_a_chunk_lie_side_by_side():
    """Of a layer that is chunked in two, entries i and i + width / 2 are one unit."""
    slot = structure_of(NETS["chunk"].build().double(), IMAGE).groups["0"].slots[0]
    assert slot.units.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_shuffle_moves_units():
    """Behind a channel shuffle the consumer's columns lie in shuffled order."""
    slots = structure_of(nn.Sequential(nn.Conv2d(3, 8, 1), ChannelShuffle(), nn.Conv2d(8, 1, 1)).double(), IMAGE)
    made, read = (next(s for s in slots.groups["0"].slots if s.role == role) for role in ("producer", "consumer"))
    assert made.units.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert read.units.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@torch.library.custom_op("lightning_prune_tests::scale_channels", mutates_args=())
def scale_channels(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * gain[:, None, None] / (1 + x.abs().amax(1, keepdim=True))


@scale_channels.register_fake
def _(x, gain):
    return torch.empty_like(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gain, self.out = nn.Conv2d(3, 6, 1), nn.Parameter(torch.rand(6)), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        return self.out(scale_channels(self.conv(x), self.gain))


def test_a_rule_of_the_users_is_followed():
    """Channels of an operator that was taught with @coupling_rule leave with what they met."""
    model = Scaled().double()
    try:

        @coupling_rule("lightning_prune_tests.scale_channels")
        def rule(call):
            x, gain = call.args
            labels = call.labels(x)
            channel = call.ledger.tie([labels.at(1), call.labels(gain).at(0)], "scale_channels")
            call.ledger.mix(channel)
            return {**labels.dims, 1: channel}

        assert widths(model, IMAGE) == {"conv": 6}
        report = prune_filters(model, IMAGE, 0.5)
        assert model.gain.shape == (3,) and report.kept["gain"][0].equal(report.kept["conv.weight"][0])
    finally:
        RULES.pop(torch.ops.lightning_prune_tests.scale_channels, None)


def test_a_wrong_rule_of_the_users_is_found_out():
    """A rule that lets channels pass unmet cannot break the model: the proof refuses and the channels stay."""
    model = Scaled().double()
    try:

        @coupling_rule("lightning_prune_tests.scale_channels")
        def rule(call):
            return call.labels(call.args[0]).dims

        before = copy.deepcopy(model.state_dict())
        with pytest.raises(PruningError, match="conv.weight: the slim model does not run"):
            prune_filters(model, IMAGE, 0.5)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    finally:
        RULES.pop(torch.ops.lightning_prune_tests.scale_channels, None)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_numbers_of_any_kind(dtype, device):
    """Models in half, bfloat16, single and double precision are traced, proved and cut alike, on any device."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)).to(device, dtype)
    report = prune_filters(model, IMAGE.to(device, dtype), 0.5)
    assert report.proved and model[0].weight.shape[0] == 4
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_outputs_of_a_trace_do_not_change_with_labels():
    """Watching a model does not change what it computes."""
    net = NETS["SqueezeExcite"]
    model = net.build().double().eval()
    before = run(model, net.inputs)
    trace(model, net.inputs)
    assert torch.equal(next(tensors_in(run(model, net.inputs))), before)


def test_functional_calls_are_followed():
    """Bare parameters and calls of torch.nn.functional form groups like modules do."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.rand(5, 6)), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(F.gelu(x @ self.w.t()))

    assert widths(Mixed().double(), ROWS) == {"w": 5}


def held_while_grouping(depth):
    """Return the most bytes that finding the groups of so many transformer blocks holds at a time."""
    blocks = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(depth)]
    ledger = trace(nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 3)), torch.randn(1, 4, 5))
    tracemalloc.start()
    try:
        find_structure(ledger)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_depth_and_not_with_its_square():
    """Four times as many blocks take some four times the memory, not sixteen."""
    assert held_while_grouping(24) < 6 * held_while_grouping(6)
