"""Whole layers leave: what is found, that the model without them is right, and that everything else follows."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import PruningError, load_state_dict_, prune_layers, slim_loading
from lightning_prune.structure.skippable import find_skippable
from lightning_prune.surgery.loading import recipe_json
from lightning_prune.surgery.pass_through import Skipped, skip_of
from lightning_prune.surgery.remove_layers import remove_layers_
from lightning_prune.surgery.verify_skips import verify_skips
from tests.blocks import WIDTH, Block, Stack, without
from tests.test_interruption import broken_points

KINDS = st.sampled_from(["pre", "post", "in place", "plain"])
FORMS = st.sampled_from(["tensor", "tuple", "data", "dict"])
STACKS = st.integers(2, 5).flatmap(
    lambda n: st.tuples(
        st.lists(KINDS, min_size=n, max_size=n),
        st.lists(FORMS, min_size=n, max_size=n),
        st.sets(st.integers(0, n - 1)),
        st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1),
        st.integers(0, 2**20),
    )
)


@settings(max_examples=40, deadline=None)
@given(STACKS)
def test_a_model_without_layers_is_the_one_built_without_them(drawn):
    """Whatever blocks return and take, in eval and in train mode outputs and gradients are those of a twin."""
    kinds, forms, named, gone, seed = drawn
    by_name = {f"b{i}" for i in named}
    torch.manual_seed(seed)

    def make(without=()):
        return Stack(kinds, forms, by_name, without)

    model, x = make(), torch.randn(4, 5, 3)
    twin = without(model, make, gone)
    depth = find_skippable(model, x)
    assert set(depth.layers) == {f"blocks.b{i}" for i in range(len(kinds))}
    skips = {f"blocks.b{i}": skip_of(depth.layers[f"blocks.b{i}"]) for i in gone}
    names = [name for name, _ in twin.named_parameters()]
    kept = {name: parameter for name, parameter in model.named_parameters() if name in names}
    proof = verify_skips(model, x, skips)
    assert not proof.wrong and proof.modes == ("eval", "train") and proof.compared
    remove_layers_(model, skips)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(model.get_parameter(name) is parameter for name, parameter in kept.items())
    for mode in (True, False):
        results = []
        for one in (model.train(mode), twin.train(mode)):
            torch.manual_seed(seed)
            one.zero_grad()
            found = one(x)
            found.square().sum().backward()
            results.append((found, [parameter.grad for parameter in one.parameters()]))
        assert torch.equal(results[0][0], results[1][0])
        for one, other in zip(results[0][1], results[1][1], strict=True):
            assert (one is other is None) or torch.equal(one, other)


class Encoder(nn.Module):
    """A transformer of blocks that hold attention and a feed-forward part as modules."""

    def __init__(self, blocks, attention=(), feeding=()):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            [Attending(i not in attention, i not in feeding) for i in range(blocks)],
        )
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


class Attending(nn.Module):
    """Attention and feed-forward parts, each on a branch; a part may be missing."""

    def __init__(self, attends, feeds):
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = SelfAttention() if attends else None
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) if feeds else None
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        if self.attention is not None:
            x = x + self.scale * self.attention(self.first(x))[0]
        if self.feed is not None:
            x = x + self.feed(self.second(x))
        return x


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2)), st.integers(0, 2**20))
def test_parts_of_blocks_leave_alone(attention, feeding, seed):
    """Of a block the attention or the feed-forward part can leave alone: what it adds is nothing then."""
    torch.manual_seed(seed)
    model, ids = Encoder(3), torch.randint(0, 11, (2, 7))
    twin = without(model, lambda _: Encoder(3, attention, feeding), ())
    depth = find_skippable(model, ids)
    assert depth.outermost == ["blocks.0", "blocks.1", "blocks.2"]
    assert depth.layers["blocks.1"].parts == ("blocks.1.attention", "blocks.1.feed")
    assert depth.layers["blocks.1.feed"].fill == "zeros" and depth.layers["blocks.1"].fill == "input"
    gone = [f"blocks.{i}.attention" for i in attention] + [f"blocks.{i}.feed" for i in feeding]
    skips = {path: skip_of(depth.layers[path]) for path in gone}
    assert not verify_skips(model, ids, skips).wrong
    remove_layers_(model, skips)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())
    torch.testing.assert_close(model(ids), twin(ids), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_the_next_step_is_that_of_a_slim_twin(kind):
    """Optimizers forget what left, and go on as if they had trained the slim model all along."""
    torch.manual_seed(0)
    make = lambda gone=(): Stack(["pre"] * 4, ["tuple"] * 4, (), gone)  # noqa: E731
    model, x = make(), torch.randn(4, 5, 3)
    arguments = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    groups = [
        {"params": list(model.blocks.parameters())},
        {"params": [*model.embed.parameters(), *model.head.parameters()]},
    ]
    optimizer = kind(groups, **arguments)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    report = prune_layers(model, x, 0.5, optimizer=optimizer, progress=False)
    gone = {int(layer.path[-1]) for layer in report.removed}
    assert len(gone) == 2
    twin = without(model, make, gone)
    theirs = [
        {"params": list(twin.blocks.parameters())},
        {"params": [*twin.embed.parameters(), *twin.head.parameters()]},
    ]
    other = kind(theirs, **arguments)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()} and len(optimizer.state) == len(held)
    for one, stepping in ((model, optimizer), (twin, other)):
        torch.manual_seed(1)
        stepping.zero_grad()
        one(x).square().sum().backward()
        stepping.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def pruned_and_dense():
    torch.manual_seed(0)
    dense = Stack(["pre", "post", "pre", "in place"], ["data", "tuple", "dict", "tensor"]).eval()
    model, x = copy.deepcopy(dense), torch.randn(4, 5, 3)
    report = prune_layers(model, x, 0.5, progress=False)
    assert len(report.removed) == 2 and report.proved
    return model, dense, x


def test_state_dicts_tell_which_layers_left():
    """A slim state dict loads into a full model and back, through files, plain dicts with JSON and copies."""
    model, dense, x = pruned_and_dense()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = copy.deepcopy(dense)
    for state, expected in ((saved, model), (dense.state_dict(), dense), (saved, model)):
        load_state_dict_(other, state)
        assert torch.equal(other(x), expected(x))
        assert list(other.state_dict()) == list(expected.state_dict())
    recipe, tensors = recipe_json(model), dict(model.state_dict())
    other = copy.deepcopy(dense)
    load_state_dict_(other, tensors, recipe=recipe)
    assert torch.equal(other(x), model(x))
    with slim_loading(recipe):
        other = copy.deepcopy(dense)
        other.load_state_dict(tensors)
    assert torch.equal(other(x), model(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and str(other) == str(model)
        load_state_dict_(other, dense.state_dict())
        assert torch.equal(other(x), dense(x))


def test_a_failed_load_changes_nothing():
    """A state dict that does not fit leaves the layers of the model as they are."""
    model, dense, x = pruned_and_dense()
    state = model.state_dict()
    del state["head.weight"]
    before = dense(x)
    with pytest.raises(PruningError, match="head.weight"):
        load_state_dict_(dense, state)
    assert torch.equal(dense(x), before) and not any(isinstance(m, Skipped) for m in dense.modules())


def test_a_recipe_that_is_none_is_refused():
    """What a file says of a removed layer is checked before anything is made of it."""
    model, dense, _ = pruned_and_dense()
    state = model.state_dict()
    path = next(path for path, module in model.named_modules() if isinstance(module, Skipped))
    good = state._metadata[path]["lightning_prune"]["layer"]
    bad = [{"fill": "ones"}, {"form": ["object", "os:system", []], "x": 1}, {"form": ["call", "os"]}, {"source": 3}]
    for changes in bad:
        state._metadata[path]["lightning_prune"]["layer"] = {**good, **changes}
        with pytest.raises(PruningError, match="cannot be read"):
            load_state_dict_(copy.deepcopy(dense), state)


def test_a_form_calls_nothing_but_dataclasses():
    """A file cannot have another class or function called than a dataclass that is imported already."""
    _, dense, x = pruned_and_dense()
    depth = find_skippable(dense, x)
    for name in ("os:system", "subprocess:Popen", "no_such_module:Thing"):
        skip = {**skip_of(depth.layers["blocks.b0"]), "form": ["object", name, [["hidden", ["main"]]]]}
        remove_layers_(other := copy.deepcopy(dense), {"blocks.b0": skip})
        with pytest.raises(PruningError, match="not imported"):
            other(x)


def made():
    torch.manual_seed(0)
    model = Stack(["pre"] * 3, ["tensor"] * 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(torch.randn(4, 5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def picture(made):
    """Return all that a removal may change, as bytes and names."""
    model, optimizer = made
    own = {name: (tuple(p.shape), p.detach().numpy().tobytes()) for name, p in model.named_parameters()}
    grads = {name: None if p.grad is None else p.grad.numpy().tobytes() for name, p in model.named_parameters()}
    state = [
        {key: value.numpy().tobytes() for key, value in optimizer.state[p].items()}
        for p in model.parameters()
        if p in optimizer.state
    ]
    groups = [len(group["params"]) for group in optimizer.param_groups]
    return str(model), own, grads, state, groups, len(optimizer.state), torch.is_grad_enabled()


def test_an_interruption_leaves_all_or_nothing():
    """Ctrl-C at any line of a removal leaves the model, its optimizer and its gradients whole, or the removal made."""
    skips = {"blocks.b1": skip_of(find_skippable(made()[0], torch.randn(4, 5, 3)).layers["blocks.b1"])}

    def action(both):
        remove_layers_(both[0], skips, [both[1]])

    def after(both):
        both[0](torch.randn(4, 5, 3)).square().sum().backward()
        both[1].step()

    lines, broken = broken_points(made(), action, picture, after, KeyboardInterrupt, every=13)
    assert lines > 50 and not broken


# What cannot leave


class Reading(nn.Module):
    """Reads a weight of its first block besides calling it, and calls its second through a list of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block("pre", "tensor") for _ in range(3)])
        self.aside = [self.blocks[1]]

    def forward(self, x):
        x = self.blocks[0](x) * self.blocks[0].norm.weight.sum()
        return self.blocks[2](self.aside[0](x))


def test_what_cannot_be_verified_stays():
    """A block whose parts are read, or that is called past its container, is kept and named with the reason."""
    model, x = Reading(), torch.randn(2, 5, WIDTH)
    with pytest.warns(UserWarning, match="could not be verified"):
        report = prune_layers(model, x, 0.6, progress=False)
    assert [layer.path for layer in report.removed] == ["blocks.2"]
    assert "does not run without it" in report.pinned["blocks.0"]
    assert "blocks.1" in report.pinned


def test_what_is_no_layer_is_named():
    """Modules whose output no input can stand in for, or that only string others together, have their reasons."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(*(Block("pre", "tensor", 4) for _ in range(3))), nn.Linear(4, 2)
    )
    found = find_skippable(model, torch.randn(2, 5, 3))
    assert list(found.layers) == ["1.0", "1.1", "1.2"]
    assert found.others["0"] == "it returns shape (2, 5, 4), and no input has that shape and dtype"
    assert found.others["1"] == "it strings together 3 layers, which can be left out one by one"
    with pytest.raises(PruningError, match="No layer of Linear can be removed"):
        prune_layers(nn.Linear(3, 4), torch.randn(2, 3))


class Shared(nn.Module):
    """Calls one block twice, and another under two names."""

    def __init__(self):
        super().__init__()
        self.twice, self.one, self.last = Block("pre", "tuple"), Block("pre", "tuple"), Block("pre", "tuple")
        self.other = self.one

    def forward(self, x):
        for block in (self.twice, self.one, self.twice, self.other, self.last):
            x = block(x)[0]
        return x


def test_a_shared_layer_leaves_everywhere():
    """A layer that is called several times, or under several names, leaves all of its places."""
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 5, WIDTH)
    expected = model.last(x)[0]
    depth = find_skippable(model, x)
    assert {path: layer.calls for path, layer in depth.layers.items()} == {"twice": 2, "one": 2, "last": 1}
    skips = {path: skip_of(depth.layers[path]) for path in ("twice", "one")}
    assert not verify_skips(model, x, skips).wrong
    remove_layers_(model, skips)
    assert torch.equal(model(x), expected) and model.other is model.one


# A layer that adds to one of its inputs what it makes of the other: its arguments, how it adds, and how it is called.
STREAMS = {
    "last": ("mem, x", "x + self.f(mem)", "layer(mem, x)"),
    "first": ("x, mem", "x + self.f(mem)", "layer(x, mem)"),
    "by name": ("*, mem, x", "self.f(mem) + x", "layer(mem=mem, x=x)"),
    "in place": ("mem, x", "x.add_(self.f(mem))", "layer(mem, x)"),
    "sum of three": ("mem, x", "x + self.f(mem) + self.f(mem * 2)", "layer(mem, x)"),
    "of a tuple": ("state", "(state[1] + self.f(state[0]), state[0])", "layer((mem, x))[0]"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_a_layer_adds_to_stands_in_for_it(name):
    """Whichever of two inputs of one shape a layer adds to, that one is returned once the layer is removed."""
    arguments, total, called = STREAMS[name]
    space = {"nn": nn}
    lines = ["class Layer(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += ["        self.f = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))"]
    lines += [f"    def forward(self, {arguments}):", f"        return {total}"]
    lines += ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += ["        self.i, self.o = nn.Linear(6, 6), nn.Linear(6, 2)"]
    lines += ["        self.layers = nn.ModuleList(Layer() for _ in range(4))"]
    lines += ["    def forward(self, mem):", "        x = self.i(mem)", "        for layer in self.layers:"]
    lines += [f"            x = {called}", "        return self.o(x)"]
    exec("\n".join(lines), space)
    torch.manual_seed(0)
    model, x = space["Net"]().double(), torch.randn(5, 6, dtype=torch.float64)
    full = copy.deepcopy(model)
    report = prune_layers(model, x, 2, ignore=["i"], progress=False)
    expected = full.i(x)
    for place, layer in enumerate(full.layers):
        if f"layers.{place}" not in {one.path for one in report.removed}:
            expected = expected + layer.f(x) + (layer.f(x * 2) if "2)" in total else 0)
    assert {one.path.split(".")[0] for one in report.removed} == {"layers"}
    assert len(report.removed) == 2
    assert torch.allclose(model(x), full.o(expected), rtol=0, atol=1e-12)
