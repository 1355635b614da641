"""What weights multiply is found and summed, whatever calls the product."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError, prune_obs
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import gather_grams, gather_pair
from lightning_prune.measure.output_change import replaced
from lightning_prune.measure.products import find_products, watch_inputs
from lightning_prune.model.calls import call_on as call
from lightning_prune.pruning import obs

LAYERS = {
    "linear": (lambda: nn.Linear(5, 5), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=2, groups=2), (3, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(2, 1, 2)), (2, 2, 6, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), (2, 4, 6, 7)),
    "reflecting": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 7)),
    "unbatched": (lambda: nn.Conv2d(4, 3, 3), (4, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2), (2, 4, 5, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2, padding=1), (2, 4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_times_columns_are_the_outputs(layer):
    """A layer's weight, laid out as rows, times its unrolled inputs gives its outputs; the layout can be undone."""
    build, shape = LAYERS[layer]
    module, x = build().double(), torch.randn(shape, dtype=torch.float64)
    reading = find_products(module, x, call).readings["weight"]
    rows = reading.rows(module.weight.detach())
    assert torch.equal(reading.weight(rows), module.weight)
    seen = []
    with (
        torch.no_grad(),
        watch_inputs(module, ["weight"], lambda name, *found: seen.append(found)),
    ):
        y = module(x)
    (used, inputs), bias = seen[0], module.bias.detach()
    found = (rows @ used.unrolled(inputs)).flatten(0, 1)
    channels = 0 if layer == "unbatched" else 1
    expected = y - bias if layer == "linear" else y - bias.view(-1, *[1] * (y.dim() - 1 - channels))
    expected = expected.flatten(0, 1).T if layer == "linear" else expected.movedim(channels, 0).flatten(1)
    torch.testing.assert_close(found, expected)


def test_products_of_attention_are_found_by_their_weights():
    """Attention multiplies by its parameters without calling a module for it; both projections are found."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = find_products(layer, torch.randn(2, 5, 8), call)
    weights = {name for name, parameter in layer.named_parameters() if parameter.dim() == 2}
    assert set(found.readings) == weights
    assert not found.otherwise


class Odd(nn.Module):
    """Weights multiplied from the left, from the right, twice, and looked up as well."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 5))
        self.twice = nn.Linear(5, 5)
        self.tied = nn.Embedding(7, 5)

    def forward(self, x):
        x = (self.left @ x.T).T @ self.right
        return F.linear(self.twice(self.twice(x)), self.tied.weight) + self.tied(torch.tensor(0)).sum()


def test_grams_are_means_of_outer_products_over_all_batches_and_calls():
    """H is the mean of x x^T over everything a weight multiplied, and the mean input is kept beside it."""
    model, batches = Odd().double(), [torch.randn(n, 6, dtype=torch.float64) for n in (3, 5)]
    products = find_products(model, batches[0], call)
    grams = gather_grams(model, products, ["left", "right", "twice.weight"], Calibration(batches))
    x = torch.cat(batches)
    a = x @ model.left.T
    b = a @ model.right
    c = torch.cat([b, model.twice(b)])
    for name, inputs in (("left", x), ("right", a), ("twice.weight", c)):
        torch.testing.assert_close(grams[name].hessian[0], (inputs.T @ inputs / len(inputs)).detach())
        torch.testing.assert_close(grams[name].mean[0], inputs.mean(dim=0).detach())
        assert grams[name].count == len(inputs)


@pytest.mark.parametrize("width", [16, 512])
def test_inputs_that_hardly_vary_keep_their_covariance(width):
    """Means are subtracted before products are rounded, so that a covariance is as in double precision."""
    torch.manual_seed(0)
    level, layer = torch.randn(width), nn.Linear(width, 3)
    batches = [level + 1e-4 * torch.randn(50, width), level.expand(50, width)]
    products = find_products(layer, batches[0], call)
    gram = gather_grams(layer, products, ["weight"], Calibration(batches))["weight"]
    x = torch.cat(batches).double()
    expected = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    covariance = gram.hessian[0] - gram.mean[0][:, None] * gram.mean[0]
    assert torch.allclose(covariance, expected, rtol=0, atol=1e-4 * expected.diagonal().mean())
    assert torch.allclose(gram.hessian[0], x.T @ x / len(x), rtol=1e-6)


def test_inputs_that_never_vary_are_solved():
    """A layer whose inputs are the same in every example is pruned: its bias makes up for all."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 4), torch.randn(1, 16).expand(1000, 16)
    before = layer(x).detach()
    assert prune_obs(layer, 0.5, batches=[x], progress=False).reached == 0.5
    assert torch.allclose(layer(x), before, atol=1e-5)


def test_other_uses_of_a_weight_are_told():
    """A weight that is looked up besides being multiplied cannot be judged by its inputs alone."""
    found = find_products(Odd().double(), torch.randn(3, 6, dtype=torch.float64), call)
    assert found.calls == {"left": 1, "right": 1, "twice.weight": 2, "tied.weight": 1}
    assert list(found.otherwise) == ["tied.weight"]
    assert "aten.embedding" in found.otherwise["tied.weight"]


def test_pairs_compare_inputs_before_and_after():
    """The three means of a pair are those of the inputs with the old and with the new weights in front."""
    model, batches = Odd().double(), [torch.randn(n, 6, dtype=torch.float64) for n in (3, 5)]
    new = torch.randn(4, 6, dtype=torch.float64)
    products = find_products(model, batches[0], call)
    pair = gather_pair(model, products, "right", Calibration(batches), partial(replaced, model, {"left": new}))
    x, y = torch.cat(batches) @ model.left.detach().T, torch.cat(batches) @ new.T
    for found, expected in ((pair.before, x.T @ x), (pair.cross, x.T @ y), (pair.after, y.T @ y)):
        torch.testing.assert_close(found[0], expected / 8)


def test_a_weight_that_multiplies_nothing_is_refused():
    """No inputs, no Hessian."""
    model, batches = Odd().double(), [torch.randn(3, 6, dtype=torch.float64)]
    products = find_products(model, batches[0], call)
    with pytest.raises(PruningError, match=r"left: .*nothing was multiplied by it.*ignore="):
        gather_grams(model, products, ["left"], Calibration(batches, lambda model, batch: None))


BESIDE = {
    "the same tensor": (lambda x: x, True),
    "a view of it": (lambda x: x.view(x.shape), True),
    "a copy": (lambda x: x.clone(), False),
    "another tensor": (lambda x: x + 1, False),
    "the same, written to": (lambda x: x.add_(1), False),
    "its other half": (lambda x: torch.cat([x, x])[3:], False),
}


class Beside(nn.Module):
    """Three layers, of which the second and the third get something made of what the first gets."""

    def __init__(self, made, twice=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 5) for _ in range(3))
        self.made, self.twice = made, twice

    def forward(self, x):
        x = x * 2
        out = self.q(x) + (self.q(x) if self.twice else 0)
        x = self.made(x)
        return out.sum() + self.k(x).sum() + self.v(x).sum()


@pytest.mark.parametrize("how", BESIDE)
def test_weights_that_multiply_one_tensor_are_known(how):
    """They are those that get the tensor that the weight before them gets, and nothing has written to since."""
    made, alike = BESIDE[how]
    expected = {"k.weight": "q.weight", "v.weight": "q.weight"} if alike else {"v.weight": "k.weight"}
    assert find_products(Beside(made), torch.randn(3, 4), call).alike == expected
    once = {} if alike else expected
    assert find_products(Beside(made, twice=True), torch.randn(3, 4), call).alike == once


def test_one_pair_of_runs_tells_of_weights_that_multiply_one_tensor(monkeypatch):
    """In sequence, weights that multiply one tensor become what they become where each is looked at by itself."""
    batches, asked, found = [torch.randn(64, 4) for _ in range(2)], [], []

    def noted(model, products, name, *more):
        asked.append(name)
        return gather_pair(model, products, name, *more)

    monkeypatch.setattr("lightning_prune.pruning.layerwise.gather_pair", noted)
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Beside(lambda x: x))
        prune_obs(model, 0.5, batches=batches, sequential=True, progress=False)
        found.append(model.state_dict())
        monkeypatch.setattr(obs, "find_products", lambda *args: replace(find_products(*args), alike={}))
    assert asked == ["weight", "q.weight", "weight", "q.weight", "k.weight", "v.weight"]  # by names in their blocks
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
