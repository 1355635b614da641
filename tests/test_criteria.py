"""Every criterion by name, against a formula or brute force written here; the model is left as it was."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import FilterPruning, OneShot, PruningError, prune_filters
from lightning_prune.algorithms import criteria
from lightning_prune.measure.unit_statistics import over_units
from lightning_prune.pruning.accumulators import Accumulator, by_l2, by_mean
from lightning_prune.pruning.scoring import CRITERIA, score_units
from lightning_prune.structure import find_structure, trace
from tests.models import NETS
from tests.runs import fit, net, widths

EXACT = {"atol": 1e-12, "rtol": 1e-9}
WEIGHT_ALONE = {"l1", "l2", "bn_scale", "random"}


class Normed(nn.Module):
    """Two convolutions with BatchNorm and a head, every kind of number on the way."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.norm2 = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
        self.drop, self.head = nn.Dropout(), nn.Linear(5, 3)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)))
        return self.head(self.drop(x.mean((2, 3))))


def normed(seed=0):
    torch.manual_seed(seed)
    model = Normed().double()
    images, labels = torch.randn(9, 2, 6, 6, dtype=torch.float64), torch.randint(3, (9,))
    return model, find_structure(trace(model, images)), [(images[:5], labels[:5]), (images[5:], labels[5:])]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def feature_maps(model, images):
    """What each group's reader receives, in eval mode."""
    first = F.relu(model.norm1(model.first(images)))
    return {"first": first, "second": F.relu(model.norm2(model.second(first))).mean((2, 3))}


def scores_of(criterion, seed=0):
    model, structure, batches = normed(seed)
    return score_units(model, structure, criterion, batches, cross_entropy)


def assert_scores(found, expected):
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name].double(), score.detach().double(), **EXACT)


# Weights


def test_magnitudes():
    """L1 and L2 sum what is in the filters that make a unit, divided by the layer's mean."""
    model, _, _ = normed()
    rows = {
        name: getattr(model, name).weight.detach().reshape(len(getattr(model, name).weight), -1)
        for name in ("first", "second")
    }
    assert_scores(scores_of("l1"), {name: by_mean(w.abs().sum(1)) for name, w in rows.items()})
    assert_scores(scores_of("l2"), {name: by_mean(w.square().sum(1)) for name, w in rows.items()})


def test_several_layers_that_make_a_unit_add_up():
    """On a residual stream the filters of all layers that write on it count."""
    model, inputs = NETS["Projection"].build().double(), NETS["Projection"].inputs
    found = score_units(model, find_structure(trace(model, inputs)), "l1")["conv2"]
    rows = [model.conv2.weight, model.shortcut.weight]
    torch.testing.assert_close(found, by_mean(sum(w.detach().abs().sum((1, 2, 3)) for w in rows)), **EXACT)


def test_batch_norm_scales():
    """The scale criterion is the absolute gamma, as it is."""
    model, _, _ = normed()
    assert_scores(scores_of("bn_scale"), {"first": model.norm1.weight.abs(), "second": model.norm2.weight.abs()})


def test_batch_norm_scale_without_a_norm_says_what_to_do():
    """Where a group has no scale, it is named."""
    model, inputs = NETS["Projection"].build().double(), NETS["Projection"].inputs
    with pytest.raises(PruningError, match="bn_scale: stem has no normalisation with a scale.*ignore="):
        score_units(model, find_structure(trace(model, inputs)), "bn_scale")


def test_random_scores_follow_the_seed_alone():
    """Equal seeds give equal scores, other seeds and other layers give others, and no number is drawn."""
    model, structure, _ = normed()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = score_units(model, structure, "random")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert_scores(score_units(model, structure, "random"), first)
    assert not torch.equal(first["first"][:5], first["second"])
    torch.manual_seed(6)
    assert not torch.equal(score_units(model, structure, "random")["first"], first["first"])


# Activations


@pytest.mark.parametrize("criterion", ["activation_mean", "activation_std", "apoz"])
def test_moments_of_activations(criterion):
    """Mean, standard deviation and share of non-zeros are those of the stored feature maps, of all batches alike."""
    model, _, batches = normed()
    with torch.no_grad():
        maps = feature_maps(model.eval(), torch.cat([images for images, _ in batches]))
    formula = {
        "activation_mean": lambda x: x.mean(1),
        "activation_std": lambda x: x.std(1, correction=0),
        "apoz": lambda x: (x != 0).double().mean(1),
    }[criterion]
    expected = {name: by_l2(formula(x.transpose(0, 1).flatten(1))) for name, x in maps.items()}
    assert_scores(scores_of(criterion), expected)


def test_activations_that_attention_reads():
    """What ``nn.MultiheadAttention`` receives counts beside what layers receive."""
    torch.manual_seed(0)
    model, inputs = NETS["Attention"].build().double().eval(), NETS["Attention"].inputs
    found = score_units(model, find_structure(trace(model, inputs)), "activation_mean", [inputs])["enter"]
    with torch.no_grad():
        entered = model.enter(inputs)
        x = model.norm(entered + model.attention(entered, entered, entered, need_weights=False)[0])
        last = x + model.fc2(model.fc1(x).relu())
    channels = torch.cat([entered, x, last]).mean((0, 1))
    units = found_units(model, inputs)
    torch.testing.assert_close(found, by_l2(torch.zeros(len(found)).double().index_add(0, units, channels)), **EXACT)


def found_units(model, inputs):
    """The unit of each channel that the first layer makes."""
    (slot,) = [s for s in find_structure(trace(model, inputs)).groups["enter"].slots if s.tensor == "enter.weight"]
    return torch.from_numpy(slot.units)


def test_activations_need_no_loss():
    """Without a loss, the model is called on the batches themselves."""
    model, structure, batches = normed()
    expected = score_units(model, structure, "apoz", batches, cross_entropy)
    for calls in (
        [images for images, _ in batches],
        [(images,) for images, _ in batches],
        [{"x": i} for i, _ in batches],
    ):
        assert_scores(score_units(model, structure, "apoz", calls), expected)


# Taylor


def test_taylor_on_activations():
    """Per example the sum of activation times gradient, its absolute value averaged, divided by the layer's l2 norm."""
    model, _, batches = normed()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    total = {"first": torch.zeros(6).double(), "second": torch.zeros(5).double()}
    model.eval()
    for image, label in zip(images, labels, strict=True):
        maps = feature_maps(model, image[None])
        loss = F.cross_entropy(model.head(maps["second"]), label[None])
        for name, x in maps.items():
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            total[name] += (x * gradient).flatten(2).sum(2)[0].abs() if x.dim() > 2 else (x * gradient)[0].abs()
    assert_scores(scores_of("taylor_activations"), {name: by_l2(value / 9) for name, value in total.items()})


def test_every_example_counts_alike():
    """Scores on activations do not depend on how examples are split into batches."""
    model, structure, batches = normed()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for sizes in ([9], [1, 8], [4, 4, 1]):
        split = list(zip(images.split(sizes), labels.split(sizes), strict=True))
        assert_scores(
            score_units(model, structure, "taylor_activations", split, cross_entropy), scores_of("taylor_activations")
        )


def test_taylor_on_weights():
    """Per batch the squared sum of weight times gradient over all that reads a unit, averaged over batches."""
    model, _, batches = normed()
    model.eval()
    expected = {"first": torch.zeros(6).double(), "second": torch.zeros(5).double()}
    for batch in batches:
        for name, weight in (("first", model.second.weight), ("second", model.head.weight)):
            (gradient,) = torch.autograd.grad(cross_entropy(model, batch), weight)
            expected[name] += (weight * gradient).detach().transpose(0, 1).flatten(1).sum(1).square() / 2
    assert_scores(scores_of("taylor"), expected)


def test_pure_criteria_are_the_papers_equations():
    """The functions of tensors alone are the formulas of the papers."""
    a, g = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    torch.testing.assert_close(criteria.taylor_activations(a, g), (a * g).sum((2, 3)))
    torch.testing.assert_close(criteria.taylor_activations(a[..., 0, 0], g[..., 0, 0]), (a * g)[..., 0, 0])
    w, g = torch.randn(4, 7), torch.randn(4, 7)
    torch.testing.assert_close(criteria.obd(w, g), g * w * w / 2)


def test_scores_follow_a_permutation_of_channels():
    """Permuting channels permutes scores, whatever the criterion."""
    order = torch.randperm(6)
    model, structure, batches = normed()
    other = copy.deepcopy(model)
    for tensor in (
        other.first.weight,
        other.first.bias,
        *other.norm1.parameters(),
        other.norm1.running_mean,
        other.norm1.running_var,
    ):
        tensor.data.copy_(tensor.data[order])
    other.second.weight.data.copy_(other.second.weight.data[:, order])
    for criterion in CRITERIA.keys() - {"random", "obd_hutchinson"}:
        before = score_units(model, structure, criterion, batches, cross_entropy)["first"]
        after = score_units(other, structure, criterion, batches, cross_entropy)["first"]
        torch.testing.assert_close(after, before[order], **EXACT)


# OBD


@pytest.mark.parametrize("criterion", ["obd", "obd_hutchinson"])
def test_obd_of_units_sums_that_of_weights(criterion):
    """A unit's saliency is the sum of half h w squared over all that leaves with it."""
    model, structure, batches = normed()
    found = score_units(model, structure, criterion, batches, cross_entropy)
    assert {name: score.shape for name, score in found.items()} == {"first": (6,), "second": (5,)}
    if criterion == "obd":
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        model.eval()
        names = {
            "first": [
                ("first.weight", 0),
                ("first.bias", 0),
                ("norm1.weight", 0),
                ("norm1.bias", 0),
                ("second.weight", 1),
            ],
            "second": [
                ("second.weight", 0),
                ("second.bias", 0),
                ("norm2.weight", 0),
                ("norm2.bias", 0),
                ("head.weight", 1),
            ],
        }
        expected = {name: torch.zeros(len(getattr(model, name).weight)).double() for name in names}
        for image, label in zip(images, labels, strict=True):
            for name, places in names.items():
                for path, dim in places:
                    weight = model.get_parameter(path)
                    (gradient,) = torch.autograd.grad(cross_entropy(model, (image[None], label[None])), weight)
                    saliency = 0.5 * (gradient * weight.detach()).square() / 9
                    expected[name] += saliency.transpose(0, dim).flatten(1).sum(1) if weight.dim() > 1 else saliency
        assert_scores(found, expected)


def test_obd_saliency_is_the_change_of_a_diagonal_quadratic():
    """At a minimum with a diagonal Hessian, a unit's saliency is what the loss grows by when the unit's weights go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    structure = find_structure(trace(model, torch.zeros(1, 3, dtype=torch.float64)))
    h = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    minimum = {name: p.detach().clone() for name, p in model.named_parameters()}

    def quadratic(model, batch):  # grows as weights leave the minimum, to which its gradient is 0
        return sum((h[n] * (p - minimum[n]).square()).sum() / 2 for n, p in model.named_parameters())

    found = score_units(model, structure, "obd_hutchinson", [None], quadratic)["0"]
    for unit in range(4):
        gone = copy.deepcopy(model)
        for name, dim in {"0.weight": 0, "1.weight": 1}.items():
            gone.get_parameter(name).data.select(dim, unit).zero_()
        torch.testing.assert_close(found[unit], quadratic(gone, None).detach(), **EXACT)


# What is left alone


def prepared(kind):
    model, structure, batches = normed()
    if kind == "frozen":
        model.first.requires_grad_(False)
        model.norm2.requires_grad_(False)
    if kind == "unused":
        model.spare, model.count = nn.Linear(3, 3).double(), nn.Parameter(torch.tensor([3]), requires_grad=False)
    if kind == "half":
        model.bfloat16()
        batches = [(images.bfloat16(), labels) for images, labels in batches]
    return model, structure, batches


@pytest.mark.parametrize("kind", ["plain", "frozen", "unused", "half"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_changes_nothing(criterion, kind):
    """Parameters, gradients, statistics, modes, frozenness, hooks and random numbers stay; scores are finite."""
    model, structure, batches = prepared(kind)
    model.train()
    model.norm1.eval()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter) if parameter.is_floating_point() else None
    before = copy.deepcopy(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    state, grads = torch.get_rng_state(), [p.grad for p in model.parameters()]
    found = score_units(model, structure, criterion, batches, cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    for module, was, attribute in zip(model.modules(), before.modules(), attributes, strict=True):
        assert module.training == was.training and vars(module).keys() == attribute.keys()
        assert not module._forward_pre_hooks and not module._forward_hooks and not module._backward_hooks
    for p, was, grad in zip(model.parameters(), before.parameters(), grads, strict=True):
        assert torch.equal(p, was) and p.requires_grad == was.requires_grad and p.grad is grad
        assert grad is None or torch.equal(grad, torch.ones_like(grad))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    assert {name: score.shape for name, score in found.items()} == {"first": (6,), "second": (5,)}
    assert all(score.isfinite().all() and not score.requires_grad for score in found.values())


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - WEIGHT_ALONE))
def test_a_failing_loss_leaves_nothing(criterion):
    """When the loss raises, no hook stays, and modes and frozenness are as before."""
    model, structure, batches = prepared("frozen")

    def fails(model, batch):
        model(batch[0])
        raise ZeroDivisionError

    with pytest.raises((ZeroDivisionError, PruningError), match="" if criterion != "obs" else "ZeroDivisionError"):
        score_units(model, structure, criterion, batches, fails)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert not model.first.weight.requires_grad and model.second.weight.requires_grad


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes(criterion):
    """Every name prunes from Python, given batches and a loss."""
    model, _, batches = normed()
    report = prune_filters(model, batches[0][0], 0.4, criterion=criterion, batches=iter(batches), loss=cross_entropy)
    assert (len(model.first.weight), len(model.second.weight)) == (3, 3)
    assert report.proved


# A user's own


def test_a_function_is_a_criterion():
    """A user's function of a weight scores filters, and its lowest go."""

    def spread(weight):
        return weight.flatten(1).std(1)

    model, structure, batches = normed()
    expected = model.first.weight.detach().flatten(1).std(1)
    assert_scores({"first": score_units(model, structure, spread)["first"]}, {"first": by_mean(expected)})
    report = prune_filters(model, batches[0][0], 0.5, criterion=spread)
    assert report.kept["first.weight"][0].tolist() == sorted(expected.topk(3).indices.tolist())


class Surprise(Accumulator):
    """A criterion of one's own: how often the weights that read a unit would rather grow than shrink."""

    looks_at = "gradients"

    def before_step(self, gradients, elsewhere=()):
        weights = dict(self.model.named_parameters())
        grows = {n: (g * weights[n].detach() < 0).to(g) for n, g in gradients.items() if g is not None}
        readers = {n: [s for s in g.slots if s.role == "consumer"] for n, g in self.structure.groups.items()}
        widths = {name: group.width for name, group in self.structure.groups.items()}
        self.means.update({name: over_units(slots, widths[name], grows) for name, slots in readers.items()})


def test_an_accumulator_is_a_criterion():
    """A class of one's own is scored offline and in a run as any name is."""
    model, structure, batches = normed()
    found = score_units(model, structure, Surprise, batches, cross_entropy)
    total = torch.zeros(5).double()
    for batch in batches:
        (gradient,) = torch.autograd.grad(cross_entropy(model.eval(), batch), model.head.weight)
        total += (gradient * model.head.weight.detach() < 0).double().sum(0) / 2
    assert_scores({"second": found["second"]}, {"second": total})
    callback = FilterPruning(0.5, criterion=Surprise)
    module = net()
    fit(module, callback)
    assert callback.schedule == OneShot(at=1)
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    report = prune_filters(model, batches[0][0], 0.4, criterion=Surprise, batches=batches, loss=cross_entropy)
    assert report.proved


@pytest.mark.parametrize(
    "criterion, error, told",
    [
        (
            lambda w: w.sum(),
            ValueError,
            r"first.weight, \(6, 2, 3, 3\), it gave scores of shape \(\); .* one per filter, \(6,\)",
        ),
        (lambda w: w.flatten(1), ValueError, r"shape \(6, 18\)"),
        (lambda w: w.flatten(1).sum(1).tolist(), TypeError, "first.weight, it gave list; it must give a tensor"),
    ],
    ids=["one-number", "matrix", "list"],
)
def test_a_function_that_gives_something_else_is_refused(criterion, error, told):
    """A function must give one score per filter, as a tensor; the message says what it gave."""
    model, structure, _ = normed()
    with pytest.raises(error, match=told):
        score_units(model, structure, criterion)


# What is missing


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - WEIGHT_ALONE))
def test_missing_batches_are_asked_for(criterion):
    """A criterion that looks at data says so when there are none."""
    model, structure, _ = normed()
    with pytest.raises(ValueError, match=f"criterion='{criterion}' looks at data: pass batches"):
        score_units(model, structure, criterion)


@pytest.mark.parametrize("criterion", ["taylor", "taylor_activations", "obd", "obd_hutchinson"])
def test_a_missing_loss_is_asked_for(criterion):
    """A criterion that looks at gradients says that it needs a loss."""
    model, structure, batches = normed()
    with pytest.raises(ValueError, match=f"criterion='{criterion}' looks at gradients: pass loss="):
        score_units(model, structure, criterion, batches)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - WEIGHT_ALONE))
def test_no_batch_at_all_is_refused(criterion):
    """Batches that hold none are not taken for scores."""
    model, structure, _ = normed()
    with pytest.raises(PruningError, match="no batch came"):
        score_units(model, structure, criterion, [], cross_entropy)


@pytest.mark.parametrize("normalise", [by_mean, by_l2])
def test_normalised_zeros_stay_zeros(normalise):
    """A layer whose scores are all zero stays so; else the norm is one."""
    assert normalise(torch.zeros(3)).tolist() == [0, 0, 0]
    scores = normalise(torch.tensor([3.0, 4.0]))
    assert math.isclose(float(scores.norm() if normalise is by_l2 else scores.mean()), 1, rel_tol=1e-6)
