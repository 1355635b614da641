"""Ctrl-C or a lack of memory at any line leaves a model whole, or pruned, and never something between."""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune
from lightning_prune import (
    PruningError,
    load_sparse_,
    load_state_dict_,
    prune_filters,
    prune_weights,
    save_sparse,
)
from lightning_prune.surgery import cut_, draft, find_groups, recipe_of, restore_, take_snapshot
from lightning_prune.surgery.masks import masks_on

PACKAGE = os.path.dirname(lightning_prune.__file__)
IMAGE = torch.randn(1, 2, 4, 4)
NUMBERS = ("width", "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features")


class Net(nn.Module):
    """Has what a cut changes: weights, a buffer, groups, a number of the module's own, and masks."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.apart = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        hidden = self.apart(F.relu(self.norm(self.first(images))))
        return self.head(hidden.view(-1, self.width, 16).mean(dim=2))


def made():
    """Return a masked model and an optimizer that has taken a step, with gradients left."""
    torch.manual_seed(0)
    model = Net()
    prune_weights(model, 0.3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(torch.randn(4, 2, 4, 4)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for name, mask in masks_on_first(model).items():
            model.get_parameter(name).mul_(mask)
    return model, optimizer


def masks_on_first(model):
    """Return the masks of the model as it was pruned, though a step has moved weights since."""
    torch.manual_seed(0)
    twin = Net()
    prune_weights(twin, 0.3)
    return masks_on(twin)


def content(tensor):
    return None if tensor is None else (tuple(tensor.shape), tensor.detach().numpy().tobytes())


def picture(model, optimizer=None):
    """Return all that a cut may change, as text and bytes that can be compared."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = [] if optimizer is None else [optimizer.state[parameter] for parameter in model.parameters()]
    return {
        "tensors": {name: content(tensor) for name, tensor in tensors.items()},
        "gradients": {name: content(parameter.grad) for name, parameter in model.named_parameters()},
        "numbers": [[getattr(m, name, None) for name in NUMBERS] for m in model.modules()],
        "masks": {name: content(mask) for name, mask in masks_on(model).items()},
        "gradients are on": torch.is_grad_enabled(),
        "state": [{name: content(value) for name, value in state.items()} for state in held],
    }


class Interruption:
    """Raises an error at the n-th line of the package that runs within the body."""

    def __init__(self, at, error):
        self.left, self.error, self.raised = at, error, False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, _):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.raised = True
                raise self.error("injected")
        return self._line


def broken_points(made, action, see, after, error, every=1):
    """Interrupt an action at every line, and return how many lines there are and at which the model is left half done.

    Args:
        made: What the action is done to, a new copy of it each time.
        action: Does it.
        see: Returns what can be compared of it.
        after: Uses it once more, which fails if it is half done.
        error: What is raised.
        every: Looks at each line so far from the one before.
    """
    whole = copy.deepcopy(made)
    before = see(whole)
    action(whole)
    done = see(whole)
    assert before != done
    broken, at = [], 1
    while True:
        subject, interruption = copy.deepcopy(made), Interruption(at, error)
        try:
            with interruption:
                action(subject)
        except (error, PruningError):
            assert interruption.raised
        if not interruption.raised:
            return at - 1, broken
        found = see(subject)
        torch.set_grad_enabled(True)
        if found not in (before, done):
            broken.append(at)
        else:
            after(subject)
        at += every


def keep_of(structure):
    return {name: torch.arange(group.width).numpy() % 2 == 0 for name, group in structure.groups.items()}


def train_on(subject):
    model, optimizer = subject
    model(torch.randn(4, 2, 4, 4)).sum().backward()
    optimizer.step()
    model.state_dict()


@pytest.mark.parametrize(
    "error, every",
    [
        (KeyboardInterrupt, 5),
        (MemoryError, 17),
        pytest.param(KeyboardInterrupt, 1, marks=pytest.mark.slow),
        pytest.param(MemoryError, 1, marks=pytest.mark.slow),
    ],
)
def test_a_cut_is_made_whole_or_not_at_all(error, every):
    """Interrupted at any of its lines, a cut is made or not: weights, gradients, state, numbers and masks agree."""
    model, optimizer = made()
    structure = find_groups(model, IMAGE)
    cut = draft(model, structure, keep_of(structure))
    assert cut.attributes

    def cut_it(subject):
        cut_(subject[0], cut, cut.tensors(subject[0]), [subject[1]])

    lines, broken = broken_points((model, optimizer), cut_it, lambda subject: picture(*subject), train_on, error, every)
    assert lines > 1000
    assert broken == []


@pytest.mark.parametrize("every", [101, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_loading_is_done_whole_or_not_at_all(error, every, tmp_path):
    """Interrupted anywhere, the loading of a slim state dict, from memory or a file, leaves the model whole or slim."""
    slim, _ = made()
    prune_filters(slim, IMAGE, 0.5)
    state = slim.state_dict()
    save_sparse(slim, tmp_path / "slim.safetensors")
    full, _ = made()
    for load in (
        lambda model: load_state_dict_(model, state),
        lambda model: load_sparse_(model, tmp_path / "slim.safetensors"),
    ):
        lines, broken = broken_points(full, load, picture, lambda model: model(IMAGE), error, every)
        assert lines > 1000
        assert broken == []


def test_shapes_of_a_snapshot_come_back_whole_or_not_at_all():
    """A model that is taken back to earlier shapes has them all, or those it had."""
    model, _ = made()
    attributes = find_groups(model, IMAGE).ledger.attributes
    recipe_of(model).note((attribute.module, attribute.name) for attribute in attributes)
    snapshot = take_snapshot(model, [])
    prune_filters(model, IMAGE, 0.5)
    lines, broken = broken_points(
        model,
        lambda model: restore_(model, [], snapshot),
        lambda model: ([tuple(parameter.shape) for parameter in model.parameters()], picture(model)["numbers"]),
        lambda model: model(IMAGE),
        KeyboardInterrupt,
        every=17,
    )
    assert lines > 100
    assert broken == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_refutes_nothing(error, monkeypatch):
    """What runs out of memory while a cut is verified is raised as itself, and the model is whole."""
    model, _ = made()
    before = picture(model)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["lightning_prune.surgery.verify"], "_run_all", fails)
    with pytest.raises(type(error)):
        prune_filters(model, IMAGE, 0.5)
    assert picture(model) == before
    monkeypatch.undo()
    assert prune_filters(model, IMAGE, 0.5).groups[0].after < 8
    assert recipe_of(model).needed


@pytest.mark.parametrize(
    "error, told", [(OSError(28, "No space left on device"), PruningError), (KeyboardInterrupt(), None)]
)
def test_a_sparse_file_is_written_whole_or_not_at_all(error, told, tmp_path, monkeypatch):
    """On a full disk our error tells; it and an interruption leave the file that was there, and none beside it."""
    model, _ = made()
    path = tmp_path / "model.safetensors"
    save_sparse(model, path)
    before = path.read_bytes()

    def fails(arrays, file, metadata):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr("lightning_prune.surgery.sparse_files.save_file", fails)
    with pytest.raises(told or type(error), match="disk is full" if told else None):
        save_sparse(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(PruningError, match="could not be written"):
        save_sparse(model, path / "below" / "model.safetensors")
