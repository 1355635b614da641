"""Layers that stay are numbered anew, so that the caches of decoders are right once attentions are gone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import load_state_dict_, prune_layers
from lightning_prune.structure.skippable import find_skippable
from lightning_prune.surgery.layer_numbers import numbered_layers
from lightning_prune.surgery.pass_through import Skipped, skip_of
from lightning_prune.surgery.remove_layers import remove_layers_
from lightning_prune.surgery.skipped import temporarily_skipped, temporarily_whole
from lightning_prune.surgery.verify_skips import verify_skips

WIDTH = 6


class Cache:
    """Keys and values by number of the attention; its length is that of one entry, as in transformers."""

    def __init__(self, first):
        self.first, self.entries = first, {}

    def __len__(self):
        return self.entries[self.first][0].shape[1] if self.first in self.entries else 0

    def add(self, number, k, v):
        if number in self.entries:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.entries[number], (k, v), strict=True))
        self.entries[number] = k, v
        return k, v


class Attention(nn.Module):
    def __init__(self, number, scaled):
        super().__init__()
        self.place, self.scaled = number, scaled
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, cache):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if cache is not None:
            k, v = cache.add(self.place, k, v)
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        scores = scores / (1 + self.place) if self.scaled else scores
        return self.out(scores.softmax(-1) @ v)


class Layer(nn.Module):
    def __init__(self, number, attends, scaled):
        super().__init__()
        self.attention = Attention(number, scaled) if attends else None
        self.feed = nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))

    def forward(self, x, cache):
        if self.attention is not None:
            x = x + self.attention(x, cache)
        return x + self.feed(x)


class Decoder(nn.Module):
    """A language model with positions, whose next one is the length of the cache."""

    def __init__(self, attends, scaled=False):
        super().__init__()
        self.first = attends.index(True)
        self.embed, self.positions = nn.Embedding(9, WIDTH), nn.Embedding(12, WIDTH)
        self.layers = nn.ModuleList([Layer(i, own, scaled) for i, own in enumerate(attends)])
        self.head = nn.Linear(WIDTH, 9)

    def forward(self, ids, cache=None):
        start = 0 if cache is None else len(cache)
        x = self.embed(ids) + self.positions(torch.arange(start, start + ids.shape[1]))
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x)


def token_by_token(model, ids):
    cache = Cache(model.first)
    return torch.cat([model(ids[:, i : i + 1], cache) for i in range(ids.shape[1])], dim=1)


def numbers(model):
    """Return the numbers of the attentions that are there, in the order of the layers."""
    return [module.place for module in model.modules() if isinstance(module, Attention)]


def assert_whole(model, attends):
    assert numbers(model) == [i for i, own in enumerate(attends) if own]


REMOVALS = st.lists(st.booleans(), min_size=2, max_size=5).filter(lambda attends: sum(attends) > 1)
REMOVALS = REMOVALS.flatmap(
    lambda attends: st.tuples(
        st.just(attends),
        st.lists(st.sampled_from(["", "layer", "attention"]), min_size=len(attends), max_size=len(attends)),
        st.integers(0, len(attends)),
        st.integers(0, 2**20),
    )
)


@settings(max_examples=25, deadline=None)
@given(REMOVALS)
def test_decoding_with_a_cache_is_decoding_without(drawn):
    """Whatever attentions and layers are gone, in whatever steps, the cache is right; what returns has its number."""
    attends, gone, steps, seed = drawn
    torch.manual_seed(seed)
    model, ids = Decoder(attends).eval(), torch.randint(0, 9, (2, 7))
    dense = copy.deepcopy(model)
    depth = find_skippable(model, ids)
    paths = [f"layers.{i}" if what == "layer" else f"layers.{i}.attention" for i, what in enumerate(gone) if what]
    skips = {path: skip_of(depth.layers[path]) for path in paths if path in depth.layers}
    left = [own and not what for own, what in zip(attends, gone, strict=True)]
    with temporarily_skipped(model, skips):
        torch.testing.assert_close(model(ids), token_by_token(model, ids) if any(left) else model(ids))
    assert_whole(model, attends)
    assert not verify_skips(model, ids, skips).wrong
    for part in (list(skips)[:steps], list(skips)[steps:]):
        remove_layers_(model, {path: skips[path] for path in part})
    expected = [i for i, own in enumerate(attends) if own][: sum(left)]
    assert numbers(model) == expected
    if expected:
        torch.testing.assert_close(token_by_token(model, ids), model(ids))
    with temporarily_whole(model):
        assert_whole(model, attends)
    assert numbers(model) == expected
    other = copy.deepcopy(dense)
    load_state_dict_(other, model.state_dict())
    assert numbers(other) == expected and torch.equal(other(ids), model(ids))
    for pruned in (model, other):
        load_state_dict_(pruned, dense.state_dict())
        assert_whole(pruned, attends)
        torch.testing.assert_close(token_by_token(pruned, ids), dense(ids))


def test_numbers_that_are_computed_with_stay():
    """Where an attention computes with its number, the removal is right without another one, and that is remembered."""
    torch.manual_seed(0)
    model, ids = Decoder([True] * 3, scaled=True).eval(), torch.randint(0, 9, (2, 7))
    dense = copy.deepcopy(model)
    ignored = ["layers.*.feed", "layers.1", "layers.2"]
    report = prune_layers(model, ids, 0.1, ignore=ignored, progress=False)
    assert [layer.path for layer in report.removed] == ["layers.0.attention"] and report.proved
    assert numbers(model) == [1, 2]
    load_state_dict_(other := copy.deepcopy(dense), model.state_dict())
    assert numbers(other) == [1, 2] and torch.equal(other(ids), model(ids))
    load_state_dict_(other, dense.state_dict())
    assert numbers(other) == [0, 1, 2]


class Numbered(nn.Module):
    """Holds several whole numbers, of which one may be its place in a list."""

    def __init__(self, **held):
        super().__init__()
        vars(self).update(held)


@pytest.mark.parametrize(
    "held, found",
    [
        ([{"a": 0}, {"a": 1}, {"a": 2}], ["a"]),
        ([{"a": 0, "b": 3}, {"a": 1, "b": 3}], ["a"]),
        ([{}, {"a": 1}, {"a": 2}], ["a"]),
        ([{"a": 1}, {"a": 2}], []),
        ([{"a": False}, {"a": True}], []),
        ([{"a": 1}, {"a": 0}], []),
        ([{"a": 0}, {}], []),
        ([{"a": "0"}, {"a": "1"}], []),
    ],
    ids=str,
)
def test_what_counts_as_a_number(held, found):
    """Whole numbers that are the positions of at least two modules in a list count, whatever they are called."""
    model = nn.Sequential(nn.ModuleList([nn.ModuleDict({"in": Numbered(**own)}) for own in held]))
    assert [numbered.attribute for numbered in numbered_layers(model)] == found


def test_modules_of_torch_have_no_numbers():
    """Sizes and dilations are no positions, even where they happen to be equal to these."""
    convolutions = [nn.Conv2d(2, 2, 1, groups=1) for _ in range(2)]
    convolutions[1].groups = 1
    model = nn.Sequential(nn.Identity(), *convolutions)
    assert not numbered_layers(model) and not any(isinstance(module, Skipped) for module in model.modules())
