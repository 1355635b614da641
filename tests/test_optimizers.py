"""What a cut does to optimizers: the step after it equals the step of a slim twin with the same state."""

import copy

import pytest
import torch
from torch import nn, optim

from lightning_prune import FilterL1Pruning, Linear, PruningError, prune_filters
from lightning_prune.surgery import restore_, take_snapshot
from tests.runs import Net, fit, net

IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

OPTIMIZERS = {
    "sgd": lambda p, **how: optim.SGD(p, lr=0.05, **how),
    "momentum": lambda p, **how: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, **how),
    "nesterov": lambda p, **how: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **how),
    "adam": lambda p, **how: optim.Adam(p, lr=0.01, **how),
    "adamw": lambda p, **how: optim.AdamW(p, lr=0.01, weight_decay=0.1, **how),
    "amsgrad": lambda p, **how: optim.Adam(p, lr=0.01, amsgrad=True, **how),
}
WAYS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OTHERS = {
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.01),
}
EVERY = {f"{name}-{way}": (lambda p, f=f, w=w: f(p, **w)) for name, f in OPTIMIZERS.items() for way, w in WAYS.items()}
EVERY |= OTHERS


def network(first=8, second=6):
    return nn.Sequential(
        nn.Conv2d(3, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3), nn.PReLU(second),
        nn.Flatten(), nn.Linear(second * 4, 2),
    ).double()  # fmt: skip


def step_(model, optimizer):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(IMAGES), TARGETS).backward()
    optimizer.step()


def trained(make, steps=3):
    torch.manual_seed(0)
    model = network()
    optimizer = make(model.parameters())
    for _ in range(steps):
        step_(model, optimizer)
    return model, optimizer


def chosen(tensor, dims):
    for dim, indices in dims.items():
        tensor = tensor.index_select(dim, indices)
    return tensor.clone()


def slim_twin(full, optimizer, make, kept):
    """Build the network with the slim widths; copy values and optimizer state by index."""
    twin = network(len(kept["0.weight"][0]), len(kept["3.weight"][0]))
    twin.load_state_dict({name: chosen(tensor, kept.get(name, {})) for name, tensor in full.state_dict().items()})
    steps = make(twin.parameters())
    for (name, old), new in zip(full.named_parameters(), twin.parameters(), strict=True):
        if old in optimizer.state:
            steps.state[new] = {
                key: chosen(value, kept.get(name, {})) if torch.is_tensor(value) and value.shape == old.shape
                else copy.deepcopy(value)
                for key, value in optimizer.state[old].items()
            }  # fmt: skip
    return twin, steps


@pytest.mark.parametrize("name", EVERY)
def test_the_step_after_a_cut_is_that_of_a_slim_twin(name):
    """Two steps after a cut, parameters and buffers are those of a network that was slim all along."""
    make = EVERY[name]
    model, optimizer = trained(make)
    full, before = copy.deepcopy((model, optimizer))
    kept = prune_filters(model, IMAGES, 0.5, optimizer=optimizer).kept
    twin, steps = slim_twin(full, before, make, kept)
    for _ in range(2):
        step_(model, optimizer)
        step_(twin, steps)
    for (key, found), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", EVERY)
def test_state_has_the_shape_of_its_parameter(name):
    """After a cut every tensor of the state has its parameter's shape (a fused step would not notice)."""
    model, optimizer = trained(EVERY[name])
    prune_filters(model, IMAGES, 0.5, optimizer=optimizer)
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            if torch.is_tensor(value) and value.dim():
                assert value.shape == parameter.shape and value.is_contiguous()
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_factored_state_follows():
    """Adafactor's row and column statistics are cut along the dimension that they keep, and training goes on."""
    model, optimizer = trained(lambda p: optim.Adafactor(p, lr=0.01))
    full, before = copy.deepcopy((model, optimizer))
    kept = prune_filters(model, IMAGES, 0.5, optimizer=optimizer).kept
    old, new = before.state[full[6].weight], optimizer.state[model[6].weight]
    assert torch.equal(new["col_var"], old["col_var"][:, kept["6.weight"][1]])
    assert torch.equal(new["row_var"], old["row_var"])
    step_(model, optimizer)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class Nested(optim.Optimizer):
    """Momentum in a list, a dict and a tuple."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["list"], state["dict"], state["tuple"] = (
                    [0, parameter * 0],
                    {"m": parameter * 0},
                    (parameter * 0,),
                )
            for momentum in (state["list"][1], state["dict"]["m"], state["tuple"][0]):
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum, alpha=0.05)


class Factored(optim.Optimizer):
    """Means of squares over rows and columns, in as many dimensions fewer, as Adafactor of transformers keeps them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state, square = self.state[parameter], parameter.grad.square() + 1e-8
            if parameter.dim() < 2:
                state["exp_avg_sq"] = square
                continue
            state["exp_avg_sq_row"], state["exp_avg_sq_col"] = square.mean(-1), square.mean(-2)
            row, column = state["exp_avg_sq_row"].unsqueeze(-1), state["exp_avg_sq_col"].unsqueeze(-2)
            parameter.sub_(parameter.grad / (row * column).sqrt().sqrt(), alpha=0.01)


def test_nested_state_is_that_of_a_slim_twin():
    """Tensors in lists, dicts and tuples are cut like the parameter, and training goes on."""
    model, optimizer = trained(Nested)
    full, before = copy.deepcopy((model, optimizer))
    kept = prune_filters(model, IMAGES, 0.5, optimizer=optimizer).kept
    for layer in ("0", "3", "6"):
        name = f"{layer}.weight"
        old, new = before.state[full.get_parameter(name)], optimizer.state[model.get_parameter(name)]
        assert torch.equal(new["list"][1], chosen(old["list"][1], kept[name])) and new["list"][0] == 0
        assert torch.equal(new["dict"]["m"], chosen(old["dict"]["m"], kept[name]))
        assert torch.equal(new["tuple"][0], chosen(old["tuple"][0], kept[name]))
    step_(model, optimizer)


def test_means_with_a_dimension_less_follow():
    """What is left of a mean over the last dimension, or the one before it, is cut along the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 2))
    model.double()
    optimizer = Factored(model.parameters())
    step_(model, optimizer)
    full, before = copy.deepcopy((model, optimizer))
    kept = prune_filters(model, IMAGES, 0.5, optimizer=optimizer).kept
    for layer in ("0", "1", "3"):
        name = f"{layer}.weight"
        old, new = before.state[full.get_parameter(name)], optimizer.state[model.get_parameter(name)]
        last = full.get_parameter(name).dim() - 1
        rows = {dim: index for dim, index in kept[name].items() if dim != last}
        columns = {min(dim, last - 1): index for dim, index in kept[name].items() if dim != last - 1}
        assert torch.equal(new["exp_avg_sq_row"], chosen(old["exp_avg_sq_row"], rows))
        assert torch.equal(new["exp_avg_sq_col"], chosen(old["exp_avg_sq_col"], columns))
    step_(model, optimizer)


class InGroups(optim.SGD):
    """Keeps momenta in the group, a list beside its parameters."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["mine"] = [parameter.grad.clone() for parameter in group["params"]]
        return super().step(closure)


class ByNumber(optim.SGD):
    """Keeps momenta in a dict of its own, by the id of a parameter or by the parameter itself."""

    key = id

    def step(self, closure=None):
        self.mine = {type(self).key(p): p.grad.clone() for group in self.param_groups for p in group["params"]}
        return super().step(closure)


class ByParameter(ByNumber):
    key = staticmethod(lambda parameter: parameter)


@pytest.mark.parametrize("kind", [InGroups, ByNumber, ByParameter])
def test_tensors_beside_the_state_are_refused(kind):
    """They would keep the old shapes, and the step after the cut would fail."""
    model, optimizer = trained(lambda parameters: kind(parameters, 0.05))
    assert_refused(model, optimizer, f"{kind.__name__} keeps tensors for its parameters in 'mine'")


def test_sparse_gradients_follow():
    """SparseAdam on an embedding: gradients that wait are cut with the table, and steps are those of a slim twin."""
    tokens = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0))

    def embedded(width, hidden):
        table, read = nn.Embedding(7, width, sparse=True), nn.Linear(width, hidden)
        model = nn.Sequential(table, read, nn.ReLU(), nn.Linear(hidden, 2)).double()
        return model, [optim.SparseAdam(table.parameters(), lr=0.1), optim.Adam(model[1:].parameters(), lr=0.1)]

    def backward(model):
        model(tokens).square().mean().backward()

    model, both = embedded(8, 6)
    for _ in range(2):
        backward(model)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    backward(model)
    waiting = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    full, before = copy.deepcopy((model, both))
    kept = prune_filters(model, tokens, 0.5, optimizer=both).kept
    twin, steps = embedded(4, 3)
    twin.load_state_dict({name: chosen(value, kept.get(name, {})) for name, value in full.state_dict().items()})
    for (name, old), new in zip(full.named_parameters(), twin.parameters(), strict=True):
        which = 0 if name.startswith("0.") else 1
        steps[which].state[new] = {
            key: chosen(value, kept.get(name, {})) if torch.is_tensor(value) and value.shape == old.shape
            else copy.deepcopy(value)
            for key, value in before[which].state[old].items()
        }  # fmt: skip
        new.grad = chosen(waiting[name], kept.get(name, {}))
    assert model[0].weight.grad.is_sparse
    for _ in range(2):
        for optimizer in (*both, *steps):
            optimizer.step()
            optimizer.zero_grad()
        backward(model)
        backward(twin)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_groups_and_schedulers_are_untouched():
    """Parameter groups keep their options and the same Parameter objects, and a scheduler goes on where it was."""
    model = network()
    optimizer = optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1:].parameters()}], lr=0.2)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(3):
        step_(model, optimizer)
        scheduler.step()
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = scheduler.state_dict()
    prune_filters(model, IMAGES, 0.5, optimizer=optimizer)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    assert scheduler.state_dict() == state and scheduler.optimizer is optimizer
    step_(model, optimizer)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1 * 0.5**2, 0.2 * 0.5**2]


def test_gradients_follow():
    """Of a gradient that waits for its step, what belongs to the weights that stay stays, at its place."""
    model, optimizer = trained(EVERY["adam-plain"])
    nn.functional.mse_loss(model(IMAGES), TARGETS).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = prune_filters(model, IMAGES, 0.5, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        expected = before[name]
        for dim, indices in report.kept.get(name, {}).items():
            expected = expected.index_select(dim, indices)
        assert torch.equal(parameter.grad, expected), name


def test_several_optimizers_follow():
    """With several optimizers each keeps the state of its own parameters."""
    model = network()
    both = [optim.Adam(model[:4].parameters()), optim.SGD(model[4:].parameters(), lr=0.1, momentum=0.9)]
    for optimizer in both:
        step_(model, optimizer)
    prune_filters(model, IMAGES, 0.5, optimizer=both)
    for optimizer in both:
        step_(model, optimizer)


def test_a_fresh_optimizer_needs_nothing():
    """An optimizer that has not stepped yet has no state to cut and works afterwards."""
    model = network()
    optimizer = optim.AdamW(model.parameters(), fused=True)
    prune_filters(model, IMAGES, 0.5, optimizer=optimizer)
    assert not optimizer.state
    step_(model, optimizer)


def test_state_of_a_cut_model_is_saved_and_loaded():
    """The optimizer's state_dict after a cut loads into an optimizer of a slim twin."""
    model, optimizer = trained(EVERY["adam-plain"])
    prune_filters(model, IMAGES, 0.5, optimizer=optimizer)
    twin = network(4, 3)
    twin.load_state_dict(model.state_dict())
    steps = optim.Adam(twin.parameters(), foreach=False)
    steps.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_(model, optimizer)
    step_(twin, steps)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def assert_refused(model, optimizer, match):
    values = copy.deepcopy(model.state_dict())
    state = {p: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    with pytest.raises(PruningError, match=match):
        prune_filters(model, IMAGES, 0.5, optimizer=optimizer)
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())
    assert repr(model) == repr(network())
    for parameter, entries in state.items():
        for key, value in entries.items():
            found = optimizer.state[parameter][key]
            assert found.shape == value.shape and torch.equal(found, value)


def test_lbfgs_is_refused():
    """LBFGS keeps one history of all parameters together, so it is refused and the model left as it was."""
    model = network()
    assert_refused(model, optim.LBFGS(model.parameters()), "LBFGS keeps one history for all parameters together")


def test_state_of_another_model_is_refused():
    """State that does not fit its parameter is refused before anything is cut, also that of a later one."""
    for index in (0, 6):
        for wrong in (lambda sizes: [size + 1 for size in sizes], lambda sizes: [*sizes, 2]):
            model, optimizer = trained(EVERY["adam-plain"])
            weight = model[index].weight
            optimizer.state[weight]["exp_avg"] = torch.zeros(wrong(weight.shape), dtype=torch.float64)
            assert_refused(model, optimizer, "state 'exp_avg' of shape .* does not fit its parameter")


class Counting(optim.SGD):
    """Keeps state that belongs to no parameter, under a name, as some second-order optimizers do."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.state["all"]["steps"] = self.state["all"].get("steps", torch.zeros(())) + 1
        return loss


def test_state_of_no_parameter_is_brought_back():
    """What an optimizer keeps under a name is restored beside the state of parameters."""
    model = nn.Linear(3, 2)
    optimizer = Counting(model.parameters(), 0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step()
    snapshot = take_snapshot(model, [optimizer])
    weight, momentum = model.weight.detach().clone(), optimizer.state[model.weight]["momentum_buffer"].clone()
    step()
    restore_(model, [optimizer], snapshot)
    assert float(optimizer.state["all"]["steps"]) == 1
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum)


class Quantized(optim.SGD):
    """Keeps its momentum as a flat tensor of bytes, as optimizers of 8 bits do."""

    def step(self, closure=None):
        found = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["bytes"] = torch.zeros(parameter.numel(), dtype=torch.uint8)
        return found


class Aside(optim.SGD):
    """Keeps its momenta in a dict of its own."""

    def step(self, closure=None):
        self.momenta = {id(parameter): torch.zeros_like(parameter) for parameter in self.param_groups[0]["params"]}
        self.state["steps"] = 1
        return super().step(closure)


class Slow(optim.SGD):
    """Keeps slow weights in a list for each group, as Lookahead does."""

    def step(self, closure=None):
        self.slow = [[parameter.detach().clone() for parameter in group["params"]] for group in self.param_groups]
        self.state["steps"] = 1
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "told"), [(Quantized, "'bytes' of shape .* AdamW"), (Aside, "in 'momenta'"), (Slow, "in 'slow'")]
)
def test_state_that_cannot_follow_is_refused_at_the_first_step(kind, told):
    """In a run, not an epoch later when the first cut falls due."""
    module = net(Net)
    module.configure_optimizers = lambda: kind(module.parameters(), 0.05, momentum=0.9)
    with pytest.raises(PruningError, match=told):
        fit(module, FilterL1Pruning(0.5, schedule=Linear(1, 2), report=False))
    assert module.trainer.global_step == 1 and module.first.out_channels == 8
