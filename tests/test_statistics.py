"""What is gathered over batches, against brute force: gates, stored activations, exact Hessians."""

import math
import os
import socket
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune import PruningError
from lightning_prune.measure.gradients import batch_gradients, hutchinson, squared_gradients
from lightning_prune.measure.unit_reads import find_reads
from lightning_prune.measure.unit_statistics import (
    UnitMeans,
    contributions_of,
    moments_of,
    over_units,
    taylor_over_units,
    watch_contributions,
)
from lightning_prune.model.calls import run
from lightning_prune.structure import find_structure, trace
from tests.models import NETS

# Networks whose units are read by convolutions and linear layers alone
WATCHED = """plain mlp flatten strided Projection Padded Concat Shared depthwise grouped many_groups transposed
transposed_groups shuffle pixel_shuffle chunk glu SqueezeExcite Decoder frozen Unused Buffers parametrized instance_norm
group_norm few_groups layer_norm FunctionalNorm DictInput DataDependent Caching""".split()
EXACT = {"atol": 1e-12, "rtol": 1e-9}


class Conv1d(nn.Module):
    """A signal, read once by a convolution and once, position by position, by a linear layer."""

    def __init__(self):
        super().__init__()
        self.enter, self.conv, self.rows = nn.Conv1d(2, 5, 3), nn.Conv1d(5, 3, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = self.enter(x).relu()
        return self.conv(x).mean(2) + self.rows(input=x.transpose(1, 2)).tanh().mean(1)


class Windows(nn.Module):
    """Features read by one layer in two windows per image, by another as a whole."""

    def __init__(self):
        super().__init__()
        self.enter, self.windows, self.whole = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = self.enter(x).relu()  # (N, 6, 5)
        windows = self.windows(x.reshape(2 * len(x), 3, 5)).tanh().reshape(len(x), 6, 3)
        return (windows + self.whole(x)).mean(1)


def made(name, seed=3):
    torch.manual_seed(seed)
    return NETS[name].build().double().eval(), NETS[name].inputs


def structure_of(model, inputs):
    return find_structure(trace(model, inputs))


def squares(output):
    """A loss for each example, ``(N,)``."""
    return output.sin().square().flatten(1).sum(1)


def loss(model, batch):
    return squares(run(model, batch)).mean()


def readers(model, structure, name):
    """Of all that read a group: the module, each input channel's unit, whether channels are the last dimension."""
    found = []
    for slot in structure.groups[name].slots:
        path = slot.tensor.removesuffix(".weight")
        module = dict(model.named_modules())[path] if slot.role == "consumer" else None
        if module is None or (type(module) is nn.ConvTranspose2d and module.groups == module.in_channels):
            continue
        units = torch.from_numpy(slot.units)
        if slot.dim == 1 and not isinstance(module, nn.Linear):
            units = units.repeat(module.groups)
        found.append((module, units, isinstance(module, nn.Linear)))
    return found


def gated(model, structure, name, inputs, examples):
    """The derivative of every example's loss with respect to a gate on every unit, ``(examples, width)``."""
    gate = torch.ones(examples, structure.groups[name].width + 1, dtype=torch.float64, requires_grad=True)

    def read(units, last, module, args, kwargs):
        x = args[0] if args else kwargs["input"]
        own = gate.repeat_interleave(len(x) // examples, 0)[:, units]  # entry -1 is nobody's: the spare gate
        own = own.reshape(len(x), *[1] * (x.dim() - 2), -1) if last else own.reshape(*own.shape, *[1] * (x.dim() - 2))
        own = torch.where((units < 0).reshape(-1, *[1] * (0 if last else x.dim() - 2)), 1.0, own)
        return ((x * own, *args[1:]), kwargs) if args else ((), {**kwargs, "input": x * own})

    handles = [
        module.register_forward_pre_hook(partial(read, units, last), with_kwargs=True)
        for module, units, last in readers(model, structure, name)
    ]
    try:
        each = squares(run(model, inputs))
        return torch.autograd.grad(each.sum(), gate)[0][:, :-1]
    finally:
        for handle in handles:
            handle.remove()


def contributions(model, inputs, structure, loss):
    with watch_contributions(model, structure) as watched:
        value = loss(model, inputs)
        watched.attach(value)
        value.backward()
        return contributions_of(watched.found)


def assert_contributions_are_gradients_of_gates(model, inputs, structure, examples=2):
    expected = {name: gated(model, structure, name, inputs, examples) for name in structure.groups}
    found = contributions(model, inputs, structure, lambda model, inputs: squares(run(model, inputs)).sum())
    for name, gradient in expected.items():
        (rows,) = found[name]
        torch.testing.assert_close(rows, gradient, **EXACT)


# Taylor expansions


@pytest.mark.parametrize("name", WATCHED)
def test_contributions_are_gradients_of_gates(name):
    """What is gathered of a unit and an example is the derivative of its loss by a gate where the unit is read."""
    model, inputs = made(name)
    model.requires_grad_(True)
    assert_contributions_are_gradients_of_gates(model, inputs, structure_of(model, inputs))


@pytest.mark.parametrize("kind, shape", [(Conv1d, (2, 2, 9)), (Windows, (2, 6, 4))])
def test_contributions_of_signals_and_windows(kind, shape):
    """Positions add up wherever the channels stand, keyword or not, and windows of one example count as one."""
    torch.manual_seed(0)
    model, inputs = kind().double(), torch.randn(*shape, dtype=torch.float64)
    assert_contributions_are_gradients_of_gates(model, inputs, structure_of(model, inputs))


def test_contributions_where_the_reader_is_parametrized():
    """A layer with a weight norm reads as the layer it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), weight_norm(nn.Linear(5, 2))).double()
    inputs = torch.randn(2, 6, dtype=torch.float64)
    structure = structure_of(model, inputs)
    gate = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(squares(model[2](model[:2](inputs) * gate)).sum(), gate)[0]
    (found,) = contributions(model, inputs, structure, lambda model, inputs: squares(model(inputs)).sum())["0"]
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", [*WATCHED, "Bare", "BareConv", "Recurrent", "Bilinear"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_weights_that_read_a_unit_expand_the_loss_as_its_gate_does(name, train):
    """Weight times gradient, summed over what reads a unit, is the derivative of the loss by a gate on the unit."""
    model, inputs = made(name)
    model.requires_grad_(True)
    model.train(train and name != "mlp")  # whose dropout would differ
    structure = structure_of(model, inputs)
    gradients = batch_gradients(model, inputs, loss)
    parameters = dict(model.named_parameters())
    found = taylor_over_units(structure, parameters, gradients)
    assert found.keys() == structure.groups.keys()
    for group in structure.groups.values():
        consumed = [slot for slot in group.slots if slot.role == "consumer"]
        if any(
            isinstance(model.get_submodule(slot.tensor.rpartition(".")[0]), nn.ConvTranspose2d) for slot in consumed
        ):
            continue  # depthwise ones read and make at once
        gate = torch.ones(group.width, dtype=torch.float64, requires_grad=True)
        swapped = {}
        for slot in consumed:  # a gate on a unit is a gate on every weight that reads it
            units = torch.from_numpy(slot.units)
            scale = torch.where(units < 0, 1.0, gate[units])
            value = swapped.get(slot.tensor, parameters[slot.tensor].detach())
            swapped[slot.tensor] = value * scale.reshape([-1 if d == slot.dim else 1 for d in range(value.dim())])
        call = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        value = squares(torch.func.functional_call(model, swapped, *call)).mean()
        expected = torch.autograd.grad(value, gate)[0].square()
        torch.testing.assert_close(found[group.name], expected, **EXACT)


@pytest.mark.parametrize("name", ["plain", "Projection", "mlp", "flatten"])
def test_weights_expand_as_contributions_do(name):
    """Both forms expand the loss in the same gate: contributions of all examples sum to that of the weights."""
    model, inputs = made(name)
    structure = structure_of(model, inputs)
    weights = taylor_over_units(structure, dict(model.named_parameters()), batch_gradients(model, inputs, loss))
    found = contributions(model, inputs, structure, loss)
    assert found.keys() == structure.groups.keys()
    for group, (rows,) in found.items():
        torch.testing.assert_close(rows.sum(0).square(), weights[group], **EXACT)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
def test_weights_that_make_a_unit_expand_alike_where_the_paper_says(norm):
    """With ReLU between, the paper's gate right after the unit's own layer has the same derivative."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, 2),
    ]
    model, images = nn.Sequential(*layers).double().train(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    structure = structure_of(model, images)
    gradients = batch_gradients(model, images, loss)
    last = layers[1] if norm else layers[0]
    path = "1" if norm else "0"
    products = last.weight.detach() * gradients[f"{path}.weight"]
    own = products.reshape(4, -1).sum(1) + last.bias.detach() * gradients[f"{path}.bias"]
    found = taylor_over_units(structure, dict(model.named_parameters()), gradients)["0"]
    torch.testing.assert_close(found, own.square(), **EXACT)


def test_sums_over_units_look_where_they_are_told():
    """Sums are over the slots given that have values: all that leaves, or a part of it."""
    model, inputs = made("plain")
    group = structure_of(model, inputs).groups["0"]
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert over_units(group.slots, 4, ones).tolist() == [27 + 1 + 1 + 1 + 6 * 9] * 4
    assert over_units([slot for slot in group.slots if slot.role == "consumer"], 4, ones).tolist() == [6 * 9] * 4
    assert over_units(group.slots, 4, {}) is None


def test_what_makes_a_unit_stands_in_where_its_readers_are_frozen():
    """Where the layers that read a unit have no gradients, the weights that make and follow it are expanded."""
    model, inputs = made("plain")
    structure, parameters = structure_of(model, inputs), dict(model.named_parameters())
    gradients = batch_gradients(model, inputs, loss)
    without = {name: None if name.startswith("3.") else gradient for name, gradient in gradients.items()}
    own = sum((p * gradients[name]).detach().reshape(4, -1).sum(1) for name, p in parameters.items() if name[0] in "01")
    torch.testing.assert_close(taylor_over_units(structure, parameters, without)["0"], own.square(), **EXACT)
    assert taylor_over_units(structure, parameters, dict.fromkeys(parameters)) == {}


def test_half_precision_is_summed_in_single():
    """Products of half-precision weights and gradients neither vanish nor overflow."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    structure = structure_of(model, torch.randn(2, 6))
    model.half()
    parameters = dict(model.named_parameters())
    for weight, gradient in ((1e-4, 1e-4), (60.0, 6e3)):
        weights = {name: torch.full_like(p, weight) for name, p in parameters.items()}
        found = taylor_over_units(
            structure, weights, {name: torch.full_like(p, gradient) for name, p in parameters.items()}
        )
        assert found["0"].dtype == torch.float32
        torch.testing.assert_close(found["0"], torch.full((5,), (2 * weight * gradient) ** 2), rtol=0.01, atol=0)


def test_nothing_is_gathered_without_gradients():
    """Passes under no_grad and inference_mode have no graph, and nothing is gathered of those not differentiated."""
    model, inputs = made("plain")
    with watch_contributions(model, structure_of(model, inputs)) as watched:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                watched.attach(model(inputs))
        watched.attach(model(inputs))
        model(inputs).sum().backward()
        assert not watched.found


@pytest.mark.parametrize("name", ["Recurrent", "Bare", "BareConv", "Bilinear"])
def test_readers_of_any_kind_are_watched(name):
    """Recurrent and bilinear layers and bare parameters read as others do: contributions sum to the weights'."""
    model, inputs = made(name)
    structure = structure_of(model, inputs)
    weights = taylor_over_units(structure, dict(model.named_parameters()), batch_gradients(model, inputs, loss))
    found = contributions(model, inputs, structure, loss)  # oneDNN has no kernel for doubles
    assert found.keys() == structure.groups.keys()
    for group, (rows,) in found.items():
        torch.testing.assert_close(rows.sum(0).square(), weights[group], **EXACT)


def test_what_a_fused_kernel_hides_is_named():
    """Where a recurrent layer runs as one kernel, its hidden units are known to be hidden, not taken for silent."""
    model, inputs = made("Recurrent")
    model, inputs = model.float(), inputs.float()
    structure = structure_of(model, inputs)
    reads = find_reads(model, structure)
    hidden = {name for name, group in structure.groups.items() if any("weight_hh" in s.tensor for s in group.slots)}
    assert hidden <= reads.seen_from([model(inputs)])[1].hidden


def test_hooks_go_and_gradients_are_the_same():
    """While watched, gradients are bit for bit what they are otherwise; no module ever has a hook."""
    model, inputs = made("SqueezeExcite")
    structure = structure_of(model, inputs)
    loss(model, inputs).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with watch_contributions(model, structure) as watched:
        value = loss(model, inputs)
        watched.attach(value)
        assert not any(module._forward_pre_hooks or module._backward_hooks for module in model.modules())
        value.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    assert not watched.found and not watched._handles


# Moments


@pytest.mark.parametrize("name", ["plain", "mlp", "flatten", "grouped", "Projection", "layer_norm"])
def test_moments_are_those_of_stored_activations(name):
    """Sums, squares, zeros and counts are those of the activations that the readers receive, over all batches."""
    model, inputs = made(name)
    structure = structure_of(model, inputs)
    model.requires_grad_(True)
    batches = [inputs, inputs[:1] * 2]
    reads = find_reads(model, structure)
    parts = [moments_of(reads.seen_from([model(batch)])[0]) for batch in batches]
    found = {name: {what: parts[0][name][what] + parts[1][name][what] for what in parts[0][name]} for name in parts[0]}
    for group in structure.groups:
        values = [[] for _ in range(structure.groups[group].width)]

        def store(units, last, module, args, values=values):
            for channel, unit in enumerate(units.tolist()):
                if unit >= 0:
                    values[unit].append((args[0][..., channel] if last else args[0][:, channel]).flatten())

        for module, units, last in readers(model, structure, group):
            handle = module.register_forward_pre_hook(partial(store, units, last))
            with torch.no_grad():
                for batch in batches:
                    model(batch)
            handle.remove()
        for unit, stored in enumerate(map(torch.cat, values)):
            seen = {key: value[unit].item() for key, value in found[group].items()}
            assert seen["count"] == len(stored)
            assert seen["zeros"] == (stored == 0).sum()
            assert math.isclose(seen["total"], stored.sum(), rel_tol=1e-9, abs_tol=1e-12)
            assert math.isclose(seen["squares"], stored.square().sum(), rel_tol=1e-9)


# Curvature


def mean_of(samples):
    """The mean of all samples of all batches, by name of parameter."""
    every = [sample for batch in samples for sample in batch]
    return {name: torch.stack([sample[name] for sample in every]).mean(0) for name in every[0]}


def test_empirical_fisher_is_the_mean_of_squared_gradients():
    """The empirical Fisher is the mean over examples of squared gradients, as vmap finds them, over uneven batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))

    def one(parameters, image, label):
        return F.cross_entropy(torch.func.functional_call(model, parameters, image[None]), label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, images, labels)
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    found = mean_of(
        squared_gradients(model, batch, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
        for batch in batches
    )
    assert found.keys() == each.keys()
    for name, gradients in each.items():
        torch.testing.assert_close(found[name], gradients.square().mean(0), **EXACT)


def test_empirical_fisher_of_half_precision_does_not_vanish():
    """Squares of small half-precision gradients are kept in single precision."""
    model = nn.Linear(2, 1, bias=False).half()
    found = mean_of([squared_gradients(model, torch.full((1, 2), 1e-4).half(), lambda model, x: model(x).sum())])
    assert found["weight"].dtype == torch.float32
    torch.testing.assert_close(found["weight"], torch.full((1, 2), 1e-8), rtol=0.01, atol=0)


def test_ragged_batches_are_refused():
    """Where tensors of a batch disagree on the number of examples, the numbers are told."""
    with pytest.raises(PruningError, match=r"\[3, 4\] entries"):
        next(
            squared_gradients(
                nn.Linear(2, 1), (torch.randn(3, 2), torch.randn(4)), lambda model, batch: model(batch[0]).sum()
            )
        )


def test_hutchinson_is_exact_on_a_diagonal_quadratic():
    """Where the Hessian is diagonal, one probe gives it exactly."""
    model = nn.Linear(5, 1, bias=False).double()
    h = torch.rand(1, 5, dtype=torch.float64)
    found = mean_of([hutchinson(model, None, lambda model, batch: (h * model.weight.square()).sum() / 2, probes=1)])
    torch.testing.assert_close(found["weight"], h, **EXACT)


def test_hutchinson_approaches_the_hessian_diagonal():
    """Over many probes the estimate approaches the diagonal of the exact Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))

    def mean_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    exact = torch.func.hessian(lambda p: F.cross_entropy(torch.func.functional_call(model, p, x), y))(parameters)
    found = mean_of([hutchinson(model, (x, y), mean_loss, probes=1000)])
    for name, diagonal in found.items():
        expected = exact[name][name].reshape(diagonal.numel(), -1).diagonal().reshape(diagonal.shape)
        torch.testing.assert_close(diagonal, expected, atol=0.04, rtol=0)


def test_gradients_of_frozen_and_unused_parameters():
    """Frozen parameters have gradients too and stay frozen, even when the loss fails; unused ones have none."""
    model, inputs = made("Unused")
    model.used.requires_grad_(False)
    found = batch_gradients(model, inputs, loss)
    assert found["unused.weight"] is None and found["used.weight"] is not None
    with pytest.raises(ZeroDivisionError):
        batch_gradients(model, inputs, lambda model, batch: 1 / 0)
    assert not model.used.weight.requires_grad and model.out.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


# Means


def test_means_are_sums_over_counts():
    """The mean is the sum over all updates divided by the counts, each group by its own."""
    means = UnitMeans({"a": 2, "b": 2})
    means.update({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 1.0])}, count=3)
    means.update({"a": torch.tensor([4.0, 0.0])}, count=2)
    found = means.compute()
    assert found["a"].tolist() == [1.0, 0.4]
    assert found["b"].tolist() == [5 / 3, 1 / 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_overflows_does_not_count(bad):
    """A batch with a number that is not finite leaves the means as if it had not come, for every unit of the group."""
    means = UnitMeans({"a": 2, "b": 2})
    means.update({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 0.0])}, count=2)
    means.update({"a": torch.tensor([100.0, bad]), "b": torch.tensor([3.0, 8.0])}, count=2)
    assert means.compute()["a"].tolist() == [0.5, 1.0]
    assert means.compute()["b"].tolist() == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_gathered_says_what_to_do():
    """A group that nothing was seen of is named, and that its layers may be frozen."""
    with pytest.raises(PruningError, match=r"conv: nothing was gathered.*frozen.*ignore=\['conv'\]"):
        UnitMeans({"conv": 2}).compute()


def test_gathered_sums_go_on_elsewhere():
    """What was gathered and taken up elsewhere goes on as if never stopped, and does not follow what it came from."""
    first, second = UnitMeans({"a": 2, "b": 3}), UnitMeans({"a": 2, "b": 4})
    first.update({"a": torch.tensor([1.0, 3.0]), "b": torch.ones(3)}, count=4)
    gathered = first.gathered()
    first.update({"a": torch.tensor([1.0, 1.0])}, count=4)
    assert gathered["a"][0].tolist() == [1.0, 3.0] and gathered["a"][1] == 4.0
    second.take_up(gathered)  # b has another width by now: it starts anew
    second.update({"a": torch.tensor([1.0, 1.0]), "b": torch.full((4,), 2.0)}, count=4)
    assert torch.equal(second.compute()["a"], first.compute()["a"])
    assert second.compute()["b"].tolist() == [0.5] * 4


def _one_of_two(rank, port, results):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    means = UnitMeans({"a": 2})
    means.update({"a": torch.tensor([1.0, 2.0]) * (1 + 2 * rank)}, count=1 + rank)
    results[rank] = means.compute()["a"].tolist()
    assert means.gathered()["a"][1] == 1 + rank  # its own again
    torch.distributed.destroy_process_group()


def test_means_over_processes():
    """Each process finds the mean over all of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    results = context.Manager().dict()
    processes = [context.Process(target=_one_of_two, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert dict(results) == {0: [4 / 3, 8 / 3], 1: [4 / 3, 8 / 3]}
