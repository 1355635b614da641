"""What expanding outputs and losses in every unit foretells, against derivatives and losses found without it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError
from lightning_prune.analysis.criterion_comparison import oracle
from lightning_prune.measure.expansions import loss_change, output_change
from lightning_prune.pruning.accumulators import Expansion
from lightning_prune.pruning.scoring import accumulate
from lightning_prune.structure import find_structure, trace
from tests.models import NETS

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def output_changes(model, structure, batches, loss, **arguments):
    return accumulate(Expansion(partial(output_change, **arguments)), model, structure, batches, loss)


def second_order_changes(model, structure, batches, loss, **arguments):
    return accumulate(Expansion(partial(loss_change, **arguments)), model, structure, batches, loss)


def small(outputs=3):
    """A network whose outputs are linear in each unit, and batches of 4 and 2 examples that all count alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, outputs)).double()
    x, y = torch.randn(6, 5).double(), torch.randn(6, outputs).double()
    return model, find_structure(trace(model, x)), [(x[:4], y[:4]), (x[4:], y[4:])]


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(dim=1).mean()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1].softmax(dim=1))


def gated_losses(model, gates, batches):
    """The sum over examples of the cross-entropy, with gates on the hidden units."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return F.cross_entropy(model[2](model[1](model[0](x)) * gates), y.softmax(dim=1))


def test_outputs_change_by_their_derivatives_in_a_gate():
    """With one output no chance is left: the score is the mean square of its derivative in a gate on the unit."""
    model, structure, batches = small(outputs=1)
    x = torch.cat([images for images, _ in batches])
    expected = (model[1](model[0](x)) * model[2].weight).square().mean(0)
    found = output_changes(model, structure, batches, squared_error, probes=1)
    torch.testing.assert_close(found, {"0": expected.detach()}, **EXACT)


def test_several_outputs_add_up():
    """Random signs give the sum of squares over the outputs on average."""
    model, structure, batches = small()
    x = torch.cat([images for images, _ in batches])
    expected = model[1](model[0](x)).square().mean(0) * model[2].weight.square().sum(0)
    found = output_changes(model, structure, batches, squared_error, probes=3000)
    torch.testing.assert_close(found, {"0": expected.detach()}, rtol=0.1, atol=1e-6)


def test_outputs_of_several_tensors_count_alike():
    """A model that returns its outputs in parts is scored as if they were one."""

    class Parts(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            first, *others = self.model(x).unbind(dim=1)
            return {"first": first, "others": torch.stack(others, dim=1)[:, None], "mean": first.mean()}

    def apart(model, batch):
        parts = model(batch[0])
        return (torch.cat([parts["first"][:, None], parts["others"][:, 0]], 1) - batch[1]).square().sum(dim=1).mean()

    model, structure, batches = small()
    expected = second_order_changes(model, structure, batches, squared_error)["0"]
    whole = Parts(model)
    found = second_order_changes(whole, find_structure(trace(whole, batches[0][0])), batches, apart)
    torch.testing.assert_close(found["model.0"], expected, **EXACT)


def test_a_quadratic_loss_is_foretold_to_the_last_digit():
    """Where outputs are linear in a unit and the loss is quadratic, the expansion is what silencing the unit does."""
    model, structure, batches = small()
    batches = [(batches[0][0][:3], batches[0][1][:3]), (batches[0][0][1:], batches[0][1][1:])]  # of equal sizes
    found = second_order_changes(model, structure, batches, squared_error)
    torch.testing.assert_close(found, oracle(model, structure, batches, squared_error), **EXACT)


def test_cross_entropy_is_expanded_by_its_derivatives_in_a_gate():
    """The score is the absolute value of half the second derivative less the first, over all examples."""
    model, structure, batches = small()
    gates = torch.ones(7).double()
    first = torch.autograd.functional.jacobian(lambda g: gated_losses(model, g, batches), gates)
    second = torch.autograd.functional.hessian(lambda g: gated_losses(model, g, batches), gates).diagonal()
    found = second_order_changes(model, structure, batches, cross_entropy)
    torch.testing.assert_close(found, {"0": (second / 2 - first).abs()}, **EXACT)


def test_the_largest_curvature_comes_first():
    """With fewer directions than outputs, those are taken along which the loss bends most, whichever way."""
    model, structure, batches = small(outputs=8)
    bends = torch.tensor([5.0, -3.0, *[1e-9] * 6]).double()

    def loss(model, batch):
        return (model(batch[0]).square() * bends).sum(dim=1).mean() / 2

    found = second_order_changes(model, structure, batches, loss, directions=2)
    x = torch.cat([images for images, _ in batches])
    hidden = model[1](model[0](x))
    first = (hidden[:, :, None] * model[2].weight.T * (model(x) * bends)[:, None]).sum(2).mean(0)
    second = hidden.square().mean(0) * (model[2].weight.square() * bends[:, None]).sum(0)
    torch.testing.assert_close(found, {"0": (second / 2 - first).detach().abs()}, rtol=1e-6, atol=1e-9)


def test_a_linear_loss_has_no_curvature():
    """Then the first order is all there is."""
    model, structure, batches = small()
    found = second_order_changes(model, structure, batches, lambda model, batch: model(batch[0]).sum(dim=1).mean())
    x = torch.cat([images for images, _ in batches])
    expected = (model[1](model[0](x)) * model[2].weight.sum(0)).mean(0).abs()
    torch.testing.assert_close(found, {"0": expected.detach()}, **EXACT)


@pytest.mark.parametrize("changes", [output_changes, second_order_changes])
def test_feature_maps_of_many_layers_are_watched(changes):
    """Convolutions in residual streams are scored unit by unit; equal seeds give equal scores, frozen or not."""
    model, inputs = NETS["Projection"].build().double().eval(), NETS["Projection"].inputs
    structure = find_structure(trace(model, inputs))

    def loss(model, batch):
        return model(batch).square().mean()

    torch.manual_seed(0)
    found = changes(model, structure, [inputs], loss)
    assert {name: len(score) for name, score in found.items()} == {n: g.width for n, g in structure.groups.items()}
    assert all(score.min() >= 0 and score.sum() > 0 for score in found.values())  # a unit may be silent already
    model.requires_grad_(False)
    torch.manual_seed(0)
    torch.testing.assert_close(changes(model, structure, [inputs], loss), found, **EXACT)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_parts_called_by_themselves_are_the_model():
    """A loss that calls the model's parts, as training steps do, is expanded in the last one's outputs."""
    model, structure, batches = small()

    def in_parts(model, batch):
        return (model[2](model[1](model[0](batch[0]))) - batch[1]).square().sum(dim=1).mean()

    found = second_order_changes(model, structure, batches, in_parts)
    torch.testing.assert_close(found, second_order_changes(model, structure, batches, squared_error), **EXACT)


@pytest.mark.parametrize("changes", [output_changes, second_order_changes])
@pytest.mark.parametrize("outputs", ["none", "no rows"])
def test_outputs_without_a_row_for_each_example_are_refused(changes, outputs):
    """Where the model is not called, or returns something else than a row for each example, that is said."""
    model, structure, batches = small()

    def loss(model, batch):
        hidden = F.relu(F.linear(batch[0], model[0].weight))
        if outputs == "no rows":
            hidden = model(batch[0]), model(batch[0][:1])
        return sum(part.square().mean() for part in hidden)

    with pytest.raises(PruningError, match="Let the loss call the model"):
        changes(model, structure, batches, loss)
