"""What `prune_filters` removes, and that removing channels is the same as silencing them."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import prune_filters
from lightning_prune.measure.flops import count_flops
from lightning_prune.model.calls import run, tensors_in
from tests.architectures import EXACT, INPUTS, NORMS, Shuffle, Stage, architectures, build
from tests.models import IMAGE, NETS, ROWS, with_nan
from tests.silencing import assert_equal_to_rounding, silenced

AMOUNTS = st.floats(0.01, 0.99)


def built(name):
    net = NETS[name]
    return net.build().double().eval(), net.inputs


def assert_removing_is_silencing(model, inputs, amount, consumers=None):
    full = copy.deepcopy(model)
    report = prune_filters(model, inputs, amount)
    with torch.no_grad():
        found = list(tensors_in(run(model, inputs)))
        expected = list(tensors_in(run(silenced(full, report.kept, consumers), inputs)))
    for slim, whole in zip(found, expected, strict=True):
        assert_equal_to_rounding(slim, whole)


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.exact])
def test_removing_is_silencing(name, amount):
    """The slim network computes what the full one computes with nothing reading the channels that are gone."""
    model, inputs = built(name)
    assert_removing_is_silencing(model, inputs, amount, NETS[name].consumers)


@pytest.mark.parametrize("amount", [0.25, 0.5])
@pytest.mark.parametrize("channels, times", [(4, 2), (4, 4), (6, 2), (8, 2), (8, 4)])
def test_removing_is_silencing_in_groups_behind_a_shuffle(channels, times, amount):
    """Outputs of a grouped convolution read the inputs that they read before, whichever of both can leave alone."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(channels, times * channels, 3, groups=channels)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), Shuffle(2), grouped, nn.Conv2d(times * channels, 5, 1))
    assert_removing_is_silencing(model.double().eval(), INPUTS, amount)


@settings(deadline=None, max_examples=60)
@given(stages=architectures(), amount=AMOUNTS, flat=st.booleans())
def test_removing_is_silencing_in_random_architectures(stages, amount, flat):
    """Removing is silencing whatever the architecture, the widths and the amount."""
    assert_removing_is_silencing(build(stages, flat), INPUTS, amount)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
@given(stages=architectures(most=8), amount=AMOUNTS, flat=st.booleans())
def test_removing_is_silencing_in_many_architectures(stages, amount, flat):
    """Removing is silencing in deeper networks too."""
    assert_removing_is_silencing(build(stages, flat), INPUTS, amount)


def rebuilt(module):
    """A new module made from the sizes that the attributes of a cut one tell."""
    conv = ("in_channels", "out_channels", "kernel_size", "groups")
    sizes = {
        nn.Conv2d: conv,
        nn.ConvTranspose2d: conv,
        nn.Linear: ("in_features", "out_features"),
        nn.Bilinear: ("in1_features", "in2_features", "out_features"),
        nn.BatchNorm1d: ("num_features",),
        nn.BatchNorm2d: ("num_features",),
        nn.InstanceNorm2d: ("num_features", "affine", "track_running_stats"),
        nn.GroupNorm: ("num_groups", "num_channels"),
        nn.LayerNorm: ("normalized_shape",),
        nn.RMSNorm: ("normalized_shape",),
        nn.PReLU: ("num_parameters",),
        nn.Embedding: ("num_embeddings", "embedding_dim"),
        nn.LSTM: ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
    }
    if type(module) not in sizes:
        return None
    return type(module)(**{name: getattr(module, name) for name in sizes[type(module)]})


def assert_attributes_fit(model):
    """Every attribute tells the size that the tensors have."""
    for module in model.modules():
        if (twin := rebuilt(module)) is not None:
            expected = {name: tensor.shape for name, tensor in twin.state_dict().items()}
            assert {n: t.shape for n, t in module.state_dict().items() if n in expected} == {
                n: shape for n, shape in expected.items() if n in module.state_dict()
            }


def assert_follows_report(model, full, report):
    """Every tensor holds exactly the entries of the full model's that the report says are kept."""
    before = dict(full.named_parameters()) | dict(full.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        expected = before[name]
        for dim, indices in report.kept.get(name, {}).items():
            expected = expected.index_select(dim, indices)
        assert torch.equal(tensor.nan_to_num(), expected.nan_to_num()), name
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    for change in report.attributes:
        assert getattr(full.get_submodule(change.module), change.name) == change.old != change.new
        assert getattr(model.get_submodule(change.module), change.name) == change.new
    assert report.params_before == sum(p.numel() for p in full.parameters())
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert report.proved


@settings(deadline=None, max_examples=30)
@given(stages=architectures(norms=tuple(NORMS)), amount=AMOUNTS, flat=st.booleans())
def test_a_cut_network_is_sound(stages, amount, flat):
    """Whatever its norms, a cut network runs, trains, keeps its output shape; its attributes and report are true."""
    model = build(stages, flat)
    full = copy.deepcopy(model)
    report = prune_filters(model, INPUTS, amount)
    out = model(INPUTS)
    assert out.shape == full(INPUTS).shape and out.isfinite().all()
    out.sum().backward()
    assert_attributes_fit(model)
    assert_follows_report(model, full, report)


@pytest.mark.parametrize("name", NETS)
def test_the_report_agrees_with_the_network(name):
    """Kept indices select exactly the old values, and parameters, FLOPs and attributes are the network's own."""
    model, inputs = built(name)
    full = copy.deepcopy(model)
    report = prune_filters(model, inputs, amount=0.5)
    assert_follows_report(model, full, report)
    assert_attributes_fit(model)
    assert report.flops_before == count_flops(full, inputs).total
    assert report.flops_after == count_flops(model, inputs).total


@pytest.mark.parametrize("name", NETS)
def test_of_each_group_the_share_leaves(name):
    """Of each group ceil(amount * width) units leave, and one stays; what linked groups keep more, others keep less."""
    for amount in (0.1, 1 / 3, 0.5, 0.999):
        model, inputs = built(name)
        report = prune_filters(model, inputs, amount)
        expected = {
            group: max(1, width - math.ceil(amount * width - 1e-9))
            for group, width in NETS[name].groups.items()
            if group not in NETS[name].refused
        }
        found = {group.name: group.after for group in report.groups}
        if not NETS[name].linked:
            assert found == expected
            continue
        linked = {group: NETS[name].groups[group] for group in NETS[name].linked}
        assert len({found[group] / width for group, width in linked.items()}) == 1
        step = sum(linked.values()) // math.gcd(*linked.values())
        narrowest = sum(found[group] for group in linked) == step and sum(expected.values()) == len(expected)
        assert narrowest or sum(found.values()) <= sum(expected.values())
        assert narrowest or abs(sum(found[group] - expected[group] for group in linked)) < step
        assert all(found[group] <= expected[group] for group in found.keys() - linked.keys())


def test_shares_that_floating_point_misses_are_exact():
    """Seven percent of a hundred are seven, though 0.07 * 100 is more in floating point."""
    model = nn.Sequential(nn.Linear(6, 100), nn.Linear(100, 2)).double()
    prune_filters(model, ROWS, amount=0.07)
    assert model[0].out_features == 93


@settings(deadline=None, max_examples=20)
@given(
    stages=architectures(norms=tuple(NORMS), most=3),
    amounts=st.tuples(st.floats(0.01, 0.4), st.floats(0.01, 0.4)),  # more is not always possible with scope="global"
    scope=st.sampled_from(["layer", "global"]),
)
def test_a_larger_amount_keeps_a_subset(stages, amounts, scope):
    """What a larger amount keeps, a smaller one keeps too."""
    model = build(stages)
    reports = [prune_filters(copy.deepcopy(model), INPUTS, amount, scope=scope) for amount in sorted(amounts)]
    assume(reports[0].pinned == reports[1].pinned)  # what is refused depends on the amount
    less, more = (report.kept for report in reports)
    for name, dims in less.items():
        for dim, indices in dims.items():
            assert set(more[name][dim].tolist()) <= set(indices.tolist())


def twin(first, second):
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1),
        nn.PReLU(second), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 5),
    ).double().eval()  # fmt: skip


def cost(widths, target):
    model = twin(*widths)
    return sum(p.numel() for p in model.parameters()) if target == "params" else count_flops(model, IMAGE).total


def leaving(model, scope):
    """Return which of the two groups loses its next lowest unit, again and again, worked out one by one."""
    if scope == "global":
        rows = [model[i].weight.detach().abs().sum((1, 2, 3)) for i in (0, 3)]
        keys = [(value.item(), which) for which, r in enumerate(rows) for value in (r / r.mean()).sort().values[:-1]]
        return [which for _, which in sorted(keys)]
    widths, order = [8, 12], []
    left = list(widths)
    while left != [1, 1]:
        shares = [(1 - (n - 1) / w, which) for which, (n, w) in enumerate(zip(left, widths, strict=True)) if n > 1]
        which = min(shares)[1]
        left[which] -= 1
        order.append(which)
    return order


@settings(deadline=None, max_examples=30)
@given(
    amount=st.floats(0.0, 0.85),
    target=st.sampled_from(["params", "flops"]),
    scope=st.sampled_from(["layer", "global"]),
)
def test_a_budget_is_reached_and_no_unit_more_leaves(amount, target, scope):
    """The target is reached as counted; with one unit fewer removed, in order, it would not be."""
    torch.manual_seed(3)
    model = twin(8, 12)
    whole, order = cost((8, 12), target), leaving(model, scope)
    report = prune_filters(model, IMAGE, amount, target=target, scope=scope)
    widths = [model[0].out_channels, model[3].out_channels]
    gone = 20 - sum(widths)
    assert [8 - order[:gone].count(0), 12 - order[:gone].count(1)] == widths
    budget = (1 - amount) * whole * (1 + 1e-9)
    assert cost(widths, target) == getattr(report, f"{target}_after") <= budget
    if gone:
        widths[order[gone - 1]] += 1
        assert cost(widths, target) > budget


@settings(deadline=None, max_examples=15)
@given(amount=st.floats(0.0, 0.9))
def test_global_scope_compares_scores_across_layers(amount):
    """With scope="global" the lowest of all scores, each divided by its layer's mean, leave first."""
    torch.manual_seed(3)
    model = twin(8, 12)
    gone = math.ceil(amount * 20 - 1e-9)
    expected = leaving(model, "global")[:gone]
    prune_filters(model, IMAGE, amount, scope="global")
    assert [model[0].out_channels, model[3].out_channels] == [8 - expected.count(0), 12 - expected.count(1)]


@pytest.mark.parametrize("target", ["filters", "params", "flops"])
@pytest.mark.parametrize("round_to", [2, 4, 5])
def test_widths_are_multiples(round_to, target):
    """With round_to every width that changes is a multiple of it, rounded up."""
    model = twin(8, 12)
    report = prune_filters(model, IMAGE, 0.4, target=target, round_to=round_to)
    assert any(group.after < group.before for group in report.groups)
    assert all(group.after % round_to == 0 or group.after == group.before for group in report.groups)


def test_the_lowest_scores_leave():
    """With "l1" filters of the smallest sum of absolute weights leave, with "l2" of squares, else of the function."""
    for criterion, score in (
        ("l1", lambda w: w.abs().sum((1, 2, 3))), ("l2", lambda w: w.square().sum((1, 2, 3))),
        (lambda w: -w.flatten(1)[:, 0], lambda w: -w.flatten(1)[:, 0]),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = twin(8, 12)
        expected = score(model[0].weight.detach()).argsort()[4:].sort().values
        assert torch.equal(prune_filters(model, IMAGE, 0.5, criterion=criterion).kept["0.weight"][0], expected)


def test_random_scores_follow_the_seed():
    """With "random" the same seed keeps the same filters and draws nothing from the generator of the run."""
    kept = []
    for seed in (1, 1, 2):
        model = twin(8, 12)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        kept.append(prune_filters(model, IMAGE, 0.5, criterion="random").kept["3.weight"][0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_amounts_by_pattern():
    """Amounts by pattern cut what they name, each by its own share; the rest stays whole."""
    model, inputs = built("Concat")
    report = prune_filters(model, inputs, {"convs.[01]": 0.5, "stem": 0.25})
    assert {g.name: g.after for g in report.groups} == {"stem": 3, "convs.0": 1, "convs.1": 2, "convs.2": 2}


def test_a_pattern_names_all_below_a_module():
    """A pattern that names a module names every module below it."""
    model, inputs = built("Concat")
    assert {g.name: g.after for g in prune_filters(model, inputs, {"convs": 0.5}).groups}["convs.2"] == 1


def test_ignored_layers_stay():
    """Layers named by ignore keep all their channels, also those that share a group with another layer."""
    model, inputs = built("Projection")
    report = prune_filters(model, inputs, 0.5, ignore=["shortcut", "st*"])
    assert {g.name: g.after for g in report.groups} == {"conv1": 2}
    assert {p.tensor: p.reason for p in report.pinned}["conv2.weight"] == "named in ignore="


def test_amount_zero_changes_nothing():
    """With amount 0 every tensor is the same, in place, and the report says so."""
    for name in NETS:
        model, inputs = built(name)
        before = {n: (id(p), p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
        report = prune_filters(model, inputs, 0.0)
        assert (report.kept, report.attributes) == ({}, ())
        assert report.params_before == report.params_after and report.flops_before == report.flops_after
        for n, parameter in model.named_parameters():
            identity, pointer, value = before[n]
            assert (id(parameter), parameter.data_ptr()) == (identity, pointer) and torch.equal(parameter, value)


@pytest.mark.parametrize("name", NETS)
def test_identity_names_and_modes_survive(name):
    """Parameters are the same objects under the same names, in order, with their gradients; frozen and modes stay."""
    model, inputs = built(name)
    next(iter(model.modules())).train()
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    identities = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    keys, modes = list(model.state_dict()), [module.training for module in model.modules()]
    prune_filters(model, inputs, 0.5)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)] == identities
    assert list(model.state_dict()) == keys and [module.training for module in model.modules()] == modes
    assert all(torch.equal(parameter.grad, parameter) for parameter in model.parameters())  # cut alike


@pytest.mark.parametrize(
    "conv, last, shape",
    [
        (nn.Conv2d, torch.channels_last, (1, 3, 8, 8)),
        (nn.Conv3d, torch.channels_last_3d, (1, 3, 4, 8, 8)),
    ],
)
def test_weights_in_channels_last_stay_so(conv, last, shape):
    """Weights and momentum keep their memory format, ``channels_last`` or contiguous."""
    for memory_format in (last, torch.contiguous_format):
        model = nn.Sequential(conv(3, 8, 3, padding=1), conv(8, 6, 3, padding=1)).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.randn(shape)).sum().backward()
        optimizer.step()
        prune_filters(model, torch.randn(shape), 0.5, optimizer=optimizer, progress=False)
        assert model[1].weight.shape[1] == 4
        for module in model:
            assert module.weight.is_contiguous(memory_format=memory_format)
            momentum = optimizer.state[module.weight]["momentum_buffer"]
            assert momentum.is_contiguous(memory_format=memory_format)


def test_tied_weights_stay_tied():
    """A weight used in two layers is one Parameter afterwards too, cut on both sides at once."""
    model, inputs = built("Tied")
    prune_filters(model, inputs, 0.5)
    assert model.second.weight is model.first.weight and model.first.weight.shape == (3, 3)
    model, inputs = built("TiedEmbedding")
    prune_filters(model, inputs, 0.5)
    assert model.head.weight is model.embed.weight and model.embed.weight.shape == (10, 4)
    assert (model.embed.embedding_dim, model.head.in_features) == (4, 4)


def test_an_unused_module_stays():
    """A module that the forward does not call is left as it was."""
    model, inputs = built("Unused")
    before = copy.deepcopy(model.unused.state_dict())
    prune_filters(model, inputs, 0.5)
    assert repr(model.unused) == repr(nn.Linear(5, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.unused.state_dict().items())


def test_buffers_follow():
    """Buffers with one entry per channel are cut, saved or not; others stay."""
    model, inputs = built("Buffers")
    prune_filters(model, inputs, 0.4)
    assert (model.scale.shape, model.passing.shape, model.other.shape) == ((3,), (3,), (3,))
    assert "passing" not in model.state_dict()


def test_groups_follow_whole_groups():
    """Where whole groups of channels leave, `groups` and `num_groups` follow; where each group shrinks, they stay."""
    models = {name: built(name) for name in ("many_groups", "grouped", "group_norm", "few_groups", "depthwise")}
    for model, inputs in models.values():
        prune_filters(model, inputs, 0.5)
    assert (models["many_groups"][0][2].groups, models["many_groups"][0][2].in_channels) == (4, 8)
    assert (models["grouped"][0][1].groups, models["grouped"][0][1].in_channels) == (2, 4)
    assert (models["group_norm"][0][1].num_groups, models["group_norm"][0][1].num_channels) == (3, 6)
    assert (models["few_groups"][0][1].num_groups, models["few_groups"][0][1].num_channels) == (2, 6)
    assert (models["depthwise"][0][1].groups, models["depthwise"][0][1].out_channels) == (2, 2)


def test_a_cut_model_looks_like_a_slim_twin():
    """The repr of a cut model is that of a model built with the slim widths, and its weights load into it."""
    model = twin(8, 12)
    prune_filters(model, IMAGE, 0.5)
    slim = twin(4, 6)
    assert repr(model) == repr(slim)
    slim.load_state_dict(model.state_dict())
    assert torch.equal(slim(IMAGE), model(IMAGE))


def test_cuts_follow_one_another():
    """A cut model can be cut again, and again computes what was left."""
    kinds = ("conv", "residual", "dense", "chunk", "depthwise", "up")
    model = build([Stage(kind, 12, 2, norm) for kind, norm in zip(kinds, EXACT * 2, strict=False)])
    for _ in range(3):
        assert_removing_is_silencing(model, INPUTS, 0.3)


def test_filters_that_are_not_numbers_leave_first():
    """A filter with NaN among its weights scores lowest; a cut that takes it away leaves a model without NaN."""
    model = with_nan()
    report = prune_filters(model, ROWS, 0.2)
    assert report.kept["0.weight"][0].tolist() == [0, 2, 3, 4]
    assert model(ROWS).isfinite().all()


def test_a_model_full_of_nan_is_cut_all_the_same():
    """Where all is NaN there is nothing to compare, and structure alone proves the cut."""
    model = twin(8, 12)
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    prune_filters(model, IMAGE, 0.5)
    assert (model[0].out_channels, model[3].out_channels) == (4, 6)


class LooksAtMode(nn.Module):
    """Code that looks at ``training``, so that train mode is verified, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.last(x + 0.1 if self.training else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_are_those_of_before(dtype):
    """Verifying train mode leaves no trace in running statistics: what is left of them is as it was."""
    torch.manual_seed(0)
    model = LooksAtMode().to(dtype)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = prune_filters(model, torch.randn(2, 3, 9, 9, dtype=dtype), 0.5)
    kept = report.kept["norm.running_mean"][0]
    assert len(kept) == 4
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"][kept])
    assert torch.equal(model.norm.running_var, before["norm.running_var"][kept])
    assert torch.equal(model.norm.num_batches_tracked, before["norm.num_batches_tracked"])
