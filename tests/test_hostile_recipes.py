"""Recipes and state dicts that were made to do harm: refused in our words by every loader, with the model untouched."""

import copy
import time

import pytest
import torch
from torch import nn

from lightning_prune import Prunable, PruningError, load_state_dict_, slim_loading
from tests.test_damaged_files import IMAGE, Net, picture, pruned


class Guarded(Net):
    """Has properties that a recipe must not run or set, a tied weight, and numbers in a config."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Linear(8, 3)
        self.tied.weight = self.head.weight
        self.config = {"heads": 4, "command": [1, 2]}

    @property
    def computed(self):
        return 4


class GuardedPrunable(Prunable, Guarded):
    pass


class PrunableNet(Prunable, Net):
    pass


# Where a number would be set -> to what
NUMBERS = {
    ("", "computed"): [4, -1],
    ("", "computed.real"): [4],
    ("", "__class__.calls"): [3],
    ("", "__dict__.width"): [3],
    ("", "cmd"): [[1, 2]],
    ("", "cmd.0"): [4],
    ("", "config.command"): [[3], [3, 2**70]],
    ("", "config.heads"): [-2, 0, 2**70, True],
    ("", "width"): [-1, 0, 2**40, 2**70, True, 4.0, float("nan"), "4", None, [4], {}],
    ("", "shape"): [[4, 4, -4], [4, 4], [4, 4, 4, 4], [4, True, 4], [[4], 4, 4], 4],
    ("", "training"): [1, 0],
    ("", "dump_patches"): [1],
    ("", "call_super_init"): [1],
    ("", ""): [3],
    ("", "ünï"): [3],
    ("", 5): [3],
    ("first", "weight.grad"): [1],
    ("first", "_version"): [9],
    ("first", "padding"): [[2, 2]],
    ("first", "kernel_size"): [[1, 1]],
    ("first", "dilation"): [[2, 2]],
    ("apart", "groups"): [-4, 0, 2**40],
}


def with_number(path, name, value):
    state = pruned().state_dict()
    state._metadata[path]["lightning_prune"]["attributes"][name] = value
    return state


def bits(weight, **how):
    return [torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8, **how), list(weight.shape)]


def set_mask(state, mask):
    state._metadata["first"]["lightning_prune"]["masks"]["weight"] = mask


def recipe(state):
    return state._metadata["first"]["lightning_prune"]


# What is done to the state dict of a pruned network
HARM = {
    "another size than its tie": lambda s: s.update({"tied.weight": torch.ones(3, 2)}),
    "complex numbers": lambda s: s.update({"head.bias": s["head.bias"] + 1j}),
    "no width": lambda s: s.update({"first.weight": s["first.weight"][:0]}),
    "a tensor without values": lambda s: s.update({"head.weight": s["head.weight"].to("meta")}),
    "a huge tensor without values": lambda s: s.update({"head.bias": torch.empty(10**10, device="meta")}),
    "a huge sparse tensor": lambda s: s.update(
        {"head.weight": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (3, 10**9))}
    ),
    "a huge expanded tensor": lambda s: s.update({"head.weight": torch.zeros(1, 1).expand(3, 10**9)}),
    "a nested tensor": lambda s: s.update({"head.weight": torch.nested.nested_tensor([torch.ones(2)])}),
    "a list": lambda s: s.update({"head.weight": [1, 2]}),
    "a number": lambda s: s.update({"head.weight": 3}),
    "nothing": lambda s: s.update({"head.weight": None}),
    "a key that is no name": lambda s: s.update({3: torch.ones(2)}),
    "a name too many": lambda s: s.update({"more": torch.ones(2)}),
    "a name too few": lambda s: s.pop("head.weight"),
    "a later version": lambda s: recipe(s).update(version=10**30),
    "a version that is no number": lambda s: recipe(s).update(version="1"),
    "metadata that is a list": lambda s: setattr(s, "_metadata", [1]),
    "a recipe that is a list": lambda s: s._metadata["first"].update(lightning_prune=[1]),
    "a recipe of no name": lambda s: s._metadata.update({b"x": s._metadata["first"]}),
    "a hundred thousand numbers": lambda s: recipe(s)["attributes"].update({f"a{i}": 1 for i in range(100_000)}),
    "a million sizes": lambda s: recipe(s)["attributes"].update(padding=[1] * 10**6),
    "a deep name": lambda s: recipe(s)["attributes"].update({".".join(["a"] * 100_000): 1}),
    "a mask of what is no weight": lambda s: recipe(s)["masks"].update(forward=bits(torch.ones(2, 4))),
    "a mask of a huge shape": lambda s: set_mask(s, [torch.zeros(1, dtype=torch.uint8), [2**62, 2**62]]),
    "a mask of no dimensions": lambda s: set_mask(s, [torch.zeros(1, dtype=torch.uint8), []]),
    "a mask without values": lambda s: set_mask(s, bits(s["first.weight"], device="meta")),
    "a mask that is expanded": lambda s: set_mask(s, [torch.zeros(1, dtype=torch.uint8).expand(10**10), [8 * 10**10]]),
    "a sparse mask": lambda s: set_mask(s, [bits(s["first.weight"])[0].to_sparse(), list(s["first.weight"].shape)]),
    "a mask whose shape is a tensor": lambda s: set_mask(s, [bits(s["first.weight"])[0], torch.tensor([4, 2, 3, 3])]),
    "a mask whose shape is true": lambda s: set_mask(s, [torch.zeros(1, dtype=torch.uint8), [True, True]]),
    "bits that are too few": lambda s: set_mask(s, [bits(s["first.weight"])[0][:-1], list(s["first.weight"].shape)]),
}


def by_function(model, state):
    load_state_dict_(model, state)


def in_a_block(model, state):
    with slim_loading():
        model.load_state_dict(state)


def by_method(model, state):
    model.load_state_dict(state)


LOADERS = [(by_function, Net), (in_a_block, Net), (by_method, PrunableNet)]


def assert_harmless(load, model, state):
    """Either the state loads into a model that runs, or it is refused, and the model is as it was; both at once."""
    before, names, start = copy.deepcopy(picture(model)), set(vars(model)), time.process_time()
    try:
        load(model, state)
    except PruningError:
        assert picture(model) == before
    except RuntimeError as error:  # torch's own words, of a class that loads as torch does
        if not (isinstance(model, Prunable) and "Error(s) in loading state_dict" in str(error)):
            raise
        shapes = [tuple(parameter.shape) for parameter in model.parameters()]
        assert shapes == [tuple(parameter.shape) for parameter in type(model)().parameters()]
    else:
        model(IMAGE)
    assert set(vars(model)) == names
    assert time.process_time() - start < 10


@pytest.mark.parametrize("path, name", NUMBERS)
def test_numbers_that_no_pruning_sets(path, name):
    """No loader sets a number that no cut sets, runs a property or walks into a module by another way."""
    for value in NUMBERS[path, name]:
        for load, kind in LOADERS:
            assert_harmless(load, kind(), with_number(path, name, value))
        for load, kind in ((by_function, Guarded), (by_method, GuardedPrunable)):
            state, model = kind().state_dict(), kind()
            state._metadata = with_number(path, name, value)._metadata
            assert_harmless(load, model, state)
            assert (model.config, model.training) == ({"heads": 4, "command": [1, 2]}, True) or name == "config.heads"


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
@pytest.mark.parametrize("load, kind", LOADERS, ids=lambda part: part.__name__)
def test_state_dicts_made_to_do_harm(load, kind, harm):
    """Whatever a state dict or its recipe holds, no loader takes memory or time for it, or leaves a model half done."""
    state = pruned().state_dict()
    harm(state)
    assert_harmless(load, kind(), state)
