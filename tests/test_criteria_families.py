"""Every criterion on every family of networks, offline and in a run, against gates put into the weights by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from lightning_prune import PruningError
from lightning_prune.callbacks.engine.gathered_scores import gathering_for
from lightning_prune.pruning.accumulators import by_l2
from lightning_prune.pruning.scoring import CRITERIA, accumulator_for, score_units
from lightning_prune.structure import find_structure, trace
from tests.families import FAMILIES, made

EXACT = {"rtol": 1e-6, "atol": 1e-11}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def prepared(family, dtype=torch.float64):
    model, batches = made(family, dtype)
    structure = find_structure(trace(model, batches[1][0]))
    assert structure.groups
    return model, structure, batches


def examples_of(batches):
    return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]


def gated(model, group, gate):
    """The weights with a gate on each unit: on all that sum over it, else on both factors of the products it is in."""
    consumers = [slot for slot in group.slots if slot.role == "consumer"]
    weights = {}
    for slot in consumers or [slot for slot in group.slots if slot.role in ("producer", "follower")]:
        value = weights.get(slot.tensor, model.get_parameter(slot.tensor).detach())
        units = torch.from_numpy(slot.units)
        scale = torch.where(units < 0, 1.0, gate[units])
        weights[slot.tensor] = value * scale.reshape([-1 if dim == slot.dim else 1 for dim in range(value.dim())])
    return weights, 1 if consumers else 2


def slopes(model, group, batch, of):
    """The derivative of ``of(outputs)`` by a gate on each unit, ``(..., width)``."""

    def value(gate):
        return of(functional_call(model, gated(model, group, gate)[0], (batch[0],)))

    gate = torch.ones(group.width, dtype=torch.float64)
    return torch.autograd.functional.jacobian(value, gate) / gated(model, group, gate)[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_family(criterion, family):
    """Scores are finite, one for each unit of each group, and not all alike; nothing is left on the model."""
    model, structure, batches = prepared(family, torch.float32)
    if criterion == "bn_scale":
        try:
            found = score_units(model, structure, criterion)
        except PruningError as error:
            assert "has no normalisation with a scale" in str(error)
            return
    elif criterion == "obs":
        try:
            found = score_units(model, structure, criterion, batches, cross_entropy)
        except PruningError as error:
            assert "is read by no layer that could make up" in str(error)
            return
    else:
        found = score_units(model, structure, criterion, batches, cross_entropy)
    assert {name: score.shape for name, score in found.items()} == {
        name: (group.width,) for name, group in structure.groups.items()
    }
    assert all(score.isfinite().all() and not score.requires_grad for score in found.values())
    if criterion != "apoz":  # without ReLUs no activation is zero
        assert all(score.unique().numel() > 1 for score in found.values())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_on_activations_by_hand(family):
    """Per example the derivative of its loss by a gate on the unit, in absolute value, averaged."""
    model, structure, batches = prepared(family)
    found = score_units(model, structure, "taylor_activations", batches, cross_entropy)
    for name, group in structure.groups.items():
        each = [
            slopes(model, group, batch, lambda z, y=batch[1]: F.cross_entropy(z, y)).abs()
            for batch in examples_of(batches)
        ]
        torch.testing.assert_close(found[name], by_l2(torch.stack(each).mean(0)), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_on_weights_by_hand(family):
    """Per batch the derivative of the loss by a gate on the unit, or on all that makes it, squared, averaged."""
    model, structure, batches = prepared(family)
    found = score_units(model, structure, "taylor", batches, cross_entropy)
    for name, group in structure.groups.items():
        both = gated(model, group, torch.ones(group.width, dtype=torch.float64))[1]
        each = [
            (both * slopes(model, group, batch, lambda z, y=batch[1]: F.cross_entropy(z, y))).square()
            for batch in batches
        ]
        torch.testing.assert_close(found[name], torch.stack(each).mean(0), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_of_outputs_by_hand(family):
    """Per example, the squared derivative of the outputs by a gate on the unit, along the same random signs."""
    model, structure, batches = prepared(family)
    torch.manual_seed(3)
    found = score_units(model, structure, "output_change", batches, cross_entropy)
    torch.manual_seed(3)
    signs = [[torch.randint_like(torch.empty(len(x), 3).double(), 2) * 2 - 1 for _ in range(4)] for x, _ in batches]
    for name, group in structure.groups.items():
        each = []
        for batch, drawn in zip(batches, signs, strict=True):
            jacobian = slopes(model, group, batch, lambda z: z)  # (N, outputs, width)
            each.append(sum(torch.einsum("nk,nku->nu", v, jacobian).square() for v in drawn) / 4)
        torch.testing.assert_close(found[name], torch.cat(each).mean(0), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_order_by_hand(family):
    """The first derivative by a gate, and the loss's curvature in the outputs, say what losing a unit costs."""
    model, structure, batches = prepared(family)
    found = score_units(model, structure, "taylor_second_order", batches, cross_entropy)
    for name, group in structure.groups.items():
        each = []
        for batch in examples_of(batches):
            loss = lambda z, y=batch[1]: F.cross_entropy(z, y)  # noqa: E731
            jacobian = slopes(model, group, batch, lambda z: z)[0]
            hessian = torch.autograd.functional.hessian(loss, model(batch[0]).detach()).reshape(3, 3)
            bend = torch.einsum("ku,kl,lu->u", jacobian, hessian, jacobian)
            each.append(bend / 2 - slopes(model, group, batch, loss))
        torch.testing.assert_close(found[name], torch.stack(each).mean(0).abs(), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_hutchinson_by_hand(family):
    """Signs times the Hessian's product with them, as differences of gradients tell it, through fused kernels."""
    model, structure, batches = prepared(family)
    torch.manual_seed(5)
    found = score_units(model, structure, "obd_hutchinson", batches[:1], cross_entropy)
    torch.manual_seed(5)
    weights = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for _ in range(4):
        signs = {name: torch.randint_like(p, 2) * 2 - 1 for name, p in weights.items()}
        ahead, behind = (
            torch.func.grad(lambda w: F.cross_entropy(functional_call(model, w, (batches[0][0],)), batches[0][1]))(
                {name: p.detach() + step * signs[name] for name, p in weights.items()}
            )
            for step in (1e-5, -1e-5)
        )
        for name, sign in signs.items():
            total[name] += sign * (ahead[name] - behind[name]) / 2e-5 / 4
    for name, group in structure.groups.items():
        expected = torch.zeros(group.width, dtype=torch.float64)
        for slot in group.slots:
            if slot.tensor in weights:
                value = (total[slot.tensor] * weights[slot.tensor].detach().square() / 2).transpose(0, slot.dim)
                rows, units = value.flatten(1).sum(1) if value.dim() > 1 else value, torch.from_numpy(slot.units)
                expected.index_add_(0, units[units >= 0], rows[units >= 0])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


# In a run


def gathered(criterion, model, structure, batches):
    """What a run's steps leave, shown to the gathering as the callbacks do."""
    gathering = gathering_for(criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(),
        optimizers=[optimizer],
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )
    gathering.watch(model, structure)
    for batch in batches:
        loss = cross_entropy(model, batch)
        gathering.before_backward(loss)
        loss.backward()
        gathering.after_backward(trainer)
        gathering.before_step(trainer, model, optimizer)
        optimizer.zero_grad()
    return gathering, trainer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if accumulator_for(name).looks_at])
def test_a_run_gathers_what_is_found_offline(criterion, family):
    """Training steps that change nothing leave the scores that the same batches give offline."""
    model, structure, batches = prepared(family)
    expected = score_units(model, structure, criterion, batches, cross_entropy)
    gathering, trainer = gathered(criterion, model, structure, batches)
    found = gathering.scores(trainer, model, structure)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, **EXACT)


@pytest.mark.parametrize("criterion", ["taylor_activations", "activation_mean"])
def test_what_a_run_hides_is_scored_when_it_is_due(criterion):
    """Where a recurrent layer trains as one kernel, its steps cannot be seen: training batches are looked at instead."""
    model, structure, batches = prepared("LSTM", torch.float32)
    gathering, trainer = gathered(criterion, model, structure, batches)
    expected = score_units(model, structure, criterion, batches, cross_entropy)
    gathering.otherwise = SimpleNamespace(scores=lambda *_: expected)
    assert gathering.ready
    assert gathering.scores(trainer, model, structure) is expected
