"""One width for layers of a kind, and configs that follow a cut: with small classes that look like those of others."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import FilterL1Pruning, load_state_dict_, prune_filters
from tests.runs import fit, net

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Config:
    """Numbers that a model is built from."""

    model_type = "tiny"

    def __init__(self, hidden_size=12, intermediate_size=20, num_layers=3, **_):
        self.hidden_size, self.intermediate_size, self.num_layers = hidden_size, intermediate_size, num_layers

    def to_dict(self):
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class PreTrainedModel(nn.Module):
    """As in transformers: built from a config alone."""

    __module__ = "transformers.modeling_utils"

    def __init__(self, config):
        super().__init__()
        self.config = config


class Tiny(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.inner_width = config.intermediate_size  # which nothing reads
        self.stem = nn.Linear(8, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.hidden_size, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rebuilt(model):
    again = type(model)(copy.deepcopy(model.config))
    again.load_state_dict(model.state_dict())
    return again


def tiny():
    torch.manual_seed(0)
    return Tiny(Config())


@pytest.mark.parametrize("more", [{}, {"scope": "global"}, {"target": "params"}, {"target": "flops"}], ids=str)
def test_a_config_gives_the_slim_model(more):
    """A model built from the config after the cut takes its weights and gives its outputs; unread numbers follow."""
    model = tiny()
    given = model.config
    report = prune_filters(model, X, 0.4, uniform=True, **more)
    assert not report.config and report.params_after < report.params_before
    assert torch.equal(rebuilt(model)(X), model(X))
    assert model.inner_width == model.config.intermediate_size == model.blocks[2].up.out_features
    assert given.intermediate_size == 20 and given.hidden_size == 12  # other models may be built from it
    other = tiny()
    load_state_dict_(other, model.state_dict())
    assert vars(other.config) == vars(model.config)


def test_blocks_of_several_widths_leave_the_config():
    """What a config cannot express is said with the layers and what to do, and the config stays."""
    model = tiny()
    with pytest.warns(UserWarning, match=r"intermediate_size would be 10 in blocks.1.up.weight, 20 in blocks.0.up"):
        report = prune_filters(model, X, {"blocks.1.up": 0.5})
    assert "Pass uniform=True" in report.config
    assert (model.config.intermediate_size, model.blocks[1].up.out_features) == (20, 10)


def test_a_later_cut_that_is_even_again_is_followed():
    """Blocks that end with one width after several cuts are what the config says."""
    model = tiny()
    for path in ("blocks.1.up", "blocks.0.up"):
        with pytest.warns(UserWarning, match="cannot express"):
            prune_filters(model, X, {path: 0.5})
    report = prune_filters(model, X, {"blocks.2.up": 0.5})
    assert not report.config and model.config.intermediate_size == 10
    assert torch.equal(rebuilt(model)(X), model(X))


class DecoderConfig:
    """Numbers of a decoder, whose width of a head is one of them."""

    model_type = "decoder"

    def __init__(
        self, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rotary=True, tied=True
    ):
        self.hidden_size, self.head_dim, self.rotary, self.tied = hidden_size, head_dim, rotary, tied
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        if tied and hidden_size % num_attention_heads:
            raise ValueError("The hidden size is not a multiple of the number of heads.")

    def to_dict(self):
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        self.size, self.repeats = size, config.num_attention_heads // config.num_key_value_heads
        self.q = nn.Linear(width, config.num_attention_heads * size)
        self.k, self.v = (nn.Linear(width, config.num_key_value_heads * size) for _ in range(2))
        self.o = nn.Linear(config.num_attention_heads * size, width)

    def forward(self, x, angles):
        q, k, v = (of(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for of in (self.q, self.k, self.v))
        if angles is not None:  # each half of a head is turned against the other
            cos, sin = angles.cos(), angles.sin()
            q, k = (u * cos + torch.cat([-u.chunk(2, -1)[1], u.chunk(2, -1)[0]], -1) * sin for u in (q, k))
        k, v = (u.repeat_interleave(self.repeats, 1) for u in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


class Decoder(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.stem, self.head = nn.Linear(8, config.hidden_size), nn.Linear(config.hidden_size, 3)
        self.blocks = nn.ModuleList([Attention(config) for _ in range(2)])
        if config.rotary:
            frequencies = 0.5 ** torch.arange(config.head_dim // 2)
            self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x):
        angles = None
        if self.config.rotary:
            angles = torch.outer(torch.arange(x.shape[1]), self.frequencies).repeat(1, 2)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(x)


@pytest.mark.parametrize(
    ("groups", "rotary", "tied"), [(1, 1, 0), (1, 0, 1), (2, 1, 1), (2, 1, 0), (2, 0, 1), (4, 1, 1), (4, 0, 0)]
)
def test_heads_leave_whose_width_stays(groups, rotary, tied):
    """Heads and their keys leave where rotary embeddings keep the width inside a head, and the config says it.

    Of heads that share one key only their width can shrink, and frequencies that no file holds keep that.
    """
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(num_key_value_heads=groups, rotary=rotary, tied=tied))
    x = torch.randn(2, 5, 8)
    report = prune_filters(model, x, 0.5, uniform=True)
    assert not report.config and torch.equal(rebuilt(model)(x), model(x))
    halved = groups > 1 or not rotary
    assert {block.q.out_features for block in model.blocks} == {12 if halved else 24}
    assert model.config.head_dim == (3 if groups == 1 and halved else 6)
    assert model.stem.out_features == model.config.hidden_size == (12 if halved or not tied else 24)


class Plain(nn.Module):
    """Blocks without any config."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.Sequential(*[Block(Config()) for _ in range(3)])

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def test_blocks_get_one_width():
    """Under a global scope blocks differ, and with ``uniform`` they do not; each keeps its own best units."""
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(0.01)
    free, equal = copy.deepcopy(model), copy.deepcopy(model)
    prune_filters(free, X, 0.3, scope="global")
    prune_filters(equal, X, 0.3, scope="global", uniform=True)
    assert len({block.up.out_features for block in free.blocks}) > 1
    width = equal.blocks[0].up.out_features
    assert {block.up.out_features for block in equal.blocks} == {width} and width < 20
    for block, dense in zip(equal.blocks, model.blocks, strict=True):
        norms = block.up.weight.abs().sum(1)
        assert len(norms) == width and dense.up.out_features == 20
    stem = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    assert len(prune_filters(stem, X, 0.5, uniform=True).groups) == 2  # layers in a row are no blocks


def test_one_block_that_stays_holds_the_others():
    """With ``uniform``, an ignored block keeps the others of its kind whole, and the report says why."""
    model = Plain()
    report = prune_filters(model, X, 0.5, uniform=True, ignore=["blocks.1.up"])
    assert {block.up.out_features for block in model.blocks} == {20} and model.stem.out_features == 6
    reasons = {pin.tensor: pin.reason for pin in report.pinned}
    assert "uniform=True, and blocks.1.up" in reasons["blocks.0.up.weight"]


@pytest.mark.filterwarnings("ignore")
def test_uniform_in_a_run():
    """Callbacks take the argument; networks without blocks are pruned as without it."""
    one, two = net(), net()
    fit(one, FilterL1Pruning(0.5, uniform=True), max_epochs=1)
    fit(two, FilterL1Pruning(0.5), max_epochs=1)
    assert one.first.out_channels == two.first.out_channels == 4


class Classifier(nn.Module):
    """As timm's models: numbers that only a new classifier is made of."""

    __module__ = "timm.models.tiny"

    def __init__(self):
        super().__init__()
        self.num_features = self.head_hidden_size = 12
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)))


def test_numbers_of_a_classifier_follow():
    """The size of features follows the classifier, in the pruned model and in one that its weights load into."""
    model, other = Classifier(), Classifier()
    prune_filters(model, X, 0.5)
    load_state_dict_(other, model.state_dict())
    assert (model.num_features, model.head_hidden_size, other.num_features, other.head.in_features) == (6, 6, 6, 6)
