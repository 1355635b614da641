"""Which layers leave, and how many: scores against their formulas, amounts and limits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError, prune_layers
from lightning_prune.algorithms.criteria.depth import block_influence
from tests.blocks import WIDTH, Block, Stack, without


def residual(blocks=4):
    torch.manual_seed(0)
    return Stack(["pre"] * blocks, ["tensor"] * blocks).eval()


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, 3, generator=generator), torch.randn(4, 5, 2, generator=generator)) for _ in range(count)
    ]


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def passing(model, x):
    """Return what goes into and comes out of every block."""
    found = {}
    x = model.embed(x)
    for name, block in model.blocks.items():
        found[name] = (x, block(x, 0.5))
        x = found[name][1]
    return found


def scores_of(report):
    return {layer.path: layer.score for layer in report.removed}


def first_removed(model, criterion, **more):
    report = prune_layers(model, batches()[0][0], 0.25, criterion=criterion, batches=batches(), loss=loss, **more)
    (layer,) = report.removed
    return layer


def test_influence_is_one_minus_the_cosine():
    """The layer that turns its tokens least leaves first, and its score is the formula's mean over batches."""
    model = residual()
    by_hand = {}
    for name in model.blocks:
        pairs = [passing(model, x)[name] for x, _ in batches()]
        cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in pairs]
        by_hand[f"blocks.{name}"] = float(1 - torch.stack(cosines).detach().mean())
    layer = first_removed(model, "influence")
    assert layer.path == min(by_hand, key=by_hand.get) and layer.score == pytest.approx(by_hand[layer.path], rel=1e-5)
    images = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    tokens = [image.permute(0, 2, 3, 1) for image in images]
    assert float(block_influence(*images)) == pytest.approx(float(1 - F.cosine_similarity(*tokens, dim=-1).mean()))


@pytest.mark.parametrize("criterion", ["taylor", "taylor_second_order"])
def test_taylor_is_the_derivative_along_input_minus_output(criterion):
    """Scores are those of a factor t in front of what the layer changes: derivatives of the loss at t = 1."""
    model = residual()
    by_hand = {f"blocks.{name}": 0.0 for name in model.blocks}
    for x, y in batches():
        for name in model.blocks:
            factors = torch.ones(len(x), 1, 1, requires_grad=True)
            out = model.embed(x)
            for other, block in model.blocks.items():
                after = block(out, 0.5)
                out = out + factors * (after - out) if other == name else after
            (slope,) = torch.autograd.grad(F.mse_loss(model.head(out), y), factors)
            slope = -slope.flatten().double()  # towards t = 0
            second = slope.sum() + 0.5 * len(x) * slope.square().sum()
            by_hand[f"blocks.{name}"] += float(slope.abs().sum() if criterion == "taylor" else second) / 2
    layer = first_removed(model, criterion)
    assert layer.path == min(by_hand, key=by_hand.get) and layer.score == pytest.approx(by_hand[layer.path], rel=1e-4)


@pytest.mark.parametrize("criterion", ["loss", "output_change"])
def test_scores_are_measured_on_the_model_built_without_the_layer(criterion):
    """The loss, or the squared distance of outputs, is that of a twin without the layer; others are scored anew."""
    model = residual()
    make = lambda gone: Stack(["pre"] * 4, ["tensor"] * 4, (), gone)  # noqa: E731

    def measured(gone, base):
        twins = [without(model, make, these) for these in (gone, base)]
        if criterion == "loss":
            losses = [sum(float(loss(twin, batch).detach()) for batch in batches()) / 2 for twin in twins]
            return losses[0] - losses[1]
        moved = [(twins[0](x) - twins[1](x)).detach().double().square().sum() / len(x) for x, _ in batches()]
        return float(sum(moved)) / 2

    first = {i: measured({i}, set()) for i in range(4)}
    one = min(first, key=first.get)
    second = {i: measured({i, one}, {one}) for i in range(4) if i != one}
    two = min(second, key=second.get)
    whole = copy.deepcopy(model)
    report = prune_layers(
        model, batches()[0][0], 0.5, criterion=criterion, batches=batches(), loss=loss, progress=False
    )
    assert [layer.path for layer in report.removed] == [f"blocks.b{one}", f"blocks.b{two}"]
    assert [layer.score for layer in report.removed] == pytest.approx([first[one], second[two]], rel=1e-4)
    model = whole


def test_a_function_scores_layers():
    """A function of a layer's input and output takes the place of a name."""
    model = residual()
    sizes = {f"blocks.{name}": float(after.norm()) for name, (_, after) in passing(model, batches()[0][0]).items()}
    report = prune_layers(model, batches()[0][0], 0.25, criterion=lambda before, after: -after.norm(), progress=False)
    assert report.removed[0].path == max(sizes, key=sizes.get)


# Amounts and limits


class Uneven(nn.Module):
    """Blocks of different sizes at one width."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        for hidden in (4, 40, 8, 20):
            block = Block("pre", "tensor")
            block.up, block.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
            self.blocks.append(block)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("target", ["layers", "params", "flops"])
@pytest.mark.parametrize("amount", [0.0, 0.2, 0.5, 0.7])
def test_amounts_are_reached(target, amount):
    """So much of the target is gone, by counts of the model as it then is, and no more than the last layer over."""
    torch.manual_seed(0)
    model, x = Uneven(), torch.randn(2, 5, WIDTH)
    report = prune_layers(model, x, amount, target=target, progress=False)
    params = sum(parameter.numel() for parameter in model.parameters())
    assert (report.params_after, report.asked) == (params, amount)
    gone = {
        "layers": len(report.removed) / 4,
        "params": 1 - params / report.params_before,
        "flops": 1 - report.flops_after / report.flops_before,
    }[target]
    assert report.reached == pytest.approx(gone) and gone >= amount - 1e-9
    if report.removed:
        last = report.removed[-1]
        share = {
            "layers": 1 / 4,
            "params": last.params / report.params_before,
            "flops": last.flops / report.flops_before,
        }[target]
        assert gone - share < amount
    assert not (set(report.kept) & {layer.path for layer in report.removed})


def test_the_latency_is_measured(monkeypatch):
    """Layers leave until the measured share of the latency is reached, whatever their FLOPs say."""
    shares = iter([0.97, 0.9, 0.6])
    monkeypatch.setattr(
        "lightning_prune.pruning.layers.time_without", lambda m, x, skips: next(shares) if skips else 1.0
    )
    report = prune_layers(residual(), torch.randn(4, 5, 3), 0.3, target="latency", progress=False)
    assert len(report.removed) == 3 and report.latency_kept == 0.6 and report.reached == pytest.approx(0.4)


def test_limits_are_kept():
    """min_layers, ignore and module keep layers, by pattern, path or module."""
    x = torch.randn(4, 5, 3)
    with pytest.raises(PruningError, match="at most 25.0% of the layers"):
        prune_layers(residual(), x, 0.3, min_layers=3, progress=False)
    assert len(prune_layers(residual(), x, 0.25, min_layers=3, progress=False).removed) == 1
    model = residual()
    report = prune_layers(model, x, 0.9, ignore=["blocks.b0", model.blocks["b1"]], progress=False)
    assert {layer.path for layer in report.removed} == {"blocks.b2", "blocks.b3"}
    assert report.pinned["blocks.b0"] == "named in ignore="
    with pytest.raises(PruningError, match="No layer of Stack can be removed"):
        prune_layers(residual(), x, 0.25, ignore=["blocks.*.up"], progress=False)
    both = nn.Sequential(residual(2), nn.Linear(2, 3), residual(4))
    report = prune_layers(both, x, 0.5, module="2", progress=False)
    assert len(report.removed) == 2 and all(layer.path.startswith("2.") for layer in report.removed)
    assert report.params_before == sum(p.numel() for p in residual(4).parameters())


@pytest.mark.parametrize(
    "given, error, told",
    [
        ({"amount": 1.0}, ValueError, r"\[0, 1\)"),
        ({"amount": 3, "target": "flops"}, ValueError, "a whole number counts layers"),
        ({"amount": True}, TypeError, "a fraction or a whole number"),
        ({"amount": {"blocks": 0.5}}, TypeError, "a fraction or a whole number of layers"),
        ({"target": "filters"}, ValueError, "'layers', 'params', 'flops', 'latency'"),
        ({"criterion": "l1"}, ValueError, "'influence', 'taylor'"),
        ({"criterion": "taylor"}, ValueError, "pass batches and loss="),
        ({"min_layers": 0}, ValueError, "min_layers=0"),
        ({"ignore": "blocks.b0"}, TypeError, "pass a list of patterns"),
        ({"ignore": ["block.b0"]}, ValueError, "names no module"),
        ({"module": "nets"}, ValueError, "names no module"),
        ({"repair": True}, ValueError, "pass batches"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(given, error, told):
    """What no model could make sense of is refused, and the model is as it was."""
    model = residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=told):
        prune_layers(model, torch.randn(4, 5, 3), **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
