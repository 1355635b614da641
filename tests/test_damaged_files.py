"""Files and metadata that are damaged, or made to do harm: refused in our words, with the model untouched."""

import copy
import io
import json
import lzma
import random
import time
import zlib
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_prune import (
    FilterL1Pruning,
    PruningError,
    load_from_checkpoint,
    load_sparse,
    load_sparse_,
    load_state_dict_,
    prune_filters,
    prune_weights,
    save_sparse,
)
from lightning_prune.cli import main
from lightning_prune.model.byte_streams import _LZMA
from lightning_prune.pruning.sharing import share_weights
from lightning_prune.surgery import recipe_of
from lightning_prune.surgery.loading import recipe_json
from lightning_prune.surgery.masks import masks_on
from tests.runs import Net as LitNet
from tests.runs import fit
from tests.runs import net as lit_net

HOW_MANY = [400, pytest.param(2000, marks=pytest.mark.slow)]


class Net(nn.Module):
    """Holds numbers that follow widths, and others that attackers would like to set."""

    def __init__(self):
        super().__init__()
        self.width, self.shape = 8, (8, 4, 4)
        self.cmd = ["echo", "hello"]
        self.rate = 0.5
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.apart = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        hidden = self.apart(F.relu(self.first(images)))
        return self.head(hidden.view(-1, self.width, 16).mean(dim=2))


IMAGE = torch.randn(1, 2, 4, 4)


def pruned():
    torch.manual_seed(0)
    model = Net()
    prune_weights(model, 0.4)
    prune_filters(model, IMAGE, 0.5)
    return model


def picture(model):
    """Return all that loading could change, in a form that can be compared."""
    tensors = {name: (tensor.shape, tensor.tolist()) for name, tensor in model.state_dict().items()}
    own = [{n: v for n, v in vars(m).items() if isinstance(v, int | float | tuple | list)} for m in model.modules()]
    return tensors, own, {name: mask.tolist() for name, mask in masks_on(model).items()}


def assert_loads_or_is_refused(load, model=None):
    """Either a model loads, and runs as one that could have been saved; or it is told why not, and nothing changed."""
    model = model or Net()
    before = copy.deepcopy(picture(model))
    try:
        load(model)
    except PruningError:
        assert picture(model) == before
        return False
    return True


HOSTILE = {
    "forward": ("", "forward", 1),
    "mode": ("", "training", 0),
    "hooks": ("", "_forward_hooks", []),
    "parameters": ("first", "_parameters", 3),
    "a command": ("", "cmd", ["rm", "-rf"]),
    "a command of numbers": ("", "cmd", [1, 2]),
    "a float": ("", "rate", 3),
    "nothing": ("first", "groups", None),
    "a word": ("first", "groups", "many"),
    "true": ("first", "groups", True),
    "negative": ("apart", "groups", -4),
    "none": ("apart", "groups", 0),
    "beyond all": ("", "width", 10**12),
    "another length": ("", "shape", [4, 4]),
    "nested": ("", "shape", [[4], 4, 4]),
    "a stride": ("first", "stride", [2, 2]),
    "a kernel": ("first", "kernel_size", [5, 5]),
    "a class": ("", "__class__", 1),
    "a dunder": ("", "__dict__", {}),
    "a method of a part": ("first", "forward", 1),
}


@pytest.mark.parametrize("path, name, value", HOSTILE.values(), ids=HOSTILE)
def test_a_recipe_changes_only_what_pruning_changes(path, name, value):
    """Metadata that would set anything but a size is refused before a shape has changed."""
    state = pruned().state_dict()
    state._metadata[path]["lightning_prune"]["attributes"][name] = value
    model = Net()
    before = picture(model)
    with pytest.raises(PruningError, match="pruning metadata"):
        load_state_dict_(model, state)
    assert picture(model) == before
    assert isinstance(model.forward(IMAGE), torch.Tensor)


RECIPES = {
    "another version": lambda recipe: recipe.update(version=2),
    "no version": lambda recipe: recipe.pop("version"),
    "no masks": lambda recipe: recipe.pop("masks"),
    "masks in a list": lambda recipe: recipe.update(masks=[1]),
    "attributes in a list": lambda recipe: recipe.update(attributes=[["groups", 4]]),
    "bits for a larger shape": lambda recipe: recipe["masks"].update(
        weight=[torch.zeros(2, dtype=torch.uint8), [9**9]]
    ),
    "a mask of another shape": lambda recipe: recipe["masks"].update(
        weight=[torch.zeros(1, dtype=torch.uint8), [2, 4]]
    ),
    "bits of another type": lambda recipe: recipe["masks"].update(weight=[torch.zeros(1), [2, 4]]),
    "a negative shape": lambda recipe: recipe["masks"].update(weight=[torch.zeros(1, dtype=torch.uint8), [-2, -4]]),
}


@pytest.mark.parametrize("damage", RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_is_none_is_refused(damage):
    """Metadata that this version does not write is refused before anything is made of it."""
    state = pruned().state_dict()
    damage(state._metadata["first"]["lightning_prune"])
    with pytest.raises(PruningError, match="pruning metadata"):
        load_state_dict_(Net(), state)


def test_a_small_file_asks_for_no_large_memory(tmp_path):
    """Tensors that claim more entries than their file holds are refused before memory is taken."""
    state = pruned().state_dict()
    state["head.bias"] = torch.zeros(1).expand(10**10)
    model = Net()
    before = picture(model)
    with pytest.raises(PruningError, match="which holds fewer entries"):
        load_state_dict_(model, state)
    assert picture(model) == before
    header = {"version": 2, "tensors": {"w": {"form": "csr", "shape": [2, 10**10], "masked": False}}, "attributes": {}}
    parts = {"values": torch.ones(1), "columns": torch.zeros(1, dtype=torch.uint8), "begins": torch.tensor([0, 1, 1])}
    save_file({f"w//{n}": t for n, t in parts.items()}, tmp_path / "bomb", {"lightning_prune": json.dumps(header)})
    start = time.perf_counter()
    with pytest.raises(PruningError, match="bytes that stand for"):
        load_sparse(tmp_path / "bomb")
    assert time.perf_counter() - start < 5
    raw = bytes(5 * 10**7)
    packer = zlib.compressobj(wbits=-15)
    streams = [packer.compress(raw) + packer.flush(), lzma.compress(raw, lzma.FORMAT_RAW, filters=_LZMA)]
    start = time.perf_counter()
    for coder, stream in enumerate(streams, start=1):
        header["tensors"]["w"] = {"form": "shared", "shape": [2, 10], "masked": False}
        parts = {"values": torch.ones(1), "codes": torch.frombuffer(bytearray([coder, *stream]), dtype=torch.uint8)}
        save_file({f"w//{n}": t for n, t in parts.items()}, tmp_path / "bomb", {"lightning_prune": json.dumps(header)})
        with pytest.raises(PruningError, match="a stream that is too long"):
            load_sparse(tmp_path / "bomb")
    assert time.perf_counter() - start < 5


def test_loading_takes_little_memory(tmp_path):
    """What is allocated while a model is loaded is no more than the file and the model, each twice."""
    model = nn.Linear(1000, 1000)
    prune_weights(model, 0.5)
    save_sparse(model, tmp_path / "model.safetensors")
    size = 4 * 1000 * 1001
    peaks = []

    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            peaks.append(made.untyped_storage().nbytes() if isinstance(made, torch.Tensor) else 0)
            return made

    with Peak():
        load_sparse_(nn.Linear(1000, 1000), tmp_path / "model.safetensors")
    assert max(peaks) <= size


# Fuzzing


def damaged(content, draw):
    """Return bytes with something of them changed: flipped, cut off, doubled, or zeroed."""
    content = bytearray(content)
    at = draw.randrange(len(content))
    length = draw.choice([1, 1, 2, 8, 64])
    kind = draw.randrange(5)
    if kind == 0:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at : at + length] = bytes(draw.randrange(256) for _ in content[at : at + length])
    elif kind == 3:
        del content[at : at + length]
    else:
        content[at:at] = content[at : at + length]
    return bytes(content)


VALUES = [None, True, -1, 0, 7, 2**70, 1.5, "word", [], {}, [1, 2], torch.ones(2), {"a": 1}, float("nan"), b"bytes"]


def mutated(value, draw):
    """Return nested dicts and lists with one thing in them replaced, removed, renamed or added."""
    places = []

    def visit(held):
        for key in list(held.keys() if isinstance(held, dict) else range(len(held))):
            places.append((held, key))
            if isinstance(held[key], dict | list):
                visit(held[key])

    visit(value)
    held, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0 or (kind == 2 and isinstance(held, list)):
        held[key] = draw.choice(VALUES)
    elif kind == 1:
        del held[key]
    elif kind == 2:
        held[draw.choice([f"{key}x", "", 3, "weight"])] = held.pop(key)
    elif isinstance(held, dict):
        held[draw.choice(["more", "groups", "forward", 5])] = draw.choice(VALUES)
    else:
        held.append(draw.choice(VALUES))
    return value


@pytest.mark.parametrize("times", HOW_MANY)
def test_mutated_metadata_loads_or_is_refused(times):
    """State dicts whose metadata or entries were changed at random load, or are refused with the model untouched."""
    state, model, refused = pruned().state_dict(), Net(), 0
    for seed in range(times):
        draw = random.Random(seed)
        broken = OrderedDict(copy.deepcopy(dict(state)))
        metadata = copy.deepcopy(dict(state._metadata))
        if seed % 4:
            metadata = mutated(metadata, draw)
        else:
            broken = OrderedDict(mutated(dict(broken), draw))
        broken._metadata = metadata
        if assert_loads_or_is_refused(lambda model, broken=broken: load_state_dict_(model, broken), model):
            model = Net()
        else:
            refused += 1
    assert times / 10 < refused < times


@pytest.mark.parametrize("name", pruned().state_dict())
def test_what_is_no_tensor_is_refused_by_the_ordinary_way_of_loading_too(name):
    """Whichever entry it is, and whatever stands there: nothing is loaded, and no other module takes its new shape."""
    state, model = pruned().state_dict(), Net()
    recipe_of(model)  # as in a run
    before = copy.deepcopy(picture(model))
    for value in VALUES:
        if not isinstance(value, torch.Tensor):
            state[name] = value
            with pytest.raises(PruningError, match="not a tensor"):
                model.load_state_dict(state)
            assert picture(model) == before


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("times", HOW_MANY)
def test_mutated_sparse_files_load_or_are_refused(times, shared, tmp_path):
    """Sparse files of which bytes, or parts of the header, were changed load, or are refused."""
    path, source = tmp_path / "model.safetensors", pruned()
    if shared:
        share_weights(source, 1)
    forms = {one.form for one in save_sparse(source, path).tensors}
    assert ("shared" in forms) == shared
    content, model, refused = path.read_bytes(), Net(), 0
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lightning_prune"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for seed in range(times):
        draw = random.Random(seed)
        if seed % 2:
            path.write_bytes(damaged(content, draw))
        else:
            changed, parts = copy.deepcopy(header), dict(arrays)
            if seed % 4:
                changed = mutated(changed, draw)
            else:
                name = draw.choice(list(parts))
                others = [torch.ones(3), torch.zeros(0), parts[name][:-1].clone(), parts[name].long() * 0 - 1]
                parts[name] = draw.choice(others)
            save_file(parts, path, {"lightning_prune": json.dumps(changed, default=str)})
        if assert_loads_or_is_refused(lambda model: load_sparse_(model, path), model):
            model = Net()
        else:
            refused += 1
    assert times / 4 < refused < times


@pytest.mark.parametrize("times", HOW_MANY)
def test_mutated_recipes_load_or_are_refused(times):
    """A recipe as JSON that was changed at random works, or is refused with the model untouched."""
    source, model, refused = pruned(), Net(), 0
    text, tensors = recipe_json(source), dict(source.state_dict())
    for seed in range(times):
        draw = random.Random(seed)
        if seed % 2:
            broken = damaged(text.encode(), draw).decode(errors="replace")
        else:
            broken = json.dumps(mutated(json.loads(text), draw), default=str)
        if assert_loads_or_is_refused(lambda model, r=broken: load_state_dict_(model, tensors, recipe=r), model):
            model = Net()
        else:
            refused += 1
    assert times / 4 < refused < times


@pytest.mark.parametrize("times", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints_load_or_are_refused(times, tmp_path):
    """Checkpoints of which bytes, or what they hold, were changed load, or are refused."""
    path = tmp_path / "slim.ckpt"
    fit(lit_net(), FilterL1Pruning(0.5)).save_checkpoint(path, weights_only=True)
    content, refused = path.read_bytes(), 0
    saved = torch.load(io.BytesIO(content), weights_only=True)
    for seed in range(times):
        draw = random.Random(seed)
        if seed % 2:
            path.write_bytes(damaged(content, draw))
        else:
            broken = copy.deepcopy(saved)
            metadata = mutated(dict(broken["state_dict"]._metadata), draw)
            broken["state_dict"]._metadata = metadata
            torch.save(broken, path)
        try:
            load_from_checkpoint(LitNet, path)
        except PruningError:
            refused += 1
    assert times / 10 < refused < times


def test_commands_tell_in_one_line(tmp_path, capsys):
    """A damaged file ends the command with one line, and no file is left."""
    path, out = tmp_path / "slim.pt", tmp_path / "slim.safetensors"
    state = pruned().state_dict()
    state._metadata["first"]["lightning_prune"]["version"] = 9
    for content in (state, [1], b"no file of torch"):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(SystemExit) as ended:
            main(["export", "--ckpt_path", str(path), "--out", str(out)])
        told = f"{ended.value.code}{capsys.readouterr().err}".strip()
        assert any(word in told for word in ("pruning metadata", "or state dict", "cannot be read"))
        assert "\n" not in told
        assert not out.exists()
