"""Runs that compute nothing: shapes and structure are those of a run that computes; numbers asked for are computed."""

from queue import SimpleQueue

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.pruning.filters import prune_filters
from lightning_prune.structure import find_structure, trace
from lightning_prune.structure.shape_only import shaper
from lightning_prune.structure.trace import _in_both_modes
from lightning_prune.surgery import Disproof, Proof, draft, verify
from tests.models import NETS, ROWS

aten = torch.ops.aten
X, V = torch.randn(2, 6, 5, 4), torch.randn(6)
SHAPED = [
    (aten.relu.default, (X,)), (aten.relu_.default, (X.clone(),)), (aten.gelu.default, (X.half(),)),
    (aten.add.Tensor, (X, torch.randn(6, 1, 4))), (aten.mul.Tensor, (X, 2.0)), (aten.div.Tensor, (V, V)),
    (aten._softmax.default, (X, 1, False)), (aten.clone.default, (X.permute(0, 2, 3, 1),)),
    (aten.mm.default, (X[0, 0], X[0, 0].t())), (aten.bmm.default, (X[0], X[0].transpose(1, 2))),
    (aten.addmm.default, (torch.randn(3), torch.randn(2, 6), torch.randn(6, 3))),
    (aten.native_batch_norm.default, (X, V, V, V, V.abs(), False, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (X, [5, 4], None, None, 1e-5)),
    (aten.cat.default, ([X, X[:, :2]], 1)), (aten.cat.default, ([X, X], -1)),
]  # fmt: skip


COMPUTED = {"DataDependent"}


def taken(queue):
    """Take all out of a queue: an object of the standard library that a proof does not take back."""
    return [queue.get() for _ in range(queue.qsize())]


def outline(out):
    return [(tuple(t.shape), t.dtype, t.device) for t in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("case", SHAPED, ids=lambda case: str(case[0]))
def test_shapes_are_those_that_the_operator_gives(case):
    """What is not computed has the shape, type and place of what the operator returns."""
    func, args = case
    assert outline(shaper(func)(*args)) == outline(func(*args))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_shapes_of_convolutions(data):
    """So it is for convolutions of any stride, padding, dilation and groups, transposed or not."""
    draw, positions = data.draw, data.draw(st.integers(1, 3))
    several = st.lists(st.integers(1, 3), min_size=positions, max_size=positions)
    groups, transposed = draw(st.integers(1, 2)), draw(st.booleans())
    kernel, stride, dilation = draw(several), draw(several), draw(several)
    padding = [draw(st.integers(0, 2)) for _ in range(positions)]
    more = [draw(st.integers(0, max(0, s - 1))) if transposed else 0 for s in stride]
    weight = torch.randn(*((4, 3) if transposed else (2 * groups, 4 // groups)), *kernel)
    x = torch.randn(2, 4, *(draw(st.integers(4, 9)) for _ in range(positions)))
    args = (x, weight, None, stride, padding, dilation, transposed, more, groups)
    try:
        expected = outline(aten.convolution.default(*args))
    except RuntimeError:
        assert shaper(aten.convolution.default)(*args) is None
    else:
        found = shaper(aten.convolution.default)(*args)
        assert 0 in expected[0][0] if found is None else outline(found) == expected


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_shapes_of_pooling(data):
    """So it is for pooling of any stride, padding and dilation, the last window whole or not."""
    draw, positions = data.draw, data.draw(st.integers(2, 3))
    several = st.lists(st.integers(1, 3), min_size=positions, max_size=positions)
    kernel, stride, ceil = draw(several), draw(st.just([]) | several), draw(st.booleans())
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    x = torch.randn(2, 3, *(draw(st.integers(4, 9)) for _ in range(positions)))
    largest, average = getattr(aten, f"max_pool{positions}d_with_indices"), getattr(aten, f"avg_pool{positions}d")
    for func, args in (
        (largest.default, (x, kernel, stride, padding, draw(several), ceil)),
        (average.default, (x, kernel, stride, padding, ceil)),
    ):
        try:
            expected = outline(func(*args))
        except RuntimeError:
            assert shaper(func)(*args) is None
        else:
            assert outline(shaper(func)(*args)) == expected


@pytest.mark.parametrize(
    "case",
    [
        (aten.mm.default, (torch.ones(2, 3), torch.ones(4, 2))),
        (aten.addmm.default, (torch.ones(3), torch.ones(2, 6), torch.ones(6, 4))),
        (aten.convolution.default, (X, torch.ones(4, 5, 1, 1), None, [1], [0], [1], False, [0], 1)),
        (aten.cat.default, ([X, X[:, :, :2]], 1)),
    ],
    ids=lambda case: str(case[0]),
)
def test_what_does_not_fit_is_left_to_the_operator(case):
    """Shapes that the operator refuses have no output: it shall say itself what is wrong."""
    func, args = case
    assert shaper(func)(*args) is None
    with pytest.raises(RuntimeError):
        func(*args)


@pytest.mark.parametrize("name", NETS)
def test_structure_is_that_of_a_run_that_computes(name):
    """Groups, what stays, attributes and costs do not depend on whether anything was computed."""
    net = NETS[name]
    model = net.build().double()
    ledger = trace(model, net.inputs)
    found, expected = (
        find_structure(each) for each in (ledger, _in_both_modes(model, net.inputs, frozenset(), ledger.numbers, False))
    )
    assert ledger.hollow == (name not in COMPUTED)
    assert {n: g.width for n, g in found.groups.items()} == {n: g.width for n, g in expected.groups.items()}
    assert found.pinned == expected.pinned
    assert found.flops({}) == expected.flops({})
    assert [(r.func, r.leaving) for r in found.ledger.ran] == [(r.func, r.leaving) for r in expected.ledger.ran]
    assert np.array_equal(found.component, expected.component)


class Reads(nn.Module):
    """Two linear layers, and code between them that looks at numbers."""

    def __init__(self, look):
        super().__init__()
        self.first, self.second, self.look = nn.Linear(6, 5), nn.Linear(5, 2), look
        self.register_buffer("kept", torch.zeros(5))

    def forward(self, x):
        return self.second(self.look(self, self.first(x)))


def into_a_buffer(model, x):
    model.kept[:] = x[0]
    return x if model.kept.sum() > 1e30 else x.relu()


def into_a_part(model, x):
    model.kept[1:3] = x[0, 1:3]
    return x if model.kept.sum() > 1e30 else x.relu()


def into_a_view(model, x):
    model.kept.view(5, 1)[:, 0].copy_(x[0])
    return x if model.kept.tolist()[0] > 1e30 else x.relu()


def behind_a_view(model, x):
    part = model.kept[:3]
    model.kept.copy_(x[0])
    return x if part.sum() > 1e30 else x.relu()


def into_zeros(model, x):
    made = torch.zeros(5)
    made[1:3] = x[0, 1:3]
    return x if (made * 2).sum() > 1e30 else x.relu()


def swallowed(model, x):
    try:
        return x if float(x.sum()) > 1e30 else x.relu()
    except Exception:
        return x


READING = {
    "item": lambda model, x: x * (x.sum().item() > 0),
    "bool": lambda model, x: x.relu() if (x > -1e30).all() else x,
    "tolist": lambda model, x: x + x.sum(1).tolist()[0],
    "numpy": lambda model, x: x + float(x.numpy()[0, 0]),
    "into a buffer": into_a_buffer,
    "swallowed": swallowed,
}
WRITTEN = {
    "into a part of a buffer": into_a_part,
    "into a view of a buffer": into_a_view,
    "into a buffer, behind a view": behind_a_view,
    "into zeros": into_zeros,
}
DEPENDING = {
    "chosen rows": lambda model, x: x[x.sum(1).argsort()],
    "masked rows": lambda model, x: x[x.sum(1) > -1e30],
}


@pytest.mark.parametrize("name", READING | DEPENDING)
def test_numbers_that_code_asks_for_are_computed(name):
    """A model that goes by numbers is traced with numbers, on the path that they take it."""
    model = Reads((READING | DEPENDING)[name])
    ledger = trace(model, ROWS.float())
    assert not ledger.hollow
    assert {n: g.width for n, g in find_structure(ledger).groups.items()} == {"first": 5}
    assert not model.kept.any()


@pytest.mark.parametrize("name", READING | WRITTEN)
def test_only_the_path_taken_was_seen(name):
    """The report names modules whose code goes by numbers of its input, and no others."""
    report = prune_filters(nn.Sequential(Reads((READING | WRITTEN)[name]), nn.Linear(2, 2)), ROWS.float(), 0.4)
    assert report.branching == ("0",)
    assert prune_filters(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), ROWS.float(), 0.4).branching == ()


def test_what_never_ran_is_told():
    """Parameters that no operator took stay, and the report says of each that it never ran."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    model[0].spare, model.gain = nn.Conv1d(3, 4, 2), nn.Parameter(torch.ones(3))
    report = prune_filters(model, ROWS.float(), 0.4)
    told = {(p.tensor, p.count, p.size) for p in report.pinned if p.reason == "it never ran on the example inputs"}
    assert told == {("0.spare.weight", 4, 4), ("0.spare.bias", 4, 4), ("gain", 3, 3)}
    assert model[0].spare.weight.shape == (4, 3, 2)


class Sized(nn.Module):
    """A convolution net that notes, in what a proof does not take back, the sides of what it runs on."""

    def __init__(self, sides, largest=None):
        super().__init__()
        self.sides, self.largest = sides, largest
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=4), nn.Conv2d(8, 2, 3)

    def forward(self, x):
        self.sides.put(x.shape[-1])
        x = self.first(x)
        if self.largest is not None and x.shape[-1] >= self.largest:
            x = x.relu()
        return self.second(x).mean((2, 3))


def proved_on(model, side, flaw=0.0):
    """Return whether a cut is proved, and the sides of all that the proof ran on."""
    image = torch.randn(1, 3, side, side)
    structure = find_structure(trace(model, image))
    cut = draft(model, structure, {"first": np.arange(8) > 2})

    def tensors():
        slim = cut.tensors(model)
        slim["second.weight"] = slim["second.weight"] + flaw
        return slim

    taken(model.sides)
    found = verify(model, structure, cut, tensors)
    return isinstance(found, Proof), taken(model.sides)


def test_numbers_are_compared_on_fewer_positions():
    """The proof computes on images a fourth as large where the model runs the same operators on them."""
    sides = SimpleQueue()
    assert proved_on(Sized(sides), 128) == (True, [32])
    assert proved_on(Sized(sides), 64) == (True, [32])
    assert proved_on(Sized(sides), 48) == (True, [48])


def test_another_path_on_fewer_positions_proves_nothing():
    """Where smaller images take another path, or leave one position alone, the proof goes back to larger ones."""
    sides = SimpleQueue()
    assert proved_on(Sized(sides, largest=31), 128) == (True, [32, 43, 64, 128])
    assert proved_on(Sized(sides, largest=12), 128) == (True, [32, 43, 64])


class Normed(Sized):
    """Channels that are normalised over, and others behind them."""

    def __init__(self, sides):
        super().__init__(sides)
        self.norm, self.second, self.third = nn.LayerNorm(8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        self.sides.put(x.shape[-1])
        x = self.norm(self.first(x).movedim(1, -1)).movedim(-1, 1)
        return self.third(self.second(x)).mean((2, 3))


def test_what_is_cut_in_both_models_does_not_make_positions_tell_less():
    """Fewer positions do where a normalised stream is cut in the silenced model, too."""
    model, image = Normed(SimpleQueue()), torch.randn(1, 3, 128, 128)
    structure = find_structure(trace(model, image))
    assert structure.groups["first"].changes_statistics
    cut = draft(model, structure, {"first": np.arange(8) > 2, "second": np.arange(4) > 0})
    taken(model.sides)
    assert isinstance(verify(model, structure, cut, lambda: cut.tensors(model)), Proof)
    assert taken(model.sides) == [32]


@pytest.mark.parametrize("side", [48, 128])
def test_wrong_numbers_are_found_on_fewer_positions(side):
    """A slim model that computes something else is found out, whatever the images are."""
    assert not proved_on(Sized(SimpleQueue()), side, flaw=1e-2)[0]


def test_wrong_numbers_are_found_beside_a_stream_that_is_normalised():
    """Where a normalised stream is cut too, what else is cut must still compute what it did when silenced."""
    normed = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    model = nn.Sequential(nn.Linear(4, 6), normed, nn.Linear(6, 3))
    rows = torch.randn(5, 4)
    structure = find_structure(trace(model, rows))
    keep = {name: np.arange(group.width) > 1 for name, group in structure.groups.items()}
    cut = draft(model, structure, keep)
    slim = cut.tensors(model)
    assert isinstance(verify(model, structure, cut, lambda: slim), Proof)
    wrong = slim | {"1.3.weight": slim["1.3.weight"] + 0.01}
    assert isinstance(verify(model, structure, cut, lambda: wrong), Disproof)
