"""Layers that stay move up in the lists of models that a config builds, and the config says how many there are."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn

from lightning_prune import LayerPruning, PruningError, load_state_dict_, prune_filters, prune_layers
from lightning_prune.structure.skippable import find_skippable
from lightning_prune.surgery.layer_lists import ClosedList, moved_back, moved_up
from lightning_prune.surgery.loading import recipe_json
from lightning_prune.surgery.pass_through import skip_of
from lightning_prune.surgery.remove_layers import close_gaps_, open_gaps_, remove_layers_
from tests.runs import trainer
from tests.test_interruption import broken_points

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Config:
    """As in transformers: what a model is built from, as attributes and as a dict."""

    model_type = "tiny"

    def __init__(self, hidden_size=6, intermediate_size=10, num_layers=4, kinds=None, num_labels=3, scale=None):
        self.hidden_size, self.intermediate_size, self.num_layers = hidden_size, intermediate_size, num_layers
        self.kinds = kinds or ["tanh", "relu"] * (num_layers // 2)
        self.num_labels, self.scale = num_labels, scale

    def to_dict(self):
        return vars(self).copy()

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Block(nn.Module):
    """A block of one of two kinds, which holds its position; one kind may weigh it by its position, too."""

    def __init__(self, config, position):
        super().__init__()
        self.position, self.kind = position, config.kinds[position]
        self.weight = 1.0 if config.scale is None else config.scale ** (1 + position)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return (x + self.weight * self.down(getattr(torch, self.kind)(self.up(x))),)


class PreTrainedModel(nn.Module):
    __module__ = "transformers.modeling_utils"

    def __init__(self, config):
        super().__init__()
        self.config = config


class Tiny(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_layers)])
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x):
        for block in self.blocks[: self.config.num_layers]:
            x = block(x)[0]
        return self.head(x)


def tiny(**config):
    torch.manual_seed(0)
    return Tiny(Config(**config)).eval()


def without(model, gone):
    """Remove blocks by their positions."""
    depth = find_skippable(model, X)
    remove_layers_(model, {f"blocks.{i}": skip_of(depth.layers[f"blocks.{i}"]) for i in gone})


def rebuilt(model):
    """Return the model that ``from_pretrained`` would give."""
    again = type(model)(Config.from_dict(model.config.to_dict()))
    again.load_state_dict(dict(model.state_dict()))
    return again.eval()


GONE = st.sets(st.integers(0, 3), min_size=1, max_size=3)


@settings(max_examples=10, deadline=None)
@given(GONE, st.sampled_from(["torch", "json", "copy", "pickle"]), GONE)
def test_the_config_builds_the_model_that_is_left(gone, carrier, others):
    """Whatever blocks leave: config and names follow, state dicts load both ways, and the whole model comes back."""
    model = tiny()
    dense, given_config = copy.deepcopy(model), model.config
    without(model, gone)
    expected = model(X)
    assert close_gaps_(model, X) == ""
    stay = [i for i in range(4) if i not in gone]
    assert model.config.num_layers == len(model.blocks) == len(stay) and given_config.num_layers == 4
    assert model.config.kinds == [dense.config.kinds[i] for i in stay]
    assert [block.position for block in model.blocks] == list(range(len(stay)))
    assert torch.equal(model(X), expected) and torch.equal(rebuilt(model)(X), expected)
    if carrier == "copy":
        model = copy.deepcopy(model)
    elif carrier == "pickle":
        model = pickle.loads(pickle.dumps(model))
    state, recipe = model.state_dict(), None
    if carrier == "torch":
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif carrier == "json":
        recipe, state = recipe_json(model), dict(state)
    third = tiny()
    without(third, others)
    close_gaps_(third, X)
    for start in (copy.deepcopy(dense), copy.deepcopy(model), third):
        load_state_dict_(start, state, recipe=recipe)
        assert torch.equal(start(X), expected)
        assert vars(start.config) == vars(model.config) and list(start.state_dict()) == list(model.state_dict())
    for start in (model, third):
        load_state_dict_(start, dense.state_dict())
        assert torch.equal(start(X), dense(X)) and vars(start.config) == vars(dense.config)
        assert [block.position for block in start.blocks] == [0, 1, 2, 3] and type(start.blocks) is nn.ModuleList


@pytest.mark.parametrize("missing", ["blocks.0.up.bias", "blocks.1.down.weight", "blocks.3.up.weight"])
def test_a_state_dict_of_some_removed_layers_changes_nothing(missing):
    """Where a tensor of a layer is missing, removed or not, the list stays closed and the error says so."""
    model = tiny()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
    without(model, {0, 3})
    close_gaps_(model, X)
    expected, config = model(X), copy.deepcopy(vars(model.config))
    with pytest.raises(PruningError, match="The model is as it was"):
        load_state_dict_(model, state)
    assert isinstance(model.blocks, ClosedList) and [block.position for block in model.blocks] == [0, 1]
    assert torch.equal(model(X), expected) and vars(model.config) == config


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 7), max_size=6), st.sets(st.integers(0, 3), max_size=3), st.integers(0, 7))
def test_names_move_up_and_back(outer, inner, position):
    """Moving up counts what stays before it, in lists within lists, too; moving back undoes it."""
    gaps = {"a": sorted(outer), "a.5.b": sorted(inner)}
    for place in range(4):
        name = f"a.{position}.b.{place}.weight"
        up = moved_up(name, gaps)
        nested = inner if position == 5 else ()
        if position in outer or place in nested:
            assert up == ""
            continue
        parts = [sum(i not in outer for i in range(position)), sum(i not in nested for i in range(place))]
        assert up == f"a.{parts[0]}.b.{parts[1]}.weight"
        here = {"a": sorted(outer)}
        if 5 not in outer:
            here[moved_up("a.5.b", {"a": outer})] = sorted(inner)
        assert moved_back(up, here) == name


def test_prune_layers_closes_the_lists():
    """Afterwards the model is what its config builds; widths can be pruned then, and the config follows that, too."""
    model = tiny()
    report = prune_layers(model, X, 0.5, progress=False)
    assert len(report.removed) == 2 and report.config == "" and report.proved
    assert torch.equal(rebuilt(model)(X), model(X))
    prune_filters(model, X, 0.5, uniform=True)
    assert (model.config.num_layers, model.config.intermediate_size) == (2, 5)
    assert torch.equal(rebuilt(model)(X), model(X))
    third = prune_layers(model, X, 0.5, progress=False)
    assert len(third.removed) == 1 and model.config.num_layers == len(model.blocks) == 1
    other = tiny()
    load_state_dict_(other, model.state_dict())
    assert torch.equal(other(X), model(X)) and vars(other.config) == vars(model.config)


def test_what_constructors_make_of_the_position_stays_in_its_place():
    """Where a model built anew would weigh a block by its new position, a warning says how to save it."""
    model = tiny(scale=0.5)
    whole = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"cannot express this removal .* with random values. Save the state dict"):
        report = prune_layers(model, X, 0.25, ignore=["blocks.1", "blocks.2", "blocks.3"], progress=False)
    assert "torch.save" in report.config and model.config.num_layers == 4 == len(model.blocks)
    load_state_dict_(whole, model.state_dict())
    assert torch.equal(whole(X), model(X))


def made():
    model = tiny()
    without(model, {1})
    return model


def picture(model):
    return str(model), vars(model.config), [name for name, _ in model.named_parameters()], model(X).tolist()


def test_an_interruption_leaves_all_or_nothing():
    """Ctrl-C at any line leaves the lists open or closed, with config and numbers to match."""

    def action(model):
        close_gaps_(model, X)

    def after(model):
        assert torch.equal(model(X), made()(X))

    lines, broken = broken_points(made(), action, picture, after, KeyboardInterrupt, every=601)
    assert lines > 50 and not broken


def test_a_damaged_file_is_refused():
    """Positions and pass-throughs in files are checked before anything is made of them."""
    model = made()
    close_gaps_(model, X)
    for bad in ([[-1, None]], [["0", None]], [[0, {"fill": "ones"}]], 3):
        state = model.state_dict()
        state._metadata["blocks"]["lightning_prune"]["gaps"] = bad
        with pytest.raises(PruningError, match="cannot be read"):
            load_state_dict_(tiny(), state)


class Trained(LightningModule):
    """Trains a model of a config, as users of transformers do."""

    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_after_a_run_the_config_says_what_is_left(tmp_path):
    """A run ends with closed lists; its checkpoints load, and the next run with the same callback goes on."""
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    module, callback = Trained(), LayerPruning(0.5, example_inputs=X)
    run = trainer(callback, max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module, loader)
    assert isinstance(module.net.blocks, ClosedList) and module.net.config.num_layers == 2
    assert torch.equal(rebuilt(module.net)(X), module.net.eval()(X))
    other = Trained()
    load_state_dict_(other, torch.load(run.checkpoint_callback.best_model_path, weights_only=False)["state_dict"])
    assert torch.equal(other.net.eval()(X), module.net(X))
    before = [layer.path for layer in callback.removed]
    again = trainer(callback, max_epochs=1, default_root_dir=tmp_path)
    again.fit(module, loader)
    assert [layer.path for layer in callback.removed] == before and module.net.config.num_layers == 2
    open_gaps_(module)
    assert len(module.net.blocks) == 4 and module.net.config.num_layers == 4
