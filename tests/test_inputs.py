"""How example inputs reach a model, how tensors are found in what comes back, and what a run leaves behind: nothing."""

import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import PruningError, count_flops, prune_filters, prune_obs, prune_weights
from lightning_prune.model.calls import as_call, run, tensors_in
from lightning_prune.model.sandbox import undisturbed

Pair = namedtuple("Pair", "left right")
A, B, C = (torch.full((2,), float(n)) for n in range(3))


@dataclass
class Report:
    scores: Tensor
    detail: object = None


@pytest.mark.parametrize(
    "inputs, call",
    [(A, ((A,), {})), ((A, 3), ((A, 3), {})), ([A, B], ((A, B), {})), (OrderedDict(x=A), ((), {"x": A}))],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_inputs_become_the_arguments_of_one_call(inputs, call):
    """A tensor is the one positional input, a tuple or list all of them, a mapping the keyword inputs."""
    assert as_call(inputs) == call


def test_other_inputs_are_refused():
    """Anything else raises TypeError, which names what was given and what is taken."""
    with pytest.raises(TypeError, match="got int; pass a tensor, a tuple of positional inputs or a dict"):
        as_call(3)


def test_run_calls_the_model():
    """Example inputs reach the forward as arguments."""
    model = nn.Bilinear(2, 2, 1)
    assert torch.equal(run(model, {"input1": A, "input2": B}), model(A, B))


@pytest.mark.parametrize(
    "value, tensors",
    [
        (A, [A]),
        ([A, (B, {"x": C})], [A, B, C]),
        (Pair(A, [B]), [A, B]),
        (Report(A, {"more": Report(B)}), [A, B]),
        (SimpleNamespace(logits=A, cache=[B, C], name="x"), [A, B, C]),
        ({"loss": 0.5, "text": "words", "nothing": None}, []),
        ((Report, len, nn.Linear(2, 2)), []),
    ],
    ids=["tensor", "nested", "namedtuple", "dataclass", "object", "none", "classes-functions-modules"],
)
def test_tensors_are_found_in_order(value, tensors):
    """Tensors are found at any depth of containers, dataclasses and objects, in order; modules are not entered."""
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in tensors]


class Restless(nn.Module):
    """A module that writes wherever a forward can write."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout()
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("updated", torch.zeros(2))
        self.register_buffer("absent", None)
        self.cached: Tensor | None = None
        self.by_size: dict[int, Tensor] = {}
        self.log: list[Tensor] = [A]

    def forward(self, x):
        self.cached = x
        self.new = x
        self.by_size[len(x)] = x
        self.log.append(x)
        self.replaced = self.replaced + 1
        self.updated += 1
        self.register_buffer("added", x)
        self.absent = x
        return self.drop(self.norm(x))


def assert_same(model, values, objects):
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == objects
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, values[name]), name


def test_a_run_leaves_nothing_behind():
    """Buffers are the same objects with the same values, attributes, lists, dicts, modes and random state as before."""
    model = Restless().train()
    model.norm.eval()
    values = {name: tensor.clone() for name, tensor in model.named_buffers()}
    objects = {name: id(tensor) for name, tensor in model.named_buffers()}
    by_size, log, random_state = model.by_size, model.log, torch.get_rng_state()
    with undisturbed(model):
        model.norm.train()
        model.drop.train()
        model(torch.rand(4, 2))
        model.norm.register_forward_hook(print)
    assert_same(model, values, objects)
    assert model.cached is None and model.absent is None and not hasattr(model, "new")
    assert model.by_size is by_size and by_size == {}
    assert model.log is log and len(log) == 1 and log[0] is A
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert not model.norm._forward_hooks
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_run_that_fails_leaves_nothing_behind():
    """An exception passes through, and all is put back all the same."""
    model = Restless().train()
    values = {name: tensor.clone() for name, tensor in model.named_buffers()}
    objects = {name: id(tensor) for name, tensor in model.named_buffers()}
    with pytest.raises(RuntimeError, match="should contain 3 elements not 2"), undisturbed(model):
        model(torch.rand(4, 3))
    assert_same(model, values, objects)
    assert model.training and model.norm.training


def test_the_body_runs_in_eval_mode_without_gradients():
    """Within, every module is in eval mode, no graph is built and no tensor is an inference tensor."""
    model = Restless()
    with torch.inference_mode(), undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.ones(1).is_inference()


def test_parameters_stay_the_same_objects():
    """A parameter that the body exchanges is put back, and those left alone are untouched."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with undisturbed(model):
        model[0].weight = nn.Parameter(torch.zeros(2, 2))
        model[1].weight_ih_l0 = nn.Parameter(torch.zeros(8, 2))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert any(weight is model[1].weight_ih_l0 for weight in model[1]._flat_weights)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: count_flops(model, torch.zeros(2, 4)),
        lambda model: prune_filters(model, torch.zeros(2, 4)),
        lambda model: prune_obs(model, batches=[torch.zeros(2, 4)], scope="global"),
        prune_weights,
    ],
    ids=["count_flops", "prune_filters", "prune_obs", "prune_weights"],
)
def test_modules_without_a_shape_are_refused_and_still_run(use):
    """A lazy module that has not run is refused by name, and is none the worse for it."""
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyLinear(2))
    with pytest.raises(PruningError, match="0.weight gets its shape only at the first forward pass"):
        use(model)
    assert model(torch.zeros(2, 4)).shape == (2, 2)


def test_scripted_modules_pass_through():
    """A scripted submodule is left alone and still runs."""
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    expected = model(A)
    with undisturbed(model):
        model(A)
    assert model[0].training and torch.equal(model(A), expected)


def test_random_numbers_of_python_are_restored():
    """A forward pass that draws from Python's generator leaves it as it was."""
    random.seed(0)
    state = random.getstate()
    with undisturbed(nn.Identity()):
        random.random()
    assert random.getstate() == state
