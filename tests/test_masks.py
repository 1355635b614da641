"""Masks hold zeros, whatever writes to the weights, and leave all else alone."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from lightning_prune import apply_masks_, hold_masks, load_state_dict_, prune_obs, prune_weights
from lightning_prune.pruning.exact import prune_exact
from lightning_prune.pruning.fisher import prune_fisher
from lightning_prune.surgery import recipes_in, take_shapes_
from lightning_prune.surgery.masks import Masks, masks_on

OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD-foreach": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD-fused": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": partial(optim.Adam, lr=0.1, amsgrad=True),
    "Adam-foreach": partial(optim.Adam, lr=0.1, foreach=True),
    "AdamW-fused": partial(optim.AdamW, lr=0.1, fused=True),
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": partial(optim.RMSprop, momentum=0.9, centered=True),
    "Adagrad": optim.Adagrad,
    "Adadelta": optim.Adadelta,
    "ASGD": optim.ASGD,
    "Rprop": optim.Rprop,
    "Adafactor": optim.Adafactor,
}
IMAGES = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 3


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(F.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))


def small():
    torch.manual_seed(0)
    return Small()


def some(shape, seed=0, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > share


KEEP = {"conv.weight": some((4, 2, 3, 3)), "head.weight": some((3, 4))}


def step(model, optimizer, before_step=None):
    optimizer.zero_grad()
    F.cross_entropy(model(IMAGES.to(model.head.weight.dtype)), LABELS).backward()
    if before_step is not None:
        before_step()
    optimizer.step()


def assert_zero(model, keep=KEEP):
    own = dict(model.named_parameters())
    for name, stays in keep.items():
        assert not own[name].detach()[~stays].any(), name
        assert own[name].detach()[stays].any(), name


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zero(kind):
    """After every step, of every optimizer, masked weights are exactly zero, and the others move."""
    model = small()
    optimizer = kind(model.parameters())
    step(model, optimizer)
    with hold_masks(model, optimizer, KEEP):
        before = model.conv.weight.detach().clone()
        for _ in range(3):
            assert_zero(model)
            step(model, optimizer)
            assert_zero(model)
    assert (model.conv.weight != before)[KEEP["conv.weight"]].any()


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_survivors_go_the_way_they_would_go_alone(name):
    """The weights that are left take the steps of a model in which zeros are part of the forward pass, in float64."""
    model, twin = small().double(), small().double()
    apply_masks_(twin, KEEP)
    optimizer, other = (OPTIMIZERS[name](net.parameters()) for net in (model, twin))
    with hold_masks(model, optimizer, KEEP):
        for _ in range(5):
            step(model, optimizer)
            other.zero_grad()
            held = {key: twin.get_parameter(key) * stays for key, stays in KEEP.items()}
            loss = F.cross_entropy(torch.func.functional_call(twin, held, IMAGES.double()), LABELS)
            loss.backward()
            other.step()
    own = dict(twin.named_parameters())
    for key, stays in KEEP.items():
        torch.testing.assert_close(model.get_parameter(key), own[key] * stays, rtol=0, atol=1e-14)


def test_the_optimizer_forgets_what_is_masked():
    """Where a mask falls, the optimizer's state is zero; all else of it stays."""
    model = small()
    optimizer = optim.Adam(model.parameters())
    step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    Masks(model).set_masks_(KEEP, [optimizer])
    for index, (name, _) in enumerate(model.named_parameters()):
        for key, value in optimizer.state_dict()["state"][index].items():
            was = before[index][key]
            assert torch.equal(value, was * KEEP[name] if name in KEEP and value.dim() else was)


def test_nothing_else_changes():
    """No parameter, name, attribute, gradient flag or hook of the model changes, but for the zeros and the recipe."""
    model = small()
    model.head.weight.requires_grad_(False)
    parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    optimizer = optim.SGD(model.parameters(), 0.0)
    with hold_masks(model, optimizer, KEEP):
        pass
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert [p.requires_grad for p in model.parameters()] == [name != "head.weight" for name in parameters]
    assert not optimizer._optimizer_step_post_hooks
    assert list(model.state_dict()) == list(values)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name] * KEEP[name] if name in KEEP else values[name])


def test_frozen_weights_are_masked():
    """A weight that is not trained is zeroed all the same, and stays so when it is trained later."""
    model = small()
    model.head.weight.requires_grad_(False)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with hold_masks(model, optimizer, KEEP):
        assert_zero(model)
        step(model, optimizer)
        model.head.weight.requires_grad_(True)
        optimizer.add_param_group({"params": [model.head.weight]})
        step(model, optimizer)
        assert_zero(model)


def test_tied_weights_share_a_mask():
    """A weight with two names is masked under both, by either."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

    model = Tied()
    optimizer = optim.SGD(model.parameters(), 0.1)
    keep = some((4, 4))
    with hold_masks(model, optimizer, {"one.weight": keep}):
        model.other(model.one(torch.randn(5, 4))).sum().backward()
        optimizer.step()
    assert model.other.weight is model.one.weight
    assert not model.other.weight.detach()[~keep].any()


def test_several_optimizers_hold_their_own():
    """Each of several optimizers holds the masks of what it trains."""
    model = small()
    optimizers = [optim.Adam(model.conv.parameters()), optim.SGD(model.head.parameters(), 0.1, momentum=0.9)]
    with hold_masks(model, optimizers, KEEP):
        for _ in range(2):
            F.cross_entropy(model(IMAGES), LABELS).backward()
            for optimizer in optimizers:
                optimizer.step()
            assert_zero(model)


def test_copies_of_the_optimizer():
    """An optimizer that holds masks can be copied and pickled; the copy holds none."""
    model = small()
    optimizer = optim.SGD(model.parameters(), 0.1)
    with hold_masks(model, optimizer, KEEP):
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert not other._optimizer_step_post_hooks
        loaded = optim.SGD(model.parameters(), 0.1).state_dict()
        optimizer.load_state_dict(loaded)
        step(model, optimizer)
        assert_zero(model)


def test_whole_rows():
    """A mask of whole filters is as small as that: one number for each."""
    model = small()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rows = torch.tensor([True, False, True, False]).view(4, 1, 1, 1)
    with hold_masks(model, optimizer, {"conv.weight": rows}) as masks:
        step(model, optimizer)
        assert masks.keep["conv.weight"].shape == (4, 1, 1, 1)
    assert model.conv.weight.detach().flatten(1).any(dim=1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_is_as_large_as_its_weight(dtype):
    """A mask that waits takes one bit an entry; while an optimizer is held, as much memory as its weight."""
    model = small().to(dtype).to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), 0.1)
    masks = Masks(model)
    masks.set_masks_(KEEP)
    assert {name: bits.nbytes for name, (bits, _) in masks.packed().items()} == {"conv.weight": 9, "head.weight": 2}
    assert not masks._factors and not masks._pairs
    masks.hold([optimizer])
    for name, mask in masks._factors.items():
        weight = model.get_parameter(name)
        assert (mask.dtype, mask.stride(), mask.nbytes) == (weight.dtype, weight.stride(), weight.nbytes)
    assert masks._factors.keys() == KEEP.keys()
    masks.release()
    assert not masks._factors and not masks._pairs


@pytest.mark.parametrize("kind", ["Adam", "Adam-foreach", "AdamW-fused", "RMSprop"])
def test_no_root_of_zero_is_taken(kind):
    """Where gradients are masked, second moments of hidden weights do not stay zero, and no step changes by that."""
    model, twin = small().double(), small().double()
    optimizer, other = (OPTIMIZERS[kind](net.parameters()) for net in (model, twin))
    with hold_masks(model, optimizer, KEEP) as masks, hold_masks(twin, other, KEEP) as others:
        for _ in range(4):
            step(model, optimizer, lambda: masks.mask_gradients_(optimizer))
            step(twin, other, lambda: others.mask_gradients_(other))
            for name, stays in KEEP.items():
                second = optimizer.state[model.get_parameter(name)]
                value = second["square_avg" if kind == "RMSprop" else "exp_avg_sq"]
                assert (value[~stays] > 1e-9).all()
                state = other.state[twin.get_parameter(name)]
                state["square_avg" if kind == "RMSprop" else "exp_avg_sq"].mul_(stays)  # zero before each step
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("clips", [True, False])
def test_gradients_are_masked_where_asked(clips):
    """With masked gradients, clipping sees the weights that are left alone, as their own norm would have it."""
    model = small().double()
    optimizer = optim.SGD(model.parameters(), 0.1)
    norms = []

    def before_step(masks):
        if clips:
            masks.mask_gradients_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))

    with hold_masks(model, optimizer, KEEP) as masks:
        step(model, optimizer, lambda: before_step(masks))
    twin = small().double()
    apply_masks_(twin, KEEP)
    F.cross_entropy(twin(IMAGES.double()), LABELS).backward()
    grads = [p.grad * KEEP[n] if n in KEEP and clips else p.grad for n, p in twin.named_parameters()]
    assert norms[0] == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()))


def test_what_is_no_number_cannot_hide():
    """A weight that ran away is zero once its mask falls, too."""
    model = small()
    with torch.no_grad():
        model.head.weight.fill_(torch.inf)
    apply_masks_(model, KEEP)
    assert not model.head.weight.detach()[~KEEP["head.weight"]].any()


def test_a_state_dict_tells_its_masks():
    """State dicts carry the masks beside their tensors, packed to bits, and load with ``weights_only=True``."""
    model = small()
    apply_masks_(model, KEEP)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    told = recipes_in(saved)
    packed = {f"{path}.{leaf}": mask for path, recipe in told.items() for leaf, mask in recipe["masks"].items()}
    assert {name: (bits.dtype, len(bits), shape) for name, (bits, shape) in packed.items()} == {
        "conv.weight": (torch.uint8, 9, [4, 2, 3, 3]),
        "head.weight": (torch.uint8, 2, [3, 4]),
    }
    other = Small()
    other.register_load_state_dict_pre_hook(take_shapes_)
    other.load_state_dict(saved)
    assert all(torch.equal(stays, KEEP[name]) for name, stays in masks_on(other).items())
    assert masks_on(other).keys() == KEEP.keys()


def test_masks_that_do_not_hold_are_not_told():
    """A state dict tells of no mask whose weights have grown back."""
    model = small()
    apply_masks_(model, KEEP)
    step(model, optim.SGD([model.conv.weight], 0.1))
    told = recipes_in(model.state_dict())
    assert [path for path, recipe in told.items() if recipe["masks"]] == ["head"]
    assert list(masks_on(model)) == ["head.weight"]


def test_masks_of_another_model_are_refused():
    """A mask for no parameter, or of another shape, is refused before anything is written."""
    model = small()
    before = copy.deepcopy(model.state_dict())
    for name, match in (("nothing", "no parameter of this name"), ("head.weight", "of shape")):
        with pytest.raises(ValueError, match=match):
            apply_masks_(model, {"conv.weight": KEEP["conv.weight"], name: torch.zeros(7, dtype=torch.bool)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pruned_weights_are_held_by_default():
    """What :func:`prune_weights` has zeroed is what ``hold_masks`` holds when it is given nothing."""
    model = small()
    optimizer = optim.Adam(model.parameters())
    keep = prune_weights(model, 0.5, optimizer=optimizer, scope="global").kept
    with hold_masks(model, optimizer):
        step(model, optimizer)
    assert_zero(model, keep)


def test_zeros_hold_under_sparse_gradients():
    """SparseAdam, which writes some rows of an embedding alone, leaves its masked entries at zero."""
    table, tokens = nn.Embedding(7, 4, sparse=True), torch.tensor([0, 2, 5])
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    keep = torch.rand(7, 4) < 0.5
    with hold_masks(table, optimizer, {"weight": keep}) as masks:
        before = table.weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            table(tokens).square().sum().backward()
            masks.mask_gradients_(optimizer)
            optimizer.step()
            assert not table.weight[~keep].any()
    assert (table.weight != before)[tokens][keep[tokens]].all()


def by_surgery(model, batch):
    return prune_obs(model, batches=[batch[0]], amount=0.5, scope="global").kept


def by_fisher(model, batch):
    return prune_fisher(model, batches=[batch], loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1])).kept


def one_by_one(model, batch):
    return prune_exact(model, batches=[batch], loss=F.mse_loss, amount=0.5).kept


@pytest.mark.parametrize("prune", [by_surgery, by_fisher, one_by_one])
def test_zeros_of_surgery_are_held_and_told(prune):
    """What second-order pruning zeroed stays zero in training under ``hold_masks``, and in whoever loads the state."""
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))  # noqa: E731
    model, batch = make(), (torch.randn(64, 6), torch.randn(64, 2))
    gone = {name: ~stays for name, stays in prune(model, batch).items() if not stays.all()}
    optimizer = optim.Adam(model.parameters(), 0.1)
    with hold_masks(model, optimizer):
        for _ in range(3):
            F.mse_loss(model(batch[0]), batch[1]).backward()
            optimizer.step()
    assert gone and not any(model.get_parameter(name)[entries].any() for name, entries in gone.items())
    other = make()
    load_state_dict_(other, model.state_dict())
    assert {name: ~stays for name, stays in masks_on(other).items()}.keys() == gone.keys()
    assert all(torch.equal(~masks_on(other)[name], entries) for name, entries in gone.items())
